"""Number formats as rows of data: what a stored integer stands for, and what its scales cost.

Method, the same for every format:
1. cut the weight along its rows into groups of `group_size` values that share a scale (and perhaps an offset);
2. choose scale and offset of each group by the format's rule;
3. divide by the scale and take the nearest code: the nearest level (NF4, FP4) or the nearest integer;
4. keep codes and scales; double quantization codes the scales, less their mean, in an 8-bit format of the same kind.

A new format is a new row: those of GGUF are in `block_types.FORMATS` and go through the same functions. `Grid` and
`Rounded` are the integers of compressed-tensors, whose codes a search chooses (`compress.rounding`).

Sources: NF4 and double quantization, Dettmers et al. 2023 (QLoRA), section 3; the 8-bit dynamic levels, Dettmers 2016
("8-bit approximations for parallelism"); int8 by row, Dettmers et al. 2022 (LLM.int8()); integers with a zero point,
Jacob et al. 2018, eq. 1. NF4 and FP4 agree with the CPU build of bitsandbytes 0.50 bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import torch
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor
from torch.nn.functional import pad

from avalab.lab.errors import InputError

CHUNK_WEIGHTS = 2**20  # coded at a time: bounds the float32 copies to a few MiB

Groups = Float32[Tensor, "group width"]

LEVELS = {  # by code, over the largest
    "nf4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    # Sign and magnitude: 8 magnitudes in the order of their bit patterns, then the same below zero.
    "fp4": tuple(s * size / 12 for s in (1, -1) for size in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}  # fmt: skip


@dataclass(frozen=True)
class NumberFormat:
    """One format. A code is an index into `levels` or, without levels, an integer in [low, high].

    A weight is `level * scale`, `integer * scale`, `(integer - zero_point) * scale` or `integer * scale + minimum`.
    """

    name: str
    bits: int  # of one code
    group_size: int | None  # weights that share a scale; None: a whole row
    scale_bits: float  # stored bits of one group's scale and offset, their own quantization included
    scale_rule: Callable[[Tensor, "NumberFormat"], tuple[Tensor, Tensor | None]] | None  # None: only decoded
    low: int = 0
    high: int = 0
    levels: tuple[float, ...] = ()  # in [-1, 1], by code
    grid_steps: int = 0  # equal steps of [-1, 1] to round to before the nearest level is taken; 0: do not
    scale_dtype: torch.dtype = torch.float32
    offset: str = ""  # "zero_point", "minimum" or none
    rounding: Callable[[Tensor, int], Tensor] = lambda values, low: values.round()  # of integers; ties to even
    nested: "NumberFormat | None" = None  # of the scales themselves: double quantization

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of a weight, scales included; with a scale a row, for rows too long for it to count."""
        return self.bits + (self.scale_bits / self.group_size if self.group_size else 0.0)


@dataclass(frozen=True)
class Encoded:
    """A weight in a number format. Groups are counted along the rows: `scales.view(rows, -1)` is their matrix."""

    format: NumberFormat
    codes: UInt8[Tensor, "rows cols"] | Int8[Tensor, "rows cols"]
    scales: Float[Tensor, "group"]  # what decoding multiplies by
    offsets: Tensor | None = None  # integer zero points or float minimums, one a group
    nested: "Encoded | None" = None  # stored instead of `scales`: these less their mean, in rows filled with zeros
    scale_mean: Float32[Tensor, ""] | None = None


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits in groups of `group_size` columns, with or without zero points."""

    bits: int
    group_size: int
    symmetric: bool = False

    @property
    def name(self) -> str:
        return f"w{self.bits}g{self.group_size}" + ("-sym" if self.symmetric else "")

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def levels(self) -> tuple[float, ...]:
        """None, as in a `NumberFormat` of integers."""
        return ()


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid: `(codes - zero_points) * scales`, scales and zero points one a row and group."""

    grid: Grid
    codes: Int8[Tensor, "rows cols"]
    scales: Float[Tensor, "rows groups"]
    zero_points: Int8[Tensor, "rows groups"]

    def decode(self, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "rows cols"]:
        """The weight as compressed-tensors decodes it: integers less zero points times scales, each in `dtype`."""
        codes = self.codes.unflatten(1, (self.scales.shape[1], -1)).to(dtype)
        return ((codes - self.zero_points.to(dtype)[..., None]) * self.scales.to(dtype)[..., None]).flatten(1)

    def split(self, rows: list[int]) -> list["Rounded"]:
        """The layers that were rounded together, each by its number of rows."""
        parts = zip(*(t.split(rows) for t in (self.codes, self.scales, self.zero_points)), strict=True)
        return [Rounded(self.grid, *(tensor.contiguous() for tensor in part)) for part in parts]


def grid_named(name: str) -> Grid:
    """The grid of a name like `w4g64` or `w4g64-sym`. Raises ValueError for another."""
    found = re.fullmatch(r"w([2-8])g(\d+)(-sym)?", name)
    if not found:
        raise InputError(f"grids are called like w4g64 or w4g64-sym with 2 to 8 bits, got {name!r}")
    return Grid(int(found[1]), int(found[2]), bool(found[3]))


