"""The first token of an answer can weigh more than one of thirty."""

import pytest
import torch

from avalab import first_token, rehearsal
from avalab.packed_rows import IGNORED

NO = IGNORED


def batch(labels: list[int]) -> dict:
    return {"labels": torch.tensor([labels])}


@pytest.fixture
def hidden_and_head():
    seeded = torch.Generator().manual_seed(0)
    return torch.randn(1, 8, 4, generator=seeded), torch.randn(11, 4, generator=seeded)


def test_each_packed_answer_has_one_first_token():
    labels = torch.tensor([[NO, NO, 5, 6, 7, NO, NO, 8, 9, NO]])
    assert first_token.labels_of_first_tokens(labels).tolist() == [[NO, NO, 5, NO, NO, NO, NO, 8, NO, NO]]


def test_an_answer_may_begin_the_row():
    assert first_token.labels_of_first_tokens(torch.tensor([3, 4, NO])).tolist() == [3, NO, NO]


def test_the_loss_is_the_sum_of_both_means(hidden_and_head):
    hidden, head = hidden_and_head
    labels = [NO, 3, 4, 5, NO, 6, 7, NO]
    logits = (hidden @ head.T)[0].log_softmax(-1)
    nats = [-logits[i, label].item() for i, label in enumerate(labels) if label != NO]
    expected = sum(nats) / 5 + 0.5 * (nats[0] + nats[3]) / 2
    assert first_token.weighted(0.5)(hidden, head, batch(labels)).item() == pytest.approx(expected, rel=1e-5)


def test_without_a_weight_and_on_rehearsal_rows_nothing_changes(hidden_and_head):
    hidden, head = hidden_and_head
    chats, rehearsed = batch([NO, 3, 4, 5, NO, 6, 7, NO]), batch([1, 2, 3, 4, 5, 6, 7, NO])
    rehearsed["teacher"] = torch.zeros_like(hidden)
    for weight, row in ((0.0, chats), (1.0, rehearsed)):
        assert torch.equal(first_token.weighted(weight)(hidden, head, row), rehearsal.loss(hidden, head, row))


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="-1"):
        first_token.weighted(-1)
