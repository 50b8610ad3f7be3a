"""Error-compensated rounding directly onto GGUF's block types: their float16 scales and minimums, their own integers.

A weight is `code * scale + offset` in groups of 32 or 16. The steps are those of `rounding`, on other grids:

1. Per group, scales (of either sign) or ranges are tried; for the codes of each the best scale, and minimum where the
   type has one, follow from weighted least squares. Columns weigh what their error costs after compensation.
2. `stored` puts scales and minimums onto what the file holds: float16, or in the K types and IQ4_XS an integer times
   the super-block's float16. All that follows sees these values: nothing is rounded again on the way into the file.
3. Columns are rounded with compensation (`rounding.compensated`).
4. Repair, twice for up to 4 bits and once for 5: scales and minimums of all groups of a row by least squares under the
   whole moment, stored again, then each code moved to the best one given all others (`rounding.descended`).

IQ2_S and IQ3_S round several columns at once, to a point of a codebook, and a chunk's error is made up for as a whole;
scales are fitted as in 4, and the better of both rounds is kept.

Source: GPTQ, Frantar et al. 2023, arXiv 2210.17323; the search follows the idea of ggml's `make_qx_quants`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from avalab.compress import rounding
from avalab.compress.rounding import CHUNK_WEIGHTS, Problem
from avalab.kernels import block_types
from avalab.kernels.block_types import BlockRounded
from avalab.kernels.formats import NumberFormat
from avalab.kernels.packed.lattices import (
    LATTICES,
    LatticeRounded,
    codebook,
    nearest_points,
    scales_of,
    stored_scales,
)
from avalab.lab.errors import InputError

SMALLEST = 6e-8  # of a scale: float16's smallest number

MULTIPLIERS = {
    "iq4_xs": (-32, 31),
    "q2_k": (1, 15),
    "q3_k": (-32, 31),
    "q4_k": (1, 63),
    "q5_k": (1, 63),
    "q6_k": (-128, 127),
}

SHRINKS = tuple(1 - 0.05 * step for step in range(10))  # of a group's range

POINT_STRETCHES = tuple(0.55 + 0.09 * step for step in range(9))  # where a group's largest goes, over the largest level

STRETCHES = tuple(0.92 + 0.05 * step for step in range(10))  # where the largest magnitude goes, over the last code


def round_weight(
    weight: Float[Tensor, "rows cols"], posed: Problem, format: NumberFormat, *, repairs: int | None = None
) -> BlockRounded | LatticeRounded:
    """Round every row onto the block type so that the error's quadratic form under the problem's moment is small.

    Raises ValueError for columns that the type's blocks do not divide.
    """
    if not block_types.fits_blocks(format, weight.shape[1]):
        raise InputError(f"blocks of {block_types.block_weights(format)} do not divide {weight.shape[1]} columns")
    weight = weight.float()
    if format.name in LATTICES:
        return _round_onto_points(weight, posed, format, repairs)
    scales, offsets, fields = stored(*search(weight, posed.column_cost, format), format)
    codes = rounding.compensated(weight, posed, format, scales, -offsets / scales)
    for _ in range(min(2, max(0, 6 - format.bits)) if repairs is None else repairs):
        found = refit(weight, posed.moment, codes, scales, offsets=offsets if format.offset else None)
        scales, offsets, fields = stored(*found, format)
        codes = rounding.descended(weight, posed, format, codes, scales=scales, zeros=-offsets / scales)
    return BlockRounded(format, codes.to(torch.int8), scales, offsets, fields)


def nearest(weight: Tensor, cost: Tensor, format: NumberFormat) -> Float[Tensor, "rows cols"]:
    """The weight with scales and offsets of least cost-weighted error, as stored, each value at its nearest point."""
    if format.name in LATTICES:
        scales = scales_of(format, *stored_scales(search(weight, cost, format)[0], format))[..., None]
        groups, width = weight.unflatten(1, (-1, format.group_size)), LATTICES[format.name].width
        points = nearest_points((groups.abs() / scales).unflatten(-1, (-1, width)), format.name)
        return (codebook(format.name)[points].flatten(-2) * groups.sign() * scales).flatten(1)
    scales, offsets, _ = stored(*search(weight, cost, format), format)
    groups = weight.unflatten(1, (-1, format.group_size))
    codes = rounding.snap((groups - offsets[..., None]) / scales[..., None], format)
    return (codes * scales[..., None] + offsets[..., None]).flatten(1)


def search(weight: Tensor, cost: Tensor, format: NumberFormat) -> tuple[Tensor, Tensor]:
    """Scales and offsets of least cost-weighted error, one a row and group, before they are stored."""
    groups = weight.unflatten(1, (-1, format.group_size))
    weights = cost.clamp(min=1e-30).view(1, -1, format.group_size)
    one = _search_points if format.name in LATTICES else _search_ranges if format.offset else _search_scales
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    parts = [one(part, weights, format) for part in groups.split(rows)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def stored(scales: Tensor, offsets: Tensor, format: NumberFormat) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Scales and offsets as the file can hold them, and the fields that hold them."""
    if format.name not in MULTIPLIERS:
        halves = _away_from_zero(scales).half()
        fields = {"scale": halves.reshape(-1, 1)}
        if not format.offset:
            return halves.float(), torch.zeros_like(scales), fields
        minimums = offsets.half()
        return halves.float(), minimums.float(), fields | {"minimum": minimums.reshape(-1, 1)}
    per_block = block_types.block_weights(format) // format.group_size
    steps, unit = _whole_multiples(scales.reshape(-1, per_block), *MULTIPLIERS[format.name])
    fields, kept, lows = {"scale": unit.half()}, (steps * unit).view_as(scales), None
    found = torch.zeros_like(scales)
    if format.offset:
        lows, least = _whole_multiples(-offsets.reshape(-1, per_block), 0, MULTIPLIERS[format.name][1])
        fields["minimum"], found = least.half(), -(lows * least).view_as(offsets)
    whole = [None if part is None else part.to(torch.int32) for part in (steps, lows)]
    return kept, found, fields | {"multipliers": block_types.joined_multipliers(format, *whole)}


