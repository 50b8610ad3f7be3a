"""The lab's own compressor: bits where they matter, rounding that repairs itself, in a file of the engine's own format.

The outline is the same wherever the model goes; a row of `TARGETS` says what differs.

0. If asked (`transform`), the same function in weights that are easier to round: see `equivalence`.
1. Sensitivity: one calibration pass with gradients gives every linear layer the increase of the KL divergence that each
   of the target's number formats should cost; for embedding and head it is measured (`sensitivity`).
2. Choice: `allocation` picks a format for every tensor, or bf16, under a budget for the whole file or folder.
3. Rounding: embedding and head first, then block by block, each layer aiming at the original outputs (`rounding`).
4. Writing. For targets that hold out the last calibration windows, the finished model is measured on them.

Norms and biases stay as they are, and an untied head outside of GGUF.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from avalab.compress import allocation, ava_targets, equivalence, rounding, sensitivity
from avalab.compress.allocation import Allocation, Option
from avalab.compress.ava_targets import HELD_OUT, PACKED, TARGETS, GgufModel, Target, Work
from avalab.compress.libraries import Job
from avalab.compress.rounding import Problem
from avalab.compress.sensitivity import BF16
from avalab.engines import onnx_graph
from avalab.engines.onnx_graph import OnnxModel
from avalab.lab import artifacts, cache
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import artifacts_root, write_atomically
from avalab.models import checkpoint, packed, predict, walk
from avalab.models.packed import Packed

DEFAULTS = {
    "bits_per_weight": 4.5,
    "bytes": 0,
    "group_size": 0,
    "embedding": "any",
    "format": "transformers",
    "engine": "any",
    "transform": equivalence.NONE,
}

BUDGET = ("bits_per_weight", "bytes")

PACKED_FORMAT = "compressed-tensors-packed-embedding"  # where only avalab reads the file

EMBEDDINGS = ("any", BF16, PACKED)


@dataclass(frozen=True)
class Sensitivities:
    """Options of every tensor, the problems of embedding and head where they can be rounded, and what it took."""

    options: dict[str, list[Option]]
    tables: dict[str, Problem]
    seconds: float
    reused: bool = False  # found earlier, by this process or another one


def compress_model(job: Job) -> Packed | GgufModel | OnnxModel:
    """Compress the model of a `Job`; its parameters are those of `DEFAULTS`, `bytes` overruling `bits_per_weight`.

    Raises ValueError for a budget below the smallest file or one that holds the model as it is, or a model family that
    the target has no graph or names for (it says which exports remain).
    """
    target, parameters = checked_target(job.parameters), job.parameters
    model = checkpoint.load_model(job.folder, job.device)
    budget = checked_budget(job, model)
    windows, held_out = split_windows(job.calibration, target.held_out)
    reference = ava_targets.predictions(model, held_out) if target.held_out else None
    equivalence.apply_transform(model, windows, parameters["transform"])
    with TemporaryDirectory() as scratch:
        work = Work(job, model, target.prepare(job, model, Path(scratch)), held_out, reference)
        found = sensitivities(job, model)
        fixed = target.fixed_bytes(work, found.options)
        chosen = allocation.allocate_formats(found.options, budget, fixed_bytes=fixed, file=target.file)
        about = {
            "budget_bytes": budget,
            "predicted_bytes": chosen.bytes + fixed,
            "predicted_kl_divergence": chosen.cost,
            "sensitivity_seconds": found.seconds,
            "reused_seconds": found.seconds if found.reused else 0.0,
            "formats": dict(sorted(Counter(option.format for option in chosen.chosen.values()).items())),
            "embedding": chosen.chosen[ava_targets.embedding_name(model)].format,
        }
        formats = {n: o.format for n, o in chosen.chosen.items() if o.format not in (BF16, packed.INT8_ROWS)}
        rounded, damped = rounding.round_model(model, windows, formats, target.round, tables=found.tables)
        notes = target.notes(work, found.options, chosen)
        if damped:
            notes.append(f"{damped} second moments were singular and got more damping")
        if about["formats"].keys() == {BF16}:
            notes.append(f"the budget holds the whole bf16 model: {target.whole}")
        return target.write(work, chosen, rounded, about | {"damped_moments": damped, "note": "; ".join(notes)})


def sensitivities(job: Job, model: PreTrainedModel | None = None) -> Sensitivities:
    """Options of every tensor with their bytes and expected increase of the KL divergence, nats a token.

    `model` is that of the job with its transform applied, and is left as it was; without one it is loaded. The result
    is kept on disk under all that it depends on (everything but the budget), so that many budgets need one pass, and a
    compression that was stopped goes on behind it.
    """
    target, parameters = TARGETS[job.parameters["format"]], job.parameters
    windows, _ = split_windows(job.calibration, target.held_out)
    files = [artifacts.sha256_of(file) for file in sorted(job.folder.glob("*.safetensors"))]
    others = sorted((name, value) for name, value in parameters.items() if name not in BUDGET)
    key = json.dumps([files, predict.windows_sha256(windows), others, job.device, list(job.skipped)])
    parts = artifacts.sha256_of_text(key), code_of(sensitivities)
    path = cache.cache_path(artifacts_root() / "cache", "sensitivities", *parts, suffix=".json")
    found = _read_sensitivities(path, job.device)
    if found is None:
        if model is None:
            model = checkpoint.load_model(job.folder, job.device)
            equivalence.apply_transform(model, windows, parameters["transform"])
        start = time.perf_counter()
        layers = {name: layer for name, layer in walk.linear_layers(model).items() if name not in job.skipped}
        embedding = ava_targets.embedding_name(model)
        sizes = {name: target.sizes(*layer.weight.shape, parameters) for name, layer in layers.items()}
        expected = sensitivity.expected_increases(
            model, windows, sizes, target.nearest, damped_by_tokens=target.damped_by_tokens
        )
        options, problems = {}, {}
        for name in expected.moments if target.rounds_head else [embedding]:
            options[name], posed = sensitivity.table_options(
                model,
                windows,
                name,
                expected,
                sizes=target.sizes(*model.get_submodule(name).weight.shape, parameters, is_table=True),
                round=target.round,
                measured=target.tables_measured,
                damping=target.table_damping,
                int8_rows=target.int8_rows and parameters["embedding"] != BF16,
            )
            problems |= {name: posed} if posed else {}
        found = Sensitivities(options | expected.layers, problems, time.perf_counter() - start)
        _write_sensitivities(found, path)
    return found


def _write_sensitivities(found: Sensitivities, path: Path) -> None:
    """Tensors beside the document, which comes last: without it nothing is kept."""
    tensors = {f"{name} {f}": getattr(posed, f) for name, posed in found.tables.items() for f in PROBLEM_TENSORS}
    cache.save_tensors(tensors, path.with_suffix(".safetensors"))
    document = {
        "options": {name: [asdict(option) for option in row] for name, row in found.options.items()},
        "attempts": {name: posed.attempts for name, posed in found.tables.items()},
        "seconds": found.seconds,
    }
    write_atomically(path, json.dumps(document))


def _read_sensitivities(path: Path, device: str) -> Sensitivities | None:
    """What was kept; None where there is nothing, or it is damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    tensors = cache.load_tensors(path.with_suffix(".safetensors"))
    if tensors is None:
        return None
    tables = {
        name: Problem(**{f: tensors[f"{name} {f}"].to(device) for f in PROBLEM_TENSORS}, attempts=attempts)
        for name, attempts in known["attempts"].items()
    }
    options = {name: [Option(**option) for option in row] for name, row in known["options"].items()}
    return Sensitivities(options, tables, known["seconds"], reused=True)


