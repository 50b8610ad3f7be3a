"""The choice of formats under a budget: exact, refused when impossible."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avalab.compress import allocation
from avalab.compress.allocation import Option


def random_options(seed: int, tensors: int = 4, formats: int = 4) -> dict[str, list[Option]]:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(10, 1000, (tensors, formats))
    costs = generator.random((tensors, formats))
    return {
        f"t{i}": [Option(f"f{j}", int(sizes[i, j]), float(costs[i, j])) for j in range(formats)] for i in range(tensors)
    }


def test_two_tensors_by_hand_spend_the_bytes_where_they_save_most():
    """Sizes 1 or 3; going to 3 saves 0.9 for a and 0.2 for b: with 4 bytes, a gets them."""
    options = {
        "a": [Option("small", 1, 1.0), Option("big", 3, 0.1)],
        "b": [Option("small", 1, 0.3), Option("big", 3, 0.1)],
    }
    found = allocation.allocate_formats(options, 4)
    assert {name: option.format for name, option in found.chosen.items()} == {"a": "big", "b": "small"}
    assert found.bytes == 4
    assert found.cost == pytest.approx(0.4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_the_cheapest_allocation_under_a_budget_beats_every_other_one(seed: int, share: float):
    options = random_options(seed)
    everything = [(sum(o.bytes for o in c), sum(o.cost for o in c)) for c in product(*options.values())]
    smallest, largest = min(everything)[0], max(everything)[0]
    budget = round(smallest + share * (largest - smallest))
    best = min(cost for size, cost in everything if size <= budget)
    found = allocation.allocate_formats(options, budget)
    assert found.bytes <= budget
    assert found.cost == pytest.approx(best, abs=1e-9)


def test_a_larger_budget_never_costs_more():
    options = random_options(3, tensors=12, formats=6)
    smallest = sum(min(o.bytes for o in row) for row in options.values())
    costs = [allocation.allocate_formats(options, size).cost for size in range(smallest, smallest * 6, smallest // 2)]
    assert costs == sorted(costs, reverse=True)


def test_the_order_of_tensors_and_options_changes_nothing():
    options = random_options(5, tensors=6)
    reversed_options = {name: row[::-1] for name, row in reversed(options.items())}
    budget = 2 * sum(min(o.bytes for o in row) for row in options.values())
    assert allocation.allocate_formats(options, budget).cost == pytest.approx(
        allocation.allocate_formats(reversed_options, budget).cost
    )


def test_an_option_that_is_larger_and_worse_is_never_chosen():
    row = [Option("a", 10, 0.5), Option("worse", 20, 0.6), Option("b", 30, 0.1)]
    assert [o.format for o in allocation.undominated("t", row)] == ["a", "b"]


def test_the_solvers_tolerance_is_never_paid_with_bytes_over_the_budget():
    rows = [[Option("s", 1, 1.0), Option("m", 2, 0.5)], [Option("s", 1, 1.0), Option("m", 2, 0.4)]]
    over = [rows[0][1], rows[1][1]]
    assert [o.format for o in allocation._within(over, rows, 3)] == ["s", "m"]


def test_a_budget_below_the_smallest_allocation_is_refused_with_that_size():
    options = {"a": [Option("x", 700, 1.0)], "b": [Option("x", 600, 1.0), Option("y", 900, 0.5)]}
    with pytest.raises(ValueError, match=r"1,000 bytes is below the smallest allocation, 1,300 bytes"):
        allocation.allocate_formats(options, 1000)


@pytest.mark.parametrize("options", [{"w": []}, {"w": [Option("x", 1, float("nan"))]}])
def test_a_tensor_without_a_usable_format_is_named(options: dict):
    with pytest.raises(ValueError, match="'w'"):
        allocation.allocate_formats(options, 10)
