"""Scores of weights: each is its formula, and none depends on what it does not use."""

import pytest
import torch

from avalab.compress import saliency
from avalab.compress.patterns import PATTERNS, lowest
from avalab.compress.saliency import Evidence

WEIGHT = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
INPUTS = torch.tensor([[1.0, 3.0], [2.0, 0.0], [-1.0, 1.0]])
MOMENT = INPUTS.T @ INPUTS / 3
ANYWHERE = PATTERNS["unstructured"]


def test_magnitude_is_the_absolute_value():
    assert torch.equal(saliency.score_weights("magnitude", WEIGHT, Evidence()), WEIGHT.abs())


def test_wanda_is_the_weight_times_the_root_mean_square_of_its_input():
    """Column 0 has mean square (1 + 4 + 1) / 3 = 2, column 1 (9 + 0 + 1) / 3."""
    expected = torch.tensor([[2**0.5, 2 * (10 / 3) ** 0.5], [0.5 * 2**0.5, 4 * (10 / 3) ** 0.5]])
    torch.testing.assert_close(saliency.score_weights("wanda", WEIGHT, Evidence(moment=MOMENT)), expected)


def test_sparsegpt_squared_is_the_error_left_after_the_best_repair():
    """Remove one weight, solve the rest of its row exactly, and look at the increase of the quadratic."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(3, 6, generator=generator), torch.randn(40, 6, generator=generator)
    moment = inputs.T @ inputs / 40
    scores = saliency.score_weights("sparsegpt", weight, Evidence(moment=moment))
    damped = saliency.surgery_problem(moment).moment
    for column in range(6):
        kept = [c for c in range(6) if c != column]
        rest = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T)
        change = weight.clone()
        change[:, kept] -= rest.T
        increase = ((change @ damped) * change).sum(1)
        torch.testing.assert_close(scores[:, column] ** 2, increase, rtol=1e-3, atol=1e-5)


def test_gradient_times_weight_is_a_product():
    squared = torch.tensor([[4.0, 1.0], [0.0, 9.0]])
    expected = torch.tensor([[2.0, 2.0], [0.0, 12.0]])
    assert torch.equal(saliency.score_weights("gradient", WEIGHT, Evidence(squared_gradient=squared)), expected)


def test_random_scores_repeat_with_the_seed_and_the_layers_name_only():
    seeds = [saliency.layer_seed(0, "a"), saliency.layer_seed(0, "a"), saliency.layer_seed(0, "b")]
    first, again, other = (saliency.score_weights("random", WEIGHT, Evidence(seed=seed)) for seed in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_score_of_blocks_has_none_for_weights():
    with pytest.raises(ValueError, match="'influence' belongs to whole blocks; use it with pattern 'layers'"):
        saliency.score_weights("influence", WEIGHT, Evidence())


# --- optimal brain surgery


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the moment of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator) / 8
    return torch.randn(24, 64, generator=generator), inputs.T @ inputs / 400


def error(weight: torch.Tensor, pruned: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Mean squared output error of each row under a moment."""
    difference = pruned - weight
    return ((difference @ moment) * difference).sum(1)


def best_for(weight: torch.Tensor, gone: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Row by row, the least-squares weights on a mask, in float64."""
    moment, best = moment.double(), torch.zeros_like(weight, dtype=torch.float64)
    for row, mask in enumerate(gone):
        kept = (~mask).nonzero().flatten()
        best[row, kept] = torch.linalg.solve(moment[kept][:, kept], moment[kept] @ weight[row].double())
    return best.float()


def test_removing_the_first_column_is_the_exact_step_of_the_optimal_brain_surgeon(layer):
    """delta w = -w_q [M^-1]_q: / [M^-1]_qq (Hassibi and Stork 1993, eq. 5)."""
    weight, moment = layer
    posed = saliency.surgery_problem(moment)
    first = posed.order[0]
    weight[:, first] = 1e-3  # so that it scores lowest
    swept = saliency.remove_weights(weight, posed, ANYWHERE, count=len(weight), refinements=0)
    inverse = posed.moment.double().inverse()
    expected = weight - weight[:, first, None] * (inverse[first] / inverse[first, first]).float()
    assert (swept[:, first] == 0).all()
    torch.testing.assert_close(swept, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_the_result_has_the_exact_density_and_nears_the_optimum_for_its_mask(layer, share):
    weight, moment = layer
    posed = saliency.surgery_problem(moment)
    pruned = saliency.remove_weights(weight, posed, ANYWHERE, count=round(share * weight.numel()), refinements=40)
    assert int((pruned == 0).sum()) == round(share * weight.numel())
    best = best_for(weight, pruned == 0, posed.moment)
    reached, least = (float(error(weight, w, posed.moment).sum()) for w in (pruned, best))
    assert least <= reached * (1 + 1e-4)
    assert reached < 1.02 * least


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_each_refinement_lowers_the_error_and_all_beat_zeroing_the_same_number(layer, pattern):
    weight, moment = layer
    row = PATTERNS[pattern]
    posed = saliency.surgery_problem(moment, row.group)
    how = {"count": weight.numel() // 2}
    errors = [
        float(error(weight, saliency.remove_weights(weight, posed, row, **how, refinements=n), posed.moment).sum())
        for n in (0, 2, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    scores = weight.abs() * moment.diagonal().sqrt()
    zeroed = weight.masked_fill(lowest(scores, how["count"]), 0)
    if pattern == "unstructured":
        assert errors[0] < float(error(weight, zeroed, posed.moment).sum())


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_every_group_of_a_pattern_is_legal_and_exact(layer, pattern):
    weight, moment = layer
    row = PATTERNS[pattern]
    pruned = saliency.remove_weights(weight, saliency.surgery_problem(moment, row.group), row, count=0)
    assert ((pruned.unflatten(1, (-1, row.group)) == 0).sum(2) >= row.zeros).all()
    assert int((pruned == 0).sum()) == weight.numel() // 2


def test_a_grouped_problem_keeps_neighbours_together_and_factorises_the_same_inverse(layer):
    _, moment = layer
    posed = saliency.surgery_problem(moment, 4)
    assert (posed.order.view(-1, 4) % 4 == torch.arange(4)).all()
    inverse = posed.factor.T @ posed.factor
    expected = posed.moment[posed.order][:, posed.order].inverse()
    torch.testing.assert_close(inverse, expected, rtol=1e-2, atol=1e-2)


def test_whole_columns_are_removed_at_the_least_squares_optimum(layer):
    weight, moment = layer
    kept = torch.arange(0, 64, 2)
    gone = torch.ones_like(weight, dtype=torch.bool)
    gone[:, kept] = False
    found = saliency.remove_columns(weight, moment, kept)
    best = best_for(weight, gone, saliency.surgery_problem(moment).moment)
    torch.testing.assert_close(found, best, atol=1e-3, rtol=1e-3)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for(layer):
    weight, _ = layer
    pruned = saliency.remove_weights(
        weight, saliency.surgery_problem(torch.eye(64)), ANYWHERE, count=weight.numel() // 2
    )
    kept = pruned != 0
    torch.testing.assert_close(pruned[kept], weight[kept])
    assert torch.equal(~kept, lowest(weight.abs(), weight.numel() // 2))


def test_nothing_removed_changes_nothing(layer):
    weight, moment = layer
    torch.testing.assert_close(
        saliency.remove_weights(weight, saliency.surgery_problem(moment), ANYWHERE, count=0), weight
    )
