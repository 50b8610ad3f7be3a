"""Rows of general text that keep a model from forgetting it: train towards what the base would have said there.

Fine-tuning on one skill moves every other output too. Rehearsal rows hold text that has nothing to do with the skill
(calibration text, disjoint from every evaluation text), and the base's final hidden states on it; their loss is the
divergence KL(base || model) of the next-token distributions, so that they pull back to the base and teach nothing new:
plain next-token training on the same text would, and would make the measure of forgetting look better than it is.

Source: learning without forgetting, with the old model's outputs as targets: Li and Hoiem 2016, arXiv 1606.09282.
What it does not do: know which text users will care about.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from avalab import corpora, kernels, models, predict
from avalab.artifacts import Artifact
from avalab.experiment import Run
from avalab.packed_rows import IGNORED


def rows(run: Run, teacher: Artifact, *, tokens: int, row_tokens: int) -> list[dict[str, Tensor]]:
    """About `tokens` tokens of calibration text as rows of training, with the teacher's hidden states as `teacher`."""
    tokenizer = models.load_tokenizer(teacher)
    text = corpora.calibration_text(tokenizer, evaluation=corpora.evaluation_texts(run, tokenizer))
    everything = corpora.windows(text, tokenizer, count=10**6, tokens=row_tokens)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(run.seed))
    windows = everything[order[: max(1, tokens // row_tokens)]]
    model = models.load(teacher, run.device)
    return [_row(window, predict.hidden_states(model, window[None])[0].cpu()) for window in windows]


def _row(window: Tensor, hidden: Float[Tensor, "token channel"]) -> dict[str, Tensor]:
    return {
        "input_ids": window,
        "labels": torch.cat([window[1:], torch.tensor([IGNORED])]),
        "position_ids": torch.arange(len(window)),
        "boundaries": torch.tensor([0, len(window)]),
        "teacher": hidden.clone(),  # an ordinary tensor: inference tensors take no part in training
    }


def loss(hidden: Float[Tensor, "1 token channel"], head: Float[Tensor, "vocab channel"], batch: dict) -> Tensor:
    """Cross-entropy of a row of chats, or KL(teacher || model) of a row that holds the teacher's hidden states."""
    if "teacher" not in batch:
        return kernels.linear_cross_entropy(hidden, head, batch["labels"], ignore_index=IGNORED)
    targets = (batch["teacher"].to(hidden.dtype), head.detach())
    return kernels.linear_kl(hidden, head, targets, keep=batch["labels"] != IGNORED)
