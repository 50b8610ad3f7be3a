"""Drawing choices, the factor of a prediction, and the names of a heat map: by pencil."""

import pytest

from avalab import additivity
from avalab.allocation import Option

OPTIONS = {
    "model.embed_tokens": [Option("q8_0", 9, 0.1)],
    "model.layers.0.mlp.up_proj": [Option("bf16", 8, 0.0), Option("q4_0", 2, 0.4)],
    "model.layers.1.mlp.up_proj": [Option("bf16", 8, 0.0), Option("q4_0", 2, 0.2), Option("q8_0", 4, 0.1)],
    "model.layers.0.mlp.down_proj": [Option("bf16", 8, 0.0)],
}


def test_a_level_twice_too_low_has_the_factor_two():
    assert additivity.factor([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == pytest.approx(2)
    assert additivity.factor([1.0, 1.0], [4.0, 1.0]) == pytest.approx(2)


def test_an_order_that_is_kept_has_rank_correlation_one():
    assert additivity.rank_correlation([1, 2, 3], [10, 11, 50]) == pytest.approx(1)
    assert additivity.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_choices_are_of_linear_layers_that_lose_something_one_a_layer_and_equal_for_equal_seeds():
    found = additivity.drawn(OPTIONS, 2, seed=3)
    assert [name for name, _ in found] == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert all(option.cost > 0 for _, option in found)
    assert additivity.drawn(OPTIONS, 2, seed=3) == found


def test_more_choices_than_layers_are_refused():
    with pytest.raises(ValueError, match="3 choices were asked for; only 2 layers have one"):
        additivity.drawn(OPTIONS, 3, seed=0)


def test_a_ratio_to_zero_is_refused():
    with pytest.raises(ValueError, match="positive"):
        additivity.factor([0.0, 1.0], [1.0, 1.0])


def test_a_heat_map_has_a_row_for_each_kind_and_format():
    assert additivity.heat_rows(OPTIONS, ["q4_0", "q8_0"]) == {
        "layer 00/up_proj q4_0": 0.4,
        "layer 01/up_proj q4_0": 0.2,
        "layer 01/up_proj q8_0": 0.1,
    }
