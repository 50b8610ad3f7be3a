"""Are expected rises right, and do they add up? Single choices measured directly, and whole allocations against sums.

1. Draw some (tensor, format) choices at random, among those of linear layers that should change anything.
2. One forward pass over the calibration windows keeps the second moment of what each of these layers reads.
3. For each choice: round that layer alone, with compensation, score the model against the base, put the weight back.
4. The rank correlation says whether the order is right, `factor` by how much the level is off. A prediction multiplied
   by a factor that was measured on other allocations of the same model is still a prediction; the raw one stays beside.

Source: Spearman (1904). What it does not do: correct expectations tensor by tensor, or choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Int
from scipy import stats
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from avalab import calibration, predict, rounding
from avalab.allocation import Option
from avalab.predict import Reference
from avalab.rounded_walk import RoundRows


def drawn(options: Mapping[str, list[Option]], count: int, *, seed: int) -> list[tuple[str, Option]]:
    """Random choices of linear layers whose expected rise is positive, at most one a layer, in the model's order.

    Raises ValueError when fewer layers than `count` have such a choice.
    """
    open_to = {n: [o for o in row if o.cost > 0] for n, row in options.items() if ".layers." in n}
    names = [name for name, row in open_to.items() if row]
    if count > len(names):
        raise ValueError(f"{count} choices were asked for; only {len(names)} layers have one")
    random = np.random.default_rng(seed)
    picked = sorted(random.choice(len(names), count, replace=False))
    return [(names[i], open_to[names[i]][random.integers(len(open_to[names[i]]))]) for i in picked]


def measured_alone(
    model: PreTrainedModel,
    windows: Int[Tensor, "window time"],
    choices: Sequence[tuple[str, Option]],
    against: Reference,
    round_rows: RoundRows,
) -> Iterator[float]:
    """The KL divergence of each choice with everything else as it was; the model is left unchanged."""
    moments = input_moments(model, windows, [name for name, _ in choices])
    for name, option in tqdm(choices, desc="single choices", leave=False):
        layer = model.get_submodule(name)
        kept = layer.weight.data
        damping = rounding.damping_for(layer.in_features, windows.numel())
        posed = rounding.problem(moments[name], damping=damping)
        (part,) = round_rows(kept.float(), posed, option.format, [layer.out_features])
        try:
            layer.weight.data = part.decode(kept.dtype)
            yield float(predict.score_model(model, against).kl.mean())
        finally:
            layer.weight.data = kept


@torch.inference_mode()
def input_moments(model: PreTrainedModel, windows: Int[Tensor, "window time"], names: Sequence[str]) -> dict:
    """X^T X / tokens of what the named layers read, all in one pass."""
    sums: dict[str, Tensor] = {}

    def listen(name: str):
        def add(_layer, args: tuple) -> None:
            found = calibration.second_moment(args[0].flatten(0, -2))
            sums[name] = sums[name] + found if name in sums else found

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(listen(name)) for name in names]
    try:
        for batch in windows.split(calibration.BATCH_WINDOWS):
            predict.hidden_states(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / windows.numel() for name, total in sums.items()}


def rank_correlation(expected: Sequence[float], measured: Sequence[float]) -> float:
    """Spearman's coefficient, in [-1, 1]."""
    return float(stats.spearmanr(expected, measured).statistic)


def factor(expected: Sequence[float], measured: Sequence[float]) -> float:
    """Geometric mean of measured over expected. Raises ValueError for values that are not positive."""
    if min(*expected, *measured) <= 0:
        raise ValueError("a ratio needs positive values on both sides")
    return float(np.exp(np.mean(np.log(np.asarray(measured) / np.asarray(expected)))))


def heat_rows(options: Mapping[str, list[Option]], formats: Sequence[str]) -> dict[str, float]:
    """Expected rises as subjects of a heat map: `layer 07/mlp.down_proj q4_0`, kinds and formats as rows."""
    found = {}
    for name, row in options.items():
        index, _, kind = name.partition(".layers.")[2].partition(".")
        costs = {option.format: option.cost for option in row}
        for format in formats:
            if kind and format in costs:
                found[f"layer {int(index):02d}/{kind.rpartition('.')[2]} {format}"] = costs[format]
    rows = list(dict.fromkeys(subject.partition("/")[2].partition(" ")[0] for subject in found))
    return dict(sorted(found.items(), key=lambda item: rows.index(item[0].partition("/")[2].partition(" ")[0])))
