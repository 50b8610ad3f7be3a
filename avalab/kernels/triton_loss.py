"""Loss and gradient of rows of logits for a GPU, in Triton: the same signatures as `loss_rows`, a program a row.

The row is read twice, whatever the loss: the first reading keeps the running maximum, the sum of exponentials rescaled
to it, and one more running sum (of the logits, or of probability times the gap between the two models); the second
writes the gradient in the logits' place. Nothing of the size of a row is held.

Source: the running form of the softmax: Milakov and Gimelshein 2018, algorithm 3.
What it does not do: float64. Without a GPU the interpreter (TRITON_INTERPRET=1) checks the results only.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 4096  # logits read at a time


def cross_entropy_rows(
    logits: Float[Tensor, "token vocab"],
    targets: Int[Tensor, "token"],
    row_weight: float,
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
) -> Float[Tensor, "token"]:
    """As `loss_rows.cross_entropy_rows`."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    numbers = (logits.stride(0), logits.shape[1], row_weight, label_smoothing, 1 / temperature)
    if len(logits):
        _cross_entropy[(len(logits),)](logits, targets.contiguous(), losses, *numbers, BLOCK=_block(logits))
    return losses


def kl_rows(
    logits: Float[Tensor, "token vocab"],
    teacher: Float[Tensor, "token vocab"],
    row_weight: float,
    *,
    reverse: bool = False,
    temperature: float = 1.0,
) -> Float[Tensor, "token"]:
    """As `loss_rows.kl_rows`."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    numbers = (logits.stride(0), teacher.stride(0), logits.shape[1], row_weight, temperature)
    if len(logits):
        _kl[(len(logits),)](logits, teacher, losses, *numbers, REVERSE=reverse, BLOCK=_block(logits))
    return losses


def _block(logits: Tensor) -> int:
    return min(BLOCK, triton.next_power_of_2(logits.shape[1]))


@triton.jit
@no_type_check
def _added(x, top):
    """The running maximum, one block on, and what sums so far shrink by."""
    new = tl.maximum(top, tl.max(x, 0))
    return new, tl.exp(top - new)


@triton.jit
@no_type_check
def _cross_entropy(logits, targets, losses, stride, vocab, row_weight, smoothing, cooling, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, at = logits + row * stride, tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    # The maximum starts finite, so that infinity is never taken from infinity.
    top, mass, total = -3.0e38, 0.0, 0.0
    for first in range(0, vocab, BLOCK):
        ok = first + at < vocab
        x = tl.load(start + first + at, ok, float("-inf")).to(tl.float32) * cooling
        top, shrink = _added(x, top)
        mass = mass * shrink + tl.sum(tl.exp(x - top), 0)
        total += tl.sum(tl.where(ok, x, 0.0), 0)
    normalizer = top + tl.log(mass)
    scored = tl.load(start + target).to(tl.float32) * cooling * (1 - smoothing) + total * (smoothing / vocab)
    tl.store(losses + row, normalizer - scored)
    for first in range(0, vocab, BLOCK):
        ok = first + at < vocab
        x = tl.load(start + first + at, ok, 0.0).to(tl.float32) * cooling
        wanted = tl.where(first + at == target, 1 - smoothing, 0.0) + smoothing / vocab
        gradient = (tl.exp(x - normalizer) - wanted) * (row_weight * cooling)
        tl.store(start + first + at, gradient.to(logits.dtype.element_ty), ok)


@triton.jit
@no_type_check
def _kl(
    logits, teacher, losses, stride, teacher_stride, vocab, row_weight, temperature,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    start, other = logits + row * stride, teacher + row * teacher_stride
    x_top, x_mass, t_top, t_mass, gap_sum = -3.0e38, 0.0, -3.0e38, 0.0, 0.0
    for first in range(0, vocab, BLOCK):
        ok = first + at < vocab
        x = tl.load(start + first + at, ok, float("-inf")).to(tl.float32) / temperature
        t = tl.load(other + first + at, ok, float("-inf")).to(tl.float32) / temperature
        x_top, x_shrink = _added(x, x_top)
        t_top, t_shrink = _added(t, t_top)
        x_part, t_part = tl.exp(x - x_top), tl.exp(t - t_top)
        x_mass = x_mass * x_shrink + tl.sum(x_part, 0)
        t_mass = t_mass * t_shrink + tl.sum(t_part, 0)
        # A word of no probability adds nothing, even where the other model's logit is infinite too.
        if REVERSE:
            gap_sum = gap_sum * x_shrink + tl.sum(tl.where(x_part == 0, 0.0, x_part * (x - t)), 0)
        else:
            gap_sum = gap_sum * t_shrink + tl.sum(tl.where(t_part == 0, 0.0, t_part * (t - x)), 0)
    x_norm, t_norm = x_top + tl.log(x_mass), t_top + tl.log(t_mass)
    kl = gap_sum / x_mass - x_norm + t_norm if REVERSE else gap_sum / t_mass - t_norm + x_norm
    tl.store(losses + row, kl * temperature * temperature)
    for first in range(0, vocab, BLOCK):
        ok = first + at < vocab
        x = tl.load(start + first + at, ok, 0.0).to(tl.float32) / temperature - x_norm
        t = tl.load(other + first + at, ok, 0.0).to(tl.float32) / temperature - t_norm
        p = tl.exp(x)
        gradient = tl.where(p == 0, 0.0, p * (x - t - kl)) if REVERSE else p - tl.exp(t)
        tl.store(start + first + at, (gradient * (row_weight * temperature)).to(logits.dtype.element_ty), ok)
