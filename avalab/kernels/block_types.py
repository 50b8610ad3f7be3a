"""Block layouts: the bytes of GGUF's block types, and weights on a grid as ONNX Runtime's operators store them.

GGUF. A row of a weight is cut into blocks of 32 weights (Q4_0 to Q8_0) or super-blocks of 256 (the K types, IQ4_XS).
`LAYOUTS` lists the fields of a block in the order of their bytes; low and high bits of the codes have fields of their
own. Each run of `width` bytes of such a field holds the first `width` codes in its bytes' lowest bits, the next in the
bits above. Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 are encoded by `formats.encode` with the rules below, then packed: byte for
byte what gguf-py writes, but for the sign of a minimum that is zero. In the K types and IQ4_XS a group's scale is a
small integer times the super-block's float16; for them and IQ4_NL, whose steps are unequal `compress.block_rounding`
chooses codes and scales, and `join` makes the bytes. The gguf package decodes them all.

ONNX Runtime. A weight is a whole number of steps times the scale of its group. MatMulNBits keeps unsigned codes of 2, 4
or 8 bits, a scale a block and, where steps do not lie around zero, a zero point a block; `blocks` takes the smallest
that holds the steps as they are:

    steps from -2^(b-1) to 2^(b-1) - 1            b bits, no zero points
    at most 2^b - 1 steps between any two         b bits and zero points of b bits

Hence grids of 3 bits take 4 and those of 5, 6 and 7 take 8, whose signed range holds them, so that their zero points
are not stored. A block has 16, 32, 64, 128 or 256 columns. Larger groups are several blocks of one scale, stored once,
and a group of a whole row may end in a padded block; any other group has to be a multiple of 16. Two bits are used in
blocks of 32, 64 and 128 only: with others this runtime decodes the weight at every call.

Sources: ggml's block structures (ggml-common.h) and the GGUF documentation; ONNX Runtime 1.31, contrib operators, and
trying them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor
from torch.nn.functional import pad

from avalab.kernels.formats import Encoded, Grid, Groups, NumberFormat, Rounded
from avalab.lab.errors import InputError


@dataclass(frozen=True)
class Field:
    """Some bytes of a block. Those of codes hold `bits` of each code, in runs of `width` bytes."""

    name: str  # scale, minimum: float16; multipliers: integers that scale and minimum are multiplied by; low, high
    size: int  # bytes
    bits: int = 0
    width: int = 0


_SCALE, _MINIMUM = Field("scale", 2), Field("minimum", 2)

LAYOUTS: dict[str, tuple[Field, ...]] = {
    "q4_0": (_SCALE, Field("low", 16, 4, 16)),
    "q4_1": (_SCALE, _MINIMUM, Field("low", 16, 4, 16)),
    "q5_0": (_SCALE, Field("high", 4, 1, 1), Field("low", 16, 4, 16)),
    "q5_1": (_SCALE, _MINIMUM, Field("high", 4, 1, 1), Field("low", 16, 4, 16)),
    "q8_0": (_SCALE, Field("low", 32, 8, 32)),
    "iq4_nl": (_SCALE, Field("low", 16, 4, 16)),
    # Of the lattice types, whose bytes `lattices` makes, only the sizes count.
    "iq3_s": (_SCALE, Field("low", 64, 2, 64), Field("high", 8), Field("signs", 32), Field("multipliers", 4)),
    "iq2_s": (_SCALE, Field("low", 64, 2, 64), Field("high", 8), Field("multipliers", 8)),
    "iq4_xs": (_SCALE, Field("multipliers", 6), Field("low", 128, 4, 16)),
    "q2_k": (Field("multipliers", 16), Field("low", 64, 2, 32), _SCALE, _MINIMUM),
    "q3_k": (Field("high", 32, 1, 32), Field("low", 64, 2, 32), Field("multipliers", 12), _SCALE),
    "q4_k": (_SCALE, _MINIMUM, Field("multipliers", 12), Field("low", 128, 4, 32)),
    "q5_k": (_SCALE, _MINIMUM, Field("multipliers", 12), Field("high", 32, 1, 32), Field("low", 128, 4, 32)),
    "q6_k": (Field("low", 128, 4, 64), Field("high", 64, 2, 32), Field("multipliers", 16), _SCALE),
}


@dataclass(frozen=True)
class BlockRounded:
    """A weight in a block type: its codes (IQ4 types: levels), and scale and offset of each group as decoded."""

    format: NumberFormat
    codes: Int8[Tensor, "rows cols"]
    scales: Float[Tensor, "rows groups"]
    offsets: Float[Tensor, "rows groups"]
    fields: dict[str, Tensor]  # what the file holds instead: float16 numbers, multipliers; one row a block

    def decode(self, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "rows cols"]:
        """The weight as readers decode it, computed in float32."""
        codes = self.codes.unflatten(1, (self.scales.shape[1], -1)).float()
        return (codes * self.scales[..., None] + self.offsets[..., None]).flatten(1).to(dtype)

    def packed(self) -> UInt8[Tensor, "rows bytes"]:
        """The bytes of the file, row after row."""
        codes = self.codes
        if self.format.levels:
            codes = torch.bucketize(codes.float(), torch.tensor(self.format.levels)).to(torch.uint8)
        elif self.format.low == 0:
            codes = codes.to(torch.uint8)
        return join_fields(self.format, codes, self.fields)

    def split(self, rows: list[int]) -> list["BlockRounded"]:
        """The layers that were rounded together, each by its number of rows."""
        blocks = [count * len(self.fields["scale"]) // len(self.codes) for count in rows]
        whole = zip(*(tensor.split(rows) for tensor in (self.codes, self.scales, self.offsets)), strict=True)
        held = {name: tensor.split(blocks) for name, tensor in self.fields.items()}
        return [
            BlockRounded(self.format, *parts, {name: tensors[at] for name, tensors in held.items()})
            for at, parts in enumerate(whole)
        ]


def fits_blocks(format: NumberFormat, columns: int) -> bool:
    """Whether whole blocks fill a row."""
    return columns % block_weights(format) == 0


def gguf_stored_bytes(rows: int, columns: int, format: NumberFormat) -> int:
    """Bytes of a weight in the file."""
    return rows * columns // block_weights(format) * block_bytes(format)


def pack_blocks(encoded: Encoded) -> UInt8[Tensor, "rows bytes"]:
    """The bytes of a weight encoded in one of the simple types, row after row.

    Raises ValueError for a format that has no block type, or a K type.
    """
    if "multipliers" in (field.name for field in _layout(encoded.format)):
        raise InputError(f"{encoded.format.name} is only decoded here; packed are {', '.join(_SIMPLE)}")
    return join_fields(encoded.format, encoded.codes, {"scale": encoded.scales, "minimum": encoded.offsets})


def join_fields(
    format: NumberFormat, codes: UInt8[Tensor, "rows cols"] | Int8[Tensor, "rows cols"], fields: dict[str, Tensor]
) -> UInt8[Tensor, "rows bytes"]:
    """Codes, and the fields that are not codes (float16, or the bytes of `joined_multipliers`), one row a block."""
    layout, rows = _layout(format), len(codes)
    codes = codes.reshape(-1, block_weights(format))
    # A signed byte is stored as it is, shorter codes from their lowest value up.
    codes = codes.view(torch.uint8) if format.bits == 8 else (codes - format.low).to(torch.uint8)
    low_bits = next(field.bits for field in layout if field.name == "low")
    parts = {"low": codes & (2**low_bits - 1), "high": codes >> low_bits if low_bits < 8 else None}
    columns = [
        _narrow(parts[f.name], f) if f.bits else fields[f.name].contiguous().view(len(codes), -1).view(torch.uint8)
        for f in layout
    ]
    return torch.cat(columns, 1).view(rows, -1)


def block_weights(format: NumberFormat) -> int:
    """Weights of a block: 32, or 256 in a K type."""
    low = next(field for field in _layout(format) if field.name == "low")
    return low.size * 8 // low.bits


def block_bytes(format: NumberFormat) -> int:
    """Bytes of a block."""
    return sum(field.size for field in _layout(format))


def _layout(format: NumberFormat) -> tuple[Field, ...]:
    if format.name not in LAYOUTS:
        raise InputError(f"no GGUF block type is called {format.name!r}; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[format.name]


def _narrow(codes: Tensor, field: Field) -> UInt8[Tensor, "block size"]:
    """Codes of one byte each in a field's order: runs of `width` bytes, first codes in the lowest bits."""
    shifts = torch.arange(0, 8, field.bits, dtype=torch.uint8, device=codes.device)[:, None]
    return (codes.view(len(codes), -1, len(shifts), field.width) << shifts).sum(2, dtype=torch.uint8).flatten(1)


