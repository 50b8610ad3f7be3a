"""What the sub-commands of `avalab` share: options with their help, quick refusals, and how records are printed.

Names that a user may choose from stand here as plain text, so that a wrong one is refused in a tenth of a second;
the tables that they name would import torch first. A test holds each list to its table.
"""

from __future__ import annotations

import atexit
import difflib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Annotated

import typer

from avalab.lab import artifacts, assets
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, MissingFile
from avalab.lab.run import Run, as_path

EMBEDDED = "smollm2-135m-instruct"  # of avalab.models.checkpoint

_GROUPS = ("bits", "group_size")

_WEIGHTS = (*_GROUPS, "symmetric", "embedding")

_LEVELS = ("double_quantization", "block_size", "compute_dtype")

METHODS: dict[str, tuple[str, ...]] = {  # of avalab.compress.quantize, with the parameters of each
    **dict.fromkeys(("nf4", "fp4"), _LEVELS),
    "int8": ("threshold",),
    "torchao-int8": (),
    "torchao-int8-dynamic": (),
    "torchao-int4": ("group_size",),
    **dict.fromkeys(("rtn", "gptq"), _WEIGHTS),
    "awq": (*_WEIGHTS, "grid_points"),
    "smoothquant": ("smoothing_strength", "static"),
    "ava": ("bits_per_weight", "bytes", "group_size", "embedding", "format", "engine", "transform"),
    "autoround": (*_GROUPS, "iterations", "embedding"),
    "hqq": (*_GROUPS, "embedding"),
    **dict.fromkeys(("openvino-int4", "nncf-int4", "onnx-k-quant"), ()),
    **{f"gguf-{mixture}": () for mixture in ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")},
}

CHOICES = {  # of parameters; of `ava` in its own module
    "compute_dtype": ("bfloat16", "float16", "float32"),
    "embedding": ("bf16", "int8"),
}

AVA_CHOICES = {
    "format": ("transformers", "gguf", "onnx"),
    "embedding": ("any", "bf16", "packed"),
    "engine": ("any", "llamacpp", "torch", "openvino"),
    "transform": ("none", "scale", "rotate", "scale+rotate"),
}

SCORES = ("random", "magnitude", "wanda", "sparsegpt", "gradient", "influence")  # of avalab.compress.saliency

PATTERNS = ("unstructured", "2:4", "4:8", "heads", "kv_groups", "mlp_channels", "hidden", "layers")

POOLS = ("mean", "logits", "weighted", "cascade")  # of avalab.serve.ensemble: of distributions

VOTES = ("vote", "self-consistency", "answer-cascade")  # of answers

KINDS = (  # of examples, of avalab.data.drafts
    *("single_call", "several_candidates", "parallel_calls", "no_function"),
    *("missing_argument", "structured_output", "reasoning", "instruction", "multi_turn"),
)

SOURCES = ("botocore", "azure-cli", "home-assistant", "nestful", "ansible")  # of avalab.data.sources

SAYS_ALL = ("home-assistant", "nestful")  # sources whose own sentences state every value

SET_MAKER = "Made by `avalab.data.synthesize`"  # of avalab.data.synthesize: in the card of a set

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

Force = Annotated[bool, typer.Option("--force", help="Replace another artefact that is in --out.")]


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
    near = difflib.get_close_matches(name, [other for other in known if other != name], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def within(name: str, value: float | None, low: float, high: float | None = None) -> None:
    """Raise ValueError for a number that is given, and below `low` or above `high`."""
    if value is not None and not (low <= value and (high is None or value <= high)):
        raise InputError(
            f"{name} is {value}; it has to be {low} or more" + ("" if high is None else f", {high} at most")
        )


def known_parameters(method: str, given: dict) -> None:
    """Raise ValueError for a parameter that the method does not have, or a value that it does not know."""
    if unknown := [name for name in given if name not in METHODS[method]]:
        has = ", ".join((*METHODS[method], "skip"))
        raise InputError(f"method {method!r} has no parameter {', '.join(unknown)}; it has: {has}")
    for name, known in (AVA_CHOICES if method == "ava" else CHOICES).items():
        if name in given:
            one_of(name, given[name], known)
    if given.get("bytes") and given.get("bits_per_weight"):
        raise InputError("--bytes and --bits-per-weight are two budgets for one file; give one of them")


def matrices(run: Run) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's weight matrices by name, from headers alone; nothing where they cannot be told yet."""
    from safetensors import SafetensorError, safe_open

    own = as_path(run.model)
    folder = own if own.is_dir() else run.artifacts_dir / run.name_of_model
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (a file is no dict)
                found |= {name: tuple(part.get_shape()) for name, part in slices.items()}
        except (OSError, SafetensorError):  # named by whoever loads the model
            return {}
    return {name: shape for name, shape in found.items() if len(shape) > 1}


def possible_groups(run: Run, method: str, size: int, skip: list[str]) -> None:
    """Raise ValueError for a group size that does not divide the columns of a layer that is not skipped."""
    for name, (*_, columns) in matrices(run).items():
        layer = name.removesuffix(".weight")
        if ".layers." in name and columns % size and not any(fnmatchcase(layer, glob) for glob in skip):
            raise InputError(
                f"a group of {size} does not divide the {columns} columns of {layer}; {method} needs one that does"
            )


def possible_skips(run: Run, globs: list[str]) -> None:
    """Raise ValueError for a glob that none of the layers fits, by the headers."""
    names = [name.removesuffix(".weight") for name in matrices(run) if ".layers." in name]
    for glob in globs:
        if names and not any(fnmatchcase(name, glob) for name in names):
            raise InputError(f"skip {glob!r} matches no linear layer; names look like {names[0]}, {names[-1]}")


def possible_budget(run: Run, budget: int, format: str = "") -> None:
    """Raise ValueError for a budget that no 2-bit file keeps, however it is made, or that the model keeps as it is."""
    count = sum(prod(shape) for shape in matrices(run).values())
    whole = 2 * count
    if count and format != "onnx" and budget > 1.05 * whole:  # vectors and headers are less than the rest
        raise InputError(
            f"{run.model} has about {whole / 1e6:.1f} MB in bf16, within the budget of {budget / 1e6:.1f} MB: nothing "
            "to compress; give a smaller budget"
        )
    if budget < count // 4:
        raise InputError(
            f"a budget of {budget:,} bytes is below 2 bits for each of the {count:,} weights of {run.model}, "
            f"{count // 4:,} bytes"
        )


def new_folder(
    out: Path | None,
    *sources: str | Path | None,
    force: bool = False,
    made_by: dict | None = None,
    base: str = "",
) -> None:
    """Raise ValueError for a folder that may not be written: somebody's files, one of the sources, another artefact.

    `made_by` is the step, as far as it is known, that would be found again or replaced, and `base` the name of what it
    is applied to; without them that is left to `artifacts.make_artifact`. `force` sets another artefact aside, and
    deletes it once the new one is there.
    """
    if not out:
        return
    artifacts.checked_target(out)
    for source in filter(None, sources):
        if as_path(str(source)).resolve() == out.resolve():
            raise InputError(f"--out {out} is the model that is read; name another folder")
    if force and (out / artifacts.CARD).is_file():
        aside = out.resolve().with_name(f".replaced-{out.name}-{os.getpid()}")
        out.rename(aside)
        atexit.register(_settle, aside, out.resolve())
    elif made_by:
        artifacts.refuse_replacing(out, base, made_by)


def _settle(aside: Path, out: Path) -> None:
    """Delete what was set aside if a new folder took its place, else put it back."""
    if out.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        aside.rename(out)


def known_model(model: str) -> None:
    """Raise ValueError for a name that is neither an artefact, an asset, a folder with a model, nor a hub id."""
    if model in ("", EMBEDDED) or is_artifact(model):
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
    if path.is_dir() and not is_artifact(str(path)):
        if not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
            raise InputError(no_model(path))
        assets.resolve_model(str(path))
    elif path.is_file() and path.suffix != ".gguf":
        raise InputError(f"{path} is no model; give an artefact's folder, a model's folder or a .gguf file")
    return path


def source_artifact(model: str | Path, run: Run) -> Artifact:
    """The artefact in the folder `model`, or the base artefact made of any other model; "" is the profile's own."""
    model = str(model)
    if is_artifact(model):
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


def is_artifact(model: str) -> bool:
    """Whether a model is named by the folder of an artefact."""
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
