"""Losses: the first token weighs more, rehearsal, and matching inside the models by pencil and oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.data.packing import IGNORED
from avalab.lab.run import ROOT
from avalab.models import checkpoint
from avalab.train import losses

TINY = ROOT / "data" / "tiny-llama"


def test_half_of_a_state_is_a_quarter_of_relative_error():
    """h = g / 2: |g / 2 - g|^2 / |g|^2 = 1/4, however long g is."""
    teacher = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    assert losses.relative_error(teacher / 2, teacher).item() == pytest.approx(0.25)
    assert losses.relative_error(torch.zeros(2, 2), teacher).item() == 1
    assert losses.relative_error(teacher, teacher).item() == 0


def test_the_projection_finds_a_linear_map_that_there_is():
    generator = torch.Generator().manual_seed(0)
    student, linear = torch.randn(200, 6, generator=generator), torch.randn(6, 10, generator=generator)
    found = losses.projection(student, student @ linear)
    torch.testing.assert_close(found, linear, atol=0.02, rtol=0.02)
    assert losses.relative_error(student, student @ linear, found) < 1e-4


def test_no_other_projection_has_a_smaller_error():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(100, 5, generator=generator), torch.randn(100, 8, generator=generator)
    found = losses.projection(student, teacher)
    least = losses.relative_error(student, teacher, found)
    for _ in range(20):
        other = found + 0.05 * torch.randn(found.shape, generator=generator)
        assert losses.relative_error(student, teacher, other) > least


def test_attention_to_the_wrong_half_of_a_fair_coin_costs_half_log_four_thirds():
    """KL of (1/2, 1/2) from (3/4, 1/4) is 0.5 ln(4/3)."""
    teacher, student = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.75, 0.25]]])
    expected = 0.5 * torch.tensor(4 / 3).log()
    torch.testing.assert_close(losses.attention_divergence(student, teacher), expected)
    assert losses.attention_divergence(teacher, teacher).item() == 0


def test_models_with_other_numbers_of_heads_are_compared_by_their_mean_head():
    two = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    one = torch.tensor([[[0.5, 0.5]]])
    assert losses.attention_divergence(one, two).item() == pytest.approx(0)


def test_attention_maps_are_those_of_the_model_itself_in_each_example():
    model = checkpoint.load_model(TINY, dtype=torch.float32)
    tokens = torch.randint(3, 1000, (1, 20), generator=torch.Generator().manual_seed(0))
    batch = {
        "position_ids": torch.cat([torch.arange(12), torch.arange(8)])[None],
        "boundaries": torch.tensor([0, 12, 20]),
    }
    model.set_attn_implementation("eager")
    parts = [model(part, output_attentions=True, output_hidden_states=True) for part in tokens.split([12, 8], 1)]
    states = torch.cat([part.hidden_states[2] for part in parts], 1)
    model.set_attn_implementation("sdpa")
    found = losses.attention_maps(model, 2, states, batch)
    for ours, part in zip(found, parts, strict=True):
        torch.testing.assert_close(ours, part.attentions[2][0], atol=1e-5, rtol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_the_map_keeps_depth_and_ends_with_the_last_blocks():
    assert losses.layer_map(4, 4, 4) == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert losses.layer_map(4, 8, 2) == ((1, 3), (3, 7))
    assert losses.layer_map(24, 30, 4) == ((5, 7), (11, 14), (17, 21), (23, 29))


@given(student=st.integers(1, 60), teacher=st.integers(1, 60), data=st.data())
def test_every_map_names_blocks_that_there_are_in_order(student, teacher, data):
    pairs = losses.layer_map(student, teacher, data.draw(st.integers(1, student)))
    assert losses.checked_map(pairs, student, teacher) == pairs
    assert pairs[-1] == (student - 1, teacher - 1)
    assert [mine for mine, _ in pairs] == sorted({mine for mine, _ in pairs})
    assert [other for _, other in pairs] == sorted(other for _, other in pairs)


def test_maps_with_blocks_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="asked for 5 pairs of blocks, the student has 4"):
        losses.layer_map(4, 8, 5)
    with pytest.raises(ValueError, match=r"no pair of blocks \(1, 8\): the student has 4, the teacher 8"):
        losses.checked_map(((0, 0), (1, 8)), 4, 8)


NO = IGNORED


def batch(labels: list[int]) -> dict:
    return {"labels": torch.tensor([labels])}


@pytest.fixture
def hidden_and_head():
    seeded = torch.Generator().manual_seed(0)
    return torch.randn(1, 8, 4, generator=seeded), torch.randn(11, 4, generator=seeded)


def test_each_packed_answer_has_one_first_token():
    labels = torch.tensor([[NO, NO, 5, 6, 7, NO, NO, 8, 9, NO]])
    assert losses.labels_of_first_tokens(labels).tolist() == [[NO, NO, 5, NO, NO, NO, NO, 8, NO, NO]]


def test_an_answer_may_begin_the_row():
    assert losses.labels_of_first_tokens(torch.tensor([3, 4, NO])).tolist() == [3, NO, NO]


def test_the_loss_is_the_sum_of_both_means(hidden_and_head):
    hidden, head = hidden_and_head
    labels = [NO, 3, 4, 5, NO, 6, 7, NO]
    logits = (hidden @ head.T)[0].log_softmax(-1)
    nats = [-logits[i, label].item() for i, label in enumerate(labels) if label != NO]
    expected = sum(nats) / 5 + 0.5 * (nats[0] + nats[3]) / 2
    assert losses.weighted_first_tokens(0.5)(hidden, head, batch(labels)).item() == pytest.approx(expected, rel=1e-5)


def test_without_a_weight_and_on_rehearsal_rows_nothing_changes(hidden_and_head):
    hidden, head = hidden_and_head
    chats, rehearsed = batch([NO, 3, 4, 5, NO, 6, 7, NO]), batch([1, 2, 3, 4, 5, 6, 7, NO])
    rehearsed["teacher"] = torch.zeros_like(hidden)
    for weight, row in ((0.0, chats), (1.0, rehearsed)):
        assert torch.equal(losses.weighted_first_tokens(weight)(hidden, head, row), losses.rehearsed(hidden, head, row))


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="-1"):
        losses.weighted_first_tokens(-1)
