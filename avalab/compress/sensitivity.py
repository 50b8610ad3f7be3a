"""Sensitivity: what a number format should cost each tensor of a model, in nats a token, and whether it does.

**Expected** (`expected_increases`). One calibration pass with gradients gives every linear layer the Fisher information
of its outputs and the cost D of a rounding error in each column (`rounding.Problem`). The expected increase of the KL
divergence is

    KL = 1/2 sum_rows E[g_row^2] sum_columns D_column e_row,column^2,

g the gradient of the log-likelihood of labels drawn from the model (Martens 2020, arXiv 1412.1193, eq. 27), e the
error of the format's best grid on a sample of rows. Gradients count as independent of inputs (K-FAC, Martens and Grosse
2015).

**Of embedding and head** (`table_options`). The same pass gives them the quadratic that their rows share: of the
gradients with respect to an embedded token, and of the head's inputs, each weighted by the squared gradients of its
token's logits. One or two formats are measured on a few windows, with the whole table rounded; the others follow from
their errors on a sample of rows, as a power law. Compensation is what counts: alone in SmolLM2-135M, at 3 bits in
groups of 64, the table costs 0.78 nats rounded to nearest, 0.38 with columns weighted by their cost, 0.09 compensated.

**Measured.** `layer_by_layer` rounds one layer at a time to nearest: a map of where errors hurt;
`measure_choices_alone` rounds with compensation what was drawn at random, to be compared with expectations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from avalab.compress import rounding
from avalab.compress.allocation import Option
from avalab.compress.rounding import Problem, Round
from avalab.kernels import formats
from avalab.kernels.formats import NumberFormat
from avalab.lab import process, statistics
from avalab.lab.errors import InputError
from avalab.lab.run import Run
from avalab.models import packed, predict, walk
from avalab.models.predict import Reference

BF16 = "bf16"

FISHER_WINDOWS = 8

LAYER_ROWS = 64  # of a layer, sampled for its expected errors

TABLE_ROWS, TABLE_WINDOWS = 2048, 2  # of embedding and head: sampled for their errors, and to measure on

Sizes = dict[str, int]  # the formats that a tensor may get, and its bytes in each

Nearest = Callable[[Tensor, Tensor, str], Tensor]  # what a format makes of rows, given the costs of their columns


@dataclass(frozen=True)
class LossIncreases:
    """Options of every linear layer; and by name the moments of embedding and head (one if tied), and their tokens."""

    layers: dict[str, list[Option]]
    moments: dict[str, Tensor]
    tokens: int


def expected_increases(
    model: PreTrainedModel,
    windows: Int[Tensor, "window time"],
    sizes: Mapping[str, Sizes],
    nearest: Nearest,
    *,
    damped_by_tokens: bool,
) -> LossIncreases:
    """Expected increases of the linear layers in `sizes`, which has the bytes of each in every format.

    With `damped_by_tokens` columns' costs allow for how few tokens they come from (`rounding.damping_for`).
    """
    names = {model.get_submodule(name): name for name in sizes}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found: dict[str, list[Option]] = {}
    tables: dict[nn.Module, Tensor] = {}
    last: list = [None, None]  # layers with one input come after each other: their problem is solved once

    bar = process.progress(desc="sensitivity", total=len(sizes))

    def listen(module: nn.Module, inputs: Tensor, gradients: Tensor) -> None:
        if module not in names:
            tables[module] = _table_moment(inputs, gradients, is_head=module is head)
            return
        if last[0] is not inputs:
            rows = inputs.detach().flatten(0, -2)
            damping = rounding.damping_for(rows.shape[1], len(rows)) if damped_by_tokens else rounding.DAMPING
            posed = rounding.rounding_problem(walk.second_moment(rows) / len(rows), damping=damping)
            last[:] = inputs, posed.column_cost
        weight, cost = module.weight.detach(), last[1]
        step = max(1, module.out_features // LAYER_ROWS)
        squared = gradients.flatten(0, -2)[:, ::step].float().square()
        weights = torch.outer(squared.mean(0), cost) * (module.out_features / squared.shape[1])
        sample = weight[::step].float()
        options = [Option(BF16, 2 * weight.numel(), 0.0)]
        for format, size in sizes[names[module]].items():
            error = (nearest(sample, cost, format) - sample).square_()
            options.append(Option(format, size, 0.5 * float((error * weights).sum())))
        found[names[module]] = options
        bar.update()

    others = [name for name, module in model.named_modules() if module in (embedding, head)]
    with bar:
        walk.gradient_pass(model, windows[:FISHER_WINDOWS], [*sizes, *others], listen)
    by_name = {name: tables[model.get_submodule(name)] for name in others}
    if head.weight is embedding.weight:
        first, *rest = by_name
        by_name = {first: sum((by_name[name] for name in rest), by_name[first])}
    return LossIncreases({name: found[name] for name in sizes}, by_name, windows[:FISHER_WINDOWS].numel())


def _table_moment(inputs: Tensor, gradients: Tensor, *, is_head: bool) -> Tensor:
    """Mean outer product, over tokens, of a head's inputs weighted by its gradients, or of an embedding's gradients."""
    gradients = gradients.flatten(0, -2)
    if is_head:  # a few tokens at a time: logits are many
        parts = [part.float().square().sum(-1, keepdim=True) for part in gradients.split(predict.CHUNK_TOKENS)]
        rows = inputs.detach().flatten(0, -2).float() * torch.cat(parts).sqrt()
    else:
        rows = gradients.float()
    return walk.second_moment(rows) / len(rows)


@torch.no_grad()
def increase_of_replacement(
    model: PreTrainedModel, windows: Int[Tensor, "window time"], parameter: nn.Parameter, values: Tensor
) -> float:
    """The measured KL divergence, nats a token, with other values in a parameter; the model stays as it was."""
    kept = parameter.data
    head, finish = predict.output_head(model)
    before = predict.hidden_states(model, windows)
    try:
        parameter.data = values
        after = predict.hidden_states(model, windows)
        increases = []
        for expected, candidate in zip(before, after, strict=True):
            parameter.data = kept
            reference = predict.log_probabilities(expected, head, finish)
            parameter.data = values
            changed = predict.log_probabilities(candidate, head, finish)
            increases.append(predict.kl_divergence(reference, changed).mean())
    finally:
        parameter.data = kept
    return float(torch.stack(increases).mean())


@torch.no_grad()
def table_options(
    model: PreTrainedModel,
    windows: Int[Tensor, "window time"],
    name: str,
    found: LossIncreases,
    *,
    sizes: Sizes,
    round: Round,
    measured: int,
    damping: float,
    int8_rows: bool,
) -> tuple[list[Option], Problem | None]:
    """Formats of embedding or head with the increase of the KL divergence, and its problem; the model is kept.

    Of `sizes` (bytes by format) by falling error `measured` many are measured: the coarsest, and with 2 the one in the
    middle. `damping` 0 is that for the tokens seen.
    """
    table, windows = model.get_submodule(name).weight, windows[:TABLE_WINDOWS]
    options = [Option(BF16, 2 * table.numel(), 0.0)]
    if int8_rows:  # there is only one way to round to them, so they are measured
        codes, scales = packed.int8_rows(table.detach())
        values = (codes.to(table.dtype) * scales).to(table.dtype)
        size = packed.int8_rows_bytes(table, tied=model.get_output_embeddings().weight is table)
        options.append(Option(packed.INT8_ROWS, size, increase_of_replacement(model, windows, table, values)))
    if not sizes:
        return options, None
    damping = damping or rounding.damping_for(table.shape[1], found.tokens)
    posed = rounding.rounding_problem(found.moments[name], damping=damping)
    sample = table.detach()[:: max(1, len(table) // TABLE_ROWS)].float()
    errors = {}
    for format in process.progress(list(sizes), desc=f"formats of {name.rpartition('.')[2]}"):
        errors[format] = float(rounding.output_error(sample, round(sample, posed, format), posed.moment).sum())
    ranked, known = sorted(sizes, key=errors.get), {}
    chosen = list(dict.fromkeys((ranked[-1], ranked[len(ranked) // 2])[:measured]))
    for format in process.progress(chosen, desc=f"loss of {name.rpartition('.')[2]}"):
        values = round(table.detach(), posed, format).decode(table.dtype)
        known[format] = increase_of_replacement(model, windows, table, values)
    options += [Option(format, size, increase_by_error(errors, known, format)) for format, size in sizes.items()]
    return options, posed


def increase_by_error(errors: Mapping[str, float], known: Mapping[str, float], format: str) -> float:
    """The increase of a format by its error: a power law through the measured ones, proportional below them."""
    points = sorted((errors[f], max(increase, 1e-12)) for f, increase in known.items())
    (low, least), (high, most) = points[0], points[-1]
    slope = log(most / least) / log(high / low) if high > low and errors[format] > low else 1.0
    return least * exp(slope * log(max(errors[format], 1e-30) / low))


def layer_by_layer(
    model: PreTrainedModel, against: Reference, format: NumberFormat
) -> Iterator[tuple[str, Float[Tensor, "window token"]]]:
    """Yield every linear layer's name and the KL divergence per token when only that layer is in `format`.

    The model is left as it was. Layers whose columns the format's groups do not divide raise InputError.
    """
    entering = _block_calls(model, against.windows)
    for name, layer in tqdm(walk.linear_layers(model).items(), desc="sensitivity", leave=False):
        kept = layer.weight.data
        layer.weight.data = formats.round_to_nearest(kept.float(), format).to(kept.dtype)
        try:
            yield name, _kl_from(model, walk.block_index(name), entering, against)
        finally:
            layer.weight.data = kept


def record_layers(run: Run, model: PreTrainedModel, against: Reference, format: NumberFormat, **more) -> None:
    """Append a `kl_divergence` record for each layer, subject `layer 07/mlp.down_proj`."""
    for name, kl in layer_by_layer(model, against, format):
        estimate = statistics.mean(kl, resamples=run.profile.resamples, seed=run.seed)
        details = {"format": format.name, "windows_sha256": predict.windows_sha256(against.windows)}
        run.record(layer_subject(name), "kl_divergence", unit="nats/token", **vars(estimate), details=details, **more)


def layer_subject(name: str) -> str:
    """`model.layers.7.mlp.down_proj` -> `layer 07/mlp.down_proj`."""
    parts = name.split(".")
    at = parts.index("layers")
    return f"layer {int(parts[at + 1]):02d}/{'.'.join(parts[at + 2 :])}"


@torch.inference_mode()
def _block_calls(model: PreTrainedModel, windows: Tensor) -> list[tuple[tuple, dict]]:
    """Positional and keyword arguments of each block in one pass over the windows."""
    seen: list[tuple[tuple, dict]] = []

    def note(_block: nn.Module, args: tuple, keywords: dict) -> None:
        seen.append((args, keywords))

    with contextlib.ExitStack() as stack:
        for block in model.base_model.layers:
            stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
        predict.hidden_states(model, windows)
    return seen


@torch.inference_mode()
def _kl_from(
    model: PreTrainedModel, start: int, entering: list[tuple[tuple, dict]], against: Reference
) -> Float[Tensor, "window token"]:
    (hidden, *_), _ = entering[start]
    for block, (args, keywords) in zip(model.base_model.layers[start:], entering[start:], strict=True):
        hidden, *_ = walk.next_call(block, ((hidden, *args[1:]), keywords))[0]
    return predict.score_hidden_states(model, model.base_model.norm(hidden), against).kl


def draw_choices(options: Mapping[str, list[Option]], count: int, *, seed: int) -> list[tuple[str, Option]]:
    """Random choices of linear layers whose expected increase is positive, at most one a layer, in the model's order.

    Raises ValueError when fewer layers than `count` have such a choice.
    """
    open_to = {n: [o for o in row if o.cost > 0] for n, row in options.items() if ".layers." in n}
    names = [name for name, row in open_to.items() if row]
    if count > len(names):
        raise InputError(f"{count} choices were asked for; only {len(names)} layers have one")
    random = np.random.default_rng(seed)
    picked = sorted(random.choice(len(names), count, replace=False))
    return [(names[i], open_to[names[i]][random.integers(len(open_to[names[i]]))]) for i in picked]


def measure_choices_alone(
    model: PreTrainedModel,
    windows: Int[Tensor, "window time"],
    choices: Sequence[tuple[str, Option]],
    against: Reference,
    round: Round,
) -> Iterator[float]:
    """The KL divergence of each choice with everything else as it was; the model is left unchanged."""
    names = {name for name, _ in choices}
    moments = {
        name: site.moment for site in walk.calibration_sites(model, windows) for name in site.layers if name in names
    }
    for name, option in tqdm(choices, desc="single choices", leave=False):
        layer = model.get_submodule(name)
        kept = layer.weight.data
        damping = rounding.damping_for(layer.in_features, windows.numel())
        posed = rounding.rounding_problem(moments[name], damping=damping)
        try:
            layer.weight.data = round(kept.float(), posed, option.format).decode(kept.dtype)
            yield float(predict.score_model(model, against).kl.mean())
        finally:
            layer.weight.data = kept


def rank_correlation(expected: Sequence[float], measured: Sequence[float]) -> float:
    """Spearman's coefficient, in [-1, 1]."""
    return float(stats.spearmanr(expected, measured).statistic)


def measured_over_expected(expected: Sequence[float], measured: Sequence[float]) -> float:
    """Geometric mean of measured over expected. Raises ValueError for values that are not positive."""
    if min(*expected, *measured) <= 0:
        raise InputError("a ratio needs positive values on both sides")
    return float(np.exp(np.mean(np.log(np.asarray(measured) / np.asarray(expected)))))


def heat_map_rows(options: Mapping[str, list[Option]], formats: Sequence[str]) -> dict[str, float]:
    """Expected increases as subjects of a heat map: `layer 07/mlp.down_proj q4_0`, kinds and formats as rows."""
    found = {}
    for name, row in options.items():
        index, _, kind = name.partition(".layers.")[2].partition(".")
        costs = {option.format: option.cost for option in row if kind}
        for format in [format for format in formats if format in costs]:
            found[f"layer {int(index):02d}/{kind.rpartition('.')[2]} {format}"] = costs[format]
    kinds = [subject.partition("/")[2].partition(" ")[0] for subject in found]
    order = sorted(zip(kinds, found, strict=True), key=lambda pair: kinds.index(pair[0]))
    return {subject: found[subject] for _, subject in order}
