"""When to ask the larger model: every cut by hand, equal confidences, and a large model that is no better."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avalab.serve import ensemble

EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True, database=None)
ITEMS = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.9]), st.floats(0, 4), st.floats(0, 4)), min_size=1, max_size=9
)


def test_the_fewest_unsure_items_that_close_nine_tenths_of_the_gap_are_sent():
    """Gains 1, 0, 1, 0 by rising confidence: nine tenths of 2 need the first three of four."""
    rule = ensemble.choose_threshold([0.2, 0.4, 0.6, 0.9], [1, 0, 1, 0], [0, 0, 0, 0])
    assert rule == ensemble.Rule(0.9, 0.75, 0.0)
    half = ensemble.choose_threshold([0.2, 0.4, 0.6, 0.9], [1, 0, 1, 0], [0, 0, 0, 0], recovered=0.5)
    assert half == ensemble.Rule(0.4, 0.25, 0.25)
    assert ensemble.deferred([0.39, 0.4], half) == [True, False]


def test_items_of_equal_confidence_go_together():
    rule = ensemble.choose_threshold([0.5, 0.5, 0.8], [1, 0, 0], [0, 0, 0])
    assert rule == ensemble.Rule(0.8, 2 / 3, 0.0)


def test_a_large_model_that_is_no_better_is_never_asked():
    rule = ensemble.choose_threshold([0.1, 0.9], [0, 1], [1, 0])
    assert rule == ensemble.Rule(-inf, 0.0, 0.5)
    assert ensemble.deferred([0.0, 1.0], rule) == [False, False]


def test_where_everything_must_go_the_threshold_is_infinite():
    rule = ensemble.choose_threshold([0.1, 0.9], [1, 1], [0, 0], recovered=1.0)
    assert rule == ensemble.Rule(inf, 1.0, 0.0)


@given(ITEMS, st.floats(0, 1))
@EXAMPLES
def test_the_rule_keeps_its_promise_on_the_items_it_was_chosen_on(items, recovered):
    sure, small, large = zip(*items, strict=True)
    rule = ensemble.choose_threshold(sure, small, large, recovered=recovered)
    sent = ensemble.deferred(sure, rule)
    loss = sum(b if go else a for go, a, b in zip(sent, small, large, strict=True)) / len(items)
    assert loss == pytest.approx(rule.loss, abs=1e-9)
    assert sum(sent) / len(items) == rule.share
    gap = max(0.0, sum(small) - sum(large)) / len(items)
    assert loss <= sum(small) / len(items) - recovered * gap + 1e-9


def test_all_pay_for_the_small_model_and_some_for_the_large_one():
    assert ensemble.expected_cost(1.0, 4.0, 0.25) == 2.0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (([], [], []), "at least 1"),
        (([0.1], [1, 2], [1]), "1 confidences for 2 and 1 losses"),
        (([float("nan")], [1], [1]), "must be finite"),
    ],
)
def test_what_no_rule_can_be_chosen_from_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        ensemble.choose_threshold(*given)


def test_more_than_the_whole_gap_cannot_be_recovered():
    with pytest.raises(ValueError, match=r"1\.5 cannot be recovered"):
        ensemble.choose_threshold([0.1], [1], [0], recovered=1.5)
