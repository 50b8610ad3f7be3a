"""What the sub-commands of `avalab` share: options with their help, quick refusals, and how records are printed.

Names that a user may choose from stand here as plain text, so that a wrong one is refused in a tenth of a second;
the tables that they name would import torch first. A test holds each list to its table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from avalab.lab import artifacts, assets
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.lab.run import Run

EMBEDDED = "smollm2-135m-instruct"  # of avalab.models.checkpoint

METHODS = (  # of avalab.compress.quantize
    *("nf4", "fp4", "int8", "torchao-int8", "torchao-int8-dynamic", "torchao-int4"),
    *("rtn", "gptq", "awq", "smoothquant", "ava", "autoround", "hqq"),
    *("openvino-int4", "nncf-int4", "onnx-k-quant"),
    *("gguf-q6_k", "gguf-q5_k_m", "gguf-q4_k_m", "gguf-q3_k_m", "gguf-q2_k"),
)

SCORES = ("random", "magnitude", "wanda", "sparsegpt", "gradient", "influence")  # of avalab.compress.saliency

PATTERNS = ("unstructured", "2:4", "4:8", "heads", "kv_groups", "mlp_channels", "hidden", "layers")

POOLS = ("mean", "logits", "weighted", "cascade")  # of avalab.serve.ensemble: of distributions

VOTES = ("vote", "self-consistency", "answer-cascade")  # of answers

TRAINED = ("scales", "weights", "blocks", "torchao")  # of avalab.train.qat

TARGETS = ("online", "sampled", "topk")  # of avalab.train.distill

KINDS = (  # of examples, of avalab.data.drafts
    *("single_call", "several_candidates", "parallel_calls", "no_function"),
    *("missing_argument", "structured_output", "reasoning", "instruction"),
)

SET_MAKER = "Made by `avalab.data.synthesize`"  # of avalab.data.synthesize: in the card of a set

ENGINES = ("torch", "openvino", "onnx", "llamacpp", "onnxruntime", "aot", "executorch", "vllm", "tensorrt")

CALL_MODES = ("free", "grammar", "forced")  # of avalab.measure.answers

CHAT_MODES = ("free", "grammar")  # of avalab.serve.chat

Model = Annotated[
    str, typer.Option(help="Embedded model, folder with config.json, or hub id; '' is the profile's own.")
]

Profile = Annotated[str, typer.Option(help="Sizes of calibration and measurement: smoke, laptop, a2000 or long.")]

Seed = Annotated[int, typer.Option(help="Seed of samples, adapters and intervals.")]

AsJson = Annotated[bool, typer.Option("--json", help="Print records as JSON.")]

Mode = Annotated[str, typer.Option(help="free (any text), grammar (a call or a refusal) or forced (a call).")]

Limit = Annotated[int | None, typer.Option(min=1, help="Cases of each task (windows of text); the profile's without.")]

ArtifactFolder = Annotated[Path, typer.Argument(help="Artefact folder (it holds card.json).")]

NewFolder = Annotated[Path, typer.Option(help="Folder of the new artefact.")]


def one_of(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError for a name that is not among those known."""
    if name not in known:
        raise InputError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}")


def within(name: str, value: float | None, low: float, high: float | None = None) -> None:
    """Raise ValueError for a number that is given, and below `low` or above `high`."""
    if value is not None and not (low <= value and (high is None or value <= high)):
        raise InputError(
            f"{name} is {value}; it has to be {low} or more" + ("" if high is None else f", {high} at most")
        )


def new_folder(out: Path | None) -> None:
    """Raise ValueError for a folder that is there and no artefact: it may hold somebody's files."""
    if out and out.exists() and not (out / artifacts.CARD).is_file():
        raise InputError(f"{out} exists and is not an artefact; name a new folder")


def known_model(model: str) -> None:
    """Raise ValueError for a name that is neither an artefact, an asset, a folder with a model, nor a hub id."""
    if model not in ("", EMBEDDED) and not _is_artifact(model):
        assets.resolve_model(model)


def source_artifact(model: str, run: Run) -> Artifact:
    """The artefact in the folder `model`, or the base artefact made of any other model; "" is the profile's own."""
    if _is_artifact(model):
        return artifacts.load_artifact(model)
    from avalab.models import checkpoint

    return checkpoint.base_artifact(replace(run, model=model))


def _is_artifact(model: str) -> bool:
    return bool(model) and (Path(model) / artifacts.CARD).is_file()


def print_records(run: Run, as_json: bool) -> None:
    """One line a record, or a JSON list of them."""
    if as_json:
        print(json.dumps([asdict(r) for r in run.records], indent=1, sort_keys=True))
        return
    from avalab.report import tables

    for record in run.records:
        shown = tables.value_text(record) if record.value is not None else record.note
        print(f"{record.subject:32} {tables.metric_words(record.metric):36} {shown}")
