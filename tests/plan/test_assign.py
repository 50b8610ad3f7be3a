"""The choice of recipes under a budget: exact against enumeration, limits kept, and impossible budgets explained."""

import itertools
import random
import time

import pytest

from avalab.lab.errors import InputError
from avalab.lab.run import Run
from avalab.models.sizes import Shape
from avalab.plan import agents, assign, forecast, recipes
from avalab.plan.agents import Agent
from avalab.plan.forecast import Figure, Forecast

SHAPE = Shape(100, 8, 16, 1, 2, 1, 4, tied=True)  # 16 bytes of keys and values a token

MB = 10**6


def option(name, megabytes, quality, tokens_per_s=100.0, model="m", engine="llamacpp"):
    recipe = recipes.Recipe(name, engine, lambda shape: 0, (), (), name)
    rate = Figure(tokens_per_s)
    return Forecast(
        recipe, model, Figure(megabytes * MB), Figure(megabytes * MB), rate, rate, Figure(0.0), Figure(quality)
    )


def drawn(seed):
    """A few agents on two models with a few recipes each, and limits that sometimes bind."""
    draw = random.Random(seed)
    forecasts = {
        model: [
            option(f"r{i}", draw.randint(1, 40), round(draw.random(), 3), draw.choice([20.0, 50.0, 200.0]), model)
            for i in range(draw.randint(1, 4))
        ]
        for model in ("m", "n")
    }
    found = [
        Agent(
            f"a{i}",
            "small",
            draw.choice(["m", "n"]),
            context=draw.choice([200, 2000]),
            prompt_tokens=20,
            new_tokens=20,
            calls_per_minute=draw.choice([0.5, 3.0, 12.0]),
            quality_floor=draw.choice([0.0, 0.0, 0.3]),
            latency_limit_ms=draw.choice([None, None, 1500.0]),
            critical=draw.random() < 0.3,
        )
        for i in range(draw.randint(1, 4))
    ]
    return found, forecasts, {"m": SHAPE, "n": SHAPE}


def enumerated(found, forecasts, shapes, memory):
    """The best weighted quality of all assignments that keep every limit; None where none does."""
    best = None
    rows = [assign.options_of(a, forecasts[a.model], shapes[a.model]) for a in found]
    rows = [
        [o for o in row if not assign.shortfalls(a, o, shapes[a.model])] for a, row in zip(found, rows, strict=True)
    ]
    contexts = sum(assign.context_bytes(a, shapes[a.model]) for a in found)
    for chosen in itertools.product(*rows):
        used = contexts + sum(dict(unit for o in chosen for unit in o.units).values())
        busy = sum(a.calls_per_minute * o.seconds for a, o in zip(found, chosen, strict=True)) / 60
        if used <= memory and busy <= assign.LOAD:
            value = sum(a.weight * o.forecast.quality.value for a, o in zip(found, chosen, strict=True))
            best = value if best is None else max(best, value)
    return best


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_two_hundred_random_budgets_are_kept_and_the_choice_is_the_best_of_all(start):
    for seed in range(start, start + 50):
        found, forecasts, shapes = drawn(seed)
        memory = random.Random(-seed).randint(1, 90) * MB
        expected = enumerated(found, forecasts, shapes, memory)
        if expected is None:
            with pytest.raises(assign.InfeasiblePlan):
                assign.plan(found, forecasts, shapes, memory_bytes=memory)
            continue
        made = assign.plan(found, forecasts, shapes, memory_bytes=memory)
        assert made.memory_bytes <= memory, seed
        assert made.busy_share <= assign.LOAD + 1e-9
        value = sum(a.weight * made.chosen[a.name].forecast.quality.value for a in found)
        slack = assign.MEMORY_PRICE * sum(a.weight for a in found)  # the price of memory decides between near equals
        assert expected - slack <= value <= expected + 1e-9, seed


def test_shared_weights_are_counted_once_and_contexts_for_each():
    """40 MB for both, and 16 bytes a token for each: 40,006,400 bytes."""
    pair = [Agent(name, "small", "m", context=200) for name in ("a", "b")]
    made = assign.plan(pair, {"m": [option("r", 40, 0.9)]}, {"m": SHAPE}, memory_bytes=40_006_400)
    assert made.memory_bytes == 40_000_000 + 2 * 200 * 16
    with pytest.raises(assign.InfeasiblePlan) as refused:
        assign.plan(pair, {"m": [option("r", 40, 0.9)]}, {"m": SHAPE}, memory_bytes=40_006_399)
    assert (refused.value.binding, refused.value.smallest_bytes) == ("memory", 40_006_400)


