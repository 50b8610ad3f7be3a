"""Racing: the best survives at a quarter of the cost; who leaves is told; a smaller candidate is not dismissed."""

import numpy as np
import pytest

from avalab.lab.errors import InputError
from avalab.plan.policy import racing


def drawn(seed, count=16, items=160, spread=0.15):
    """Losses of candidates on items: candidates differ, items differ more and alike for all, and there is noise."""
    draw = np.random.default_rng(seed)
    level, difficulty = draw.exponential(0.3, count), draw.normal(0, 1, items)
    table = level[:, None] + difficulty + draw.normal(0, spread, (count, items))
    return {f"c{i:02}": row for i, row in enumerate(table)}


def held(table, **options):
    asked = []

    def score(name, numbers):
        asked.append((name, list(numbers)))
        return [table[name][i] for i in numbers]

    return racing.hold_race(list(table), score, items=len(next(iter(table.values()))), **options), asked


def test_the_winner_is_within_a_point_of_the_best_in_nine_of_ten_races_at_a_quarter_of_the_cost():
    near = 0
    for seed in range(60):
        table = drawn(seed)
        race, _ = held(table, share=0.25)
        assert race.spent_share <= 0.25
        best = min(table.values(), key=np.mean)
        near += np.mean(table[race.standing[0]]) - np.mean(best) <= 0.01
    assert near >= 54


def test_no_item_is_measured_twice_and_all_of_a_rung_see_the_same():
    race, asked = held(drawn(1))
    seen = {name: [i for other, numbers in asked if other == name for i in numbers] for name, _ in asked}
    assert all(numbers == list(range(len(numbers))) for numbers in seen.values())
    assert race.measured == sum(map(len, seen.values()))
    assert {len(numbers) for numbers in seen.values()} <= {10, 20, 40, 80, 160}


def test_who_leaves_is_told_by_whom_and_by_how_much():
    race, _ = held({"good": [0.0] * 8, "bad": [1.0] * 8, "worse": [2.0] * 8}, share=1.0)
    assert race.standing == ["good"]
    assert race.left["worse"] == "worse than good by 2.0000 on 2 items"


def test_a_smaller_candidate_outlives_a_larger_one_that_loses_less_than_it_but_more_than_another():
    table = {"large": [0.0] * 16, "middling": [0.1] * 16, "small": [0.2] * 16, "bad": [0.9] * 16}
    memory = {"large": 4.0, "middling": 4.5, "small": 1.0, "bad": 2.0}
    race, _ = held(table, memory=memory, share=1.0)
    assert {"middling", "bad"} <= set(race.left)
    assert "small" not in list(race.left)[:2]


def test_the_share_bounds_what_is_spent_but_one_rung_is_always_run():
    table = drawn(2)
    race, _ = held(table, share=0.01)
    assert race.measured == len(table) * 10


def test_a_paired_gap_is_that_of_the_items_both_saw():
    """3 - 1, 5 - 2: mean 2.5, standard error 0.5 (standard deviation 0.7071 over the root of 2)."""
    assert racing.paired_gap([3.0, 5.0, 9.0], [1.0, 2.0]) == pytest.approx((2.5, 0.5))
    assert racing.paired_gap([1.0], [0.5]) == (0.5, 0.0)


@pytest.mark.parametrize(("names", "items", "share"), [([], 4, 0.5), (["a"], 0, 0.5), (["a"], 4, 0.0)])
def test_no_race_is_refused(names, items, share):
    with pytest.raises(InputError, match="is none"):
        racing.hold_race(names, lambda name, numbers: [], items=items, share=share)
