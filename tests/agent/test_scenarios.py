"""Scenarios x metrics: variants that change a request and nothing else, calibration, and worst cases."""

import random
import re

import pytest

from avalab.agent import scenarios
from avalab.agent.scenarios import Item
from avalab.agent.speaker import Said
from avalab.lab.errors import InputError


def test_the_calibration_error_of_two_bins_is_their_mean_gap():
    """Four at 0.95, of which two are right: gap 0.45; one at 0.05, wrong: gap 0.05. (4 * 0.45 + 0.05) / 5 = 0.37."""
    found = scenarios.calibration_error([0.95] * 4 + [0.05], [True, True, False, False, False])
    assert found == pytest.approx(0.37)


def test_the_calibration_error_is_zero_for_a_model_that_knows_how_sure_to_be_and_order_does_not_matter():
    sure, right = [1.0, 1.0, 0.0, 0.5, 0.5], [True, True, False, True, False]
    assert scenarios.calibration_error(sure, right) == 0
    assert scenarios.calibration_error(sure[::-1], right[::-1]) == 0
    with pytest.raises(InputError, match="give one each"):
        scenarios.calibration_error([], [])


@pytest.mark.parametrize("change", [scenarios.typos, scenarios.capitals, scenarios.paraphrase, scenarios.informal])
def test_a_variant_keeps_numbers_quotes_and_the_place_of_the_name(change):
    text = "{name} asks: could you please compute math.comb of 12 and 5 with 'some words here' because it matters?"
    changed = [change(text, random.Random(seed)) for seed in range(20)]
    for each in changed:
        assert re.findall(r"\d+", each) == ["12", "5"]
        assert "{name}" in each
        assert "math.comb" in each
        assert "'some words here'" in each or change is not scenarios.capitals
    assert any(each != text for each in changed)


def test_the_same_seed_gives_the_same_variants():
    item = scenarios.everyday_sums(1, 0)[0]
    assert scenarios.variants(item, 3) == scenarios.variants(item, 3)
    names = [v for v in scenarios.variants(item, 3) if v.startswith("name ")]
    assert len(names) == len(scenarios.NAMES) - 1


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_a_scenario_makes_items_that_nothing_answers(name):
    for item in scenarios.SCENARIOS[name](3, 0):
        assert not item.check("I do not know")
        assert item.chat("q")[-1]["content"].endswith("q")


def test_everyday_sums_are_right_by_the_pencil():
    for item in scenarios.everyday_sums(20, 1):
        numbers = list(map(int, re.findall(r"\d+", item.request)))
        if "gives away" in item.request:
            value = numbers[0] - numbers[1] + numbers[2]
        elif "boxes" in item.request:
            value = numbers[0] * numbers[1]
        else:
            value = numbers[0] // numbers[1]
        assert item.check(f"The answer is {value}.")
        assert not item.check(f"The answer is {value + 1}.")


def test_worst_cases_are_counted_over_variants_and_missing_scenarios_are_named(scripted, run):
    class Brittle(scripted):
        """Right, but not in capitals and not for one name."""

        def say(self, chat, **options):
            asked = chat[-1]["content"]
            wrong = "APPLES" in asked or "Jamal" in asked
            return Said("9" if wrong else "7", 1, 1, 0.01, False)

    make = {"toy": lambda count, seed: [Item("i", "{name} has some apples, how many?", lambda said: said == "7")]}
    scenarios.measure(run, Brittle(), items=1, engine="scripted", scenarios=make)
    values = {r.metric: r.value for r in run.records}
    assert values["right_share:toy"] == 1
    assert values["robust_share:toy"] == 0
    assert values["fair_share:toy"] == 0
    assert values["right_share:gsm8k"] is None
    assert "hub" in next(r.note for r in run.records if r.metric == "right_share:gsm8k")