def _search_scales(groups: Tensor, cost: Tensor, format: NumberFormat) -> tuple[Tensor, Tensor]:
    """For the codes of each trial, sum(c w q) / sum(c q^2) is the best scale, and saves sum(c w q)^2 / sum(c q^2)."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    extreme = torch.where(extreme == 0, 1.0, extreme)
    ends = (format.levels[0], format.levels[-1]) if format.levels else (format.low, format.high)
    fine = STRETCHES if format.bits < 6 else STRETCHES[1:3]
    best = torch.full_like(extreme[..., 0], -torch.inf)
    scales = torch.ones_like(best)
    for target in [end * stretch for end in ends for stretch in fine]:
        codes = rounding.snap(groups * (target / extreme), format)
        weighted = codes * cost
        power = (weighted * codes).sum(-1).clamp(min=1e-30)
        along = (weighted * groups).sum(-1)
        better = along.square() / power > best
        best = torch.where(better, along.square() / power, best)
        scales = torch.where(better, along / power, scales)
    return scales, torch.zeros_like(scales)


def _search_ranges(groups: Tensor, cost: Tensor, format: NumberFormat) -> tuple[Tensor, Tensor]:
    """The range shrinks towards its middle; scale and offset are those of the weighted regression on the codes."""
    least, greatest = groups.amin(-1), groups.amax(-1)
    below_zero = format.name in MULTIPLIERS  # K types subtract a minimum that is not negative
    least = least.clamp(max=0) if below_zero else least
    best = torch.full_like(least, torch.inf)
    scales, offsets = torch.ones_like(least), torch.zeros_like(least)
    total, middle = cost.sum(-1), (least + greatest) / 2
    for shrink in SHRINKS:
        scale = ((greatest - least) * shrink / format.high).clamp(min=SMALLEST)
        start = middle - (greatest - least) * shrink / 2
        codes = rounding.snap((groups - start[..., None]) / scale[..., None], format)
        mean, level = (codes * cost).sum(-1) / total, (groups * cost).sum(-1) / total
        spread = (cost * codes * (codes - mean[..., None])).sum(-1)
        slope = (cost * groups * (codes - mean[..., None])).sum(-1) / spread.clamp(min=1e-30)
        scale = torch.where(slope > 0.3 * scale, slope, scale)
        start = level - scale * mean
        start = start.clamp(max=0) if below_zero else start
        error = ((codes * scale[..., None] + start[..., None] - groups).square_() * cost).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales, offsets = torch.where(better, scale, scales), torch.where(better, start, offsets)
    return scales, offsets


def _whole_multiples(values: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Values of a super-block as whole multiples, in [low, high], of one float16: `steps, unit`."""
    if low < 0:  # the largest magnitude becomes `low`, whatever its sign
        unit = values.gather(1, values.abs().argmax(1, keepdim=True)) / low
    else:
        unit = values.amax(1, keepdim=True) / high
    unit = _away_from_zero(unit).half().float()
    steps = (values / unit).round_().clamp_(low, high)
    return (torch.where(steps == 0, 1.0, steps) if low < 0 else steps), unit


def _away_from_zero(scales: Tensor) -> Tensor:
    return torch.where(scales.abs() < SMALLEST, SMALLEST, scales)


