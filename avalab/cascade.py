"""When to ask the larger model: a threshold on the smaller one's confidence, chosen on held-out items.

Every held-out item (a token, a question) has the small model's confidence and both models' losses. Items go to the
large model in order of rising confidence. `choose` takes the fewest of them that win back a given part of what the
small model loses against the large one over all items; where the large one is no better, it is never asked. Items of
equal confidence cannot be told apart and go together. Source: Viola and Jones (2001) for cascades, Jitkrittum et al.
(2023, arXiv 2307.02764) for when confidence is enough to defer by.

What it does not do: look at the items that are scored later, or know what a loss is. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np


@dataclass(frozen=True)
class Rule:
    """Ask the large model where confidence is below `threshold`; `share` and `loss` are those of the held-out items."""

    threshold: float
    share: float
    loss: float


def choose(
    confidence: Sequence[float], small: Sequence[float], large: Sequence[float], *, recovered: float = 0.9
) -> Rule:
    """The rule that asks the large model least often and wins back the part `recovered` of the gap, in [0, 1].

    `small` and `large` are losses, lower is better. Raises ValueError for no items, different numbers of them, values
    that are not finite, or a part outside [0, 1].
    """
    sure, ours, theirs = (np.asarray(values, float) for values in (confidence, small, large))
    if not len(sure) or not len(sure) == len(ours) == len(theirs):
        raise ValueError(f"{len(sure)} confidences for {len(ours)} and {len(theirs)} losses; need as many, at least 1")
    if not np.isfinite([sure, ours, theirs]).all():
        raise ValueError("confidences and losses must be finite")
    if not 0 <= recovered <= 1:
        raise ValueError(f"a part of {recovered} cannot be recovered; allowed are 0 to 1")
    gap = float((ours - theirs).sum())
    if gap <= 0:
        return Rule(-inf, 0.0, float(ours.mean()))
    order = np.argsort(sure, kind="stable")
    gain = np.concatenate([[0.0], np.cumsum((ours - theirs)[order])])
    # Without a cut that does, all are sent: the gap is closed, but for the rounding of the sum.
    cut = next((k for k in _cuts(sure[order]) if gain[k] >= recovered * gap), len(sure))
    threshold = float(sure[order[cut]]) if cut < len(sure) else inf
    return Rule(threshold if cut else -inf, cut / len(sure), float((ours.sum() - gain[cut]) / len(sure)))


def _cuts(rising: np.ndarray) -> list[int]:
    """How many items can go first: a cut between equal confidences is none."""
    return [0, *(np.flatnonzero(np.diff(rising) > 0) + 1).tolist(), len(rising)]


def deferred(confidence: Sequence[float], rule: Rule) -> list[bool]:
    """Which items go to the large model."""
    return [value < rule.threshold for value in confidence]


def expected_cost(small: float, large: float, share: float) -> float:
    """What an item costs on average: all pay for the small model, the share that is deferred for the large one too."""
    return small + share * large
