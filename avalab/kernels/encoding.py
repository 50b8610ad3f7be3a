"""A weight rounded to the nearest codes of a 4-bit format and packed: what `quantize` puts into NF4 and FP4 files.

Forms, best first:
- `triton`: one pass on a GPU for levels, absolute maximum, codes and packing;
- `tiles`: on any device, parts of a weight that stay in cache. The code of a value among 16 ascending levels is the
  number of midpoints below it: fifteen vectorised comparisons, where a binary search a value takes six times as long;
- `reference`: `avalab.kernels.formats.encode`, the definition, which knows every format and is bit-equal to
  bitsandbytes. All give the same bytes; groups of nothing but zeros keep the scale zero, as in bitsandbytes.

Scales that are quantized themselves (double quantization) are a 64th of the weights: `formats` serves them in all
forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from avalab.kernels.dispatch import Form, choose_form
from avalab.kernels.formats import NumberFormat, encode_scales, four_bit
from avalab.kernels.formats import encode as encode_by_definition
from avalab.kernels.weight import Weight4, check_groups, from_encoded, nested_scales
from avalab.lab.errors import InputError

TILE_WEIGHTS = 2**17  # half a MiB of float32


def encode(weight: Float[Tensor, "rows cols"], format: NumberFormat) -> Weight4:
    """Every weight's nearest code of a 4-bit `format`, packed, on the weight's device.

    Raises ValueError for a format that has no 4 bits, groups that do not divide the columns, an odd number of columns,
    and weights that are NaN or infinite (how many, where the first is).
    """
    if format.bits != 4:
        raise InputError(f"{format.name} has {format.bits} bits a code; this packs 4")
    if weight.ndim != 2 or weight.numel() == 0:
        raise InputError(f"a weight has rows and columns, got the shape {tuple(weight.shape)}")
    check_groups(weight.shape[1], format.group_size or weight.shape[1])
    return choose_form("encode", ENCODE, weight.device, weight, format).run(weight, format)


def encode_reference(weight: Float[Tensor, "rows cols"], format: NumberFormat) -> Weight4:
    """`formats.encode`, packed."""
    return from_encoded(encode_by_definition(weight, format), zero_scales=True)


def encode_tiles(weight: Float[Tensor, "rows cols"], format: NumberFormat) -> Weight4:
    """Some groups at a time, all work of a group while it is in cache."""
    size = format.group_size or weight.shape[1]
    groups = weight.detach().reshape(-1, size)
    packed = torch.empty(len(groups), size // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(groups), device=weight.device)
    middles = midpoints(format)
    step = max(1, TILE_WEIGHTS // size)
    for first in range(0, len(groups), step):
        part = slice(first, first + step)
        tile = groups[part].float()
        scales[part] = tile.abs().amax(1)
        # The reciprocal, as `formats` takes it: the last bit decides ties.
        scaled = tile * (1 / scales[part].clamp_min(1e-38)[:, None])
        codes = torch.zeros(tile.shape, dtype=torch.uint8, device=tile.device)
        above = torch.empty(tile.shape, dtype=torch.bool, device=tile.device)
        for middle in middles:
            codes += torch.gt(scaled, middle, out=above).view(torch.uint8)
        torch.bitwise_or(codes[:, ::2] << 4, codes[:, 1::2], out=packed[part])
    return assembled(weight, format, packed, scales)


def midpoints(format: NumberFormat) -> list[float]:
    """Half way between neighbouring levels, in float32."""
    levels = torch.tensor(format.levels)
    return ((levels[:-1] + levels[1:]) / 2).tolist()


def assembled(weight: Tensor, format: NumberFormat, codes: UInt8[Tensor, "group half"], scales: Tensor) -> Weight4:
    """Codes and absolute maxima as a weight, the scales quantized where the format says so.

    Raises ValueError for weights that are NaN or infinite, as `formats.encode` words it.
    """
    rows, cols = weight.shape
    if not scales.isfinite().all():
        encode_by_definition(weight, format)  # refuses, naming the first
    levels = torch.tensor(format.levels, device=weight.device)
    packed = Weight4(codes.view(rows, cols // 2), levels, scales.view(rows, -1))
    if format.nested is None:
        return packed
    return replace(packed, scales=nested_scales(*encode_scales(scales, format.nested), count=len(scales)))


def serves_ascending(weight: Tensor, format: NumberFormat) -> bool:
    """Whether a code is the number of midpoints below a value: levels that ascend, nothing added, float32 scales."""
    size = format.group_size or weight.shape[1]
    ascend = bool(format.levels) and list(format.levels) == sorted(format.levels)
    return ascend and not format.grid_steps and not format.offset and size % 2 == 0


def encode_triton(weight: Float[Tensor, "rows cols"], format: NumberFormat) -> Weight4:
    """One pass on a GPU."""
    from avalab.kernels import triton as triton_kernels

    codes, scales = triton_kernels.codes_and_scales(weight.detach(), midpoints(format), format.group_size)
    return assembled(weight, format, codes, scales)


def _serves_triton(weight: Tensor, format: NumberFormat) -> bool:
    size = format.group_size or 0
    return weight.device.type == "cuda" and serves_ascending(weight, format) and size >= 32 and size & (size - 1) == 0


def encode_check(run: Callable[[Tensor, NumberFormat], Weight4]) -> Callable[[str], None]:
    """A check for `Form`: the reference's bytes, for weights with ties, zeros and a group of zeros."""

    def check(device: str) -> None:
        weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(0)).to(device)
        weight[0, :64], weight[1, ::3] = 0.0, 0.0
        weight[2, :64] = torch.tensor(midpoints(four_bit("nf4")) * 4 + [1.0] * 4)
        for dtype, double in ((torch.bfloat16, False), (torch.float32, True)):
            format = four_bit("nf4", 64, double_quantization=double)
            found, expected = (form(weight.to(dtype), format).tensors() for form in (run, encode_reference))
            if not all(map(torch.equal, found, expected)):
                raise ArithmeticError("NF4 codes or scales differ from the reference's")

    return check


ENCODE = (
    Form("triton", encode_triton, _serves_triton, encode_check(encode_triton)),
    Form("tiles", encode_tiles, serves_ascending, encode_check(encode_tiles)),
    Form("reference", encode_reference),
)
