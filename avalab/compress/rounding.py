"""Error-compensated rounding onto integer grids: codes, scales and zero points that spoil a layer's output least.

The layer should still give R w (its original inputs R, original weights w) when fed what the rounded model feeds it, X:

1. Aim: w' = w + w (R - X)^T X (X^T X)^-1, the least-squares weights for the inputs X (GPTAQ's asymmetric calibration,
   Li et al. 2025, arXiv 2504.02692, in closed form), damped.
2. Grid: the range of each group of columns that gives the least error, each column weighted by what its error costs
   once later columns have made up for it, D_j = 1 / U_jj^2.
3. Rounding: columns in order of falling importance, each error handed on to the columns not yet rounded through
   U = chol(H^-1) (GPTQ, Frantar et al. 2023, arXiv 2210.17323), for all rows of all layers that share H.
4. Repair, a few times: scales by least squares for the codes as they are, then each code moved to the best integer
   given all others (cyclic coordinate descent on the quadratic error).

`round_model` does so block by block, each layer making up for what was rounded before it, and takes whatever rounds:
`round_weight` here, or that of `block_rounding`. Deterministic: no random number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from avalab.kernels.block_types import BlockRounded
from avalab.kernels.formats import Grid, NumberFormat, Rounded
from avalab.lab import process
from avalab.lab.errors import InputError
from avalab.models import walk
from avalab.models.walk import Site

DAMPING = 0.01  # of the moment's mean diagonal

# Of a layer's usual damping, up to 1, in a walk: more of it fits the calibration text less closely, which is what other
# text gains from. SmolLM2-135M at 4.5 bits a parameter on text like that of calibration, which the rounding had not
# seen: 10, 30 and 100 times gave 0.80, 0.77, 0.79x the KL divergence, on GGUF's types 10 and 30 times 0.85 and 0.78x.
DAMPING_TIMES = 30.0

ENOUGH_TOKENS, FEW_TOKENS = 5, 3  # for each column

SHRINKS = tuple(1 - 0.04 * step for step in range(12))  # of a group's range, tried in this order

BLOCK_COLUMNS = 32

CHUNK_WEIGHTS = 2**20  # worked on at a time: a few MiB, near the cores

CHUNK_ROWS = 16384  # of an embedding, rounded at a time: some copies of them in float32

Round = Callable[[Tensor, "Problem", str], Rounded | BlockRounded]  # weight, problem, format's name


@dataclass(frozen=True)
class Problem:
    """The quadratic a site's layers share: damped moment, its inverse's Cholesky factor, and the columns' order."""

    moment: Float[Tensor, "cols cols"]
    factor: Float[Tensor, "cols cols"]  # upper, of the inverse, in the order `order`
    order: Tensor
    attempts: int  # 1: the usual damping was enough

    @property
    def column_cost(self) -> Float[Tensor, "cols"]:
        """Error of a unit rounding error in each column after the later ones have made up for it."""
        cost = torch.empty_like(self.order, dtype=self.factor.dtype)
        cost[self.order] = self.factor.diagonal() ** -2
        return cost


def damping_for(columns: int, tokens: int) -> float:
    """Damping of a moment estimated from so many tokens, as a share of its mean diagonal.

    `DAMPING` for five tokens a column or more; 1 for three or fewer, whose correlations are mostly chance (there it
    gave the least divergence on other text); between them in equal ratios.
    """
    missing = (ENOUGH_TOKENS - tokens / columns) / (ENOUGH_TOKENS - FEW_TOKENS)
    return DAMPING ** (1 - min(1.0, max(0.0, missing)))


def damped_moment(moment: Float[Tensor, "cols cols"], damping: float) -> Float[Tensor, "cols cols"]:
    """The moment with a share of its mean diagonal added. Raises ValueError for NaN or infinity, naming how many."""
    if not moment.isfinite().all():
        raise InputError(f"{int((~moment.isfinite()).sum())} entries of the second moment are NaN or infinite")
    unit = moment.diagonal().mean().clamp(min=1e-30)
    return moment + torch.eye(len(moment), device=moment.device) * (unit * damping)


