"""Estimates: what a pencil finds, what other libraries agree with, and what must never change."""

import inspect
from math import exp, log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from avalab.lab import statistics
from avalab.lab.run import Run
from avalab.lab.statistics import Estimate

HOW = {"resamples": 300, "seed": 0}
EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True, database=None)


# --- values over windows -----------------------------------------------------------------------------------------


def distributions(seed: int, spread: float, shape: tuple[int, int]) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).log_softmax(-1)


def test_perplexity_is_exp_of_the_mean_and_not_the_mean_of_exps():
    nll = torch.tensor([[0.0, 2.0], [4.0, 6.0]])
    assert statistics.perplexity(nll, **HOW).value == pytest.approx(exp(3))
    assert statistics.perplexity(nll, **HOW).value != pytest.approx((exp(1) + exp(5)) / 2)


@given(st.permutations(range(9)))
@EXAMPLES
def test_the_order_of_windows_changes_nothing(order):
    values = distributions(3, 2, (9, 6)).neg()
    assert statistics.mean(values[list(order)], **HOW) == statistics.mean(values, **HOW)
    assert statistics.perplexity(values[list(order)], **HOW) == statistics.perplexity(values, **HOW)


def test_the_interval_holds_the_mean_and_is_that_of_the_normal_distribution():
    values = torch.randn(400, 8, generator=torch.Generator().manual_seed(1)) + 2
    found = statistics.mean(values, resamples=2000, seed=0)
    half = 1.96 * values.mean(1).std().item() / 400**0.5
    assert found.low < found.value < found.high
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_the_interval_shrinks_as_windows_are_added():
    values = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    widths = [found.high - found.low for n in (4, 40, 400) if (found := statistics.mean(values[:n], **HOW))]
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_tokens_of_a_window_are_not_independent_and_do_not_narrow_the_interval():
    values = torch.randn(20, 1, generator=torch.Generator().manual_seed(1))
    assert statistics.mean(values.repeat(1, 50), **HOW).low == pytest.approx(statistics.mean(values, **HOW).low)


def test_one_window_has_a_value_and_no_interval():
    assert statistics.mean(torch.tensor([[1.0, 3.0]]), **HOW) == Estimate(2.0, None, None, 1)
    assert statistics.perplexity(torch.tensor([[0.0, 0.0]]), **HOW) == Estimate(1.0, None, None, 1)
    assert statistics.verdict(statistics.mean(torch.tensor([[1.0, 3.0]]), **HOW)) == "not distinguishable"


def test_a_thing_does_not_differ_from_itself():
    nll = distributions(0, 2, (5, 9)).neg()
    difference = statistics.paired_difference(nll, nll, **HOW)
    assert difference == Estimate(0.0, 0.0, 0.0, 5)
    assert statistics.verdict(difference) == "not distinguishable"


def test_pairing_finds_a_small_difference_that_the_windows_own_spread_would_hide():
    theirs = 5 * torch.randn(12, 30, generator=torch.Generator().manual_seed(1))
    ours = theirs + 0.1 + 0.01 * torch.randn(12, 30, generator=torch.Generator().manual_seed(2))
    assert statistics.verdict(statistics.paired_difference(ours, theirs, **HOW)) == "worse"
    alone = statistics.mean(ours, **HOW)
    assert alone.high - alone.low > 1


@pytest.mark.parametrize(
    ("low", "high", "lower", "said"),
    [
        (-0.2, 0.1, True, "not distinguishable"),
        (0.0, 0.1, True, "not distinguishable"),
        (0.1, 0.3, True, "worse"),
        (0.1, 0.3, False, "better"),
        (-0.3, -0.1, True, "better"),
        (-0.3, -0.1, False, "worse"),
    ],
)
def test_the_verdict_is_whether_the_interval_excludes_zero(low, high, lower, said):
    assert statistics.verdict(Estimate((low + high) / 2, low, high, 9), lower_is_better=lower) == said


def test_scores_of_different_windows_are_not_paired():
    unchecked = inspect.unwrap(statistics.paired_difference)  # as users run it: without the tests' shape checks
    with pytest.raises(ValueError, match=r"\(2, 3\) with \(3, 2\)"):
        unchecked(torch.zeros(2, 3), torch.zeros(3, 2), **HOW)


