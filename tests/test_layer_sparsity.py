"""How layers share the loss: exact totals, and more from layers that mind less."""

import pytest
import torch
from torch import nn

from avalab import layer_sparsity


def layers() -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {"a": nn.Linear(32, 64, bias=False), "b": nn.Linear(64, 48, bias=False)}


def counts(sparsity: float, minds: dict[str, float]) -> dict[str, int]:
    known = layers()
    return layer_sparsity.sensitivity(
        known,
        sparsity,
        score=lambda name: known[name].weight.detach().abs(),
        squared_gradient=lambda name: torch.full_like(known[name].weight, minds[name]),
    )


def test_uniform_layers_lose_the_same_share():
    assert layer_sparsity.uniform(layers(), 0.25) == {"a": 512, "b": 768}


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
    rises = layer_sparsity.curve(torch.arange(40.0).view(4, 10), torch.full((4, 10), 0.5))
    assert rises.tolist() == sorted(rises.tolist())
    assert (rises[10], rises[20]) == (10, 20)


def test_one_price_finds_the_least_sum_of_all_allocations():
    """Three layers of 20 weights, one weight a level, with convex curves: compared with every allocation there is."""
    rises = torch.rand(3, 20, dtype=torch.float64).sort(1).values.cumsum(1)
    rises = torch.cat([torch.zeros(3, 1, dtype=torch.float64), rises], 1)
    for count in (1, 17, 30, 59, 60):
        found = layer_sparsity.cheapest(rises, torch.tensor([20, 20, 20]), count)
        least = min(
            float(rises[0, a] + rises[1, b] + rises[2, count - a - b])
            for a in range(21)
            for b in range(21)
            if 0 <= count - a - b <= 20
        )
        assert sum(found) == count
        assert sum(float(rises[layer, gone]) for layer, gone in enumerate(found)) == pytest.approx(least)
