"""Causal attention within each example of a packed row: exact, and no mask of row length squared.

Each example of the row, as `boundaries` marks them, attends to itself in a call of its own, so that the cost is the sum
of the examples' squares. It is put into a transformers model under a name of its own; models hand `boundaries` through.

On a CPU examples of at most LONGEST tokens take `attend`: a few dense products for all heads at once, the probabilities
kept for the backward pass. torch's fused kernel works in blocks that are too small for bf16 units there: at 250 tokens,
9 heads of 64 and 2 threads its backward pass took four times as long. Longer examples, and GPUs, take the fused one.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from avalab.lab.errors import InputError

NAME = "packed"

LONGEST = 640  # tokens: beyond, kept probabilities cost more memory than the time is worth


def apply_packed_attention(model: PreTrainedModel) -> None:
    """Let the model attend within `boundaries`, a keyword of its forward call ([examples + 1] token offsets)."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 head token channel"],
    key: Float[Tensor, "1 kv_head token channel"],
    value: Float[Tensor, "1 kv_head token channel"],
    attention_mask: None,
    *,
    boundaries: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Float[Tensor, "1 token head channel"], None]:
    """Softmax attention of each example with itself. Raises ValueError for a window or soft cap it does not know."""
    ends = [0, query.shape[2]] if boundaries is None else boundaries.tolist()
    longest = max(end - start for start, end in pairwise(ends))
    if softcap or (sliding_window and longest > sliding_window):
        raise InputError(f"packed attention knows no soft cap and no window below {longest} tokens; shorten the rows")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = [
        _one(*(t[:, :, start:end] for t in (query, key, value)), scaling, dropout) for start, end in pairwise(ends)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _one(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
    if query.device.type == "cpu" and query.shape[2] <= LONGEST and not dropout:
        return attend(query[0], key[0], value[0], scaling)[None]
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, dropout_p=dropout)


def attend(
    query: Float[Tensor, "head token channel"],
    key: Float[Tensor, "kv_head token channel"],
    value: Float[Tensor, "kv_head token channel"],
    scaling: float,
) -> Float[Tensor, "head token channel"]:
    """softmax(scaling Q K^T + causal mask) V; a key-value head serves the query heads of its group.

    Source: Vaswani et al. 2017, eq. 1; groups: Ainslie et al. 2023.
    """
    return _Attention.apply(query, key, value, scaling)


class _Attention(torch.autograd.Function):
    """dV = P^T dO, dS = P (dP - sum(dP P)) with dP = dO V^T, dQ = s dS K, dK = s dS^T Q."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        heads, tokens, channels = query.shape
        grouped = query.reshape(len(key), -1, channels)  # a group's queries are rows of one product
        scores = (grouped * scaling) @ key.mT
        future = torch.full((tokens, tokens), float("-inf"), dtype=query.dtype).triu(1)
        p = (scores.view(heads, tokens, tokens) + future).softmax(-1).view_as(scores)
        ctx.save_for_backward(grouped, key, value, p)
        ctx.scaling = scaling
        return (p @ value).view(heads, tokens, channels)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, p = ctx.saved_tensors
        gradient_shape, gradient = gradient.shape, gradient.reshape(query.shape)
        ds = torch._softmax_backward_data(gradient @ value.mT, p, -1, p.dtype)
        dq, dk = (ds @ key) * ctx.scaling, (ds.mT @ query) * ctx.scaling
        return dq.view(gradient_shape), dk, p.mT @ gradient, None


def _no_mask(*_: object, **__: object) -> None:
    """Causality and boundaries are the attention function's own business."""
