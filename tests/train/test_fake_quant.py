"""Fake quantizers: LSQ's gradients by hand and by differences of the surrogate; torchao agrees; bits are kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.kernels.formats import Grid, Rounded
from avalab.train import fake_quant

GRID = Grid(3, 4)


def layer(rows, columns):
    return torch.nn.Linear(columns, rows, bias=False)


def rounded(grid, rows, columns, seed=0):
    """A weight and its plain rounding onto a grid of minimum and maximum."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    groups = weight.unflatten(1, (-1, grid.group_size))
    scales = ((groups.amax(-1) - groups.amin(-1)) / (2**grid.bits - 1)).bfloat16()
    zeros = (grid.low - groups.amin(-1) / scales.float()).round().clamp(grid.low, grid.high)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(grid.low, grid.high).flatten(1)
    return weight, Rounded(grid, codes.to(torch.int8), scales, zeros.to(torch.int8))


def surrogate(weight, scales, zeros, at):
    """The straight-through surrogate around `at`: rounding is `x + (what it added at that point)`; clipping stays."""
    weight0, scales0, zeros0 = (t[..., None] if t.dim() == 2 and t is not at[0] else t for t in at)
    exact0 = weight0.unflatten(1, (at[1].shape[1], -1)) / scales0 + zeros0
    inside = (exact0.round() >= GRID.low) & (exact0.round() <= GRID.high)
    exact = weight.unflatten(1, (scales.shape[1], -1)) / scales[..., None] + zeros[..., None]
    codes = torch.where(inside, exact + (exact0.round() - exact0), exact0.round().clamp(GRID.low, GRID.high))
    return ((codes - zeros[..., None]) * scales[..., None]).flatten(1)


def test_a_weight_inside_the_range_passes_its_gradient_and_one_outside_moves_the_scale_by_its_end():
    """s = 2, z = 1, codes -4..3. w = 3: 2.5 rounds to 2 (ties to even), w' = 2, dw'/ds = 2 - 2.5 = -0.5.

    w = 9: 5.5 is cut to 3, w' = 4, dw'/ds = 3 - 1 = 2, dw'/dz = -2, dw'/dw = 0.
    """
    weight = torch.tensor([[3.0, 9.0, 0.0, 0.0]], requires_grad=True)
    scales, zeros = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[1.0]], requires_grad=True)
    found = fake_quant.straight_through(weight, scales, zeros, GRID)
    assert found.tolist() == [[2.0, 4.0, 0.0, 0.0]]
    found[0, 0].backward(retain_graph=True)
    assert weight.grad.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert scales.grad.item() == -0.5
    assert zeros.grad.item() == 0
    weight.grad = scales.grad = zeros.grad = None
    found[0, 1].backward()
    assert weight.grad.tolist() == [[0.0] * 4]
    assert scales.grad.item() == 2.0
    assert zeros.grad.item() == -2.0


