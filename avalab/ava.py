"""The lab's own compressor: bits where they matter, rounding that repairs itself, one file that transformers loads.

0. If asked (`transform`), the same function in weights that are easier to round: see `equivalence`.
1. Sensitivity: one calibration pass with gradients (`expected_rise`) gives every linear layer the rise in KL divergence
   that each grid should cost; that of int8 rows for the embedding is measured.
2. Choice: `allocation` picks a grid for every layer, and int8 rows or bf16 for the embedding, under a budget of bytes.
3. Rounding: `rounded_walk` and `rounding`, block by block, each layer aiming at the original outputs.
4. Files: a compressed-tensors checkpoint (`packing`), the embedding stored once though it serves as head too.

With `embedding="packed"` embedding and tied head are candidates on the same grids (`embedding_rounding`). Below 5 bits
a parameter most is won there, but only `avalab.models.load` reads the file: transformers and vLLM refuse a packed
embedding. `embedding="any"` stays portable.

With `format="gguf"` the options are GGUF's block types instead, and the artefact is one .gguf file: see `ava_gguf`.
With `format="onnx"` they are ONNX Runtime's blocks, and the artefact is a folder for its GenAI library: see `ava_onnx`.

What it does not do: train, choose text, change norms or biases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from avalab import (
    allocation,
    ava_gguf,
    ava_onnx,
    block_rounding,
    calibration,
    embedding_rounding,
    equivalence,
    expected_rise,
    gguf_blocks,
    gguf_mixed,
    models,
    packing,
    rounded_walk,
    rounding,
)
from avalab.allocation import Allocation, Option
from avalab.compressors import Job
from avalab.engines import gguf, onnx_graph
from avalab.engines.onnx_graph import OnnxModel
from avalab.expected_rise import BF16, Candidate
from avalab.gguf_mixed import GgufModel
from avalab.packing import Packed
from avalab.rounding import Grid, Problem, Rounded

BITS = (2, 3, 4, 5, 6, 7, 8)
GROUP_SIZES = (32, 64, 128)
EMBEDDING_WINDOWS = 2  # its rise is measured, not estimated
HEADER_BYTES = 130  # of a tensor in a safetensors header, at most
DEFAULTS = {
    "bits_per_weight": 4.5,
    "bytes": 0,
    "group_size": 0,
    "embedding": "any",
    "format": "transformers",
    "engine": "any",
    "transform": equivalence.NONE,
}
PACKED = "packed"
PACKED_NOTE = "the embedding is packed: avalab loads this file; transformers and vLLM need embedding='any'"
EMBEDDINGS = ("any", BF16, PACKED)
FORMATS = {
    "transformers": ("compressed-tensors", ("torch",)),
    "gguf": ("gguf-mixed", gguf.ENGINES),
    "onnx": (onnx_graph.FORMAT, onnx_graph.ENGINES),
}
PACKED_FORMAT = "compressed-tensors-packed-embedding"  # of `transformers` where only avalab reads the file
_PARTS = (allocation, ava_gguf, block_rounding, calibration, expected_rise, gguf_blocks, gguf, gguf_mixed)
_OWN = (ava_onnx, *ava_onnx.PARTS, equivalence, packing, rounded_walk, rounding)
SOURCES = (*(Path(part.__file__) for part in (*_PARTS, *_OWN)), Path(__file__))


def compress(job: Job) -> Packed | GgufModel | OnnxModel | PreTrainedModel:
    """Compress the model of a `Job`; its parameters are those of `DEFAULTS`, `bytes` overruling `bits_per_weight`.

    A budget that the bf16 file fits gives the model as it is, with a note.
    """
    parameters, windows = job.parameters, job.calibration
    if parameters["embedding"] not in EMBEDDINGS:
        raise ValueError(f"embedding {parameters['embedding']!r} is not one of {', '.join(EMBEDDINGS)}")
    model = models.load(job.folder, job.device)
    budget = budget_bytes(models.parameter_count(model), parameters)
    if parameters["format"] != "transformers" and parameters["embedding"] == PACKED:
        raise ValueError(
            f"embedding='packed' is of the own format; {parameters['format']} rounds every embedding anyway"
        )
    if parameters["format"] == "gguf":
        return ava_gguf.compress(job, model, budget)
    if parameters["format"] == "onnx":
        return ava_onnx.compress(job, model, budget)
    if budget >= file_bytes(job.folder):
        return _unchanged(model, budget)
    equivalence.apply_transform(model, windows, parameters["transform"])
    how = {"group_size": parameters["group_size"], "skipped": job.skipped, "embedding": parameters["embedding"]}
    options, moment = _measured(model, windows, **how)
    fixed = fixed_bytes(model, options)
    chosen = choose(options, budget, fixed)
    predicted = {"predicted_kl_divergence": chosen.cost, "predicted_bytes": chosen.bytes + fixed}
    table = _packed_table(model, moment, chosen)
    layers, damped = round_model(model, windows, chosen)
    counts = dict(sorted(Counter(option.format for option in chosen.chosen.values()).items()))
    measured = predicted | {"damped_moments": damped, "formats": counts, "budget_bytes": budget}
    measured["embedding"] = chosen.chosen[_embedding(model)].format
    measured["note"] = "; ".join(([PACKED_NOTE] if table else []) + _notes(model, parameters["group_size"], damped))
    return packing.pack(model, table | layers, int8_rows_of=_int8(chosen), measured=measured)


def shipped_as(parameters: Mapping, count: int, folder: Path) -> tuple[str, tuple[str, ...]]:
    """The artefact's format and the engines that load it; `count` and `folder` are the base's parameters and files.

    Raises ValueError for an unknown format or transform.
    """
    equivalence.checked(parameters["transform"])
    if parameters["format"] not in FORMATS:
        raise ValueError(f"unknown format {parameters['format']!r}; choose one of {', '.join(FORMATS)}")
    if parameters["format"] == "transformers" and budget_bytes(count, parameters) >= file_bytes(folder):
        return BF16, ("torch",)
    format, engines = FORMATS[parameters["format"]]
    return (PACKED_FORMAT if parameters["embedding"] == PACKED else format), engines


def label(parameters: Mapping) -> str:
    """What distinguishes an artefact's name: `4.5bpw`, `114000000b-g64-bf16emb`, `4.5bpw-gguf-openvino`."""
    parts = [f"{parameters['bytes']}b" if parameters["bytes"] else f"{parameters['bits_per_weight']:g}bpw"]
    parts += [f"g{parameters['group_size']}"] if parameters["group_size"] else []
    parts += [parameters["format"]] if parameters.get("format", "transformers") != "transformers" else []
    parts += [parameters["engine"]] if parameters.get("engine", "any") != "any" else []
    parts += [parameters["transform"]] if parameters.get("transform", equivalence.NONE) != equivalence.NONE else []
    return "-".join(parts + {BF16: ["bf16emb"], PACKED: ["packedemb"]}.get(parameters["embedding"], []))


