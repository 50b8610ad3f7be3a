"""The sub-commands that measure: bench (what it costs to run), eval (what it can do), and compare.

`avalab compare A B`: is the first artefact better than the second, worse, or not distinguishable?

    bfcl    the same function-calling cases, McNemar's exact test
    text    the same windows of text, paired bootstrap of the loss
    speed   the same prompts in the same engine, both artefacts loaded, generations in turn: each round is a ratio of
            seconds, ours over theirs; the interval of their median is one of order statistics, which takes no shape of
            the noise for granted. Whoever goes first changes from round to round, so that neither profits from what
            the other left in a cache, and what disturbs the machine meets both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli import options
from avalab.cli.options import AsJson, Limit, Mode, ModelPath, Profile, Seed
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, ProcessFailed
from avalab.lab.run import Run

TASKS = ("bfcl", "text", "speed")

SPEED_ROUNDS = 11  # an odd number, enough for an interval of the median


def bench(
    artifact: ModelPath,
    engine: Annotated[str, typer.Option(help="An engine of avalab.engines; without, torch and the roofline.")] = "",
    threads: Annotated[int, typer.Option(min=0, help="Threads of that engine; 0 leaves its own choice.")] = 0,
    again: Annotated[bool, typer.Option("--again", help="Measure afresh what was measured before.")] = False,
    profile: Profile = "laptop",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Load and run an artefact in a process of its own: bytes, memory, load time, prefill, decode, latency."""
    run = Run("avalab_bench", profile, seed)
    if engine:
        options.one_of("engine", engine, options.ENGINES)
    found = options.source_artifact(options.readable(artifact), run)
    from avalab.measure import cell, cost

    if not engine and options.engine_of(found) != "torch":  # no torch, no roofline
        engine = options.engine_of(found)
    if engine:
        work = cell.Workload(samples=run.profile.latency_samples, threads=threads, seed=run.seed)
        measured = cell.measure_cell(found, engine, work=work)
        cell.record_cell(run, found, engine=engine, work=work, cell=measured)
    else:
        cost.record_cost(run, found.name, found, again=again)
    options.print_records(run, as_json)