def joined_multipliers(
    format: NumberFormat, scales: Int[Tensor, "block groups"], minimums: Int[Tensor, "block groups"] | None
) -> UInt8[Tensor, "block bytes"]:
    """The bytes of a K type's multipliers; one row a super-block."""
    if format.name == "q6_k":
        return scales.to(torch.int8).view(torch.uint8)
    if format.name == "q3_k":
        codes = (scales + 32).to(torch.uint8)
        return torch.cat((_narrow(codes & 15, Field("", 8, 4, 8)), _narrow(codes >> 4, Field("", 4, 2, 4))), 1)
    if format.name == "iq4_xs":
        codes = (scales + 32).to(torch.uint8)
        # Two high bits of each group in order, four groups a byte; then four low bits, two groups a byte.
        high, low = ((codes >> 4).unflatten(1, (-1, 4)), [0, 2, 4, 6]), ((codes & 15).unflatten(1, (-1, 2)), [0, 4])
        parts = [part << torch.tensor(at, dtype=torch.uint8, device=codes.device) for part, at in (high, low)]
        return torch.cat([part.sum(-1, dtype=torch.uint8) for part in parts], 1)
    scales, minimums = scales.to(torch.uint8), minimums.to(torch.uint8)
    if format.name == "q2_k":
        return scales | minimums << 4
    first, second = (part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, minimums))
    return torch.cat((first, second, scales[:, 4:] & 15 | (minimums[:, 4:] & 15) << 4), 1)


