"""The lab's own compressor: bits where they matter, rounding that repairs itself, one file that transformers loads.

1. Sensitivity: one calibration pass with gradients gives every linear layer the Fisher information of its outputs and
   the cost D of a rounding error in each column (`rounding.Problem`). The expected rise in KL divergence is

       KL = 1/2 sum_rows E[g_row^2] sum_columns D_column e_row,column^2,

   g the gradient of the log-likelihood of labels drawn from the model itself (Martens 2020, arXiv 1412.1193, eq. 27),
   e the error of the group's best grid. Gradients count as independent of inputs (K-FAC, Martens and Grosse 2015).
2. Choice: `allocation` picks a grid for every layer, and int8 rows or bf16 for the embedding, under a budget of bytes.
3. Rounding: `calibration.walk` and `rounding`, block by block, each layer aiming at the original outputs.
4. Files: a compressed-tensors checkpoint (`packing`), the embedding stored once though it serves as head too.

What it does not do: train, choose text, change norms or biases, export to other engines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from avalab import allocation, calibration, models, packing, quality, rounding
from avalab.allocation import Allocation, Option
from avalab.compressors import Job
from avalab.packing import Packed
from avalab.rounding import Grid, Rounded

BITS = (2, 3, 4, 5, 6, 7, 8)
GROUP_SIZES = (32, 64, 128)
FISHER_WINDOWS = 8
EMBEDDING_WINDOWS = 2  # its rise is measured, not estimated
SAMPLED_ROWS = 64  # of a layer, for its expected errors
HEADER_BYTES = 130  # of a tensor in a safetensors header, at most
BF16 = "bf16"
DEFAULTS = {"bits_per_weight": 4.5, "bytes": 0, "group_size": 0, "embedding": "any"}
SOURCES = (*(Path(m.__file__) for m in (allocation, calibration, packing, rounding)), Path(__file__))


def compress(job: Job) -> Packed:
    """Compress the model of a `Job`; its parameters are those of `DEFAULTS`, `bytes` overruling `bits_per_weight`."""
    model = models.load(job.folder, job.device)
    parameters, windows = job.parameters, job.calibration
    if parameters["embedding"] not in ("any", BF16):
        raise ValueError(f"embedding {parameters['embedding']!r} is neither 'any' nor {BF16!r}")
    budget = budget_bytes(model, parameters)
    options = sensitivities(model, windows, group_size=parameters["group_size"], skipped=job.skipped)
    if parameters["embedding"] == BF16:
        options = {name: [o for o in row if o.format != packing.INT8_ROWS] for name, row in options.items()}
    fixed = fixed_bytes(model, options)
    chosen = choose(options, budget, fixed)
    predicted = {"predicted_kl_divergence": chosen.cost, "predicted_bytes": chosen.bytes + fixed}
    layers, damped = round_model(model, windows, chosen)
    measured = predicted | {"damped_moments": damped, "formats": _counts(chosen), "budget_bytes": budget}
    return packing.pack(model, layers, int8_rows_of=_int8(chosen), measured=measured)


def label(parameters: Mapping) -> str:
    """What distinguishes an artefact's name: `4.5bpw`, `114000000b-g64-bf16emb`."""
    parts = [f"{parameters['bytes']}b" if parameters["bytes"] else f"{parameters['bits_per_weight']:g}bpw"]
    parts += [f"g{parameters['group_size']}"] if parameters["group_size"] else []
    return "-".join(parts + (["bf16emb"] if parameters["embedding"] == BF16 else []))


def budget_bytes(model: PreTrainedModel, parameters: Mapping) -> int:
    """Bytes of the weight file: `bytes`, or `bits_per_weight` over all parameters, embedding included.

    Raises ValueError for a budget that is not positive or above the bf16 model's own size.
    """
    count = models.parameter_count(model)
    budget = int(parameters["bytes"] or parameters["bits_per_weight"] * count / 8)
    if budget <= 0:
        raise ValueError(f"a budget has to be positive, got {budget} bytes")
    if budget > 2 * count:
        raise ValueError(
            f"a budget of {budget:,} bytes ({8 * budget / count:.2f} bits a weight) is above the bf16 model's "
            f"{2 * count:,}: there is nothing to compress, use the base artefact itself"
        )
    return budget


def choose(options: Mapping[str, list[Option]], budget: int, fixed: int) -> Allocation:
    """The best allocation within the budget less what cannot be chosen; raises ValueError naming the smallest file."""
    smallest = fixed + sum(min(option.bytes for option in row) for row in options.values())
    if budget < smallest:
        raise ValueError(f"a budget of {budget:,} bytes is below the smallest file, {smallest:,} bytes")
    return allocation.allocate(options, budget - fixed)


def fixed_bytes(model: PreTrainedModel, options: Mapping[str, list[Option]]) -> int:
    """Bytes of the file that no choice changes: norms, biases, what was skipped, and the header."""
    rest = sum(p.numel() for name, p in model.named_parameters() if name.removesuffix(".weight") not in options)
    headers = HEADER_BYTES * (len(list(model.parameters())) + 3 * len(options))
    return 2 * rest + headers


