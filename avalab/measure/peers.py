"""The lab's compressor against other people's rows of `quantize.METHODS`, at the same file bytes, by one evaluator.

1. `make_peer` makes an artefact with a peer: a method with its parameters under a name (`PEERS`). What calibrates does
   so on the run's own windows.
2. `match_size` makes the lab's artefact of the same file bytes: its budget is a number of bytes, so the lab does the
   matching, and one it has made already serves again within 1 %. It does so in every form of `FORMS`, a row each:
   `ava-<bytes>b` (int8 embedding at least: transformers, vLLM), `ava-packed-<bytes>b` (embedding below 8 bits: only
   this package loads it) and `ava-gguf-<bytes>b` (llama.cpp and its kin), so that portable forms stand by themselves.
3. `record_peer` appends bytes, seconds and scores, and the ratio of KL divergences to each form on the same windows.
4. `record_peer_calls` asks every subject with a size among the records, found by the sha256 recorded with that size,
   the first cases of each of the profile's categories, calls only, filled in under the grammar (`forced`): a model
   without training gets about half of them right so, and has something to lose. Each answers in the engine that its
   size was recorded with.
5. A peer's rivals are those of its ratios of KL divergences. On the same cases: the difference of shares, ours less
   its, with Newcombe's interval for pairs; how many cases only one of them got right, and McNemar's exact test. Both
   by category and over `all` of them; an ending `:packed` or `:gguf` names the form, as it does behind `kl_ratio`.
   Nothing corrects p-values for the number of comparisons.
6. `python -m avalab.measure.peers` does all of it for a model and writes results/<run>/peers.json after each subject.
   With `--add` it goes on from that file: what it holds is neither made nor scored again, and nothing in it is lost.

A missing library raises EngineUnavailable with the install line; the command records that and goes on.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from functools import partial

from avalab import engines
from avalab.compress import quantize
from avalab.data import corpora
from avalab.data.calls import Case, cases
from avalab.lab import artifacts, statistics
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.lab.run import PROFILES, ROOT, Record, Run, load_average, load_records
from avalab.measure import answers, quality
from avalab.measure.answers import Respondent
from avalab.models import checkpoint, predict
from avalab.models.predict import Reference

SAME_BYTES = 0.01  # two files within this share are of one size

FORMS: dict[str, dict] = {"ava": {}, "ava-packed": {"embedding": "packed"}, "ava-gguf": {"format": "gguf"}}

SHOWN = ("kl_divergence", "kl_divergence_p99", "top1_agreement", "perplexity")

# Bits and group sizes of the methods that take them; each with its embedding in bf16, and in int8 rows (-int8emb).
SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "rtn": ((4, 64), (3, 64), (2, 64)),
    "gptq": ((6, 64), (4, 64), (3, 64), (2, 64)),
    "awq": ((4, 64),),
    "autoround": ((6, 64), (4, 64), (4, 32), (3, 64), (2, 64)),
    "hqq": ((4, 64), (3, 64), (2, 64)),
}

WITHOUT_SIZES = ("openvino-int4", "nncf-int4", "onnx-k-quant", "gguf-q4_k_m", "gguf-q3_k_m", "gguf-q2_k")

PEERS: dict[str, tuple[str, dict]] = {
    f"{method}-w{bits}g{group}{ending}": (method, {"bits": bits, "group_size": group, "embedding": embedding})
    for ending, embedding in (("", "bf16"), ("-int8emb", "int8"))
    for method, sizes in SIZES.items()
    for bits, group in sizes
}

PEERS |= {"nf4": ("nf4", {}), "nf4-dq": ("nf4", {"double_quantization": True})}

PEERS |= {method: (method, {}) for method in WITHOUT_SIZES}

# The libraries that calibrate, at three sizes, and NNCF: two hours on one thread, most of them AutoRound's.
SHORT = (*(f"{method}-w{bits}g64-int8emb" for bits in (4, 3, 2) for method in ("gptq", "autoround")), "nncf-int4")

MODE, ALL = "forced", "all"

SHARE = answers.MODES[MODE]

DIFFERENCE = f"{SHARE}_difference"

Right = dict[str, list[bool]]  # by category, and over all


def known_peer(peer: str) -> tuple[str, dict]:
    """Method and parameters of a peer. Raises ValueError listing the names for an unknown one."""
    if peer not in PEERS:
        raise InputError(f"unknown peer {peer!r}; choose one of {', '.join(PEERS)}")
    return PEERS[peer]


def make_peer(base: Artifact, peer: str, *, run: Run) -> Artifact:
    """The artefact of a peer. Raises ValueError for an unknown one, and what `quantize.compress_artifact` raises."""
    method, parameters = known_peer(peer)
    return quantize.compress_artifact(base, method, run=run, **parameters)


def match_size(base: Artifact, size: int, *, run: Run, form: str = "ava", made: Sequence[Artifact] = ()) -> Artifact:
    """The lab's artefact of `size` bytes in one of `FORMS`: one of `made` within 1 % of it, or a new one.

    Raises ValueError for an unknown form, and as `ava` does for a budget that no file fits.
    """
    if form not in FORMS:
        raise InputError(f"unknown form {form!r} of the lab's artefact; choose one of {', '.join(FORMS)}")
    near = [artifact for artifact in made if abs(artifact.bytes / size - 1) <= SAME_BYTES]
    return near[0] if near else quantize.compress_artifact(base, "ava", bytes=size, run=run, **FORMS[form])


def references(run: Run, base: Artifact) -> dict[str, Reference]:
    """What every subject is compared with: the base on the windows of each evaluation text of the profile."""
    tokenizer, cache = checkpoint.load_tokenizer(base), run.artifacts_dir / "cache"
    texts = corpora.evaluation_texts(run, tokenizer)
    windows = {text.name: corpora.profile_windows(run, text, tokenizer) for text in texts}
    return {name: predict.make_reference(base, rows, cache, run.device) for name, rows in windows.items()}


def record_peer(
    run: Run,
    subject: str,
    artifact: Artifact,
    against: dict[str, Reference],
    *,
    peer: str = "",
    rivals: Mapping[str, Artifact] | None = None,
) -> None:
    """Append bytes, seconds and, for each text, KL (mean, 99th percentile), agreement, perplexity and loss increase.

    `peer` names the row whose engine scores the artefact (none: torch). With `rivals` by form, which torch has to load,
    also `kl_ratio` (`:packed` and `:gguf` behind the text for those forms): the rival's mean KL divergence over this
    one's, windows paired.
    """
    engine, embedding = "torch", "as its recipe says"
    if peer:
        method, parameters = known_peer(peer)
        row = quantize.METHODS[method]
        engine = row.engines[0]
        embedding = quantize.INT8_EMBEDDING if parameters.get("embedding") == "int8" else row.embedding
    record = partial(run.record, subject, artifact_sha256=artifact.sha256, engine=engine)
    stored = {"embedding": embedding, "format": artifact.format}
    record("artifact_bytes", artifact.bytes, "bytes", n=1, details=stored)
    measured = artifact.card["measured"]
    details = {"recipe": artifact.card["recipe"], **measured}
    record("compress_seconds", measured.get("compress_seconds"), "s", n=1, details=details)
    cache, resamples = run.artifacts_dir / "cache", run.profile.resamples
    for text, reference in against.items():
        ours = quality.score_artifact(artifact, reference, cache, run.device, engine=engine)
        base = quality.score_artifact(reference.base, reference, cache, run.device)
        for metric, unit, estimate in quality.quality_estimates(run, ours, base):
            record(f"{metric}:{text}", unit=unit, **vars(estimate))
        tail = statistics.tail_percentile(ours.kl, resamples=resamples, seed=run.seed)
        record(f"kl_divergence_p99:{text}", unit="nats/token", **vars(tail))
        for form, rival in (rivals or {}).items():
            theirs = quality.score_artifact(rival, reference, cache, run.device)
            ratio = statistics.paired_ratio(theirs.kl, ours.kl, resamples=resamples, seed=run.seed)
            details = {"rival": rival.name, "rival_bytes": rival.bytes, "rival_sha256": rival.sha256}
            record(f"kl_ratio:{text}{_ending(form)}", unit="1", details=details, **vars(ratio))


def _ending(form: str) -> str:
    """What stands behind a metric that compares with a form: nothing, `:packed` or `:gguf`."""
    return f":{form.removeprefix('ava-')}" if form != "ava" else ""


def compare_peers(run: Run, names: Sequence[str], *, forms: Sequence[str] = ()) -> None:
    """Record the base, each named peer and the lab's artefacts of its size, in all forms or the named ones.

    What the run's records hold already is left as it is, and a lab's artefact of theirs serves again within 1 %. The
    file of records is written after each subject. Raises ValueError when those records are of another base.
    """
    base, sized = checkpoint.base_artifact(run), _sized(run)
    if "base" in sized and sized["base"].artifact_sha256 != base.sha256:
        raise InputError(f"{run.records_path.name} is about another base than {base.name}; start anew, without --add")
    against = references(run, base)
    if "base" not in sized:
        record_peer(run, "base", base, against)
    recorded = recorded_artifacts(run)
    made = {form: [a for s, a in recorded.items() if re.fullmatch(rf"{form}-\d+b", s)] for form in forms or FORMS}
    for name in (name for name in names if name not in sized):
        run.records[:] = [row for row in run.records if row.subject != name]  # why it failed then
        try:
            artifact = make_peer(base, name, run=run)
            found = {form: _rival(run, base, artifact.bytes, against, form, made[form]) for form in made}
            rivals = {form: rival for form, rival in found.items() if rival}
            record_peer(run, name, artifact, against, peer=name, rivals=rivals)
        except (engines.EngineUnavailable, ValueError, RuntimeError) as error:  # NotSupported is a ValueError
            run.record(name, "kl_divergence", None, "nats/token", note=" ".join(str(error).split()))
        run.save()


def _rival(run: Run, base: Artifact, size: int, against: dict, form: str, made: list[Artifact]) -> Artifact | None:
    """The lab's artefact of this size, recorded when it is new; None, with the reason, where there is none."""
    try:
        rival = match_size(base, size, run=run, form=form, made=made)
    except ValueError as error:
        run.record(f"{form}-{size}b", "kl_divergence", None, "nats/token", note=" ".join(str(error).split()))
        return None
    if rival not in made:
        made.append(rival)
        record_peer(run, f"{form}-{rival.bytes}b", rival, against)
    return rival


