"""What an ensemble is worth: distributions and answers scored as one model's are, its time a token beside its members'.

1. `held_out_windows` and `held_out_cases` are text and questions that no artefact was calibrated on and that are never
   scored: there weights and thresholds are fitted, and the artefact to compare with is chosen.
2. `score_distributions` reads each member once on the reference's windows (final hidden states, kept in the run's
   cache), pools the next-token distributions chunk by chunk, and scores them as a single model's are. `record_gap`
   pairs an ensemble with one artefact on the same tokens.
3. In a `vote` every artefact answers greedily and the plurality counts; `self_consistency` draws several answers of one
   artefact; `answer_cascade` takes the large artefact's answer where the small one is unsure, as sure being the
   geometric mean of the probabilities that it gives to the tokens of its answer, without any grammar.
4. `record_speed` times single decoding steps of all subjects in turn, in one process.

Memory is not measured: all members are held at once, so the bytes are their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from avalab.data import calls, corpora
from avalab.data.calls import Case
from avalab.data.corpora import Text
from avalab.lab import statistics
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cache_path, load_tensors, save_tensors
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import Run, load_average
from avalab.lab.statistics import Estimate
from avalab.lab.trackers import interleaved
from avalab.measure import answers, quality
from avalab.measure.answers import Respondent
from avalab.models import checkpoint, predict
from avalab.models.predict import Reference, TokenScores
from avalab.serve import ensemble
from avalab.serve.ensemble import Ensemble, Rule

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
    for case in calls.cases(HELD_OUT, 4 * (len(asked) + count)):
        if str(case.messages) not in seen and len(found) < count:
            seen.add(str(case.messages))
            found.append(case)
    if len(found) < count:
        raise InputError(f"{count} held-out cases asked for, there are {len(found)}")
    return found


def answer_alone(run: Run, respondent: Respondent, asked: list[Case], mode: str) -> Answered:
    """The greedy answers of one respondent; it agrees with itself."""
    cache = run.artifacts_dir / "cache"
    texts = answers.answer_calls(respondent, asked, mode, cache, progress=respondent.artifact.name)
    rate = answers.items_per_s(respondent, asked, mode, cache)
    return Answered(texts, [1.0] * len(texts), 1 / rate if rate else None)


def answer_by_vote(run: Run, voters: Sequence[Respondent], asked: list[Case], mode: str) -> Answered:
    """The plurality of the voters' answers; on a tie, the earliest voter's. They answer one after another."""
    each = [answer_alone(run, voter, asked, mode) for voter in voters]
    texts, agreement = ensemble.plurality([answered.texts for answered in each])
    seconds = [answered.seconds for answered in each]
    return Answered(texts, agreement, None if None in seconds else sum(seconds))


def sampling_voters(
    artifact: Artifact, samples: int, *, temperature: float, seed: int = 0, device: str = "cpu"
) -> list[Respondent]:
    """The artefact as `samples` voters that each sample with a seed of their own, sharing one loaded model."""
    if samples < 1 or temperature <= 0:
        raise InputError(f"{samples} samples at temperature {temperature}; both must be positive")
    shared = Respondent(artifact, device)
    seeds = range(1000 * seed + 1, 1000 * seed + samples + 1)
    drawn = [ensemble.assemble([artifact], "mean", temperature=float(temperature), draw=n) for n in seeds]
    return [ensemble.Choir(about.as_artifact(), device, about, shared) for about in drawn]


def self_consistency(
    run: Run, artifact: Artifact, asked: list[Case], mode: str, *, samples: int, temperature: float
) -> Answered:
    """The plurality of `samples` draws of one artefact."""
    voters = sampling_voters(artifact, samples, temperature=temperature, seed=run.seed, device=run.device)
    return answer_by_vote(run, voters, asked, mode)


def choose_rule(run: Run, pair: tuple[Respondent, Respondent], cases: list[Case], mode: str) -> ensemble.Rule:
    """The threshold for (small, large) on held-out cases; a wrong answer loses 1, a right one 0."""
    texts = [answer_alone(run, respondent, cases, mode).texts for respondent in pair]
    small, large = ([float(not v.correct) for v in answers.judge_calls(cases, column)] for column in texts)
    return ensemble.choose_threshold(confidence(pair[0], cases, texts[0]), small, large)


def answer_cascade(
    run: Run, pair: tuple[Respondent, Respondent], asked: list[Case], mode: str, rule: ensemble.Rule
) -> tuple[Answered, float]:
    """The answers of (small, large) under a rule, and the share of cases that the large one answered.

    The seconds are the small one's, and the large one's for its share.
    """
    small, large = (answer_alone(run, respondent, asked, mode) for respondent in pair)
    sure = confidence(pair[0], asked, small.texts)
    to_large = rule.deferred(sure)
    texts = [theirs if go else ours for go, ours, theirs in zip(to_large, small.texts, large.texts, strict=True)]
    share, seconds = sum(to_large) / len(to_large), None
    if small.seconds is not None and large.seconds is not None:
        seconds = small.seconds + share * large.seconds
    return Answered(texts, sure, seconds), share


@torch.inference_mode()
def confidence(respondent: Respondent, asked: Sequence[Case], texts: Sequence[str]) -> list[float]:
    """The geometric mean of the probabilities of each answer's tokens given its prompt; 0 for an empty answer."""
    prompts = [calls.case_prompt(respondent.tokenizer, case) for case in asked]
    return [text_confidence(respondent, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


@torch.inference_mode()
def text_confidence(respondent: Respondent, prompt: str, text: str) -> float:
    """The same for one finished prompt."""
    before, after = (respondent.tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, text))
    if not after:
        return 0.0
    ids = torch.tensor([before + after])
    hidden = predict.hidden_states(respondent.model, ids)[0, len(before) - 1 : -1]
    found: Tensor = predict.log_probabilities(hidden, *predict.output_head(respondent.model)).cpu()
    return float(found.gather(-1, ids[0, len(before) :, None]).mean().exp())


def record_answers(
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
    verdicts = answers.judge_calls(asked, answered.texts)
    share = statistics.wilson(sum(v.correct for v in verdicts), len(verdicts))
    more = {"artifact_sha256": sha256, "engine": "torch"}
    told = {"errors": answers.count_errors(verdicts), "mode": mode, **(details or {})}
    run.record(subject, answers.call_metric(asked[0].category, mode), unit="1", **vars(share), **more, details=told)
    note = "" if answered.seconds is not None else "answers of an earlier run that kept no times"
    run.record(subject, "answer_seconds", answered.seconds, "s", n=len(asked), note=note, **more)
    return [v.correct for v in verdicts]


@dataclass(frozen=True)
class Voice:
    """A member's final hidden states on fixed windows, and the head that makes distributions of them."""

    hidden: Float[Tensor, "window time channel"]
    head: nn.Module
    finish: predict.Finish

    def log_probabilities(self, window: int, rows: slice) -> Float[Tensor, "token vocab"]:
        """Of some rows of one window."""
        return predict.log_probabilities(self.hidden[window][rows], self.head, self.finish)


def held_out_windows(run: Run, tokenizer: PreTrainedTokenizerBase, count: int) -> Int[Tensor, "window time"]:
    """`count` windows of calibration text: those that follow the run's calibration windows in its seeded order.

    Raises ValueError when there are not so many.
    """
    tokens, skip = run.profile.calibration_tokens, run.profile.calibration_samples
    return corpora.shuffled_windows(run, tokenizer, tokens=tokens, skip=skip, count=count)


def target_log_probabilities(
    members: tuple[Artifact, ...], against: Reference, run: Run
) -> Float[Tensor, "member token"]:
    """Each member's log p of every token of the reference's windows: what `ensemble.fit_weights` needs."""
    cache = run.artifacts_dir / "cache"
    return torch.stack([-quality.score_artifact(m, against, cache, run.device).nll.flatten() for m in members])


def fitted_weights(run: Run, members: tuple[Artifact, ...], count: int = 0) -> tuple[float, ...]:
    """Weights of the members fitted on `count` held-out windows, 0 being half as many as each evaluation text has."""
    tokenizer = checkpoint.load_tokenizer(members[0])
    windows = held_out_windows(run, tokenizer, count or max(2, run.profile.eval_windows // 2))
    against = predict.make_reference(members[0], windows, run.artifacts_dir / "cache", run.device)  # for its windows
    return ensemble.fit_weights(target_log_probabilities(members, against, run))


def single_best(losses: Mapping[str, float], sizes: Mapping[str, int], budget_bytes: int) -> str:
    """The name of least loss among those of at most `budget_bytes`; ValueError when none is so small."""
    fitting = [name for name in losses if sizes[name] <= budget_bytes]
    if not fitting:
        smallest = min(sizes[name] for name in losses)
        raise InputError(f"no artefact of at most {budget_bytes:,} bytes; the smallest has {smallest:,}")
    return min(fitting, key=lambda name: losses[name])


@torch.inference_mode()
def confidences(artifact: Artifact, windows: Int[Tensor, "window time"], run: Run) -> Float[Tensor, "window token"]:
    """The largest next-token probability at every position that has a successor."""
    heard = Voice(*predict.cached_hidden_states(artifact, windows, run.artifacts_dir / "cache", run.device))
    rows = [heard.log_probabilities(i, slice(0, windows.shape[1] - 1)).amax(-1).exp() for i in range(len(windows))]
    return torch.stack(rows).cpu()


def token_rule(run: Run, pair: tuple[Artifact, Artifact], against: Reference) -> Rule:
    """When (small, large) should ask the large one about a token: chosen on the reference's windows."""
    sure = confidences(pair[0], against.windows, run)
    small, large = (-row for row in target_log_probabilities(pair, against, run))
    return ensemble.choose_threshold(sure.flatten().tolist(), small.tolist(), large.tolist())


def score_distributions(run: Run, ensembles: Mapping[str, Ensemble], against: Reference) -> dict[str, TokenScores]:
    """Token scores of every ensemble on the reference's windows; those known to the run's cache are read from there."""
    cache, device = run.artifacts_dir / "cache", torch.device(run.device).type
    code = code_of(predict.cached_hidden_states, _score)[:8]
    identities = {name: about.as_artifact().sha256 for name, about in ensembles.items()}
    paths = {n: cache_path(cache, "ensemble", sha, against.identity, device, code) for n, sha in identities.items()}
    known = {name: load_tensors(path) for name, path in paths.items()}
    missing = {name: about for name, about in ensembles.items() if known[name] is None}
    members = {m.sha256: m for about in missing.values() for m in about.members}
    voices = {
        sha256: Voice(*predict.cached_hidden_states(member, against.windows, cache, run.device))
        for sha256, member in members.items()
    }
    for name, found in (_score(voices, missing, against) if missing else {}).items():
        known[name] = vars(found)
        save_tensors(known[name], paths[name])
    return {name: TokenScores(**columns) for name, columns in known.items()}


@torch.inference_mode()
def _score(voices: dict[str, Voice], ensembles: Mapping[str, Ensemble], against: Reference) -> dict[str, TokenScores]:
    reference = Voice(against.hidden, against.head, against.finish)
    columns: dict[str, list] = {name: [] for name in ensembles}
    for index, window in enumerate(tqdm(against.windows, desc="pool", leave=False)):
        parts: dict[str, list] = {name: [] for name in ensembles}
        for rows in predict.chunks(len(window) - 1):
            expected = reference.log_probabilities(index, rows)
            heard = {sha256: voice.log_probabilities(index, rows) for sha256, voice in voices.items()}
            for name, about in ensembles.items():
                pooled = ensemble.pooled(about, torch.stack([heard[m.sha256] for m in about.members]))
                targets = window[1:][rows].to(pooled.device)
                parts[name].append([c.cpu() for c in predict.token_scores(pooled, expected.to(pooled.device), targets)])
        for name in ensembles:
            columns[name].append([torch.cat(column) for column in zip(*parts[name], strict=True)])
    return {
        name: TokenScores(*(torch.stack(column) for column in zip(*found, strict=True)))
        for name, found in columns.items()
    }


def record_distributions(run: Run, subject: str, about: Ensemble, found: TokenScores, text: Text) -> None:
    """Append perplexity, KL divergence and top-1 agreement of an ensemble, `:<text>` each."""
    settings = {"method": about.method, "weights": list(about.weights), "threshold": about.threshold}
    details = {"text_sha256": text.sha256, "members": [member.name for member in about.members], **settings}
    for metric, unit, estimate in quality.quality_estimates(run, found):
        run.record(
            subject,
            f"{metric}:{text.name}",
            unit=unit,
            **vars(estimate),
            artifact_sha256=about.as_artifact().sha256,
            engine="torch",
            details=details,
        )


def record_gap(
    run: Run, subject: str, ours: TokenScores, theirs: tuple[str, TokenScores], text: Text
) -> dict[str, Estimate]:
    """Append how far the ensemble lies above one artefact on the same tokens, below zero being better, by column.

    `theirs` is the artefact's name and scores. Metrics `nll_gap:<text>` and `kl_gap:<text>`; the verdict is in the
    details.
    """
    name, single = theirs
    found = {}
    for column in ("nll", "kl"):
        values = (getattr(ours, column), getattr(single, column))
        found[column] = statistics.paired_difference(*values, resamples=run.profile.resamples, seed=run.seed)
        details = {"against": name, "verdict": statistics.verdict(found[column])}
        estimate = vars(found[column])
        run.record(subject, f"{column}_gap:{text.name}", unit="nats/token", **estimate, details=details)
    return found


def record_speed(run: Run, subjects: Mapping[str, Artifact | Ensemble], tokens: Int[Tensor, "time"]) -> None:
    """Append `decode_tokens_per_s` of every subject, steps taken in turn, each after the same prompt.

    The interval is that of the median over steps; the first two of each are not counted.
    """
    loaded: dict[str, PreTrainedModel] = {}
    arms = {}
    for name, subject in subjects.items():
        members = subject.members if isinstance(subject, Ensemble) else (subject,)
        try:
            for member in members:
                if member.sha256 not in loaded:
                    loaded[member.sha256] = checkpoint.load_model(member, run.device)
            models = [loaded[member.sha256] for member in members]
            model = ensemble.Mixture(models, subject) if isinstance(subject, Ensemble) else models[0]
            arms[name] = _step(model, tokens.to(run.device))
        except torch.OutOfMemoryError:  # all members at once are more than this GPU, or its cap, holds
            run.record(name, "decode_tokens_per_s", None, "token/s", note="out of memory with all members loaded")
    for name, times in interleaved(arms, 3 * run.profile.latency_samples, run.device).items():
        rates = [1000 / ms for ms in times]
        subject = subjects[name] if isinstance(subjects[name], Artifact) else subjects[name].as_artifact()
        run.record(
            name,
            "decode_tokens_per_s",
            unit="token/s",
            **vars(statistics.quantile(rates)),
            artifact_sha256=subject.sha256,
            engine="torch",
            samples=rates,
            details={"load_average": load_average(), "prompt_tokens": len(tokens)},
        )


def _step(model: PreTrainedModel, prompt: Int[Tensor, "time"]) -> Callable[[], None]:
    """One greedy step at batch 1, going on where the one before ended."""
    cache, following = DynamicCache(config=model.config), prompt[None]

    @torch.inference_mode()
    def step() -> None:
        nonlocal following
        logits = model(following, past_key_values=cache, logits_to_keep=1).logits
        following = logits[:, -1].argmax(-1, keepdim=True)

    step()  # reads the prompt
    return step
