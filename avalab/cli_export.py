"""`avalab export`, `compile` and `tensorrt`: an artefact written, or opened, for another engine.

A row of `EXPORTERS` is a format and the function that writes it: artefact, new folder, how weights are stored ("" is
the format's own way) and windows of calibration text (None: none asked for) in, the lines to print out. It imports what
it needs itself, raises ValueError for weights that it does not know and EngineUnavailable for a missing package. What
it does not do: anything the formats' modules do not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli_options import ArtifactFolder, Model, Profile, Seed

CALIBRATED = ("onnx", "gguf")


def onnx(artifact, out: Path, weights: str, windows) -> str:
    """An ONNX file, executed once by ONNX Runtime; with weights int8, one of 8-bit products; `onnx_genai` if packed."""
    from avalab import onnx_file
    from avalab.engines import kinds, onnx_export, onnx_int8

    if weights == onnx_export.KEPT or (not weights and kinds.kind(artifact.path) == "compressed-tensors"):
        return onnx_genai(artifact, out, onnx_export.KEPT, windows)
    if weights == "int8" or windows is not None:
        mode = "dynamic" if windows is None else "static"
        return _written(onnx_int8.write(artifact, mode, windows=windows, out=out), "onnxruntime")
    made = onnx_file.write(artifact, out, weights=weights or "dense")
    found = made.card["measured"]
    return (
        f"{made.path}: {found['onnx_bytes'] / 1e6:.1f} MB, weights {weights or 'dense'}\n"
        f"ONNX Runtime: logits differ by {found['logit_difference']:.1g} of the largest, "
        f"best token the same at {found['top1_agreement']:.1%} of positions"
    )


def onnx_genai(artifact, out: Path, weights: str, windows) -> str:
    """A folder for ONNX Runtime GenAI, by its own model builder; a packed artefact's layers as they are."""
    from avalab.engines import onnx_export

    if windows is not None:
        raise ValueError(f"weights {weights or 'int4'} for ONNX Runtime GenAI take no calibration text")
    made = onnx_export.write(artifact, weights or "int4", out=out)
    told = made.card["measured"].get("note", "")
    return _written(made, "onnx") + (f"\n{told}" if told else "")


def gguf(artifact, out: Path, weights: str, windows) -> str:
    """A GGUF file with tokenizer and chat template, and Ollama's Modelfile; K types by llama.cpp's quantiser."""
    from avalab import gguf_export, gguf_quantizer

    if weights in gguf_quantizer.MIXTURES:
        return _written(gguf_quantizer.write(artifact, weights, windows=windows, out=out), "llamacpp or torch")
    if windows is not None:
        raise ValueError(f"only {', '.join(gguf_quantizer.MIXTURES)} are calibrated; got {weights or 'q8_0'}")
    return _written(gguf_export.write(artifact, weights or "q8_0", out=out), "openvino, llamacpp or torch")


def openvino(artifact, out: Path, weights: str, _windows) -> str:
    """A folder for OpenVINO GenAI, weights compressed by NNCF."""
    from avalab.engines import openvino_export

    return _written(openvino_export.write(artifact, weights or "int8", out=out), "openvino")


def executorch(artifact, out: Path, weights: str, _windows) -> str:
    """A program for phones with XNNPACK kernels; every size fixed."""
    from avalab.engines import executorch_export

    return _written(executorch_export.write(artifact, weights or "fp32", out=out), "executorch")


def aot(artifact, out: Path, weights: str, _windows) -> str:
    """A package of machine code and a program that runs it with torch alone."""
    from avalab.engines import aot_export

    return _written(aot_export.write(artifact, weights or "bf16", out=out), "aot")


def _written(made, engines: str) -> str:
    return f"{made.path}: {made.bytes / 1e6:.1f} MB, {made.format}\nload it with the engine {engines}"


EXPORTERS: dict[str, Callable[..., str]] = {
    "onnx": onnx,
    "onnx-genai": onnx_genai,
    "gguf": gguf,
    "openvino": openvino,
    "executorch": executorch,
    "aot": aot,
}
WEIGHTS_HELP = """How weights are stored. onnx: dense, sparse, bitmask, int8, kept (a packed artefact's own grids);
onnx-genai: fp32, int8, int4, kept; openvino: f16, int8, int4; gguf: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0,
kept (ava's grids), q6_k, q5_k_m, q4_k_m, q3_k_m, q2_k; executorch: fp32; aot: bf16, fp32."""
CALIBRATE_HELP = "Use calibration text: static scales (onnx), an importance matrix (gguf's K types)."
Out = Annotated[Path, typer.Option(help="New folder of the artefact.")]


def export(
    artifact: ArtifactFolder,
    to: Annotated[str, typer.Option(help="Format: " + ", ".join(EXPORTERS) + ".")],
    out: Out,
    weights: Annotated[str, typer.Option(help=WEIGHTS_HELP)] = "",
    calibrate: Annotated[bool, typer.Option("--calibrate", help=CALIBRATE_HELP)] = False,
    profile: Profile = "laptop",
    seed: Seed = 0,
) -> None:
    """Write an artefact in the format of another engine and check it there."""
    from avalab import artifacts

    if to not in EXPORTERS:
        raise ValueError(f"unknown format {to!r}; choose one of {', '.join(EXPORTERS)}")
    if calibrate and to not in CALIBRATED:
        raise ValueError(f"{to} takes no calibration text; {' and '.join(CALIBRATED)} do")
    found = artifacts.load(artifact)
    print(EXPORTERS[to](found, out, weights, _windows(found, profile, seed) if calibrate else None))


def _windows(artifact, profile: str, seed: int):
    from avalab import corpora, models
    from avalab.experiment import Run

    return corpora.calibration_windows(Run("avalab_export", profile, seed), models.load_tokenizer(artifact))


def compile_(
    out: Out,
    model: Model = "",
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Any batch; without it, one sequence.")] = False,
    weights: Annotated[str, typer.Option(help="bf16 or fp32: how weights are stored and computed with.")] = "bf16",
    profile: Profile = "laptop",
) -> None:
    """Compile a model ahead of time into machine code that runs without its Python; any prompt length."""
    from avalab.engines import aot_export

    made = aot_export.write(_dense(model, profile), weights, dynamic=dynamic, out=out)
    print(_written(made, "aot"))
    print(f"without the lab: python {made.path / aot_export.PROGRAM} {made.path / 'model.pt2'} 16 TOKEN_IDS")


def tensorrt(
    model: Model = "",
    precision: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The capital of France is",
    profile: Profile = "laptop",
) -> None:
    """Build a model for TensorRT-LLM, continue a prompt with it, and say how fast; needs an NVIDIA GPU."""
    from avalab import models, trackers
    from avalab.engines import tensorrt as engine

    engine.require(precision)
    artifact = _dense(model, profile)
    loaded, tokenizer = engine.load(artifact, precision=precision), models.load_tokenizer(artifact)
    ids = tokenizer(prompt).input_ids
    print(tokenizer.decode(loaded.generate(ids, 32)))
    told = trackers.time_tokens(loaded, ids, 32)
    print(f"{precision}: {31 / (told[-1] - told[0]):.1f} token/s after {told[0] * 1000:.0f} ms")
    loaded.close()


def _dense(model: str, profile: str):
    """An artefact folder as it is; any other name is the base artefact of that model."""
    from avalab import artifacts, models
    from avalab.experiment import Run

    if model and (Path(model) / artifacts.CARD).is_file():
        return artifacts.load(model)
    return models.base(Run("avalab_compile", profile, 0, model))