def signed_extreme(groups: Groups, format: NumberFormat) -> tuple[Tensor, None]:
    """The value of largest magnitude, whatever its sign, becomes the lowest integer (Q4_0, Q5_0)."""
    return groups.gather(1, groups.abs().argmax(1, keepdim=True)).squeeze(1) / format.low, None


def least_to_greatest(groups: Groups, format: NumberFormat) -> tuple[Tensor, Tensor]:
    """The integers span the group, whether or not it includes 0 (Q4_1, Q5_1)."""
    least = groups.amin(1)
    return (groups.amax(1) - least) / format.high, least


def largest_magnitude(groups: Groups, format: NumberFormat) -> tuple[Tensor, None]:
    """The largest magnitude becomes the highest integer (Q8_0); unlike `formats.absmax`, not rounded before use."""
    return groups.abs().amax(1) / format.high, None


def half_up(values: Tensor, low: int) -> Tensor:
    """Ties towards +infinity, in the reference's order of additions: it counts codes from `low`."""
    return (values + (0.5 - low)).floor_() + low


def half_away(values: Tensor, low: int) -> Tensor:
    """Ties away from zero, as C's roundf."""
    whole = values.abs().floor()
    return (whole + (values.abs() - whole >= 0.5)).copysign(values)


def _simple(name: str, bits: int, rule: Callable, low: int, high: int, rounding: Callable = half_up) -> NumberFormat:
    offset, scale_bits = ("minimum", 32) if rule is least_to_greatest else ("", 16)
    half = torch.float16
    return NumberFormat(name, bits, 32, scale_bits, rule, low, high, scale_dtype=half, offset=offset, rounding=rounding)


def _super(name: str, bits: int, group_size: int, scale_bits: int, low: int = 0) -> NumberFormat:
    """`scale_bits`: a group's share of the super-block's bits that are not codes."""
    high, offset = low + 2**bits - 1, "" if low else "minimum"
    return NumberFormat(name, bits, group_size, scale_bits, None, low, high, offset=offset)


# ggml's table of unequal steps, by code; a float16 scale multiplies it.
_UNEQUAL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_ROWS = (
    _simple("q4_0", 4, signed_extreme, -8, 7),
    _simple("q4_1", 4, least_to_greatest, 0, 15),
    _simple("q5_0", 5, signed_extreme, -16, 15),
    _simple("q5_1", 5, least_to_greatest, 0, 31),
    _simple("q8_0", 8, largest_magnitude, -127, 127, half_away),
    NumberFormat("iq4_nl", 4, 32, 16, None, 0, 15, levels=tuple(map(float, _UNEQUAL))),
    NumberFormat("iq4_xs", 4, 32, 8, None, 0, 15, levels=tuple(map(float, _UNEQUAL))),
    NumberFormat("iq3_s", 3, 32, 14, None),
    NumberFormat("iq2_s", 2, 16, 9, None),
    _super("q2_k", 2, 16, 10),
    _super("q3_k", 3, 16, 7, -4),
    _super("q4_k", 4, 32, 16),
    _super("q5_k", 5, 32, 16),
    _super("q6_k", 6, 16, 9, -32),
)

