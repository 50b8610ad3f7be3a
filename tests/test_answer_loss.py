"""The loss of right answers: what a pencil and the training loss find, and that it is measured once."""

import math

import pytest
import torch
from transformers import PreTrainedModel  # noqa: F401  before avalab reaches torchao: its warnings are its own

from avalab import answer_loss, evaluate, models, packed_rows, toolbox


@pytest.fixture(scope="module")
def examples():
    return list(toolbox.function_calling_examples(3, 1, "heldout"))


def test_it_is_the_models_own_loss_over_the_answers_tokens(respondent, examples, tmp_path):
    """transformers computes the same mean from labels that are masked before the answer (it shifts them itself)."""
    found = answer_loss.score(respondent, examples, tmp_path)
    for example, value in zip(examples, found.tolist(), strict=True):
        encoded = packed_rows.encode(respondent.tokenizer, example["messages"])
        labels = torch.tensor([[packed_rows.IGNORED, *encoded.labels[:-1]]])
        with torch.inference_mode():
            expected = respondent.model(torch.tensor([encoded.ids]), labels=labels).loss.item()
        assert value == pytest.approx(expected, rel=2e-2)  # transformers rounds its logits to bf16


def test_a_model_that_knows_nothing_has_the_logarithm_of_its_vocabulary(respondent, examples, tmp_path, monkeypatch):
    flat = torch.full((1, respondent.model.config.vocab_size), -math.log(respondent.model.config.vocab_size))
    monkeypatch.setattr("avalab.quality.log_probabilities", lambda hidden, *_: flat.expand(len(hidden), -1))
    found = answer_loss.score(respondent, examples[:1], tmp_path)
    assert found.item() == pytest.approx(math.log(respondent.model.config.vocab_size), rel=1e-5)


def test_what_was_scored_is_read_back_without_a_model(respondent, examples, tmp_path, monkeypatch):
    first = answer_loss.score(respondent, examples, tmp_path)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the losses were known"))
    again = answer_loss.score(evaluate.Respondent(respondent.artifact), examples, tmp_path)
    assert torch.equal(first, again)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"damaged")
    assert torch.equal(answer_loss.score(respondent, examples, tmp_path), first)


def test_loss_and_rise_are_recorded_with_the_verdict(run):
    """Two draws, both 0.5 worse than the baseline's: the rise has no spread, whatever the losses' own."""
    theirs = torch.tensor([[0.5, 1.5], [2.5, 3.5]])
    rise = answer_loss.record(run, "x", theirs + 0.5, baseline=theirs, part="held_out", details={"set": "a"})
    loss, recorded = run.records[-2:]
    assert (loss.metric, loss.value, loss.n, loss.details) == (
        "answer_loss:held_out",
        2.5,
        2,
        {"examples": 2, "set": "a"},
    )
    assert loss.low < 0 < 5 < loss.high
    assert (recorded.value, recorded.low, recorded.high, rise.value) == (0.5, 0.5, 0.5, 0.5)
    assert (recorded.unit, recorded.details["verdict"]) == ("nats/token", "worse")


def test_losses_of_other_draws_or_examples_cannot_be_paired(run):
    with pytest.raises(ValueError, match=r"cannot pair losses of shape \(2, 3\) with \(1, 3\)"):
        answer_loss.record(run, "x", torch.ones(2, 3), baseline=torch.ones(1, 3), part="held_out")
