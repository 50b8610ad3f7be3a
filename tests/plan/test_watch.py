"""Watching: nothing is logged unasked, drift is told and steadiness is not, and a new load makes a new plan."""

import os
import random

import pytest

from avalab.lab.errors import InputError
from avalab.models.sizes import Shape
from avalab.plan import assign, watch
from avalab.plan.agents import Agent
from avalab.plan.forecast import Figure, Forecast
from avalab.plan.recipes import Recipe
from avalab.plan.watch import Request

SHAPE = Shape(100, 8, 16, 1, 2, 1, 4, tied=True)

AGENT = Agent("a", "small", "m", latency_limit_ms=100.0)


def requests(seed, right, slow=0.0, count=300):
    """Requests whose first fifty are valid nineteen times of twenty, and later ones as often as `right` says."""
    draw = random.Random(seed)
    shares = [0.95] * watch.FIRST + [right] * (count - watch.FIRST)
    return [Request("a", draw.random() < share, 200.0 if draw.random() < slow else 50.0) for share in shares]


def test_nothing_is_logged_unless_it_was_allowed_and_prompts_only_where_asked_for(tmp_path):
    asked = Request("a", True, 5.0, prompt="secret")
    assert not watch.note_request(tmp_path, asked)
    assert watch.logged(tmp_path) == []
    watch.allow_logging(tmp_path)
    assert watch.note_request(tmp_path, asked)
    watch.allow_logging(tmp_path, prompts=True)
    watch.note_request(tmp_path, asked)
    with (tmp_path / watch.LOG).open("a") as file:
        file.write('{"agent": "cut o')
    assert [request.prompt for request in watch.logged(tmp_path)] == ["", "secret"]


def test_fewer_valid_calls_are_told_in_nineteen_of_twenty_runs_and_steadiness_is_not():
    fallen = sum(bool(watch.drifts(requests(seed, 0.75), [AGENT])) for seed in range(100))
    steady = sum(bool(watch.drifts(requests(seed, 0.95), [AGENT])) for seed in range(100))
    assert (fallen >= 95, steady <= 5) == (True, True)


def test_slow_answers_memory_and_divergence_are_told_with_what_was_planned():
    slow = watch.drifts(requests(0, 0.95, slow=0.4), [AGENT])
    assert [drift.kind for drift in slow] == ["latency"]
    assert watch.drifts(requests(0, 0.95, slow=0.02), [AGENT]) == []
    (drift,) = watch.drifts([], [AGENT], memory_bytes=5, budget_bytes=4)
    assert str(drift) == "the process: memory 5, planned 4"
    far, near = [0.3, 0.32, 0.31], [0.1, 0.4, 0.2]
    told = [watch.drifts([], [AGENT], divergences={"a": d}, accepted_kl={"a": 0.2}) for d in (far, near)]
    assert [len(drifts) for drifts in told] == [1, 0]


def test_a_load_that_grew_makes_another_plan():
    def forecast(name, quality, tokens_per_s):
        recipe, size, rate = Recipe(name, "e", lambda s: 0, (), (), name), Figure(100.0), Figure(tokens_per_s)
        return Forecast(recipe, "m", size, size, rate, rate, Figure(0.0), Figure(quality))

    forecasts = {"m": [forecast("slow", 0.9, 10.0), forecast("fast", 0.8, 1000.0)]}
    agent = Agent("a", "small", "m", prompt_tokens=10, new_tokens=10, calls_per_minute=1.0)
    before = assign.plan([agent], forecasts, {"m": SHAPE}, memory_bytes=10**6)
    log = [Request("a", True, 1.0, when=f"2026-01-01T00:{s // 60:02}:{s % 60:02}+00:00") for s in range(0, 121, 2)]
    observed = watch.calls_per_minute(log)
    assert observed == {"a": pytest.approx(30.5)}
    after = watch.replanned(before, observed, forecasts, {"m": SHAPE}, memory_bytes=10**6)
    assert watch.changes(before, after) == {"a": ("slow", "fast")}
    assert watch.calls_per_minute(log[:3]) == {}


def test_the_memory_of_a_process_is_known_and_of_none_refused():
    assert watch.process_memory(os.getpid()) > 1e6
    with pytest.raises(InputError, match="there is no process"):
        watch.process_memory(2**22 + 12345)
