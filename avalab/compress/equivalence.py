"""The same function, easier to round: transforms of decoder blocks that cancel, so that nothing is left to do later.

Norms, weights and biases change, the architecture does not: every container holds the result, no engine needs to know.

`scale`: what a channel carries is divided by s, the columns that read it are multiplied by s,

    input norm -> q, k, v      norm before the MLP -> gate, up      v -> o      up -> down

(a key-value head's factors serve every query head that shares it; of fused projections, the rows of v or up). Families
that normalise only what attention and MLP give (OLMo 2) have the last two pairs alone. As in AWQ (Lin et al. 2024,
arXiv 2306.00978) s = (size of the inputs)^a / (size of the columns' weights)^b, sizes as root mean squares, a and b
from a small grid with (0, 0), which changes nothing. The choice is that of least rounding error at `BITS` bits on a
sample of rows, columns weighted as in `rounding`. Factors are powers of two: folding one into bf16 numbers is exact.

`rotate`: an orthogonal Hadamard matrix for each key-value head, into the rows of v and the columns of o (QuaRot,
Ashkboos et al. 2024, arXiv 2404.00456), which spreads large channels over a head. It costs a rounding to bf16.

On SmolLM2-135M neither gains at 4.5 bits a parameter once rounding compensates: both are for a caller to ask for. The
residual stream is not rotated: that would fold the final norm into the head, which a tied embedding does not allow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from avalab.compress import rounding
from avalab.kernels.formats import Grid
from avalab.lab.errors import InputError
from avalab.models import walk

NONE, SCALE, ROTATE = "none", "scale", "rotate"

TRANSFORMS = (NONE, SCALE, ROTATE, f"{SCALE}+{ROTATE}")

BITS = 3  # of the grid that judges factors: what is easier there is so at 2 and 4

GROUP_SIZES = (64, 32, 128)

EXPONENTS = tuple((a, b) for a in (0.0, 0.25, 0.5, 0.75) for b in (0.0, 0.25, 0.5))  # of inputs, of weights

WINDOWS = 16  # of calibration text, at most

SAMPLED_ROWS = 32  # of a layer

USUAL = ("input_layernorm", "post_attention_layernorm")

# By family, the norms that attention and MLP read, where they read one.
NORMS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "granite", "stablelm"), USUAL),
    **dict.fromkeys(("gemma2", "gemma3_text"), ("input_layernorm", "pre_feedforward_layernorm")),
    "olmo2": ("", ""),
}


@dataclass(frozen=True)
class Pair:
    """A norm or linear layer, and the layers that read its channels.

    Columns of the readers are `heads` heads of `sharing` blocks, which all read the same channels. Of a fused layer
    only the rows from `first` on give them.
    """

    source: nn.Module
    readers: Sequence[nn.Linear]
    heads: int = 1
    sharing: int = 1
    first: int = 0

    def channels(self, columns: Float[Tensor, "cols"]) -> Float[Tensor, "channel"]:
        """Means over the columns that read a channel."""
        return columns.view(self.heads, self.sharing, -1).mean(1).flatten()

    def columns(self, channels: Float[Tensor, "channel"]) -> Float[Tensor, "cols"]:
        """A channel's value for each column that reads it."""
        return channels.view(self.heads, 1, -1).expand(-1, self.sharing, -1).flatten()


def checked_transform(transform: str) -> str:
    """The transform; raises ValueError for an unknown one."""
    if transform not in TRANSFORMS:
        raise InputError(f"transform {transform!r} is not one of {', '.join(TRANSFORMS)}")
    return transform


def refuse_unknown(model: PreTrainedModel, transform: str) -> None:
    """Raise ValueError for an unknown transform, or one that this model's blocks do not take; names and shapes do."""
    parts, family = checked_transform(transform).split("+"), model.config.model_type
    if parts != [NONE] and family not in NORMS:
        raise InputError(f"transform {transform!r} knows blocks of {', '.join(NORMS)}, not of {family}: use none")
    if ROTATE in parts:
        hadamard(model.base_model.layers[0].self_attn.head_dim)


def apply_transform(model: PreTrainedModel, windows: Int[Tensor, "window time"], transform: str) -> dict[str, int]:
    """Change the model, in place, by one of `TRANSFORMS`; how many sites got which exponents, `a=0.25,b=0.5`.

    Deterministic. Raises ValueError for an unknown transform, or a family whose blocks are not known here.
    """
    refuse_unknown(model, transform)
    parts = transform.split("+")
    if ROTATE in parts:
        rotate_values(model)
    return scale_channels(model, windows) if SCALE in parts else {}


@torch.no_grad()
def scale_channels(
    model: PreTrainedModel, windows: Int[Tensor, "window time"], *, exponents: Sequence[tuple[float, float]] = EXPONENTS
) -> dict[str, int]:
    """Fold activation-aware factors into the model, in place; how many sites got which exponents."""
    found: Counter[str] = Counter()
    for site in rounding.walked(model, windows[:WINDOWS], desc="scales"):
        pair = _pair(model, site)
        if pair is None:
            continue
        cost = rounding.rounding_problem(site.moment, damping=rounding.damping_of(site)).column_cost
        (a, b), factors = _best(pair, site.moment.diagonal(), cost, exponents)
        if (a, b) != (0, 0):
            fold(pair, factors)
        found[f"a={a:g},b={b:g}"] += 1
    return dict(sorted(found.items()))