def rounding_problem(moment: Float[Tensor, "cols cols"], *, damping: float = DAMPING) -> Problem:
    """Damp a second moment and factorise its inverse, columns of large moment first.

    Columns that never carry anything (a zero on the diagonal) cost nothing. Raises ValueError as `damped_moment` does,
    and for a moment that stays singular.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    for attempt in range(1, 12):
        damped = damped_moment(moment, damping * 4 ** (attempt - 1))
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return Problem(damped, factor, order, attempt)
    raise InputError(f"a second moment of {len(moment)} columns stayed singular at damping {damping * 4**10:.3g}")


def aim(weight: Tensor, moment: Tensor, cross: Tensor, *, damping: float = DAMPING) -> Tensor:
    """Weights that give the original outputs from the present inputs: w + w (cross - moment) moment^-1."""
    lower, failed = torch.linalg.cholesky_ex(damped_moment(moment, damping))
    if failed:
        return weight
    return weight + torch.cholesky_solve((weight @ (cross - moment)).T, lower).T


@torch.no_grad()
def round_model(
    model: PreTrainedModel,
    windows: Int[Tensor, "window time"],
    formats: Mapping[str, str],
    round: Round,
    *,
    tables: Mapping[str, Problem],
) -> tuple[dict[str, Rounded | BlockRounded], int]:
    """Replace, in place, the weights in `formats` by rounded ones: embedding and head by their problems, then layers.

    Layers of a site that get one format are rounded together, onto the weights that give the original outputs from the
    present inputs. Returns what `round` made, by name, and how many moments needed more than the usual damping.
    """
    rounded: dict[str, Rounded | BlockRounded] = {}
    damped = 0
    for name in [name for name in tables if name in formats]:
        table = model.get_submodule(name).weight
        rounded[name] = round(table.detach(), tables[name], formats[name])
        table.data = rounded[name].decode(table.dtype)
    for site in walked(model, windows, desc="rounding"):
        by_format: dict[str, list[str]] = {}
        for name in site.layers:
            if name in formats:
                by_format.setdefault(formats[name], []).append(name)
        if by_format:
            posed = rounding_problem(site.moment, damping=damping_of(site))
            damped += posed.attempts > 1
        for format, names in by_format.items():
            layers = [site.layers[name] for name in names]
            weight = torch.cat([layer.weight.float() for layer in layers])
            target = aim(weight, site.moment, site.cross, damping=damping_of(site))
            parts = round(target, posed, format).split([layer.out_features for layer in layers])
            for name, layer, part in zip(names, layers, parts, strict=True):
                layer.weight.data = part.decode(layer.weight.dtype)
                rounded[name] = part
    return rounded, damped


def walked(model: PreTrainedModel, windows: Int[Tensor, "window time"], *, desc: str) -> Iterator[Site]:
    """`walk.calibration_sites` with a bar of the layers that are done."""
    with process.progress(desc=desc, total=len(walk.linear_layers(model))) as bar:
        for site in walk.calibration_sites(model, windows):
            yield site
            bar.update(len(site.layers))


def damping_of(site: Site) -> float:
    """Damping of a site's moment in a walk, as a share of its mean diagonal."""
    return min(1.0, damping_for(len(site.moment), site.tokens) * DAMPING_TIMES)


