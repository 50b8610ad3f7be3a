"""Put a number format into a model: one call, one artefact.

`write(base, method, run=run, **parameters)` compresses the base artefact by one row of `METHODS` and returns the new
artefact. The model in memory is thrown away: whoever wants a number loads the artefact back. Most methods are the
libraries' own; this module gives them one signature, one calibration set, one naming scheme and one way to keep layers
out.

| method | library | what it does |
|---|---|---|
| `nf4`, `fp4` | `four_bit`, as bitsandbytes | 4-bit levels, absolute maximum a block; Dettmers et al. 2023 (QLoRA) |
| `int8` | bitsandbytes | LLM.int8(): int8 rows, outlier columns in 16 bit; Dettmers et al. 2022, arXiv 2208.07339 |
| `torchao-int8`, `-int8-dynamic`, `-int4` | torchao | weights only; activations too, on the fly; 4 bits in groups |
| `rtn` | llmcompressor | round to nearest, any bits, groups or channels, symmetric or not |
| `gptq` | llmcompressor | error-compensated rounding; Frantar et al. 2023, arXiv 2210.17323 |
| `awq` | llmcompressor | activation-aware scales, then rounding; Lin et al. 2024, arXiv 2306.00978 |
| `smoothquant` | llmcompressor | 8-bit weights and activations; Xiao et al. 2023, arXiv 2211.10438 |
| `ava` | this package | mixed grids under a budget of bytes, embedding too; re-scaled first if asked; see `ava` |

A model must be saved before its first forward pass: bitsandbytes re-packs 4-bit weights for the CPU in place, and
transformers then saves the packed bytes under the plain format's name (LOG.md, 2026-11-21).

What it does not do: touch embeddings, norms or the head, score, or choose.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from avalab import artifacts, ava, compressors, corpora, four_bit, models
from avalab.artifacts import Artifact
from avalab.code import code_of
from avalab.compressors import Job
from avalab.experiment import Run


@dataclass(frozen=True)
class Method:
    """One way to compress: the function, its parameters with defaults, and what the artefact's format is called."""

    compress: Callable[[Job], PreTrainedModel | ava.Packed]
    format: str
    defaults: dict = field(default_factory=dict)
    calibrated: bool = False
    note: str = ""  # what the library does not do on a CPU


def write(
    base: Artifact, method: str, *, run: Run, skip: tuple[str, ...] = (), out: Path | None = None, **parameters
) -> Artifact:
    """Compress `base` by `method` into the folder `out`, or one below `run.artifacts_dir` named after the recipe.

    An artefact of the same recipe and base is reused. `skip` holds names or globs of linear layers that stay in bf16.
    Raises ValueError for an unknown method or parameter, a group size that does not divide the columns, a glob that
    matches nothing, a base that is compressed already, or an `out` that exists and is no artefact.
    """
    if base.format != "bf16":
        raise ValueError(f"{base.name} is in format {base.format!r}; only bf16 artefacts can be compressed")
    row, parameters = checked(method, parameters)
    skipped = _expand(skip, base.path)
    _refuse_ragged_groups(base.path, parameters, skipped)
    # The code's hash: an artefact that an older version of it made is made again, not trusted.
    step = {"step": method, **parameters, "skip": skipped, "code": _code(row)}
    step |= {"seed": run.seed, "calibration": _sizes(run)} if row.calibrated else {}
    recipe = [*base.card["recipe"], step]
    out = _checked_target(out) or run.artifacts_dir / f"{base.name}+{label(method, parameters, skipped)}"
    origin = {"name": base.name, "sha256": base.sha256}
    found = artifacts.find(out.name, out.parent, recipe, base.sha256)
    if found:
        return found
    format, engines = (row.format, ("torch",))
    if row.compress is ava.compress:
        format, engines = ava.shipped_as(parameters, models.parameter_count(skeleton(base.path)), base.path)
    calibration = corpora.calibration_windows(run, models.load_tokenizer(base)) if row.calibrated else None
    job = Job(base.path, run.device, parameters, skipped, calibration)
    return artifacts.write(
        out.name,
        out.parent,
        lambda folder: _compress_into(folder, row, job),
        base=origin,
        recipe=recipe,
        format=format,
        engines=engines,
        licence=base.card["licence"],
    )


