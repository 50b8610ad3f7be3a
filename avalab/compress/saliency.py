"""Saliency: how much each weight matters, and what the others can make up for when it goes.

With w a weight in row r and column c, x the layer's input, L the loss of labels the model itself draws:

| score | value | source |
|---|---|---|
| `random` | uniform noise | the floor that every other score has to beat |
| `magnitude` | abs(w) | Han et al. 2015, arXiv 1506.02626 |
| `wanda` | abs(w) sqrt(E[x_c^2]), compared within a row | Sun et al. 2024, arXiv 2306.11695 |
| `sparsegpt` | abs(w) / sqrt([M^-1]_cc), M = E[x x^T] damped | Frantar and Alistarh 2023, arXiv 2301.00774 |
| `gradient` | abs(w) sqrt(E[(dL/dw)^2]) | Molchanov et al. 2019, arXiv 1906.10771, eq. 8 |
| `influence` | of whole blocks only: 1 - E[cos(input, output)] | Men et al. 2024, arXiv 2403.03853 |

`sparsegpt` also changes what is left (optimal brain surgery). Removing weights of a row changes the layer's mean
squared output by (v - w) M (v - w)^T, M damped: stronger than for rounding, because half of a row moves further than a
grid's step does. With M's inverse in Cholesky form U, column by column (Hassibi and Stork 1993 for the exact step):

1. Columns go in order of falling importance. How many weights each block of columns loses follows from the scores w^2
   / U_cc^2 before anything is changed; which ones, from the weights as they are when the block is reached. A pattern
   of n zeros in m decides group by group.
2. The error of a removed weight is handed on to the columns not yet reached.
3. The mask then stays, and a few steps of conjugate gradients move all kept weights of a row, those already passed too,
   towards the least-squares optimum for this mask (as in ALPS, Meng et al. 2024, arXiv 2406.07831).

Whole columns are removed exactly: the kept ones are solved for (`remove_columns`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from avalab.compress.patterns import Pattern, lowest
from avalab.compress.rounding import BLOCK_COLUMNS, Problem, damped_moment
from avalab.lab import artifacts
from avalab.lab.errors import InputError

REFINEMENTS = 4  # steps of conjugate gradients

DAMPING = 0.1  # of the moment's mean diagonal: what keeps the weights near where calibration text says too little


@dataclass(frozen=True)
class Evidence:
    """What is known of a layer: its input's second moment, its weights' squared gradients, a seed; None: not asked."""

    moment: Float[Tensor, "cols cols"] | None = None
    squared_gradient: Float[Tensor, "rows cols"] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """A score's function, what it needs ("", "moments" or "gradients"), and among which weights it compares."""

    compute: Callable[[Tensor, Evidence], Tensor] | None  # None: only defined for whole blocks
    needs: str = ""
    compared: str = "layer"  # or "row"
    updates: bool = False  # the weights that stay are changed to make up for those that go


def random(weight: Float[Tensor, "rows cols"], seen: Evidence) -> Float[Tensor, "rows cols"]:
    """Uniform in [0, 1), the same for an equal seed and shape."""
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seen.seed)).to(weight.device)


def sparsegpt(weight: Float[Tensor, "rows cols"], seen: Evidence) -> Float[Tensor, "rows cols"]:
    """Root of the error that removing w causes once all other weights of its row have made up for it."""
    posed = surgery_problem(seen.moment)
    inverse = torch.empty_like(posed.order, dtype=posed.factor.dtype)
    inverse[posed.order] = posed.factor.square().sum(0)  # diagonal of U^T U, the inverse
    return weight.abs() / inverse.sqrt()


def score_weights(score: str, weight: Float[Tensor, "rows cols"], seen: Evidence) -> Float[Tensor, "rows cols"]:
    """The score of every weight, in float32. Raises ValueError for one that is defined for whole blocks only."""
    compute = SCORES[score].compute
    if compute is None:
        raise InputError(f"score {score!r} belongs to whole blocks; use it with pattern 'layers'")
    return compute(weight.float(), seen)


def layer_seed(seed: int, name: str) -> int:
    """A seed of the layer's own, so that a resumed run draws what the whole one would have drawn."""
    return int(artifacts.sha256_of_text(f"{seed} {name}")[:15], 16)


