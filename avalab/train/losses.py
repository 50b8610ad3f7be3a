"""Losses of training: next token, first token, rehearsal, and what a student shares with its teacher inside.

Every loss that `loop.fit` takes is a function of final hidden states, the head and a row; logits exist a chunk at a
time, in the kernels. Hidden states come scaled as the model's logits want them; `batch["finish"]` says what else stands
behind the head (`predict.Finish`; nothing, where a batch does not say).

- `next_token`: cross-entropy of the labelled tokens.
- `rehearsed`: the same on a row of chats, KL(base || model) on a row of rehearsal, which holds the base's hidden states
  (Li and Hoiem 2016, arXiv 1606.09282).
- `weighted_first_tokens`: `rehearsed` plus a weight times the mean over the answers' first tokens. Whether a function
  is called is decided there, once an answer, so that in the plain mean its gradient is drowned.
- `relative_error`: mean over tokens of |P h - g|^2 / |g|^2 for the student's states h and the teacher's g. Divided
  token by token: the first token of a text is a hundred times larger than the others and would be all that counts.
  P is the identity where the widths are equal; else `projection`, fitted once by least squares and then fixed, so that
  no weights have to be trained and thrown away (TinyBERT trains them: Jiao et al. 2020, arXiv 1909.10351, eq. 8).
- `attention_divergence`: mean over heads and tokens of KL(teacher || student) of attention distributions (MiniLM: Wang
  et al. 2020, arXiv 2002.10957, eq. 4); the mean head of each where their numbers of heads differ.
- `layer_map`: which block of the student answers to which one of the teacher: evenly spaced, the last to the last.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from avalab import kernels
from avalab.data.packing import IGNORED
from avalab.lab.errors import InputError
from avalab.models.predict import PLAIN
from avalab.train.recipes import Map

Loss = Callable[[Tensor, Tensor, dict], Tensor]

RIDGE = 1e-3  # of the mean squared student channel: least squares stay solvable with few tokens


def next_token(hidden: Float[Tensor, "1 token channel"], head: Float[Tensor, "vocab channel"], batch: dict) -> Tensor:
    """Cross-entropy in nats, mean over labelled tokens."""
    return cross_entropy(hidden, head, batch["labels"], batch)


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, batch: dict) -> Tensor:
    """Mean over the labels that count, of logits as the batch's model finishes them."""
    softcap = batch.get("finish", PLAIN).softcap
    return kernels.linear_cross_entropy(hidden, head, labels, ignore_index=IGNORED, softcap=softcap)


def rehearsed(hidden: Float[Tensor, "1 token channel"], head: Float[Tensor, "vocab channel"], batch: dict) -> Tensor:
    """Cross-entropy of a row of chats, or KL(teacher || model) of a row that holds the teacher's hidden states."""
    if "teacher" not in batch:
        return next_token(hidden, head, batch)
    finish = batch.get("finish", PLAIN)
    targets, keep = (finish.scaled(batch["teacher"].to(hidden.dtype)), head.detach()), batch["labels"] != IGNORED
    return kernels.linear_kl(hidden, head, targets, keep=keep, softcap=finish.softcap, teacher_softcap=finish.softcap)


def labels_of_first_tokens(labels: Int[Tensor, "*rows token"]) -> Int[Tensor, "*rows token"]:
    """The labels with everything ignored but each answer's first: one that follows an ignored label."""
    before = torch.nn.functional.pad(labels, (1, 0), value=IGNORED)[..., :-1]
    return labels.masked_fill(before != IGNORED, IGNORED)


def weighted_first_tokens(weight: float) -> Loss:
    """A loss for `loop.fit`: chats with weighted first tokens; rehearsal rows as `rehearsed` has them.

    Raises ValueError for a weight below 0.
    """
    if weight < 0:
        raise InputError(f"the first token's weight is {weight}; 0 leaves the plain mean, 1 gives it half the gradient")

    def loss(hidden: Float[Tensor, "1 token channel"], head: Float[Tensor, "vocab channel"], batch: dict) -> Tensor:
        mean = rehearsed(hidden, head, batch)
        if not weight or "teacher" in batch:
            return mean
        first = labels_of_first_tokens(batch["labels"])
        return mean + weight * cross_entropy(hidden, head, first, batch)

    loss.identity = f"answers, first token {weight}"
    return loss


