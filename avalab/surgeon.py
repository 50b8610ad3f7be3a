"""Optimal brain surgery: weights go, and those that stay make up for them.

Removing weights of a row changes the layer's mean squared output by (v - w) M (v - w)^T, M = E[x x^T] damped: stronger
than for rounding, because half of a row moves further than a grid's step does. With M's inverse in Cholesky form U, one
column after the other (Frantar and Alistarh 2023, arXiv 2301.00774; Hassibi and Stork 1993 for the exact step):

1. Columns go in order of falling importance. How many weights each block of columns loses follows from the scores w^2
   / U_cc^2 before anything is changed; which ones, from the weights as they are when the block is reached. A pattern
   of n zeros in m decides group by group.
2. The error of a removed weight is handed on to the columns not yet reached.
3. The mask then stays, and a few steps of conjugate gradients move all kept weights of a row, those already passed too,
   towards the least-squares optimum for this mask (as in ALPS, Meng et al. 2024, arXiv 2406.07831).

Whole columns are removed exactly: the kept ones are solved for (`without_columns`).
What it does not do: walk a model, decide how much each layer loses, or touch biases.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from avalab import rounding
from avalab.rounding import Problem
from avalab.sparsity_patterns import Pattern

BLOCK_COLUMNS = rounding.BLOCK_COLUMNS
NEAR_COLUMNS = 32
REFINEMENTS = 4  # steps of conjugate gradients
DAMPING = 0.1  # of the moment's mean diagonal: what keeps the weights near where calibration text says too little


def problem(moment: Float[Tensor, "cols cols"], group: int = 1) -> Problem:
    """The damped moment, the columns' order by falling moment, and its inverse's factor in that order.

    With a group size, neighbours stay together and groups are ordered by their summed moment.
    Raises ValueError for a moment that holds NaN or infinity, naming how many.
    """
    posed = damped(moment)
    weight = moment.diagonal().unflatten(0, (-1, group)).sum(1)
    first = weight.argsort(descending=True, stable=True) * group
    order = (first[:, None] + torch.arange(group, device=first.device)).flatten()
    return Problem(posed, inverse_factor(posed[order][:, order]), order, 1)


def damped(moment: Float[Tensor, "cols cols"]) -> Float[Tensor, "cols cols"]:
    """The moment with `DAMPING` of its mean diagonal added, which makes it definite. Raises as `problem` does."""
    if not moment.isfinite().all():
        raise ValueError(f"{int((~moment.isfinite()).sum())} entries of the second moment are NaN or infinite")
    return moment + torch.eye(len(moment), device=moment.device) * (moment.diagonal().mean().clamp(min=1e-30) * DAMPING)


def inverse_factor(moment: Float[Tensor, "cols cols"]) -> Float[Tensor, "cols cols"]:
    """The upper U with U^T U = M^-1, without forming M^-1.

    Read backwards, M = L L^T; the inverse of L, read backwards again, is U. Half the work of inverting and
    factorising M^-1, most of it in matrix products.
    """
    return _inverted(torch.linalg.cholesky(moment.flip(0, 1))).flip(0, 1)


def prune(
    weight: Float[Tensor, "rows cols"],
    posed: Problem,
    pattern: Pattern,
    *,
    count: int,
    refinements: int = REFINEMENTS,
) -> Float[Tensor, "rows cols"]:
    """The weight with `count` zeros (or those of an n:m pattern), what is left adapted to `posed.moment`."""
    original = weight.detach().float()
    result, gone = _swept(original, posed, pattern, count)
    return refined(original, result, gone, posed.moment, steps=refinements)


def refined(
    original: Float[Tensor, "rows cols"],
    pruned: Float[Tensor, "rows cols"],
    gone: Bool[Tensor, "rows cols"],
    moment: Float[Tensor, "cols cols"],
    *,
    steps: int,
) -> Float[Tensor, "rows cols"]:
    """Kept weights nearer to the least-squares optimum for this mask, by conjugate gradients, all rows at once.

    Products of bfloat16 parts with float32 sums, where the processor has them, end at the same error to six digits.
    """
    with _short_products():
        return _descended(original, pruned, gone, moment, steps)


def without_columns(
    weight: Float[Tensor, "rows cols"], moment: Float[Tensor, "cols cols"], kept: Int[Tensor, "kept"]
) -> Float[Tensor, "rows cols"]:
    """The weight with all other columns zero and the kept ones at their optimum, w M_:K (M_KK)^-1; M as damped."""
    posed = damped(moment)
    lower = torch.linalg.cholesky(posed[kept][:, kept])
    result = torch.zeros_like(weight, dtype=torch.float32)
    result[:, kept] = torch.cholesky_solve((weight.float() @ posed[:, kept]).T, lower).T
    return result


def error(
    original: Float[Tensor, "rows cols"], pruned: Float[Tensor, "rows cols"], moment: Float[Tensor, "cols cols"]
) -> Float[Tensor, "rows"]:
    """Mean squared output error of each row under a moment."""
    difference = pruned.float() - original.float()
    return ((difference @ moment) * difference).sum(1)


def _inverted(lower: Tensor) -> Tensor:
    """The inverse of a lower triangle, by halves."""
    if len(lower) <= BLOCK_COLUMNS:
        return torch.linalg.solve_triangular(lower, torch.eye(len(lower), device=lower.device), upper=False)
    half = len(lower) // 2
    first, second = _inverted(lower[:half, :half]), _inverted(lower[half:, half:])
    result = torch.zeros_like(lower)
    result[:half, :half], result[half:, half:] = first, second
    result[half:, :half] = second @ (lower[half:, :half] @ first).neg_()
    return result


def _descended(original: Tensor, pruned: Tensor, gone: Tensor, moment: Tensor, steps: int) -> Tensor:
    kept = (~gone).float()
    scale = kept / moment.diagonal()
    residual = ((original - pruned) @ moment) * kept
    direction = residual * scale
    energy = (residual * direction).sum(1)
    for _ in range(steps):
        pushed = (direction @ moment).mul_(kept)
        length = (energy / (direction * pushed).sum(1).clamp(min=1e-30))[:, None]
        pruned = pruned + length * direction
        residual = residual - length * pushed
        ahead = residual * scale
        before, energy = energy, (residual * ahead).sum(1)
        direction = ahead + (energy / before.clamp(min=1e-30))[:, None] * direction
    return pruned


@contextmanager
def _short_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _swept(weight: Tensor, posed: Problem, pattern: Pattern, count: int) -> tuple[Tensor, Tensor]:
    """Steps 1 and 2; works on the transpose, whose rows are contiguous columns."""
    order, factor = posed.order, posed.factor
    left = weight.T[order].contiguous()
    gone = torch.zeros_like(left, dtype=torch.bool)
    penalty = factor.diagonal().square()[:, None]
    quotas = _quotas(left.square() / penalty, count) if not pattern.zeros else None
    unit = pattern.group if pattern.zeros else BLOCK_COLUMNS
    factor = factor / factor.diagonal()[:, None]
    for start, end in _blocks(len(order)):
        errors = torch.empty_like(left[start:end])
        for first in range(start, end, NEAR_COLUMNS):
            near = min(first + NEAR_COLUMNS, end)  # errors go on to here one by one, and further in one product
            for j in range(first, near):
                if (j - start) % unit == 0:
                    at = slice(j, min(j + unit, end))
                    scores = left[at].square() / penalty[at]
                    number = pattern.zeros if quotas is None else quotas[start // BLOCK_COLUMNS]
                    gone[at] = _chosen(scores, number, by_row=quotas is None)
                error = torch.mul(left[j], gone[j], out=errors[j - start])
                left[j].sub_(error)
                left[j + 1 : near].addr_(factor[j, j + 1 : near], error, alpha=-1)
            left[near:end].addmm_(factor[first:near, near:end].T, errors[first - start : near - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    back = order.argsort()
    return left[back].T.contiguous(), gone[back].T.contiguous()


def _quotas(scores: Tensor, count: int) -> list[int]:
    """How many weights each block of columns loses when the `count` lowest scores go."""
    lowest = torch.zeros(scores.numel(), dtype=torch.int32, device=scores.device)
    lowest[scores.flatten().topk(count, largest=False, sorted=False).indices] = 1
    lowest = lowest.view_as(scores)
    return [int(lowest[start:end].sum()) for start, end in _blocks(len(scores))]


def _chosen(scores: Tensor, number: int, *, by_row: bool) -> Tensor:
    """True at the `number` lowest scores of a few columns, of each row (here: dimension 1) or of all."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if by_row:
        return mask.scatter_(0, scores.topk(number, dim=0, largest=False).indices, True)
    mask.view(-1)[scores.flatten().topk(number, largest=False, sorted=False).indices] = True
    return mask


def _blocks(columns: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK_COLUMNS, columns)) for start in range(0, columns, BLOCK_COLUMNS))
