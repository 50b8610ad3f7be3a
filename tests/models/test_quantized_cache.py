"""A key-value cache in 8 or 4 bits: what is rounded how, what stays exact, and what it weighs."""

import pytest
import torch
from transformers import DynamicCache

from avalab import engines
from avalab.lab.errors import InputError
from avalab.models import checkpoint
from avalab.models.inference import quantized_cache as caches
from avalab.models.inference.quantized_cache import GROUP, WINDOW, QuantizedCache


def test_a_token_of_values_spans_its_codes_from_least_to_greatest():
    values = torch.tensor([[[[0.0, 3.0, 1.1, 15.0]]]])
    codes, scales, least = caches.encode_values(values, 4)
    assert scales.item() == 1.0
    assert least.item() == 0.0
    assert codes.flatten().tolist() == [0 | 3 << 4, 1 | 15 << 4]
    assert caches.decode((codes, scales, least), 4, torch.float32).flatten().tolist() == [0, 3, 1, 15]


@pytest.mark.parametrize("bits", caches.BITS)
def test_a_channel_that_is_large_in_every_key_costs_the_others_no_precision(bits):
    keys = torch.rand(1, 2, 2 * GROUP, 8)
    keys[..., 3] += 200
    found = caches.decode(caches.encode_keys(keys, bits), bits, torch.float32)
    others = [channel for channel in range(8) if channel != 3]
    assert (found - keys)[..., others].abs().max() <= 0.51 / (2**bits - 1) + 1e-3


def filled(bits: int, tokens: int, base) -> tuple[QuantizedCache, DynamicCache]:
    config = checkpoint.load_model(base).config
    pair, generator = (QuantizedCache(config, bits), DynamicCache(config=config)), torch.Generator().manual_seed(0)
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for step in (tokens - 40, *[1] * 40):
        keys, values = (torch.randn(1, heads, step, size, generator=generator).bfloat16() for _ in range(2))
        for layer in range(config.num_hidden_layers):
            for cache in pair:
                cache.update(keys, values, layer)
    return pair


@pytest.mark.parametrize("bits", caches.BITS)
def test_bytes_are_those_predicted_and_recent_tokens_are_exact(bits, base):
    tokens = 500
    ours, exact = filled(bits, tokens, base)
    config = checkpoint.load_model(base).config
    assert ours.bytes == caches.cache_bytes(config, tokens, bits)
    assert ours.bytes < (0.75 if bits == 8 else 0.55) * caches.cache_bytes(config, tokens, 16)
    assert ours.get_seq_length() == exact.get_seq_length() == tokens
    new = torch.randn(1, config.num_key_value_heads, 1, config.hidden_size // config.num_attention_heads).bfloat16()
    for part, whole in zip(ours.update(new, new, 0), exact.update(new, new, 0), strict=True):
        assert torch.equal(part[..., -WINDOW:, :], whole[..., -WINDOW:, :])
        assert not torch.equal(part, whole)


def test_eight_bits_hardly_move_the_logits_and_four_bits_move_them_more(base):
    model, tokens = checkpoint.load_model(base, dtype=torch.float32), torch.randint(3, 500, (1, 400))
    with torch.inference_mode():
        expected = model(tokens).logits[0, -1].log_softmax(-1)
        gaps = []
        for bits in caches.BITS:
            cache = QuantizedCache(model.config, bits)
            model(tokens[:, :-1], past_key_values=cache)
            found = model(tokens[:, -1:], past_key_values=cache).logits[0, -1].log_softmax(-1)
            gaps.append(float((expected.exp() * (expected - found)).sum()))
    assert gaps[0] < 1e-3
    assert gaps[0] < gaps[1] < 0.2


def test_the_engine_takes_such_a_cache(base):
    prompt = list(range(3, 300))
    assert len(engines.load("torch", base, cache_bits=8).generate(prompt, 8, past_end=True)) == 8
    with pytest.raises(InputError, match="no cache of 3 bits; choose 8 or 4"):
        engines.load("torch", base, cache_bits=3)


def test_layers_with_sliding_windows_are_refused(gemma):
    with pytest.raises(InputError, match="gemma3_text has layers without full attention"):
        QuantizedCache(gemma.config, 8)
