"""Estimates with their uncertainty: means, percentiles, ratios and shares, each with a 95 % interval, and paired tests.

| what | how its interval is found | source |
|---|---|---|
| mean, perplexity, tail, difference, ratio over windows | bootstrap of windows | Efron and Tibshirani (1993) |
| mean over independent draws | Student's t | Student (1908) |
| median, percentiles of timings | order statistics | Conover, Practical Nonparametric Statistics, 3.2 |
| share of right answers | score interval | Wilson (1927) |
| difference of two shares on the same cases | method 10 for pairs | Newcombe (1998) |
| which of two is right more often on the same cases | exact test of a fair coin | McNemar (1947) |
| share of a loss that came back | bootstrap of items, paired | Efron and Tibshirani (1993), section 10.5 |
| agreement of raters, Krippendorff's alpha | bootstrap of clusters of units | Zapf et al. (2016) |

An interval over text resamples windows, not tokens: neighbouring tokens are not independent. Values may be tensors or
arrays. Two things that were measured on the same items are always compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import krippendorff
import numpy as np
from jaxtyping import Float
from scipy import stats

from avalab.lab.errors import InputError
from avalab.lab.run import Run

TAIL = 0.99

TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"perplexity": np.exp, "mean": lambda mean: mean}

LEVELS = ("nominal", "ordinal", "interval")


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval over `n` windows; one window says nothing of its own spread: no interval."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """Two subjects on the same cases: which of them only one got right, and the p-value of McNemar's exact test."""

    gained: int
    lost: int
    n: int
    p_value: float
    verdict: str

    def __str__(self) -> str:
        flips = f"{self.gained + self.lost} of {self.n} flip, {self.lost} for the worse"
        return f"{self.verdict}: {flips} (p = {self.p_value:.2g})"


def mean(values: Float[Any, "window token"], *, resamples: int, seed: int) -> Estimate:
    """Mean over all tokens with a 95 % percentile-bootstrap interval that resamples windows.

    Windows are of equal length, so the mean of window means is the mean over tokens. Their order changes nothing
    but the interval's Monte-Carlo noise, which sorting removes. Source: Efron and Tibshirani (1993), ch. 13.
    """
    per_window = np.sort(_doubles(values).mean(-1))
    return _bootstrapped((per_window,), np.mean, resamples, seed)


def perplexity(nll: Float[Any, "window token"], *, resamples: int, seed: int) -> Estimate:
    """exp(mean negative log-likelihood over all tokens), never a mean of perplexities; interval over windows."""
    found = mean(nll, resamples=resamples, seed=seed)
    value, low, high = (None if each is None else float(np.exp(each)) for each in (found.value, found.low, found.high))
    return Estimate(value, low, high, found.n)


def tail_percentile(values: Float[Any, "window token"], *, resamples: int, seed: int, share: float = TAIL) -> Estimate:
    """The percentile `share` of all tokens, with a 95 % percentile-bootstrap interval that resamples windows."""
    rows = _doubles(values)
    value = float(np.quantile(rows, share))
    if len(rows) < 2:
        return Estimate(value, None, None, len(rows))
    picks = np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))
    low, high = np.quantile([np.quantile(rows[pick], share) for pick in picks], (0.025, 0.975))
    return Estimate(value, float(low), float(high), len(rows))


def paired_difference(
    ours: Float[Any, "window token"], theirs: Float[Any, "window token"], *, resamples: int, seed: int
) -> Estimate:
    """Mean of `ours - theirs` on the same tokens, resampling windows as pairs.

    Raises ValueError when the two were not measured on windows of the same shape.
    """
    if ours.shape != theirs.shape:
        raise InputError(f"cannot pair scores of shape {tuple(ours.shape)} with {tuple(theirs.shape)}")
    return mean(ours - theirs, resamples=resamples, seed=seed)


def paired_ratio(
    ours: Float[Any, "window token"], theirs: Float[Any, "rival_window rival_token"], *, resamples: int, seed: int
) -> Estimate:
    """Mean of `ours` over mean of `theirs`, windows resampled as pairs.

    Raises ValueError when the two were not measured on windows of the same shape, or `theirs` has no mean to divide by.
    """
    if ours.shape != theirs.shape:
        raise InputError(f"cannot pair scores of shape {tuple(ours.shape)} with {tuple(theirs.shape)}")
    a, b = _doubles(ours).mean(-1), _doubles(theirs).mean(-1)
    if b.mean() <= 0:
        raise InputError(f"the mean to divide by is {b.mean():.3g}; it has to be positive")
    return _bootstrapped((a, b), lambda x, y, axis: x.mean(axis) / y.mean(axis), resamples, seed)


def verdict(difference: Estimate, *, lower_is_better: bool = True) -> str:
    """`better`, `worse` or `not distinguishable`: whether there is an interval and it excludes zero."""
    if difference.low is None or difference.low <= 0 <= difference.high:
        return "not distinguishable"
    return "better" if (difference.value < 0) == lower_is_better else "worse"


