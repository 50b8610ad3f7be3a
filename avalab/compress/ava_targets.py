"""Where `ava` can put a model: a row of data a format of artefacts, with the few functions in which they differ.

| `format` | offered for a tensor, beside bf16 | artefact |
|---|---|---|
| `transformers` | grids of 2 to 8 bits; the embedding in int8 rows | a compressed-tensors checkpoint (`packed`) |
| `gguf` | GGUF's block types whose blocks divide the columns | one .gguf file, header and tokenizer in it |
| `onnx` | grids that ONNX Runtime's operators store without waste | a folder for ONNX Runtime GenAI (`onnx_graph`) |

With `embedding="packed"` a checkpoint's embedding and tied head are offered the grids of linear layers: most is won
there below 5 bits a parameter, but only `checkpoint.load_model` reads the file, transformers and vLLM refuse it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from avalab.compress import block_rounding, equivalence, rounding, sensitivity
from avalab.compress.allocation import Allocation, Option
from avalab.compress.libraries import Job
from avalab.compress.sensitivity import BF16, Sizes
from avalab.engines import checks, onnx_graph
from avalab.engines import gguf as gguf_file
from avalab.engines.checks import Check
from avalab.engines.onnx_graph import OnnxModel
from avalab.kernels import block_types, formats
from avalab.kernels.block_types import BlockRounded
from avalab.kernels.formats import Grid, Rounded
from avalab.lab.errors import InputError
from avalab.models import checkpoint, gguf_layout, packed, predict, walk
from avalab.models.packed import Packed

BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 7, 8), (32, 64, 128)

ONNX_GRIDS = ((2, False), (4, False), (4, True), (8, True))  # bits, and whether there are no zero points

ONNX_INPUTS = "int8"  # what products read: the only fast kernels for 2 and 8 bits

ALL_TYPES = (
    "q4_0",
    "iq4_nl",
    "iq4_xs",
    "iq3_s",
    "iq2_s",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
)

GGUF_TYPES = {  # read as they are written, by engine
    "any": ALL_TYPES,
    "llamacpp": ALL_TYPES,
    "torch": ALL_TYPES,
    "openvino": ("q4_0", "q8_0"),  # it rounds the minima of q4_1 to whole steps; others were not tried
}

HEADER_BYTES = 130  # of a tensor in a safetensors header, at most

ENTRY_BYTES = 8 + 4 + 2 * 8 + 4 + 8 + 32  # of a tensor in GGUF's, and up to 32 of alignment; its name comes on top

TABLE_DAMPING = 0.03  # of an embedding's moment; 0.003 and 0.01 were worse on other text

HELD_OUT = 2  # calibration windows

PACKED = "packed"

PACKED_NOTE = "the embedding is packed: avalab loads this file; transformers and vLLM need embedding='any'"

Options = Mapping[str, list[Option]]  # of every tensor


@dataclass(frozen=True)
class Work:
    """A compression under way: the job, its model as it is now, what the target prepared, and what it is checked on."""

    job: Job
    model: PreTrainedModel
    prepared: Any = None
    held_out: Int[Tensor, "window time"] | None = None
    reference: Tensor | None = None  # log-probabilities of the untouched model


@dataclass(frozen=True)
class Target:
    """A format of artefacts: which number formats it offers, what the rest of its file weighs, how it is written."""

    format: str  # of the artefact
    engines: tuple[str, ...]
    file: str  # what the budget is for
    sizes: Callable[..., Sizes]  # rows, columns, parameters; `is_table`: of embedding and head
    nearest: sensitivity.Nearest
    round: rounding.Round
    fixed_bytes: Callable[[Work, Options], int]  # that no choice changes
    notes: Callable[[Work, Options, Allocation], list[str]]
    write: Callable[[Work, Allocation, dict, dict], Any]  # ..., rounded tensors, what the card says so far
    prepare: Callable[[Job, PreTrainedModel, Path], Any] = lambda job, model, scratch: None
    whole: str = "copied, nothing was rounded"  # what a budget that bf16 fits leads to
    held_out: int = HELD_OUT
    damped_by_tokens: bool = True  # the moments of linear layers, when increases are expected
    table_damping: float = 0.0  # 0: by tokens
    tables_measured: int = 1  # formats of embedding and head whose increase is measured
    rounds_head: bool = False  # one that is not tied
    int8_rows: bool = False  # the embedding may go there


def embedding_name(model: PreTrainedModel) -> str:
    """The embedding's name among the modules."""
    return next(name for name, module in model.named_modules() if module is model.get_input_embeddings())


