"""Log-probabilities token by token: pencil, oracle (torch), chunks, refusals."""

from math import log

import pytest
import torch

from avalab import kernels
from avalab.kernels import loss_chunks
from avalab.kernels.loss_tokens import log_probabilities_tiles


def inputs(tokens=21, vocab=67, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, head = (torch.randn(n, width, generator=generator).double().requires_grad_() for n in (tokens, vocab))
    return hidden, head, torch.randint(0, vocab, (tokens,), generator=generator)


def test_the_log_probability_of_a_word_with_odds_of_three_to_one_is_log_three_quarters():
    hidden = torch.tensor([[log(3), 0.0], [log(3), 0.0]], dtype=torch.float64)
    found = kernels.linear_log_probabilities(hidden, torch.eye(2, dtype=torch.float64), torch.tensor([0, 1]))
    assert found.tolist() == pytest.approx([log(3 / 4), log(1 / 4)])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("trained", [True, False])
def test_values_and_gradients_of_any_weighing_of_tokens_agree_with_torch(monkeypatch, softcap, trained):
    monkeypatch.setitem(loss_chunks.LOGIT_BYTES, "cpu", 1)  # 16 tokens a chunk
    hidden, head, targets = inputs()
    head.requires_grad_(trained)
    both = (hidden, head) if trained else (hidden,)
    logits = hidden @ head.T if softcap is None else softcap * torch.tanh(hidden @ head.T / softcap)
    theirs = logits.log_softmax(-1)[torch.arange(21), targets]
    ours = log_probabilities_tiles(hidden, head, targets, softcap=softcap)
    torch.testing.assert_close(ours, theirs)
    outer = torch.randn(21, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(ours, both, outer), torch.autograd.grad(theirs, both, outer))


def test_no_token_gives_no_log_probability():
    hidden, head, targets = inputs(tokens=0)
    assert kernels.linear_log_probabilities(hidden, head, targets).shape == (0,)


def test_a_target_outside_the_vocabulary_is_refused():
    hidden, head, targets = inputs()
    with pytest.raises(ValueError, match="the vocabulary has 67 entries"):
        kernels.linear_log_probabilities(hidden, head, targets + 67)
