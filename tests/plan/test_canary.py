"""The sequential test of old against new: pencil values, and its promises over two hundred simulated runs each way."""

import math
import random

import pytest

from avalab.lab.errors import InputError
from avalab.plan.policy import canary
from avalab.plan.policy.canary import FAILED, OPEN, PASSED, UNDECIDED, Gamblers, Trial


def held(seed, *, better=0.0, worse=0.0):
    """A trial of a model that alone is right in a share of the requests, and alone is wrong in another."""
    draw, trial = random.Random(seed), Trial()
    while trial.verdict == OPEN:
        chance = draw.random()
        trial.see(chance >= better, chance < better or chance >= better + worse)
    return trial


def test_wealth_after_one_loss_is_the_mean_of_one_and_a_half():
    """Bets 0.05 to 0.95 on a loss of 1: the mean of 1 + bet is 1.5; on a gain, of 1 - bet, 0.5."""
    for value, expected in ((-1, 1.5), (1, 0.5), (0, 1.0)):
        gamblers = Gamblers(0.0, -1.0, 1.0, -1)
        gamblers.see(value)
        assert gamblers.wealth == pytest.approx(expected)


def test_a_fair_game_leaves_the_expected_wealth_at_one():
    """Over all 2^6 equally likely ways of six fair pairs, the mean of the final wealth is exactly 1."""
    total = 0.0
    for ways in range(2**6):
        gamblers = Gamblers(0.0, -1.0, 1.0, -1)
        for i in range(6):
            gamblers.see(1 if ways >> i & 1 else -1)
        total += gamblers.wealth
    assert total / 2**6 == pytest.approx(1.0)


def test_five_losses_in_a_row_are_told_from_chance():
    """(1 + bet)^5 has a mean above 20 only where the losses go on: five are not enough, seven are."""
    trial = Trial()
    verdicts = [trial.see(True, False) for _ in range(7)]
    mean = sum((1 + bet) ** 5 for bet in canary.BETS) / len(canary.BETS)
    assert (mean < 20, verdicts[4]) == (True, OPEN)
    assert verdicts[-1] == FAILED


def test_ten_points_are_caught_in_nineteen_of_twenty_runs_within_two_hundred_requests():
    """A new model that is wrong in a tenth of what the old one has right, and right nowhere else."""
    runs = [held(seed, worse=0.1) for seed in range(200)]
    assert sum(trial.verdict == FAILED for trial in runs) >= 190
    assert all(trial.pairs <= 200 for trial in runs)


@pytest.mark.parametrize("churn", [0.02, 0.05, 0.2])
def test_a_model_that_is_not_worse_fails_in_at_most_one_of_twenty_runs(churn):
    runs = [held(seed, better=churn, worse=churn) for seed in range(200)]
    assert sum(trial.verdict == FAILED for trial in runs) <= 10


def test_a_model_that_is_worse_by_the_margin_passes_in_at_most_one_of_twenty_runs():
    runs = [held(seed, better=0.05, worse=0.15) for seed in range(200)]
    assert sum(trial.verdict == PASSED for trial in runs) <= 10


def test_an_equal_model_passes_early_and_a_verdict_stays():
    trial = held(0)
    assert (trial.verdict, trial.pairs < 60) == (PASSED, True)
    pairs = trial.pairs
    assert trial.see(True, False) == PASSED
    assert trial.pairs == pairs


def test_too_little_evidence_is_undecided():
    trial = Trial(most=3)
    assert [trial.see(True, True) for _ in range(3)] == [OPEN, OPEN, UNDECIDED]
    assert "undecided after 3 paired requests: 0 gained, 0 lost" in str(trial)


def test_wealth_never_becomes_negative_or_infinite():
    gamblers = Gamblers(-0.1, -1.0, 1.0, 1)
    for value in (-1, 1, 0) * 50:
        gamblers.see(value)
        assert 0 < gamblers.wealth < math.inf


@pytest.mark.parametrize(("name", "value"), [("alpha", 0.0), ("alpha", 1.0), ("margin", -0.1), ("margin", 1.0)])
def test_a_trial_that_promises_nothing_is_refused(name, value):
    with pytest.raises(InputError, match=f"{name} is {value:g}; it has to lie between 0 and 1"):
        Trial(**{name: value})
    with pytest.raises(InputError, match="a trial of 0 requests"):
        Trial(most=0)
