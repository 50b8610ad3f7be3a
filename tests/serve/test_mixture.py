"""An ensemble that decodes: one member is that member, the pool is what two forward passes say, noise draws fairly."""

import pytest
import torch
from transformers import DynamicCache

from avalab.compress import quantize
from avalab.data import calls, grammars
from avalab.measure import answers
from avalab.models import checkpoint
from avalab.serve import ensemble

PROMPTS = ["<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\nWhat is a list?"]


@pytest.fixture(scope="module")
def pair(run, base):
    return [base, quantize.compress_artifact(base, "nf4", run=run)]


@pytest.fixture(scope="module")
def both(pair):
    return [checkpoint.load_model(artifact) for artifact in pair]


def tokens(respondent, text: str) -> torch.Tensor:
    return respondent.tokenizer(text, return_tensors="pt").input_ids


def test_an_ensemble_of_one_answers_as_that_one_does(respondent, pair):
    alone = dict(grammars.answers(respondent.model, respondent.tokenizer, PROMPTS, max_new_tokens=12))
    choir = ensemble.respondent(ensemble.assemble(pair[:1], "mean"))
    assert dict(grammars.answers(choir.model, choir.tokenizer, PROMPTS, max_new_tokens=12)) == alone


@pytest.mark.parametrize("method", ["mean", "logits"])
def test_the_pool_is_that_of_the_members_own_distributions(method, pair, both, respondent):
    about = ensemble.assemble(pair, method)
    ids = tokens(respondent, PROMPTS[0])
    with torch.inference_mode():
        expected = torch.stack([m(ids).logits[0].float().log_softmax(-1) for m in both])
        found = ensemble.Mixture(both, about)(ids).logits[0]
    torch.testing.assert_close(found, ensemble.pooled(about, expected))


def test_steps_over_a_common_cache_agree_with_one_pass_over_the_whole_text(pair, both, respondent):
    model, ids = ensemble.Mixture(both, ensemble.assemble(pair, "mean")), tokens(respondent, PROMPTS[0])
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        whole = model(ids).logits[0, -1]
        model(ids[:, :-3], past_key_values=cache)
        for position in range(ids.shape[1] - 3, ids.shape[1]):
            last = model(ids[:, position : position + 1], past_key_values=cache).logits[0, -1]
    assert len(cache.layers) == sum(m.config.num_hidden_layers for m in both)
    assert {layer.get_seq_length() for layer in cache.layers} == {ids.shape[1]}
    assert (last - whole).abs().max() < 0.1, "bf16 arithmetic of one token against many"


def test_an_ensemble_answers_cases_under_a_grammar_and_is_read_back_after_that(run, pair, monkeypatch):
    choir = ensemble.respondent(ensemble.assemble(pair, "mean"))
    how = {"category": "toolbox_multiple", "mode": "forced", "limit": 3}
    verdicts = answers.record_calls(run, "mean-2", choir, **how)
    assert run.records[-1].artifact_sha256 == choir.artifact.sha256
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("the answers were known"))
    assert answers.record_calls(run, "mean-2", ensemble.respondent(choir.about), **how) == verdicts


def test_noise_draws_from_the_tempered_distribution(pair, both):
    """p = (0.8, 0.2) at temperature 2: sqrt 0.8 : sqrt 0.2 = 2 : 1, so two thirds."""
    model = ensemble.Mixture(both[:1], ensemble.assemble(pair[:1], "mean", temperature=2.0, draw=3))
    pooled = torch.tensor([0.8, 0.2]).log().expand(20_000, 2)
    share = float((model._drawn(pooled).argmax(-1) == 0).float().mean())
    assert share == pytest.approx(2 / 3, abs=3 * (2 / 9 / 20_000) ** 0.5)


def test_draws_with_a_seed_repeat_and_another_seed_draws_anew(pair, respondent):
    def drawn(seed: int) -> list[str]:
        choir = ensemble.respondent(ensemble.assemble(pair[:1], "mean", temperature=1.5, draw=seed))
        return [text for _, text in grammars.answers(choir.model, choir.tokenizer, PROMPTS, max_new_tokens=12)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_temperature_of_zero_draws_nothing(pair, both):
    model = ensemble.Mixture(both[:1], ensemble.assemble(pair[:1], "mean"))
    pooled = torch.randn(3, 5)
    assert model._drawn(pooled) is pooled


def test_members_with_another_number_of_logits_are_refused(both, pair, monkeypatch):
    monkeypatch.setattr(both[1].config, "vocab_size", 7)
    with pytest.raises(ValueError, match=r"members have 7 and \d+ logits"):
        ensemble.Mixture(both, ensemble.assemble(pair, "mean"))


def test_an_unsampled_case_prompt_is_that_of_the_first_member(pair, respondent):
    (case,) = calls.cases("toolbox_simple", 1)
    choir = ensemble.respondent(ensemble.assemble(pair, "mean"))
    assert calls.case_prompt(choir.tokenizer, case) == calls.case_prompt(respondent.tokenizer, case)
