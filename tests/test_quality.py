"""Perplexity, KL divergence and agreement: what a pencil finds, what must never change, and what is cached."""

import shutil
from dataclasses import replace
from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import PreTrainedModel

from avalab import corpora, models, quality, statistics

HOW = {"resamples": 300, "seed": 0}
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def text(base):
    return corpora.text("python_docs", models.load_tokenizer(base))


@pytest.fixture(scope="module")
def windows(base, text):
    return corpora.windows(text, models.load_tokenizer(base), count=6, tokens=40)


@pytest.fixture(scope="module")
def against(run, base, windows):
    return quality.reference(base, windows, run.artifacts_dir / "cache")


@pytest.fixture(scope="module")
def blurred(base) -> PreTrainedModel:
    """The base with noise in one layer: a candidate that differs a little."""
    model = models.load(base)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data += 0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return model


def distributions(seed: int, spread: float, shape=(5, 17)) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).log_softmax(-1)


seeds, spreads = st.integers(0, 10**6), st.floats(0.01, 30)


# Formulas


def test_kl_of_a_fair_coin_from_a_biased_one_is_half_log_four_thirds():
    """0.5 ln(0.5/0.25) + 0.5 ln(0.5/0.75) = 0.5 ln(4/3) = 0.1438 nats."""
    fair, biased = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert quality.kl_divergence(fair, biased).item() == pytest.approx(0.5 * log(4 / 3), abs=1e-7)


@given(seeds, spreads)
@EXAMPLES
def test_kl_of_equal_distributions_is_zero(seed, spread):
    p = distributions(seed, spread)
    assert torch.equal(quality.kl_divergence(p, p), torch.zeros(5))


@given(seeds, seeds, spreads)
@EXAMPLES
def test_kl_is_never_negative(one, other, spread):
    """Up to the rounding of log-probabilities of size `spread` in float32."""
    kl = quality.kl_divergence(distributions(one, spread), distributions(other, spread))
    assert kl.min() >= -1e-5
    near = distributions(one, spread) + 1e-4 * distributions(other, 1.0)
    assert quality.kl_divergence(distributions(one, spread), near.log_softmax(-1)).min() >= -1e-5


@given(seeds, seeds, st.floats(0.01, 5))
@EXAMPLES
def test_kl_agrees_with_torch_in_float64(one, other, spread):
    p, q = distributions(one, spread), distributions(other, spread)
    oracle = F.kl_div(q.double(), p.double(), reduction="none", log_target=True).sum(-1)
    assert torch.allclose(quality.kl_divergence(p, q).double(), oracle, rtol=1e-5, atol=1e-5)


def test_kl_is_not_cross_entropy_and_not_symmetric():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.1, 0.9]]).log()
    assert quality.kl_divergence(p, q).item() == pytest.approx(0.5 * log(5) + 0.5 * log(5 / 9), abs=1e-6)
    assert quality.kl_divergence(q, p).item() == pytest.approx(0.1 * log(0.2) + 0.9 * log(1.8), abs=1e-6)


def test_token_scores_of_two_tokens_by_hand():
    ours = torch.tensor([[0.2, 0.8], [0.6, 0.4]]).log()
    theirs = torch.tensor([[0.3, 0.7], [0.4, 0.6]]).log()
    nll, _, agrees = quality.token_scores(ours, theirs, torch.tensor([1, 1]))
    assert nll.tolist() == pytest.approx([-log(0.8), -log(0.4)], abs=1e-6)
    assert agrees.tolist() == [1.0, 0.0]


def test_a_soft_cap_bends_the_logits_before_the_softmax():
    head = torch.nn.Linear(2, 2, bias=False)
    head.weight.data = torch.eye(2)
    found = quality.log_probabilities(torch.tensor([[10.0, -10.0]]), head, 5.0)
    expected = (5 * torch.tanh(torch.tensor([[2.0, -2.0]]))).log_softmax(-1)
    assert torch.allclose(found, expected)


# Estimates


def test_a_uniform_model_over_v_tokens_has_perplexity_v():
    nll = quality.token_scores(torch.full((12, 7), 1 / 7).log(), distributions(0, 1, (12, 7)), torch.arange(12) % 7)[0]
    assert statistics.perplexity(nll.view(3, 4), **HOW).value == pytest.approx(7, rel=1e-6)


# Models


def test_the_base_scored_against_itself_has_no_divergence_and_agrees_everywhere(run, base, against, windows):
    scores = quality.cached_score(base, against, run.artifacts_dir / "cache")
    assert scores.kl.shape == (len(windows), windows.shape[1] - 1)
    assert scores.kl.abs().max() == 0
    assert scores.agrees.min() == 1


