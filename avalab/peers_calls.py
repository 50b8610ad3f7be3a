"""Function calls of other people's artefacts and of the lab's at the same bytes: the same cases, paired.

1. Who is asked: every subject with a size among the run's records. Its artefact is found by the sha256 recorded with
   that size, so that what was scored is what is asked, whatever has changed in the code that made it.
2. Each answers the first cases of each of the profile's categories in the mode `forced`: calls only, filled in under
   the grammar. A model without training gets about half of them right so, and has something to lose.
3. torch answers in `evaluate`'s batches. Any other engine answers one case after another, its logits under the same
   grammar, and chooses the tokens of an answer's beginning too, where `evaluate` reads a beginning that the grammar
   leaves no choice about with the prompt: the same text, perhaps in other tokens. Answers are kept under the artefact's
   bytes as they arrive: a killed run goes on.
4. A peer's rivals are those of its ratios of KL divergences. On the same cases: the difference of shares, ours less
   its, with Newcombe's interval for pairs; how many cases only one of them got right, and McNemar's exact test. Both
   by category and over `all` of them; an ending `:packed` or `:gguf` names the form, as it does behind `kl_ratio`.

Source: Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data"
(1998), method 10.

What it does not do: make or score an artefact, or correct p-values for the number of comparisons.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import torch

from avalab import answer_cache, artifacts, engines, evaluate, grammars, models, statistics
from avalab.artifacts import Artifact
from avalab.call_cases import cases, prompt
from avalab.calls import Case
from avalab.code import code_of
from avalab.experiment import Record, Run

MODE, ALL = "forced", "all"
SHARE = evaluate.MODES[MODE]
DIFFERENCE = f"{SHARE}_difference"
Right = dict[str, list[bool]]  # by category, and over all


def categories(run: Run) -> list[str]:
    """The profile's categories in which a call is right."""
    return evaluate.answerable(run.profile.call_categories, MODE)


def recorded(run: Run) -> dict[str, Artifact]:
    """The artefact of each subject that has a size among the run's records and whose bytes are still there."""
    here = {artifact.sha256: artifact for artifact in artifacts.list_artifacts(run.artifacts_dir)}
    return {s: here[row.artifact_sha256] for s, row in _sized(run).items() if row.artifact_sha256 in here}


def record(run: Run, limit: int, *, chosen: Sequence[str] = ()) -> None:
    """Append shares of right calls, `limit` cases a category, of all recorded subjects, and peers against the lab.

    The categories are the profile's or the `chosen` ones. Call records that were there are replaced, and the file of
    records is written after each subject. A subject that cannot be asked has a row that says why.
    Raises ValueError for a limit below one, or a category that is unknown or cannot be forced.
    """
    names = list(chosen) or categories(run)
    if limit < 1:
        raise ValueError(f"cases of each category have to be 1 or more, got {limit}")
    asked = {name: cases(name, limit) for name in names if evaluate.metric(name, MODE)}
    here, sized, rivals, right = recorded(run), _sized(run), _rivals(run), {}
    # Rivals before peers: each peer is paired as soon as it has answered.
    for subject in sorted(sized, key=lambda name: name in rivals):
        _forget(run, subject)
        right[sized[subject].artifact_sha256] = _record_one(run, sized[subject], here.get(subject), asked)
        for form, ratio in rivals.get(subject, {}).items():
            ours, theirs = (right.get(sha, {}) for sha in (ratio.details["rival_sha256"], ratio.artifact_sha256))
            record_difference(run, subject, ours, theirs, form=form, ratio=ratio)
        run.save()


def record_difference(run: Run, subject: str, ours: Right, theirs: Right, *, form: str, ratio: Record) -> None:
    """Append, for each category that both answered, the rival's share of right calls less the subject's."""
    for category in (name for name in theirs if name in ours):
        flips = statistics.mcnemar(ours[category], theirs[category])
        details = {"only_ours": flips.gained, "only_its": flips.lost, "p_value": flips.p_value}
        details |= {"verdict": flips.verdict, **{k: ratio.details[k] for k in ("rival", "rival_sha256")}}
        about = {"artifact_sha256": ratio.artifact_sha256, "engine": ratio.engine, "details": details}
        found = statistics.share_difference(ours[category], theirs[category])
        run.record(subject, f"{DIFFERENCE}:{category}{form}", unit="1", **vars(found), **about)


