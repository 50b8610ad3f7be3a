"""Losses on logits that never exist in full: linear head and loss in one, gradients computed on the way forward.

Method:
1. tokens that do not count are left out before anything is computed;
2. with a frozen head, or few tokens, the logits are made for some tokens and all words at a time (`loss_tokens`),
   otherwise for all tokens and some words at a time, twice (`loss_words`), and the head's gradient is written once;
3. both gradients are computed on the way forward; the backward pass multiplies them by the incoming number.

Full logits of 2,048 tokens and 49,152 words, with what dense autograd keeps beside them, are more than a gigabyte; here
it is the buffer and, when the head is trained, its gradient. Losses are means over the tokens that count, or zero.

Sources: gradients within the forward pass: Hsu et al. 2024 (Liger kernel), Wijmans et al. 2024 (cut cross-entropy);
label smoothing: Szegedy et al. 2016; temperature and its square: Hinton et al. 2015.
What it does not do: second derivatives, a bias, a gradient for the teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from avalab.kernels import loss_chunks, loss_trained_head
from avalab.kernels.dispatch import Form, choose
from avalab.kernels.loss_chunks import cross_entropy_rows, kl_rows, working_dtype
from avalab.kernels.weight import DTYPES

Teacher = Tensor | tuple[Tensor, Tensor]


def linear_cross_entropy(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocab width"],
    targets: Int[Tensor, "*batch"],
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of `hidden @ weight.T / temperature` with `targets`, differentiable in both.

    Targets equal to `ignore_index` do not count. Raises ValueError for widths, dtypes or counts that differ, a target
    outside the vocabulary, label smoothing outside [0, 1) or a temperature that is not positive.
    """
    flat, kept = _selected(hidden, weight, targets.reshape(-1) != ignore_index, temperature)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label smoothing is {label_smoothing}; it must be in [0, 1)")
    labels = targets.reshape(-1)[kept]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(weight):
        raise ValueError(f"targets run from {labels.min()} to {labels.max()}; the vocabulary has {len(weight)} words")
    form = choose("linear_cross_entropy", CROSS_ENTROPY, weight.device, flat)
    return form.run(flat, weight, labels, label_smoothing=label_smoothing, temperature=temperature)


