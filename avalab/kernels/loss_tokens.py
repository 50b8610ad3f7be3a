"""Linear head and loss by chunks of tokens, both gradients computed in the forward pass.

Method, for hidden states h [token, width] and head weights W [vocab, width]:
1. the logits of some tokens, z = h W^T, are written into one buffer of about `LOGIT_BYTES`;
2. the loss of each row is taken and the buffer overwritten with its gradient, dloss/dz (`loss_rows`, `triton_loss`);
3. dh = dz W is final for these tokens; dW += dz^T h is summed in float32 (one chunk: in its own dtype), and only when W
   wants a gradient;
4. the backward pass multiplies the two by the incoming number.

What it does not do: keep dW small: while it is summed it takes 4 bytes a weight. `loss_words` does, for a quarter more
time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from avalab.kernels.loss_rows import working_dtype

LOGIT_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}  # of the buffer: about the CPU's cache; enough to fill a GPU
FEWEST_TOKENS = 16  # a chunk: fewer make the matrix products slow
PANEL_VALUES = 2**21  # of the head's gradient, added at a time

Rows = Callable[[Tensor, slice, float], Tensor]  # logits of some tokens, weight of a row -> losses; overwrites them


def mean_loss(
    hidden: Float[Tensor, "token width"], weight: Float[Tensor, "vocab width"], rows: Rows
) -> Float[Tensor, ""]:
    """Mean over tokens of what `rows` returns, differentiable in both tensors; zero without tokens."""
    return _ByTokens.apply(hidden, weight, rows)


@staticmethod
@once_differentiable
def scaled_gradients(ctx, outer: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """The backward pass of a loss whose gradients were saved in the forward pass: those, times the incoming number."""
    # Times one is not worth a copy of the head's gradient; on a GPU the question would cost a wait for it.
    plain = outer.device.type == "cpu" and outer.item() == 1
    dh, dw = (g if g is None or plain else g * outer.to(g.dtype) for g in ctx.saved_tensors)
    return dh, dw, None


class _ByTokens(torch.autograd.Function):
    """Mean over tokens of what `rows` returns, with both gradients computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, rows: Rows) -> Tensor:
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        dh = torch.zeros_like(hidden) if wants_hidden else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        chunk = min(tokens_in_chunk(weight), max(1, len(hidden)))
        summed = working_dtype(weight.dtype) if len(hidden) > chunk else weight.dtype
        dw = torch.zeros_like(weight, dtype=summed) if wants_weight else None
        buffer = hidden.new_empty(chunk, len(weight))
        for first in range(0, len(hidden), chunk):
            part = slice(first, min(first + chunk, len(hidden)))
            logits = torch.mm(hidden[part], weight.T, out=buffer[: part.stop - first])
            total += rows(logits, part, 1 / len(hidden)).sum(dtype=torch.float64)
            if wants_hidden:
                dh[part] = logits @ weight
            if wants_weight:
                _add_outer(dw, logits, hidden[part])
        ctx.save_for_backward(dh, None if dw is None else dw.to(weight.dtype))
        return (total / max(1, len(hidden))).to(working_dtype(hidden.dtype))

    backward = scaled_gradients


def tokens_in_chunk(weight: Float[Tensor, "vocab width"]) -> int:
    """Tokens whose logits fill the buffer: a multiple of 16, at least 16."""
    room = LOGIT_BYTES.get(weight.device.type, LOGIT_BYTES["cuda"])
    return max(FEWEST_TOKENS, room // (len(weight) * weight.element_size()) // FEWEST_TOKENS * FEWEST_TOKENS)


def _add_outer(
    dw: Float[Tensor, "vocab width"], dz: Float[Tensor, "chunk vocab"], h: Float[Tensor, "chunk width"]
) -> None:
    """dw += dz^T h, some words at a time: the product's dtype is the inputs', the sum's is dw's."""
    if dw.dtype == dz.dtype:
        dw.addmm_(dz.T, h)
        return
    step = max(1, PANEL_VALUES // h.shape[1])
    for first in range(0, len(dw), step):
        dw[first : first + step] += dz[:, first : first + step].T @ h
