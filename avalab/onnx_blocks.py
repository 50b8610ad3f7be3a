"""Whole steps and scales in the blocks of ONNX Runtime's MatMulNBits and GatherBlockQuantized, without rounding again.

A stored weight is a whole number of steps times the scale of its group. MatMulNBits keeps unsigned codes of 2, 4 or 8
bits, a scale a block and, where steps do not lie around zero, a zero point a block; `blocks` takes the smallest that
holds the steps as they are:

    steps from -2^(b-1) to 2^(b-1) - 1            b bits, no zero points
    at most 2^b - 1 steps between any two         b bits and zero points of b bits

Hence grids of 3 bits take 4 and those of 5, 6 and 7 take 8, whose signed range holds them, so that their zero points
are not stored. A block has 16, 32, 64, 128 or 256 columns. Larger groups are several blocks of one scale, stored once
(see `onnx_graph`), and a group of a whole row may end in a padded block; any other group has to be a multiple of 16.
Two bits are used in blocks of 32, 64 and 128 only: with others this runtime decodes the weight at every call.

Source: ONNX Runtime 1.31, contrib operators, and trying them. What it does not do: write graphs, choose grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from avalab.numerics import Grid, Rounded

BITS = (2, 4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
FAST_TWO_BIT = (32, 64, 128)


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
        raise ValueError(
            f"ONNX Runtime has no blocks for groups of {group_size}, only for whole rows and multiples of {known[0]}"
        )
    return known[0]


def container(bits: int, columns: int, group_size: int) -> int:
    """Bits of the codes that hold a grid of `bits` bits. Raises ValueError for groups without blocks."""
    block_size(columns, group_size)
    two = bits <= 2 and any(group_size % size == 0 for size in FAST_TWO_BIT)
    return 2 if two else next(held for held in BITS[1:] if held >= bits)


def stored_bytes(rows: int, columns: int, grid: Grid) -> int:
    """Bytes of codes, scales (two each) and zero points of a weight on a grid, at most."""
    bits = container(grid.bits, columns, grid.group_size)
    size = block_size(columns, grid.group_size, bits=bits)
    count = ceil(columns / size)
    zeros = ceil(count * bits / 8) if bits == grid.bits and not grid.symmetric else 0
    return rows * (count * size * bits // 8 + 2 * (columns // grid.group_size) + zeros)


def blocks(weight: Steps) -> Blocks:
    """The smallest blocks that hold the steps exactly. Raises ValueError for steps or groups that none hold."""
    rows, columns = weight.steps.shape
    group_size = columns // weight.scales.shape[1]
    groups = weight.steps.view(rows, -1, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    spread, least, most = int((high - low).max()), int(low.min()), int(high.max())
    for bits in (b for b in BITS if b >= container(1, columns, group_size)):
        centred = -least <= 2 ** (bits - 1) and most < 2 ** (bits - 1)
        if centred or spread < 2**bits:
            zeros = torch.full_like(low, 2 ** (bits - 1)) if centred else -low
            size = block_size(columns, group_size, bits=bits)
            codes = (groups + zeros[..., None]).reshape(rows, columns)
            return Blocks(bits, size, columns, *_packed(codes, weight.scales, zeros, bits, size, not centred))
    raise ValueError(f"steps from {least} to {most} do not fit into 8 bits")


def _packed(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, size: int, stored: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, columns = codes.shape
    count = ceil(columns / size)
    padded = torch.nn.functional.pad(codes, (0, count * size - columns))
    kept = _bytes(zeros.repeat_interleave(count // zeros.shape[1], dim=1), bits) if stored else None
    return _bytes(padded, bits).view(rows, count, -1), scales, kept


def _bytes(codes: Tensor, bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Codes of a row one after the other, the first one in the lowest bits."""
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).to(torch.uint8)
    parts = padded.unflatten(1, (-1, each)).unbind(-1)
    found = parts[0]
    for at, part in enumerate(parts[1:], start=1):
        found = found | (part << (bits * at))
    return found.contiguous()