def _sized(run: Run) -> dict[str, Record]:
    return {row.subject: row for row in run.records if row.metric == "artifact_bytes"}


def recorded_artifacts(run: Run) -> dict[str, Artifact]:
    """The artefact of each subject that has a size among the run's records and whose bytes are still there."""
    here = {artifact.sha256: artifact for artifact in artifacts.list_artifacts(run.artifacts_dir)}
    return {s: here[row.artifact_sha256] for s, row in _sized(run).items() if row.artifact_sha256 in here}


# --- function calls ---------------------------------------------------------------------------------------------------


def record_peer_calls(run: Run, limit: int, *, chosen: Sequence[str] = ()) -> None:
    """Append shares of right calls, `limit` cases a category, of all recorded subjects, and peers against the lab.

    The categories are the profile's or the `chosen` ones. Call records that were there are replaced, and the file of
    records is written after each subject. A subject that cannot be asked has a row that says why.
    Raises ValueError for a limit below one, or a category that is unknown or cannot be forced.
    """
    names = list(chosen) or answers.answerable(run.profile.call_categories, MODE)
    if limit < 1:
        raise InputError(f"cases of each category have to be 1 or more, got {limit}")
    asked = {name: cases(name, limit) for name in names if answers.call_metric(name, MODE)}
    here, sized, rivals = recorded_artifacts(run), _sized(run), _rivals(run)
    right: dict[str, Right] = {}  # by the artefact's hash
    # Rivals before peers: each peer is paired as soon as it has answered.
    for subject in sorted(sized, key=lambda name: name in rivals):
        old = [row for row in run.records if row.subject == subject and row.metric.startswith(SHARE)]
        run.records[:] = [row for row in run.records if row not in old]
        right[sized[subject].artifact_sha256] = _record_shares(run, sized[subject], here.get(subject), asked)
        for form, ratio in rivals.get(subject, {}).items():
            ours, theirs = (right.get(sha, {}) for sha in (ratio.details["rival_sha256"], ratio.artifact_sha256))
            record_difference(run, subject, ours, theirs, form=form, ratio=ratio)
        run.save()


