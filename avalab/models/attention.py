"""Causal attention within each example of a packed row: exact, and no mask of row length squared.

Each example of the row, as `boundaries` marks them, attends to itself in a call of its own, so that the cost is the sum
of the examples' squares. It is put into a transformers model under a name of its own; models hand `boundaries` through.
Whether a model really does, and keeps nothing else from one example to the next (a state, a convolution, positions that
depend on the longest), is tried once on two short examples: one that does not is refused by its family's name.

On a CPU examples of at most LONGEST tokens take `attend`: a few dense products for all heads at once, the probabilities
kept for the backward pass. torch's fused kernel works in blocks that are too small for bf16 units there: at 250 tokens,
9 heads of 64 and 2 threads its backward pass took four times as long. Longer examples, and GPUs, take the fused one;
what looks back no further than a window goes there with a mask, and soft caps (Gemma 2) are computed as written.

An example may hold two answers to one prompt, which then is computed once: `forks` says where the first begins and
where the second one does, and the second attends to the prompt and itself (Wang and Hegde 2024, arXiv 2410.20305).

`group` makes it shifted sparse attention (LongLoRA: Chen et al. 2023, arXiv 2309.12307, section 3.2): tokens attend
within groups of so many, half of the heads within groups that lie half a group later, so that what one half tells
neighbours the other half tells on. The paper rolls the sequence, which puts its end and its beginning into one group:
there the beginning sees what comes later. Here the two are half groups of their own, and nothing leaks.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from avalab.lab.errors import InputError
from avalab.models import stored

NAME = "packed"

LONGEST = 640  # tokens: beyond, kept probabilities cost more memory than the time is worth


PROBED = (5, 7)  # tokens of the examples that packing is tried on

LEAK = 5e-3  # of a hidden state's length: sums in another order, where an expert sees the tokens of both

DIFFERENCE = 0.1  # of its length, on average: two ways to compute the same attention in 16 bits

_known_models: WeakSet[PreTrainedModel] = WeakSet()


def apply_packed_attention(model: PreTrainedModel) -> None:
    """Let the model attend within `boundaries`, a keyword of its forward call ([examples + 1] token offsets).

    Raises ValueError, naming the family, for a model whose packed examples are not what they are alone.
    """
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    kind, inner = model.config.model_type, model.base_model
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(inner.forward).parameters.values()):
        raise InputError(_refusal(kind, "its layers take no keyword of ours"))
    if model in _known_models:
        model.set_attn_implementation(NAME)
        return
    with stored.tried_out(model):
        _refuse_leaks(model)
    _known_models.add(model)


def _refuse_leaks(model: PreTrainedModel) -> None:
    """Raise ValueError where two packed examples are not what they are alone, or the first one changes the second."""
    kind, size = model.config.model_type, model.config.get_text_config().vocab_size
    first, second = (torch.arange(n) * 89 % size for n in PROBED)
    alone = model.base_model(input_ids=second[None].to(model.device), use_cache=False).last_hidden_state
    try:
        model.set_attn_implementation(NAME)
    except ValueError as error:
        raise InputError(_refusal(kind, f"transformers says: {error}")) from error
    packed, beside_another = (_second_of_two(model, part, second) for part in (first, (first + 11) % size))
    if _distance(beside_another, packed) > LEAK:
        raise InputError(_refusal(kind, "an example changes the one packed behind it"))
    if _distance(packed, alone[0]) > DIFFERENCE:
        raise InputError(_refusal(kind, "a packed example is not what it is alone"))


def _refusal(kind: str, why: str) -> str:
    return (
        f"{kind} models cannot be trained here: {why}; models of plain attention can (Llama, Qwen, Mistral, Gemma, "
        "Phi-3, Granite, OLMo 2, SmolLM3, ...)"
    )


def _second_of_two(model: PreTrainedModel, first: Tensor, second: Tensor) -> Tensor:
    """Final hidden states of an example that is packed behind another one."""
    row, ends = torch.cat([first, second]), torch.tensor([0, len(first), len(first) + len(second)])
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])
    given = {"input_ids": row[None].to(model.device), "position_ids": positions[None].to(model.device)}
    return model.base_model(**given, boundaries=ends, use_cache=False).last_hidden_state[0, len(first) :]


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Mean over tokens of how far hidden states are apart, over their length."""
    return float(((found - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)).mean())


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 head token channel"],
    key: Float[Tensor, "1 kv_head token channel"],
    value: Float[Tensor, "1 kv_head token channel"],
    attention_mask: None,
    *,
    boundaries: Tensor | None = None,
    forks: Tensor | None = None,
    group: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: object,
) -> tuple[Float[Tensor, "1 token head channel"], None]:
    """Softmax attention of each example with itself, looking back less than `sliding_window` tokens where there is one.

    `forks` ["example 2"] are token offsets: where each example's first answer begins, and where its second one does.
    `group` is how many tokens attend to each other where attention is sparse and shifted.
    Raises ValueError for attention sinks, other position biases, and an example beyond the length at which rotary
    embeddings change for the whole row.
    """
    ends = [0, query.shape[2]] if boundaries is None else boundaries.tolist()
    if group is not None:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        halves = zip(*(t.tensor_split(2, dim=1) for t in (query, key, value)), strict=True)
        cuts = (_grouped(ends, int(group), shift) for shift in (0, int(group) // 2))
        options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap, **more}
        outputs = [
            packed_attention(module, *half, None, boundaries=cut, **options)[0]
            for half, cut in zip(halves, cuts, strict=True)
        ]
        return torch.cat(outputs, dim=2), None
    _refuse_unknown(module, more, longest=max(end - start for start, end in pairwise(ends)))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    how, parts = (scaling, dropout, sliding_window, softcap), []
    for index, (start, end) in enumerate(pairwise(ends)):
        first, second = (end, end) if forks is None else forks[index].tolist()
        parts.append(_one(*(t[:, :, start:second] for t in (query, key, value)), *how))
        if second < end:
            seen = (torch.cat([t[:, :, start:first], t[:, :, second:end]], dim=2) for t in (key, value))
            parts.append(_one(query[:, :, second:end], *seen, *how))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _grouped(ends: list[int], group: int, shift: int) -> Tensor:
    """Boundaries of groups of so many tokens inside each example, the first one of `shift` tokens where that is any."""
    cuts = {cut for start, end in pairwise(ends) for cut in range(start + (shift or group), end, group)}
    return torch.tensor(sorted({*ends, *cuts}))


def _refuse_unknown(module: nn.Module, more: dict, *, longest: int) -> None:
    if unknown := [name for name in ("s_aux", "position_bias") if more.get(name) is not None]:
        raise InputError(_refusal(module.config.model_type, f"packed attention knows no {', '.join(unknown)}"))
    rotary = getattr(module.config, "rope_parameters", None) or {}
    first = rotary.get("original_max_position_embeddings")
    if rotary.get("rope_type") in ("longrope", "dynamic") and first and longest > first:
        raise InputError(
            f"an example has {longest} tokens, and beyond {first} the rotary embedding of {module.config.model_type} "
            "models depends on the longest of a row; leave longer examples out (--row-tokens)"
        )


def _one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The queries are those of the last keys."""
    tokens, keys = query.shape[2], key.shape[2]
    windowed = window is not None and 0 < window < keys
    masked = windowed or tokens < keys
    if query.device.type == "cpu" and keys <= LONGEST and not (dropout or windowed or softcap):
        return attend(query[0], key[0], value[0], scaling)[None]
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    if not (masked or softcap):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, dropout_p=dropout)
    seen = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
    if windowed:
        seen = seen.triu(keys - tokens + 1 - window)
    if not softcap:
        return F.scaled_dot_product_attention(query, key, value, seen, scale=scaling, dropout_p=dropout)
    scores = softcap * torch.tanh(query @ key.mT * (scaling / softcap))
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(p, dropout) @ value


def attend(
    query: Float[Tensor, "head token channel"],
    key: Float[Tensor, "kv_head past channel"],
    value: Float[Tensor, "kv_head past channel"],
    scaling: float,
) -> Float[Tensor, "head token channel"]:
    """softmax(scaling Q K^T + causal mask) V; a key-value head serves the query heads of its group.

    There may be more keys than queries: these are then the last ones'.
    Source: Vaswani et al. 2017, eq. 1; groups: Ainslie et al. 2023.
    """
    return _Attention.apply(query, key, value, scaling)


class _Attention(torch.autograd.Function):
    """dV = P^T dO, dS = P (dP - sum(dP P)) with dP = dO V^T, dQ = s dS K, dK = s dS^T Q."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        heads, tokens, channels = query.shape
        keys = key.shape[1]
        grouped = query.reshape(len(key), -1, channels)  # a group's queries are rows of one product
        scores = (grouped * scaling) @ key.mT
        future = torch.full((tokens, keys), float("-inf"), dtype=query.dtype).triu(1 + keys - tokens)
        p = (scores.view(heads, tokens, keys) + future).softmax(-1).view_as(scores)
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