def layer_map(student: int, teacher: int, count: int) -> Map:
    """`count` pairs of blocks of two models with so many blocks, at the same relative depth, the last pair the last.

    Block i of n ends at depth (i + 1) / n. Raises ValueError when the student has fewer blocks than `count`.
    """
    if not 1 <= count <= student:
        raise InputError(f"asked for {count} pairs of blocks, the student has {student}; choose 1 to {student}")
    chosen = [round((i + 1) * student / count) for i in range(count)]
    return tuple((ends - 1, max(1, round(ends * teacher / student)) - 1) for ends in chosen)


def checked_map(pairs: Map, student: int, teacher: int) -> Map:
    """The pairs. Raises ValueError for a block that one of the models does not have."""
    for mine, other in pairs:
        if not (0 <= mine < student and 0 <= other < teacher):
            raise InputError(f"no pair of blocks ({mine}, {other}): the student has {student}, the teacher {teacher}")
    return pairs


def relative_error(
    student: Float[Tensor, "token width"],
    teacher: Float[Tensor, "token channel"],
    projection: Float[Tensor, "width channel"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over tokens of the squared distance over the teacher's squared length; 0 is equality, 1 is silence."""
    student, teacher = student.float(), teacher.float()
    student = student if projection is None else student @ projection
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)).mean()


def projection(
    student: Float[Tensor, "token width"], teacher: Float[Tensor, "token channel"]
) -> Float[Tensor, "width channel"]:
    """The P that makes `relative_error` least for these states: weighted least squares with a little ridge."""
    weight = teacher.float().norm(dim=-1, keepdim=True).clamp(min=1e-6)
    x, y = student.float() / weight, teacher.float() / weight
    moment = x.T @ x
    ridge = RIDGE * moment.diagonal().mean() * torch.eye(len(moment), device=x.device)
    return torch.linalg.solve(moment + ridge, x.T @ y)


def attention_divergence(
    student: Float[Tensor, "head token past"], teacher: Float[Tensor, "other token past"]
) -> Float[Tensor, ""]:
    """Mean KL(teacher || student) in nats of where each token looks; each row is a distribution."""
    if len(student) != len(teacher):
        student, teacher = student.mean(0, keepdim=True), teacher.mean(0, keepdim=True)
    student, teacher = student.float(), teacher.float()
    return torch.special.xlogy(teacher, teacher / student.clamp(min=1e-12)).sum(-1).mean()


def refuse_other_attention(*models: PreTrainedModel) -> None:
    """Raise ValueError, naming the family, for a model whose attention `attention_maps` cannot compute again."""
    for model in models:
        inner, kinds = model.base_model, getattr(model.config, "layer_types", None) or ["full_attention"]
        block = getattr(inner, "layers", [None])[0]
        known = all(hasattr(block, name) for name in ("input_layernorm", "self_attn")) and hasattr(inner, "rotary_emb")
        if not known or set(kinds) != {"full_attention"} or getattr(model.config, "sliding_window", None):
            raise InputError(
                f"attention of {model.config.model_type} models cannot be matched here (a window, or blocks of another "
                "form than Llama's); leave --attention at 0, hidden states and logits can be matched"
            )


def attention_maps(
    model: PreTrainedModel, block: int, states: Float[Tensor, "1 token width"], batch: dict
) -> list[Tensor]:
    """Where a block's heads look, ["head token past"] for each example of the row, from the states the block receives.

    The block's own attention is computed a second time, by the plain form that returns its probabilities.
    """
    layer = model.base_model.layers[block]
    x = layer.input_layernorm(states)
    found = []
    implementation, model.config._attn_implementation = model.config._attn_implementation, "eager"
    try:
        for start, end in pairwise(batch["boundaries"].tolist()):
            part, positions = x[:, start:end], batch["position_ids"][:, start:end]
            future = torch.full((end - start, end - start), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
            _, weights = layer.self_attn(
                hidden_states=part,
                position_embeddings=model.base_model.rotary_emb(part, positions),
                attention_mask=future[None, None],
            )
            found.append(weights[0])
    finally:
        model.config._attn_implementation = implementation
    return found