def round_weight(
    weight: Float[Tensor, "rows cols"], posed: Problem, grid: Grid, *, repairs: int | None = None
) -> Rounded:
    """Round every row onto the grid so that the error's quadratic form under the problem's moment is small.

    `repairs` is how often scales and codes are improved in turn; without it twice up to 4 bits, once at 5, then never:
    finer grids gain less than the noise of a bf16 model.
    Raises ValueError for a group size that does not divide the columns.
    """
    if weight.shape[1] % grid.group_size:
        raise InputError(f"a group of {grid.group_size} does not divide {weight.shape[1]} columns")
    repairs = min(2, max(0, 6 - grid.bits)) if repairs is None else repairs
    parts = []
    for rows in weight.split(CHUNK_ROWS):
        rows = rows.float()
        scales, zeros = search(rows, posed.column_cost, grid)
        codes = compensated(rows, posed, grid, scales, zeros)
        for _ in range(repairs):
            scales = refit(rows, posed.moment, grid, codes, scales, zeros)
            codes = descended(rows, posed, grid, codes, scales=scales, zeros=zeros)
        parts.append((codes.to(torch.int8), scales.bfloat16(), zeros.to(torch.int8)))
    return Rounded(grid, *(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def output_error(
    weight: Float[Tensor, "rows cols"], rounded: Rounded | BlockRounded, moment: Tensor
) -> Float[Tensor, "rows"]:
    """Mean squared output error of each row under the moment."""
    difference = rounded.decode(torch.float32) - weight
    return ((difference @ moment) * difference).sum(1)


def round_to_nearest(weight: Tensor, cost: Tensor, grid: Grid) -> Float[Tensor, "rows cols"]:
    """The weight on the grid of least cost-weighted error, each value at its nearest point: without compensation."""
    scales, zeros = (part[..., None] for part in search(weight, cost, grid))
    groups = weight.unflatten(1, (-1, grid.group_size))
    codes = (groups / scales + zeros).round_().clamp_(grid.low, grid.high)
    return ((codes - zeros) * scales).flatten(1)


def search(weight: Tensor, cost: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales (bfloat16 values in float32) and zero points of least cost-weighted error, one a row and group."""
    cost, found = cost.view(1, -1, grid.group_size), []
    for groups in weight.unflatten(1, (-1, grid.group_size)).split(max(1, CHUNK_WEIGHTS // weight.shape[1])):
        least, greatest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        best = torch.full_like(least, torch.inf)
        scales, zeros = torch.ones_like(least), torch.zeros_like(least)
        for shrink in SHRINKS:
            scale, zero = grid_of_range(least * shrink, greatest * shrink, grid)
            codes = (groups / scale[..., None]).add_(zero[..., None]).round_().clamp_(grid.low, grid.high)
            difference = codes.sub_(zero[..., None]).mul_(scale[..., None]).sub_(groups)
            error = difference.square_().mul_(cost).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
        found.append((scales, zeros))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def grid_of_range(least: Tensor, greatest: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale, as it is stored, and zero point of the grid from the least to the greatest value."""
    if grid.symmetric:
        scale = _stored(torch.maximum(-least, greatest) / (2**grid.bits - 1) * 2)
        return scale, torch.zeros_like(scale)
    scale = _stored((greatest - least) / (2**grid.bits - 1))
    return scale, (grid.low - least / scale).round().clamp(grid.low, grid.high)


def _stored(scale: Tensor) -> Tensor:
    return scale.clamp(min=1e-8).bfloat16().float()


def snap(values: Tensor, grid: Grid | NumberFormat) -> Tensor:
    """The nearest points of a grid whose scale is 1, in place where it can be: integers, or the grid's own levels."""
    if not grid.levels:
        return values.round_().clamp_(grid.low, grid.high)
    levels = torch.tensor(grid.levels, device=values.device)
    return levels[torch.bucketize(values, (levels[:-1] + levels[1:]) / 2)]


def compensated(
    weight: Tensor, posed: Problem, grid: Grid | NumberFormat, scales: Tensor, zeros: Tensor
) -> Float[Tensor, "rows cols"]:
    """Points of the grid by error-compensated rounding; a weight is (point - zero) * scale, zeros need not be whole.

    Works on the transpose, whose rows are contiguous columns.
    """
    order, factor = posed.order, posed.factor
    left = weight.T[order].contiguous()
    codes = torch.empty_like(left)
    group = order // grid.group_size
    scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    factor = factor / factor.diagonal()[:, None]
    for start in range(0, len(order), BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, len(order))
        errors = torch.empty_like(left[start:end])
        for j in range(start, end):
            scale, zero = scales[group[j]], zeros[group[j]]
            codes[j] = snap(left[j] / scale + zero, grid)
            errors[j - start] = left[j] - (codes[j] - zero) * scale
            left[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def refit(weight: Tensor, moment: Tensor, grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Scales that minimise the error for given codes: one small linear system a row, as large as its groups."""
    count, found = scales.shape[1], []
    blocks = moment.unflatten(0, (count, -1))  # group width cols
    rows = max(1, CHUNK_WEIGHTS // (weight.shape[1] * count))
    for wanted_rows, points, old, zero in zip(*(t.split(rows) for t in (weight, codes, scales, zeros)), strict=True):
        levels = points.unflatten(1, (count, -1)) - zero[..., None]  # row group width
        spread = torch.einsum("rgw,gwc->rgc", levels, blocks)
        normal = torch.einsum("rgkw,rkw->rgk", spread.unflatten(2, (count, -1)), levels)
        wanted = torch.einsum("rgc,rc->rg", spread, wanted_rows)
        ridge = normal.diagonal(dim1=1, dim2=2)
        normal = normal + torch.diag_embed(ridge * 1e-4 + 1e-12)
        new, failed = torch.linalg.solve_ex(normal, (wanted + ridge * 1e-4 * old)[..., None])
        new = new.squeeze(-1)
        kept = (new > 0.5 * old) & (new < 2 * old) & (failed == 0)[:, None]
        found.append(torch.where(kept, _stored(new), old))
    return torch.cat(found)


def descended(
    weight: Tensor, posed: Problem, grid: Grid | NumberFormat, codes: Tensor, *, scales: Tensor, zeros: Tensor
) -> Float[Tensor, "rows cols"]:
    """One sweep of coordinate descent over the columns, each code the best integer given all the others."""
    moment, order = posed.moment[posed.order][:, posed.order], posed.order
    group = order // grid.group_size
    scales, zeros, codes = scales.T.contiguous(), zeros.T.contiguous(), codes.T[order].contiguous()
    decoded = (codes - zeros[group]) * scales[group]
    pull = moment @ (weight.T[order] - decoded)  # minus half the gradient
    diagonal = moment.diagonal()
    for start in range(0, len(order), BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, len(order))
        moves = torch.empty_like(codes[start:end])
        for j in range(start, end):
            scale, zero = scales[group[j]], zeros[group[j]]
            wanted = (decoded[j] + pull[j] / diagonal[j]) / scale + zero
            code = snap(wanted, grid)
            moves[j - start] = (code - codes[j]) * scale
            codes[j] = code
            pull[j + 1 : end].addr_(moment[j, j + 1 : end], moves[j - start], alpha=-1)
        pull[end:].addmm_(moment[start:end, end:].T, moves, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()
