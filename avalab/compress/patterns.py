"""Patterns of sparsity: which weights go (masks are True there), and how many each layer loses.

`lowest` takes the lowest scores of a layer, or of each row alike; `n_of_m` the lowest n of every m neighbours in a row,
which sparse tensor cores read (Mishra et al. 2021, arXiv 2104.08378). `keep` takes whole structures by their summed
scores: `structured` patterns leave a smaller dense model (`avalab.models.smaller`), the others zeros.

Layers lose the same share, or more where the model minds less (`cheapest_counts`): removed weights cost
1/2 sum E[(dL/dw)^2] w^2, the second-order increase of the loss with a diagonal Fisher information (LeCun et al. 1990,
Optimal Brain Damage). One price on a removed weight is sought at which the layers, each at its own best level, lose as
many as asked: Lagrange's condition for the least sum (Everett 1963). Costs come from a sample of rows, so that an exact
integer program would solve noise; updates of the weights that stay are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import lcm

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from avalab.lab.errors import InputError

LARGEST_STEP = 64  # channels: what kernels and quantization groups like to divide

LEVELS = torch.linspace(0, 1, 21, dtype=torch.float64)  # shares of a layer that may go

SAMPLED_ROWS = 64  # of a layer


@dataclass(frozen=True)
class Pattern:
    """A shape of sparsity: zeros anywhere, `zeros` of every `group` neighbours, or whole structures."""

    zeros: int = 0
    group: int = 1
    structured: bool = False

    @property
    def fixed_sparsity(self) -> float | None:
        """The one sparsity that an n:m pattern has; None where it can be chosen."""
        return self.zeros / self.group if self.zeros else None


def lowest(scores: Float[Tensor, "rows cols"], count: int, *, compared: str = "layer") -> Bool[Tensor, "rows cols"]:
    """True at exactly `count` lowest scores; compared "row": the same number in each row, the rest one a row.

    Raises ValueError for a count below zero or above the number of weights.
    """
    rows, columns = scores.shape
    if not 0 <= count <= rows * columns:
        raise InputError(f"cannot remove {count} of {rows * columns} weights")
    if compared == "layer":
        mask = torch.zeros(rows * columns, dtype=torch.bool, device=scores.device)
        mask[scores.flatten().topk(count, largest=False, sorted=False).indices] = True
        return mask.view(rows, columns)
    each, rest = divmod(count, rows)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for part, number in ((slice(rest), each + 1), (slice(rest, None), each)):
        if number <= columns:  # else the first part is empty
            mask[part].scatter_(1, scores[part].topk(number, dim=1, largest=False, sorted=False).indices, True)
    return mask


def n_of_m(scores: Float[Tensor, "rows cols"], zeros: int, group: int) -> Bool[Tensor, "rows cols"]:
    """True at the `zeros` lowest scores of every `group` neighbouring columns.

    Raises ValueError for a group that does not divide the columns.
    """
    refuse_ragged(scores.shape[1], group, "a weight")
    parts = scores.unflatten(1, (-1, group))
    mask = torch.zeros_like(parts, dtype=torch.bool)
    return mask.scatter_(2, parts.topk(zeros, dim=2, largest=False).indices, True).flatten(1)


def refuse_ragged(columns: int, group: int, name: str) -> None:
    """Raise ValueError naming the layer whose columns a group does not divide."""
    if columns % group:
        raise InputError(f"groups of {group} do not divide the {columns} columns of {name}")


def step_size(count: int, *, of_heads: int = 1) -> int:
    """The granularity at which `count` channels shrink: a multiple of the largest power of two, up to 64, that fits.

    Steps are at most a quarter of the channels. Hidden channels also stay a multiple of the number of heads, which
    transformers asks of a Llama configuration.
    """
    size = LARGEST_STEP
    while size > 1 and (count % size or lcm(size, of_heads) > count / 4):
        size //= 2
    return lcm(size, of_heads)


def removed_count(count: int, sparsity: float, *, of: str, granularity: int = 1) -> int:
    """How many of `count` structures go: the nearest multiple of the granularity.

    Raises ValueError where that is all of them, or none though some were asked for; it names what is possible.
    """
    gone = round(count * sparsity / granularity) * granularity
    if gone >= count or (sparsity > 0 and gone == 0):
        shares = ", ".join(f"{k / count:.3g}" for k in range(granularity, count, granularity))
        possible = f"possible: {shares}" if shares else "of so few none can go; take another pattern"
        which = "every one" if gone >= count else "none"
        raise InputError(f"sparsity {sparsity} removes {which} of {count} {of}; {possible}")
    return gone


def kept_indices(scores: Float[Tensor, "item"], gone: int) -> Int[Tensor, "kept"]:
    """Indices of what stays when the `gone` lowest scores go, ascending."""
    return scores.argsort(stable=True)[gone:].sort().values


def cheapest_counts(
    layers: Mapping[str, nn.Linear],
    sparsity: float,
    *,
    score: Callable[[str], Float[Tensor, "rows cols"]],
    squared_gradient: Callable[[str], Float[Tensor, "rows cols"]],
) -> dict[str, int]:
    """How many weights each layer loses so that the loss should increase least, and the share of all is as asked."""
    increases = []
    for name, layer in layers.items():
        energy = layer.weight.detach().float().square() * squared_gradient(name).float() / 2
        increases.append(loss_curve(score(name), energy))
    sizes = [layer.weight.numel() for layer in layers.values()]
    gone = counts_at_one_price(torch.stack(increases), torch.tensor(sizes), round(sparsity * sum(sizes)))
    return dict(zip(layers, gone, strict=True))


def loss_curve(scores: Float[Tensor, "rows cols"], energy: Float[Tensor, "rows cols"]) -> Float[Tensor, "level"]:
    """The expected increase of the loss when a layer loses each of the `LEVELS`, its lowest scores first."""
    step = max(1, len(scores) // SAMPLED_ROWS)
    sampled = energy[::step].flatten()[scores[::step].flatten().argsort()].double().cumsum(0).cpu()
    increases = torch.cat([torch.zeros(1, dtype=torch.float64), sampled])
    return increases[(LEVELS * len(sampled)).round().long()] * (scores.numel() / len(sampled))


def counts_at_one_price(increases: Float[Tensor, "layer level"], sizes: Int[Tensor, "layer"], count: int) -> list[int]:
    """How many weights each layer loses, `count` in all, for the least summed increase that one price can reach."""
    removed = (LEVELS * sizes[:, None]).round().long()

    def at(price: float) -> Int[Tensor, "layer"]:
        best = (increases - price * removed).argmin(1, keepdim=True)
        return removed.gather(1, best).squeeze(1)

    low, high = 0.0, 1e-30
    while int(at(high).sum()) < count:
        low, high = high, 4 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if int(at(middle).sum()) >= count else (middle, high)
    counts = at(high).tolist()
    surplus = sum(counts) - count  # levels are coarse: it goes back to the layers that lose most
    for layer in sorted(range(len(counts)), key=counts.__getitem__, reverse=True):
        given = min(surplus, counts[layer])
        counts[layer] -= given
        surplus -= given
    return counts


PATTERNS: dict[str, Pattern] = {
    "unstructured": Pattern(),
    "2:4": Pattern(2, 4),
    "4:8": Pattern(4, 8),
    "heads": Pattern(structured=True),
    "kv_groups": Pattern(structured=True),
    "mlp_channels": Pattern(structured=True),
    "hidden": Pattern(structured=True),
    "layers": Pattern(structured=True),
}
