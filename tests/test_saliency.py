"""Scores of weights: each is its formula, and none depends on what it does not use."""

import pytest
import torch

from avalab import saliency, surgeon
from avalab.saliency import Evidence

WEIGHT = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
INPUTS = torch.tensor([[1.0, 3.0], [2.0, 0.0], [-1.0, 1.0]])
MOMENT = INPUTS.T @ INPUTS / 3


def test_magnitude_is_the_absolute_value():
    assert torch.equal(saliency.of_layer("magnitude", WEIGHT, Evidence()), WEIGHT.abs())


def test_wanda_is_the_weight_times_the_root_mean_square_of_its_input():
    """Column 0 has mean square (1 + 4 + 1) / 3 = 2, column 1 (9 + 0 + 1) / 3."""
    expected = torch.tensor([[2**0.5, 2 * (10 / 3) ** 0.5], [0.5 * 2**0.5, 4 * (10 / 3) ** 0.5]])
    torch.testing.assert_close(saliency.of_layer("wanda", WEIGHT, Evidence(moment=MOMENT)), expected)


def test_sparsegpt_squared_is_the_error_left_after_the_best_repair():
    """Remove one weight, solve the rest of its row exactly, and look at the rise of the quadratic."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(3, 6, generator=generator), torch.randn(40, 6, generator=generator)
    moment = inputs.T @ inputs / 40
    scores = saliency.of_layer("sparsegpt", weight, Evidence(moment=moment))
    damped = surgeon.problem(moment).moment
    for column in range(6):
        kept = [c for c in range(6) if c != column]
        rest = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T)
        change = weight.clone()
        change[:, kept] -= rest.T
        rise = ((change @ damped) * change).sum(1)
        torch.testing.assert_close(scores[:, column] ** 2, rise, rtol=1e-3, atol=1e-5)


def test_gradient_times_weight_is_a_product():
    squared = torch.tensor([[4.0, 1.0], [0.0, 9.0]])
    expected = torch.tensor([[2.0, 2.0], [0.0, 12.0]])
    assert torch.equal(saliency.of_layer("gradient", WEIGHT, Evidence(squared_gradient=squared)), expected)


def test_random_scores_repeat_with_the_seed_and_the_layers_name_only():
    seeds = [saliency.layer_seed(0, "a"), saliency.layer_seed(0, "a"), saliency.layer_seed(0, "b")]
    first, again, other = (saliency.of_layer("random", WEIGHT, Evidence(seed=seed)) for seed in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_score_of_blocks_has_none_for_weights():
    with pytest.raises(ValueError, match="'influence' belongs to whole blocks; use it with pattern 'layers'"):
        saliency.of_layer("influence", WEIGHT, Evidence())
