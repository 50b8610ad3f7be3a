"""Masks: exact density, legal groups, structures in steps, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from avalab.compress import patterns


def scores(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.sampled_from(["layer", "row"]))
def test_a_mask_has_exactly_the_asked_number_of_weights_and_no_kept_one_scores_less(rows, columns, share, compared):
    count = round(share * rows * columns)
    found = scores(rows, columns)
    mask = patterns.lowest(found, count, compared=compared)
    assert int(mask.sum()) == count
    for part, gone in zip(found, mask, strict=True) if compared == "row" else [(found, mask)]:
        if gone.any() and not gone.all():
            assert part[gone].max() <= part[~gone].min()


def test_equal_scores_do_not_change_the_number():
    assert int(patterns.lowest(torch.ones(4, 6), 7).sum()) == 7


def test_rows_lose_equally_many_and_the_rest_one_each():
    mask = patterns.lowest(scores(4, 8), 18, compared="row")
    assert mask.sum(1).tolist() == [5, 5, 4, 4]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7])
def test_magnitude_masks_are_those_of_torch(share):
    layer = nn.Linear(32, 24)
    weight = layer.weight.detach().clone()
    ours = patterns.lowest(weight.abs(), round(share * weight.numel()))
    torch_prune.l1_unstructured(layer, "weight", amount=share)
    assert torch.equal(~ours, layer.weight_mask.bool())


@pytest.mark.parametrize(("zeros", "group"), [(2, 4), (4, 8), (1, 2)])
def test_every_group_loses_exactly_its_share_of_lowest_scores(zeros, group):
    found = scores(5, 16)
    mask = patterns.n_of_m(found, zeros, group)
    assert (mask.unflatten(1, (-1, group)).sum(2) == zeros).all()
    for values, gone in zip(found.view(-1, group), mask.view(-1, group), strict=True):
        assert values[gone].max() < values[~gone].min()


def test_a_two_of_four_pattern_by_hand():
    weight = torch.tensor([[4.0, 1.0, 2.0, 3.0, 0.1, 0.4, 0.3, 0.2]])
    assert patterns.n_of_m(weight, 2, 4).tolist() == [[False, True, True, False, True, False, False, True]]


@pytest.mark.parametrize(("count", "expected"), [(1536, 64), (576, 64), (384, 64), (128, 32), (9, 1), (8192, 64)])
def test_channels_shrink_in_steps_that_divide_them(count, expected):
    assert patterns.step_size(count) == expected


@pytest.mark.parametrize(("hidden", "heads", "expected"), [(576, 9, 144), (128, 4, 32), (2048, 32, 64)])
def test_hidden_channels_stay_a_multiple_of_the_heads(hidden, heads, expected):
    assert patterns.step_size(hidden, of_heads=heads) == expected


def test_structures_are_rounded_to_the_step():
    assert patterns.removed_count(1536, 0.25, of="channels", granularity=64) == 384
    assert patterns.removed_count(9, 1 / 3, of="heads") == 3
    assert patterns.removed_count(9, 0.0, of="heads") == 0


def test_what_is_kept_is_in_order_and_scores_highest():
    assert patterns.kept_indices(torch.tensor([3.0, 1.0, 2.0, 0.0]), 2).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (0.9, "sparsity 0.9 removes every one of 3 KV groups; possible: 0.333, 0.667"),
        (0.1, "sparsity 0.1 removes none of 3 KV groups; possible: 0.333, 0.667"),
    ],
)
def test_removing_all_or_none_is_refused_with_what_is_possible(sparsity, message):
    with pytest.raises(ValueError, match=message):
        patterns.removed_count(3, sparsity, of="KV groups")


def test_of_a_single_structure_none_can_go():
    with pytest.raises(ValueError, match="of 1 KV groups; of so few none can go; take another pattern"):
        patterns.removed_count(1, 0.4, of="KV groups")


def test_a_group_that_does_not_divide_the_columns_is_refused():
    with pytest.raises(ValueError, match="groups of 4 do not divide the 6 columns"):
        patterns.n_of_m(scores(2, 6), 2, 4)


def test_a_count_beyond_the_weights_is_refused():
    with pytest.raises(ValueError, match="cannot remove 5 of 4 weights"):
        patterns.lowest(scores(2, 2), 5)


# --- how layers share the loss


def layers() -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {"a": nn.Linear(32, 64, bias=False), "b": nn.Linear(64, 48, bias=False)}


def counts(sparsity: float, minds: dict[str, float]) -> dict[str, int]:
    known = layers()
    return patterns.cheapest_counts(
        known,
        sparsity,
        score=lambda name: known[name].weight.detach().abs(),
        squared_gradient=lambda name: torch.full_like(known[name].weight, minds[name]),
    )


def test_the_total_is_exact_whatever_the_levels():
    total = sum(layer.weight.numel() for layer in layers().values())
    for sparsity in (0.0, 0.333, 0.5, 0.61):
        assert sum(counts(sparsity, {"a": 1.0, "b": 3.0}).values()) == round(sparsity * total)


def test_the_layer_that_minds_less_loses_more():
    found = counts(0.5, {"a": 100.0, "b": 0.01})
    assert found["a"] / (32 * 64) < 0.3
    assert found["b"] / (64 * 48) > 0.6


def test_a_curve_rises_and_its_end_is_half_the_energy():
    """All weights cost 1/2 sum g^2 w^2; with equal energies the curve is a straight line."""
    increases = patterns.loss_curve(torch.arange(40.0).view(4, 10), torch.full((4, 10), 0.5))
    assert increases.tolist() == sorted(increases.tolist())
    assert (increases[10], increases[20]) == (10, 20)


def test_one_price_finds_the_least_sum_of_all_allocations():
    """Three layers of 20 weights, one weight a level, with convex curves: compared with every allocation there is."""
    increases = torch.rand(3, 20, dtype=torch.float64).sort(1).values.cumsum(1)
    increases = torch.cat([torch.zeros(3, 1, dtype=torch.float64), increases], 1)
    for count in (1, 17, 30, 59, 60):
        found = patterns.counts_at_one_price(increases, torch.tensor([20, 20, 20]), count)
        least = min(
            float(increases[0, a] + increases[1, b] + increases[2, count - a - b])
            for a in range(21)
            for b in range(21)
            if 0 <= count - a - b <= 20
        )
        assert sum(found) == count
        assert sum(float(increases[layer, gone]) for layer, gone in enumerate(found)) == pytest.approx(least)