def _rivals(run: Run) -> dict[str, dict[str, Record]]:
    """For each peer, the first ratio to each form of the lab's artefact, under the form's ending."""
    found: dict[str, dict[str, Record]] = {}
    for row in run.records:
        name, _, rest = row.metric.partition(":")
        if name == "kl_ratio" and row.value is not None:
            _, colon, form = rest.partition(":")
            found.setdefault(row.subject, {}).setdefault(colon + form, row)
    return found


def _record_shares(run: Run, size: Record, artifact: Artifact | None, asked: dict[str, list[Case]]) -> Right:
    """Append a subject's shares; which were right by category, nothing when it could not be asked."""
    record = partial(run.record, size.subject, unit="1", artifact_sha256=size.artifact_sha256, engine=size.engine)
    try:
        if artifact is None:
            raise InputError("no artefact of these bytes is left")
        artifacts.load_artifact(artifact.path)  # its files are those of its card
        respondent, verdicts = Respondent(artifact, run.device, engine=size.engine), {}
        for name, rows in asked.items():
            label = f"{artifact.name} {name}"
            texts = answers.answer_calls(respondent, rows, MODE, run.artifacts_dir / "cache", progress=label)
            verdicts[name] = answers.judge_calls(rows, texts)
    except (ValueError, RuntimeError) as error:  # NotSupported is the one, EngineUnavailable the other
        record(f"{SHARE}:{ALL}", value=None, note=f"not asked: {' '.join(str(error).split())}")
        return {}
    verdicts[ALL] = [verdict for rows in verdicts.values() for verdict in rows]
    for name, rows in verdicts.items():
        share = statistics.wilson(sum(verdict.correct for verdict in rows), len(rows))
        details = {"mode": MODE, "errors": answers.count_errors(rows)}
        record(f"{SHARE}:{name}", details=details, **vars(share))
    return {name: [verdict.correct for verdict in rows] for name, rows in verdicts.items()}


