"""The llama.cpp engine: GGUF files through llama-cpp-python's plain C functions, layers on a GPU if asked.

Prompt and steps go through `llama_decode`; logits are copied out and the shared greedy loop chooses, so that grammars
and end tokens are the same as everywhere. The key-value cache is allocated whole when the model is loaded: `context`
tokens of it, which is then the longest sequence.

The package builds llama.cpp while it is installed, with the flags of `llamacpp_build`: `make setup-llamacpp`.

What it does not do: convert models (see `gguf_export`), batch sequences, or use llama.cpp's own tokenizer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avalab.artifacts import Artifact
from avalab.engines import engine, kinds
from avalab.engines.engine import Engine, Request

INSTALL = "make setup-llamacpp (it compiles llama.cpp and then the extra [llamacpp]; a C++ compiler is needed)"
BATCH = 512  # tokens of a prompt that are read at once


def load(
    artifact: Artifact | Path, *, context: int = 2048, threads: int = 0, gpu_layers: int = 0, cache_bits: int = 16
) -> Engine:
    """Open a GGUF artefact; `gpu_layers` of its blocks go to a GPU (-1: all), `threads` 0 leaves llama.cpp's choice.

    `cache_bits` 8 keeps keys and values as q8_0, which llama.cpp can only with its fused attention.
    Raises ValueError for a file that llama.cpp refuses (truncated, or with tensors of a type that it does not know).
    """
    folder = kinds.checked("llamacpp", artifact)
    kinds.require("llamacpp", "llama_cpp", INSTALL)
    from llama_cpp import GGML_TYPE_F16, GGML_TYPE_Q8_0, Llama

    facts = kinds.facts(folder)
    facts = replace(facts, context=min(context, facts.context))
    file, sizes = kinds.gguf_file(folder), {"n_ctx": facts.context, "n_batch": BATCH, "n_ubatch": BATCH}
    threaded = {"n_threads": threads or None, "n_threads_batch": threads or None}
    kept = GGML_TYPE_Q8_0 if cache_bits == 8 else GGML_TYPE_F16
    cache = {"type_k": kept, "type_v": kept, "flash_attn": cache_bits == 8}
    try:
        model = Llama(str(file), n_gpu_layers=gpu_layers, verbose=False, **cache, **sizes, **threaded)
    except ValueError as error:
        raise ValueError(f"llama.cpp cannot read {file}: {error}") from error
    return Engine("llamacpp", folder, facts, {"model": model}, _new_tokens, _logits)


def _logits(state: dict, tokens: list[int]) -> Tensor:
    _forget(state)
    parts = [tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH)]
    return torch.cat([_decode(state, part, index * BATCH, every=True) for index, part in enumerate(parts)])


def _new_tokens(state: dict, request: Request) -> list[int]:
    _forget(state)
    read = 0

    def step(tokens: list[int]) -> Tensor:
        nonlocal read
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            logits = _decode(state, part, read, every=False)
            read += len(part)
        return logits[-1]

    return engine.greedy(step, request)


def _forget(state: dict) -> None:
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(state["model"].ctx), True)


def _decode(state: dict, tokens: list[int], first: int, *, every: bool) -> Tensor:
    """Read tokens at positions from `first` on; the logits of every one, or of the last, copied out of the library."""
    import llama_cpp

    context, size = state["model"].ctx, len(tokens)
    batch = llama_cpp.llama_batch_init(size, 0, 1)
    batch.n_tokens = size
    for index, token in enumerate(tokens):
        batch.token[index], batch.pos[index] = token, first + index
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        batch.logits[index] = every or index == size - 1
    code = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_batch_free(batch)
    if code:
        raise RuntimeError(f"llama.cpp stopped with code {code} while reading {size} tokens from position {first}")
    rows = size if every else 1
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(rows, state["model"].n_vocab()))
    return torch.from_numpy(found.copy())