def test_the_tail_of_known_values_is_their_percentile():
    """0 to 99 in one window: the 99th percentile by linear interpolation is 98.01."""
    values = torch.arange(100.0).reshape(1, 100)
    assert statistics.tail_percentile(values, resamples=10, seed=0).value == pytest.approx(98.01)


def test_the_tail_has_an_interval_around_it_and_none_for_one_window():
    values = torch.from_numpy(np.random.default_rng(0).exponential(size=(12, 50))).float()
    found = statistics.tail_percentile(values, resamples=100, seed=0)
    assert found.low <= found.value <= found.high
    assert statistics.tail_percentile(values[:1], resamples=100, seed=0).low is None


def test_half_of_everything_is_a_ratio_of_one_half_without_doubt():
    values = torch.rand(8, 5) + 0.1
    found = statistics.paired_ratio(values / 2, values, resamples=50, seed=0)
    assert [found.value, found.low, found.high] == pytest.approx([0.5] * 3, rel=1e-5)


def test_a_ratio_of_other_windows_or_of_nothing_is_refused():
    with pytest.raises(ValueError, match="cannot pair scores of shape"):
        statistics.paired_ratio(torch.ones(2, 3), torch.ones(3, 3), resamples=5, seed=0)
    with pytest.raises(ValueError, match="has to be positive"):
        statistics.paired_ratio(torch.ones(2, 3), torch.zeros(2, 3), resamples=5, seed=0)


def test_three_draws_have_students_interval():
    """Mean 2, standard deviation 1, t(0.975, 2) = 4.3027: 2 -+ 4.3027 / sqrt(3) = -0.484 to 4.484."""
    found = statistics.over_draws(torch.tensor([1.0, 2.0, 3.0]))
    assert (found.value, found.n) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((-0.484, 4.484), abs=1e-3)
    assert statistics.over_draws(torch.tensor([1.0])) == statistics.Estimate(1.0, None, None, 1)


# --- shares and pairs --------------------------------------------------------------------------------------------


def test_eight_of_ten_has_the_wilson_interval_of_the_formula():
    """(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with z = 1.959964: 0.490 to 0.943."""
    z, p, n = 1.959964, 0.8, 10
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    found = statistics.wilson(8, 10)
    assert (found.value, found.n) == (0.8, 10)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert (found.low, found.high) == pytest.approx((0.490, 0.943), abs=1e-3)


def test_none_right_still_has_an_upper_end():
    assert statistics.wilson(0, 60).high == pytest.approx(1.959964**2 / (60 + 1.959964**2), abs=1e-6)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="n must be positive"):
        statistics.wilson(0, 0)


def test_six_flips_all_for_the_worse_have_twice_the_chance_of_six_heads():
    """2 x 0.5^6 = 1/32 = 0.03125: below 0.05, so it is worse; five flips (1/16) would not be enough."""
    found = statistics.mcnemar([False] * 6 + [True] * 4, [True] * 10)
    assert (found.gained, found.lost, found.n, found.verdict) == (0, 6, 10, "worse")
    assert found.p_value == pytest.approx(1 / 32)
    assert str(found) == "worse: 6 of 10 flip, 6 for the worse (p = 0.031)"
    assert statistics.mcnemar([False] * 5, [True] * 5).verdict == "not distinguishable"


def test_equal_answers_are_not_distinguishable():
    assert statistics.mcnemar([True, False], [True, False]) == statistics.Comparison(
        0, 0, 2, 1.0, "not distinguishable"
    )


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
@EXAMPLES
def test_swapping_the_two_swaps_the_verdict_and_keeps_the_p_value(pairs):
    ours, theirs = ([pair[i] for pair in pairs] for i in (0, 1))
    there, back = statistics.mcnemar(ours, theirs), statistics.mcnemar(theirs, ours)
    assert there.p_value == pytest.approx(back.p_value)
    assert (there.gained, there.lost) == (back.lost, back.gained)
    assert {there.verdict, back.verdict} in ({"better", "worse"}, {"not distinguishable"})


