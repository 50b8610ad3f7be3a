"""What an ensemble is worth: its distributions scored like one model's, its time a token beside its members'.

1. `held_out_windows` are calibration text that no artefact of the run was calibrated on, and no evaluation text: there
   weights and thresholds are fitted, and the artefact to compare with is chosen.
2. `scores` reads each member once on the reference's windows (final hidden states, kept in the run's cache), pools the
   next-token distributions chunk by chunk, and scores them with `predict.token_scores`, as a single model's are.
3. `record_gap` pairs an ensemble with one artefact on the same tokens: the verdict is that of the interval.
4. `record_speed` times single decoding steps of all subjects in turn, in one process.

What it does not do: decide which artefact is fair to compare with (`single_best` takes a budget of bytes), or measure
memory: all members are held at once, so the bytes are their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from avalab import cascade, corpora, ensemble, mixture, models, predict, quality, statistics
from avalab.artifacts import Artifact
from avalab.cache import cache_path, load_tensors, save_tensors
from avalab.cascade import Rule
from avalab.code import code_of
from avalab.corpora import Text
from avalab.ensemble import Ensemble
from avalab.experiment import Run, load_average
from avalab.kernels.bench import interleaved
from avalab.predict import Reference, TokenScores
from avalab.statistics import Estimate


@dataclass(frozen=True)
class Voice:
    """A member's final hidden states on fixed windows, and the head that makes distributions of them."""

    hidden: Float[Tensor, "window time channel"]
    head: nn.Module
    softcap: float | None


def held_out_windows(run: Run, tokenizer: PreTrainedTokenizerBase, count: int) -> Int[Tensor, "window time"]:
    """`count` windows of calibration text: those that follow the run's calibration windows in its seeded order.

    Raises ValueError when there are not so many.
    """
    profile = run.profile
    return corpora.shuffled_windows(
        run, tokenizer, tokens=profile.calibration_tokens, skip=profile.calibration_samples, count=count
    )


def target_log_probabilities(
    members: tuple[Artifact, ...], against: Reference, run: Run
) -> Float[Tensor, "member token"]:
    """Each member's log p of every token of the reference's windows: what `ensemble.fit_weights` needs."""
    cache = run.artifacts_dir / "cache"
    return torch.stack([-quality.score_artifact(m, against, cache, run.device).nll.flatten() for m in members])


