"""GGUF's block types as packed weights: the codes of a file's bytes, their scales as the file has them.

The inverse of `avalab.kernels.block_types.join_fields`. A K type's scales stay small integers times the super-block's
float16, so that memory holds hardly more than the file: 4 bits more a group of 32 in Q4_K, whose multipliers have 6.
Lattice types (IQ2_S, IQ3_S) have no codes of a single weight and are not taken.
"""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from avalab.kernels.block_types import FORMATS, LAYOUTS, Field
from avalab.kernels.formats import NumberFormat
from avalab.kernels.packed.lattices import LATTICES
from avalab.kernels.packed.weight import Factors, PackedWeight, by_groups, fits, pack


def takes(name: str, cols: int) -> bool:
    """Whether a weight of this block type and so many columns can be packed."""
    return name in FORMATS and name not in LATTICES and fits(cols, FORMATS[name].group_size)


def from_block_bytes(data: UInt8[Tensor, "rows bytes"], name: str) -> PackedWeight:
    """The weight of a file's rows in the block type `name`."""
    format, fields, at = FORMATS[name], {}, 0
    blocks = data.reshape(-1, sum(field.size for field in LAYOUTS[name]))
    for field in LAYOUTS[name]:
        fields[field.name], at = (blocks[:, at : at + field.size].contiguous(), field), at + field.size
    rows, low = len(data), -128 if format.bits == 8 else format.low  # a whole byte is a signed number
    codes = _codes(fields).view(torch.int8) if format.bits == 8 else _codes(fields).to(torch.int8) + low
    scales, minimums = _factors(fields, format, rows)
    levels = torch.tensor(format.levels) if format.levels else None
    codes = codes.reshape(rows, -1)
    kept = {"minimums": minimums, "low": low, "levels": levels}
    return pack(codes, format.bits, scales, group_size=format.group_size, **kept)


def _codes(fields: dict[str, tuple[Tensor, Field]]) -> UInt8[Tensor, "block weight"]:
    low, field = fields["low"]
    codes = _spread(low, field)
    if "high" in fields:
        codes = codes | _spread(*fields["high"]) << field.bits
    return codes


def _spread(data: UInt8[Tensor, "block bytes"], field: Field) -> UInt8[Tensor, "block count"]:
    """The codes of a field: runs of `width` bytes, the first codes in the lowest bits."""
    shifts = torch.arange(0, 8, field.bits, dtype=torch.uint8)[:, None]
    runs = data.view(len(data), -1, 1, field.width) >> shifts
    return (runs & ((1 << field.bits) - 1)).flatten(1)


def _factors(fields: dict, format: NumberFormat, rows: int) -> tuple[Factors, Factors | None]:
    """Scales and what is added, of groups."""
    units = fields["scale"][0].view(torch.float16).reshape(rows, -1)
    least = fields["minimum"][0].view(torch.float16).reshape(rows, -1) if "minimum" in fields else None
    if "multipliers" not in fields:
        return Factors(by_groups(units)), None if least is None else Factors(by_groups(least))
    steps, lows = _multipliers(format.name, fields["multipliers"][0])
    scales = Factors(by_groups(units), by_groups(steps.reshape(rows, -1)))
    if least is None:
        return scales, None
    return scales, Factors(by_groups(-least), by_groups(lows.reshape(rows, -1)))


def _multipliers(name: str, data: UInt8[Tensor, "block bytes"]) -> tuple[Tensor, Tensor | None]:
    """What `block_types.joined_multipliers` joined: integers of the scales, and of the minimums."""
    if name == "q6_k":
        return data.view(torch.int8), None
    if name == "q3_k":
        low, high = _spread(data[:, :8], Field("", 8, 4, 8)), _spread(data[:, 8:], Field("", 4, 2, 4))
        return (low | high << 4).to(torch.int8) - 32, None
    if name == "iq4_xs":
        low, high = _spread(data[:, 2:], Field("", 4, 4, 1)), _spread(data[:, :2], Field("", 2, 2, 1))
        return (low | high << 4).to(torch.int8) - 32, None
    if name == "q2_k":
        return data & 15, data >> 4
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), 1)
    return scales, torch.cat((second & 63, third >> 4 | second >> 6 << 4), 1)
