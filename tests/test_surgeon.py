"""Optimal brain surgery: exact where it can be, exact density, and never worse than only zeroing."""

import pytest
import torch

from avalab import surgeon
from avalab.sparsity_patterns import PATTERNS, is_legal, lowest

ANYWHERE = PATTERNS["unstructured"]


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the moment of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator) / 8
    return torch.randn(24, 64, generator=generator), inputs.T @ inputs / 400


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
    posed = surgeon.problem(moment)
    first = posed.order[0]
    weight[:, first] = 1e-3  # so that it scores lowest
    swept = surgeon.prune(weight, posed, ANYWHERE, count=len(weight), refinements=0)
    inverse = posed.moment.double().inverse()
    expected = weight - weight[:, first, None] * (inverse[first] / inverse[first, first]).float()
    assert (swept[:, first] == 0).all()
    torch.testing.assert_close(swept, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_the_result_has_the_exact_density_and_nears_the_optimum_for_its_mask(layer, share):
    weight, moment = layer
    posed = surgeon.problem(moment)
    pruned = surgeon.prune(weight, posed, ANYWHERE, count=round(share * weight.numel()), refinements=40)
    assert int((pruned == 0).sum()) == round(share * weight.numel())
    best = best_for(weight, pruned == 0, posed.moment)
    reached, least = (float(surgeon.error(weight, w, posed.moment).sum()) for w in (pruned, best))
    assert least <= reached * (1 + 1e-4)
    assert reached < 1.02 * least


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_each_refinement_lowers_the_error_and_all_beat_zeroing_the_same_number(layer, pattern):
    weight, moment = layer
    row = PATTERNS[pattern]
    posed = surgeon.problem(moment, row.group)
    how = {"count": weight.numel() // 2}
    errors = [
        float(surgeon.error(weight, surgeon.prune(weight, posed, row, **how, refinements=n), posed.moment).sum())
        for n in (0, 2, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    scores = weight.abs() * moment.diagonal().sqrt()
    zeroed = weight.masked_fill(lowest(scores, how["count"]), 0)
    if pattern == "unstructured":
        assert errors[0] < float(surgeon.error(weight, zeroed, posed.moment).sum())


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_every_group_of_a_pattern_is_legal_and_exact(layer, pattern):
    weight, moment = layer
    row = PATTERNS[pattern]
    pruned = surgeon.prune(weight, surgeon.problem(moment, row.group), row, count=0)
    assert is_legal(pruned, row.zeros, row.group)
    assert int((pruned == 0).sum()) == weight.numel() // 2


def test_a_grouped_problem_keeps_neighbours_together_and_factorises_the_same_inverse(layer):
    _, moment = layer
    posed = surgeon.problem(moment, 4)
    assert (posed.order.view(-1, 4) % 4 == torch.arange(4)).all()
    inverse = posed.factor.T @ posed.factor
    expected = posed.moment[posed.order][:, posed.order].inverse()
    torch.testing.assert_close(inverse, expected, rtol=1e-2, atol=1e-2)


def test_whole_columns_are_removed_at_the_least_squares_optimum(layer):
    weight, moment = layer
    kept = torch.arange(0, 64, 2)
    gone = torch.ones_like(weight, dtype=torch.bool)
    gone[:, kept] = False
    found = surgeon.without_columns(weight, moment, kept)
    best = best_for(weight, gone, surgeon.problem(moment).moment)
    torch.testing.assert_close(found, best, atol=1e-3, rtol=1e-3)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for(layer):
    weight, _ = layer
    pruned = surgeon.prune(weight, surgeon.problem(torch.eye(64)), ANYWHERE, count=weight.numel() // 2)
    kept = pruned != 0
    torch.testing.assert_close(pruned[kept], weight[kept])
    assert torch.equal(~kept, lowest(weight.abs(), weight.numel() // 2))


def test_nothing_removed_changes_nothing(layer):
    weight, moment = layer
    torch.testing.assert_close(surgeon.prune(weight, surgeon.problem(moment), ANYWHERE, count=0), weight)