def record(run: Run, subject: str, artifact: Artifact) -> None:
    """Append `compress_seconds` with the recipe; an artefact that nothing compressed says so."""
    measured, recipe = artifact.card["measured"], artifact.card["recipe"]
    about = {"artifact_sha256": artifact.sha256, "details": {"recipe": recipe, **measured}}
    note = measured.get("note") or ("" if "compress_seconds" in measured else "the base itself: nothing to compress")
    run.record(subject, "compress_seconds", measured.get("compress_seconds"), "s", n=1, note=note, **about)


def label(method: str, parameters: dict, skipped: list[str] | tuple[str, ...] = ()) -> str:
    """The method's name with what its parameters change: `gptq-w4g64-asym`, `nf4-dq`, `int8-keep30.1f9c`.

    Recipes that differ have names that differ; the suffix of `keep` is a hash of the layers' names.
    """
    parts = [method]
    if "bits_per_weight" in parameters:
        parts += [ava.label(parameters)]
    elif "bits" in parameters:
        group = parameters["group_size"]
        parts.append(f"w{parameters['bits']}" + (f"g{group}" if group else "ch"))
        parts.append("sym" if parameters["symmetric"] else "asym")
    elif "group_size" in parameters:
        parts.append(f"g{parameters['group_size']}")
    parts += ["dq"] if parameters.get("double_quantization") else []
    parts += [f"b{parameters['block_size']}"] if parameters.get("block_size", 64) != 64 else []
    parts += [parameters["compute_dtype"]] if parameters.get("compute_dtype", "bfloat16") != "bfloat16" else []
    parts += ["w8a8-static" if parameters["static"] else "w8a8-dynamic"] if "static" in parameters else []
    defaults = METHODS[method].defaults
    parts += [f"{n}{parameters[n]:g}" for n in NUMBERS if parameters.get(n, defaults.get(n)) != defaults.get(n)]
    parts += [f"keep{len(skipped)}.{artifacts.sha256_of_text(','.join(skipped))[:4]}"] if skipped else []
    return "-".join(parts)


def skeleton(folder: Path) -> PreTrainedModel:
    """The model's modules and shapes without any weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_plain_config(folder))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the libraries' progress bars, logs and deprecation warnings to themselves; errors still come through."""
    models.quiet_libraries()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _checked_target(out: Path | None) -> Path | None:
    """Refuse to replace a folder that is not an artefact: it may hold somebody's files."""
    if out and out.exists() and not (out / artifacts.CARD).is_file():
        raise ValueError(f"{out} exists and is not an artefact; name a new folder")
    return out and out.resolve()