def linear_kl(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocab width"],
    teacher: Teacher,
    *,
    keep: Bool[Tensor, "*batch"] | None = None,
    reverse: bool = False,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean KL(teacher || student) in nats, or with `reverse` KL(student || teacher), times temperature squared.

    The student's logits are `hidden @ weight.T`. The teacher is stored logits ["*batch vocab"] or, live, a pair of its
    hidden states and head. Both are divided by `temperature`. Tokens where `keep` is False do not count.
    Raises ValueError for shapes or dtypes that do not match or a temperature that is not positive.
    """
    keep = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device) if keep is None else keep
    flat, kept = _selected(hidden, weight, keep.reshape(-1), temperature)
    rows = _teacher_rows(teacher, kept, keep.numel(), len(weight))
    form = choose("linear_kl", KL, weight.device, flat)
    return form.run(flat, weight, rows, reverse=reverse, temperature=temperature)


def _selected(hidden: Tensor, weight: Tensor, keep: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden states of width {hidden.shape[-1]} do not match a head of width {weight.shape[1]}")
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        allowed = ", ".join(str(d) for d in DTYPES)
        raise ValueError(
            f"hidden states are {hidden.dtype}, the head {weight.dtype}; both must be the same of {allowed}"
        )
    flat = hidden.reshape(-1, hidden.shape[-1])
    if len(keep) != len(flat):
        raise ValueError(f"{len(flat)} hidden states, but targets or a mask for {len(keep)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    kept = keep.nonzero().squeeze(1)
    return (flat if len(kept) == len(flat) else flat[kept]), kept


def _teacher_rows(teacher: Teacher, kept: Tensor, tokens: int, vocab: int) -> Callable[..., Tensor]:
    """(slice of the tokens that count, slice of words) -> the teacher's logits there."""
    live = isinstance(teacher, tuple)
    states, head = teacher if live else (teacher, None)
    states = states.detach().reshape(-1, states.shape[-1])
    width = len(head) if live else states.shape[-1]
    if width != vocab or len(states) != tokens:
        raise ValueError(f"the teacher has {len(states)} rows of {width} words, the student {tokens} of {vocab}")

    def rows(part: slice, words: slice = slice(None)) -> Tensor:
        if live:
            return states[kept[part]] @ head.detach()[words].T
        return states[:, words][kept[part]]

    return rows


# --- reference ---------------------------------------------------------------------------------------------------


def cross_entropy_reference(
    hidden: Float[Tensor, "token width"],
    weight: Float[Tensor, "vocab width"],
    targets: Int[Tensor, "token"],
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Full logits, then torch's own loss."""
    logits = (hidden @ weight.T).to(working_dtype(hidden.dtype)) / temperature
    total = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
    return total / max(1, len(targets))


def kl_reference(
    hidden: Float[Tensor, "token width"],
    weight: Float[Tensor, "vocab width"],
    teacher: Callable[[slice], Tensor],
    *,
    reverse: bool = False,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Full logits of both, then the sum of p (log p - log q); a word that p gives no probability adds nothing."""
    dtype = working_dtype(hidden.dtype)
    student = ((hidden @ weight.T).to(dtype) / temperature).log_softmax(-1)
    other = (teacher(slice(None)).to(dtype) / temperature).log_softmax(-1)
    p, q = (student, other) if reverse else (other, student)
    terms = torch.where(p.exp() == 0, 0.0, p.exp() * (p - q))
    return temperature**2 * terms.sum() / max(1, len(hidden))


# --- the forms --------------------------------------------------------------------------------------------------------


def cross_entropy_tokens(rows_form: Callable) -> Callable:
    """`cross_entropy_reference` by chunks of tokens, with `rows_form` for the rows."""

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, **options: float) -> Tensor:
        def rows(logits: Tensor, part: slice, row_weight: float) -> Tensor:
            return rows_form(logits, targets[part], row_weight, **options)

        return loss_chunks.mean_loss(hidden, weight, rows)

    return run


def kl_tokens(rows_form: Callable) -> Callable:
    """`kl_reference` by chunks of tokens, with `rows_form` for the rows."""

    def run(hidden: Tensor, weight: Tensor, teacher: Callable, **options: float) -> Tensor:
        def rows(logits: Tensor, part: slice, row_weight: float) -> Tensor:
            return rows_form(logits, teacher(part), row_weight, **options)

        return loss_chunks.mean_loss(hidden, weight, rows)

    return run


def _by_words(hidden: Tensor, weight: Tensor) -> bool:
    trained = weight.requires_grad and torch.is_grad_enabled()
    return trained and len(hidden) > loss_chunks.tokens_in_chunk(weight)


def cross_entropy_tiles(hidden: Tensor, weight: Tensor, targets: Tensor, **options: float) -> Tensor:
    """`cross_entropy_reference` by chunks of tokens or of words, whichever holds less."""
    run = loss_trained_head.cross_entropy if _by_words(hidden, weight) else cross_entropy_tokens(cross_entropy_rows)
    return run(hidden, weight, targets, **options)


def kl_tiles(hidden: Tensor, weight: Tensor, teacher: Callable, **options: float | bool) -> Tensor:
    """`kl_reference` by chunks of tokens or of words, whichever holds less."""
    run = loss_trained_head.kl if _by_words(hidden, weight) else kl_tokens(kl_rows)
    return run(hidden, weight, teacher, **options)


def _triton_rows(name: str) -> Callable:
    def run(*arguments, **options) -> Tensor:
        from avalab.kernels import triton as triton_kernels

        return getattr(triton_kernels, name)(*arguments, **options)

    return run


# --- checks ------------------------------------------------------------------------------------------------------


def _check(reference: Callable, *runs: Callable, **options: float | bool) -> Callable[[str], None]:
    """Loss and both gradients of each of `runs` against the reference, in float32, on 21 tokens and 67 words."""

    def check(device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = ((21, 8), (67, 8), (21, 67))
        h, w, teacher = (torch.randn(s, generator=generator).to(device) for s in shapes)
        extra = (
            teacher.argmax(-1)
            if "label_smoothing" in options
            else _teacher_rows(teacher, torch.arange(21, device=device), 21, 67)
        )
        found = []
        for run in (reference, *runs):
            inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
            with torch.enable_grad():
                loss = run(*inputs, extra, **options)
            found.append([loss, *torch.autograd.grad(loss, inputs)])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)

    return check


def _forms(rows: str, reference: Callable, tiles: Callable, *paths: Callable, **options: float | bool) -> tuple:
    """`paths` are the functions that `tiles` chooses from; each is checked."""
    fused = (cross_entropy_tokens if "label_smoothing" in options else kl_tokens)(_triton_rows(rows))
    return (
        Form("triton", fused, _on_gpu, _check(reference, fused, **options)),
        Form("tiles", tiles, lambda h: True, _check(reference, *paths, **options)),
        Form("reference", reference, lambda h: True),
    )


def _on_gpu(hidden: Tensor) -> bool:
    return hidden.device.type == "cuda" and hidden.dtype != torch.float64


CROSS_ENTROPY = _forms(
    "cross_entropy_rows",
    cross_entropy_reference,
    cross_entropy_tiles,
    cross_entropy_tokens(cross_entropy_rows),
    loss_trained_head.cross_entropy,
    label_smoothing=0.1,
    temperature=1.5,
)

KL = _forms("kl_rows", kl_reference, kl_tiles, kl_tokens(kl_rows), loss_trained_head.kl, reverse=True, temperature=1.5)
