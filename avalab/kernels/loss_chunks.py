"""Linear head and loss by chunks of tokens: logits in one buffer, their gradient in the same memory.

Method, for hidden states h [token, width] and head weights W [vocab, width]:
1. the logits of some tokens, z = h W^T, are written into one buffer of about `LOGIT_BYTES`;
2. a function of rows takes the loss of each and overwrites the buffer with its gradient dloss/dz, some rows widened to
   float32 at a time (float64 stays), so that the wide copies are a few MiB whatever the vocabulary;
3. dh = dz W is final for these tokens; dW += dz^T h is summed in float32 (one chunk: in its own dtype), and only when W
   wants a gradient; that sum takes 4 bytes a weight, which `loss_trained_head` spares for a quarter more time;
4. the backward pass multiplies the two by the incoming number.

With p = softmax(z / T), V vocabulary entries and c the weight of a row:
- cross-entropy, smoothing e: loss = logsumexp(z/T) - (1-e) z_y/T - e mean(z/T); gradient = c/T (p - (1-e) onehot_y -
  e/V);
- KL(t || p) T^2: gradient = c T (p - t);
- KL(p || t) T^2: gradient = c T p (d - KL) with d = log p - log t.
Where a family caps its logits (Gemma 2), the buffer is capped before step 2, and the gradient goes through the cap.
The logarithm of the normalizer comes from the largest probability, at least 1/V and so never rounded away: logsumexp =
max - log(max p).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from avalab.kernels.weight import DTYPES
from avalab.lab.errors import InputError

LOGIT_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}  # of the buffer: about the CPU's cache; enough to fill a GPU

FEWEST_TOKENS = 16  # a chunk: fewer make the matrix products slow

WIDE_VALUES = 2**19  # widened at a time

PANEL_VALUES = 2**21  # of the head's gradient, added at a time

Hidden, Head = Float[Tensor, "token width"], Float[Tensor, "vocab width"]

Logits, Labels = Float[Tensor, "token vocab"], Int[Tensor, "token"]

PerToken = Float[Tensor, "token"]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums run in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tokens_that_count(
    hidden: Tensor, weight: Tensor, keep: Tensor | None, temperature: float
) -> tuple[Float[Tensor, "kept width"], Int[Tensor, "kept"]]:
    """Hidden states, flat, and numbers of the tokens that `keep` keeps; None keeps all.

    Raises ValueError for widths, dtypes or counts that differ, or a temperature that is not positive.
    """
    if hidden.shape[-1] != weight.shape[1]:
        raise InputError(f"hidden states of width {hidden.shape[-1]} do not match a head of width {weight.shape[1]}")
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        allowed = ", ".join(str(d) for d in DTYPES)
        raise InputError(
            f"hidden states are {hidden.dtype}, the head {weight.dtype}; both must be the same of {allowed}"
        )
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; it must be positive")
    flat = hidden.reshape(-1, hidden.shape[-1])
    if keep is None:
        return flat, torch.arange(len(flat), device=flat.device)
    if keep.numel() != len(flat):
        raise InputError(f"{len(flat)} hidden states, but targets or a mask for {keep.numel()}")
    kept = keep.reshape(-1).nonzero().squeeze(1)
    return (flat if len(kept) == len(flat) else flat[kept]), kept


def refuse_outside_vocabulary(entries: Int[Tensor, "..."], vocab: int) -> None:
    """Raise ValueError, naming the range, when a vocabulary entry is none."""
    if entries.numel() and not 0 <= int(entries.min()) <= int(entries.max()) < vocab:
        raise InputError(f"targets run from {entries.min()} to {entries.max()}; the vocabulary has {vocab} entries")


def by_tokens(rows: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The form of a loss, `(hidden, head, target, **options)` -> its mean, that takes `rows` of some tokens at a time.

    `rows(logits, *target, weight of a row, **options)` gives each row's loss and overwrites the logits. The target, or
    each of a tuple of them, is indexed by the tokens.
    """

    def run(
        hidden: Tensor, weight: Tensor, target: object, *, softcap: float | None = None, **options: float | bool
    ) -> Float[Tensor, ""]:
        parts = target if isinstance(target, tuple) else (target,)

        def losses(logits: Tensor, tokens: slice, row_weight: float) -> Tensor:
            slope = cap_in_place(logits, softcap)
            found = rows(logits, *(part[tokens] for part in parts), row_weight, **options)
            if slope is not None:
                logits.mul_(slope)
            return found

        return _ByTokens.apply(hidden, weight, losses)

    return run


