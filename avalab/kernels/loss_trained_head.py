"""Linear head and loss by panels of the vocabulary, for a head that is trained: its gradient is written once.

Method, with z = h W^T / T for all tokens and a panel of vocabulary entries at a time:
1. first reading: each panel's logsumexp, and its share of what the loss needs beside it (the scored logits, or the mean
   gap between the two models under the panel's own softmax); a few numbers a token and panel;
2. the panels' numbers combine into each token's normalizer and loss: weights exp(panel's logsumexp - whole logsumexp);
3. second reading: the panel's logits again, overwritten with their gradient dz; dW of the panel = dz^T h is final, in
   W's own dtype, and dh += dz W is summed in float32.
That is four matrix products where `loss_chunks` has three, and no float32 copy of dW.

Source: combining softmaxes of parts by their logsumexp: Milakov and Gimelshein 2018, eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalab.kernels import loss_chunks
from avalab.kernels.loss_chunks import Head, Hidden, Labels, scaled_gradients, working_dtype

FEWEST_ENTRIES = 256  # a panel: fewer make the matrix products slow


@dataclass(frozen=True)
class _Loss:
    """A loss in the three steps of the method; what `finish` learns it keeps for `gradient`."""

    measure: Callable[..., tuple]  # logits over T, tokens, entries -> numbers of each token
    finish: Callable[[Tensor], Tensor]  # numbers [count, panel, token] -> losses [token]
    gradient: Callable[..., Tensor]  # what `measure` takes and the panel's number -> dloss/dz of each token
    count: int  # of the numbers that `measure` returns
    temperature: float


class _ByPanels(torch.autograd.Function):
    """Mean of a `_Loss` over tokens."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, loss: _Loss) -> Tensor:
        dtype = working_dtype(hidden.dtype)
        buffer = loss_chunks.LOGIT_BYTES.get(weight.device.type, loss_chunks.LOGIT_BYTES["cuda"])
        step = min(max(FEWEST_ENTRIES, buffer // (len(hidden) * hidden.element_size())), len(weight))
        panels = [slice(first, min(first + step, len(weight))) for first in range(0, len(weight), step)]
        room = hidden.new_empty(len(hidden) * step)
        # Before the large temporaries: what outlives them must not lie between them and keep their memory from reuse.
        numbers = hidden.new_empty(loss.count, len(panels), len(hidden), dtype=dtype)
        dh, dw = torch.zeros_like(hidden, dtype=dtype), torch.empty_like(weight)
        for number, entries in enumerate(panels):
            for tokens, x in _logits(hidden, weight[entries], room, loss.temperature):
                for place, found in zip(numbers, loss.measure(x, tokens, entries), strict=True):
                    place[number, tokens] = found
        losses = loss.finish(numbers)
        for number, entries in enumerate(panels):
            logits = room[: len(hidden) * (entries.stop - entries.start)].view(len(hidden), -1)
            for tokens, x in _logits(hidden, weight[entries], room, loss.temperature):
                logits[tokens] = loss.gradient(x, tokens, entries, number).mul_(1 / len(hidden) / loss.temperature)
            torch.mm(logits.T, hidden, out=dw[entries])
            dh += logits @ weight[entries]
        ctx.save_for_backward(dh.to(hidden.dtype), dw)
        return losses.sum(dtype=torch.float64).div(len(hidden)).to(dtype)

    backward = scaled_gradients


def _logits(hidden: Tensor, head: Tensor, room: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """One panel's logits over the temperature, made in `room` and widened, some tokens at a time."""
    logits = torch.mm(hidden, head.T, out=room[: len(hidden) * len(head)].view(len(hidden), -1))
    return loss_chunks.wide(logits, temperature)


def _softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax within the panel and its logsumexp; a panel of nothing but minus infinity has probability zero."""
    top, p = x.amax(1), torch.softmax(x, 1)
    dead = top == float("-inf")
    if dead.any():
        p = torch.where(dead[:, None], 0.0, p)
    return p, torch.where(dead, top, top - p.amax(1).log())


def cross_entropy(
    hidden: Hidden, weight: Head, targets: Labels, *, label_smoothing: float = 0.0, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats, as `loss.cross_entropy_reference`."""
    spread, known, dtype = label_smoothing / len(weight), {}, working_dtype(hidden.dtype)

    def place(tokens: slice, entries: slice) -> tuple[Tensor, Tensor]:
        """Column of each token's target in the panel, and how much of it is there: 1 - smoothing, or nothing."""
        column = targets[tokens] - entries.start
        inside = (column >= 0) & (column < entries.stop - entries.start)
        return torch.where(inside, column, 0).long()[:, None], inside.to(dtype) * (1 - label_smoothing)

    def measure(x: Tensor, tokens: slice, entries: slice) -> tuple:
        column, share = place(tokens, entries)
        # Not share * logit: elsewhere the logit may be infinite.
        scored = torch.where(share == 0, 0.0, x.gather(1, column).squeeze(1) * share)
        return _softmax(x)[1], scored + spread * x.sum(1) if spread else scored

    def finish(numbers: Tensor) -> Tensor:
        parts, scored = numbers
        whole = parts.logsumexp(0)
        known["share"] = (parts - whole).exp()
        return whole - scored.sum(0)

    def gradient(x: Tensor, tokens: slice, entries: slice, number: int) -> Tensor:
        column, share = place(tokens, entries)
        p = _softmax(x)[0].mul_(known["share"][number, tokens, None]).sub_(spread)
        return p.scatter_add_(1, column, -share[:, None])

    return _ByPanels.apply(hidden, weight, _Loss(measure, finish, gradient, 2, temperature))


def kl(
    hidden: Hidden, weight: Head, teacher: object, *, reverse: bool = False, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Mean KL divergence in nats times temperature squared, as `loss.kl_reference`; the teacher is indexed."""
    known = {}

    def other(x: Tensor, tokens: slice, entries: slice) -> Tensor:
        return teacher[tokens, entries].to(x.dtype) / temperature

    def measure(x: Tensor, tokens: slice, entries: slice) -> tuple:
        t = other(x, tokens, entries)
        (p, p_part), (q, q_part) = _softmax(x), _softmax(t)
        mine, gap = (p, x - t) if reverse else (q, t - x)
        return p_part, q_part, torch.where(mine == 0, 0.0, mine * gap).sum(1)

    def finish(numbers: Tensor) -> Tensor:
        p_part, q_part, gaps = numbers
        p_whole, q_whole = p_part.logsumexp(0), q_part.logsumexp(0)
        known["p"], known["q"] = (p_part - p_whole).exp(), (q_part - q_whole).exp()
        sign = 1 if reverse else -1
        known["offset"] = sign * (q_whole - p_whole)
        share = known["p"] if reverse else known["q"]
        known["kl"] = torch.where(share == 0, 0.0, share * gaps).sum(0) + known["offset"]
        return known["kl"] * temperature**2

    def gradient(x: Tensor, tokens: slice, entries: slice, number: int) -> Tensor:
        t = other(x, tokens, entries)
        p = _softmax(x)[0].mul_(known["p"][number, tokens, None])
        if reverse:
            gap = torch.where(p == 0, 0.0, x - t + (known["offset"] - known["kl"])[tokens, None])
            return p.mul_(gap).mul_(temperature**2)
        return p.sub_(_softmax(t)[0].mul_(known["q"][number, tokens, None])).mul_(temperature**2)

    return _ByPanels.apply(hidden, weight, _Loss(measure, finish, gradient, 3, temperature))