def test_answers_to_different_numbers_of_cases_cannot_be_paired():
    with pytest.raises(ValueError, match="cannot pair 1 answers with 2"):
        statistics.mcnemar([True], [True, False])


@pytest.mark.parametrize(("table", "ends"), [((20, 12, 2, 16), (0.0562, 0.3292)), ((36, 12, 2, 0), (0.0569, 0.3404))])
def test_pairs_of_fifty_have_the_interval_worked_out_by_hand(table, ends):
    """Shares 32/50 and 22/50, and 48/50 and 38/50: both differ by 0.2, and the second has negative correlation."""
    found = statistics.newcombe(*table)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx(ends, abs=5e-5)
    assert found.n == 50


def test_without_correlation_the_two_score_intervals_are_joined_as_of_independent_shares():
    """5 of 10 against 0 of 10: no margin to correlate, so only the ends of both Wilson intervals count."""
    found, half, none = statistics.newcombe(0, 5, 0, 5), statistics.wilson(5, 10), statistics.wilson(0, 10)
    assert found.low == pytest.approx(0.5 - ((0.5 - half.low) ** 2 + none.high**2) ** 0.5)
    assert found.high == pytest.approx(half.high)


def test_counts_of_four_cases_are_read_off_the_answers():
    ours, theirs = [True, True, False, False], [True, False, True, False]
    assert statistics.share_difference(ours, theirs) == statistics.newcombe(1, 1, 1, 1)
    assert statistics.share_difference(ours, theirs).value == 0


def test_exchanging_the_two_turns_the_interval_round():
    there, back = statistics.newcombe(10, 7, 1, 4), statistics.newcombe(10, 1, 7, 4)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_no_interval_leaves_what_a_difference_of_shares_can_be():
    for table in ((0, 0, 9, 0), (9, 0, 0, 0), (0, 9, 0, 0), (0, 0, 0, 9), (1, 8, 0, 0)):
        found = statistics.newcombe(*table)
        assert -1 <= found.low <= found.value <= found.high <= 1


def test_with_many_cases_the_interval_is_that_of_the_bootstrap():
    draws = torch.Generator().manual_seed(0)
    ours = torch.rand(400, generator=draws)
    theirs = 0.7 * ours + 0.3 * torch.rand(400, generator=draws)
    a, b = (ours > 0.4).tolist(), (theirs > 0.5).tolist()
    found = statistics.share_difference(a, b)
    gaps = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    again = stats.bootstrap((gaps,), lambda x, axis: x.mean(axis), n_resamples=4000, method="percentile", rng=0)
    assert (found.low, found.high) == pytest.approx(tuple(again.confidence_interval), abs=0.01)


def test_answers_to_other_numbers_of_cases_are_not_paired():
    with pytest.raises(ValueError, match="cannot pair 1 answers with 2"):
        statistics.share_difference([True], [True, False])


# --- what training recovers --------------------------------------------------------------------------------------


def test_half_of_a_doubled_loss_that_is_taken_back_is_a_half():
    """Loss 1 became 2 and is 1.5 after training: (2 - 1.5) / (2 - 1) = 1/2."""
    whole = torch.tensor([1.0, 1.0, 1.0])
    found = statistics.recovered_share(2 * whole, 1.5 * whole, whole, **HOW)
    assert (found.value, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 3)


def test_perplexity_is_the_exponential_of_the_mean_loss():
    """Perplexities 4, 8 and 6: (8 - 6) / (8 - 4) = 1/2, with losses spread around their means."""
    spread = torch.tensor([-0.3, 0.3])
    whole, damaged, taught = (log(p) + spread for p in (4, 8, 6))
    assert statistics.recovered_share(damaged, taught, whole, of="perplexity", **HOW).value == pytest.approx(0.5)


def test_right_answers_come_back_although_more_is_better():
    """10 of 10 right, then 4, then 7: half of the six lost cases."""
    whole, damaged, taught = (torch.tensor([1.0] * n + [0.0] * (10 - n)) for n in (10, 4, 7))
    found = statistics.recovered_share(damaged, taught, whole, **HOW)
    assert found.value == pytest.approx(0.5)
    assert 0 <= found.low < 0.5 < found.high < 1