def evaluate(
    artifact: ModelPath,
    tasks: Annotated[str, typer.Option(help="bfcl, humaneval, tasks of lm-evaluation-harness; with commas.")] = "bfcl",
    mode: Annotated[
        str, typer.Option(help="free (any text), grammar (a call or a refusal), forced (a call), or all of them.")
    ] = options.ALL,
    engine: Annotated[str, typer.Option(help="An engine of avalab.engines; without, torch where it can.")] = "",
    limit: Limit = None,
    skip: Annotated[int, typer.Option(min=0, help="Cases of each BFCL category to leave out at its beginning.")] = 0,
    profile: Profile = "laptop",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Score an artefact on function calls and on code; what was answered before is read, not asked again."""
    run, wanted = Run("avalab_eval", profile, seed), options.known_tasks(tasks)
    options.one_of("mode", mode, (*options.CALL_MODES, options.ALL))
    if engine:
        options.one_of("engine", engine, options.ENGINES)
    others = [task for task in wanted if task not in options.TASKS]
    found = options.source_artifact(options.readable(artifact), run)
    from avalab.measure import answers, harness

    if others:
        harness.require_harness()
    respondent = answers.Respondent(found, run.device, engine=engine or options.engine_of(found))
    if "bfcl" in wanted:
        modes = options.CALL_MODES if mode == options.ALL else (mode,)
        verdicts = _ask_calls(run, respondent, modes, limit=limit, skip=skip)
        if mode == options.ALL and not as_json:
            _print_modes(run, verdicts)
            run.records.clear()  # they are in the table
    if "humaneval" in wanted:
        answers.record_pass_at_1(run, found.name, respondent, answers.code_problems(run, limit))
    if others:
        harness.record_tasks(found, others, run=run, limit=limit)
    options.print_records(run, as_json)


def _ask_calls(run: Run, respondent, modes: Sequence[str], *, limit: int | None, skip: int) -> dict[str, list]:
    """Record every category in every mode that it has; by mode, the verdicts on cases in which a call is right."""
    from avalab.measure import answers

    found: dict[str, list] = {mode: [] for mode in modes}
    for mode in modes:
        for category in answers.answerable(run.profile.call_categories, mode):
            verdicts = answers.record_calls(
                run, respondent.artifact.name, respondent, category=category, mode=mode, limit=limit, skip=skip
            )
            if category in answers.answerable([category], "forced"):
                found[mode] += verdicts
    return found


def _print_modes(run: Run, verdicts: dict[str, list]) -> None:
    """A row a category, a column a mode, and a line that reads them."""
    from avalab.lab import statistics
    from avalab.lab.run import Record
    from avalab.measure import answers
    from avalab.report import tables

    def line(name: str, cells: Sequence[str]) -> None:
        print(f"{name:28} " + " ".join(f"{cell:24}" for cell in cells).rstrip())

    known = {record.metric: record for record in run.records}
    line("right answers", tuple(verdicts))
    for category in run.profile.call_categories:
        asked = [mode for mode in verdicts if answers.answerable([category], mode)]
        shown = {mode: known[answers.call_metric(category, mode)] for mode in asked}
        cells = {m: "not measured" if r.value is None else tables.value_text(r) for m, r in shown.items()}
        line(category.replace("_", " "), [cells.get(mode, "-") for mode in verdicts])
    for note in dict.fromkeys(record.note for record in run.records if record.note):
        print(note)
    if not all(verdicts.values()):
        return
    shares = [statistics.wilson(sum(v.correct for v in each), len(each)) for each in verdicts.values()]
    records = [Record("", "", "call_accuracy", unit="1", **vars(share)) for share in shares]
    line("all that need a call", [tables.value_text(record) for record in records])
    print(answers.read_modes(verdicts))


def compare(
    ours: ModelPath,
    theirs: Annotated[Path, typer.Argument(help="What it is compared with, such as the bf16 base.")],
    task: Annotated[
        str, typer.Option(help="bfcl (McNemar's test), text (paired bootstrap of the loss) or speed (paired ratios).")
    ] = "bfcl",
    mode: Mode = "forced",
    limit: Limit = None,
    engine: Annotated[str, typer.Option(help="Engine of both in the task speed; without, that of each.")] = "",
    threads: Annotated[int, typer.Option(help="Its threads; 0 leaves its own choice.")] = 0,
    profile: Profile = "laptop",
    seed: Seed = 0,
) -> None:
    """Say whether the first artefact is better than the second, worse, or not distinguishable, on the same items."""
    run = Run("avalab_compare", profile, seed)
    options.one_of("task", task, TASKS)
    options.one_of("mode", mode, options.CALL_MODES)
    if engine:
        options.one_of("engine", engine, options.ENGINES)
    paths = [options.readable(ours), options.readable(theirs)]
    pair = [options.source_artifact(path, run) for path in paths]
    if task == "bfcl":
        _compare_calls(run, pair, mode, limit)
    elif task == "text":
        _compare_loss(run, pair, limit)
    else:
        _compare_speed(run, pair, engine=engine, threads=threads, rounds=limit or SPEED_ROUNDS)


def _compare_calls(run: Run, pair: list[Artifact], mode: str, limit: int | None) -> None:
    from avalab.lab import statistics
    from avalab.measure import answers

    respondents = [answers.Respondent(a, run.device, engine=options.engine_of(a)) for a in pair]
    all_ours: list[bool] = []
    all_theirs: list[bool] = []
    for category in answers.answerable(run.profile.call_categories, mode):
        ours, theirs = (
            [
                v.correct
                for v in answers.record_calls(run, r.artifact.name, r, category=category, mode=mode, limit=limit)
            ]
            for r in respondents
        )
        if failed := [record for record in run.records if record.value is None]:
            raise ProcessFailed(f"{failed[0].subject} in {failed[0].engine} gave no answers: {failed[0].note}")
        print(f"{answers.call_metric(category, mode):44} {statistics.mcnemar(ours, theirs)}")
        all_ours += ours
        all_theirs += theirs
    print(f"{'all':44} {statistics.mcnemar(all_ours, all_theirs)}")


def _compare_loss(run: Run, pair: list[Artifact], limit: int | None) -> None:
    from avalab.data import corpora
    from avalab.lab import statistics
    from avalab.measure import quality
    from avalab.models import checkpoint, predict

    in_torch = [artifact for artifact in reversed(pair) if options.engine_of(artifact) == quality.TORCH]
    if not in_torch:
        shown = " and ".join(f"{artifact.name} ({options.engine_of(artifact)})" for artifact in pair)
        raise InputError(f"one of the two has to load in torch, {shown} do not; give the model they were made from")
    predict.refuse_other_words(pair[1], pair[0])
    cache, tokenizer = run.artifacts_dir / "cache", checkpoint.load_tokenizer(in_torch[0])
    for text in corpora.evaluation_texts(run, tokenizer):
        windows = corpora.profile_windows(run, text, tokenizer)[:limit]
        against = predict.make_reference(in_torch[0], windows, cache, run.device)
        ours, theirs = (
            quality.score_artifact(artifact, against, cache, run.device, engine=options.engine_of(artifact)).nll
            for artifact in pair
        )
        gap = statistics.paired_difference(ours, theirs, resamples=run.profile.resamples, seed=run.seed)
        ends = "" if gap.low is None else f" [{gap.low:+.4f}, {gap.high:+.4f}]"
        print(f"{'loss, ' + text.name:44} {statistics.verdict(gap)}: {gap.value:+.4f}{ends} nats/token")


def _compare_speed(run: Run, pair: list[Artifact], *, engine: str, threads: int, rounds: int) -> None:
    from avalab import engines

    loaded: list[engines.Engine] = []
    try:
        for artifact in pair:
            loaded.append(engines.load(engine or options.engine_of(artifact), artifact, threads=threads))
        sizes = run.profile.prompt_tokens, run.profile.new_tokens
        timings = paired_timings(*loaded, sizes=sizes, rounds=rounds, seed=run.seed)
    finally:
        for each in loaded:
            each.close()
    for name, (ours, theirs) in timings.items():
        shown = ", ".join(dict.fromkeys((name, *(each.name for each in loaded))))
        print(f"{shown:44} {speed_verdict(ours, theirs)}")


def paired_timings(
    ours, theirs, *, sizes: tuple[int, int], rounds: int, seed: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of two engines on the same prompts, in turn: to the first token, and a further one (mean of a round).

    `sizes` are tokens of the prompt and new ones. A round before the first warms up and does not count. Raises
    ValueError for fewer than two new tokens.
    """
    from avalab.measure import cell

    if sizes[1] < 2:
        raise InputError(f"need at least 2 new tokens to time one, got {sizes[1]}")
    draw, vocabulary = random.Random(seed), min(ours.facts.vocabulary, theirs.facts.vocabulary)
    first, further = ([], []), ([], [])
    for number in range(rounds + 1):
        prompt = [draw.randrange(vocabulary) for _ in range(sizes[0])]
        for index in (0, 1) if number % 2 else (1, 0):
            seconds = cell.time_tokens((ours, theirs)[index], prompt, sizes[1])
            if number:
                first[index].append(seconds[0])
                further[index].append((seconds[-1] - seconds[0]) / (len(seconds) - 1))
    return {"time to first token": first, "time a token": further}


def speed_verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """`better: 0.72 [0.70, 0.75] of the other's time, 11 rounds`; an interval that holds 1 distinguishes nothing."""
    from avalab.lab import statistics

    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    median = statistics.quantile(ratios)
    ends, interval = (None, None), " (too few rounds for an interval)"
    if median.low is not None and median.high is not None:
        ends, interval = (median.low - 1, median.high - 1), f" [{median.low:.3f}, {median.high:.3f}]"
    verdict = statistics.verdict(statistics.Estimate(median.value - 1, *ends, len(ratios)))
    return f"{verdict}: {median.value:.3f}{interval} of the other's time, {len(ratios)} rounds"
