"""The torch engine: an artefact in transformers, eager or compiled; the reference that other engines are held to.

1. Eager decoding grows a dynamic key-value cache. `compiled` sends single-token steps through torch.compile over a
   static cache, whose length is the next power of two: one graph serves every generation of that length. Reading the
   prompt stays eager, as its shape changes with every call. On a GPU the step is recorded as a CUDA graph. In eager
   mode a static cache only costs time: attention reads all of it at each step.
2. A GGUF file is decoded to `dtype`; on a CPU its blocks then take the place of what was decoded.
3. On a CPU a packed model of the Llama family reads single tokens by one native call (`models.inference.step`).
4. `apply_kernels` puts a `FourBitLinear` in the place of every 4-bit layer of bitsandbytes: the stored codes and
   scales, and a second copy of the codes in a faster kernel's order where there is one (`kernels.prepare`).
   `kernels.dispatch` chooses anew for every call which form computes it.

These layers have no gradients (`adapters.apply_fused_adapters` has). A layer that bitsandbytes has to keep (a group
that does not divide the columns, 8 bits) is not compiled: its kernels hold state that the compiler cannot follow.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from avalab import kernels
from avalab.engines import engine
from avalab.engines.engine import Engine, Request
from avalab.kernels import Weight4
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.models import adapters, checkpoint, stored, walk
from avalab.models.inference.gguf_weights import apply_packed_gguf
from avalab.models.inference.quantized_cache import QuantizedCache
from avalab.models.inference.step import native_step

SMALLEST_CACHE = 128  # tokens; shorter ones would only mean more graphs


def load(
    artifact: Artifact | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = False,
    own_kernels: bool = True,
    threads: int = 0,
    cache_bits: int = 16,
    packed: bool | None = None,
) -> Engine:
    """Open any artefact that `models.load` can, or a GGUF file; `threads` 0 leaves torch's own choice.

    Without `own_kernels`, bitsandbytes' layers stay its own and no step is native. `packed` is that of
    `checkpoint.load_model`; what is compiled is decoded. `cache_bits` 8 or 4 keeps keys and values in so
    many (`models.inference.quantized_cache`), without a compiled step. Raises InputError for other bits.
    """
    folder = engine.folder_for("torch", artifact)
    found, facts = engine.artifact_kind(folder), engine.model_facts(folder)
    if threads:
        torch.set_num_threads(threads)
    if found == "gguf":
        with contextlib.redirect_stderr(io.StringIO()), stored.headers_read_once():  # a progress bar
            decoded, _ = checkpoint.from_gguf(engine.gguf_file(folder))
            model = torch.nn.Module.to(decoded, device, dtype)
            if not compiled and (device == "cpu" if packed is None else packed):
                apply_packed_gguf(model, engine.gguf_file(folder))
    else:
        source = artifacts.load_artifact(folder, verify=False) if found == "adapter" else folder
        model = checkpoint.load_model(source, device, dtype, packed=False if compiled else packed)
    if own_kernels:
        apply_kernels(model)
    exact = cache_bits == 16
    if not exact:
        QuantizedCache(model.config, cache_bits)  # refused now, not at the first prompt
    step = _compiled(model, folder) if compiled and exact else None
    native = native_step(model) if own_kernels and exact and not compiled else None
    state = {"model": model, "step": step, "native": native, "cache_bits": cache_bits}
    return Engine("torch", folder, facts, state, _new_tokens, _logits)


@torch.inference_mode()
def _compiled(model: PreTrainedModel, folder: Path) -> Callable:
    """The compiled step. Raises NotSupported where a layer is bitsandbytes' own."""
    kept = [name for name, layer in walk.linear_layers(model).items() if type(layer).__module__.startswith("bitsa")]
    if kept:
        raise engine.NotSupported(
            f"{folder.name}: {len(kept)} layers of bitsandbytes, {kept[0]} the first, are not compiled; "
            "load it with compiled=False"
        )
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device))  # the kernels' checks run outside the compiler
    for layer in model.modules():
        if isinstance(layer, FourBitLinear):
            for tensor in layer.weight4.tensors():
                torch._dynamo.mark_static_address(tensor)  # a CUDA graph then reads the weights in place
    on_gpu = model.device.type == "cuda"
    return torch.compile(model.forward, dynamic=False, mode="reduce-overhead" if on_gpu else None)


@torch.inference_mode()
def _logits(state: dict, tokens: list[int]) -> Tensor:
    model = state["model"]
    return model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0].cpu()


@torch.inference_mode()
def _new_tokens(state: dict, request: Request) -> list[int]:
    model, compiled, native = state["model"], state["step"], state["native"]
    bits, read = state["cache_bits"], 0
    cache = DynamicCache(config=model.config) if bits == 16 else QuantizedCache(model.config, bits)
    if compiled is not None:
        tokens = len(request.prompt) + request.max_new_tokens
        cache = StaticCache(config=model.config, max_cache_len=max(SMALLEST_CACHE, 1 << (tokens - 1).bit_length()))

    def step(tokens: list[int]) -> Tensor:
        nonlocal read
        if native is not None and read:
            if native.cache_of is not cache:
                native.begin(cache, len(request.prompt) + request.max_new_tokens + 1)
            return [native.next(token) for token in tokens][-1]
        forward = compiled if compiled and len(tokens) == 1 else model
        ids = torch.tensor([tokens], device=model.device)
        positions = torch.arange(read, read + len(tokens), device=model.device)[None]
        read += len(tokens)
        return forward(ids, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits[0, -1]

    return engine.greedy(step, request)


# --- bitsandbytes' 4-bit layers through the lab's kernels ------------------------------------------------------------


class FourBitLinear(nn.Module):
    """x W^T + bias of a packed weight, in x's dtype."""

    def __init__(self, weight: Weight4, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight4, self.bias = weight, bias  # no Parameter: nothing here is trained or saved
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """The product by the best form whose check has passed."""
        y = kernels.multiply(x, self.weight4)
        return y if self.bias is None else y.add_(self.bias)

    def extra_repr(self) -> str:
        """Shape and group size, as printed with the model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.weight4.group_size}"


def apply_kernels(model: PreTrainedModel) -> int:
    """Replace bitsandbytes' 4-bit layers by `FourBitLinear`, in place; how many were replaced.

    Call it before the model's first forward pass: bitsandbytes re-packs the codes then. A weight that the kernels
    refuse (a group of nothing but zeros) stays as it is, and a warning in the log names its layer and group.
    """
    replaced = 0
    for name, layer in walk.linear_layers(model).items():
        if getattr(layer.weight, "quant_state", None) is None:
            continue
        try:
            weight = kernels.prepare(adapters.frozen_weight(layer, decoded=False))
        except ValueError as error:
            logging.getLogger(__name__).warning("%s stays with bitsandbytes: %s", name, error)
            continue
        walk.replace_linear(model, name, FourBitLinear(weight, layer.bias))
        replaced += 1
    return replaced
