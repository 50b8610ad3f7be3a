"""Ensembles of answers: several artefacts, or several draws of one, answer function-calling cases as one respondent.

| method | who answers | what counts |
|---|---|---|
| `vote` | every artefact, greedily | the plurality (`answers_vote`) |
| `self_consistency` | one artefact, several times, at a temperature | the plurality |
| `answer_cascade` | the small artefact, and where it is unsure the large one | the last answer |

An artefact is as sure as the geometric mean of the probabilities that it gives to the tokens of its answer, without any
grammar. The cascade's threshold is chosen (`cascade.choose`) on `held_out_cases`: tools of the lab, never the questions
that are scored. Artefacts may have different tokenizers. Answers are kept by `evaluate`, so each is generated once.

What it does not do: pool distributions (`mixture.respondent` answers like any other respondent).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avalab import answers_vote, call_cases, cascade, ensemble, evaluate, mixture, quality, statistics
from avalab.artifacts import Artifact
from avalab.calls import Case
from avalab.evaluate import Respondent
from avalab.experiment import Run

HELD_OUT = "toolbox_simple"  # the lab's own tools: no category of the leaderboard


@dataclass(frozen=True)
class Answered:
    """What an ensemble answered, how sure of each answer it was in [0, 1], and the seconds an answer took."""

    texts: list[str]
    agreement: list[float]
    seconds: float | None  # None: an answer was read from a file that does not say how long it took


def held_out_cases(asked: Sequence[Case], count: int) -> list[Case]:
    """`count` cases with the lab's own tools, none with a question of `asked`, and no question twice."""
    seen, found = {str(case.messages) for case in asked}, []
    for case in call_cases.cases(HELD_OUT, 4 * (len(asked) + count)):
        if str(case.messages) not in seen and len(found) < count:
            seen.add(str(case.messages))
            found.append(case)
    if len(found) < count:
        raise ValueError(f"{count} held-out cases asked for, there are {len(found)}")
    return found


def alone(run: Run, respondent: Respondent, asked: list[Case], mode: str) -> Answered:
    """The greedy answers of one respondent; it agrees with itself."""
    cache = run.artifacts_dir / "cache"
    texts = evaluate.answer_calls(respondent, asked, mode, cache, progress=respondent.artifact.name)
    rate = evaluate.items_per_s(respondent, asked, mode, cache)
    return Answered(texts, [1.0] * len(texts), 1 / rate if rate else None)


def vote(run: Run, voters: Sequence[Respondent], asked: list[Case], mode: str) -> Answered:
    """The plurality of the voters' answers; on a tie, the earliest voter's. They answer one after another."""
    each = [alone(run, voter, asked, mode) for voter in voters]
    texts, agreement = answers_vote.vote([answered.texts for answered in each])
    return Answered(texts, agreement, _total([answered.seconds for answered in each]))


def draws(
    artifact: Artifact, samples: int, *, temperature: float, seed: int = 0, device: str = "cpu"
) -> list[Respondent]:
    """The artefact as `samples` voters that each sample with a seed of their own, sharing one loaded model."""
    if samples < 1 or temperature <= 0:
        raise ValueError(f"{samples} samples at temperature {temperature}; both must be positive")
    shared = Respondent(artifact, device)
    seeds = range(1000 * seed + 1, 1000 * seed + samples + 1)
    drawn = [ensemble.assemble([artifact], "mean", temperature=float(temperature), draw=n) for n in seeds]
    return [mixture.Choir(about.as_artifact(), device, about, shared) for about in drawn]


def self_consistency(
    run: Run, artifact: Artifact, asked: list[Case], mode: str, *, samples: int, temperature: float
) -> Answered:
    """The plurality of `samples` draws of one artefact."""
    voters = draws(artifact, samples, temperature=temperature, seed=run.seed, device=run.device)
    return vote(run, voters, asked, mode)


def choose_rule(run: Run, pair: tuple[Respondent, Respondent], cases: list[Case], mode: str) -> cascade.Rule:
    """The threshold for (small, large) on held-out cases; a wrong answer loses 1, a right one 0."""
    texts = [alone(run, respondent, cases, mode).texts for respondent in pair]
    small, large = ([float(not v.correct) for v in evaluate.judge(cases, column)] for column in texts)
    return cascade.choose(confidence(pair[0], cases, texts[0]), small, large)


def answer_cascade(
    run: Run, pair: tuple[Respondent, Respondent], asked: list[Case], mode: str, rule: cascade.Rule
) -> tuple[Answered, float]:
    """The answers of (small, large) under a rule, and the share of cases that the large one answered.

    The seconds are the small one's, and the large one's for its share.
    """
    small, large = (alone(run, respondent, asked, mode) for respondent in pair)
    sure = confidence(pair[0], asked, small.texts)
    to_large = cascade.deferred(sure, rule)
    texts = [theirs if go else ours for go, ours, theirs in zip(to_large, small.texts, large.texts, strict=True)]
    share, seconds = sum(to_large) / len(to_large), None
    if small.seconds is not None and large.seconds is not None:
        seconds = cascade.expected_cost(small.seconds, large.seconds, share)
    return Answered(texts, sure, seconds), share


@torch.inference_mode()
def confidence(respondent: Respondent, asked: Sequence[Case], texts: Sequence[str]) -> list[float]:
    """The geometric mean of the probabilities of each answer's tokens given its prompt; 0 for an empty answer."""
    prompts = [call_cases.prompt(respondent.tokenizer, case) for case in asked]
    return [text_confidence(respondent, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


@torch.inference_mode()
def text_confidence(respondent: Respondent, prompt: str, text: str) -> float:
    """The same for one finished prompt."""
    before, after = (respondent.tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, text))
    if not after:
        return 0.0
    ids = torch.tensor([before + after])
    hidden = quality.hidden_states(respondent.model, ids)[0, len(before) - 1 : -1]
    found: Tensor = quality.log_probabilities(hidden, *quality.output_head(respondent.model)).cpu()
    return float(found.gather(-1, ids[0, len(before) :, None]).mean().exp())


def record(
    run: Run,
    subject: str,
    answered: Answered,
    asked: list[Case],
    *,
    mode: str,
    sha256: str,
    details: dict | None = None,
) -> list[bool]:
    """Append the share of right answers with its errors, and `answer_seconds`; returns which were right."""
    verdicts = evaluate.judge(asked, answered.texts)
    share = statistics.wilson(sum(v.correct for v in verdicts), len(verdicts))
    more = {"artifact_sha256": sha256, "engine": "torch"}
    told = {"errors": evaluate.errors(verdicts), "mode": mode, **(details or {})}
    run.record(subject, evaluate.metric(asked[0].category, mode), unit="1", **vars(share), **more, details=told)
    note = "" if answered.seconds is not None else "answers of an earlier run that kept no times"
    run.record(subject, "answer_seconds", answered.seconds, "s", n=len(asked), note=note, **more)
    return [v.correct for v in verdicts]


def _total(seconds: list[float | None]) -> float | None:
    return None if None in seconds else sum(seconds)
