"""How layers share the loss: exact totals, and more from layers that mind less."""

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
    options = layer_sparsity.curve(torch.arange(40.0).view(4, 10), torch.full((4, 10), 0.5))
    assert [option.cost for option in options] == sorted(option.cost for option in options)
    by_level = {option.format: option for option in options}
    assert by_level["0.5"].cost == 10
    assert by_level["0.5"].bytes == 20
