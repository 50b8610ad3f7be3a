"""The lab's compressor over the blocks of ONNX Runtime: one folder of 2, 4 and 8 bits that ONNX Runtime GenAI runs.

1. Options: grids that the operators store without waste, 2, 4 or 8 bits in groups of 32, 64 and 128; for the embedding
   also 8 bits with a scale a row; or bf16. A head tied to the embedding reads its codes. Rises as in `ava`.
2. Choice: `allocation`, under a budget for the graph and its weights; what no choice changes is counted on the graph
   that the library's builder writes of the base.
3. Rounding: the embedding first, then the blocks (`rounded_walk`), which make up for what came before.
4. The last calibration windows are kept out of all this: on them the written folder is measured, in ONNX Runtime.

What it does not do: train, round a head that is not tied, families that the builder does not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from avalab import (
    allocation,
    ava_gguf,
    embedding_rounding,
    equivalence,
    expected_rise,
    models,
    onnx_blocks,
    quality,
    rounded_walk,
    rounding,
)
from avalab.allocation import Allocation, Option
from avalab.compressors import Job
from avalab.engines import onnx_graph
from avalab.engines.onnx_graph import OnnxModel
from avalab.expected_rise import BF16, Candidate
from avalab.rounding import Grid, Problem, Rounded

GROUP_SIZES = (32, 64, 128)
FORMS = ((2, False), (4, False), (4, True), (8, True))  # bits, and whether there are no zero points
TABLE_WINDOWS = 2
INPUTS = "int8"  # what products read: the only fast kernels for 2 and 8 bits
PARTS = (ava_gguf, embedding_rounding, onnx_blocks, onnx_graph)


def compress(job: Job, model: PreTrainedModel, budget: int) -> OnnxModel:
    """Compress `model`, which is that of the `Job`, into graph and weights of at most `budget` bytes.

    Raises ValueError for a family without a graph (it says which exports remain), or a budget below the smallest file.
    """
    if job.parameters["embedding"] not in ("any", BF16):
        raise ValueError(
            f"embedding={job.parameters['embedding']!r} is of the own format; for ONNX 'any' has all its grids"
        )
    windows, held_out = ava_gguf.split_windows(job.calibration)
    reference = _predictions(model, held_out)
    embedding, _ = onnx_graph.tables(model)
    with TemporaryDirectory() as scratch:
        graph = onnx_graph.build(_transformed(job, model, windows, Path(scratch) / "model"), Path(scratch))
        options, moment = sensitivities(job, model, windows)
        fixed = onnx_graph.unchosen_bytes(graph, options, embedding=embedding)
        chosen = choose(options, budget, fixed)
        layers, damped = round_model(model, windows, chosen, moment)
        blocks = {name: onnx_blocks.blocks(onnx_blocks.steps_of(part)) for name, part in layers.items()}
        measured = {
            "budget_bytes": budget,
            "predicted_bytes": chosen.bytes + fixed,
            "predicted_kl_divergence": chosen.cost,
            "measured_on": f"{held_out.numel()} held-out calibration tokens, in ONNX Runtime",
            "damped_moments": damped,
            "formats": dict(sorted(Counter(option.format for option in chosen.chosen.values()).items())),
            "containers": onnx_graph.containers(blocks),
            "embedding": chosen.chosen[embedding].format,
            "note": "; ".join(_notes(chosen, damped)),
        }
        check = (held_out, reference)
        return onnx_graph.finished(graph, blocks, embedding, inputs=INPUTS, check=check, measured=measured)


def _transformed(job: Job, model: PreTrainedModel, windows: Tensor, folder: Path) -> Path:
    """The folder of the model that the graph is built of: the base's, or `folder` if the job's transform changes it."""
    if job.parameters["transform"] == equivalence.NONE:
        return job.folder
    equivalence.apply_transform(model, windows, job.parameters["transform"])
    models.save_model(model, models.load_tokenizer(job.folder), folder)
    return folder


def grids(columns: int, group_size: int = 0) -> list[Grid]:
    """The grids that blocks hold without waste; `group_size` as in `ava`. Columns that no group divides: whole rows."""
    sizes = [size for size in GROUP_SIZES if columns % size == 0 and size >= group_size]
    sizes = (sizes[:1] if group_size else sizes) or [columns]
    return [Grid(bits, size, symmetric) for bits, symmetric in FORMS for size in sizes]


def sensitivities(
    job: Job, model: PreTrainedModel, windows: Int[Tensor, "window time"]
) -> tuple[dict[str, list[Option]], Tensor]:
    """Options of embedding and linear layers but the job's skipped ones; and the moment that embedding rows share."""
    size = job.parameters["group_size"]

    def candidates(rows: int, columns: int) -> list[Candidate]:
        return [_candidate(grid, rows, columns) for grid in grids(columns, size)]

    found = expected_rise.measure(model, windows, candidates, skipped=job.skipped, damped_by_tokens=True)
    embedding, _ = onnx_graph.tables(model)
    rows, columns = model.get_input_embeddings().weight.shape
    row = [Option(BF16, 2 * rows * columns, 0.0)]
    if job.parameters["embedding"] != BF16:
        offered = list(dict.fromkeys([*grids(columns, size), Grid(8, columns, symmetric=True)]))
        few = windows[:TABLE_WINDOWS]
        for option in embedding_rounding.options(model, few, found.moments[embedding], offered):
            held = onnx_blocks.stored_bytes(rows, columns, rounding.grid_named(option.format))
            row.append(Option(option.format, held, option.cost))
    return {embedding: row} | found.layers, found.moments[embedding]