def surgery_problem(moment: Float[Tensor, "cols cols"], group: int = 1) -> Problem:
    """The damped moment, the columns' order by falling moment, and its inverse's factor in that order.

    With a group size, neighbours stay together and groups are ordered by their summed moment.
    Raises ValueError for a moment that holds NaN or infinity, naming how many.
    """
    damped = damped_moment(moment, DAMPING)
    weight = moment.diagonal().unflatten(0, (-1, group)).sum(1)
    first = weight.argsort(descending=True, stable=True) * group
    order = (first[:, None] + torch.arange(group, device=first.device)).flatten()
    # Read backwards, M = L L^T; the inverse of L, read backwards again, is the U with U^T U = M^-1: half the work of
    # inverting and factorising M^-1, most of it in matrix products.
    backwards = torch.linalg.cholesky(damped[order][:, order].flip(0, 1))
    return Problem(damped, _inverse_triangle(backwards).flip(0, 1), order, 1)


def _inverse_triangle(lower: Tensor) -> Tensor:
    """The inverse of a lower triangle, by halves."""
    if len(lower) <= BLOCK_COLUMNS:
        return torch.linalg.solve_triangular(lower, torch.eye(len(lower), device=lower.device), upper=False)
    half = len(lower) // 2
    first, second = _inverse_triangle(lower[:half, :half]), _inverse_triangle(lower[half:, half:])
    result = torch.zeros_like(lower)
    result[:half, :half], result[half:, half:] = first, second
    result[half:, :half] = second @ (lower[half:, :half] @ first).neg_()
    return result


def remove_weights(
    weight: Float[Tensor, "rows cols"],
    posed: Problem,
    pattern: Pattern,
    *,
    count: int,
    refinements: int = REFINEMENTS,
) -> Float[Tensor, "rows cols"]:
    """The weight with `count` zeros (or those of an n:m pattern), what is left adapted to `posed.moment`."""
    original = weight.detach().float()
    pruned, gone = _swept(original, posed, pattern, count)
    before = torch.get_float32_matmul_precision()
    # Products of bfloat16 parts with float32 sums, where the processor has them, end at the same error to six digits.
    torch.set_float32_matmul_precision("medium")
    try:
        return _refined(original, pruned, (~gone).float(), posed.moment, refinements)
    finally:
        torch.set_float32_matmul_precision(before)


def remove_columns(
    weight: Float[Tensor, "rows cols"], moment: Float[Tensor, "cols cols"], kept: Int[Tensor, "kept"]
) -> Float[Tensor, "rows cols"]:
    """The weight with all other columns zero and the kept ones at their optimum, w M_:K (M_KK)^-1; M as damped."""
    posed = damped_moment(moment, DAMPING)
    lower = torch.linalg.cholesky(posed[kept][:, kept])
    result = torch.zeros_like(weight, dtype=torch.float32)
    result[:, kept] = torch.cholesky_solve((weight.float() @ posed[:, kept]).T, lower).T
    return result


def _refined(original: Tensor, pruned: Tensor, kept: Tensor, moment: Tensor, steps: int) -> Tensor:
    """Kept weights nearer to the least-squares optimum for this mask, by conjugate gradients, all rows at once."""
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


def _swept(weight: Tensor, posed: Problem, pattern: Pattern, count: int) -> tuple[Tensor, Tensor]:
    """Steps 1 and 2, and what is gone; works on the transpose, whose rows are contiguous columns."""
    order, factor = posed.order, posed.factor
    left = weight.T[order].contiguous()
    gone = torch.zeros_like(left, dtype=torch.bool)
    penalty = factor.diagonal().square()[:, None]
    unit = pattern.group if pattern.zeros else BLOCK_COLUMNS
    wanted = None if pattern.zeros else lowest(left.square() / penalty, count)
    factor = factor / factor.diagonal()[:, None]
    for start in range(0, len(order), BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, len(order))
        errors = torch.empty_like(left[start:end])
        for j in range(start, end):
            if (j - start) % unit == 0:
                at = slice(j, min(j + unit, end))
                scores = left[at].square() / penalty[at]
                if wanted is None:
                    gone[at].scatter_(0, scores.topk(pattern.zeros, dim=0, largest=False).indices, True)
                else:
                    gone[at] = lowest(scores, int(wanted[at].sum()))
            error = torch.mul(left[j], gone[j], out=errors[j - start])
            left[j].sub_(error)
            left[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    back = order.argsort()
    return left[back].T.contiguous(), gone[back].T.contiguous()


SCORES: dict[str, Score] = {
    "random": Score(random),
    "magnitude": Score(lambda weight, seen: weight.abs()),
    "wanda": Score(lambda weight, seen: weight.abs() * seen.moment.diagonal().sqrt(), needs="moments", compared="row"),
    "sparsegpt": Score(sparsegpt, needs="moments", updates=True),
    "gradient": Score(lambda weight, seen: weight.abs() * seen.squared_gradient.float().sqrt(), needs="gradients"),
    "influence": Score(None, needs="moments"),
}
