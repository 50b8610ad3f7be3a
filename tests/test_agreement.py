"""Agreement: Krippendorff's own examples, a matrix that a pencil fills, invariances, and intervals that behave."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avalab import agreement
from avalab.statistics import Estimate

GAP = np.nan
# Krippendorff (2011), example C: four observers, twelve units, gaps.
OBSERVERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, GAP, GAP, GAP],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, GAP, 3],
        [GAP, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, GAP],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, GAP],
    ]
)
# Krippendorff (2011), example A: two observers, ten units, no gap.
BINARY = np.array([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]], dtype=float)
HOW = {"resamples": 500, "seed": 1}


@pytest.mark.parametrize(("level", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_krippendorffs_four_observers_is_the_published_one(level, value):
    assert agreement.alpha(OBSERVERS, level=level) == pytest.approx(value, abs=5e-4)


def test_alpha_of_krippendorffs_two_observers_is_the_published_one():
    """14 zeros and 6 ones, 4 coincidences 0-1: 1 - 19 x 4 / (14 x 6) = 0.095."""
    assert agreement.alpha(BINARY, level="nominal") == pytest.approx(1 - 19 * 4 / (14 * 6))


def test_ordinal_alpha_of_three_units_by_pencil():
    """Pairs (1,1), (1,2), (3,3): n = 3, 1, 2. Middle ranks 1.5, 3.5, 5: d(1,2) = 4, d(1,3) = 12.25, d(2,3) = 2.25.

    Observed 1 x 4; expected 3 x 1 x 4 + 3 x 2 x 12.25 + 1 x 2 x 2.25 = 90: alpha = 1 - 5 x 4 / 90 = 7/9.
    """
    assert agreement.alpha(np.array([[1.0, 1, 3], [1, 2, 3]])) == pytest.approx(7 / 9)


def test_a_unit_that_one_rater_scored_says_nothing():
    wider = np.hstack([OBSERVERS, [[5], [GAP], [GAP], [GAP]]])
    assert agreement.alpha(wider) == pytest.approx(agreement.alpha(OBSERVERS))


def test_equal_scores_agree_entirely_and_opposite_ones_less_than_by_chance():
    assert agreement.alpha(np.array([[1.0, 2, 5], [1, 2, 5]])) == 1
    assert agreement.alpha(np.array([[1.0, 5, 1, 5], [5, 1, 5, 1]])) < 0


scores = st.lists(st.lists(st.integers(1, 5), min_size=3, max_size=3), min_size=2, max_size=8)


@settings(deadline=None, max_examples=40)
@given(scores)
def test_the_order_of_raters_and_units_and_the_distance_of_ordinal_scores_change_nothing(rows):
    values = np.array(rows, dtype=float).T
    if len(np.unique(values)) < 2:
        return
    value = agreement.alpha(values)
    assert value <= 1
    assert agreement.alpha(values[::-1, ::-1]) == pytest.approx(value)
    assert agreement.alpha(10**values) == pytest.approx(value)


def test_scores_without_a_difference_have_no_alpha():
    for values in (np.full((2, 3), 4.0), np.array([[1.0, GAP], [GAP, 2]])):
        with pytest.raises(ValueError, match="alpha is not defined for scores of 2 raters"):
            agreement.alpha(values)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="unknown level 'ratio'; choose one of nominal, ordinal, interval"):
        agreement.alpha(OBSERVERS, level="ratio")


def test_the_interval_holds_the_value_and_shrinks_with_more_units():
    draw = np.random.default_rng(0)
    truth = draw.integers(1, 6, 400)
    values = np.clip(truth + draw.integers(-1, 2, (3, 400)), 1, 5).astype(float)
    few = agreement.estimate(values[:, :40], range(40), **HOW)
    many = agreement.estimate(values, range(400), **HOW)
    assert few.low < few.value < few.high
    assert many.low < many.value < many.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert (few.n, many.n) == (40, 400)


def test_the_interval_resamples_clusters_so_that_copies_of_a_unit_do_not_narrow_it():
    once = agreement.estimate(OBSERVERS, range(12), **HOW)
    copied = agreement.estimate(np.repeat(OBSERVERS, 5, axis=1), [unit for unit in range(12) for _ in range(5)], **HOW)
    assert copied.n == 12
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=0.03)


def test_one_cluster_has_no_interval():
    found = agreement.estimate(OBSERVERS, ["same"] * 12, **HOW)
    assert (found.low, found.high, found.n) == (None, None, 1)


@pytest.mark.parametrize(
    ("low", "allows"), [(0.81, "reliable"), (0.7, "good for tentative conclusions"), (0.5, "not reliable")]
)
def test_what_an_agreement_allows_is_decided_by_its_lower_end(low, allows):
    assert agreement.reliability(Estimate(0.9, low, 0.95, 20)) == allows