def _bootstrapped(samples: tuple[np.ndarray, ...], statistic: Callable, resamples: int, seed: int) -> Estimate:
    """A statistic of samples that belong together item by item; no interval for one item, no width for equal ones."""
    value, n = float(statistic(*samples, axis=-1)), len(samples[0])
    if n < 2:
        return Estimate(value, None, None, n)
    if all(np.ptp(each) == 0 for each in samples):
        return Estimate(value, value, value, n)
    ends = stats.bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
        vectorized=True,
    ).confidence_interval
    return Estimate(value, float(ends.low), float(ends.high), n)


def _doubles(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def over_draws(values: Float[Any, "draw"]) -> Estimate:
    """The mean of a value over independent draws with Student's 95 % interval; one draw has none."""
    drawn, n = _doubles(values), len(values)
    value = float(drawn.mean())
    if n < 2:
        return Estimate(value, None, None, n)
    half = float(stats.t.ppf(0.975, n - 1) * drawn.std(ddof=1) / n**0.5)
    return Estimate(value, value - half, value + half, n)


def quantile(samples: Sequence[float], q: float = 0.5) -> Estimate:
    """The q-quantile with an interval from order statistics, which needs no model of the noise.

    Linear between neighbouring samples (type 7 of Hyndman and Fan, 1996); a side that they are too few for is None.
    """
    ordered, n = sorted(samples), len(samples)
    low, high = int(stats.binom.ppf(0.025, n, q)), int(stats.binom.ppf(0.975, n, q)) + 1
    ends = ordered[low - 1] if low >= 1 else None, ordered[high - 1] if high <= n else None
    return Estimate(float(np.quantile(ordered, q)), *ends, n)


def median_and_range(samples: Sequence[float]) -> Estimate:
    """The median of a few timed rounds; its ends are not an interval but the smallest and the largest of them."""
    return Estimate(float(np.median(samples)), min(samples), max(samples), len(samples))


def wilson(right: int, n: int) -> Estimate:
    """A share with its 95 % score interval. Source: Wilson (1927). Raises ValueError when nothing was asked."""
    if n < 1 or not 0 <= right <= n:
        raise InputError(f"{right} right of {n} is no share; n must be positive and right lie between 0 and n")
    interval = stats.binomtest(right, n).proportion_ci(method="wilson")
    return Estimate(right / n, float(interval.low), float(interval.high), n)


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> Comparison:
    """McNemar's exact two-sided test at p < 0.05; ValueError when the two did not answer equally many cases.

    Of the cases that only one of the two gets right: is the split compatible with a fair coin? Source: McNemar (1947).
    """
    if len(ours) != len(theirs):
        raise InputError(f"cannot pair {len(ours)} answers with {len(theirs)}; both must have the same cases")
    gained = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    p_value = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    said = "not distinguishable" if p_value >= 0.05 else "better" if gained > lost else "worse"
    return Comparison(gained, lost, len(ours), p_value, said)


def share_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> Estimate:
    """Share of `ours` less share of `theirs` on the same cases; ValueError when they are not equally many, or none."""
    flips = mcnemar(ours, theirs)
    both = sum(a and b for a, b in zip(ours, theirs, strict=True))
    return newcombe(both, flips.gained, flips.lost, flips.n - both - flips.gained - flips.lost)


def newcombe(both: int, first: int, second: int, neither: int) -> Estimate:
    """Share of the first less share of the second with a 95 % interval, from how many pairs had which of them right.

    The score intervals of the two shares are joined by the correlation phi of the pairs, continuity-corrected where it
    is positive. Source: Newcombe, "Improved confidence intervals for the difference between binomial proportions based
    on paired data" (1998), method 10. Raises ValueError when there is no pair.
    """

    def joined(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0))

    n = both + first + second + neither
    a, b = wilson(both + first, n), wilson(both + second, n)
    covariance = both * neither - first * second
    covariance = max(covariance - n / 2, 0) if covariance > 0 else covariance
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = covariance / math.sqrt(margins) if margins else 0.0
    low, high = joined(a.value - a.low, b.high - b.value), joined(a.high - a.value, b.value - b.low)
    value = (first - second) / n
    return Estimate(value, value - low, value + high, n)


