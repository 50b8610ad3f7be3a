"""Every way to put a number format into a model, ours and other people's: one table, one call, one artefact.

`compress_artifact(base, method, run=run, **parameters)` compresses the base by one row of `METHODS`. A model in memory
is thrown away: whoever wants a number loads the artefact back.

| method | library | what it does |
|---|---|---|
| `nf4`, `fp4` | bitsandbytes' layout | 4-bit levels, absolute maximum a block; Dettmers et al. 2023 (QLoRA) |
| `int8` | bitsandbytes | LLM.int8(): int8 rows, outlier columns in 16 bit; Dettmers et al. 2022, arXiv 2208.07339 |
| `torchao-int8`, `-int8-dynamic`, `-int4` | torchao | weights only; activations too, on the fly; 4 bits in groups |
| `rtn` | llmcompressor | round to nearest, any bits, groups or channels, symmetric or not |
| `gptq` | llmcompressor | error-compensated rounding; Frantar et al. 2023, arXiv 2210.17323 |
| `awq` | llmcompressor | activation-aware scales, then rounding; Lin et al. 2024, arXiv 2306.00978 |
| `smoothquant` | llmcompressor | 8-bit weights and activations; Xiao et al. 2023, arXiv 2211.10438 |
| `autoround` | AutoRound | rounding learnt by signed gradient steps; Cheng et al. 2024, arXiv 2309.05516 |
| `hqq` | HQQ | half-quadratic rounding without data; Badri and Shaji 2023 |
| `openvino-int4`, `nncf-int4` | NNCF | for OpenVINO: no data; AWQ and scale estimation |
| `onnx-k-quant` | ONNX Runtime | for its GenAI library: k-quants in groups of 32 |
| `gguf-q6_k` to `gguf-q2_k` | llama.cpp | its mixtures of block types, with an importance matrix |
| `ava` | this package | mixed grids under a budget of bytes, embedding too; re-scaled first if asked; see `ava` |

Before a method runs and after, `reach` says what share of the model it changes; too little is refused.

`embedding="int8"` puts int8 rows in the place of the bf16 embedding that a library leaves (`packed`, `libraries.hqq`).

A model must be saved before its first forward pass: bitsandbytes re-packs 4-bit weights for the CPU in place, and
transformers then saves the packed bytes under the plain format's name (LOG.md, 2026-11-21).
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from avalab import engines
from avalab.compress import ava, libraries, reach
from avalab.compress.libraries import Job
from avalab.data import corpora
from avalab.data.sources import mixture
from avalab.engines import llamacpp, onnx_graph
from avalab.engines import openvino as openvino_engine
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.process import quietly
from avalab.lab.run import Run
from avalab.models import checkpoint, packed, walk

LAB = 'pip install -e ".[lab]"'

HQQ = "pip install hqq==0.2.8.post1"

INT8_EMBEDDING = "int8, a scale a row"

GROUP_SIZES = (16, 32, 64, 128, 256)

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those of bitsandbytes

NUMBERS = ("threshold", "grid_points", "smoothing_strength", "iterations")  # that a label shows where not the default

CHOICES = {"compute_dtype": tuple(libraries.DTYPES), "embedding": ("bf16", "int8")}


@dataclass(frozen=True)
class Method:
    """One way to compress: the function, its parameters with defaults, what it makes, and what it needs.

    The function returns a model to be saved, or what it measured when it has filled the job's folder itself.
    """

    compress: Callable[[Job], PreTrainedModel | packed.Packed | dict]
    format: str
    defaults: dict = field(default_factory=dict)
    calibrated: bool = False
    note: str = ""  # what the library does not do on a CPU
    library: str = ""  # the module that has to be importable
    ready: Callable[[], object] = lambda: None  # raises EngineUnavailable where something else is missing
    install: str = LAB  # how to get it
    engines: tuple[str, ...] = ("torch",)
    embedding: str = "bf16"  # how the file holds it, unless a parameter says so
    skips: bool = True  # single layers can stay in bf16
    smallest_group: int = 1  # 0: one group a row
    ragged: bool = False  # a group size need not divide the columns


def compress_artifact(
    base: Artifact,
    method: str,
    *,
    run: Run,
    skip: tuple[str, ...] = (),
    out: Path | None = None,
    partial: bool = False,
    calibration: str = "docs",
    **parameters,
) -> Artifact:
    """Compress `base` by `method` into the folder `out`, or one below `run.artifacts_dir` named after the recipe.

    An artefact of the same recipe and base is reused. `calibration` is one of `CALIBRATIONS`, the same for all methods
    that read text. `skip` holds names or globs of linear layers that stay in bf16.
    Raises ValueError for an unknown method or parameter, a group size that does not divide the columns, a glob that
    matches nothing, a base that is compressed already, a family of whose blocks the method reaches less than half
    (`partial`: less than that will do, see `reach`), or an `out` that holds something else; EngineUnavailable without
    the method's library.
    """
    if base.format != "bf16":
        raise InputError(f"{base.name} is in format {base.format!r}; only bf16 artefacts can be compressed")
    row, parameters = checked_method(method, parameters)
    text = checked_calibration(row, method, calibration)
    if skip and not row.skips:
        raise InputError(f"method {method!r} keeps no single layer in bf16; leave out skip")
    skeleton = checkpoint.skeleton(base.path)
    layers = walk.linear_layers(skeleton)
    if row.skips:
        reach.refuse_unreachable(skeleton, layers, method, partial=partial, remedy="--partial compresses those alone")
    skipped = _expand(skip, list(layers))
    if not row.ragged:
        _refuse_ragged_groups(row, parameters, {n: m.in_features for n, m in layers.items() if n not in skipped})
    # The code's hash: an artefact that an older version of it made is made again, not trusted.
    step = {"step": method, **parameters, "skip": skipped, "code": _code(row, text)}
    if row.calibrated:
        step |= {"seed": run.seed, "calibration": [run.profile.calibration_samples, run.profile.calibration_tokens]}
        step |= {"calibration_text": calibration} if calibration != "docs" else {}
    format, loaded_by = row.format, row.engines
    if row.compress is ava.compress_model:
        format, loaded_by = ava.format_and_engines(parameters)
        ava.checked_budget(Job(base.path, run.device, parameters, skipped, None), skeleton)

    def calibration_windows() -> Tensor | None:
        if not row.calibrated:
            return None
        return mixture.mixed_windows(run, base) if calibration == "mix" else text(run, checkpoint.load_tokenizer(base))

    def fill(folder: Path) -> dict:
        row.ready()
        if row.library and importlib.util.find_spec(row.library) is None:
            raise engines.EngineUnavailable(f"{method} needs the package {row.library}; install it: {row.install}")
        job = Job(base.path, run.device, parameters, skipped, calibration_windows(), method, run.seed, folder)
        return _fill(row, job) | reach.of_artifact(base.path, folder)

    label = method_label(method, parameters, skipped) + (f"-{calibration}" if calibration != "docs" else "")
    return artifacts.make_artifact(
        artifacts.checked_target(out) or run.artifacts_dir / f"{base.name}+{label}",
        fill,
        base=base,
        step=step,
        format=format,
        engines=loaded_by,
    )


def record_compression(run: Run, subject: str, artifact: Artifact) -> None:
    """Append `compress_seconds` with the recipe; an artefact that nothing compressed says so."""
    measured, recipe = artifact.card["measured"], artifact.card["recipe"]
    run.record(
        subject,
        "compress_seconds",
        measured.get("compress_seconds"),
        "s",
        n=1,
        note=measured.get("note") or ("" if "compress_seconds" in measured else "the base itself: nothing to compress"),
        artifact_sha256=artifact.sha256,
        details={"recipe": recipe, **measured},
    )


def method_label(method: str, parameters: dict, skipped: list[str] | tuple[str, ...] = ()) -> str:
    """The method's name with what its parameters change: `gptq-w4g64-asym`, `nf4-dq`, `int8-keep30.1f9c`.

    Recipes that differ have names that differ; the suffix of `keep` is a hash of the layers' names.
    """
    kept = [f"keep{len(skipped)}.{artifacts.sha256_of_text(','.join(skipped))[:4]}"] if skipped else []
    if "bits_per_weight" in parameters:
        return "-".join([method, ava.budget_label(parameters), *kept])
    parts = [method]
    if "bits" in parameters:
        group = parameters["group_size"]
        parts.append(f"w{parameters['bits']}" + (f"g{group}" if group else "ch"))
        parts += ["sym" if parameters["symmetric"] else "asym"] if "symmetric" in parameters else []
    elif "group_size" in parameters:
        parts.append(f"g{parameters['group_size']}")
    parts += ["int8emb"] if parameters.get("embedding", "bf16") == "int8" else []
    parts += ["dq"] if parameters.get("double_quantization") else []
    parts += [f"b{parameters['block_size']}"] if parameters.get("block_size", 64) != 64 else []
    parts += [parameters["compute_dtype"]] if parameters.get("compute_dtype", "bfloat16") != "bfloat16" else []
    parts += ["w8a8-static" if parameters["static"] else "w8a8-dynamic"] if "static" in parameters else []
    defaults = METHODS[method].defaults
    parts += [f"{n}{parameters[n]:g}" for n in NUMBERS if parameters.get(n, defaults.get(n)) != defaults.get(n)]
    return "-".join(parts + kept)


def checked_method(method: str, parameters: dict) -> tuple[Method, dict]:
    """The method's row and its parameters merged with the defaults; ValueError for what it does not know."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    row = METHODS[method]
    unknown = sorted(set(parameters) - set(row.defaults))
    if unknown:
        allowed = ", ".join(row.defaults) or "none"
        raise InputError(f"method {method!r} has no parameter {', '.join(unknown)}; it has: {allowed}, skip")
    merged = {**row.defaults, **parameters}
    for name, allowed in CHOICES.items():
        if method != "ava" and merged.get(name, allowed[0]) not in allowed:
            raise InputError(f"{name} {merged[name]!r} is not one of {', '.join(allowed)}")
    if parameters.get("bytes") and parameters.get("bits_per_weight"):
        raise InputError("bytes and bits_per_weight are two budgets for one file; give one of them")
    if not 2 <= merged.get("bits", 8) <= 8:
        raise InputError(f"bits {merged['bits']} is not one of 2 to 8")
    known = libraries.KNOWN_BITS.get(method)
    if known and merged["bits"] not in known:
        raise InputError(f"{method} has no {merged['bits']} bits; choose one of {', '.join(map(str, known))}")
    for name in ("group_size", "block_size"):
        if merged.get(name, row.smallest_group) < row.smallest_group:
            raise InputError(f"{name} {merged[name]} of {method!r} is below {row.smallest_group}")
    return row, merged


