"""Loss and gradient of rows of logits, the gradient in the logits' own memory.

Some rows at a time are widened to float32 (float64 stays), so the wide copies are a few MiB whatever the vocabulary.
With p = softmax(z / T), V words and c the weight of a row:
- cross-entropy, smoothing e: loss = logsumexp(z/T) - (1-e) z_y/T - e mean(z/T); gradient = c/T (p - (1-e) onehot_y -
  e/V);
- KL(t || p) T^2: gradient = c T (p - t);
- KL(p || t) T^2: gradient = c T p (d - KL) with d = log p - log t.

What it does not do: sum over rows, leave tokens out. The logarithm of the normalizer comes from the largest
probability, at least 1/V and so never rounded away: logsumexp = max - log(max p).

Linear head and loss by chunks of tokens, both gradients computed in the forward pass.

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

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDE_VALUES = 2**19  # widened at a time


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums run in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cross_entropy_rows(
    logits: Float[Tensor, "token vocab"],
    targets: Int[Tensor, "token"],
    row_weight: float,
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
) -> Float[Tensor, "token"]:
    """Cross-entropy of each row in nats; `logits` become the gradient of their sum times `row_weight`."""
    losses = logits.new_empty(len(logits), dtype=working_dtype(logits.dtype))
    spread = label_smoothing / logits.shape[1]
    for part, x in wide(logits, temperature):
        place = targets[part, None].long()
        scored = x.gather(1, place).squeeze(1) * (1 - label_smoothing)
        if label_smoothing:
            scored += spread * x.sum(1)
        top = x.amax(1)
        p = torch.softmax(x, 1)
        losses[part] = top - p.amax(1).log() - scored
        if label_smoothing:
            p -= spread
        p.scatter_add_(1, place, p.new_full((1, 1), label_smoothing - 1).expand(len(p), 1))
        logits[part] = p.mul_(row_weight / temperature)
    return losses


def kl_rows(
    logits: Float[Tensor, "token vocab"],
    teacher: Float[Tensor, "token vocab"],
    row_weight: float,
    *,
    reverse: bool = False,
    temperature: float = 1.0,
) -> Float[Tensor, "token"]:
    """KL divergence of each row in nats times T^2; `logits` become the gradient of their sum times `row_weight`."""
    losses = logits.new_empty(len(logits), dtype=working_dtype(logits.dtype))
    for part, x in wide(logits, temperature):
        student = torch.log_softmax(x, 1)
        other = torch.log_softmax(teacher[part].to(x.dtype) / temperature, 1)
        p = student.exp()
        if reverse:
            gap = torch.where(p == 0, 0.0, student - other)
            losses[part] = (p * gap).sum(1)
            gradient = p.mul_(gap.sub_(losses[part, None]))
        else:
            t = other.exp()
            losses[part] = torch.where(t == 0, 0.0, t * (other - student)).sum(1)
            gradient = p.sub_(t)
        logits[part] = gradient.mul_(row_weight * temperature)
    return losses.mul_(temperature**2)


def wide(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits over the temperature, widened, some at a time."""
    step = max(1, WIDE_VALUES // logits.shape[1])
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        x = logits[part].to(working_dtype(logits.dtype))
        yield part, x / temperature if temperature != 1 else x


# --- linear head and loss by chunks of tokens, both gradients computed in the forward pass --------------------------


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
