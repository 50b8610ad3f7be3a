"""The ONNX Runtime engine: graphs from token ids to logits (`model.onnx`), as `onnx_file` and `onnx_int8` write them.

Such a graph has no key-value cache: every answer token reads the whole sequence again, so generating n tokens costs n
prompts. It is here to score what those graphs compute; to generate at speed use the engine onnx, whose graphs have one.

What it does not do: batch, or run graphs with other inputs than `input_ids`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avalab.artifacts import Artifact
from avalab.engines import engine, kinds
from avalab.engines.engine import Engine, Request

INSTALL = 'pip install -e ".[onnx]"'
INPUTS = ["input_ids"]


def load(artifact: Artifact | Path, *, threads: int = 0) -> Engine:
    """Open a folder with `model.onnx`; `threads` 0 leaves the library's choice.

    Raises ValueError for a graph that ONNX Runtime cannot read, NotSupported for one with other inputs.
    """
    folder = kinds.checked("onnxruntime", artifact)
    kinds.require("onnxruntime", "onnxruntime", INSTALL)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    file = folder / kinds.OWN_FILES["onnx-graph"]
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # each of its error classes derives from Exception alone
        raise ValueError(f"ONNX Runtime cannot read {file}: {error}") from error
    inputs = [given.name for given in session.get_inputs()]
    if inputs != INPUTS:
        raise kinds.NotSupported(f"{file} takes {', '.join(inputs)}; onnxruntime runs graphs of {INPUTS[0]} alone")
    return Engine("onnxruntime", folder, kinds.facts(folder), {"session": session}, _new_tokens, _logits)


def _logits(state: dict, tokens: list[int]) -> Tensor:
    return torch.from_numpy(state["session"].run(None, {INPUTS[0]: np.array([tokens])})[0][0])


def _new_tokens(state: dict, request: Request) -> list[int]:
    read: list[int] = []

    def step(tokens: list[int]) -> Tensor:
        read.extend(tokens)
        return _logits(state, read)[-1]

    return engine.greedy(step, request)