def fitted_weights(run: Run, members: tuple[Artifact, ...], count: int = 0) -> tuple[float, ...]:
    """Weights of the members fitted on `count` held-out windows, 0 being half as many as each evaluation text has."""
    windows = held_out_windows(run, models.load_tokenizer(members[0]), count or max(2, run.profile.eval_windows // 2))
    against = predict.reference(members[0], windows, run.artifacts_dir / "cache", run.device)  # for its windows only
    return ensemble.fit_weights(target_log_probabilities(members, against, run))


def single_best(losses: Mapping[str, float], sizes: Mapping[str, int], budget_bytes: int) -> str:
    """The name of least loss among those of at most `budget_bytes`; ValueError when none is so small."""
    fitting = [name for name in losses if sizes[name] <= budget_bytes]
    if not fitting:
        smallest = min(sizes[name] for name in losses)
        raise ValueError(f"no artefact of at most {budget_bytes:,} bytes; the smallest has {smallest:,}")
    return min(fitting, key=lambda name: losses[name])


def voice(artifact: Artifact, windows: Int[Tensor, "window time"], run: Run) -> Voice:
    """The artefact's hidden states on these windows, read from the run's cache where they are known."""
    return Voice(*predict.cached_hidden_states(artifact, windows, run.artifacts_dir / "cache", run.device))


@torch.inference_mode()
def confidences(artifact: Artifact, windows: Int[Tensor, "window time"], run: Run) -> Float[Tensor, "window token"]:
    """The largest next-token probability at every position that has a successor."""
    heard = voice(artifact, windows, run)
    rows = [_log_probabilities(heard, i, slice(0, windows.shape[1] - 1)).amax(-1).exp() for i in range(len(windows))]
    return torch.stack(rows).cpu()


def token_rule(run: Run, pair: tuple[Artifact, Artifact], against: Reference) -> Rule:
    """When (small, large) should ask the large one about a token: chosen on the reference's windows."""
    sure = confidences(pair[0], against.windows, run)
    small, large = (-row for row in target_log_probabilities(pair, against, run))
    return cascade.choose(sure.flatten().tolist(), small.tolist(), large.tolist())


def scores(run: Run, ensembles: Mapping[str, Ensemble], against: Reference) -> dict[str, TokenScores]:
    """Token scores of every ensemble on the reference's windows; those known to the run's cache are read from there."""
    paths = {name: _path(run, about, against) for name, about in ensembles.items()}
    known = {name: load_tensors(path) for name, path in paths.items()}
    missing = {name: about for name, about in ensembles.items() if known[name] is None}
    members = {m.sha256: m for about in missing.values() for m in about.members}
    voices = {sha256: voice(member, against.windows, run) for sha256, member in members.items()}
    for name, found in (_score(voices, missing, against) if missing else {}).items():
        known[name] = vars(found)
        save_tensors(known[name], paths[name])
    return {name: TokenScores(**columns) for name, columns in known.items()}


@torch.inference_mode()
def _score(voices: dict[str, Voice], ensembles: Mapping[str, Ensemble], against: Reference) -> dict[str, TokenScores]:
    reference = Voice(against.hidden, against.head, against.softcap)
    columns: dict[str, list] = {name: [] for name in ensembles}
    for index, window in enumerate(tqdm(against.windows, desc="pool", leave=False)):
        parts: dict[str, list] = {name: [] for name in ensembles}
        for rows in predict.chunks(len(window) - 1):
            expected = _log_probabilities(reference, index, rows)
            heard = {sha256: _log_probabilities(voice, index, rows) for sha256, voice in voices.items()}
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


def record(run: Run, subject: str, about: Ensemble, found: TokenScores, text: Text) -> None:
    """Append perplexity, KL divergence and top-1 agreement of an ensemble, `:<text>` each."""
    for metric, unit, estimate in quality.estimates(found, resamples=run.profile.resamples, seed=run.seed):
        run.record(
            subject,
            f"{metric}:{text.name}",
            unit=unit,
            **vars(estimate),
            artifact_sha256=about.as_artifact().sha256,
            engine="torch",
            details={"text_sha256": text.sha256, **described(about)},
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


def described(about: Ensemble) -> dict:
    """An ensemble's settings as they stand in a record's details."""
    names = [member.name for member in about.members]
    return {"method": about.method, "members": names, "weights": list(about.weights), "threshold": about.threshold}


def record_speed(run: Run, subjects: Mapping[str, Artifact | Ensemble], tokens: Int[Tensor, "time"]) -> None:
    """Append `decode_tokens_per_s` of every subject, steps taken in turn, each after the same prompt.

    The interval is that of the median over steps; the first two of each are not counted.
    """
    loaded: dict[str, PreTrainedModel] = {}
    arms = {}
    for name, subject in subjects.items():
        try:
            arms[name] = _step(_assembled(subject, loaded, run.device), tokens.to(run.device))
        except torch.OutOfMemoryError:  # all members at once are more than this GPU, or its cap, holds
            run.record(name, "decode_tokens_per_s", None, "token/s", note="out of memory with all members loaded")
    for name, times in interleaved(arms, 3 * run.profile.latency_samples, run.device).items():
        rates = [1000 / ms for ms in times]
        subject = subjects[name] if isinstance(subjects[name], Artifact) else subjects[name].as_artifact()
        about = {"artifact_sha256": subject.sha256, "engine": "torch", "samples": rates}
        about["details"] = {"load_average": load_average(), "prompt_tokens": len(tokens)}
        run.record(name, "decode_tokens_per_s", unit="token/s", **vars(statistics.quantile(rates)), **about)


def _assembled(subject: Artifact | Ensemble, loaded: dict[str, PreTrainedModel], device: str) -> PreTrainedModel:
    """The subject's model; artefacts that were loaded before are shared, through `loaded`, which grows."""
    members = subject.members if isinstance(subject, Ensemble) else (subject,)
    for member in members:
        if member.sha256 not in loaded:
            loaded[member.sha256] = models.load(member, device)
    found = [loaded[member.sha256] for member in members]
    return mixture.Mixture(found, subject) if isinstance(subject, Ensemble) else found[0]


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


def _log_probabilities(heard: Voice, index: int, rows: slice) -> Float[Tensor, "token vocab"]:
    return predict.log_probabilities(heard.hidden[index][rows], heard.head, heard.softcap)


def _path(run: Run, about: Ensemble, against: Reference) -> Path:
    code, device = code_of(voice, _score), torch.device(run.device).type
    return cache_path(
        run.artifacts_dir / "cache", "ensemble", about.as_artifact().sha256, against.identity, device, code[:8]
    )
