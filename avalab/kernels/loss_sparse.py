"""Divergence from a teacher of whom a few vocabulary entries a token are known, by chunks of tokens (`loss_chunks`).

With q = softmax(z / T), ids and weights w of a token's known entries, W = sum(w) and c the weight of a row:
- whole targets (`tail` False; W is 1 for sampled ones): loss = -sum(w log q); gradient of z = c T (W q - w);
- `tail` (the k most probable entries, and the mass 1 - W of all others together): loss = -sum(w log q) - (1 - W)
  log(1 - Q) with Q = q's mass on the known entries; gradient = c T (q - w) on them and c T q (W - Q) / (1 - Q)
  elsewhere. All others are one event: nothing is taught about their shares, and the loss is least at the teacher's w.

Losses are cross-entropies times T^2: subtract the teacher's entropy times T^2 and they are divergences.

Sources: targets of sampled words: Anshumann et al. 2025, arXiv 2503.16870, section 3; the tail as one event is the
divergence of coarsened distributions, never above the whole one (Cover and Thomas 2006, theorem 2.8.1 applied to sums).
What it does not do: second derivatives, a gradient for the targets, reverse divergence (its tail is unknown).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from avalab.kernels import loss_chunks
from avalab.kernels.dispatch import Form, choose_form
from avalab.kernels.loss_chunks import Head, Hidden, Logits, PerToken, wide, working_dtype
from avalab.lab.errors import InputError

LEAST_TAIL = 1e-6  # what is left beside the known entries counts as at least this: float32 knows no less


def linear_sparse(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocab width"],
    ids: Int[Tensor, "*batch known"],
    weights: Float[Tensor, "*batch known"],
    *,
    keep: Bool[Tensor, "*batch"] | None = None,
    tail: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of `hidden @ weight.T / temperature` from sparse targets, times temperature squared.

    With `softcap` s, logits are s tanh(hidden @ weight.T / s). Unused places of `ids` hold any entry with weight 0;
    with `tail`, no entry stands in a token's `ids` twice with a weight above 0. Tokens where `keep` is False do not
    count. Raises ValueError for shapes or dtypes that do not match, an id outside the vocabulary or a temperature that
    is not positive.
    """
    flat, kept = loss_chunks.tokens_that_count(hidden, weight, keep, temperature)
    tokens = hidden.shape[:-1].numel()
    if ids.shape != weights.shape or ids.shape[:-1].numel() != tokens:
        shapes = f"{tuple(ids.shape)} and {tuple(weights.shape)}"
        raise InputError(f"ids and weights of shapes {shapes} do not fit {tokens} hidden states")
    known, shares = (t.reshape(-1, t.shape[-1])[kept] for t in (ids, weights))
    loss_chunks.refuse_outside_vocabulary(known, len(weight))
    form = choose_form("linear_sparse", SPARSE, weight.device, flat)
    given = (known, shares.to(working_dtype(flat.dtype)))
    return form.run(flat, weight, given, tail=tail, temperature=temperature, softcap=softcap)


def sparse_reference(
    hidden: Hidden,
    weight: Head,
    targets: tuple[Tensor, Tensor],
    *,
    tail: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, ""]:
    """Full logits, then the definition."""
    ids, weights = targets
    logits = (hidden @ weight.T).to(working_dtype(hidden.dtype))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_q = (logits / temperature).log_softmax(-1)
    found = log_q.gather(1, ids)
    losses = -(weights * found).sum(1)
    if tail:
        known = torch.zeros_like(log_q).scatter_add_(1, ids, (weights > 0).to(log_q.dtype)) > 0
        rest = log_q.exp().masked_fill(known, 0).sum(1).clamp(min=LEAST_TAIL)
        losses = losses - (1 - weights.sum(1)) * rest.log()
    return temperature**2 * losses.sum() / max(1, len(hidden))


def sparse_rows(
    logits: Logits,
    ids: Int[Tensor, "token known"],
    weights: Float[Tensor, "token known"],
    row_weight: float,
    *,
    tail: bool = False,
    temperature: float = 1.0,
) -> PerToken:
    """Loss of each row; `logits` become the gradient of their sum times `row_weight`."""
    losses = weights.new_empty(len(logits))
    for part, x in wide(logits, temperature):
        known, w = ids[part], weights[part]
        top, q = x.amax(1, keepdim=True), torch.softmax(x, 1)
        norm = top - q.amax(1, keepdim=True).log()
        whole = w.sum(1, keepdim=True)
        losses[part] = (w * (norm - x.gather(1, known))).sum(1)
        if tail:
            mine = q.gather(1, known) * (w > 0)
            rest = 1 - mine.sum(1, keepdim=True)
            cut = rest <= LEAST_TAIL  # a constant in the loss: nothing is learned from it
            rest = rest.clamp(min=LEAST_TAIL)
            losses[part] -= ((1 - whole) * rest.log()).squeeze(1)
            share = torch.where(cut, whole, (whole - 1 + rest) / rest)
            q.mul_(share).scatter_add_(1, known, mine * (1 - share).masked_fill(cut, 0) - w)
        else:
            q.mul_(whole).scatter_add_(1, known, -w)
        logits[part] = q.mul_(row_weight * temperature)
    return losses.mul_(temperature**2)


sparse_tokens = loss_chunks.by_tokens(sparse_rows)


def _five_known(logits: Tensor) -> tuple[Tensor, Tensor]:
    shares, ids = logits.softmax(-1).topk(5)
    shares[:, -1] = 0  # an unused place
    return ids, shares


def _check(device: str) -> None:
    for tail in (True, False):
        loss_chunks.loss_check(sparse_reference, sparse_tokens, target=_five_known, tail=tail, temperature=1.5)(device)


SPARSE = (
    Form("tiles", sparse_tokens, check=_check),
    Form("reference", sparse_reference),
)
