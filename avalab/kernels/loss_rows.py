"""Loss and gradient of rows of logits, the gradient in the logits' own memory.

Some rows at a time are widened to float32 (float64 stays), so the wide copies are a few MiB whatever the vocabulary.
With p = softmax(z / T), V words and c the weight of a row:
- cross-entropy, smoothing e: loss = logsumexp(z/T) - (1-e) z_y/T - e mean(z/T); gradient = c/T (p - (1-e) onehot_y -
  e/V);
- KL(t || p) T^2: gradient = c T (p - t);
- KL(p || t) T^2: gradient = c T p (d - KL) with d = log p - log t.

What it does not do: sum over rows, leave tokens out. The logarithm of the normalizer comes from the largest
probability, at least 1/V and so never rounded away: logsumexp = max - log(max p).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

WIDE_VALUES = 2**19  # widened at a time


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums run in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cross_entropy_rows(
    logits: Float[Tensor, "token vocab"],
    targets: Int[Tensor, "token"],
    row_weight: float,
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
) -> Float[Tensor, "token"]:
    """Cross-entropy of each row in nats; `logits` become the gradient of their sum times `row_weight`."""
    losses = logits.new_empty(len(logits), dtype=working_dtype(logits.dtype))
    spread = label_smoothing / logits.shape[1]
    for part, x in wide(logits, temperature):
        place = targets[part, None].long()
        scored = x.gather(1, place).squeeze(1) * (1 - label_smoothing)
        if label_smoothing:
            scored += spread * x.sum(1)
        top = x.amax(1)
        p = torch.softmax(x, 1)
        losses[part] = top - p.amax(1).log() - scored
        if label_smoothing:
            p -= spread
        p.scatter_add_(1, place, p.new_full((1, 1), label_smoothing - 1).expand(len(p), 1))
        logits[part] = p.mul_(row_weight / temperature)
    return losses


def kl_rows(
    logits: Float[Tensor, "token vocab"],
    teacher: Float[Tensor, "token vocab"],
    row_weight: float,
    *,
    reverse: bool = False,
    temperature: float = 1.0,
) -> Float[Tensor, "token"]:
    """KL divergence of each row in nats times T^2; `logits` become the gradient of their sum times `row_weight`."""
    losses = logits.new_empty(len(logits), dtype=working_dtype(logits.dtype))
    for part, x in wide(logits, temperature):
        student = torch.log_softmax(x, 1)
        other = torch.log_softmax(teacher[part].to(x.dtype) / temperature, 1)
        p = student.exp()
        if reverse:
            gap = torch.where(p == 0, 0.0, student - other)
            losses[part] = (p * gap).sum(1)
            gradient = p.mul_(gap.sub_(losses[part, None]))
        else:
            t = other.exp()
            losses[part] = torch.where(t == 0, 0.0, t * (other - student)).sum(1)
            gradient = p.sub_(t)
        logits[part] = gradient.mul_(row_weight * temperature)
    return losses.mul_(temperature**2)


def wide(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits over the temperature, widened, some at a time."""
    step = max(1, WIDE_VALUES // logits.shape[1])
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        x = logits[part].to(working_dtype(logits.dtype))
        yield part, x / temperature if temperature != 1 else x
