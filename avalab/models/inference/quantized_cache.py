"""A key-value cache in 8 or 4 bits: keys by channel, values by token, the most recent tokens exact.

Keys have channels that are large in every token, values have not: so a key shares its scale with the same channel of
the `GROUP` tokens around it, a value with the other channels of its token. What came last, at least `WINDOW` tokens,
is kept as it is; older tokens are rounded `GROUP` at a time, once, and never again. Attention reads decoded keys and
values, which exist for one layer at a time.

    value = code * scale + least,   scale = (greatest - least) / (2^bits - 1),   both in float16

Source: KIVI (Liu et al. 2024, arXiv 2402.02750), sections 3.2 and 4, whose groups of 32 and residual these are.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from avalab.lab.errors import InputError

GROUP, WINDOW = 32, 128

BITS = (8, 4)

Codes = tuple[Tensor, Tensor, Tensor]  # codes, scales, least values


class QuantizedCache(Cache):
    """A cache for a model of this configuration. Raises InputError for other bits or sliding windows."""

    def __init__(self, config: PreTrainedConfig, bits: int) -> None:
        config = config.get_text_config()
        if bits not in BITS:
            raise InputError(f"no cache of {bits} bits; choose {' or '.join(map(str, BITS))}, or 16 for an exact one")
        if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
            raise InputError(f"{config.model_type} has layers without full attention; its cache is kept in 16 bits")
        super().__init__(layers=[QuantizedLayer(bits) for _ in range(config.num_hidden_layers)])

    @property
    def bytes(self) -> int:
        """Bytes that keys and values take."""
        return sum(layer.bytes for layer in self.layers)


class QuantizedLayer(DynamicLayer):
    """The cache of one layer; `keys` and `values` hold the exact tokens."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.old: tuple[Codes, Codes] | None = None
        self.old_tokens = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, the new ones last; older ones are decoded."""
        keys, values = super().update(key_states, value_states)
        if self.old is not None:
            read = [decode(part, self.bits, keys.dtype) for part in self.old]
            whole = torch.cat((read[0], keys), -2), torch.cat((read[1], values), -2)
        else:
            whole = keys, values
        ripe = (keys.shape[-2] - WINDOW) // GROUP * GROUP
        if ripe > 0:
            fresh = encode_keys(keys[..., :ripe, :], self.bits), encode_values(values[..., :ripe, :], self.bits)
            if self.old is not None:
                fresh = tuple(_joined(*pair) for pair in zip(self.old, fresh, strict=True))
            self.old, self.old_tokens = fresh, self.old_tokens + ripe
            self.keys, self.values = keys[..., ripe:, :].clone(), values[..., ripe:, :].clone()
        return whole

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.old_tokens + super().get_seq_length()

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales and exact tokens."""
        held = [*(part for codes in self.old or () for part in codes)]
        held += [self.keys, self.values] if self.is_initialized else []
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def encode_keys(keys: Float[Tensor, "batch head token channel"], bits: int) -> Codes:
    """Codes with a scale for each channel of `GROUP` tokens, which have to divide the tokens."""
    codes, scales, least = _rounded(keys.unflatten(-2, (-1, GROUP)), bits, -2)
    return codes.flatten(-3, -2), scales, least


def encode_values(values: Float[Tensor, "batch head token channel"], bits: int) -> Codes:
    """Codes with a scale for each token."""
    return _rounded(values, bits, -1)


def _rounded(numbers: Tensor, bits: int, axis: int) -> Codes:
    least, greatest = numbers.float().amin(axis, keepdim=True).half(), numbers.float().amax(axis, keepdim=True)
    scales = ((greatest - least.float()) / (2**bits - 1)).clamp(min=2**-14).half()
    codes = ((numbers.float() - least.float()) / scales.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return _halved(codes) if bits == 4 else codes, scales, least


def _halved(codes: UInt8[Tensor, "*any channel"]) -> UInt8[Tensor, "*any half"]:
    return codes[..., ::2] | codes[..., 1::2] << 4


def decode(part: Codes, bits: int, dtype: torch.dtype) -> Float[Tensor, "batch head token channel"]:
    """Keys or values of their codes: computed in float32, rounded once."""
    codes, scales, least = part
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    if scales.ndim > codes.ndim:  # keys: groups of tokens
        codes = codes.unflatten(-2, (-1, GROUP))
        return (codes * scales.float() + least.float()).flatten(-3, -2).to(dtype)
    return (codes * scales.float() + least.float()).to(dtype)


def _joined(old: Codes, fresh: Codes) -> Codes:
    """Both, one after the other: codes along tokens, scales along tokens or groups of them."""
    return tuple(torch.cat(pair, 2) for pair in zip(old, fresh, strict=True))


def cache_bytes(config: PreTrainedConfig, tokens: int, bits: int, *, value_bytes: int = 2) -> int:
    """Bytes that the cache of one sequence will take."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    old = max(0, (tokens - WINDOW) // GROUP * GROUP)
    coded = old * 2 * size * bits // 8 + 4 * (old // GROUP * size + old)
    return config.num_hidden_layers * heads * (coded + (tokens - old) * 2 * size * value_bytes)
