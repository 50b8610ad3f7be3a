"""The share that came back: pencil, properties, no interval without damage, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalab import recovery
from avalab.experiment import Run

HOW = {"resamples": 100, "seed": 0}


def test_half_of_a_doubled_loss_that_is_taken_back_is_a_half():
    """Loss 1 became 2 and is 1.5 after training: (2 - 1.5) / (2 - 1) = 1/2."""
    whole = torch.tensor([1.0, 1.0, 1.0])
    found = recovery.recovered(2 * whole, 1.5 * whole, whole, **HOW)
    assert (found.value, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 3)


def test_perplexity_is_the_exponential_of_the_mean_loss():
    """Perplexities 4, 8 and 6: (8 - 6) / (8 - 4) = 1/2, with losses spread around their means."""
    spread = torch.tensor([-0.3, 0.3])
    whole, damaged, taught = (math.log(p) + spread for p in (4, 8, 6))
    assert recovery.recovered(damaged, taught, whole, of="perplexity", **HOW).value == pytest.approx(0.5)


def test_right_answers_come_back_although_more_is_better():
    """10 of 10 right, then 4, then 7: half of the six lost cases."""
    whole, damaged, taught = (torch.tensor([1.0] * n + [0.0] * (10 - n)) for n in (10, 4, 7))
    found = recovery.recovered(damaged, taught, whole, **HOW)
    assert found.value == pytest.approx(0.5)
    assert 0 <= found.low < 0.5 < found.high < 1


@settings(max_examples=25, deadline=None)
@given(losses=st.lists(st.floats(0.1, 5), min_size=2, max_size=20), damage=st.floats(0.5, 3))
def test_a_student_as_good_as_the_whole_model_recovers_all_and_an_untaught_one_nothing(losses, damage):
    whole = torch.tensor(losses)
    for of in recovery.TRANSFORMS:
        untaught = recovery.recovered(whole + damage, whole + damage, whole, of=of, **HOW)
        best = recovery.recovered(whole + damage, whole, whole, of=of, **HOW)
        assert untaught.value == pytest.approx(0, abs=1e-5)
        assert best.value == pytest.approx(1, abs=1e-5)
        assert best.low <= best.high


def test_damage_within_the_noise_has_no_interval_and_its_record_says_so():
    noise = torch.randn(30, generator=torch.Generator().manual_seed(0))
    whole, damaged = torch.ones(30), 1 + 0.001 + noise - noise.mean()
    assert recovery.recovered(damaged, whole, whole, **HOW).low is None
    run = Run("t", "smoke")
    recovery.record(run, "s", "calls", damaged, whole, whole)
    recovery.record(run, "s", "calls", whole, whole, whole)
    assert [(r.metric, r.value) for r in run.records] == [("recovered:calls", None)] * 2
    assert ["not distinguishable" in r.note for r in run.records] == [True, False]


def test_a_measured_recovery_is_recorded_with_its_interval():
    run, whole = Run("t", "smoke"), torch.linspace(1, 2, 10)
    recovery.record(run, "s", "text", 2 * whole, 1.5 * whole, whole)
    (record,) = run.records
    assert record.value == pytest.approx(0.5)
    assert record.low <= 0.5 + 1e-9
    assert record.high >= 0.5 - 1e-9


def test_items_that_do_not_match_and_no_damage_at_all_are_refused():
    function, two = recovery.recovered, torch.ones(2)
    while hasattr(function, "__wrapped__"):  # below the checks of shapes that the tests install, as a user has it
        function = function.__wrapped__
    with pytest.raises(ValueError, match="cannot pair 2, 2 and 3 items"):
        function(two, two, torch.ones(3), **HOW)
    with pytest.raises(ValueError, match="nothing was damaged"):
        recovery.recovered(torch.ones(2), torch.ones(2), torch.ones(2), **HOW)