def recovered_share(
    damaged: Float[Any, "item"],
    taught: Float[Any, "item"],
    whole: Float[Any, "item"],
    *,
    of: str = "mean",
    resamples: int,
    seed: int,
) -> Estimate:
    """(damaged - taught) / (damaged - whole) of exp(mean) (`of` "perplexity") or of the mean, on the same items.

    0: nothing of the damage came back, 1: all of it; above 1 the student is better there than the whole model. No
    interval where more than one resample in forty shows no damage: there is nothing to recover. It does not hold the
    noise of training, which a second seed would show.
    Raises ValueError when the three were not measured on equally many items, or nothing at all was damaged.
    """
    if not len(damaged) == len(taught) == len(whole):
        raise InputError(f"cannot pair {len(damaged)}, {len(taught)} and {len(whole)} items")
    values = np.stack([_doubles(each) for each in (damaged, taught, whole)])
    if values[0].mean() == values[2].mean():
        raise InputError("nothing was damaged: the damaged and the whole model have the same mean")
    transform, n = TRANSFORMS[of], values.shape[1]

    def share(three: np.ndarray) -> Any:
        return (three[0] - three[1]) / (three[0] - three[2])

    point = float(share(transform(values.mean(1))))
    drawn = transform(values[:, np.random.default_rng(seed).integers(0, n, (resamples, n))].mean(-1))
    damage = np.sign(values[0].mean() - values[2].mean()) * (drawn[0] - drawn[2])
    if n < 2 or np.quantile(damage, 0.025) <= 0:
        return Estimate(point, None, None, n)
    low, high = np.quantile(share(drawn[:, damage > 0]), [0.025, 0.975])
    return Estimate(point, float(low), float(high), n)


def record_recovered(
    run: Run,
    subject: str,
    part: str,
    damaged: Float[Any, "item"],
    taught: Float[Any, "item"],
    whole: Float[Any, "item"],
    *,
    of: str = "mean",
) -> None:
    """Append `recovered:<part>`; without a value, and a note, where the damage is no larger than chance."""
    if _doubles(damaged).mean() == _doubles(whole).mean():
        run.record(subject, f"recovered:{part}", None, "1", n=len(whole), note="nothing was lost")
        return
    found = recovered_share(damaged, taught, whole, of=of, resamples=run.profile.resamples, seed=run.seed)
    if found.low is None:
        note = "what was lost is not distinguishable from nothing on these items"
        run.record(subject, f"recovered:{part}", None, "1", n=found.n, note=note, details={"point": found.value})
        return
    run.record(subject, f"recovered:{part}", unit="1", **vars(found))


def krippendorff_alpha(values: Float[np.ndarray, "rater unit"], *, level: str = "ordinal") -> float:
    """Krippendorff's alpha of scores, NaN where a rater gave none; `level` is one of `LEVELS`.

    Source: Krippendorff, "Computing Krippendorff's alpha-reliability" (2011). Raises ValueError when no unit has two
    scores or all of those are equal: agreement cannot be told from no choice.
    """
    found = _alpha(*_score_counts(values), level)
    if np.isnan(found):
        raise InputError(f"alpha is not defined for scores of {values.shape[0]} raters that differ on no paired unit")
    return found


def rater_agreement(
    values: Float[np.ndarray, "rater unit"],
    clusters: Sequence,
    *,
    resamples: int,
    seed: int,
    level: str = "ordinal",
) -> Estimate:
    """Alpha with a 95 % percentile interval over resampled clusters of units (one label a unit, such as its request).

    Clusters, because answers to one request are not independent. Resamples in which all scores are equal have no alpha
    and are left out. Raises ValueError as `alpha` does.
    """
    names, where = np.unique(np.asarray(clusters), return_inverse=True)
    counts, scores = _score_counts(values)
    drawn = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=resamples)
    again = np.array([_alpha(np.repeat(counts, times[where], axis=0), scores, level) for times in drawn])
    again = again[~np.isnan(again)]
    low, high = np.quantile(again, (0.025, 0.975)) if len(names) > 1 and len(again) else (None, None)
    ends = (None if end is None else float(end) for end in (low, high))
    return Estimate(krippendorff_alpha(values, level=level), *ends, len(names))


def reliability(found: Estimate) -> str:
    """What an agreement allows, by its lower end where it has one: 0.8 is reliable, 0.667 tentative.

    Source: Krippendorff, "Content Analysis" (2004), chapter 11.
    """
    least = found.value if found.low is None else found.low
    return "reliable" if least >= 0.8 else "good for tentative conclusions" if least >= 0.667 else "not reliable"


def _score_counts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each unit got each score ["unit score"], and the scores."""
    scores = np.unique(values[~np.isnan(values)])
    return (values[:, :, None] == scores).sum(0), scores


def _alpha(counts: np.ndarray, scores: np.ndarray, level: str) -> float:
    """Alpha of the units with two scores and more; NaN where those are all equal, or there are none."""
    if level not in LEVELS:
        raise InputError(f"unknown level {level!r}; choose one of {', '.join(LEVELS)}")
    paired = counts[counts.sum(1) > 1]
    if np.count_nonzero(paired.sum(0)) < 2:
        return float("nan")
    return float(krippendorff.alpha(value_counts=paired, value_domain=scores, level_of_measurement=level))
