"""The OpenVINO engine: GGUF files and exported folders through OpenVINO GenAI; the default on a CPU.

GenAI's pipeline generates. It shows no logits and takes grammars as text only, so `logits` and grammars use the
same graph in plain OpenVINO, compiled at the first such call (the weights are then in memory twice). That graph is cut
before its head: only positions from the input `first_logit` on get logits.

`paged` uses GenAI's paged attention (what continuous batching needs). It keeps the cache of prompts that it has read,
so that timing one prompt twice times nothing; hence not the default. `properties` are OpenVINO's own, such as
`KV_CACHE_PRECISION`, `INFERENCE_PRECISION_HINT` or `DYNAMIC_QUANTIZATION_GROUP_SIZE`.

GenAI 2026.4 reads GGUF tensors in F16, Q8_0, Q4_0 and Q4_1, and rounds the minimums of Q4_1 to whole steps: another
model than the file's (LOG.md), unless they were whole. What this engine does not do: sample or batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avalab.artifacts import Artifact
from avalab.engines import engine, kinds, openvino_graph
from avalab.engines.engine import Engine, Request

INSTALL = 'pip install -e ".[openvino]"'


def load(
    artifact: Artifact | Path,
    *,
    device: str = "CPU",
    threads: int = 0,
    paged: bool = False,
    properties: dict[str, str] | None = None,
) -> Engine:
    """Open a GGUF artefact or an exported folder; `threads` 0 leaves OpenVINO's choice.

    Raises NotSupported for a GGUF file with tensors of a type that OpenVINO does not read.
    """
    folder = kinds.checked("openvino", artifact)
    kinds.require("openvino", "openvino_genai", INSTALL)
    source = kinds.gguf_file(folder) if kinds.kind(folder) == "gguf" else folder
    options = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    state = {"source": source, "device": device, "options": options | (properties or {})}
    backend = {} if paged else {"ATTENTION_BACKEND": "SDPA"}
    state["pipeline"] = openvino_graph.pipeline(source, device, **backend, **state["options"])
    return Engine("openvino", folder, kinds.facts(folder), state, _new_tokens, _logits)


def _new_tokens(state: dict, request: Request) -> list[int]:
    if request.grammar:
        return engine.greedy(_stepper(state), request)
    import openvino
    import openvino_genai

    class Reporter(openvino_genai.StreamerBase):
        def write(self, token) -> openvino_genai.StreamingStatus:
            for one in token if isinstance(token, list) else [token]:
                if one not in request.stops:
                    request.on_token(one)
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            """Called once, after the last token."""

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = request.max_new_tokens, False, not request.stops
    config.stop_token_ids = set(request.stops)
    prompt = openvino.Tensor(np.array([request.prompt], dtype=np.int64))
    tokens = state["pipeline"].generate(prompt, config, Reporter()).tokens[0]
    return [token for token in tokens if token not in request.stops]


def _logits(state: dict, tokens: list[int]) -> Tensor:
    return _stepper(state, every=True)(tokens)


def _stepper(state: dict, *, every: bool = False):
    """A function that reads tokens after those read before; logits of the last one, or of all of them."""
    run = state["graph"] = state.get("graph") or openvino_graph.compiled(
        state["source"], state["device"], state["options"]
    )
    run.reset_state()
    read = 0

    def step(tokens: list[int]) -> Tensor:
        nonlocal read
        positions = np.arange(read, read + len(tokens))[None]
        read += len(tokens)
        inputs = {"input_ids": np.array([tokens]), "position_ids": positions, "beam_idx": np.zeros(1, np.int32)}
        inputs |= {"attention_mask": np.ones((1, read), np.int64), "first_logit": np.array([0 if every else -1])}
        logits = torch.from_numpy(run.infer(inputs)[0][0].copy())
        return logits if every else logits[-1]

    return step
