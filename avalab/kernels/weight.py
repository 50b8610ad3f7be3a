"""A 4-bit weight as tensors: packed codes, 16 levels, and what a group of weights shares.

A weight is `(level[code] - zero_point) * scale + minimum`; zero point and minimum are mostly absent. That covers NF4
and FP4 (levels in [-1, 1]), symmetric int4 (levels -8..7) and asymmetric int4 (levels 0..15 with a zero point or
minimum). Two codes share a byte, the first in the high half, rows one after another: bitsandbytes' layout, so its
artefacts load as they are, the scales' own quantization (double quantization) included. Arithmetic is float32, rounded
once at the end.

`decode` is the definition; `decode_by_pairs` gives its bits in few passes over memory: two codes of a byte are looked
up together in a table of 256 pairs of levels, levels that are consecutive integers are unpacked by torch's operator for
embedding tables of 4 bits, the rest acts in place on float32, and one copy rounds to the wanted dtype (an operator that
reads one dtype and writes another costs three times as much).

Source of the layouts: bitsandbytes' 4-bit state dictionary; `avalab.kernels.formats` for the formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from avalab.kernels.formats import Encoded, pack_nibbles
from avalab.lab.errors import InputError

NESTED_GROUP = 256  # scales that share a scale, under double quantization

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class NestedScales:
    """Scales quantized again: `levels[codes] * absmax + offset`, one absmax for 256 of them, counted along the rows."""

    codes: UInt8[Tensor, "group"]
    levels: Float32[Tensor, "256"]
    absmax: Float32[Tensor, "nested"]
    offset: Float32[Tensor, ""]


@dataclass(frozen=True)
class Weight4:
    """A matrix of 4-bit codes with what decodes them. Make it with `from_encoded`, `from_bitsandbytes` or `checked`."""

    codes: UInt8[Tensor, "rows half_cols"]
    levels: Float32[Tensor, "16"]
    scales: Float[Tensor, "rows groups"] | NestedScales  # in the dtype they are stored in
    zero_points: UInt8[Tensor, "rows groups"] | Float[Tensor, "rows groups"] | None = None
    minimums: Float[Tensor, "rows groups"] | None = None
    small_batch: SmallBatch | None = None  # a second copy for few rows of activations: `product.prepare_small_batches`

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 2

    @property
    def group_size(self) -> int:
        return self.codes.numel() * 2 // self.group_count

    @property
    def group_count(self) -> int:
        return self.scales.codes.numel() if isinstance(self.scales, NestedScales) else self.scales.numel()

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def bytes(self) -> int:
        """Bytes of all tensors held, the second copy of `prepare` included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All tensors held, the second copy of `prepare` included."""
        found = []
        for value in vars(self).values():
            fields = vars(value).values() if isinstance(value, NestedScales | SmallBatch) else (value,)
            found += [field for field in fields if isinstance(field, Tensor)]
        return found

    def to(self, device: str | torch.device) -> Weight4:
        """The same weight on another device; the second copy, which belongs to the machine, is dropped."""

        def moved(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device)

        nested = isinstance(self.scales, NestedScales)
        scales = NestedScales(*map(moved, vars(self.scales).values())) if nested else moved(self.scales)
        return Weight4(moved(self.codes), moved(self.levels), scales, moved(self.zero_points), moved(self.minimums))


@dataclass(frozen=True)
class SmallBatch:
    """Codes and scales in the order that a library's kernel for few rows of activations reads them."""

    kernel: str  # "bitsandbytes" or "int4pack"
    codes: Tensor
    scales: Tensor


