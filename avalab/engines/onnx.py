"""The ONNX engine: ONNX Runtime GenAI over a folder that its own model builder made (see `onnx_export`).

The library reads tokens and keeps the key-value cache, a buffer of prompt plus answer; the shared greedy loop chooses,
so that grammars and end tokens are the same as everywhere.

What it does not do: sample, batch, or run graphs of other exporters, which have no cache that the library knows.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avalab.artifacts import Artifact
from avalab.engines import engine, kinds
from avalab.engines.engine import Engine, Request

INSTALL = 'pip install -e ".[onnx]"'


def load(artifact: Artifact | Path, *, threads: int = 0) -> Engine:
    """Open a folder of ONNX Runtime GenAI; `threads` 0 leaves the library's choice.

    Raises ValueError for a graph or weights that it cannot read.
    """
    folder = kinds.checked("onnx", artifact)
    kinds.require("onnx", "onnxruntime_genai", INSTALL)
    import onnxruntime_genai

    try:
        config = onnxruntime_genai.Config(str(folder))
        if threads:
            options = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
        model = onnxruntime_genai.Model(config)
    except RuntimeError as error:
        raise ValueError(f"ONNX Runtime cannot read {folder}: {error}") from error
    return Engine("onnx", folder, kinds.facts(folder), {"model": model}, _new_tokens, _logits)


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