@torch.no_grad()
def predictions(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Log-probabilities of every token of the windows: 100 MB for 512 tokens."""
    return predict.log_probabilities(predict.hidden_states(model, windows).flatten(0, 1), *predict.output_head(model))


# --- grids: checkpoints and ONNX


def group_sizes(columns: int, group_size: int = 0) -> list[int]:
    """The groups that divide a layer's columns: all usual ones, or one.

    Asked for a group that does not divide them, a layer takes the next larger usual one that does, else whole rows.
    """
    sizes = [size for size in GROUP_SIZES if columns % size == 0 and size >= group_size]
    return (sizes[:1] if group_size else sizes) or [columns]


def grids(columns: int, group_size: int = 0) -> list[Grid]:
    """The grids of a checkpoint that divide this many columns."""
    return [Grid(bits, size) for bits in BITS for size in group_sizes(columns, group_size)]


def onnx_grids(columns: int, group_size: int = 0) -> list[Grid]:
    """The grids that ONNX Runtime's blocks hold without waste."""
    return [Grid(bits, size, symmetric) for bits, symmetric in ONNX_GRIDS for size in group_sizes(columns, group_size)]


def _packed_sizes(rows: int, columns: int, parameters: Mapping, *, is_table: bool = False) -> Sizes:
    if is_table and parameters["embedding"] != PACKED:
        return {}
    offered = grids(columns, parameters["group_size"])
    return {grid.name: packed.packed_layer_bytes(rows, columns, grid) for grid in offered}


def _onnx_sizes(rows: int, columns: int, parameters: Mapping, *, is_table: bool = False) -> Sizes:
    """Embedding and head also in 8 bits with a scale a row."""
    if is_table and parameters["embedding"] == BF16:
        return {}
    offered = onnx_grids(columns, parameters["group_size"])
    offered += [Grid(8, columns, symmetric=True)] if is_table else []
    return {grid.name: block_types.onnx_stored_bytes(rows, columns, grid) for grid in offered}


def _packed_fixed_bytes(work: Work, options: Options) -> int:
    """Norms, biases, what was skipped, and the header."""
    parameters = dict(work.model.named_parameters())
    rest = sum(p.numel() for name, p in parameters.items() if name.removesuffix(".weight") not in options)
    return 2 * rest + HEADER_BYTES * (len(parameters) + 3 * len(options))


def _packed_notes(work: Work, options: Options, chosen: Allocation) -> list[str]:
    """A packed embedding, and columns that groups do not divide."""
    notes = [PACKED_NOTE] if chosen.chosen[embedding_name(work.model)].format not in (BF16, packed.INT8_ROWS) else []
    return notes + ragged_groups(work.model, work.job.parameters["group_size"])


def ragged_groups(model: PreTrainedModel, group_size: int) -> list[str]:
    """What a card says of layers whose columns the asked group size, or no usual one, divides."""
    ragged: Counter[str] = Counter()
    for layer in walk.linear_layers(model).values():
        size = group_sizes(layer.in_features, group_size)[0]
        if (group_size or size not in GROUP_SIZES) and size != group_size:
            wanted = group_size or "a usual size"
            ragged[f"groups of {size} instead of {wanted} for {layer.in_features} columns"] += 1
    return [f"{text} in {count} layers" for text, count in ragged.items()]


def _write_packed(work: Work, chosen: Allocation, rounded: dict[str, Rounded], about: dict) -> Packed:
    name = embedding_name(work.model)
    rows = name if chosen.chosen[name].format == packed.INT8_ROWS else ""
    return packed.pack_model(work.model, rounded, int8_rows_of=rows, measured=about)


def _onnx_graph(job: Job, model: PreTrainedModel, scratch: Path) -> onnx_graph.Graph:
    """The graph that the library's builder writes of the base, or of the model that a transform made of it."""
    folder = job.folder
    if job.parameters["transform"] != equivalence.NONE:
        folder = scratch / "model"
        checkpoint.save_model(model, checkpoint.load_tokenizer(job.folder), folder)
    return onnx_graph.build_graph(folder, scratch)


def _write_onnx(work: Work, chosen: Allocation, rounded: dict[str, Rounded], about: dict) -> OnnxModel:
    blocks = {name: block_types.smallest_blocks(block_types.steps_of(part)) for name, part in rounded.items()}
    about |= {
        "measured_on": f"{work.held_out.numel()} held-out calibration tokens, in ONNX Runtime",
        "containers": onnx_graph.count_containers(blocks),
    }
    check = work.held_out, predictions(work.model, work.held_out), work.reference
    embedding = embedding_name(work.model)
    return onnx_graph.finish_model(work.prepared, blocks, embedding, inputs=ONNX_INPUTS, check=check, measured=about)


# --- GGUF


@dataclass(frozen=True)
class GgufModel:
    """A finished file in memory: its tensors, where configuration and tokenizer are, and what was measured."""

    source: Path
    rows: list[tuple[str, str, np.ndarray]]  # name, type and content of every tensor
    model: PreTrainedModel  # that the file is to be
    config: PreTrainedConfig
    measured: dict

    def save_pretrained(self, folder: Path) -> None:
        """Write the .gguf file, configuration, tokenizer and Ollama's Modelfile, and compare them with the model."""
        folder = Path(folder)
        file = folder / f"{self.source.name}.ava.gguf"
        gguf_file.write_tensors(self.source, file, self.rows, config=self.config, block=gguf_file.KEPT)
        gguf_file.copy_beside(self.source, folder, context=gguf_layout.context_of(self.config))
        check = Check({"torch": "bf16"})  # the model's values are rounded to bf16, the file's are not
        model = checks.exact(copy.deepcopy(self.model).cpu())
        tokenizer = checkpoint.load_tokenizer(self.source)
        self.measured.update(checks.compare(model, tokenizer, folder, check, name=self.source.name))


def _gguf_config(job: Job, model: PreTrainedModel, scratch: Path) -> PreTrainedConfig:
    try:
        return gguf_file.checked_config(job.folder)
    except ValueError as error:
        raise InputError(
            f"{error}; `ava` without format=gguf writes an artefact for transformers and vLLM, and `avalab export` "
            "writes the dense model for onnx, onnx-genai and openvino"
        ) from error


def _gguf_sizes(rows: int, columns: int, parameters: Mapping, *, is_table: bool = False) -> Sizes:
    types = [block_types.FORMATS[name] for name in GGUF_TYPES[parameters["engine"]]]
    fitting = [type for type in types if block_types.fits_blocks(type, columns)]
    return {type.name: block_types.gguf_stored_bytes(rows, columns, type) for type in fitting}


def _gguf_fixed_bytes(work: Work, options: Options) -> int:
    """Header and tokenizer (written once to see), entries and alignment at their most, norms and what was skipped."""
    config = work.prepared
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "header.gguf"
        gguf_file.write_tensors(work.job.folder, file, [], config=config, block=gguf_file.KEPT)
        header = file.stat().st_size
    named = dict(work.model.named_parameters())  # a head tied to the embedding is not repeated
    entries = sum(ENTRY_BYTES + len(gguf_layout.tensor_namer(config)(name)) for name in named)
    rest = [p for name, p in named.items() if name.removesuffix(".weight") not in options]
    return header + entries + sum((4 if p.ndim == 1 else 2) * p.numel() for p in rest)


def _gguf_notes(work: Work, options: Options, chosen: Allocation) -> list[str]:
    ragged = [name for name, row in options.items() if len(row) == 1]
    return [f"no block of 32 divides the columns of {', '.join(ragged)}: left in bf16"] if ragged else []


def _write_gguf(work: Work, chosen: Allocation, rounded: dict[str, BlockRounded], about: dict) -> GgufModel:
    # Where nothing was rounded, the model is copied as it was before the transform.
    model = work.model if rounded else checkpoint.load_model(work.job.folder, work.job.device)
    increases = predict.kl_divergence(work.reference, predictions(model, work.held_out))
    dense = "f16" if work.job.parameters["engine"] == "openvino" else BF16  # the one of the two that it reads
    about |= {
        "measured_kl_divergence": float(increases.mean()),
        "measured_on": f"{work.held_out.numel()} held-out calibration tokens",
        "types": {name: dense if o.format == BF16 else o.format for name, o in chosen.chosen.items()},
    }
    names, rows = gguf_layout.tensor_namer(work.prepared), []
    for name, parameter in model.named_parameters():
        part = rounded.get(name.removesuffix(".weight"))  # brings its bytes along; other vectors are float32
        kind = part.format.name if part else ("f32" if parameter.ndim == 1 else dense)
        if part:
            content = gguf_layout.in_file_order(name, part.packed(), work.prepared).numpy()
        else:
            value = gguf_layout.file_value(name, parameter.detach().cpu(), work.prepared)
            content = gguf_file.encode_tensor(value, kind)
        rows.append((names(name), kind, content))
    return GgufModel(work.job.folder, rows, model, work.prepared, about)


TARGETS: dict[str, Target] = {
    "transformers": Target(
        "compressed-tensors",
        ("torch",),
        "file",
        sizes=_packed_sizes,
        nearest=lambda weight, cost, format: rounding.round_to_nearest(weight, cost, formats.grid_named(format)),
        round=lambda weight, posed, format: rounding.round_weight(weight, posed, formats.grid_named(format)),
        fixed_bytes=_packed_fixed_bytes,
        notes=_packed_notes,
        write=_write_packed,
        held_out=0,
        damped_by_tokens=False,
        table_damping=TABLE_DAMPING,
        tables_measured=2,
        int8_rows=True,
    ),
    "gguf": Target(
        "gguf-mixed",
        gguf_file.ENGINES,
        "GGUF file",
        sizes=_gguf_sizes,
        nearest=lambda weight, cost, format: block_rounding.nearest(weight, cost, block_types.FORMATS[format]),
        round=lambda weight, posed, format: block_rounding.round_weight(weight, posed, block_types.FORMATS[format]),
        prepare=_gguf_config,
        fixed_bytes=_gguf_fixed_bytes,
        notes=_gguf_notes,
        write=_write_gguf,
        rounds_head=True,
    ),
    "onnx": Target(
        onnx_graph.FORMAT,
        onnx_graph.ENGINES,
        "ONNX graph and weights",
        sizes=_onnx_sizes,
        nearest=lambda weight, cost, format: rounding.round_to_nearest(weight, cost, formats.grid_named(format)),
        round=lambda weight, posed, format: rounding.round_weight(weight, posed, formats.grid_named(format)),
        prepare=_onnx_graph,
        fixed_bytes=lambda work, options: onnx_graph.unchosen_bytes(
            work.prepared, options, embedding=embedding_name(work.model)
        ),
        notes=lambda work, options, chosen: [f"products read {ONNX_INPUTS}"],
        write=_write_onnx,
        whole="nothing was rounded, ONNX Runtime computes in float32",
        table_damping=TABLE_DAMPING,
        tables_measured=2,
    ),
}
