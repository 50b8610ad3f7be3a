"""Log-probability of each token's target by chunks of tokens (`loss_chunks`), differentiable token by token.

A loss that is no mean over tokens (a preference between whole answers) weighs each token by what comes out for all of
them, which is known only afterwards. The gradient with respect to a token's hidden state is linear in that weight:

1. forwards, d log p / dh = (onehot - p) W is computed beside log p, for some tokens at a time, and kept: width numbers
   a token, where the logits would be a vocabulary's;
2. backwards it is multiplied by the incoming number of its token. Only a head that is trained has its logits made a
   second time, since its gradient sums over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from avalab.kernels import loss_chunks
from avalab.kernels.dispatch import Form, choose_form
from avalab.kernels.loss_chunks import Head, Hidden, Labels, PerToken, working_dtype


def linear_log_probabilities(
    hidden: Hidden, weight: Head, targets: Labels, *, softcap: float | None = None
) -> PerToken:
    """log softmax(`hidden @ weight.T`) at each token's target, in nats, differentiable in both.

    With `softcap` s, logits are s tanh(hidden @ weight.T / s). Raises ValueError for widths, dtypes or counts that
    differ, or a target outside the vocabulary.
    """
    loss_chunks.tokens_that_count(hidden, weight, torch.ones_like(targets, dtype=torch.bool), 1.0)
    loss_chunks.refuse_outside_vocabulary(targets, len(weight))
    form = choose_form("linear_log_probabilities", LOG_PROBABILITIES, weight.device, hidden)
    return form.run(hidden, weight, targets, softcap=softcap)


def log_probabilities_reference(
    hidden: Hidden, weight: Head, targets: Labels, *, softcap: float | None = None
) -> PerToken:
    """Full logits, their log-softmax, and one entry of each row."""
    logits = (hidden @ weight.T).to(working_dtype(hidden.dtype))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


class _TokenByToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        wants_hidden, ctx.wants_weight = ctx.needs_input_grad[:2]
        dh = torch.zeros_like(hidden) if wants_hidden else None
        found = hidden.new_empty(len(hidden), dtype=working_dtype(hidden.dtype))
        for part, losses, gradient in _chunks(hidden, weight, targets, softcap):
            found[part] = -losses
            if wants_hidden:
                torch.mm(gradient, weight, out=dh[part]).neg_()
        ctx.save_for_backward(dh, *((hidden, weight, targets) if ctx.wants_weight else ()))
        ctx.softcap = softcap
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dh, *rest = ctx.saved_tensors
        dw = None
        if ctx.wants_weight:
            hidden, weight, targets = rest
            wide = torch.zeros_like(weight, dtype=working_dtype(weight.dtype))
            for part, _, gradient in _chunks(hidden, weight, targets, ctx.softcap):
                loss_chunks.add_outer(wide, gradient.mul_(-outer[part, None].to(gradient.dtype)), hidden[part])
            dw = wide.to(weight.dtype)
        return (None if dh is None else dh * outer[:, None].to(dh.dtype)), dw, None, None


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None):
    """Tokens, their cross-entropies, and the gradient of those with respect to the logits, in one buffer."""
    chunk = loss_chunks.tokens_in_chunk(weight.device.type, len(weight) * weight.element_size())
    chunk = min(chunk, max(1, len(hidden)))
    buffer = hidden.new_empty(chunk, len(weight))
    for first in range(0, len(hidden), chunk):
        part = slice(first, min(first + chunk, len(hidden)))
        logits = torch.mm(hidden[part], weight.T, out=buffer[: part.stop - first])
        slope = loss_chunks.cap_in_place(logits, softcap)
        losses = loss_chunks.cross_entropy_rows(logits, targets[part], 1.0)
        if slope is not None:
            logits.mul_(slope)
        yield part, losses, logits


def log_probabilities_tiles(hidden: Hidden, weight: Head, targets: Labels, *, softcap: float | None = None) -> PerToken:
    """By chunks of tokens; see the module."""
    return _TokenByToken.apply(hidden, weight, targets, softcap)


def _check(device: str) -> None:
    def weighted(run):
        return lambda h, w, t: (run(h, w, t) * torch.arange(len(t), device=h.device)).mean()

    forms = map(weighted, (log_probabilities_reference, log_probabilities_tiles))
    loss_chunks.loss_check(*forms, target=lambda logits: logits.argmax(-1))(device)


LOG_PROBABILITIES = (
    Form("tiles", log_probabilities_tiles, check=_check),
    Form("reference", log_probabilities_reference),
)
