"""The TensorRT-LLM engine: dense artefacts on an NVIDIA GPU in fp16, bf16 or fp32.

Written against TensorRT-LLM 1.x's `LLM`; never run by this project's tests, which have no such GPU: they check the
refusals. It takes no grammars.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from avalab.engines import engine
from avalab.engines.engine import Engine, Request
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError

INSTALL = 'pip install -e ".[tensorrt]" (from NVIDIA\'s package index, in an environment of its own)'

PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def load(
    artifact: Artifact | Path,
    *,
    precision: str = "fp16",
    context: int = 2048,
    threads: int = 0,  # of a processor's engines; no meaning here
) -> Engine:
    """Open a dense artefact in a precision of `PRECISIONS`.

    Raises ValueError for another precision, EngineUnavailable without TensorRT-LLM or without a GPU.
    """
    folder = engine.folder_for("tensorrt", artifact)
    require(precision)
    from tensorrt_llm import LLM
    from tensorrt_llm.llmapi import KvCacheConfig

    facts = engine.model_facts(folder, context=context)
    cache = KvCacheConfig(enable_block_reuse=False)  # timing one prompt twice would time nothing
    model = LLM(model=str(folder), dtype=PRECISIONS[precision], max_seq_len=facts.context, kv_cache_config=cache)
    return Engine("tensorrt", folder, facts, {"model": model}, _new_tokens, _logits)


def require(precision: str) -> None:
    """Raise what `load` raises for another precision, without the library, or without a GPU."""
    if precision not in PRECISIONS:
        raise InputError(f"no precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    engine.require("tensorrt", "tensorrt_llm", INSTALL, gpu=True)


def _logits(state: dict, tokens: list[int]) -> Tensor:
    from tensorrt_llm import SamplingParams

    parameters = SamplingParams(max_tokens=1, top_k=1, end_id=-1, return_context_logits=True)
    return state["model"].generate([tokens], parameters, use_tqdm=False)[0].context_logits.cpu()


def _new_tokens(state: dict, request: Request) -> list[int]:
    from tensorrt_llm import SamplingParams

    if request.grammar:
        raise engine.NotSupported("tensorrt takes no grammar here; torch, openvino, onnx, llamacpp and vllm do")
    end = request.stops[0] if request.stops else -1
    parameters = SamplingParams(max_tokens=request.max_new_tokens, top_k=1, end_id=end, detokenize=False)
    tokens = []
    for answer in state["model"].generate_async(request.prompt, parameters, streaming=True):
        for token in answer.outputs[0].token_ids[len(tokens) :]:
            if token in request.stops:
                return tokens
            tokens.append(token)
            request.on_token(token)
    return tokens
