"""ONNX Runtime GenAI: the engine over a folder that its own model builder made, and the export of such folders.

1. `load`: the library reads tokens and keeps the key-value cache, a buffer of prompt plus answer; the shared greedy
   loop chooses.
2. `write`: weights of 32, 8 or 4 bits by the library's builder, in groups of 32 rounded to nearest, the head included;
   the embedding stays in 32 bits unless the head shares it. `kept` takes an artefact of `ava`, gptq, awq or rtn
   instead, each layer with bits and groups of its own, without rounding again (see `onnx_graph`).

Graphs of other exporters are run by `onnxruntime`.
"""

from __future__ import annotations

import json
from pathlib import Path

from avalab.engines import checks, engine, onnx_graph
from avalab.engines.checks import Check
from avalab.engines.engine import Engine
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError


def load(artifact: Artifact | Path, *, threads: int = 0) -> Engine:
    """Open a folder of ONNX Runtime GenAI; `threads` 0 leaves the library's choice.

    Raises ValueError for a graph or weights that it cannot read.
    """
    folder = engine.folder_for("onnx", artifact)
    engine.require("onnx", "onnxruntime_genai", onnx_graph.INSTALL)
    import onnxruntime_genai

    try:
        config = onnxruntime_genai.Config(str(folder))
        if threads:
            options = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
        model = onnxruntime_genai.Model(config)
    except RuntimeError as error:
        raise InputError(f"ONNX Runtime cannot read {folder}: {error}") from error
    return engine.from_reader("onnx", folder, engine.model_facts(folder), {"model": model}, onnx_graph.token_reader)


# --- export ----------------------------------------------------------------------------------------------------------

KEPT = "kept"

WEIGHTS = ("fp32", "int8", "int4")

COARSE = {"fp32": "", "int8": "q8_0", "int4": "q4_0"}  # what rounding is like, for the check

INPUTS = {"int8": "q8_0", "float32": "bf16"}  # what products that read them are like


def write(artifact: Artifact, weights: str = "int4", *, inputs: str = "int8", out: Path | None = None) -> Artifact:
    """Export into an ONNX artefact, `<name>+onnx-<weights>` beside the artefact or the folder `out`.

    `kept` asks for a packed artefact and gives the format onnx-mixed; `inputs`, what its products read, is int8 or
    float32. Everything else asks for a dense one.
    """
    step = {"step": "onnxruntime-genai", "weights": weights}
    if weights != KEPT:
        about = artifacts.Export(step, f"onnx-{weights}", ("onnx",))
        check = checks.against(artifact, Check({"onnx": COARSE[weights]}))
        return artifacts.write_export(
            artifact, about, lambda folder: export(artifact.path, folder, weights), check, out=out
        )
    engine.require("onnx", onnx_graph.PACKAGES, onnx_graph.INSTALL)
    about = artifacts.Export(step | {"inputs": inputs}, onnx_graph.FORMAT, onnx_graph.ENGINES)
    check = checks.against(artifact, Check({"onnx": INPUTS[inputs]}))
    return artifacts.write_export(
        artifact, about, lambda folder: onnx_graph.export_packed(artifact.path, folder, inputs=inputs), check, out=out
    )


def export(folder: Path, out: Path, weights: str = "int4") -> None:
    """Fill `out` with graph, weights, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for unknown weights or a model that is not dense, else as `onnx_graph.run_builder` does.
    """
    engine.check_source(folder, weights, known=WEIGHTS, form="ONNX Runtime GenAI", packed=KEPT)
    onnx_graph.run_builder(folder, out, weights)
