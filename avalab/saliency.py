"""How much each weight matters: one pure function a score, for one layer at a time.

With w a weight in row r and column c, x the layer's input, L the loss of labels the model itself draws:

| score | value | source |
|---|---|---|
| `random` | uniform noise | the floor that every other score has to beat |
| `magnitude` | abs(w) | Han et al. 2015, arXiv 1506.02626 |
| `wanda` | abs(w) sqrt(E[x_c^2]), compared within a row | Sun et al. 2024, arXiv 2306.11695 |
| `sparsegpt` | abs(w) / sqrt([M^-1]_cc), M = E[x x^T] damped | Frantar and Alistarh 2023, arXiv 2301.00774 |
| `gradient` | abs(w) sqrt(E[(dL/dw)^2]) | Molchanov et al. 2019, arXiv 1906.10771, eq. 8 |
| `influence` | of whole blocks only: 1 - E[cos(input, output)] | Men et al. 2024, arXiv 2403.03853 |

A structure (head, channel) has the sum of the squares of its weights' scores. `sparsegpt` also changes what is left,
see `avalab.surgeon`. What it does not do: choose what goes (`avalab.sparsity_patterns`), or walk a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalab import artifacts, surgeon


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


def magnitude(weight: Float[Tensor, "rows cols"], seen: Evidence) -> Float[Tensor, "rows cols"]:
    """abs(w)."""
    return weight.abs()


def wanda(weight: Float[Tensor, "rows cols"], seen: Evidence) -> Float[Tensor, "rows cols"]:
    """abs(w) times the root mean square of the weight's input."""
    return weight.abs() * seen.moment.diagonal().sqrt()


def sparsegpt(weight: Float[Tensor, "rows cols"], seen: Evidence) -> Float[Tensor, "rows cols"]:
    """Root of the error that removing w causes once all other weights of its row have made up for it."""
    posed = surgeon.problem(seen.moment)
    inverse = torch.empty_like(posed.order, dtype=posed.factor.dtype)
    inverse[posed.order] = posed.factor.square().sum(0)  # diagonal of U^T U, the inverse
    return weight.abs() / inverse.sqrt()


def gradient(weight: Float[Tensor, "rows cols"], seen: Evidence) -> Float[Tensor, "rows cols"]:
    """abs(w) times the root mean square of the loss's gradient: the first-order change in loss when w goes."""
    return weight.abs() * seen.squared_gradient.float().sqrt()


def of_layer(score: str, weight: Float[Tensor, "rows cols"], seen: Evidence) -> Float[Tensor, "rows cols"]:
    """The score of every weight, in float32. Raises ValueError for one that is defined for whole blocks only."""
    compute = SCORES[score].compute
    if compute is None:
        raise ValueError(f"score {score!r} belongs to whole blocks; use it with pattern 'layers'")
    return compute(weight.float(), seen)


def layer_seed(seed: int, name: str) -> int:
    """A seed of the layer's own, so that a resumed run draws what the whole one would have drawn."""
    return int(artifacts.sha256_of_text(f"{seed} {name}")[:15], 16)


SCORES: dict[str, Score] = {
    "random": Score(random),
    "magnitude": Score(magnitude),
    "wanda": Score(wanda, needs="moments", compared="row"),
    "sparsegpt": Score(sparsegpt, needs="moments", updates=True),
    "gradient": Score(gradient, needs="gradients"),
    "influence": Score(None, needs="moments"),
}