def cap_in_place(logits: Logits, softcap: float | None) -> Logits | None:
    """Make s tanh(z / s) of logits z, and return its derivative 1 - tanh^2(z / s); without a cap, do nothing."""
    if softcap is None:
        return None
    logits.div_(softcap).tanh_()
    slope = 1 - logits.square()
    logits.mul_(softcap)
    return slope


def loss_check(
    reference: Callable, *runs: Callable, target: Callable[[Tensor], object], **options: float | bool
) -> Callable[[str], None]:
    """A check for `Form`: loss and both gradients in float32, on 21 tokens and 67 vocabulary entries.

    `target` makes what the loss is measured against from a teacher's logits.
    """

    def check(device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = ((21, 8), (67, 8), (21, 67))
        h, w, teacher = (torch.randn(s, generator=generator).to(device) for s in shapes)
        found = []
        for run in (reference, *runs):
            inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
            with torch.enable_grad():
                loss = run(*inputs, target(teacher), **options)
            found.append([loss, *torch.autograd.grad(loss, inputs)])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)

    return check


# --- loss and gradient of rows -----------------------------------------------------------------------------------


def cross_entropy_rows(
    logits: Logits, targets: Labels, row_weight: float, *, label_smoothing: float = 0.0, temperature: float = 1.0
) -> PerToken:
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
    logits: Logits, teacher: Logits, row_weight: float, *, reverse: bool = False, temperature: float = 1.0
) -> PerToken:
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


# --- chunks of tokens ----------------------------------------------------------------------------------------------


@staticmethod
@once_differentiable
def scaled_gradients(ctx, outer: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """The backward pass of a loss whose gradients were saved in the forward pass: those, times the incoming number."""
    # Times one is not worth a copy of the head's gradient; on a GPU the question would cost a wait for it.
    plain = outer.device.type == "cpu" and outer.item() == 1
    dh, dw = (g if g is None or plain else g * outer.to(g.dtype) for g in ctx.saved_tensors)
    return dh, dw, None


class _ByTokens(torch.autograd.Function):
    """Mean over tokens of `losses(logits, tokens, weight of a row)`; zero without tokens."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, losses: Callable[..., Tensor]) -> Tensor:
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        dh = torch.zeros_like(hidden) if wants_hidden else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        chunk = tokens_in_chunk(weight.device.type, len(weight) * weight.element_size())
        chunk = min(chunk, max(1, len(hidden)))
        summed = working_dtype(weight.dtype) if len(hidden) > chunk else weight.dtype
        dw = torch.zeros_like(weight, dtype=summed) if wants_weight else None
        buffer = hidden.new_empty(chunk, len(weight))
        for first in range(0, len(hidden), chunk):
            part = slice(first, min(first + chunk, len(hidden)))
            logits = torch.mm(hidden[part], weight.T, out=buffer[: part.stop - first])
            total += losses(logits, part, 1 / len(hidden)).sum(dtype=torch.float64)
            if wants_hidden:
                dh[part] = logits @ weight
            if wants_weight:
                add_outer(dw, logits, hidden[part])
        ctx.save_for_backward(dh, None if dw is None else dw.to(weight.dtype))
        return (total / max(1, len(hidden))).to(working_dtype(hidden.dtype))

    backward = scaled_gradients


def tokens_in_chunk(device: str, token_bytes: int) -> int:
    """Tokens whose logits, of so many bytes each, fill the buffer: a multiple of 16, at least 16."""
    room = LOGIT_BYTES.get(device, LOGIT_BYTES["cuda"])
    return max(FEWEST_TOKENS, room // token_bytes // FEWEST_TOKENS * FEWEST_TOKENS)


def add_outer(dw: Head, dz: Logits, h: Hidden) -> None:
    """dw += dz^T h, some vocabulary entries at a time: the product's dtype is the inputs', the sum's is dw's."""
    if dw.dtype == dz.dtype:
        dw.addmm_(dz.T, h)
        return
    step = max(1, PANEL_VALUES // h.shape[1])
    for first in range(0, len(dw), step):
        dw[first : first + step] += dz[:, first : first + step].T @ h