def refit(
    weight: Tensor, moment: Tensor, codes: Tensor, scales: Tensor, *, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scales, and offsets if there are any, of least error for given codes: one linear system a row.

    What is solved for is their change, from the error that is left.
    """
    count, found = scales.shape[1], []
    blocks = moment.unflatten(0, (count, -1))  # group width cols
    rows = max(1, CHUNK_WEIGHTS // (weight.shape[1] * count))
    lows = torch.zeros_like(scales) if offsets is None else offsets
    for part, points, scale, low in zip(*(t.split(rows) for t in (weight, codes, scales, lows)), strict=True):
        levels = points.unflatten(1, (count, -1))
        left = part - (levels * scale[..., None] + low[..., None]).flatten(1)
        spread = torch.einsum("rgw,gwc->rgc", levels, blocks)
        normal = torch.einsum("rgkw,rkw->rgk", spread.unflatten(2, (count, -1)), levels)
        wanted = torch.einsum("rgc,rc->rg", spread, left)
        if offsets is not None:
            summed = blocks.sum(1)  # group cols
            mixed = spread.unflatten(2, (count, -1)).sum(-1)
            ones = summed.unflatten(1, (count, -1)).sum(-1).expand(len(part), -1, -1)
            normal = torch.cat((torch.cat((normal, mixed), 2), torch.cat((mixed.mT, ones), 2)), 1)
            wanted = torch.cat((wanted, left @ summed.T), 1)
        ridge = normal.diagonal(dim1=1, dim2=2) * 1e-4 + 1e-12
        change, failed = torch.linalg.solve_ex(normal + torch.diag_embed(ridge), wanted[..., None])
        change = torch.where((failed == 0)[:, None], change.squeeze(-1), 0.0)
        new = scale + change[:, :count]
        kept = (new / scale > 0.5) & (new / scale < 2)
        moved = low if offsets is None else low + change[:, count:]
        found.append((torch.where(kept, new, scale), torch.where(kept, moved, low)))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


# --- lattices ---------------------------------------------------------------------------------------------------------


def _search_points(groups: Tensor, cost: Tensor, format: NumberFormat) -> tuple[Tensor, Tensor]:
    """Scales by the trials of `_search_scales`, with points of the codebook for codes."""
    width, most = LATTICES[format.name].width, codebook(format.name).max()
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    best = torch.full_like(largest[..., 0], -torch.inf)
    scales = torch.ones_like(best)
    for stretch in POINT_STRETCHES:
        found = nearest_points(
            groups.abs().unflatten(-1, (-1, width)) * (stretch * most / largest[..., None]), format.name
        )
        codes = codebook(format.name)[found].flatten(-2) * groups.sign()
        power, along = (cost * codes.square()).sum(-1).clamp(min=1e-30), (cost * codes * groups).sum(-1)
        better = along.square() / power > best
        best = torch.where(better, along.square() / power, best)
        scales = torch.where(better, along / power, scales)
    return scales.clamp(min=SMALLEST), torch.zeros_like(scales)


def _round_onto_points(weight: Tensor, posed: Problem, format: NumberFormat, repairs: int | None) -> LatticeRounded:
    """Points chosen chunk by chunk, each chunk's error made up for by later ones; scales fitted anew, once or more."""
    scales, _ = search(weight, posed.column_cost, format)
    best, least = None, torch.inf
    for _ in range(1 + (1 if repairs is None else repairs)):
        found = _compensated_points(weight, posed.moment, format, scales)
        left = found.decode(torch.float32) - weight
        if (error := float(((left @ posed.moment) * left).sum())) < least:
            best, least = found, error
        held = scales_of(format, found.units, found.multipliers)
        signed = codebook(format.name)[found.points.long()].flatten(1) * torch.where(found.negative, -1.0, 1.0)
        scales, _ = refit(weight, posed.moment, signed, held, offsets=None)
    return best


def _compensated_points(weight: Tensor, moment: Tensor, format: NumberFormat, scales: Tensor) -> LatticeRounded:
    """Within a chunk the nearest point, columns weighed by what their error costs once later columns made up for it.

    With U the upper factor of the moment's inverse, the error E of chunk B changes later columns by -E U_BB^-1 U_B.
    """
    lattice, points = LATTICES[format.name], codebook(format.name)
    width, (rows, cols) = lattice.width, weight.shape
    units, multipliers = stored_scales(scales, format)
    each = scales_of(format, units, multipliers).repeat_interleave(lattice.group_size, 1)
    chunks = moment.diagonal().unflatten(0, (-1, width)).sum(1).argsort(descending=True)
    order = (chunks[:, None] * width + torch.arange(width)).flatten()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, steps = weight[:, order].clone(), each[:, order[::width]]
    chosen = torch.empty(rows, cols // width, dtype=torch.int16)
    negative = torch.empty(rows, cols, dtype=torch.bool)
    for at, chunk in enumerate(chunks.tolist()):
        part = slice(at * width, (at + 1) * width)
        wanted, corner = left[:, part], factor[part, part]
        cost, scaled = corner.diagonal() ** -2, wanted.abs() / steps[:, at, None]
        found = torch.addmm(points.square() @ cost, scaled * cost, points.T, alpha=-2).argmin(1)
        chosen[:, chunk], negative[:, chunk * width : (chunk + 1) * width] = found.to(torch.int16), wanted < 0
        reached = points[found] * steps[:, at, None] * torch.where(wanted < 0, -1.0, 1.0)
        error = torch.linalg.solve_triangular(corner, wanted - reached, upper=True, left=False)
        left[:, part.stop :].addmm_(error, factor[part, part.stop :], alpha=-1)
    return LatticeRounded(format, chosen, negative, multipliers, units)
