"""The torch engine: an artefact in transformers, eager or compiled; the reference that other engines are held to.

Eager decoding grows a dynamic key-value cache. `compiled` sends single-token steps through torch.compile over a static
cache, whose length is the next power of two, so that one graph serves every generation of that length; reading the
prompt stays eager, as its shape changes with every call. On a GPU the compiled step is recorded as a CUDA graph, so
that launching kernels does not decide the time of a small model's token. In eager mode a static cache only costs time:
attention reads all of it at each step.

A GGUF file is decoded to dense weights of `dtype`. The 4-bit layers of a bitsandbytes artefact compute through
`avalab.kernels` (see `four_bit`): the same codes and scales, AVALAB_KERNELS=reference for the definition.

What it does not do: compile a layer that bitsandbytes has to keep, or its 8-bit ones: their kernels hold state that the
compiler cannot follow.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from avalab import artifacts, models
from avalab.artifacts import Artifact
from avalab.engines import engine, four_bit, kinds
from avalab.engines.engine import Engine, Request

SMALLEST_CACHE = 128  # tokens; shorter ones would only mean more graphs


def load(
    artifact: Artifact | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = False,
    own_kernels: bool = True,
    threads: int = 0,
) -> Engine:
    """Open any artefact that `models.load` can, or a GGUF file; `threads` 0 leaves torch's own choice.

    Without `own_kernels`, 4-bit layers stay those of their library.
    """
    folder = kinds.checked("torch", artifact)
    found = kinds.kind(folder)
    if threads:
        torch.set_num_threads(threads)
    facts = kinds.facts(folder)
    if found == "gguf":
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            decoded, _ = models.from_gguf(kinds.gguf_file(folder))
        model = torch.nn.Module.to(decoded, device, dtype)
    else:
        model = models.load(artifacts.load(folder, verify=False) if found == "adapter" else folder, device, dtype)
    if own_kernels:
        four_bit.apply_kernels(model)
    state = {"model": model, "step": _compiled(model, folder) if compiled else None}
    return Engine("torch", folder, facts, state, _new_tokens, _logits)


@torch.inference_mode()
def _compiled(model: PreTrainedModel, folder: Path) -> Callable:
    """The compiled step. Raises NotSupported where a layer is bitsandbytes' own."""
    kept = [name for name, layer in models.linear_layers(model).items() if type(layer).__module__.startswith("bitsa")]
    if kept:
        raise kinds.NotSupported(
            f"{folder.name}: {len(kept)} layers of bitsandbytes, {kept[0]} the first, are not compiled; "
            "load it with compiled=False"
        )
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device))  # the kernels' checks run outside the compiler
    four_bit.mark_static(model)
    on_gpu = model.device.type == "cuda"
    return torch.compile(model.forward, dynamic=False, mode="reduce-overhead" if on_gpu else None)


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
