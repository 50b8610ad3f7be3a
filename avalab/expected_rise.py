"""What a format should cost a tensor, in nats a token: expected for linear layers, measured for embedding and head.

One calibration pass with gradients gives every linear layer the Fisher information of its outputs and the cost D of a
rounding error in each column (`rounding.Problem`). The expected rise in KL divergence is

    KL = 1/2 sum_rows E[g_row^2] sum_columns D_column e_row,column^2,

g the gradient of the log-likelihood of labels drawn from the model (Martens 2020, arXiv 1412.1193, eq. 27), e the
error of the format's best grid on a sample of rows. Gradients count as independent of inputs (K-FAC, Martens and Grosse
2015). The same pass gives embedding and head the quadratic that their rows share: of the gradients with respect to an
embedded token, and of the head's inputs, each weighted by the squared gradients of its token's logits.

What it does not do: choose, round for keeps, or know that rises add up: they do not quite (see the notebook on mixed
precision, which measures by how much).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from avalab import calibration, models, predict, rounding
from avalab.allocation import Option
from avalab.rounding import Problem

FISHER_WINDOWS = 8
SAMPLED_ROWS = 64  # of a layer, for its expected errors
BF16 = "bf16"


@dataclass(frozen=True)
class Candidate:
    """A format that a tensor may get: its name, the tensor's bytes, and what it makes of rows given columns' costs."""

    name: str
    bytes: int
    approximate: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rises:
    """Options of every linear layer; and by name problem and undamped moment of embedding and head (one if tied)."""

    layers: dict[str, list[Option]]
    tables: dict[str, Problem]
    moments: dict[str, Tensor]


def measure(
    model: PreTrainedModel,
    windows: Int[Tensor, "window time"],
    candidates_of: Callable[[int, int], Sequence[Candidate]],
    *,
    skipped: Sequence[str] = (),
    damped_by_tokens: bool = False,
) -> Rises:
    """Expected rises of all linear layers but the skipped ones; `candidates_of(rows, columns)` lists their formats.

    With `damped_by_tokens` columns' costs allow for how few tokens they come from (`rounding.damping_for`).
    """
    names = {layer: name for name, layer in models.linear_layers(model).items() if name not in skipped}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found: dict[str, list[Option]] = {}
    tables: dict[nn.Module, Tensor] = {}
    last: list = [None, None]  # layers with one input come after each other: their problem is solved once

    def listen(module: nn.Module, inputs: Tensor, gradients: Tensor) -> None:
        if module not in names:
            tables[module] = _table_moment(inputs, gradients, is_head=module is head)
            return
        if last[0] is not inputs:
            rows = inputs.detach().flatten(0, -2)
            damping = rounding.damping_for(rows.shape[1], len(rows)) if damped_by_tokens else rounding.DAMPING
            posed = rounding.problem(calibration.second_moment(rows) / len(rows), damping=damping)
            last[:] = inputs, posed.column_cost
        step = max(1, module.out_features // SAMPLED_ROWS)
        squared = gradients.flatten(0, -2)[:, ::step].float().square()
        weights = torch.outer(squared.mean(0), last[1]) * (module.out_features / squared.shape[1])
        candidates = candidates_of(*module.weight.shape)
        found[names[module]] = _options(module.weight.detach(), weights, last[1], candidates)

    others = [name for name, module in model.named_modules() if module in (embedding, head)]
    calibration.gradient_pass(model, windows[:FISHER_WINDOWS], [*names.values(), *others], listen)
    by_name = {name: tables[model.get_submodule(name)] for name in others}
    if head.weight is embedding.weight:
        first, *rest = by_name
        by_name = {first: sum((by_name[name] for name in rest), by_name[first])}
    tokens = windows[:FISHER_WINDOWS].numel()
    posed = {n: rounding.problem(m, damping=rounding.damping_for(len(m), tokens)) for n, m in by_name.items()}
    return Rises({name: found[name] for name in names.values()}, posed, by_name)


def _options(weight: Tensor, weights: Tensor, cost: Tensor, candidates: Sequence[Candidate]) -> list[Option]:
    """A layer's formats; `weights` are those of squared errors in the sampled rows."""
    sample = weight[:: max(1, len(weight) // SAMPLED_ROWS)].float()
    found = [Option(BF16, 2 * weight.numel(), 0.0)]
    for candidate in candidates:
        squared = (candidate.approximate(sample, cost) - sample).square_()
        found.append(Option(candidate.name, candidate.bytes, 0.5 * float((squared * weights).sum())))
    return found


def _table_moment(inputs: Tensor, gradients: Tensor, *, is_head: bool) -> Tensor:
    """Mean outer product, over tokens, of a head's inputs weighted by its gradients, or of an embedding's gradients."""
    gradients = gradients.flatten(0, -2)
    if is_head:  # a few tokens at a time: logits are many
        parts = [part.float().square().sum(-1, keepdim=True) for part in gradients.split(predict.CHUNK_TOKENS)]
        rows = inputs.detach().flatten(0, -2).float() * torch.cat(parts).sqrt()
    else:
        rows = gradients.float()
    return calibration.second_moment(rows) / len(rows)


@torch.no_grad()
def of_replacement(
    model: PreTrainedModel, windows: Int[Tensor, "window time"], parameter: nn.Parameter, values: Tensor
) -> float:
    """The measured rise in KL divergence, nats a token, with other values in a parameter; the model stays as it was."""
    kept = parameter.data
    head, softcap = predict.output_head(model)
    before = predict.hidden_states(model, windows)
    try:
        parameter.data = values
        after = predict.hidden_states(model, windows)
        rises = []
        for expected, candidate in zip(before, after, strict=True):
            parameter.data = kept
            reference = predict.log_probabilities(expected, head, softcap)
            parameter.data = values
            rises.append(predict.kl_divergence(reference, predict.log_probabilities(candidate, head, softcap)).mean())
    finally:
        parameter.data = kept
    return float(torch.stack(rises).mean())