def record_difference(run: Run, subject: str, ours: Right, theirs: Right, *, form: str, ratio: Record) -> None:
    """Append, for each category that both answered, the rival's share of right calls less the subject's."""
    for category in (name for name in theirs if name in ours):
        flips = statistics.mcnemar(ours[category], theirs[category])
        details = {"only_ours": flips.gained, "only_its": flips.lost, "p_value": flips.p_value}
        details |= {"verdict": flips.verdict, **{k: ratio.details[k] for k in ("rival", "rival_sha256")}}
        run.record(
            subject,
            f"{DIFFERENCE}:{category}{form}",
            unit="1",
            artifact_sha256=ratio.artifact_sha256,
            engine=ratio.engine,
            details=details,
            **vars(statistics.share_difference(ours[category], theirs[category])),
        )


def peers_columns(run: Run, scores: Sequence[str] = SHOWN) -> list[str]:
    """The metrics of a table of peers: bytes, seconds; on each text scores and ratios to every form; function calls."""
    texts, forms = run.profile.eval_texts, [_ending(form) for form in FORMS]
    return [
        "artifact_bytes",
        "compress_seconds",
        *(f"{score}:{text}" for text in texts for score in scores),
        *(f"kl_ratio:{text}{form}" for text in texts for form in forms),
        f"{SHARE}:{ALL}",
        *(f"{DIFFERENCE}:{ALL}{form}" for form in forms),
    ]


def peers_table(records: Sequence[Record], columns: Sequence[str]) -> str:
    """A line a subject with the named metrics, and its first note."""
    found = {(r.subject, r.metric): r for r in records}
    names = [c.removeprefix("artifact_").removeprefix("compress_").replace("_divergence", "") for c in columns]
    widths = [max(12, len(name)) for name in names]
    lines = [f"{'subject':28}" + " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))]
    for subject in dict.fromkeys(r.subject for r in records):
        values = [getattr(found.get((subject, column)), "value", None) for column in columns]
        cells = [f"{'-' if v is None else f'{v:.6g}':>{width}}" for v, width in zip(values, widths, strict=True)]
        note = next((r.note for r in records if r.subject == subject and r.note), "")
        lines.append(f"{subject:28}{' '.join(cells)}  {note}".rstrip())
    return "\n".join(lines)


def main() -> None:
    """Compare peers with the lab's compressor on one model; prints a table."""
    options = _options()
    run = Run("peers", options.profile, options.seed, options.model)
    if options.add and run.records_path.is_file():
        run.records += load_records(run.records_path)
    compare_peers(run, options.peers.split(","), forms=options.forms.split(","))
    calls = run.profile.call_items if options.calls is None else options.calls
    if calls:
        record_peer_calls(run, calls)
    print(peers_table(run.records, peers_columns(run)))
    print(f"load average {load_average()}; records: {run.records_path.relative_to(ROOT)}")


def _options() -> argparse.Namespace:
    """The command's options; a wrong one ends the command before anything runs."""
    parser = argparse.ArgumentParser(prog="python -m avalab.measure.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="", help="asset, folder or hub id; the profile's own without it")
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", default=",".join(FORMS), help="forms of the lab's artefact, joined by commas")
    parser.add_argument("--peers", default=",".join(SHORT), help=f"names joined by commas; all: {', '.join(PEERS)}")
    parser.add_argument("--calls", type=int, help="function calls of each category; 0: none; the profile's own without")
    parser.add_argument("--add", action="store_true", help="go on from the records that are there")
    options = parser.parse_args()
    for kind, given, allowed in (("peer", options.peers, PEERS), ("form", options.forms, FORMS)):
        unknown = [name for name in given.split(",") if name not in allowed]
        if unknown:
            parser.error(f"unknown {kind} {', '.join(unknown)}; choose from {', '.join(allowed)}")
    if options.calls is not None and options.calls < 0:
        parser.error(f"--calls has to be 0 or more, got {options.calls}")
    return options


if __name__ == "__main__":
    main()
