"""One token through a packed model in one native call: a static cache, and no Python between the layers.

`native_step(model)` describes the model to `step.cpp` where that computes what the model does: Llama and Qwen2 with
every linear layer and the head packed, on a CPU with a compiler. Whether it does is not taken on trust: the first time,
a few tokens go both ways, and a step whose logits differ by more than `TOLERANCE` of the largest is not used.

A prompt is read by transformers, whose cache `begin` takes over, in the model's dtype; arithmetic is float32.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from avalab.kernels.packed import native, product
from avalab.lab.errors import InputError
from avalab.models.inference.layers import PackedLinear

FAMILIES = ("llama", "qwen2")

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

BIASED = LINEARS[:3]

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08}  # of the largest logit: bf16 rounds at every layer

TRIED = 6  # tokens


class _Block(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (*LINEARS, "q_bias", "k_bias", "v_bias", "input_norm", "mlp_norm", "keys", "values")
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("blocks", "head", "norm", "cosines", "sines")),
        *((name, ctypes.c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "capacity")),
        *((name, ctypes.c_float) for name in ("epsilon", "scaling")),
        ("bfloat16", ctypes.c_int32),
    ]


@dataclass
class Step:
    """A model as native code reads it; `begin` makes its cache, `next` reads one token."""

    model: PreTrainedModel
    kept: list[Tensor]  # float32 copies of norms and biases, which native code points to
    blocks: ctypes.Array
    about: _Model | None = None
    cache: tuple[Tensor, ...] = ()  # keys, values [layers kv_heads capacity head_dim], cosines, sines
    position: int = 0
    cache_of: DynamicCache | None = None  # what `begin` was given

    def begin(self, cache: DynamicCache, capacity: int) -> None:
        """Take over keys and values of a prompt, which `cache` then no longer holds; room for `capacity` tokens."""
        config, layers, self.cache_of = self.model.config, cache.layers, cache
        heads, size = config.num_key_value_heads, layers[0].keys.shape[-1]
        self.position = layers[0].keys.shape[-2]
        shape, dtype = (len(layers), heads, capacity, size), layers[0].keys.dtype
        keys, values = (torch.empty(shape, dtype=dtype) for _ in range(2))
        for at, layer in enumerate(layers):
            keys[at, :, : self.position], values[at, :, : self.position] = layer.keys[0], layer.values[0]
            layer.keys = layer.values = None
            self.blocks[at].keys, self.blocks[at].values = keys[at].data_ptr(), values[at].data_ptr()
        positions = torch.arange(capacity)[None]
        cosines, sines = self.model.base_model.rotary_emb(torch.zeros(1), positions)
        self.cache = keys, values, cosines[0].float().contiguous(), sines[0].float().contiguous()
        head = product.described(self.model.get_output_embeddings().packed)
        sizes = (config.hidden_size, config.num_attention_heads, heads, size, config.intermediate_size, capacity)
        self.about = _Model(
            ctypes.addressof(self.blocks),
            ctypes.addressof(head),
            self.kept[0].data_ptr(),
            *(table.data_ptr() for table in self.cache[2:]),
            len(layers),
            *sizes,
            config.rms_norm_eps,
            size**-0.5,
            dtype == torch.bfloat16,
        )

    def next(self, token: int) -> Float[Tensor, "vocab"]:
        """Logits after one more token. Raises InputError when the cache is full."""
        if self.position >= self.cache[0].shape[2]:
            raise InputError(f"the cache holds {self.position} tokens and is full")
        x = self.model.get_input_embeddings()(torch.tensor([token]))[0].float()
        logits = torch.empty(self.model.get_output_embeddings().out_features)
        places = (ctypes.byref(self.about), x.data_ptr(), self.position, logits.data_ptr())
        native.library().packed_step(*places, torch.get_num_threads())
        self.position += 1
        return logits


def native_step(model: PreTrainedModel) -> Step | None:
    """The step of a model that native code computes, or None; tried against the model itself first."""
    if not _known(model):
        return None
    step = _described(model)
    if (gap := _gap(step)) > TOLERANCE[model.dtype]:
        logging.getLogger(__name__).warning(
            "the native step differs from %s by %.2g of the largest logit and is not used", model.config.model_type, gap
        )
        return None
    return step


def _known(model: PreTrainedModel) -> bool:
    config, head = model.config, model.get_output_embeddings()
    if config.model_type not in FAMILIES or model.device.type != "cpu" or native.library() is None:
        return False
    if model.dtype not in TOLERANCE or not isinstance(head, PackedLinear) or head.bias is not None:
        return False
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    blocks = model.base_model.layers
    size = getattr(blocks[0].self_attn, "head_dim", 0)
    every = [(name, getattr(part, name, None)) for block in blocks for part, name in _parts(block)]
    packed = all(type(layer) is PackedLinear and (layer.bias is None or name in BIASED) for name, layer in every)
    return packed and size % 16 == 0 and config.hidden_act == "silu"


def _parts(block: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    return [(block.self_attn if at < 4 else block.mlp, name) for at, name in enumerate(LINEARS)]


def _described(model: PreTrainedModel) -> Step:
    kept = [model.base_model.norm.weight.detach().float().contiguous()]

    def place(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept.append(tensor.detach().float().contiguous())
        return kept[-1].data_ptr()

    blocks = (_Block * len(model.base_model.layers))()
    for found, block in zip(blocks, model.base_model.layers, strict=True):
        linears = [getattr(part, name) for part, name in _parts(block)]
        for name, layer in zip(LINEARS, linears, strict=True):
            setattr(found, name, ctypes.addressof(product.described(layer.packed)))
        for name, layer in zip(("q_bias", "k_bias", "v_bias"), linears[:3], strict=True):
            setattr(found, name, place(layer.bias))
        found.input_norm = place(block.input_layernorm.weight)
        found.mlp_norm = place(block.post_attention_layernorm.weight)
    return Step(model, kept, blocks)


@torch.inference_mode()
def _gap(step: Step) -> float:
    """How far logits after a few tokens are from the model's own, over the largest."""
    model, tokens = step.model, (torch.arange(TRIED) * 97 + 3) % step.model.config.vocab_size
    expected = model(tokens[None], use_cache=False).logits[0].float()
    cache = DynamicCache(config=model.config)
    model(tokens[None, :2], past_key_values=cache)
    step.begin(cache, TRIED)
    found = torch.stack([step.next(int(token)) for token in tokens[2:]])
    return float((found - expected[2:]).abs().max() / expected.abs().max())
