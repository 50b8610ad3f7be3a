"""How far raters agree: Krippendorff's alpha, with an interval.

1. A unit's scores are counted in pairs of raters, each over the unit's number of scores less one, so that every score
   weighs the same; the sum over units is the coincidence matrix o, with margins n_c and n scores in all.
2. alpha = 1 - (n - 1) sum_ck o_ck d(c, k) / sum_ck n_c n_k d(c, k): observed over expected disagreement. The squared
   difference d of two ordinal scores is the square of how many scores were given between them, ends counting half.
3. The interval resamples clusters of units, because answers to one request are not independent, and computes alpha of
   each resample, margins and distances included. Zapf et al. (2016) found bootstrap intervals of alpha to hold.

Source: Krippendorff, "Computing Krippendorff's alpha-reliability" (2011). At 0.8 scores are called reliable, from 0.667
on good for tentative conclusions (Krippendorff, "Content Analysis", 2004, ch. 11, on the interval's lower end).

What it does not do: ratio or circular data, or weights for raters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from avalab.statistics import Estimate

LEVELS = ("nominal", "ordinal", "interval")


def alpha(values: Float[ndarray, "rater unit"], *, level: str = "ordinal") -> float:
    """Krippendorff's alpha of scores, NaN where a rater gave none; `level` nominal, ordinal or interval.

    Raises ValueError when no unit has two scores or all of those are equal: agreement cannot be told from no choice.
    """
    found = _alpha(_coincidences(values).sum(0)[None], np.unique(values[~np.isnan(values)]), level)[0]
    if np.isnan(found):
        raise ValueError(f"alpha is not defined for scores of {values.shape[0]} raters that differ on no paired unit")
    return float(found)


def estimate(
    values: Float[ndarray, "rater unit"], clusters: Sequence, *, resamples: int, seed: int, level: str = "ordinal"
) -> Estimate:
    """Alpha with a 95 % percentile interval over resampled clusters of units (one label a unit, such as its request).

    Resamples in which all scores are equal have no alpha and are left out. Raises ValueError as `alpha` does.
    """
    names, where = np.unique(np.asarray(clusters), return_inverse=True)
    scores = np.unique(values[~np.isnan(values)])
    by_cluster = np.zeros((len(names), len(scores), len(scores)))
    np.add.at(by_cluster, where, _coincidences(values))
    drawn = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=resamples)
    again = _alpha(np.einsum("sc,cij->sij", drawn, by_cluster), scores, level)
    again = again[~np.isnan(again)]
    low, high = np.quantile(again, (0.025, 0.975)) if len(names) > 1 and len(again) else (None, None)
    ends = (None if end is None else float(end) for end in (low, high))
    return Estimate(alpha(values, level=level), *ends, len(names))


def reliability(found: Estimate) -> str:
    """What an agreement allows, by its lower end where it has one."""
    least = found.value if found.low is None else found.low
    return "reliable" if least >= 0.8 else "good for tentative conclusions" if least >= 0.667 else "not reliable"


def _coincidences(values: ndarray) -> Float[ndarray, "unit score score"]:
    """For each unit, how often a pair of raters gave (c, k), over the unit's number of scores less one."""
    scores = np.unique(values[~np.isnan(values)])
    counts = (values[:, :, None] == scores).sum(0).astype(float)
    given = counts.sum(1)
    pairs = counts[:, :, None] * counts[:, None, :] - np.eye(len(scores)) * counts[:, :, None]
    return pairs * np.where(given > 1, 1 / np.maximum(given - 1, 1), 0)[:, None, None]


def _alpha(coincidences: ndarray, scores: ndarray, level: str) -> Float[ndarray, "sample"]:
    """Alpha of each coincidence matrix; NaN where it is not defined."""
    n_c = coincidences.sum(2)
    n = n_c.sum(1)
    distances = _squared_distances(n_c, scores, level)
    observed = (coincidences * distances).sum((1, 2))
    expected = (n_c[:, :, None] * n_c[:, None, :] * distances).sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - (n - 1) * observed / expected, np.nan)


def _squared_distances(n_c: ndarray, scores: ndarray, level: str) -> Float[ndarray, "sample score score"]:
    """The squared difference of two scores; ordinal: how many scores were given between them, ends counting half."""
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; choose one of {', '.join(LEVELS)}")
    if level == "nominal":
        return np.broadcast_to(1.0 - np.eye(len(scores)), (len(n_c), len(scores), len(scores)))
    # Ordinal: the sum over scores between c and k less half of both ends is the distance of their middle ranks.
    places = np.cumsum(n_c, 1) - n_c / 2 if level == "ordinal" else np.broadcast_to(scores, n_c.shape)
    return (places[:, :, None] - places[:, None, :]) ** 2
