"""The torch engine: an artefact in transformers, eager or compiled; the reference that other engines are held to.

Eager decoding grows a dynamic key-value cache. `compiled` sends single-token steps through torch.compile over a static
cache, whose length is the next power of two, so that one graph serves every generation of that length; reading the
prompt stays eager, as its shape changes with every call. In eager mode a static cache only costs time: attention
reads all of it at each step.

A GGUF file is decoded to dense weights of `dtype`. What it does not do: compile bitsandbytes layers, whose kernels
keep state that the compiler cannot follow.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from avalab import artifacts, models
from avalab.artifacts import Artifact
from avalab.engines import engine, kinds
from avalab.engines.engine import Engine, Request

SMALLEST_CACHE = 128  # tokens; shorter ones would only mean more graphs


def load(
    artifact: Artifact | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = False,
    threads: int = 0,
) -> Engine:
    """Open any artefact that `models.load` can, or a GGUF file; `threads` 0 leaves torch's own choice."""
    folder = kinds.checked("torch", artifact)
    found = kinds.kind(folder)
    if compiled and found == "bitsandbytes":
        raise kinds.NotSupported(f"{folder.name}: bitsandbytes layers are not compiled; load it with compiled=False")
    if threads:
        torch.set_num_threads(threads)
    facts = kinds.facts(folder)
    if found == "gguf":
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            decoded, _ = models.from_gguf(kinds.gguf_file(folder))
        model = torch.nn.Module.to(decoded, device, dtype)
    else:
        model = models.load(artifacts.load(folder, verify=False) if found == "adapter" else folder, device, dtype)
    state = {"model": model, "step": torch.compile(model.forward, dynamic=False) if compiled else None}
    return Engine("torch", folder, facts, state, _new_tokens, _logits)


@torch.inference_mode()
def _logits(state: dict, tokens: list[int]) -> Tensor:
    model = state["model"]
    return model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0].cpu()


@torch.inference_mode()
def _new_tokens(state: dict, request: Request) -> list[int]:
    model, compiled = state["model"], state["step"]
    cache = _cache(model, len(request.prompt) + request.max_new_tokens, fixed=compiled is not None)
    read = 0

    def step(tokens: list[int]) -> Tensor:
        nonlocal read
        forward = compiled if compiled and len(tokens) == 1 else model
        ids = torch.tensor([tokens], device=model.device)
        positions = torch.arange(read, read + len(tokens), device=model.device)[None]
        read += len(tokens)
        output = forward(ids, past_key_values=cache, position_ids=positions, logits_to_keep=1)
        return output.logits[0, -1]

    return engine.greedy(step, request)


def _cache(model: PreTrainedModel, tokens: int, *, fixed: bool) -> DynamicCache | StaticCache:
    if not fixed:
        return DynamicCache(config=model.config)
    length = max(SMALLEST_CACHE, 1 << (tokens - 1).bit_length())
    return StaticCache(config=model.config, max_cache_len=length)
