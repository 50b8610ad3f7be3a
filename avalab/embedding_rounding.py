"""An embedding, and the head tied to it, on the grids of linear layers: what each should cost, and how it is rounded.

All rows share one quadratic, the moment that `expected_rise` finds in its pass with gradients: the head's inputs,
weighted by the squared gradients of their token's logits, plus the gradients of embedded tokens. Compensation under
it is what counts: alone in SmolLM2-135M, at 3 bits in groups of 64, the table costs 0.78 nats rounded to nearest in the
best range, 0.38 with columns weighted by their cost, 0.09 compensated (text the rounding had not seen; most of it goes
through the head; the plain moment of the head's inputs does as well, that of the gradients alone far worse: 0.38).

1. `options`: the divergence of two grids is measured on a few windows, with the whole table rounded; that of the others
   follows from their quadratic errors on a sample of rows, as a power law through the two.
2. `apply` rounds with compensation (`rounding.round_weight`), some rows at a time, and puts the rows into the model.

What it does not do: give rows of rare tokens fewer bits, or round a head that is not tied.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from avalab import expected_rise, packed, rounding
from avalab.allocation import Option
from avalab.rounding import Grid, Problem, Rounded

SAMPLED_ROWS = 2048  # for the errors of all grids
CHUNK_ROWS = 16384  # rounded at a time: some copies of them in float32
DAMPING = 0.03  # 0.003 and 0.01 were worse on other text


def portable_options(model: PreTrainedModel, windows: Int[Tensor, "window time"], *, int8: bool = True) -> list[Option]:
    """bf16, and int8 with a scale a row, whose rise in KL is measured: there is only one way to round it."""
    table = model.get_input_embeddings().weight
    rows, columns = table.shape
    found = [Option(expected_rise.BF16, 2 * rows * columns, 0.0)]
    if int8:
        tied = model.get_output_embeddings().weight is table
        codes, scales = packed.int8_rows(table.detach())
        rise = expected_rise.of_replacement(model, windows, table, (codes.to(table.dtype) * scales).to(table.dtype))
        found.append(Option(packed.INT8_ROWS, rows * columns + 2 * rows * (2 if tied else 1), rise))
    return found


@torch.no_grad()
def options(
    model: PreTrainedModel,
    windows: Int[Tensor, "window time"],
    moment: Float[Tensor, "cols cols"],
    grids: Sequence[Grid],
) -> list[Option]:
    """The table's bytes and rise in KL divergence, nats a token, on each grid; the model stays as it was.

    The coarsest and a middle grid are measured on `windows`, the others follow by their errors.
    """
    posed, table = rounding.problem(moment, damping=DAMPING), model.get_input_embeddings().weight
    sample = table.detach()[:: max(1, len(table) // SAMPLED_ROWS)].float()
    errors = {}
    for grid in grids:
        rounded = rounding.round_weight(sample, posed, grid)
        errors[grid] = float(rounding.error(sample, rounded, posed.moment).sum())
    ranked = sorted(grids, key=errors.get)
    known = {}
    for grid in dict.fromkeys((ranked[-1], ranked[len(ranked) // 2])):
        values = _rounded(table.detach(), posed, grid).decode(table.dtype)
        known[grid] = expected_rise.of_replacement(model, windows, table, values)
    return [Option(g.name, packed.stored_bytes(*table.shape, g), _rise(errors, known, g)) for g in grids]


def _rise(errors: dict[Grid, float], known: dict[Grid, float], grid: Grid) -> float:
    """The rise of a grid by its error: a power law through the measured ones, proportional below them."""
    points = sorted((errors[g], max(rise, 1e-12)) for g, rise in known.items())
    (low, rise), (high, most) = points[0], points[-1]
    slope = log(most / rise) / log(high / low) if high > low and errors[grid] > low else 1.0
    return rise * exp(slope * log(max(errors[grid], 1e-30) / low))


@torch.no_grad()
def apply(model: PreTrainedModel, moment: Float[Tensor, "cols cols"], grid: Grid) -> Rounded:
    """Replace the embedding's values, in place, by rounded ones; a tied head shares them."""
    posed, table = rounding.problem(moment, damping=DAMPING), model.get_input_embeddings().weight
    rounded = _rounded(table.detach(), posed, grid)
    table.data = rounded.decode(table.dtype)
    return rounded


def _rounded(table: Tensor, posed: Problem, grid: Grid) -> Rounded:
    parts = [rounding.round_weight(rows, posed, grid) for rows in table.split(CHUNK_ROWS)]
    return Rounded(grid, *(torch.cat([getattr(p, name) for p in parts]) for name in ("codes", "scales", "zero_points")))