FORMATS: dict[str, NumberFormat] = {row.name: row for row in _ROWS}

_SIMPLE = [row.name for row in _ROWS if row.scale_rule]

# --- ONNX Runtime ------------------------------------------------------------------------------------------------


BITS, BLOCK_SIZES = (2, 4, 8), (16, 32, 64, 128, 256)

FAST_TWO_BIT = (32, 64, 128)  # sizes of blocks


@dataclass(frozen=True)
class Steps:
    """A weight as whole steps and scales, one scale a row and group of columns."""

    steps: Int[Tensor, "rows cols"]
    scales: Float[Tensor, "rows groups"]


@dataclass(frozen=True)
class Blocks:
    """A weight as the operators read it; `repeats` blocks share a scale, and the last one may be padded."""

    bits: int
    block_size: int
    columns: int
    codes: UInt8[Tensor, "rows blocks bytes"]
    scales: Float[Tensor, "rows groups"]
    zeros: UInt8[Tensor, "rows zerobytes"] | None

    @property
    def repeats(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def bytes(self) -> int:
        kept = [self.codes, self.scales] + ([] if self.zeros is None else [self.zeros])
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def steps_of(rounded: Rounded) -> Steps:
    """Codes less zero points, and scales as they are."""
    zeros = rounded.zero_points.int().repeat_interleave(rounded.grid.group_size, dim=1)
    return Steps(rounded.codes.int() - zeros, rounded.scales)


def block_size(columns: int, group_size: int, *, bits: int = 4) -> int:
    """The largest block that a group is a multiple of; for whole rows else the smallest, which pads least.

    Raises ValueError for groups that blocks cannot be made of.
    """
    known = FAST_TWO_BIT if bits == 2 else BLOCK_SIZES
    found = [size for size in known if group_size % size == 0]
    if found:
        return found[-1]
    if group_size < columns or bits == 2:
        raise InputError(
            f"ONNX Runtime has no blocks for groups of {group_size}, only for whole rows and multiples of {known[0]}"
        )
    return known[0]


def container_bits(bits: int, columns: int, group_size: int) -> int:
    """Bits of the codes that hold a grid of `bits` bits. Raises ValueError for groups without blocks."""
    block_size(columns, group_size)
    two = bits <= 2 and any(group_size % size == 0 for size in FAST_TWO_BIT)
    return 2 if two else next(held for held in BITS[1:] if held >= bits)


def onnx_stored_bytes(rows: int, columns: int, grid: Grid) -> int:
    """Bytes of codes, scales (two each) and zero points of a weight on a grid, at most."""
    bits = container_bits(grid.bits, columns, grid.group_size)
    size = block_size(columns, grid.group_size, bits=bits)
    count = ceil(columns / size)
    zeros = ceil(count * bits / 8) if bits == grid.bits and not grid.symmetric else 0
    return rows * (count * size * bits // 8 + 2 * (columns // grid.group_size) + zeros)


def smallest_blocks(weight: Steps) -> Blocks:
    """The smallest blocks that hold the steps exactly. Raises ValueError for steps or groups that none hold."""
    rows, columns = weight.steps.shape
    group_size = columns // weight.scales.shape[1]
    groups = weight.steps.view(rows, -1, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    spread, least, most = int((high - low).max()), int(low.min()), int(high.max())
    for bits in (b for b in BITS if b >= container_bits(1, columns, group_size)):
        centred = -least <= 2 ** (bits - 1) and most < 2 ** (bits - 1)
        if centred or spread < 2**bits:
            zeros = torch.full_like(low, 2 ** (bits - 1)) if centred else -low
            size = block_size(columns, group_size, bits=bits)
            count = ceil(columns / size)
            codes = pad((groups + zeros[..., None]).reshape(rows, columns), (0, count * size - columns))
            stored = None if centred else _bytes(zeros.repeat_interleave(count // zeros.shape[1], dim=1), bits)
            return Blocks(bits, size, columns, _bytes(codes, bits).view(rows, count, -1), weight.scales, stored)
    raise InputError(f"steps from {least} to {most} do not fit into 8 bits")


def _bytes(codes: Tensor, bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Codes of a row one after the other, the first one in the lowest bits."""
    each = 8 // bits
    padded = pad(codes, (0, -codes.shape[1] % each)).to(torch.uint8)
    parts = padded.unflatten(1, (-1, each)).unbind(-1)
    found = parts[0]
    for at, part in enumerate(parts[1:], start=1):
        found = found | (part << (bits * at))
    return found.contiguous()