def test_the_smallest_budget_that_is_named_would_do_and_a_byte_less_would_not():
    for seed in range(40):
        found, forecasts, shapes = drawn(seed)
        try:
            assign.plan(found, forecasts, shapes, memory_bytes=1)
        except assign.InfeasiblePlan as refused:
            if refused.smallest_bytes is None:
                continue
            least = refused.smallest_bytes
        assert assign.plan(found, forecasts, shapes, memory_bytes=least).memory_bytes == least
        with pytest.raises(assign.InfeasiblePlan, match=f"{-(-least // 2**20)} MiB"):
            assign.plan(found, forecasts, shapes, memory_bytes=least - 1)


def test_a_floor_that_nothing_reaches_names_the_agent_and_the_nearest_recipe():
    high = [Agent("strict", "small", "m", quality_floor=0.95)]
    with pytest.raises(assign.InfeasiblePlan, match=r"'strict'.*quality_floor of 0.95; the nearest is good"):
        assign.plan(high, {"m": [option("bad", 1, 0.2), option("good", 9, 0.9)]}, {"m": SHAPE}, memory_bytes=MB)


def test_too_many_calls_are_said_to_need_time_and_no_memory():
    busy = [Agent("busy", "small", "m", calls_per_minute=100.0)]
    with pytest.raises(assign.InfeasiblePlan, match=r"busy 267%.*no memory would do") as refused:
        assign.plan(busy, {"m": [option("r", 1, 0.9)]}, {"m": SHAPE}, memory_bytes=10 * MB)
    assert refused.value.smallest_bytes is None


def test_an_adapter_shares_its_base_where_an_engine_reads_adapters_and_is_merged_where_none_does():
    pair = [Agent(n, "small", "m", context=200, adapter=n, adapter_rank=1) for n in ("a", "b")]
    rank1 = assign.adapter_bytes(SHAPE, 1)
    shared = assign.plan(pair, {"m": [option("t", 10, 0.9, engine="torch")]}, {"m": SHAPE}, memory_bytes=30 * MB)
    assert shared.memory_bytes == 10 * MB + 2 * rank1 + 2 * 200 * 16
    apart = assign.plan(pair, {"m": [option("g", 10, 0.9)]}, {"m": SHAPE}, memory_bytes=30 * MB)
    assert apart.memory_bytes == 20 * MB + 2 * 200 * 16


def test_the_order_of_the_agents_changes_nothing():
    found, forecasts, shapes = drawn(3)
    one, other = (assign.plan(row, forecasts, shapes, memory_bytes=80 * MB) for row in (found, found[::-1]))
    assert one.quality == pytest.approx(other.quality)
    assert one.memory_bytes == other.memory_bytes


def test_no_memory_and_no_agents_are_refused():
    for agent_list, memory in [([Agent("a", "small", "m")], 0), ([], MB)]:
        with pytest.raises(InputError, match="both have to be positive"):
            assign.plan(agent_list, {"m": []}, {"m": SHAPE}, memory_bytes=memory)


def test_the_example_is_planned_in_five_seconds_of_the_processor_and_keeps_its_budget():
    run = Run("t", "laptop")
    start = time.process_time()
    found, evidence = agents.read_agents(agents.EXAMPLE), forecast.read_evidence(run)
    groups = agents.unique_models(found)
    shapes = {model: forecast.shape_of_model(model, run) for model in groups}
    forecasts = {
        model: [forecast.forecast(r, model, shapes[model], evidence) for r in recipes.recipes_of({a.size for a in of})]
        for model, of in groups.items()
    }
    process = forecast.runtime_bytes(evidence)
    made = assign.plan(found, forecasts, shapes, memory_bytes=4 * 2**30, process_bytes=process)
    assert time.process_time() - start <= 5
    assert made.memory_bytes <= 4 * 2**30
    assert all(made.chosen[a.name].forecast.quality.value >= a.quality_floor for a in found)
    assert set(made.reasons) == {a.name for a in found}
