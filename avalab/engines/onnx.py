"""ONNX Runtime GenAI: the engine over a folder that its own model builder made, and the export of such folders.

1. `load`: the library reads tokens and keeps the key-value cache, a buffer of prompt plus answer; the shared greedy
   loop chooses, so that grammars and end tokens are the same as everywhere.
2. `write`: weights of 32, 8 or 4 bits by the library's builder, in groups of 32 rounded to nearest, the head included;
   the embedding stays in 32 bits unless the head shares it. `kept` takes an artefact of `ava`, gptq, awq or rtn
   instead, each layer with bits and groups of its own, without rounding again (see `onnx_graph`).

What it does not do: sample, batch, calibrate, or run graphs of other exporters (see `onnxruntime`).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avalab.engines import engine, onnx_graph
from avalab.engines.engine import Engine, Request
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact


def load(artifact: Artifact | Path, *, threads: int = 0) -> Engine:
    """Open a folder of ONNX Runtime GenAI; `threads` 0 leaves the library's choice.

    Raises ValueError for a graph or weights that it cannot read.
    """
    folder = engine.checked("onnx", artifact)
    engine.require("onnx", "onnxruntime_genai", onnx_graph.INSTALL)
    import onnxruntime_genai

    try:
        config = onnxruntime_genai.Config(str(folder))
        if threads:
            options = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
        model = onnxruntime_genai.Model(config)
    except RuntimeError as error:
        raise ValueError(f"ONNX Runtime cannot read {folder}: {error}") from error
    return Engine("onnx", folder, engine.facts(folder), {"model": model}, _new_tokens, _logits)


def _logits(state: dict, tokens: list[int]) -> Tensor:
    generator = _generator(state, len(tokens))
    generator.append_tokens(np.array(tokens, dtype=np.int32))
    return torch.from_numpy(generator.get_output("logits")[0].copy())


def _new_tokens(state: dict, request: Request) -> list[int]:
    generator = _generator(state, len(request.prompt) + request.max_new_tokens)

    def step(tokens: list[int]) -> Tensor:
        generator.append_tokens(np.array(tokens, dtype=np.int32))
        return torch.from_numpy(generator.get_logits()[0, -1].copy())

    return engine.greedy(step, request)


def _generator(state: dict, tokens: int):
    import onnxruntime_genai

    parameters = onnxruntime_genai.GeneratorParams(state["model"])
    parameters.set_search_options(max_length=tokens, do_sample=False)
    return onnxruntime_genai.Generator(state["model"], parameters)


# --- export ----------------------------------------------------------------------------------------------------------

KEPT = "kept"

WEIGHTS = ("fp32", "int8", "int4")


def write(artifact: Artifact, weights: str = "int4", *, inputs: str = "int8", out: Path | None = None) -> Artifact:
    """Export into an ONNX artefact, `<name>+onnx-<weights>` beside the artefact or the folder `out`.

    `kept` asks for a packed artefact and gives the format onnx-mixed; `inputs`, what its products read, is int8 or
    float32. Everything else asks for a dense one.
    """
    step = {"step": "onnxruntime-genai", "weights": weights}
    if weights == KEPT:
        onnx_graph.require()
        about = artifacts.Export(step | {"inputs": inputs}, onnx_graph.FORMAT, onnx_graph.ENGINES)
        return artifacts.write_export(
            artifact, about, lambda f: onnx_graph.export_packed(artifact.path, f, inputs=inputs), out=out
        )
    about = artifacts.Export(step, f"onnx-{weights}", ("onnx",))
    return artifacts.write_export(artifact, about, lambda folder: export(artifact.path, folder, weights), out=out)


def export(folder: Path, out: Path, weights: str = "int4") -> None:
    """Fill `out` with graph, weights, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for unknown weights or a model that is not dense, EngineUnavailable without the libraries,
    RuntimeError with the builder's last line when it fails.
    """
    engine.check_dense(folder, weights, known=WEIGHTS, form="ONNX")
    onnx_graph.run_builder(folder, out, weights)
