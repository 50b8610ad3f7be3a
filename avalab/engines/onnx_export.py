"""A model folder for ONNX Runtime GenAI: weights of 32, 8 or 4 bits by its own builder, or a packed artefact's as kept.

The builder's 8 and 4 bits are groups of 32 weights rounded to nearest, the head included; the embedding stays in 32
bits unless the head shares it. `kept` takes an artefact of `ava`, gptq, awq or rtn instead, each layer with bits and
groups of its own, without rounding again (see `onnx_mixed`).

What it does not do: calibrate, or export graphs for other runtimes.
"""

from __future__ import annotations

from pathlib import Path

from avalab import exported, onnx_builder, onnx_mixed
from avalab.artifacts import Artifact
from avalab.engines import dense, kinds
from avalab.engines.onnx import INSTALL

KEPT = "kept"
WEIGHTS = ("fp32", "int8", "int4")


def write(artifact: Artifact, weights: str = "int4", *, inputs: str = "int8", out: Path | None = None) -> Artifact:
    """Export into an ONNX artefact, `<name>+onnx-<weights>` beside the artefact or the folder `out`.

    `kept` asks for a packed artefact and gives the format onnx-mixed; `inputs`, what its products read, is int8 or
    float32. Everything else asks for a dense one.
    """
    step = {"step": "onnxruntime-genai", "weights": weights}
    if weights == KEPT:
        _require()
        about = exported.Export(step | {"inputs": inputs}, onnx_mixed.FORMAT, onnx_mixed.ENGINES)
        return exported.write(artifact, about, lambda f: onnx_mixed.export(artifact.path, f, inputs=inputs), out=out)
    about = exported.Export(step, f"onnx-{weights}", ("onnx",))
    return exported.write(artifact, about, lambda folder: export(artifact.path, folder, weights), out=out)


def export(folder: Path, out: Path, weights: str = "int4") -> None:
    """Fill `out` with graph, weights, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for unknown weights or a model that is not dense, EngineUnavailable without the libraries,
    RuntimeError with the builder's last line when it fails.
    """
    dense.check(folder, weights, known=WEIGHTS, form="ONNX")
    _require()
    onnx_builder.build(folder, out, weights)


def _require() -> None:
    for module in onnx_builder.PACKAGES:
        kinds.require("onnx", module, INSTALL)
