"""Scores of an artefact in whichever engine runs it, token by token, and what two of them differ by.

1. An artefact that transformers loads is scored by `quality`, through float32 heads. Any other one gives logits through
   its engine, window by window; the reference stays the base's own hidden states and head.
2. KL divergence as mean and as 99th percentile over tokens, perplexity and top-1 agreement, intervals by resampling
   windows (`quality.mean`).
3. Two subjects are compared on the same windows: the ratio of their mean KL divergences, windows resampled as pairs.

What it does not do: choose texts or artefacts, or write records.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from avalab import engines, quality
from avalab.artifacts import Artifact
from avalab.code import code_of
from avalab.experiment import Record
from avalab.quality import Estimate, Reference, TokenScores

TAIL = 0.99


def scores(
    artifact: Artifact, against: Reference, cache: Path, *, engine: str = "torch", device: str = "cpu"
) -> TokenScores:
    """Token scores of an artefact in an engine; read from `cache` when the same bytes were scored before."""
    if engine == "torch":
        return quality.cached_score(artifact, against, cache, device)
    code = code_of(in_engine, engines.ENGINES[engine])
    name = "-".join(("scores", artifact.sha256[:16], against.identity[:16], code[:8], engine))
    path = cache / f"{name}.safetensors"
    kept = _cached(path)
    if kept is None:
        kept = in_engine(artifact, against, engine)
        quality.save_atomically(vars(kept), path)
    return kept


def in_engine(artifact: Artifact, against: Reference, engine: str) -> TokenScores:
    """Scores from an engine's logits. Raises what `engines.load` raises."""
    opened = engines.load(engine, artifact)
    try:
        parts = [
            _scored(opened.logits(window.tolist()), window, hidden, against)
            for window, hidden in zip(against.windows, against.hidden, strict=True)
        ]
    finally:
        opened.close()
    return TokenScores(*(torch.stack(column) for column in zip(*parts, strict=True)))


def tail(values: Float[Tensor, "window token"], *, resamples: int, seed: int, share: float = TAIL) -> Estimate:
    """The percentile `share` of all tokens, with a 95 % percentile-bootstrap interval that resamples windows."""
    rows = values.double().numpy()
    value = float(np.quantile(rows, share))
    if len(rows) < 2:
        return Estimate(value, None, None, len(rows))
    picks = np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))
    low, high = np.quantile([np.quantile(rows[pick], share) for pick in picks], (0.025, 0.975))
    return Estimate(value, float(low), float(high), len(rows))


def ratio(
    ours: Float[Tensor, "window token"], theirs: Float[Tensor, "rival_window rival_token"], *, resamples: int, seed: int
) -> Estimate:
    """Mean of `ours` over mean of `theirs`, windows resampled as pairs.

    Raises ValueError when the two were not measured on windows of the same shape, or `theirs` has no mean to divide by.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"cannot pair scores of shape {tuple(ours.shape)} with {tuple(theirs.shape)}")
    a, b = (part.double().mean(-1).numpy() for part in (ours, theirs))
    if b.mean() <= 0:
        raise ValueError(f"the mean to divide by is {b.mean():.3g}; it has to be positive")
    value = float(a.mean() / b.mean())
    if len(a) < 2:
        return Estimate(value, None, None, len(a))
    found = stats.bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis) / y.mean(axis),
        paired=True,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
        vectorized=True,
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high), len(a))


def table(records: Sequence[Record], columns: Sequence[str]) -> str:
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


@torch.inference_mode()
def _scored(logits: Tensor, window: Tensor, hidden: Tensor, against: Reference) -> tuple[Tensor, ...]:
    """Negative log-likelihood, KL divergence and agreement of one window's predicted tokens, a chunk at a time."""
    parts = []
    for start in range(0, len(window) - 1, quality.CHUNK_TOKENS):
        rows = slice(start, min(start + quality.CHUNK_TOKENS, len(window) - 1))
        expected = quality.log_probabilities(hidden[rows], against.head, against.softcap)
        parts.append(quality.token_scores(logits[rows].float().log_softmax(-1), expected, window[1:][rows]))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _cached(path: Path) -> TokenScores | None:
    try:
        return TokenScores(**load_file(path))
    except (OSError, TypeError, SafetensorError):  # absent or damaged: measured again
        return None
