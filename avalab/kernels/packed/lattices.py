"""GGUF's IQ2_S and IQ3_S: several weights at a time are a point of a codebook, each with a sign of its own.

A super-block of 256 weights holds a float16 `unit`, a 4-bit multiplier m a group, a sign a weight, and for each four
(IQ3_S) or eight weights (IQ2_S) the number of a point; a weight is

    sign * point[k] * unit * (first + step m) * share        IQ3_S: 1 + 2 m, groups of 32; IQ2_S: (0.5 + m) / 4, of 16

Codebooks are those of the gguf package, which decodes the bytes made here; `compress.block_rounding` chooses points and
scales. `nearest_points` finds the point nearest to magnitudes that were rounded to the codebook's own levels first, in
a table: the choice of ggml's quantiser.

Source: ggml's block structures (ggml-common.h) and gguf's decoder; the lattices follow QuIP#, Tseng et al. 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from avalab.kernels.formats import NumberFormat

BLOCK, MOST = 256, 15  # weights of a super-block; the largest multiplier


@dataclass(frozen=True)
class Lattice:
    """How a type's points and multipliers are meant."""

    width: int  # weights of a point
    group_size: int
    first: float
    step: float
    share: float


LATTICES = {"iq3_s": Lattice(4, 32, 1.0, 2.0, 1.0), "iq2_s": Lattice(8, 16, 0.5, 1.0, 0.25)}


@dataclass(frozen=True)
class LatticeRounded:
    """A weight in a lattice type."""

    format: NumberFormat
    points: Int[Tensor, "rows chunks"]
    negative: Bool[Tensor, "rows cols"]
    multipliers: UInt8[Tensor, "rows groups"]
    units: Float[Tensor, "rows blocks"]  # float16

    def decode(self, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "rows cols"]:
        """The weight as readers decode it, computed in float32."""
        found = codebook(self.format.name)[self.points.long()].flatten(1)
        scales = scales_of(self.format, self.units, self.multipliers)
        signed = found * torch.where(self.negative, -1.0, 1.0)
        return (signed.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1).to(dtype)

    def packed(self) -> UInt8[Tensor, "rows bytes"]:
        """The bytes of the file, row after row."""
        lattice, rows = LATTICES[self.format.name], len(self.points)
        points = self.points.reshape(-1, BLOCK // lattice.width).int()
        low, high = (points & 255).to(torch.uint8), (points >> 8).to(torch.uint8)
        signs = _joined(self.negative.reshape(-1, BLOCK).to(torch.uint8), 1)
        scales = _joined(self.multipliers.reshape(-1, BLOCK // lattice.group_size), 4)
        units = self.units.reshape(-1, 1).half().view(torch.uint8)
        if self.format.name == "iq3_s":
            return torch.cat((units, low, _joined(high, 1), signs, scales), 1).view(rows, -1)
        return torch.cat((units, low, signs, _joined(high, 2), scales), 1).view(rows, -1)

    def split(self, rows: list[int]) -> list[LatticeRounded]:
        """The layers that were rounded together, each by its number of rows."""
        parts = (self.points, self.negative, self.multipliers, self.units)
        return [LatticeRounded(self.format, *part) for part in zip(*(t.split(rows) for t in parts), strict=True)]


def _joined(codes: UInt8[Tensor, "block count"], bits: int) -> UInt8[Tensor, "block bytes"]:
    """Codes of so many bits in bytes, the first in the lowest bits."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(1, (-1, len(shifts))) << shifts).sum(-1, dtype=torch.uint8)


def scales_of(
    format: NumberFormat, units: Float[Tensor, "rows blocks"], multipliers: UInt8[Tensor, "rows groups"]
) -> Float[Tensor, "rows groups"]:
    """Scales of the groups, in float32."""
    lattice = LATTICES[format.name]
    each = units.float().repeat_interleave(multipliers.shape[1] // units.shape[1], 1)
    return each * (lattice.first + lattice.step * multipliers.float()) * lattice.share


def stored_scales(
    scales: Float[Tensor, "rows groups"], format: NumberFormat
) -> tuple[Float[Tensor, "rows blocks"], UInt8[Tensor, "rows groups"]]:
    """Units and multipliers with scales near those wanted; the largest of a super-block gets the last multiplier."""
    lattice = LATTICES[format.name]
    each = scales.unflatten(1, (-1, BLOCK // lattice.group_size))
    units = (each.amax(-1) / ((lattice.first + MOST * lattice.step) * lattice.share)).clamp(min=6e-8).half()
    multipliers = (each / (units.float()[..., None] * lattice.share) - lattice.first) / lattice.step
    return units, multipliers.round().clamp(0, MOST).to(torch.uint8).flatten(1)


@cache
def codebook(name: str) -> Float[Tensor, "point width"]:
    """The points of a type, from the gguf package."""
    from gguf import quants

    table = getattr(quants, name.upper())
    table.init_grid()
    return torch.from_numpy(table.grid.copy()).view(table.grid_shape).float()


@cache
def _nearest_table(name: str) -> tuple[Tensor, Tensor]:
    """Levels of a coordinate, and the nearest point for each combination of levels, the first coordinate slowest."""
    points = codebook(name)
    levels = points.unique()
    corners = torch.cartesian_prod(*[levels] * points.shape[1])
    parts = [torch.cdist(part, points).argmin(1) for part in corners.split(4096)]
    return levels, torch.cat(parts)


def nearest_points(magnitudes: Float[Tensor, "*any width"], name: str) -> Int[Tensor, "*any"]:
    """The numbers of points near these magnitudes, which are in units of the codebook."""
    levels, table = _nearest_table(name)
    places = torch.bucketize(magnitudes.contiguous(), (levels[:-1] + levels[1:]) / 2)
    powers = len(levels) ** torch.arange(magnitudes.shape[-1] - 1, -1, -1)
    return table[(places * powers).sum(-1)]
