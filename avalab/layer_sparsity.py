"""How much each layer loses: the same share everywhere, or more where the model minds less.

"sensitivity": for every layer and a row of sparsities, the weights that the score would remove cost

    1/2 sum E[(dL/dw)^2] w^2,

the second-order rise in KL divergence with the Fisher information taken as diagonal (LeCun et al. 1990, Optimal Brain
Damage). One price on a removed weight is then sought at which the layers, each at its own best level, lose as many as
asked: Lagrange's condition for the least sum (Everett 1963). Costs are estimated on a sample of rows, so that an exact
integer program would solve noise. What it does not do: account for updates of the weights that stay, or for what
layers do to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

LEVELS = torch.linspace(0, 1, 21, dtype=torch.float64)  # shares of a layer that may go
SAMPLED_ROWS = 64  # of a layer


def uniform(layers: Mapping[str, nn.Linear], sparsity: float) -> dict[str, int]:
    """How many weights each layer loses when all lose the same share."""
    return {name: round(sparsity * layer.weight.numel()) for name, layer in layers.items()}


def sensitivity(
    layers: Mapping[str, nn.Linear],
    sparsity: float,
    *,
    score: Callable[[str], Float[Tensor, "rows cols"]],
    squared_gradient: Callable[[str], Float[Tensor, "rows cols"]],
) -> dict[str, int]:
    """How many weights each layer loses so that the expected rise is least and the share of all is as asked."""
    rises = []
    for name, layer in layers.items():
        energy = layer.weight.detach().float().square() * squared_gradient(name).float() / 2
        rises.append(curve(score(name), energy))
    sizes = [layer.weight.numel() for layer in layers.values()]
    gone = cheapest(torch.stack(rises), torch.tensor(sizes), round(sparsity * sum(sizes)))
    return dict(zip(layers, gone, strict=True))


def curve(scores: Float[Tensor, "rows cols"], energy: Float[Tensor, "rows cols"]) -> Float[Tensor, "level"]:
    """The expected rise when a layer loses each of the `LEVELS`, its lowest scores first."""
    step = max(1, len(scores) // SAMPLED_ROWS)
    sampled = energy[::step].flatten()[scores[::step].flatten().argsort()].double().cumsum(0).cpu()
    rises = torch.cat([torch.zeros(1, dtype=torch.float64), sampled])
    return rises[(LEVELS * len(sampled)).round().long()] * (scores.numel() / len(sampled))


def cheapest(rises: Float[Tensor, "layer level"], sizes: Int[Tensor, "layer"], count: int) -> list[int]:
    """How many weights each layer loses, `count` in all, for the least summed rise that one price can reach."""
    removed = (LEVELS * sizes[:, None]).round().long()

    def at(price: float) -> Int[Tensor, "layer"]:
        best = (rises - price * removed).argmin(1, keepdim=True)
        return removed.gather(1, best).squeeze(1)

    low, high = 0.0, 1e-30
    while int(at(high).sum()) < count:
        low, high = high, 4 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if int(at(middle).sum()) >= count else (middle, high)
    found = at(high)
    return _without_surplus(found.tolist(), int(found.sum()) - count)


def _without_surplus(counts: list[int], surplus: int) -> list[int]:
    """Levels are coarse: give back what was removed beyond the share, to the layers that lose most."""
    for layer in sorted(range(len(counts)), key=counts.__getitem__, reverse=True):
        given = min(surplus, counts[layer])
        counts[layer] -= given
        surplus -= given
    return counts
