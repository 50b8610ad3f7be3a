"""Attention inside packed rows: torch's own result and gradients, whichever way it is computed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from avalab.models import attention


def layer():
    """An attention layer as far as packed attention asks it: for its configuration."""
    made = torch.nn.Module()
    made.config = LlamaConfig()
    return made


def heads(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype).requires_grad_()


def test_attention_gradients_agree_with_finite_differences_in_float64():
    q, k, v = heads(4, 5, 3), heads(2, 5, 3), heads(2, 5, 3)
    assert torch.autograd.gradcheck(lambda *t: attention.attend(*t, 0.7), (q, k, v))


@given(tokens=st.integers(1, 40), kv=st.integers(1, 3), group=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_attention_and_its_gradients_are_those_of_torchs_own(tokens, kv, group):
    q, k, v = heads(kv * group, tokens, 8), heads(kv, tokens, 8), heads(kv, tokens, 8)
    ours = attention.attend(q, k, v, 0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q[None], *(t[None].repeat_interleave(group, 1) for t in (k, v)), is_causal=True, scale=0.3
    )[0]
    torch.testing.assert_close(ours, theirs)
    weight = torch.arange(ours.numel(), dtype=torch.float64).view_as(ours)
    gradients = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_long_examples_go_through_the_fused_kernel_with_the_same_result(monkeypatch):
    q, k, v = heads(1, 4, 9, 8), heads(1, 2, 9, 8), heads(1, 2, 9, 8)
    short, _ = attention.packed_attention(layer(), q, k, v, None)
    monkeypatch.setattr(attention, "LONGEST", 8)
    long, _ = attention.packed_attention(layer(), q, k, v, None)
    torch.testing.assert_close(short, long)


def test_a_window_hides_what_lies_before_it_as_torchs_own_mask_does():
    q, k, v = heads(1, 4, 6, 8), heads(1, 4, 6, 8), heads(1, 4, 6, 8)
    ours, _ = attention.packed_attention(layer(), q, k, v, None, sliding_window=3)
    seen = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