def encode(weight: Float[Tensor, "rows cols"], format: NumberFormat) -> Encoded:
    """Round every weight to the nearest value of `format`.

    Raises ValueError for NaN or infinite weights (how many, where the first is), a group size that does not divide the
    columns (and those that do), scales beyond the range of the format's, or a format that is only decoded.
    """
    if format.scale_rule is None:
        raise InputError(f"{format.name} is only decoded here; encode to a format with a scale rule instead")
    if weight.ndim != 2 or weight.numel() == 0:
        raise InputError(f"a weight has rows and columns, got the shape {tuple(weight.shape)}")
    cols, size = weight.shape[1], format.group_size or weight.shape[1]
    if cols % size:
        fitting = ", ".join(str(g) for g in (16, 32, 64, 128, 256) if cols % g == 0) or "none of the usual ones"
        raise InputError(f"group size {size} of {format.name} does not divide {cols} columns; these do: {fitting}")
    groups = weight.detach().reshape(-1, size)
    parts = [_encode_groups(part.float(), format) for part in groups.split(ceil(CHUNK_WEIGHTS / size))]
    codes, scales, offsets = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    if not (scales if offsets is None else scales.float() + offsets).isfinite().all():
        _refuse_unbounded(weight, format)
    encoded = Encoded(format, codes.view(weight.shape), scales, offsets)
    if format.nested is None:
        return encoded
    nested, mean = encode_scales(scales, format.nested)
    scales = decode(nested).flatten()[: len(scales)] + mean  # what their codes stand for; the weights' codes stay
    return replace(encoded, scales=scales, nested=nested, scale_mean=mean)