PROBLEM_TENSORS = ("moment", "factor", "order")


def budget_curve(job: Job, found: Sensitivities, *, steps: int = 30) -> list[tuple[int, Allocation]]:
    """The best allocation for budgets from the smallest file's to bf16's in equal steps, each with its file's bytes."""
    target, model = TARGETS[job.parameters["format"]], checkpoint.load_model(job.folder)
    with TemporaryDirectory() as scratch:
        work = Work(job, model, target.prepare(job, model, Path(scratch)))
        fixed = target.fixed_bytes(work, found.options)
    least, most = (fixed + sum(end(o.bytes for o in row) for row in found.options.values()) for end in (min, max))
    budgets = [round(least + (most - least) * step / steps) for step in range(steps + 1)]
    best = [allocation.allocate_formats(found.options, budget, fixed_bytes=fixed) for budget in budgets]
    return [(one.bytes + fixed, one) for one in best]


def split_windows(windows: Int[Tensor, "window time"], held_out: int = HELD_OUT) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on, and the last ones to measure on; a single one serves for both."""
    kept = min(held_out, len(windows) // 2)
    if kept or not held_out:
        return windows[: len(windows) - kept], windows[len(windows) - kept :]
    return windows, windows


def checked_target(parameters: Mapping) -> Target:
    """The row of `TARGETS`; raises ValueError for an unknown format, transform, embedding or, in GGUF, engine."""
    equivalence.checked_transform(parameters["transform"])
    format, embedding = parameters["format"], parameters["embedding"]
    if format not in TARGETS:
        raise InputError(f"unknown format {format!r}; choose one of {', '.join(TARGETS)}")
    if embedding not in EMBEDDINGS:
        raise InputError(f"embedding {embedding!r} is not one of {', '.join(EMBEDDINGS)}")
    if embedding == PACKED and format != "transformers":
        raise InputError(f"embedding='packed' is of the own format; {format} rounds every embedding anyway")
    engine, engines = parameters["engine"], ava_targets.GGUF_TYPES
    if format == "gguf" and engine not in engines:
        raise InputError(f"no list of GGUF types for engine {engine!r}; choose one of {', '.join(engines)}")
    if format != "gguf" and engine != DEFAULTS["engine"]:
        raise InputError(f"engine {engine!r} chooses among GGUF types; it needs format=gguf, not {format}")
    if format == "gguf" and (embedding == BF16 or parameters["group_size"]):
        ignored = "embedding=bf16" if embedding == BF16 else f"group_size {parameters['group_size']}"
        raise InputError(f"{ignored} is not of format=gguf, whose block types have groups of their own; leave it out")
    return TARGETS[format]


def format_and_engines(parameters: Mapping) -> tuple[str, tuple[str, ...]]:
    """The artefact's format and the engines that load it. Raises ValueError as `checked_target` does."""
    target = checked_target(parameters)
    named = ("openvino",) if parameters["format"] == "gguf" and parameters["engine"] == "openvino" else ()
    return (PACKED_FORMAT if parameters["embedding"] == PACKED else target.format), (*named, *target.engines)


