"""`avalab export`: an artefact written for another engine, and checked there.

A row of `EXPORTERS` is a format and the function that writes it: artefact, new folder and how weights are stored (""
is the format's own way) in, the lines to print out. It imports what it needs itself, raises ValueError for weights
that it does not know and EngineUnavailable for a missing package. What it does not do: anything the formats' modules
do not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli_options import ArtifactFolder


def onnx(artifact, out: Path, weights: str) -> str:
    """An ONNX file, executed once by ONNX Runtime."""
    from avalab import onnx_file

    made = onnx_file.write(artifact, out, weights=weights or "dense")
    found = made.card["measured"]
    return (
        f"{made.path}: {found['onnx_bytes'] / 1e6:.1f} MB, weights {weights or 'dense'}\n"
        f"ONNX Runtime: logits differ by {found['logit_difference']:.1g} of the largest, "
        f"best token the same at {found['top1_agreement']:.1%} of positions"
    )


def onnx_genai(artifact, out: Path, weights: str) -> str:
    """A folder for ONNX Runtime GenAI, by its own model builder."""
    from avalab.engines import onnx_export

    return _written(onnx_export.write(artifact, weights or "int4", out=out), "onnx")


def gguf(artifact, out: Path, weights: str) -> str:
    """A GGUF file with tokenizer and chat template, and Ollama's Modelfile."""
    from avalab import gguf_export

    return _written(gguf_export.write(artifact, weights or "q8_0", out=out), "openvino, llamacpp or torch")


def openvino(artifact, out: Path, weights: str) -> str:
    """A folder for OpenVINO GenAI, weights compressed by NNCF."""
    from avalab.engines import openvino_export

    return _written(openvino_export.write(artifact, weights or "int8", out=out), "openvino")


def _written(made, engines: str) -> str:
    from avalab import engine_bench

    size = engine_bench.weight_bytes(made.path)
    return f"{made.path}: {size / 1e6:.1f} MB, {made.format}\nload it with the engine {engines}"


EXPORTERS: dict[str, Callable[..., str]] = {"onnx": onnx, "onnx-genai": onnx_genai, "gguf": gguf, "openvino": openvino}
WEIGHTS_HELP = """How weights are stored. onnx: dense, sparse, bitmask; onnx-genai: fp32, int8, int4; openvino: f16,
int8, int4; gguf: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, kept (ava's grids)."""


def export(
    artifact: ArtifactFolder,
    to: Annotated[str, typer.Option(help="Format: " + ", ".join(EXPORTERS) + ".")],
    out: Annotated[Path, typer.Option(help="New folder of the exported artefact.")],
    weights: Annotated[str, typer.Option(help=WEIGHTS_HELP)] = "",
) -> None:
    """Write an artefact in the format of another engine and check it there."""
    from avalab import artifacts

    if to not in EXPORTERS:
        raise ValueError(f"unknown format {to!r}; choose one of {', '.join(EXPORTERS)}")
    print(EXPORTERS[to](artifacts.load(artifact), out, weights))
