"""Recipes: what cannot be followed is refused when it is made, with the value got and what is allowed."""

from math import inf, nan

import pytest

from avalab.train.recipes import AdapterRecipe, BlockTraining, DistillRecipe, RoundingRecipe, Schedule


@pytest.mark.parametrize(
    ("made", "wrong", "says"),
    [
        (Schedule, {"learning_rate": 0.0}, "learning rate is 0; it has to be above 0 and at most 1"),
        (Schedule, {"learning_rate": 1e9}, r"learning rate is 1e\+09"),
        (Schedule, {"learning_rate": nan}, "learning rate is nan"),
        (Schedule, {"epochs": 0.0}, "number of epochs is 0; it has to be above 0"),
        (Schedule, {"epochs": inf}, "number of epochs is inf"),
        (Schedule, {"rows_per_step": 0}, "number of rows a step is 0; it has to be 1 or more"),
        (Schedule, {"warmup": 1.0}, "share of warm-up is 1; it has to be 0 or more and below 1"),
        (Schedule, {"clip": 0.0}, "largest norm of a gradient is 0"),
        (Schedule, {"checkpoint_every": 0}, "number of steps between checkpoints is 0"),
        (AdapterRecipe, {"rank": -1}, "rank is -1; it has to be 0 or more"),
        (AdapterRecipe, {"alpha": 0.0}, "alpha is 0; it has to be above 0"),
        (AdapterRecipe, {"dropout": 1.0}, "dropout is 1; it has to be 0 or more and below 1"),
        (AdapterRecipe, {"row_tokens": 1}, "number of tokens in a row is 1"),
        (AdapterRecipe, {"target_modules": ()}, "no target modules"),
        (DistillRecipe, {"temperature": 0.0}, "temperature is 0; it has to be above 0 and at most 1000"),
        (DistillRecipe, {"kl": nan}, "weights of kl, .* are nan, 0, 0, 0; they have to be 0 or more"),
        (DistillRecipe, {"count": 256}, "number of entries a token is 256; it has to be 1 or more and at most 255"),
        (BlockTraining, {"steps": 0}, "number of steps of a block is 0"),
        (BlockTraining, {"windows_per_step": 0}, "number of windows a step is 0"),
        (RoundingRecipe, {"kind": "magic"}, "unknown kind 'magic'; choose one of scales, weights, blocks, torchao"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_its_value(made, wrong, says):
    with pytest.raises(ValueError, match=says):
        made(**wrong)