@EXAMPLES
@given(losses=st.lists(st.floats(0.1, 5), min_size=2, max_size=20), damage=st.floats(0.5, 3))
def test_a_student_as_good_as_the_whole_model_recovers_all_and_an_untaught_one_nothing(losses, damage):
    whole = torch.tensor(losses)
    for of in statistics.TRANSFORMS:
        untaught = statistics.recovered_share(whole + damage, whole + damage, whole, of=of, **HOW)
        best = statistics.recovered_share(whole + damage, whole, whole, of=of, **HOW)
        assert untaught.value == pytest.approx(0, abs=1e-5)
        assert best.value == pytest.approx(1, abs=1e-5)
        assert best.low <= best.high


def test_damage_within_the_noise_has_no_interval_and_its_record_says_so():
    noise = torch.randn(30, generator=torch.Generator().manual_seed(0))
    whole, damaged = torch.ones(30), 1 + 0.001 + noise - noise.mean()
    assert statistics.recovered_share(damaged, whole, whole, **HOW).low is None
    run = Run("t", "smoke")
    statistics.record_recovered(run, "s", "calls", damaged, whole, whole)
    statistics.record_recovered(run, "s", "calls", whole, whole, whole)
    assert [(r.metric, r.value) for r in run.records] == [("recovered:calls", None)] * 2
    assert ["not distinguishable" in r.note for r in run.records] == [True, False]


def test_a_measured_recovery_is_recorded_with_its_interval():
    run, whole = Run("t", "smoke"), torch.linspace(1, 2, 10)
    statistics.record_recovered(run, "s", "text", 2 * whole, 1.5 * whole, whole)
    (record,) = run.records
    assert record.value == pytest.approx(0.5)
    assert record.low <= 0.5 + 1e-9
    assert record.high >= 0.5 - 1e-9


def test_items_that_do_not_match_and_no_damage_at_all_are_refused():
    function, two = statistics.recovered_share, torch.ones(2)
    while hasattr(function, "__wrapped__"):  # below the checks of shapes that the tests install, as a user has it
        function = function.__wrapped__
    with pytest.raises(ValueError, match="cannot pair 2, 2 and 3 items"):
        function(two, two, torch.ones(3), **HOW)
    with pytest.raises(ValueError, match="nothing was damaged"):
        statistics.recovered_share(torch.ones(2), torch.ones(2), torch.ones(2), **HOW)


# --- agreement of raters -------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(("level", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_krippendorffs_four_observers_is_the_published_one(level, value):
    assert statistics.krippendorff_alpha(OBSERVERS, level=level) == pytest.approx(value, abs=5e-4)


def test_alpha_of_krippendorffs_two_observers_is_the_published_one():
    """14 zeros and 6 ones, 4 coincidences 0-1: 1 - 19 x 4 / (14 x 6) = 0.095."""
    assert statistics.krippendorff_alpha(BINARY, level="nominal") == pytest.approx(1 - 19 * 4 / (14 * 6))


def test_ordinal_alpha_of_three_units_by_pencil():
    """Pairs (1,1), (1,2), (3,3): n = 3, 1, 2. Middle ranks 1.5, 3.5, 5: d(1,2) = 4, d(1,3) = 12.25, d(2,3) = 2.25.

    Observed 1 x 4; expected 3 x 1 x 4 + 3 x 2 x 12.25 + 1 x 2 x 2.25 = 90: alpha = 1 - 5 x 4 / 90 = 7/9.
    """
    assert statistics.krippendorff_alpha(np.array([[1.0, 1, 3], [1, 2, 3]])) == pytest.approx(7 / 9)


def test_a_unit_that_one_rater_scored_says_nothing():
    wider = np.hstack([OBSERVERS, [[5], [GAP], [GAP], [GAP]]])
    assert statistics.krippendorff_alpha(wider) == pytest.approx(statistics.krippendorff_alpha(OBSERVERS))


def test_equal_scores_agree_entirely_and_opposite_ones_less_than_by_chance():
    assert statistics.krippendorff_alpha(np.array([[1.0, 2, 5], [1, 2, 5]])) == 1
    assert statistics.krippendorff_alpha(np.array([[1.0, 5, 1, 5], [5, 1, 5, 1]])) < 0