def checked_budget(job: Job, model: PreTrainedModel) -> int:
    """The budget in bytes; of the model only names and shapes are read.

    Raises ValueError for one below the smallest file (of an ONNX graph: of its weights), or in which the whole model
    fits as it is.
    """
    target, budget = checked_target(job.parameters), budget_bytes(checkpoint.parameter_count(model), job.parameters)
    equivalence.refuse_unknown(model, job.parameters["transform"])
    options, fixed = sized_options(job, model), 0
    if target.format != onnx_graph.FORMAT:  # whose graph takes a minute to build
        with TemporaryDirectory() as scratch:
            fixed = target.fixed_bytes(Work(job, model, target.prepare(job, model, Path(scratch))), options)
    allocation.refuse_budget(options, budget, fixed_bytes=fixed, file=target.file)
    whole = sum(file.stat().st_size for file in job.folder.glob("*.safetensors"))
    if budget >= whole:
        raise InputError(
            f"{job.folder.name} has {whole / 1e6:.1f} MB in bf16, within the budget of {budget / 1e6:.1f} MB: nothing "
            "to compress; give a smaller budget"
        )
    return budget


def sized_options(job: Job, model: PreTrainedModel) -> dict[str, list[Option]]:
    """Every tensor's formats with their bytes; what they cost is not known yet."""
    target, parameters = TARGETS[job.parameters["format"]], job.parameters
    layers = {name: layer for name, layer in walk.linear_layers(model).items() if name not in job.skipped}
    found = {name: target.sizes(*layer.weight.shape, parameters) for name, layer in layers.items()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is embedding or (module is head and target.rounds_head and head.weight is not embedding.weight):
            found[name] = target.sizes(*module.weight.shape, parameters, is_table=True)
            if target.int8_rows and parameters["embedding"] != BF16:
                found[name][packed.INT8_ROWS] = packed.int8_rows_bytes(module.weight, tied=head.weight is module.weight)
    for name, row in found.items():
        found[name] = {BF16: 2 * model.get_submodule(name).weight.numel(), **row}
    return {name: [Option(format, size, 0.0) for format, size in row.items()] for name, row in found.items()}


def budget_label(parameters: Mapping) -> str:
    """What distinguishes an artefact's name: `4.5bpw`, `114000000b-g64-bf16emb`, `4.5bpw-gguf-openvino`."""
    parts = [f"{parameters['bytes']}b" if parameters["bytes"] else f"{parameters['bits_per_weight']:g}bpw"]
    parts += [f"g{parameters['group_size']}"] if parameters["group_size"] else []
    usual = (("format", "transformers"), ("engine", "any"), ("transform", equivalence.NONE))
    parts += [parameters[name] for name, default in usual if parameters.get(name, default) != default]
    return "-".join(parts + {BF16: ["bf16emb"], PACKED: ["packedemb"]}.get(parameters["embedding"], []))


def budget_bytes(count: int, parameters: Mapping) -> int:
    """Bytes of the weight file: `bytes`, or `bits_per_weight` over all `count` parameters, embedding included.

    Raises ValueError for a budget that is not positive.
    """
    budget = int(parameters["bytes"] or parameters["bits_per_weight"] * count / 8)
    if budget <= 0:
        raise InputError(f"a budget has to be positive, got {budget} bytes")
    return budget
