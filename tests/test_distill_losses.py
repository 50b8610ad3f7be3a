"""Matching inside the models: pencil, oracles (transformers' own attention, least squares), maps, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab import distill_losses, models
from avalab.experiment import ROOT

TINY = ROOT / "data" / "tiny-llama"


def test_half_of_a_state_is_a_quarter_of_relative_error():
    """h = g / 2: |g / 2 - g|^2 / |g|^2 = 1/4, however long g is."""
    teacher = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    assert distill_losses.relative_error(teacher / 2, teacher).item() == pytest.approx(0.25)
    assert distill_losses.relative_error(torch.zeros(2, 2), teacher).item() == 1
    assert distill_losses.relative_error(teacher, teacher).item() == 0


def test_the_projection_finds_a_linear_map_that_there_is():
    generator = torch.Generator().manual_seed(0)
    student, linear = torch.randn(200, 6, generator=generator), torch.randn(6, 10, generator=generator)
    found = distill_losses.projection(student, student @ linear)
    torch.testing.assert_close(found, linear, atol=0.02, rtol=0.02)
    assert distill_losses.relative_error(student, student @ linear, found) < 1e-4


def test_no_other_projection_has_a_smaller_error():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(100, 5, generator=generator), torch.randn(100, 8, generator=generator)
    found = distill_losses.projection(student, teacher)
    least = distill_losses.relative_error(student, teacher, found)
    for _ in range(20):
        other = found + 0.05 * torch.randn(found.shape, generator=generator)
        assert distill_losses.relative_error(student, teacher, other) > least


def test_attention_to_the_wrong_half_of_a_fair_coin_costs_half_log_four_thirds():
    """KL of (1/2, 1/2) from (3/4, 1/4) is 0.5 ln(4/3)."""
    teacher, student = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.75, 0.25]]])
    expected = 0.5 * torch.tensor(4 / 3).log()
    torch.testing.assert_close(distill_losses.attention_divergence(student, teacher), expected)
    assert distill_losses.attention_divergence(teacher, teacher).item() == 0


def test_models_with_other_numbers_of_heads_are_compared_by_their_mean_head():
    two = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    one = torch.tensor([[[0.5, 0.5]]])
    assert distill_losses.attention_divergence(one, two).item() == pytest.approx(0)


def test_attention_maps_are_those_of_the_model_itself_in_each_example():
    model = models.load(TINY, dtype=torch.float32)
    tokens = torch.randint(3, 1000, (1, 20), generator=torch.Generator().manual_seed(0))
    batch = {
        "position_ids": torch.cat([torch.arange(12), torch.arange(8)])[None],
        "boundaries": torch.tensor([0, 12, 20]),
    }
    model.set_attn_implementation("eager")
    parts = [model(part, output_attentions=True, output_hidden_states=True) for part in tokens.split([12, 8], 1)]
    states = torch.cat([part.hidden_states[2] for part in parts], 1)
    model.set_attn_implementation("sdpa")
    found = distill_losses.attention_maps(model, 2, states, batch)
    for ours, part in zip(found, parts, strict=True):
        torch.testing.assert_close(ours, part.attentions[2][0], atol=1e-5, rtol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_the_map_keeps_depth_and_ends_with_the_last_blocks():
    assert distill_losses.layer_map(4, 4, 4) == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert distill_losses.layer_map(4, 8, 2) == ((1, 3), (3, 7))
    assert distill_losses.layer_map(24, 30, 4) == ((5, 7), (11, 14), (17, 21), (23, 29))


@given(student=st.integers(1, 60), teacher=st.integers(1, 60), data=st.data())
def test_every_map_names_blocks_that_there_are_in_order(student, teacher, data):
    pairs = distill_losses.layer_map(student, teacher, data.draw(st.integers(1, student)))
    assert distill_losses.checked_map(pairs, student, teacher) == pairs
    assert pairs[-1] == (student - 1, teacher - 1)
    assert [mine for mine, _ in pairs] == sorted({mine for mine, _ in pairs})
    assert [other for _, other in pairs] == sorted(other for _, other in pairs)


def test_maps_with_blocks_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="asked for 5 pairs of blocks, the student has 4"):
        distill_losses.layer_map(4, 8, 5)
    with pytest.raises(ValueError, match=r"no pair of blocks \(1, 8\): the student has 4, the teacher 8"):
        distill_losses.checked_map(((0, 0), (1, 8)), 4, 8)