def checked(method: str, parameters: dict) -> tuple[Method, dict]:
    """The method's row and its parameters merged with the defaults; ValueError for what it does not know."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    row = METHODS[method]
    unknown = sorted(set(parameters) - set(row.defaults))
    if unknown:
        allowed = ", ".join(row.defaults) or "none"
        raise ValueError(f"method {method!r} has no parameter {', '.join(unknown)}; it has: {allowed}, skip")
    merged = {**row.defaults, **parameters}
    if merged.get("compute_dtype", "bfloat16") not in compressors.DTYPES:
        raise ValueError(f"compute_dtype {merged['compute_dtype']!r} is not one of {', '.join(compressors.DTYPES)}")
    if not 2 <= merged.get("bits", 8) <= 8:
        raise ValueError(f"bits {merged['bits']} is not one of 2 to 8")
    for name in ("group_size", "block_size"):
        # 0 is one group a row in llmcompressor's schemes, the allocator's choice in `ava`, and nothing elsewhere.
        least = 0 if {"bits", "bits_per_weight"} & merged.keys() else 1
        if merged.get(name, least) < least:
            raise ValueError(f"{name} {merged[name]} of {method!r} is below {least}")
    return row, merged


def _sizes(run: Run) -> list[int]:
    return [run.profile.calibration_samples, run.profile.calibration_tokens]


def _plain_config(folder: Path):
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _code(row: Method) -> str:
    calibration = [corpora.calibration_windows] if row.calibrated else []
    return code_of(_compress_into, row.compress, *calibration)[:12]


def _expand(globs: tuple[str, ...], folder: Path) -> list[str]:
    names = list(models.linear_layers(skeleton(folder))) if globs else []
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"skip {glob!r} matches no linear layer; names look like {names[0]}, {names[-1]}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def _refuse_ragged_groups(folder: Path, parameters: dict, skipped: list[str]) -> None:
    # bitsandbytes' blocks may run on into the next row, but its CPU kernels refuse such blocks at the first call.
    group = parameters.get("group_size") or parameters.get("block_size")
    if not group or "bits_per_weight" in parameters:  # `ava` takes the next larger group that divides
        return
    usual = BLOCK_SIZES if "block_size" in parameters else GROUP_SIZES
    layers = {name: m for name, m in models.linear_layers(skeleton(folder)).items() if name not in skipped}
    fits = [g for g in usual if all(m.in_features % g == 0 for m in layers.values())]
    advice = f"sizes that fit every layer: {', '.join(map(str, fits)) or 'none'}"
    advice += ", or 0 for one group a row" if "bits" in parameters else ""
    for name, layer in layers.items():
        if layer.in_features % group:
            raise ValueError(f"a group of {group} does not divide the {layer.in_features} columns of {name}; {advice}")
    if "block_size" in parameters and group not in BLOCK_SIZES:
        raise ValueError(f"bitsandbytes has no blocks of {group}; {advice}")


def _compress_into(folder: Path, row: Method, job: Job) -> dict:
    start = time.perf_counter()
    tokenizer = models.load_tokenizer(job.folder)
    with quietly():
        model = row.compress(job)
        model.save_pretrained(folder)  # before any forward pass, see the module
        tokenizer.save_pretrained(folder)
    return {
        "compress_seconds": time.perf_counter() - start,
        "calibration_tokens": job.calibration.numel() if job.calibration is not None else 0,
        "note": row.note if job.device == "cpu" else "",
    } | getattr(model, "measured", {})


GROUP_SIZES = (16, 32, 64, 128, 256)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those of bitsandbytes
NUMBERS = ("threshold", "grid_points", "smoothing_strength")  # parameters that a label shows where not the default
_FOUR_BIT = {"double_quantization": False, "block_size": 64, "compute_dtype": "bfloat16"}
_WEIGHTS = {"bits": 4, "group_size": 64, "symmetric": False}
_AWQ = {**_WEIGHTS, "grid_points": 10}

METHODS: dict[str, Method] = {
    "nf4": Method(four_bit.compressor("nf4"), "bitsandbytes", _FOUR_BIT),
    "fp4": Method(four_bit.compressor("fp4"), "bitsandbytes", _FOUR_BIT),
    "int8": Method(compressors.llm_int8, "bitsandbytes", {"threshold": 6.0}),
    "torchao-int8": Method(compressors.torchao("int8"), "torchao"),
    "torchao-int8-dynamic": Method(compressors.torchao("int8-dynamic"), "torchao"),
    "torchao-int4": Method(
        compressors.torchao("int4"),
        "torchao",
        {"group_size": 64},
        note="torchao packs 4-bit codes only on a GPU: on a CPU each takes a byte",
    ),
    "rtn": Method(compressors.llmcompressor("rtn"), "compressed-tensors", _WEIGHTS),
    "gptq": Method(compressors.llmcompressor("gptq"), "compressed-tensors", _WEIGHTS, calibrated=True),
    "awq": Method(compressors.llmcompressor("awq"), "compressed-tensors", _AWQ, calibrated=True),
    "smoothquant": Method(
        compressors.llmcompressor("smoothquant"),
        "compressed-tensors",
        {"smoothing_strength": 0.5, "static": True},
        calibrated=True,
    ),
    "ava": Method(ava.compress, "compressed-tensors", ava.DEFAULTS, calibrated=True),
}
