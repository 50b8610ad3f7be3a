"""A shortlist: some models in their best forms and engines, all measured alike, from which `choose` takes its choices.

    python -m avalab.plan.shortlist [--profile P] [--again]        (make bench-sizes; --again measures times anew)

1. A row is a form of a model in an engine (`qwen2.5-coder-0.5b published in llamacpp`); the forms are those of `FORMS`.
   `bf16` is the model before: what the others are compared with, in transformers. What is not made here, because it
   would take longer than the run allows or more memory than there is, is a row that says so with both numbers.
2. Quality, kept as it is found: the divergence from the model's own base on each evaluation text, and function calls of
   the leaderboard, a call forced by a grammar, the same cases for every row (those after `SKIPPED`, at which nothing
   was ever looked while something was tuned). The categories together are one share, `call_accuracy_forced:together`.
3. Times: a race of the rows of one model (`race`), then each row at the stated contexts (`context`): the peak of memory
   above the process's runtime, the time of a token and of the prompt. They are kept, too, so that a killed run goes on;
   only `--again` replaces them.
4. Predictions stand beside what was measured: bytes of the file, and the peak at each context.

The published files are 4-bit already, and the bases are made of them: a published file is the same function as its base
but for how activations are rounded, and `ava` starts from its numbers. At equal quality a file can only be smaller.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import psutil
from tqdm.auto import tqdm

from avalab import engines
from avalab.compress import quantize
from avalab.data import corpora
from avalab.engines import gguf as gguf_file
from avalab.lab import artifacts, assets, statistics
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cache_path, cached_document
from avalab.lab.code import code_of
from avalab.lab.errors import LabError, ProcessFailed
from avalab.lab.run import PROFILES, ROOT, Run, device_name, load_average, time_now
from avalab.measure import answers, context, quality, race
from avalab.measure.race import Entry
from avalab.models import checkpoint, predict, sizes

BASE = "bf16"

SKIPPED = 168  # cases of each category that something was tuned or looked at on

MODE, TOGETHER = "forced", "call_accuracy_forced:together"

BITS = {"smoke": 7.0}  # a weight of `ava`'s file, embedding included: a tiny one is mostly header; others 4.5

NEW_TOKENS = 16

CONTEXTS = {"smoke": (32, 64), "laptop": (512, 2048)}  # that are stated; others 2,048 and 8,192

WARM_UP = 256  # tokens of a first length that counts for nothing, where the stated ones are longer

ITEMS = {"laptop": 6}  # cases of each category; others the profile's number

CAPS = {"smoke": 1.0, "laptop": 20.0}  # seconds of one model's race; others 240

VISITS = {"smoke": race.VISITS["smoke"]}

MAKING_MINUTES = {"smoke": 2.0, "laptop": 3.0}  # that making one form may take; others 180


@dataclass(frozen=True)
class Form:
    """A form: what a reader calls it, how it is made, the engines it is measured in, what making takes.

    `made_as` is how the names of its artefacts go on after the base's.
    """

    words: str
    make: Callable[[Artifact, Run], Artifact]
    engines: tuple[str, ...] = ("llamacpp",)
    making_bytes: int = 0  # of memory, for each weight
    is_slow: bool = False
    made_as: str = ""


def _published(base: Artifact, run: Run) -> Artifact:
    model = run.model
    return gguf_file.keep_published(base, assets.only_gguf(assets.resolve_model(model)))


def _ava(base: Artifact, run: Run) -> Artifact:
    """The one that the run has made already, whatever its size, else one of `BITS`."""
    made = [a for a in artifacts.list_artifacts(run.artifacts_dir) if a.card["base"]["sha256"] == base.sha256]
    steps = [step for a in made for step in a.card["recipe"][-1:] if step.get("format") == "gguf"]
    usual = [step for step in steps if step["step"] == "ava" and "calibration_text" not in step]
    size = next((step["bytes"] for step in usual if step["bytes"]), 0)
    budget = {"bytes": size} if size else {"bits_per_weight": run.profile.pick(BITS, 4.5)}
    return quantize.compress_artifact(base, "ava", run=run, format="gguf", **budget)


FORMS: dict[str, Form] = {
    BASE: Form("16 bits, in transformers", lambda base, run: base, ("torch",)),
    "published": Form("the publisher's 4-bit file", _published),
    # 8.6 GB at the peak for the 630 million weights of Qwen2.5-Coder-0.5B
    "ava": Form("the lab's smaller GGUF file", _ava, making_bytes=14, is_slow=True, made_as="ava"),
    # the check of an export holds the model in float32, a copy that it rounds and turns to bf16, and the file
    "q8_0": Form(
        "8-bit GGUF file", lambda base, run: gguf_file.write(base, "q8_0"), ("openvino",), 11, made_as="gguf-q8_0"
    ),
}

SOME = {"smoke": ("ava", "q8_0"), "laptop": (BASE, "published", "ava", "q8_0")}  # the profiles' own forms


@dataclass(frozen=True, eq=False)
class Row:
    """A form of a model in an engine."""

    subject: str
    form: str
    entry: Entry


def runs_of(run: Run, models: Sequence[str] = ()) -> list[Run]:
    """A run for each of the models (default: the profile's), all of which append to the records of `run`.

    The models are those of the profile only where the run is of the profile's own model.
    """
    own = run.profile.models if run.model == run.profile.model else ()
    return [Run(run.notebook, run.profile_name, run.seed, m, records=run.records) for m in models or own or [run.model]]


def short_name(run: Run) -> str:
    """`qwen2.5-coder-0.5b`."""
    return run.name_of_model.removesuffix("-instruct")


def contexts(run: Run) -> tuple[int, ...]:
    """The stated contexts in tokens."""
    return run.profile.pick(CONTEXTS, (2048, 8192))


def texts(run: Run) -> tuple[str, ...]:
    """The evaluation texts: the profile's first two."""
    return run.profile.eval_texts[:2]


# --- forms ------------------------------------------------------------------------------------------------------------


def make_rows(run: Run, names: Sequence[str] = (), *, minutes: float = 0.0) -> list[Row]:
    """The forms of a run's model in their engines, as far as they can be made and read; the others are records."""
    base, rows = checkpoint.base_artifact(run), []
    threads = max(race.thread_counts(run.profile_name))
    for name in tqdm(names or run.profile.pick(SOME, tuple(FORMS)), desc=f"make {short_name(run)}", leave=False):
        form, subject = FORMS[name], f"{short_name(run)} {name}"
        try:
            if not _is_made(run, base, form):
                refuse_large(base, name)
            if form.is_slow and not _is_made(run, base, form):
                refuse_long(run, base, minutes or run.profile.pick(MAKING_MINUTES, 180.0))
            made = form.make(base, run)
        except LabError as error:
            run.record(subject, "artifact_bytes", None, "byte", note=f"not made: {error}")
            continue
        readers = made.card["engines"]
        for engine in [engine for engine in form.engines if engine in readers]:
            rows.append(Row(f"{subject} in {engine}", name, Entry(f"{subject} in {engine}", made, engine, threads)))
        _record_bytes(run, rows, base)
    return rows


def _is_made(run: Run, base: Artifact, form: Form) -> bool:
    made = [a for a in artifacts.list_artifacts(run.artifacts_dir) if a.card["base"]["sha256"] == base.sha256]
    return bool(form.made_as) and any(a.name.startswith(f"{base.name}+{form.made_as}") for a in made)


def refuse_large(base: Artifact, name: str) -> None:
    """Raise ProcessFailed, with both numbers, for a form whose making would take more memory than is free."""
    needed, free = FORMS[name].making_bytes * (base.bytes // 2), psutil.virtual_memory().available
    if needed > free:
        raise ProcessFailed(f"making it takes about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")


def refuse_long(run: Run, base: Artifact, minutes: float) -> None:
    """Raise ProcessFailed, with both numbers, where `ava` would take more time than a run allows.

    Its time is proportional to the weights, as measured on the models of this profile that have one; before that
    nothing is known.
    """
    weights, made = base.bytes // 2, _made_by_ava(run)
    if made:
        artifact, own = max(made, key=lambda pair: pair[1])
        taken = artifact.card["measured"]["compress_seconds"] / 60
        if (expected := taken * weights / own) > minutes:
            raise ProcessFailed(
                f"ava would take about {expected:.0f} minutes for it ({taken:.0f} measured for {artifact.name}), this "
                f"run allows {minutes:g}; give more with the notebook's parameter making_minutes"
            )


def _made_by_ava(run: Run) -> list[tuple[Artifact, int]]:
    """The GGUF files that `ava` made for the models of a profile, each with the weights of its base."""
    found = []
    for model in runs_of(Run(run.notebook, run.profile_name, run.seed)):
        for each in artifacts.list_artifacts(model.artifacts_dir):
            last = each.card["recipe"][-1] if each.card["recipe"] else {}
            base = artifacts.of_sha256(model.artifacts_dir, each.card["base"]["sha256"])
            if last.get("step") == "ava" and last.get("format") == "gguf" and base:
                found.append((each, base.bytes // 2))
    return found


def _record_bytes(run: Run, rows: list[Row], base: Artifact) -> None:
    """Bytes of the newest rows' file, with what they were expected to be where a formula says."""
    for row in rows:
        if any(r.subject == row.subject and r.metric == "artifact_bytes" for r in run.records):
            continue
        artifact = row.entry.artifact
        record = partial(run.record, row.subject, artifact_sha256=artifact.sha256, engine=row.entry.engine)
        record("artifact_bytes", sizes.weight_file_bytes(artifact.path), "byte")
        if predicted := _predicted_bytes(row, base):
            record("predicted_bytes:artifact", predicted, "byte")


def _predicted_bytes(row: Row, base: Artifact) -> int:
    """What a formula, or the allocation of `ava`, says of a file; 0 for a published one, of which nothing was known."""
    if row.form == BASE:
        return sizes.predict_artifact_bytes(sizes.shape_of(base), sizes.BF16)
    if row.form == "q8_0":
        return sizes.predict_gguf_bytes(checkpoint.skeleton(base.path), base.path, 8.5)
    return row.entry.artifact.card["measured"].get("predicted_bytes", 0)


# --- quality ----------------------------------------------------------------------------------------------------------


def record_divergences(run: Run, rows: list[Row]) -> None:
    """Append what every row loses against the run's base on each evaluation text of the profile."""
    base = checkpoint.base_artifact(run)
    tokenizer, device = checkpoint.load_tokenizer(base), run.device
    for text in [corpora.evaluation_text(name, tokenizer) for name in texts(run)]:
        windows = corpora.profile_windows(run, text, tokenizer)
        reference = predict.make_reference(base, windows, run.artifacts_dir / "cache", device)
        for row in tqdm(rows, desc=f"{short_name(run)} {text.name}", leave=False):
            engine = row.entry.engine
            quality.record_quality(run, row.subject, row.entry.artifact, reference, text, engine=engine)


def record_calls(run: Run, rows: list[Row], *, items: int = 0) -> None:
    """Append the share of right calls of every row: by category, and of all of them together with each verdict."""
    items = items or run.profile.pick(ITEMS, run.profile.call_items)
    skip = 0 if run.profile.call_categories[0].startswith("toolbox") else SKIPPED
    for row in tqdm(rows, desc=f"{short_name(run)} calls", leave=False):
        respondent = answers.Respondent(row.entry.artifact, run.device, engine=row.entry.engine)
        ask = partial(answers.record_calls, run, row.subject, respondent, mode=MODE, limit=items, skip=skip)
        wanted = answers.answerable(run.profile.call_categories, MODE)
        verdicts = [ask(category=category) for category in wanted]
        right = [verdict.correct for each in verdicts for verdict in each]
        if all(verdicts):
            share = vars(statistics.wilson(sum(right), len(right)))
            details = {"right": "".join(str(int(each)) for each in right), "categories": wanted, "skipped": skip}
            run.record(
                row.subject, TOGETHER, unit="1", engine=row.entry.engine, details=details,
                artifact_sha256=row.entry.artifact.sha256, **share,
            )  # fmt: skip


# --- times and memory -------------------------------------------------------------------------------------------------


def record_speeds(run: Run, rows: list[Row], *, cap_seconds: float = 0.0) -> None:
    """Append a race of the rows of one model; visits of an earlier one are read back."""
    sizes = run.profile.pick(VISITS, race.VISITS["laptop"])
    work = replace(race.visit_workload(run), prompts=sizes.prompts, new_tokens=sizes.new_tokens, limit_seconds=600)
    work = replace(work, samples=sizes.samples)
    cap = cap_seconds or run.profile.pick(CAPS, 240.0)
    race.hold_race(run, [row.entry for row in rows], work=work, cap_seconds=cap)


def record_contexts(run: Run, rows: list[Row], *, again: bool = False) -> None:
    """Append memory, speed and their predictions at the stated contexts, the longest one not of the model before."""
    for row in tqdm(rows, desc=f"{short_name(run)} contexts", leave=False):
        stated = contexts(run)[: 1 if row.form == BASE and run.profile_name != "smoke" else None]
        record = partial(
            run.record, row.subject, artifact_sha256=row.entry.artifact.sha256, engine=row.entry.engine,
            threads=row.entry.threads,
        )  # fmt: skip
        try:
            kept = measured_contexts(run, row, stated, again=again)
        except (RuntimeError, ValueError) as error:
            record(f"peak_rss_bytes:engine:context{max(stated)}", None, "byte", note=str(error))
            continue
        for values in kept["points"]:
            point = context.Point(**values | {"samples": tuple(values["samples"])})  # JSON has lists only
            if point.length in stated:
                _record_point(partial(record, when=kept["when"]), point)


def measured_contexts(run: Run, row: Row, stated: Sequence[int], *, again: bool = False) -> dict:
    """`points` of the lengths in a process of their own, and `when`; those of an earlier run are read back."""
    lengths = (WARM_UP, *stated) if min(stated) > WARM_UP else tuple(stated)
    how = {"lengths": lengths, "threads": row.entry.threads, "new_tokens": NEW_TOKENS}
    how |= {"memory_cap_gib": run.profile.memory_cap_gib}
    code = code_of("avalab.measure.context:measure_lengths", engines.ENGINES[row.entry.engine])
    about = [row.entry.artifact.sha256, row.entry.engine, how, device_name(run.device), code]
    key = artifacts.sha256_of_text(json.dumps(about))[:24]

    def measure() -> dict:
        when = time_now()
        found = context.measure_lengths(row.entry.artifact, row.entry.engine, **how)
        return {"when": when, "points": [asdict(point) for point in found]}

    path = cache_path(run.artifacts_dir / "cache", "contexts", key, suffix=".json")
    kept = cached_document(path, measure, again=again)
    if any(point["seconds_per_token"] is None for point in kept["points"]):
        path.unlink()  # what stopped it, a busy machine or too little memory, may be over by the next run
    return kept


def _record_point(record: Callable, point: context.Point) -> None:
    """One length of one row: memory above the runtime, what was predicted of it, a token's time, the two speeds."""
    ending = f"context{point.length}"
    if point.seconds_per_token is None:
        record(f"peak_rss_bytes:engine:{ending}", None, "byte", note=point.note)
        return
    one, runtime = partial(record, details=point.details), point.details["memory"]["runtime"]
    one(f"peak_rss_bytes:engine:{ending}", max(0, point.peak_bytes - runtime), "byte")
    one(f"predicted_bytes:peak_rss_bytes:engine:{ending}", point.predicted_bytes - runtime, "byte")
    samples = [1000 * seconds for seconds in point.samples]
    one(f"token_latency_ms:{ending}", unit="ms", samples=samples, **vars(statistics.quantile(samples)))
    rates = vars(statistics.quantile([1 / seconds for seconds in point.samples]))
    one(f"decode_tokens_per_s:{ending}", unit="token/s", **rates)
    prompt = point.length - NEW_TOKENS
    one(f"prefill_tokens_per_s:{ending}", prompt / point.first_token_seconds, "token/s", n=1)


# --- all of it --------------------------------------------------------------------------------------------------------


def measure_model(
    run: Run, *, items: int = 0, minutes: float = 0.0, again: bool = False, timed: bool = True
) -> list[Row]:
    """Everything of one model, each part kept as it is found; without `timed` only what does not depend on quiet."""
    rows = make_rows(run, minutes=minutes)
    record_divergences(run, rows)
    record_calls(run, rows, items=items)
    if timed:
        if again:
            (run.artifacts_dir / "cache" / "race.jsonl").unlink(missing_ok=True)
        record_speeds(run, rows)
        record_contexts(run, rows, again=again)
    return rows


def main() -> None:
    """`make bench-sizes`."""
    parser = argparse.ArgumentParser(description="Measure some models in their best forms and engines.")
    parser.add_argument("--profile", choices=PROFILES, default="sizes")
    parser.add_argument("--again", action="store_true", help="measure times and memory anew; quality is kept")
    parser.add_argument("--untimed", action="store_true", help="only what does not depend on a quiet machine")
    parser.add_argument("--models", nargs="*", default=(), help="only these")
    parser.add_argument("--items", type=int, default=0, help="cases of each category; 0: the profile's number")
    given = parser.parse_args()
    whole = Run("bench_sizes", given.profile)
    for run in runs_of(whole, given.models):
        print(f"{run.model}: load average {load_average()}", flush=True)
        measure_model(run, items=given.items, again=given.again, timed=not given.untimed)
        whole.save()
    for record in whole.records:
        shown = record.note if record.value is None else f"{record.value:14.4g} {record.unit}"
        print(f"{record.subject:44} {record.metric:44} {shown}")
    print(f"load average {load_average()}; records: {whole.save().relative_to(ROOT)}")


if __name__ == "__main__":
    main()
