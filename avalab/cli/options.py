"""What the sub-commands of `avalab` share: options with their help, quick refusals, and how records are printed.

Names that a user may choose from stand here as plain text, so that a wrong one is refused in a tenth of a second;
the tables that they name would import torch first. A test holds each list to its table.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from avalab.lab import artifacts, assets
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, MissingFile
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

ENGINES = ("torch", "openvino", "onnx", "llamacpp", "onnxruntime", "aot", "executorch", "vllm", "tensorrt")

CALL_MODES = ("free", "grammar", "forced")  # of avalab.measure.answers

ALL = "all"  # of these modes

TASKS = ("bfcl", "humaneval")  # of `avalab eval`, beside those of lm-evaluation-harness

MOST_NAMES = 8  # that an error lists of a folder

CHAT_MODES = ("free", "grammar")  # of avalab.serve.chat

Model = Annotated[
    str, typer.Option(help="Embedded model, folder with config.json, or hub id; '' is the profile's own.")
]

Profile = Annotated[str, typer.Option(help="Sizes of calibration and measurement: smoke, laptop, a2000 or long.")]

Seed = Annotated[int, typer.Option(help="Seed of samples, adapters and intervals.")]

AsJson = Annotated[bool, typer.Option("--json", help="Print records as JSON.")]

Mode = Annotated[str, typer.Option(help="free (any text), grammar (a call or a refusal) or forced (a call).")]

Limit = Annotated[int | None, typer.Option(min=1, help="Cases of each task (windows of text); the profile's without.")]

ModelPath = Annotated[Path, typer.Argument(help="Folder of an artefact or of any model, or a .gguf file.")]

NewFolder = Annotated[Path, typer.Option(help="Folder of the new artefact.")]


def one_of(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError for a name that is not among those known."""
    if name not in (known := tuple(known)):
        raise InputError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}{meant(name, known)}")


def known_tasks(names: str) -> list[str]:
    """The tasks of a list with commas. Raises InputError for none, and for a name that nothing here can know."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise InputError(f"no task named; give at least one of {', '.join(TASKS)}")
    others = [name for name in wanted if name not in TASKS]
    if others and find_spec("lm_eval") is None:
        raise InputError(
            f"unknown task {others[0]!r}; choose of {', '.join(TASKS)}{meant(others[0], TASKS)} (tasks of "
            'lm-evaluation-harness need its package: pip install -e ".[harness]")'
        )
    return wanted


def meant(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'gptq'?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


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
    if model in ("", EMBEDDED) or _is_artifact(model):
        return
    try:
        assets.resolve_model(model)
    except InputError as error:
        known = [name for name, asset in assets.known_assets().items() if asset.is_model]
        near = meant(Path(model).name, _models_beside(Path(model))) or meant(model, known)
        raise InputError(f"{error}{near}") from error


def there(path: Path) -> Path:
    """The path. Raises MissingFile for one that is not there, with the names that are, the closest first."""
    if path.exists():
        return path
    models = _models_beside(path)
    names = ", ".join(models[:MOST_NAMES]) or "none"
    raise MissingFile(f"no artefact at {path} (models beside it: {names}){meant(path.name, models)}")


def no_model(folder: Path) -> str:
    """What is said of a folder that holds no model."""
    names = [each.name for each in sorted(folder.iterdir()) if not each.name.startswith(".")]
    held = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "") or "nothing"
    return f"{folder} is no artefact (card.json) and no model (config.json or a .gguf file); it holds {held}"


def _models_beside(path: Path) -> list[str]:
    """Names of artefacts and models in the folder of a path, or here where there is no such folder."""
    folder = path.parent if path.parent.is_dir() else Path()
    return [each.name for each in sorted(folder.iterdir()) if _holds_model(each)]


def _holds_model(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return path.suffix == ".gguf" or any((path / name).is_file() for name in (artifacts.CARD, "config.json"))


def readable(path: Path) -> Path:
    """The path of an artefact, or of a model that can become one. Raises LabError before anything heavy is imported."""
    there(path)
    if path.is_dir() and not _is_artifact(str(path)):
        if not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
            raise InputError(no_model(path))
        assets.resolve_model(str(path))
    elif path.is_file() and path.suffix != ".gguf":
        raise InputError(f"{path} is no model; give an artefact's folder, a model's folder or a .gguf file")
    return path


def source_artifact(model: str | Path, run: Run) -> Artifact:
    """The artefact in the folder `model`, or the base artefact made of any other model; "" is the profile's own."""
    model = str(model)
    if _is_artifact(model):
        return artifacts.load_artifact(model)
    from avalab.models import checkpoint

    return checkpoint.base_artifact(replace(run, model=model))


def in_torch(artifact: Artifact, command: str) -> Artifact:
    """The artefact. Raises InputError for one that torch cannot load, naming what can."""
    engines = artifact.card.get("engines") or ["torch"]
    if "torch" not in engines:
        raise InputError(
            f"{command} answers in torch, and {artifact.name} ({artifact.format}) is for {', '.join(engines)}; give "
            f"what it was made from ({artifact.card['base']['name']}), or measure it with avalab eval or bench"
        )
    return artifact


def engine_of(artifact: Artifact) -> str:
    """The engine that measures an artefact where none is asked for: torch where it can."""
    engines = artifact.card.get("engines") or ["torch"]
    return "torch" if "torch" in engines else engines[0]


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
    if earlier := sorted({record.when for record in run.records if record.when < run.started}):
        print(f"measured before, {' to '.join(dict.fromkeys((earlier[0], earlier[-1])))}; afresh: avalab bench --again")