def sensitivities(
    model: PreTrainedModel, windows: Int[Tensor, "window time"], *, group_size: int = 0, skipped: Sequence[str] = ()
) -> dict[str, list[Option]]:
    """Formats of every linear layer and of the embedding with their bytes and expected rise in KL, nats a token.

    `group_size` 0 offers every usual one that divides the layer's columns; a layer that the asked one does not divide
    takes the next larger usual one that does, else whole rows.
    """
    names = {layer: name for name, layer in models.linear_layers(model).items() if name not in skipped}
    found: dict[str, list[Option]] = {}
    last: list = [None, None]  # layers with one input come after each other: their problem is solved once

    def measure(layer: nn.Linear, inputs: Tensor, gradients: Tensor) -> None:
        if last[0] is not inputs:
            rows = inputs.detach().flatten(0, -2)
            posed = rounding.problem(calibration.second_moment(rows) / len(rows))
            last[:] = inputs, posed.column_cost
        step = max(1, layer.out_features // SAMPLED_ROWS)
        squared = gradients.flatten(0, -2)[:, ::step].float().square()
        weights = torch.outer(squared.mean(0), last[1]) * (layer.out_features / squared.shape[1])
        found[names[layer]] = _options(layer.weight.detach(), weights, last[1], group_size)

    calibration.gradient_pass(model, windows[:FISHER_WINDOWS], list(names.values()), measure)
    embedding = next(name for name, m in model.named_modules() if m is model.get_input_embeddings())
    return {embedding: _embedding_options(model, windows[:EMBEDDING_WINDOWS])} | {n: found[n] for n in names.values()}


def grids(columns: int, group_size: int = 0) -> list[Grid]:
    """The grids that divide this many columns."""
    sizes = [size for size in GROUP_SIZES if columns % size == 0 and size >= group_size]
    sizes = (sizes[:1] if group_size else sizes) or [columns]
    return [Grid(bits, size) for bits in BITS for size in sizes]


def _options(weight: Tensor, weights: Tensor, cost: Tensor, group_size: int) -> list[Option]:
    """A layer's formats; `weights` are those of squared errors in the sampled rows."""
    rows, columns = weight.shape
    sample = weight[:: max(1, rows // SAMPLED_ROWS)].float()
    found = [Option(BF16, 2 * rows * columns, 0.0)]
    for grid in grids(columns, group_size):
        scales, zeros = rounding.search(sample, cost, grid)
        squared = (rounding.nearest(sample, grid, scales, zeros) - sample).square_()
        rise = 0.5 * float((squared * weights).sum())
        found.append(Option(grid.name, packing.stored_bytes(rows, columns, grid), rise))
    return found


def _embedding_options(model: PreTrainedModel, windows: Tensor) -> list[Option]:
    """bf16, or int8 with a scale a row, whose rise in KL is measured: there is only one choice to try."""
    table = model.get_input_embeddings().weight
    rows, columns = table.shape
    tied = model.get_output_embeddings().weight is table
    kept = table.data
    head, softcap = quality.output_head(model)
    before = quality.hidden_states(model, windows)
    codes, scales = packing.int8_rows(kept)
    try:
        decoded = (codes.to(kept.dtype) * scales).to(kept.dtype)
        table.data = decoded
        after = quality.hidden_states(model, windows)
        rises = []
        for expected, candidate in zip(before, after, strict=True):
            table.data = kept
            reference = quality.log_probabilities(expected, head, softcap)
            table.data = decoded
            rises.append(quality.kl_divergence(reference, quality.log_probabilities(candidate, head, softcap)).mean())
    finally:
        table.data = kept
    size = rows * columns + 2 * rows * (2 if tied else 1)
    return [
        Option(BF16, 2 * rows * columns, 0.0),
        Option(packing.INT8_ROWS, size, float(torch.stack(rises).detach().mean())),
    ]


@torch.no_grad()
def round_model(
    model: PreTrainedModel, windows: Int[Tensor, "window time"], chosen: Allocation
) -> tuple[dict[str, Rounded], int]:
    """Replace, in place, the chosen layers' weights by rounded ones; also how many moments needed more damping."""
    rounded: dict[str, Rounded] = {}
    damped = 0
    for site in calibration.walk(model, windows):
        layers = {name: layer for name, layer in site.layers.items() if name in chosen.chosen}
        by_format: dict[str, list[str]] = {}
        for name in layers:
            by_format.setdefault(chosen.chosen[name].format, []).append(name)
        by_format.pop(BF16, None)
        if by_format:
            posed = rounding.problem(site.moment)
            damped += posed.attempts > 1
        for format, names in by_format.items():
            weight = torch.cat([layers[name].weight.float() for name in names])
            target = rounding.aim(weight, site.moment, site.cross)
            result = rounding.round_weight(target, posed, rounding.grid_named(format))
            for name, part in zip(names, rounding.split(result, [layers[n].out_features for n in names]), strict=True):
                layers[name].weight.data = part.decode(layers[name].weight.dtype)
                rounded[name] = part
    return rounded, damped


def _counts(chosen: Allocation) -> dict[str, int]:
    return dict(sorted(Counter(option.format for option in chosen.chosen.values()).items()))


def _int8(chosen: Allocation) -> str:
    return next((name for name, option in chosen.chosen.items() if option.format == packing.INT8_ROWS), "")