def decode(encoded: Encoded, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows cols"]:
    """The weights that the codes stand for, computed in float32 and rounded once to `dtype`."""
    format, codes = encoded.format, encoded.codes.reshape(len(encoded.scales), -1)
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    columns = [c for c in (weight, codes, encoded.scales, encoded.offsets) if c is not None]
    parts = zip(*(column.split(ceil(CHUNK_WEIGHTS / codes.shape[1])) for column in columns), strict=True)
    for target, part, scales, *offsets in parts:
        values = torch.tensor(format.levels, device=codes.device)[part.int()] if format.levels else part.float()
        if format.offset == "zero_point":
            values -= offsets[0][:, None]
        values *= scales[:, None]
        if format.offset == "minimum":
            values += offsets[0][:, None]
        target.copy_(values)
    return weight.view(encoded.codes.shape)


def round_to_nearest(weight: Float[Tensor, "rows cols"], format: NumberFormat) -> Float[Tensor, "rows cols"]:
    """The weight after a round trip through `format`, in its own dtype; raises what `encode` raises."""
    return decode(encode(weight, format), weight.dtype)


def nearest_codes(groups: Groups, format: NumberFormat, *, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Codes of weights under given scales and offsets, one a group, clipped to the range; int8 if signed, or uint8."""
    # The reciprocal, not the quotient: the libraries do so too, and the last bit decides ties. It must not overflow.
    inverse = 1 / torch.where(scales.abs() < 1e-38, 1e-38, scales)[:, None]
    if format.levels:
        scaled = (groups * inverse).clamp_(-1, 1)
        if half := format.grid_steps / 2:
            scaled = ((scaled + 1) * half + 0.5).floor_() / half - 1
        levels, order = torch.tensor(format.levels, device=groups.device).sort(stable=True)
        return order.to(torch.uint8)[torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True)]
    if format.offset == "minimum":
        groups = groups - offsets[:, None]
    codes = format.rounding(groups * inverse, format.low)
    if format.offset == "zero_point":
        codes += offsets[:, None]
    return codes.clamp_(format.low, format.high).to(torch.int8 if format.low < 0 else torch.uint8)


def _encode_groups(groups: Tensor, format: NumberFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    scales, offsets = format.scale_rule(groups, format)
    codes = nearest_codes(groups, format, scales=scales, offsets=offsets)
    kept = torch.uint8 if format.offset == "zero_point" else format.scale_dtype
    return codes, scales.to(format.scale_dtype), None if offsets is None else offsets.to(kept)


def encode_scales(scales: Float32[Tensor, "group"], format: NumberFormat) -> tuple[Encoded, Float32[Tensor, ""]]:
    """Scales less their mean in the `nested` format of another, in rows filled up with zeros; and the mean."""
    mean, width = scales.mean(), format.group_size
    return encode(pad(scales - mean, (0, -len(scales) % width)).view(-1, width), format), mean


def _refuse_unbounded(weight: Tensor, format: NumberFormat) -> None:
    bad = (~weight.isfinite()).nonzero()
    if not len(bad):
        raise InputError(f"{weight.abs().max():.4g} is too large: scales of {format.name} are {format.scale_dtype}")
    row, col = bad[0].tolist()
    raise InputError(f"{len(bad)} of {weight.numel()} weights are NaN or infinite, first at row {row}, column {col}")


def absmax(groups: Groups, format: NumberFormat) -> tuple[Tensor, None]:
    """The largest magnitude becomes level 1, or half the span of the integers."""
    scales = groups.abs().amax(1) / (1.0 if format.levels else (format.high - format.low) / 2)
    return _rounded_up(scales, format.scale_dtype), None


def zero_point(groups: Groups, format: NumberFormat) -> tuple[Tensor, Tensor]:
    """From the least to the greatest, both taken to include 0, which gets a code of its own."""
    least, greatest = groups.amin(1).clamp_(max=0), groups.amax(1).clamp_(min=0)
    scales = _rounded_up((greatest - least) / (format.high - format.low), format.scale_dtype)
    return scales, torch.where(scales > 0, -least / scales, 0).round_().clamp_(format.low, format.high)


def _rounded_up(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest values of a 16-bit `dtype` no less than the scales (>= 0): the ends of the range are not clipped."""
    if dtype == torch.float32:
        return scales
    stored = scales.to(dtype)
    return (stored.view(torch.int16) + (stored.float() < scales)).view(dtype).float()  # bits are ordered as values


def pack_nibbles(codes: UInt8[Tensor, "rows cols"]) -> UInt8[Tensor, "bytes"]:
    """Two 4-bit codes a byte, the first in the high half as in bitsandbytes; raises ValueError."""
    if codes.numel() % 2 or bool((codes > 15).any()):
        raise InputError(f"nibbles need an even number of codes up to 15, got {codes.numel()} up to {codes.max()}")
    return codes.reshape(-1, 2)[:, 0] << 4 | codes.reshape(-1, 2)[:, 1]


def unpack_nibbles(packed: UInt8[Tensor, "bytes"], rows: int, cols: int) -> UInt8[Tensor, "rows cols"]:
    """The codes that `pack_nibbles` packed."""
    return torch.stack((packed >> 4, packed & 15), 1).view(rows, cols)


def _dynamic_levels() -> tuple[float, ...]:
    """Seven decades of both signs, each with twice the fractions of the one below, and 0 and 1."""
    edges = [torch.linspace(0.1, 1, 2**decade + 1) for decade in range(7)]
    sizes = torch.cat([10.0 ** (decade - 6) * ((e[:-1] + e[1:]) / 2) for decade, e in enumerate(edges)]).tolist()
    return tuple(sorted([0.0, 1.0, *sizes, *(-size for size in sizes)]))


# The CPU build of bitsandbytes looks its codes up in a table of 65,536 points: one more than the steps.
DYNAMIC_8BIT = NumberFormat("dynamic8", 8, 256, 32, absmax, levels=_dynamic_levels(), grid_steps=65535)


def four_bit(kind: str, group_size: int = 64, *, double_quantization: bool = False) -> NumberFormat:
    """The row of "nf4" or "fp4": a scale a group, in float32 or in 8 bits and 32 more for each 256 groups."""
    if kind not in LEVELS:
        raise InputError(f"4-bit levels are those of {', '.join(LEVELS)}, got {kind!r}")
    name = kind + (f"-g{group_size}" if group_size != 64 else "") + ("-dq" if double_quantization else "")
    nested, bits = (DYNAMIC_8BIT, DYNAMIC_8BIT.bits_per_weight) if double_quantization else (None, 32)
    return NumberFormat(name, 4, group_size, bits, absmax, levels=LEVELS[kind], nested=nested)


def integer(bits: int, group_size: int | None = None, *, symmetric: bool = True, full: bool = False) -> NumberFormat:
    """The row of integers of 2 to 8 bits: a float16 scale a group or, without group size, a float32 scale a row.

    Symmetric codes run from -high to high; in `full` range from one lower: finer steps, one end half a step off.
    """
    if not 2 <= bits <= 8 or (group_size or 2) < 2:
        raise InputError(f"integers have 2 to 8 bits and groups 2 or more weights, got {bits} and {group_size}")
    name = f"int{bits}" + (f"-g{group_size}" if group_size else "")
    dtype, size = (torch.float16, 16) if group_size else (torch.float32, 32)
    if symmetric:
        high, name = 2 ** (bits - 1) - 1, name + ("-full" if full else "")
        return NumberFormat(name, bits, group_size, size, absmax, -high - full, high, scale_dtype=dtype)
    return NumberFormat(
        f"{name}-asym",
        bits,
        group_size,
        size + bits,
        zero_point,
        0,
        2**bits - 1,
        scale_dtype=dtype,
        offset="zero_point",
    )


_ROWS = [four_bit(k, g, double_quantization=d) for k in LEVELS for g in (64, 32, 128) for d in (False, True)]

_ROWS += [integer(b, g, symmetric=s) for b in range(2, 9) for g in (None, 32, 64, 128) for s in (True, False)]

FORMATS: dict[str, NumberFormat] = {row.name: row for row in _ROWS}