def budget_bytes(count: int, parameters: Mapping) -> int:
    """Bytes of the weight file: `bytes`, or `bits_per_weight` over all `count` parameters, embedding included.

    Raises ValueError for a budget that is not positive.
    """
    budget = int(parameters["bytes"] or parameters["bits_per_weight"] * count / 8)
    if budget <= 0:
        raise ValueError(f"a budget has to be positive, got {budget} bytes")
    return budget


def file_bytes(folder: Path) -> int:
    """Bytes of the base's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _unchanged(model: PreTrainedModel, budget: int) -> PreTrainedModel:
    note = f"the budget of {budget:,} bytes holds the whole bf16 model: copied, nothing was rounded"
    model.measured = {"budget_bytes": budget, "predicted_kl_divergence": 0.0, "note": note}
    return model


def _notes(model: PreTrainedModel, group_size: int, damped: int) -> list[str]:
    """What the card should say of columns that groups do not divide, and of damping."""
    found = [f"{damped} second moments were singular and got more damping"] if damped else []
    ragged: dict[str, int] = {}
    for layer in models.linear_layers(model).values():
        size = grids(layer.in_features, group_size)[0].group_size
        if (group_size or size not in GROUP_SIZES) and size != group_size:
            text = f"groups of {size} instead of {group_size or 'a usual size'} for {layer.in_features} columns"
            ragged[text] = ragged.get(text, 0) + 1
    return [*found, *(f"{text} in {count} layers" for text, count in ragged.items())]


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
    model: PreTrainedModel,
    windows: Int[Tensor, "window time"],
    *,
    group_size: int = 0,
    skipped: Sequence[str] = (),
    embedding: str = "any",
) -> dict[str, list[Option]]:
    """Formats of every linear layer and of the embedding with their bytes and expected rise in KL, nats a token.

    `group_size` 0 offers every usual one that divides the layer's columns; a layer that the asked one does not divide
    takes the next larger usual one that does, else whole rows. `embedding` is one of `EMBEDDINGS`.
    """
    return _measured(model, windows, group_size=group_size, skipped=skipped, embedding=embedding)[0]


def _measured(
    model: PreTrainedModel, windows: Tensor, *, group_size: int, skipped: Sequence[str], embedding: str
) -> tuple[dict[str, list[Option]], Tensor]:
    """`sensitivities`, and the moment that all rows of the embedding share."""

    def candidates(rows: int, columns: int) -> list[Candidate]:
        return [_candidate(grid, rows, columns) for grid in grids(columns, group_size)]

    found = expected_rise.measure(model, windows, candidates, skipped=skipped)
    name, few = _embedding(model), windows[:EMBEDDING_WINDOWS]
    formats = embedding_rounding.portable_options(model, few, int8=embedding != BF16)
    if embedding == PACKED:
        columns = model.get_input_embeddings().weight.shape[1]
        formats += embedding_rounding.options(model, few, found.moments[name], grids(columns, group_size))
    return {name: formats} | found.layers, found.moments[name]


def grids(columns: int, group_size: int = 0) -> list[Grid]:
    """The grids that divide this many columns."""
    sizes = [size for size in GROUP_SIZES if columns % size == 0 and size >= group_size]
    sizes = (sizes[:1] if group_size else sizes) or [columns]
    return [Grid(bits, size) for bits in BITS for size in sizes]


def _candidate(grid: Grid, rows: int, columns: int) -> Candidate:
    def approximate(sample: Tensor, cost: Tensor) -> Tensor:
        return rounding.nearest(sample, grid, *rounding.search(sample, cost, grid))

    return Candidate(grid.name, packing.stored_bytes(rows, columns, grid), approximate)


def _embedding(model: PreTrainedModel) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_input_embeddings())


def round_model(
    model: PreTrainedModel, windows: Int[Tensor, "window time"], chosen: Allocation
) -> tuple[dict[str, Rounded], int]:
    """Replace, in place, the chosen layers' weights by rounded ones; also how many moments needed more damping."""
    formats = {n: o.format for n, o in chosen.chosen.items() if o.format not in (BF16, packing.INT8_ROWS)}
    return rounded_walk.apply(model, windows, formats, _round_rows)


def _packed_table(model: PreTrainedModel, moment: Tensor, chosen: Allocation) -> dict[str, Rounded]:
    """The embedding, if a grid was chosen for it: rounded, in place, before the layers that read it."""
    name = _embedding(model)
    format = chosen.chosen[name].format
    if format in (BF16, packing.INT8_ROWS):
        return {}
    return {name: embedding_rounding.apply(model, moment, rounding.grid_named(format))}


def _round_rows(weight: Tensor, posed: Problem, format: str, rows: list[int]) -> list[Rounded]:
    return rounding.split(rounding.round_weight(weight, posed, rounding.grid_named(format)), rows)


def _int8(chosen: Allocation) -> str:
    return next((name for name, option in chosen.chosen.items() if option.format == packing.INT8_ROWS), "")
