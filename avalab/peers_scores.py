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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from avalab import engines, quality
from avalab.artifacts import Artifact
from avalab.code import code_of
from avalab.experiment import Record
from avalab.quality import Reference, TokenScores


def scores(
    artifact: Artifact, against: Reference, cache: Path, *, engine: str = "torch", device: str = "cpu"
) -> TokenScores:
    """Token scores of an artefact in an engine; read from `cache` when the same bytes were scored before."""
    if engine == "torch":
        return quality.cached_score(artifact, against, cache, device)
    code = code_of(scores, engines.ENGINES[engine])
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