def test_codes_that_stay_give_the_scale_its_level_and_the_zero_point_minus_the_scale():
    """(q - z) s with q = 3, z = -1, s = 0.5: 2, with 4 for s and -0.5 for z."""
    codes = torch.tensor([[3, 0]], dtype=torch.int8)
    scales, zeros = torch.tensor([[0.5]], requires_grad=True), torch.tensor([[-1.0]], requires_grad=True)
    found = fake_quant.decoded(codes, scales, zeros)
    assert found.tolist() == [[2.0, 0.5]]
    found[0, 0].backward()
    assert scales.grad.item() == 4.0
    assert zeros.grad.item() == -0.5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_gradients_are_the_finite_differences_of_the_surrogate(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, scales = draw(2, 8), 0.3 + draw(2, 2).abs() / 4
    zeros, slope = draw(2, 2).round().clamp(-4, 3), draw(2, 8)
    parts = [t.clone().requires_grad_() for t in (weight, scales, zeros)]
    fake_quant.straight_through(*parts, GRID).backward(slope)
    at = (weight, scales, zeros)
    for number, part in enumerate(parts):
        direction = draw(*part.shape)
        ends = [[t + sign * 1e-6 * direction if i == number else t for i, t in enumerate(at)] for sign in (1, -1)]
        up, down = ((surrogate(*end, at) * slope).sum() for end in ends)
        torch.testing.assert_close((part.grad * direction).sum(), (up - down) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_torchaos_fake_quantizer_agrees_on_the_same_grid_forward_and_backward(bits):
    weight, start = rounded(Grid(bits, 16), 6, 64)
    theirs, mine = fake_quant.quantizer(start), weight.clone().requires_grad_()
    parts = [t.float().clone().requires_grad_() for t in (start.scales, start.zero_points)]
    ours = fake_quant.straight_through(mine, *parts, start.grid)
    other = weight.clone().requires_grad_()
    expected = theirs(other)
    torch.testing.assert_close(ours, expected)
    slope = torch.randn(6, 64)
    ours.backward(slope)
    expected.backward(slope)
    # Codes up to 128 are taken from their neighbours: float32 keeps three digits of such a difference's sum.
    for found, known in ((mine, other), (parts[0], theirs.scale), (parts[1], theirs.zero_point)):
        torch.testing.assert_close(found.grad, known.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kept", [True, False], ids=["codes stay", "codes are rounded again"])
def test_a_layer_starts_as_the_weight_in_the_file(kept):
    weight, start = rounded(Grid(3, 16), 6, 64)
    fake = fake_quant.FakeQuantized(layer(6, 64), start, weight=None if kept else weight, zeros=True)
    assert torch.equal(fake.on_grid().bfloat16(), start.decode())
    after = fake.rounded()
    assert torch.equal(after.codes, start.codes)
    assert torch.equal(after.scales, start.scales)


def test_rounding_onto_other_codes_is_what_the_start_keeps_even_where_the_weight_lies_elsewhere():
    weight, start = rounded(Grid(3, 16), 6, 64)
    other = Rounded(start.grid, (start.codes + 1).clamp(max=3), start.scales, start.zero_points)
    fake = fake_quant.FakeQuantized(layer(6, 64), other, weight=weight)
    assert torch.equal(fake.rounded().codes, other.codes)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4, 5, 8]), st.booleans())
def test_whatever_is_learnt_stays_in_range_and_decodes_to_what_was_trained(seed, bits, symmetric):
    torch.manual_seed(seed)
    weight, start = rounded(Grid(bits, 16, symmetric), 4, 32, seed)
    if symmetric:
        start = Rounded(start.grid, start.codes, start.scales, torch.zeros_like(start.zero_points))
    fake = fake_quant.FakeQuantized(layer(4, 32), start, weight=weight, zeros=True)
    for parameter in fake.parameters():
        parameter.data += torch.randn_like(parameter)
    after = fake.rounded()
    for whole in (after.codes, after.zero_points):
        assert start.grid.low <= int(whole.min())
        assert int(whole.max()) <= start.grid.high
    assert after.scales.dtype == torch.bfloat16
    assert not (symmetric and after.zero_points.any())
    assert torch.equal(after.decode(), fake.on_grid().bfloat16())
    fake.settle()
    assert torch.equal(after.decode(), fake.on_grid().bfloat16())
    assert {name for name, _ in fake.named_parameters()} == {"log_scale"} | (set() if symmetric else {"shift"})


def test_the_layer_computes_with_its_weight_on_the_grid():
    weight, start = rounded(Grid(4, 16), 6, 64)
    fake = fake_quant.FakeQuantized(layer(6, 64), start, weight=weight)
    x = torch.randn(3, 64).bfloat16()
    torch.testing.assert_close(fake(x), torch.nn.functional.linear(x, start.decode()))


def test_torchaos_layer_gives_back_codes_in_range_for_the_scales_it_stores():
    weight, start = rounded(Grid(3, 16), 6, 64)
    arm = fake_quant.Torchao(layer(6, 64), start, weight)
    assert torch.equal(arm.rounded().codes, start.codes)
    arm.quantizer.scale.data *= 1.7
    arm.quantizer.zero_point.data += 0.4
    after = arm.rounded()
    assert after.codes.min() >= -4
    assert after.codes.max() <= 3
    assert (after.scales.float() / start.scales.float()).mean().item() == pytest.approx(1.7, rel=1e-2)


def test_a_layer_that_is_not_there_is_refused_by_name(base):
    from avalab.models import checkpoint

    _, start = rounded(Grid(3, 16), 6, 64)
    with pytest.raises(ValueError, match=r"no linear layer 'nowhere'; this model has model.layers.0"):
        fake_quant.replace_layers(checkpoint.load_model(base), {"nowhere": start})