CALIBRATIONS = {  # what is read: Python's documentation, or many kinds of text
    "docs": corpora.calibration_windows,
    "mix": mixture.mixed_windows,
}


def checked_calibration(row: Method, method: str, calibration: str) -> Callable:
    """The function that gives calibration text. Raises ValueError for an unknown one, or a method that reads none."""
    if calibration not in CALIBRATIONS:
        raise InputError(f"no calibration text {calibration!r}; choose one of {', '.join(CALIBRATIONS)}")
    if calibration != "docs" and not row.calibrated:
        raise InputError(f"{method} reads no calibration text; leave out calibration {calibration!r}")
    return CALIBRATIONS[calibration]


def _code(row: Method, text: Callable) -> str:
    return code_of(_fill, row.compress, *([text] if row.calibrated else []))[:12]


def _expand(globs: tuple[str, ...], names: list[str]) -> list[str]:
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise InputError(f"skip {glob!r} matches no linear layer; names look like {names[0]}, {names[-1]}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def _refuse_ragged_groups(row: Method, parameters: dict, columns: dict[str, int]) -> None:
    # bitsandbytes' blocks may run on into the next row, but its CPU kernels refuse such blocks at the first call.
    group = parameters.get("group_size") or parameters.get("block_size")
    if not group:
        return
    usual = BLOCK_SIZES if "block_size" in parameters else GROUP_SIZES
    fits = [str(size) for size in usual if all(count % size == 0 for count in columns.values())]
    advice = f"sizes that fit every layer: {', '.join(fits) or 'none'}"
    advice += "" if row.smallest_group else ", or 0 for one group a row"
    for name, count in columns.items():
        if count % group:
            raise InputError(f"a group of {group} does not divide the {count} columns of {name}; {advice}")
    if "block_size" in parameters and group not in BLOCK_SIZES:
        raise InputError(f"bitsandbytes has no blocks of {group}; {advice}")


def _fill(row: Method, job: Job) -> dict:
    """Let the method fill the job's folder; what was measured, seconds included, also those of parts made earlier."""
    start = time.perf_counter()
    with quietly():
        made = row.compress(job)
        if not isinstance(made, dict):
            made.save_pretrained(job.out)  # before any forward pass, see the module
            checkpoint.load_tokenizer(job.folder).save_pretrained(job.out)
            if job.parameters.get("embedding") == "int8":
                packed.replace_embedding(job.out)
    measured = made if isinstance(made, dict) else getattr(made, "measured", {})
    return {
        "compress_seconds": time.perf_counter() - start + measured.get("reused_seconds", 0.0),
        "calibration_tokens": job.calibration.numel() if job.calibration is not None else 0,
        "note": row.note if job.device == "cpu" else "",
    } | measured


_GROUPS = {"bits": 4, "group_size": 64}

_WEIGHTS = {**_GROUPS, "symmetric": False, "embedding": "bf16"}

_NF4 = Method(
    libraries.bitsandbytes_4bit,
    "bitsandbytes",
    {"double_quantization": False, "block_size": 64, "compute_dtype": "bfloat16"},
    library="bitsandbytes",
)

_TORCHAO = Method(libraries.torchao, "torchao", library="torchao")

_GPTQ = Method(
    libraries.llmcompressor,
    "compressed-tensors",
    _WEIGHTS,
    calibrated=True,
    library="llmcompressor",
    smallest_group=0,
)

_NNCF = Method(
    libraries.nncf_int4,
    "openvino-int4",
    calibrated=True,
    library="nncf",
    install=openvino_engine.INSTALL,
    engines=("openvino",),
    embedding=INT8_EMBEDDING,
    skips=False,
)

_LLAMA_CPP = Method(
    libraries.llama_cpp,
    "gguf",
    calibrated=True,
    ready=llamacpp.require_quantiser,
    engines=llamacpp.READ_BY,
    embedding="the mixture's choice",
    skips=False,
)

METHODS: dict[str, Method] = {
    "nf4": _NF4,
    "fp4": _NF4,
    "int8": replace(_NF4, compress=libraries.bitsandbytes_8bit, defaults={"threshold": 6.0}),
    "torchao-int8": _TORCHAO,
    "torchao-int8-dynamic": _TORCHAO,
    "torchao-int4": replace(
        _TORCHAO,
        defaults={"group_size": 64},
        note="torchao packs 4-bit codes only on a GPU: on a CPU each takes a byte",
    ),
    "rtn": replace(_GPTQ, calibrated=False),
    "gptq": _GPTQ,
    "awq": replace(_GPTQ, defaults={**_WEIGHTS, "grid_points": 10}),
    "smoothquant": replace(_GPTQ, defaults={"smoothing_strength": 0.5, "static": True}),
    "ava": Method(
        ava.compress_model, "compressed-tensors", ava.DEFAULTS, calibrated=True, smallest_group=0, ragged=True
    ),  # `ava` takes the next larger group that divides; 0 is its own choice
    "autoround": Method(
        libraries.autoround,
        "compressed-tensors",
        {**_GROUPS, "iterations": 50, "embedding": "bf16"},  # a quarter of the library's iterations
        calibrated=True,
        library="auto_round",
    ),
    "hqq": Method(
        libraries.hqq, "hqq", {**_GROUPS, "embedding": "bf16"}, library="hqq", install=HQQ, ragged=True
    ),  # its groups run on over the end of a row
    "openvino-int4": replace(_NNCF, compress=libraries.openvino_int4, calibrated=False),
    "nncf-int4": _NNCF,
    "onnx-k-quant": Method(
        libraries.onnx_k_quant,
        "onnx-int4",
        library="onnxruntime_genai",
        install=onnx_graph.INSTALL,
        engines=("onnx",),
        embedding="int4 in groups of 32",
        skips=False,
    ),
    **{f"{libraries.GGUF}{mixture}": _LLAMA_CPP for mixture in llamacpp.MIXTURES},
}