def _record_one(run: Run, size: Record, artifact: Artifact | None, asked: dict[str, list[Case]]) -> Right:
    """Append a subject's shares; which were right by category, nothing when it could not be asked."""
    about = {"artifact_sha256": size.artifact_sha256, "engine": size.engine}
    try:
        if artifact is None:
            raise ValueError("no artefact of these bytes is left")
        artifacts.load(artifact.path)  # its files are those of its card
        verdicts = {
            name: evaluate.judge(rows, answers(run, artifact, rows, engine=size.engine)) for name, rows in asked.items()
        }
    except (engines.EngineUnavailable, ValueError, RuntimeError) as error:  # NotSupported is a ValueError
        note = f"not asked: {' '.join(str(error).split())}"
        run.record(size.subject, f"{SHARE}:{ALL}", None, "1", note=note, **about)
        return {}
    verdicts[ALL] = [verdict for rows in verdicts.values() for verdict in rows]
    for name, rows in verdicts.items():
        share = statistics.wilson(sum(verdict.correct for verdict in rows), len(rows))
        details = {"mode": MODE, "errors": evaluate.errors(rows)}
        run.record(size.subject, f"{SHARE}:{name}", unit="1", details=details, **vars(share), **about)
    return {name: [verdict.correct for verdict in rows] for name, rows in verdicts.items()}


def answers(run: Run, artifact: Artifact, asked: list[Case], *, engine: str) -> list[str]:
    """The answers to cases of one category in their order, from the run's cache where they are known.

    Raises what `engines.load` raises, and RuntimeError or ValueError as the engine does.
    """
    folder, label = run.artifacts_dir / "cache", f"{artifact.name} {asked[0].category}"
    if engine == "torch":
        respondent = evaluate.Respondent(artifact, run.device)
        return evaluate.answer_calls(respondent, asked, MODE, folder, progress=label)
    tokenizer = models.load_tokenizer(artifact)
    prompts = [prompt(tokenizer, case) for case in asked]
    keys = [_key(text, case) for text, case in zip(prompts, asked, strict=True)]

    def generate(wanted: list[int]) -> Iterator[tuple[int, str]]:
        return _generated(artifact, engine, [(prompts[i], asked[i]) for i in wanted])

    code = code_of(_generated, engines.ENGINES[engine])
    name = f"answers-{artifact.sha256[:16]}-{engine}-{asked[0].category}-{MODE}-{code[:8]}.jsonl"
    return answer_cache.resumed(folder / name, keys, generate, progress=label)


def _generated(artifact: Artifact, engine: str, wanted: list[tuple[str, Case]]) -> Iterator[tuple[int, str]]:
    opened = engines.load(engine, artifact, threads=torch.get_num_threads())
    tokenizer = models.load_tokenizer(artifact)
    compiler = grammars.compiler(tokenizer, opened.facts.vocabulary)
    try:
        for position, (text, case) in enumerate(wanted):
            most = grammars.MAX_CALLS if "parallel" in case.category else 1
            grammar = grammars.call_grammar(compiler, case.functions, refusal=False, max_calls=most)
            tokens = tokenizer(text, add_special_tokens=False).input_ids
            new = opened.generate(tokens, evaluate.CALL_TOKENS, grammar)
            yield position, tokenizer.decode(new, skip_special_tokens=True)
    finally:
        opened.close()


def _key(text: str, case: Case) -> str:
    return artifacts.sha256_of_text(json.dumps([text, case.functions, evaluate.CALL_TOKENS]))[:16]


def _sized(run: Run) -> dict[str, Record]:
    return {row.subject: row for row in run.records if row.metric == "artifact_bytes"}


def _rivals(run: Run) -> dict[str, dict[str, Record]]:
    """For each peer, the first ratio to each form of the lab's artefact, under the form's ending."""
    found: dict[str, dict[str, Record]] = {}
    for row in run.records:
        name, _, rest = row.metric.partition(":")
        if name == "kl_ratio" and row.value is not None:
            _, colon, form = rest.partition(":")
            found.setdefault(row.subject, {}).setdefault(colon + form, row)
    return found


def _forget(run: Run, subject: str) -> None:
    run.records[:] = [row for row in run.records if row.subject != subject or not row.metric.startswith(SHARE)]