scores = st.lists(st.lists(st.integers(1, 5), min_size=3, max_size=3), min_size=2, max_size=8)


@EXAMPLES
@given(scores)
def test_the_order_of_raters_and_units_and_the_distance_of_ordinal_scores_change_nothing(rows):
    values = np.array(rows, dtype=float).T
    if len(np.unique(values)) < 2:
        return
    value = statistics.krippendorff_alpha(values)
    assert value <= 1
    assert statistics.krippendorff_alpha(values[::-1, ::-1]) == pytest.approx(value)
    assert statistics.krippendorff_alpha(10**values) == pytest.approx(value)


def test_scores_without_a_difference_have_no_alpha():
    for values in (np.full((2, 3), 4.0), np.array([[1.0, GAP], [GAP, 2]])):
        with pytest.raises(ValueError, match="alpha is not defined for scores of 2 raters"):
            statistics.krippendorff_alpha(values)


def test_an_unknown_level_of_scores_is_refused():
    with pytest.raises(ValueError, match="unknown level 'ratio'; choose one of nominal, ordinal, interval"):
        statistics.krippendorff_alpha(OBSERVERS, level="ratio")


def test_the_interval_holds_the_value_and_shrinks_with_more_units():
    draw = np.random.default_rng(0)
    truth = draw.integers(1, 6, 400)
    values = np.clip(truth + draw.integers(-1, 2, (3, 400)), 1, 5).astype(float)
    few = statistics.rater_agreement(values[:, :40], range(40), **HOW)
    many = statistics.rater_agreement(values, range(400), **HOW)
    assert few.low < few.value < few.high
    assert many.low < many.value < many.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert (few.n, many.n) == (40, 400)


def test_the_interval_resamples_clusters_so_that_copies_of_a_unit_do_not_narrow_it():
    once = statistics.rater_agreement(OBSERVERS, range(12), **HOW)
    copied = statistics.rater_agreement(
        np.repeat(OBSERVERS, 5, axis=1), [unit for unit in range(12) for _ in range(5)], **HOW
    )
    assert copied.n == 12
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=0.03)


def test_one_cluster_has_no_interval():
    found = statistics.rater_agreement(OBSERVERS, ["same"] * 12, **HOW)
    assert (found.low, found.high, found.n) == (None, None, 1)


@pytest.mark.parametrize(
    ("low", "allows"), [(0.81, "reliable"), (0.7, "good for tentative conclusions"), (0.5, "not reliable")]
)
def test_what_an_agreement_allows_is_decided_by_its_lower_end(low, allows):
    assert statistics.reliability(Estimate(0.9, low, 0.95, 20)) == allows


# --- timings ----------------------------------------------------------------------------------------------------------


def test_percentiles_of_one_to_five():
    """Linear between neighbours: the 95th lies 0.8 of the way from 4 to 5."""
    assert statistics.quantile([5, 1, 4, 2, 3]).value == 3
    assert statistics.quantile([5, 1, 4, 2, 3], 0.95).value == pytest.approx(4.8)


def test_interval_of_the_median_of_nine_is_the_second_to_the_eighth():
    """P(2 <= Binomial(9, 1/2) <= 7) = 1 - 20/512 = 0.961."""
    assert statistics.quantile(list(range(1, 10))) == Estimate(5, 2, 8, 9)


def test_three_samples_give_no_interval():
    assert statistics.quantile([1.0, 2.0, 3.0]) == Estimate(2, None, None, 3)


@EXAMPLES
@given(st.lists(st.floats(0, 1e6), min_size=6, max_size=40), st.randoms(use_true_random=False))
def test_order_of_samples_changes_neither_quantile_nor_interval(samples, random):
    assert statistics.quantile(samples) == statistics.quantile(random.sample(samples, len(samples)))


def test_interval_of_the_median_covers_it_at_least_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    found = [statistics.quantile(torch.rand(9, generator=generator).tolist()) for _ in range(2000)]
    assert sum(estimate.low <= 0.5 <= estimate.high for estimate in found) / 2000 > 0.945