@torch.no_grad()
def rotate_values(model: PreTrainedModel) -> None:
    """Rotate what every value head hands to the output projection, in place.

    Raises ValueError for heads of odd width, in which no Hadamard matrix fits.
    """
    for block in model.base_model.layers:
        attention = block.self_attn
        matrix = hadamard(attention.head_dim)
        values, first = _values(attention)
        for tensor in (values.weight, values.bias):
            if tensor is not None:
                part = tensor[first:]
                rows = part.double().reshape(-1, attention.head_dim, part.numel() // len(part))
                part.copy_((matrix.to(rows.device) @ rows).reshape(part.shape))
        weight = attention.o_proj.weight
        columns = weight.double().unflatten(1, (-1, attention.head_dim))
        weight.copy_((columns @ matrix.T.to(columns.device)).flatten(1))


def hadamard(width: int) -> Float[Tensor, "width width"]:
    """An orthogonal matrix of Sylvester's construction, in parts if `width` is no power of two (96: three of 32).

    Raises ValueError for an odd width.
    """
    size = width & -width  # the greatest power of two that divides it
    if size < 2:
        raise InputError(f"no Hadamard matrix rotates heads of {width} channels, an odd number: use transform=scale")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.block_diag(*[matrix / size**0.5] * (width // size))


@torch.no_grad()
def fold(pair: Pair, factors: Float[Tensor, "channel"]) -> None:
    """Divide what the source's channels carry by factors and multiply, in place, the columns that read them.

    A norm takes what bf16 holds of its new gain, and the columns the factor which that is; Gemma's gain is 1 + weight.
    """
    source, factors = pair.source, factors.to(pair.source.weight.dtype)
    if isinstance(source, nn.Linear):
        source.weight[pair.first :].div_(factors[:, None])
        if source.bias is not None:
            source.bias[pair.first :].div_(factors)
    else:
        one = 1.0 if type(source).__name__.startswith("Gemma") else 0.0
        gain = source.weight.double() + one
        moved = (gain / factors.double() - one).bfloat16().double()
        movable = (gain != 0) & (moved + one != 0)
        factors = torch.where(movable, gain / (moved + one), 1.0)
        source.weight.copy_(torch.where(movable, moved, source.weight.double()))
        if getattr(source, "bias", None) is not None:  # LayerNorm's
            source.bias.copy_(source.bias.double() / factors)
    for reader in pair.readers:
        reader.weight.copy_(reader.weight.double() * pair.columns(factors.double()))


def _pair(model: PreTrainedModel, site: walk.Site) -> Pair | None:
    """What feeds a site, and the site's layers; None where that is the residual stream itself."""
    block, readers = model.base_model.layers[site.block], list(site.layers.values())
    kind = next(iter(site.layers)).rpartition(".")[2]
    before_attention, before_mlp = NORMS[model.config.model_type]
    if kind == "o_proj":
        attention, sharing = block.self_attn, block.self_attn.num_key_value_groups
        heads = readers[0].in_features // sharing // attention.head_dim
        values, first = _values(attention)
        return Pair(values, readers, heads, sharing, first)
    if kind == "down_proj":
        fused = getattr(block.mlp, "gate_up_proj", None)
        return Pair(fused, readers, first=fused.out_features // 2) if fused else Pair(block.mlp.up_proj, readers)
    norm = before_attention if kind in ("q_proj", "qkv_proj") else before_mlp
    return Pair(getattr(block, norm), readers) if norm else None


def _values(attention: nn.Module) -> tuple[nn.Linear, int]:
    """The layer that gives the values, and the first of its rows that does; a fused one has them last."""
    if hasattr(attention, "v_proj"):
        return attention.v_proj, 0
    width = attention.o_proj.in_features // attention.num_key_value_groups
    return attention.qkv_proj, attention.qkv_proj.out_features - width


def _best(
    pair: Pair, power: Tensor, cost: Tensor, exponents: Sequence[tuple[float, float]]
) -> tuple[tuple[float, float], Tensor]:
    """Exponents of least error relative to that without factors, summed over the readers; and the factors."""
    rows = [layer.weight[:: max(1, layer.out_features // SAMPLED_ROWS)].float() for layer in pair.readers]
    inputs = pair.channels(power.float()).sqrt()
    weights = pair.channels(sum(layer.weight.float().square().mean(0) for layer in pair.readers)).sqrt()
    plain = [_error(sample, cost) for sample in rows]
    best = ((0.0, 0.0), torch.ones_like(inputs), float(len(rows)))
    for a, b in exponents:
        factors = _factors(inputs, weights, a, b)
        columns = pair.columns(factors)
        errors = [_error(sample * columns, cost / columns.square()) for sample in rows]
        total = sum(error / max(least, 1e-30) for error, least in zip(errors, plain, strict=True))
        if total < best[2]:
            best = ((a, b), factors, total)
    return best[:2]


def _factors(inputs: Tensor, weights: Tensor, a: float, b: float) -> Tensor:
    """Powers of two next to inputs^a / weights^b, about 1 on average; channels that carry nothing keep theirs."""
    carries = (inputs > 0) & (weights > 0)
    wanted = a * inputs.clamp(min=1e-30).log2() - b * weights.clamp(min=1e-30).log2()
    wanted = wanted - wanted[carries].mean() if carries.any() else wanted
    return torch.where(carries, wanted.round().clamp(-8, 8), 0.0).exp2()


def _error(sample: Tensor, cost: Tensor) -> float:
    """Cost-weighted error of rounding rows to the nearest points of the grid that judges."""
    columns = sample.shape[1]
    grid = Grid(BITS, next((size for size in GROUP_SIZES if columns % size == 0), columns))
    return float(((rounding.round_to_nearest(sample, cost, grid) - sample).square() * cost).sum())