def from_encoded(encoded: Encoded, *, zero_scales: bool = False) -> Weight4:
    """The packed form of what `avalab.kernels.formats.encode` made in a 4-bit format.

    Raises ValueError for a format that is not 4-bit, or scales that `checked` refuses.
    """
    form, (rows, cols) = encoded.format, encoded.codes.shape
    if form.bits != 4:
        raise InputError(f"{form.name} has {form.bits} bits a code; this product takes 4")
    check_groups(cols, cols if form.group_size is None else form.group_size)
    unsigned = torch.arange(16.0)  # an integer code by its low four bits: 0..15, or in two's complement
    integers = unsigned if form.low >= 0 else torch.where(unsigned < 8, unsigned, unsigned - 16)
    levels = torch.tensor(form.levels) if form.levels else integers
    offsets = None if encoded.offsets is None else encoded.offsets.view(rows, -1)
    if encoded.nested:
        scales = nested_scales(encoded.nested, encoded.scale_mean, len(encoded.scales))
    else:
        scales = encoded.scales.to(form.scale_dtype).view(rows, -1)
    weight = Weight4(
        pack_nibbles((encoded.codes & 15).to(torch.uint8)).view(rows, cols // 2),
        levels.to(encoded.codes.device),
        scales,
        zero_points=offsets if form.offset == "zero_point" else None,
        minimums=offsets if form.offset == "minimum" else None,
    )
    return checked_scales(weight, zero_scales=zero_scales)


def nested_scales(nested: Encoded, mean: Float32[Tensor, ""], count: int) -> NestedScales:
    """The first `count` scales of what `formats.encode_scales` made; they were filled up to whole groups."""
    codes = nested.codes.flatten()[:count].clone()
    levels = torch.tensor(nested.format.levels, device=codes.device)
    return NestedScales(codes, levels, nested.scales.float(), mean)


def from_bitsandbytes(state: Mapping[str, Tensor], prefix: str = "weight") -> Weight4:
    """The weight that bitsandbytes saved under `prefix` of a state dictionary, its bytes unchanged.

    Raises ValueError for a key that is missing, and for what `check_groups` and `checked` refuse.
    """
    facts_key = next((key for key in state if key.startswith(f"{prefix}.quant_state.bitsandbytes__")), None)
    if facts_key is None:
        raise InputError(f"no {prefix}.quant_state.bitsandbytes__* among {sorted(state)}: not a 4-bit weight")
    facts = json.loads(bytes(state[facts_key].tolist()))
    rows, cols = facts["shape"]
    check_groups(cols, facts["blocksize"])
    scales = state[f"{prefix}.absmax"]
    if f"{prefix}.nested_absmax" in state:
        offset = torch.tensor(facts["nested_offset"], dtype=torch.float32, device=scales.device)
        levels, absmax = (state[f"{prefix}.nested_{name}"].float() for name in ("quant_map", "absmax"))
        scales = NestedScales(scales.flatten(), levels, absmax, offset)
    else:
        scales = scales.float().view(rows, -1)
    codes = state[prefix].view(torch.uint8).reshape(rows, cols // 2)
    return checked_scales(Weight4(codes, state[f"{prefix}.quant_map"].float(), scales))


def check_groups(cols: int, group_size: int) -> None:
    """Raise ValueError, naming both, when groups do not divide the columns, or a byte would hold codes of two rows."""
    if group_size < 1 or cols % group_size:
        raise InputError(f"groups of {group_size} do not divide {cols} columns")
    if cols % 2:
        raise InputError(f"{cols} columns: two codes share a byte, so the number of columns must be even")


def checked_scales(weight: Weight4, *, zero_scales: bool = False) -> Weight4:
    """The weight itself, when every scale is finite and, unless `zero_scales` allows pruned groups, not zero.

    Raises ValueError naming the first bad group by row and number.
    """
    scales = group_scales(weight)
    bad = ~scales.isfinite() if zero_scales else ~scales.isfinite() | (scales == 0)
    if bad.any():
        row, group = (int(i) for i in bad.nonzero()[0])
        raise InputError(
            f"{int(bad.sum())} of {scales.numel()} scales are zero or not finite; the first, "
            f"{scales[row, group].item()}, is in row {row}, group {group} (columns {group * weight.group_size} on)"
        )
    return weight


def group_scales(weight: Weight4, rows: slice = slice(None)) -> Float32[Tensor, "rows groups"]:
    """The scales of some rows, decoded where they are quantized themselves."""
    if not isinstance(weight.scales, NestedScales):
        return weight.scales[rows].float()
    nested, per_row = weight.scales, weight.group_count // weight.shape[0]
    first, last, _ = rows.indices(weight.shape[0])
    codes = nested.codes[first * per_row : last * per_row]
    group = torch.arange(first * per_row, last * per_row, device=codes.device) // NESTED_GROUP
    return (nested.levels[codes.int()] * nested.absmax[group] + nested.offset).view(-1, per_row)


def take(weight: Weight4, rows: slice, cols: slice = slice(None)) -> Weight4:
    """Some rows, and some whole groups of columns, of a weight; its scales decoded.

    Raises ValueError when the columns do not begin and end with a group.
    """
    first, last, _ = cols.indices(weight.shape[1])
    size = weight.group_size
    if first % size or last % size:
        raise InputError(f"columns {first} to {last} do not begin and end with a group of {size}")
    groups = slice(first // size, last // size)
    zero_points, minimums = (None if t is None else t[rows, groups] for t in (weight.zero_points, weight.minimums))
    codes = weight.codes[rows, first // 2 : last // 2]
    return Weight4(codes, weight.levels, group_scales(weight, rows)[:, groups], zero_points, minimums)


def decode(weight: Weight4, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows cols"]:
    """The weights in `dtype`: computed in float32, rounded once. The definition that every other form is held to."""
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), -1)
    values = weight.levels[codes.int()].view(weight.shape[0], -1, weight.group_size)
    if weight.zero_points is not None:
        values = values - weight.zero_points[..., None].float()
    values = values * group_scales(weight)[..., None]
    if weight.minimums is not None:
        values = values + weight.minimums[..., None].float()
    return values.view(weight.shape).to(dtype)


def decode_by_pairs(weight: Weight4, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
    """`decode`, bit for bit."""
    values = _by_unpacking(weight)
    if values is None:
        byte = torch.arange(256, device=weight.device)
        # A pair of float32 travels as one float64, which `index_select` copies at memory speed without looking inside.
        pairs = torch.stack((weight.levels[byte >> 4], weight.levels[byte & 15]), -1).view(torch.float64).view(-1)
        found = pairs.index_select(0, weight.codes.reshape(-1).int())
        values = found.view(torch.float32).view(-1, weight.group_size)
        if weight.zero_points is not None:
            values.sub_(weight.zero_points.reshape(-1, 1).float())
    values.mul_(group_scales(weight).reshape(-1, 1))
    if weight.minimums is not None:
        values.add_(weight.minimums.reshape(-1, 1).float())
    return values.view(weight.shape).to(dtype)


def _by_unpacking(weight: Weight4) -> Float32[Tensor, "group size"] | None:
    """Integer levels less their zero points, by torch's operator for 4-bit embedding tables; None where it cannot.

    The operator reads a row's codes, the low half of a byte first, then its scale and offset in float16: a group is
    taken for a row, its scale is 1 and its offset, a whole number, exact.
    """
    ascending = torch.arange(16.0, device=weight.device) + weight.levels[0].round()
    if weight.device.type != "cpu" or not torch.equal(weight.levels, ascending):
        return None
    codes, lowest = weight.codes.reshape(-1, weight.group_size // 2), weight.levels[0]
    offsets = lowest.expand(len(codes)) if weight.zero_points is None else lowest - weight.zero_points.reshape(-1)
    facts = torch.stack((torch.ones_like(offsets), offsets), 1).half()
    if not torch.equal(facts[:, 1].float(), offsets.float()):
        return None
    rows = torch.empty(len(codes), codes.shape[1] + 4, dtype=torch.uint8)
    torch.bitwise_or(codes << 4, codes >> 4, out=rows[:, :-4])
    rows[:, -4:] = facts.view(torch.uint8)
    return torch.ops.quantized.embedding_bag_4bit_unpack(rows)
