"""How much of what a step cost came back: the share of a loss that training recovered, with its interval.

recovered = (damaged - taught) / (damaged - whole) of a quantity that all three were measured for on the same items:
perplexity (exp of the mean loss), divergence (zero for the whole model) or the share of right answers. 0 means nothing
came back, 1 all of it; above 1 the student is better there than the teacher.

The interval resamples items (windows, cases) for all three at once, so that what is hard for one is hard for all (ratio
of paired means: Efron and Tibshirani 1993, section 10.5). Where more than one resample in forty shows no damage at all,
there is nothing to recover and no interval.

What it does not do: hold the noise of training, which a second seed would show.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from avalab.experiment import Run
from avalab.statistics import Estimate

TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"perplexity": np.exp, "mean": lambda mean: mean}


def recovered(
    damaged: Float[Tensor, "item"],
    taught: Float[Tensor, "item"],
    whole: Float[Tensor, "item"],
    *,
    of: str = "mean",
    resamples: int,
    seed: int,
) -> Estimate:
    """The share that came back of exp(mean) (`of` "perplexity") or of the mean, with a 95 % bootstrap interval.

    Raises ValueError when the three were not measured on equally many items, or nothing at all was damaged.
    """
    if not len(damaged) == len(taught) == len(whole):
        raise ValueError(f"cannot pair {len(damaged)}, {len(taught)} and {len(whole)} items")
    values = np.stack([x.double().numpy() for x in (damaged, taught, whole)])
    if values[0].mean() == values[2].mean():
        raise ValueError("nothing was damaged: the damaged and the whole model have the same mean")
    transform, n = TRANSFORMS[of], values.shape[1]
    point = float(_share(transform(values.mean(1))))
    picks = np.random.default_rng(seed).integers(0, n, (resamples, n))
    drawn = transform(values[:, picks].mean(-1))
    sign = np.sign(values[0].mean() - values[2].mean())
    damage = sign * (drawn[0] - drawn[2])
    if n < 2 or np.quantile(damage, 0.025) <= 0:
        return Estimate(point, None, None, n)
    low, high = np.quantile(_share(drawn[:, damage > 0]), [0.025, 0.975])
    return Estimate(point, float(low), float(high), n)


def _share(three: np.ndarray) -> np.ndarray | np.floating:
    damaged, taught, whole = three
    return (damaged - taught) / (damaged - whole)


def record(
    run: Run,
    subject: str,
    part: str,
    damaged: Float[Tensor, "item"],
    taught: Float[Tensor, "item"],
    whole: Float[Tensor, "item"],
    *,
    of: str = "mean",
) -> None:
    """Append `recovered:<part>`; without a value, and a note, where the damage is no larger than chance."""
    if damaged.double().mean() == whole.double().mean():
        run.record(subject, f"recovered:{part}", None, "1", n=len(whole), note="nothing was lost")
        return
    found = recovered(damaged, taught, whole, of=of, resamples=run.profile.resamples, seed=run.seed)
    if found.low is None:
        note = "what was lost is not distinguishable from nothing on these items"
        run.record(subject, f"recovered:{part}", None, "1", n=found.n, note=note, details={"point": found.value})
        return
    run.record(subject, f"recovered:{part}", unit="1", **vars(found))
