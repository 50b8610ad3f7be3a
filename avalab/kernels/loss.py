"""Losses on logits that never exist in full: linear head and loss in one, gradients computed on the way forward.

Method:
1. tokens that do not count are left out before anything is computed;
2. with a frozen head, or few tokens, the logits are made for some tokens and the whole vocabulary at a time
   (`loss_chunks`), otherwise for all tokens and a panel of vocabulary entries at a time, twice (`loss_trained_head`),
   and the head's gradient is written once;
3. both gradients are computed on the way forward; the backward pass multiplies them by the incoming number.

Full logits of 2,048 tokens and 49,152 vocabulary entries, with what dense autograd keeps beside them, are more than a
gigabyte; here it is the buffer and, when the head is trained, its gradient. Losses are means over the tokens that
count, or zero.

Sources: gradients within the forward pass: Hsu et al. 2024 (Liger kernel), Wijmans et al. 2024 (cut cross-entropy);
label smoothing: Szegedy et al. 2016; temperature and its square: Hinton et al. 2015.
What it does not do: second derivatives, a bias, a gradient for the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from avalab.kernels import loss_chunks, loss_trained_head
from avalab.kernels.dispatch import Form, choose_form
from avalab.kernels.loss_chunks import Head, Hidden, Labels, Logits, cross_entropy_rows, kl_rows, working_dtype
from avalab.lab.errors import InputError


def linear_cross_entropy(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocab width"],
    targets: Int[Tensor, "*batch"],
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of `hidden @ weight.T / temperature` with `targets`, differentiable in both.

    With `softcap` s, logits are s tanh(hidden @ weight.T / s). Targets equal to `ignore_index` do not count. Raises
    ValueError for widths, dtypes or counts that differ, a target outside the vocabulary, label smoothing outside [0, 1)
    or a temperature that is not positive.
    """
    flat, kept = loss_chunks.tokens_that_count(hidden, weight, targets != ignore_index, temperature)
    if not 0 <= label_smoothing < 1:
        raise InputError(f"label smoothing is {label_smoothing}; it must be in [0, 1)")
    labels = targets.reshape(-1)[kept]
    loss_chunks.refuse_outside_vocabulary(labels, len(weight))
    form = choose_form("linear_cross_entropy", CROSS_ENTROPY, weight.device, flat)
    return form.run(flat, weight, labels, label_smoothing=label_smoothing, temperature=temperature, softcap=softcap)


def linear_kl(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocab width"],
    teacher: Tensor | tuple[Tensor, Tensor],
    *,
    keep: Bool[Tensor, "*batch"] | None = None,
    reverse: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Float[Tensor, ""]:
    """Mean KL(teacher || student) in nats, or with `reverse` KL(student || teacher), times temperature squared.

    The student's logits are `hidden @ weight.T`. The teacher is stored logits ["*batch vocab"] or, live, a pair of its
    hidden states and head. With a soft cap s they are s tanh(z / s). Both are divided by `temperature`. Tokens where
    `keep` is False do not count.
    Raises ValueError for shapes or dtypes that do not match or a temperature that is not positive.
    """
    flat, kept = loss_chunks.tokens_that_count(hidden, weight, keep, temperature)
    states, head = teacher if isinstance(teacher, tuple) else (teacher, None)
    states = states.detach().reshape(-1, states.shape[-1])
    tokens, entries = hidden.shape[:-1].numel(), states.shape[-1] if head is None else len(head)
    if entries != len(weight) or len(states) != tokens:
        raise InputError(
            f"the teacher has {len(states)} rows of {entries} vocabulary entries, the student {tokens} of {len(weight)}"
        )
    heard = _Teacher(states, None if head is None else head.detach(), kept, teacher_softcap)
    form = choose_form("linear_kl", KL, weight.device, flat)
    return form.run(flat, weight, heard, reverse=reverse, temperature=temperature, softcap=softcap)


@dataclass(frozen=True)
class _Teacher:
    """A teacher's logits of the tokens that count, made when they are read: `[tokens]` or `[tokens, entries]`."""

    states: Tensor  # hidden states, or the logits themselves where there is no head
    head: Tensor | None
    kept: Tensor
    softcap: float | None

    def __getitem__(self, place: slice | tuple[slice, slice]) -> Tensor:
        tokens, entries = place if isinstance(place, tuple) else (place, slice(None))
        if self.head is None:
            return self.states[:, entries][self.kept[tokens]]
        return _capped(self.states[self.kept[tokens]] @ self.head[entries].T, self.softcap)


def _capped(logits: Logits, softcap: float | None) -> Logits:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy_reference(
    hidden: Hidden,
    weight: Head,
    targets: Labels,
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, ""]:
    """Full logits, then torch's own loss."""
    logits = _capped(hidden @ weight.T, softcap).to(working_dtype(hidden.dtype)) / temperature
    total = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
    return total / max(1, len(targets))


def kl_reference(
    hidden: Hidden,
    weight: Head,
    teacher: _Teacher | Logits,
    *,
    reverse: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, ""]:
    """Full logits of both, then the sum of p (log p - log q); an entry that p gives no probability adds nothing."""
    dtype = working_dtype(hidden.dtype)
    student = (_capped(hidden @ weight.T, softcap).to(dtype) / temperature).log_softmax(-1)
    other = (teacher[:].to(dtype) / temperature).log_softmax(-1)
    p, q = (student, other) if reverse else (other, student)
    terms = torch.where(p.exp() == 0, 0.0, p.exp() * (p - q))
    return temperature**2 * terms.sum() / max(1, len(hidden))


def _whichever_holds_less(by_chunks: Callable, by_panels: Callable) -> Callable:
    """By panels of the vocabulary where the head is trained on more tokens than a chunk has, else by chunks of them.

    Panels know no soft cap.
    """

    def run(
        hidden: Tensor, weight: Tensor, target: object, *, softcap: float | None = None, **options: float | bool
    ) -> Tensor:
        trained = weight.requires_grad and torch.is_grad_enabled()
        chunk = loss_chunks.tokens_in_chunk(weight.device.type, len(weight) * weight.element_size())
        if trained and len(hidden) > chunk and softcap is None:
            return by_panels(hidden, weight, target, **options)
        return by_chunks(hidden, weight, target, softcap=softcap, **options)

    return run


def _triton_rows(name: str) -> Callable:
    def run(*arguments, **options) -> Tensor:
        from avalab.kernels import triton as triton_kernels

        return getattr(triton_kernels, name)(*arguments, **options)

    return run


def _forms(rows: Callable, reference: Callable, by_panels: Callable, **checked: object) -> tuple[Form, ...]:
    on_gpu, by_chunks = loss_chunks.by_tokens(_triton_rows(rows.__name__)), loss_chunks.by_tokens(rows)
    tiles = _whichever_holds_less(by_chunks, by_panels)
    return (
        Form("triton", on_gpu, _serves_triton, loss_chunks.loss_check(reference, on_gpu, **checked)),
        Form("tiles", tiles, check=loss_chunks.loss_check(reference, by_chunks, by_panels, **checked)),
        Form("reference", reference),
    )


def _serves_triton(hidden: Tensor) -> bool:
    return hidden.device.type == "cuda" and hidden.dtype != torch.float64


CROSS_ENTROPY = _forms(
    cross_entropy_rows,
    cross_entropy_reference,
    loss_trained_head.cross_entropy,
    target=lambda logits: logits.argmax(-1),
    label_smoothing=0.1,
    temperature=1.5,
)

KL = _forms(kl_rows, kl_reference, loss_trained_head.kl, target=lambda logits: logits, reverse=True, temperature=1.5)