def test_scores_are_those_of_the_models_own_logits_in_float32(base, windows, against, blurred):
    ours, theirs = (model.float() for model in (models.load(base), models.load(base)))
    ours.load_state_dict(blurred.state_dict())
    exact = replace(against, hidden=quality.hidden_states(theirs, windows))
    scores = quality.score(ours, exact)
    with torch.inference_mode():
        ours, theirs = (model(windows).logits[:, :-1].log_softmax(-1) for model in (ours, theirs))
    nll = F.cross_entropy(ours.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(len(windows), -1)
    kl = F.kl_div(ours.double(), theirs.double(), reduction="none", log_target=True).sum(-1).float()
    assert torch.allclose(scores.nll, nll, atol=1e-4)
    assert torch.allclose(scores.kl, kl, atol=1e-5)
    assert torch.equal(scores.agrees, (ours.argmax(-1) == theirs.argmax(-1)).float())


def test_the_length_of_a_chunk_changes_no_score(against, blurred, monkeypatch):
    whole = quality.score(blurred, against)
    monkeypatch.setattr(quality, "CHUNK_TOKENS", 7)
    chunked = quality.score(blurred, against)
    assert whole.kl.mean() > 1e-4
    for name in vars(whole):
        assert torch.allclose(getattr(whole, name), getattr(chunked, name), atol=2e-5), name


def test_a_damaged_reference_is_measured_again(base, windows, tmp_path):
    first = quality.reference(base, windows[:2], tmp_path)
    (cached,) = tmp_path.iterdir()
    for damaged in (cached.read_bytes()[:-10], b"", b"not safetensors at all"):
        cached.write_bytes(damaged)
        again = quality.reference(base, windows[:2], tmp_path)
        assert torch.equal(again.hidden, first.hidden)
    assert [path.name for path in tmp_path.iterdir()] == [cached.name]


def test_the_reference_is_computed_once_for_the_same_base_and_windows(base, windows, tmp_path, monkeypatch):
    first = quality.reference(base, windows[:2], tmp_path)
    other = quality.reference(base, windows[2:4], tmp_path)
    assert other.identity != first.identity
    monkeypatch.setattr(quality, "hidden_states", lambda *arguments: pytest.fail("computed again"))
    again = quality.reference(base, windows[:2], tmp_path)
    assert torch.equal(again.hidden, first.hidden)


def test_the_same_bytes_under_another_name_are_not_scored_twice(base, windows, tmp_path, monkeypatch):
    against = quality.reference(base, windows[:2], tmp_path / "cache")
    first = quality.cached_score(base, against, tmp_path / "cache")
    copy = replace(base, path=tmp_path / "copy", card=base.card | {"name": "copy"})
    shutil.copytree(base.path, copy.path)
    monkeypatch.setattr(quality, "score", lambda *arguments, **options: pytest.fail("scored again"))
    again = quality.cached_score(copy, against, tmp_path / "cache")
    assert all(torch.equal(getattr(again, name), getattr(first, name)) for name in vars(first))


def test_records_of_the_base_say_that_it_equals_itself(run, base, against, text):
    quality.record(run, "bf16", base, against, text)
    found = {record.metric: record for record in run.records}
    assert {"kl_divergence:python_docs", "top1_agreement:python_docs", "perplexity:python_docs"} <= found.keys()
    assert found["kl_divergence:python_docs"].value == 0
    assert found["top1_agreement:python_docs"].value == 1
    assert found["perplexity:python_docs"].low < found["perplexity:python_docs"].value
    assert found["loss_rise:python_docs"].details["verdict"] == "not distinguishable"
    assert {record.artifact_sha256 for record in run.records} == {base.sha256}


def test_logits_scaled_after_the_head_are_refused_not_ignored(base):
    model = models.load(base)
    model.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match="logits_scaling"):
        quality.output_head(model)


def test_a_bf16_head_loses_nothing_beyond_float32_rounding():
    generator = torch.Generator().manual_seed(5)
    head = torch.nn.Linear(96, 700, bias=False, dtype=torch.bfloat16)
    head.weight.data = torch.randn(700, 96, generator=generator).bfloat16()
    hidden = torch.randn(33, 96, generator=generator).bfloat16()
    exact = (hidden.double() @ head.weight.double().T).log_softmax(-1)
    assert (quality.log_probabilities(hidden, head) - exact).abs().max() < 2e-5
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
