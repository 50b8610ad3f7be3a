"""Weigh the first token of each answer: it decides whether a function is called, and is one of thirty in the mean.

    loss = mean over all answer tokens + weight * mean over the answers' first tokens

The calls' form is learned from the other tokens within a few hundred examples; whether a call fits is asked once an
answer, so that in the plain mean its gradient is drowned. Both means are of a row, as the Trainer weighs rows.

What it does not do: move the threshold after training.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from avalab import kernels, rehearsal
from avalab.packed_rows import IGNORED
from avalab.train import Loss


def labels_of_first_tokens(labels: Int[Tensor, "*rows token"]) -> Int[Tensor, "*rows token"]:
    """The labels with everything ignored but each answer's first: one that follows an ignored label."""
    before = torch.nn.functional.pad(labels, (1, 0), value=IGNORED)[..., :-1]
    return labels.masked_fill(before != IGNORED, IGNORED)


def weighted(weight: float) -> Loss:
    """A loss for `train.fit`: chats with weighted first tokens; rehearsal rows as `rehearsal.loss` has them.

    Raises ValueError for a weight below 0.
    """
    if weight < 0:
        raise ValueError(f"the first token's weight is {weight}; 0 leaves the plain mean, 1 gives it half the gradient")

    def loss(hidden: Float[Tensor, "1 token channel"], head: Float[Tensor, "vocab channel"], batch: dict) -> Tensor:
        mean = rehearsal.loss(hidden, head, batch)
        if not weight or "teacher" in batch:
            return mean
        first = labels_of_first_tokens(batch["labels"])
        return mean + weight * kernels.linear_cross_entropy(hidden, head, first, ignore_index=IGNORED)

    loss.identity = f"answers, first token {weight}"
    return loss
