"""How much each layer loses: the same share everywhere, or more where the model minds less.

"sensitivity": for every layer and a row of sparsities, the weights that the score would remove cost

    1/2 sum E[(dL/dw)^2] w^2,

the second-order rise in KL divergence with the Fisher information taken as diagonal (LeCun et al. 1990, Optimal Brain
Damage). `avalab.allocation` then picks one sparsity a layer for the least sum under the number of weights that may
stay. Costs are estimated on a sample of rows. What it does not do: account for updates of the weights that stay, or
for what layers do to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalab import allocation
from avalab.allocation import Option

LEVELS = tuple(round(0.05 * level, 2) for level in range(20))  # 0 to 0.95
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
    options = {}
    for name, layer in layers.items():
        energy = layer.weight.detach().float().square() * squared_gradient(name).float() / 2
        options[name] = curve(score(name), energy)
    total = sum(layer.weight.numel() for layer in layers.values())
    kept = total - round(sparsity * total)
    chosen = allocation.allocate(options, kept).chosen
    counts = {name: layers[name].weight.numel() - option.bytes for name, option in chosen.items()}
    return _filled(counts, sum(counts.values()) - (total - kept))


def curve(scores: Float[Tensor, "rows cols"], energy: Float[Tensor, "rows cols"]) -> list[Option]:
    """What a layer may keep (in weights, as an option's `bytes`) and the expected rise of each choice."""
    step = max(1, len(scores) // SAMPLED_ROWS)
    sampled = energy[::step].flatten()[scores[::step].flatten().argsort()]
    rises = torch.cat([torch.zeros(1), sampled.double().cumsum(0).float().cpu()]) * (scores.numel() / len(sampled))
    options = []
    for level in LEVELS:
        gone = round(level * scores.numel())
        options.append(Option(f"{level:g}", scores.numel() - gone, float(rises[round(level * len(sampled))])))
    return options


def _filled(counts: dict[str, int], surplus: int) -> dict[str, int]:
    """Levels are coarse: give back what was removed beyond the share, from the layers that lose most."""
    for name in sorted(counts, key=counts.get, reverse=True):
        given = min(surplus, counts[name])
        counts[name] -= given
        surplus -= given
    return counts