def choose(options: Mapping[str, list[Option]], budget: int, fixed: int) -> Allocation:
    """The best allocation within the budget; raises ValueError naming the smallest folder."""
    smallest = fixed + sum(min(option.bytes for option in row) for row in options.values())
    if budget < smallest:
        raise ValueError(
            f"a budget of {budget:,} bytes is below the smallest ONNX graph and weights, {smallest:,} bytes"
        )
    return allocation.allocate(options, budget - fixed)


def round_model(
    model: PreTrainedModel, windows: Int[Tensor, "window time"], chosen: Allocation, moment: Tensor
) -> tuple[dict[str, Rounded], int]:
    """Replace, in place, what has a grid by rounded values; also how many moments needed more damping."""
    formats = {name: option.format for name, option in chosen.chosen.items() if option.format != BF16}
    embedding, _ = onnx_graph.tables(model)
    table = {}
    if embedding in formats:
        table = {embedding: embedding_rounding.apply(model, moment, rounding.grid_named(formats.pop(embedding)))}
    layers, damped = rounded_walk.apply(model, windows, formats, _round_rows)
    return table | layers, damped


def _round_rows(weight: Tensor, posed: Problem, format: str, rows: list[int]) -> list[Rounded]:
    return rounding.split(rounding.round_weight(weight, posed, rounding.grid_named(format)), rows)


def _candidate(grid: Grid, rows: int, columns: int) -> Candidate:
    def approximate(sample: Tensor, cost: Tensor) -> Tensor:
        return rounding.nearest(sample, grid, *rounding.search(sample, cost, grid))

    return Candidate(grid.name, onnx_blocks.stored_bytes(rows, columns, grid), approximate)


@torch.no_grad()
def _predictions(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Log-probabilities of every token of the windows."""
    head, softcap = quality.output_head(model)
    return quality.log_probabilities(quality.hidden_states(model, windows).flatten(0, 1), head, softcap)


def _notes(chosen: Allocation, damped: int) -> list[str]:
    """What a reader of the card should know of inputs, damping, and a budget that asks for nothing."""
    found = [f"products read {INPUTS}"]
    found += [f"{damped} second moments were singular and got more damping"] if damped else []
    if all(option.format == BF16 for option in chosen.chosen.values()):
        found.append("the budget holds the whole bf16 model: nothing was rounded, ONNX Runtime computes in float32")
    return found
