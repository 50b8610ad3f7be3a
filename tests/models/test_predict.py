"""What a model predicts: divergences that a pencil finds, scores that its own logits confirm, and what is cached."""

from dataclasses import replace
from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import PreTrainedModel

from avalab.data import corpora
from avalab.lab import cache, statistics
from avalab.measure import families
from avalab.models import checkpoint, predict

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def windows(base):
    tokenizer = checkpoint.load_tokenizer(base)
    return corpora.windows(corpora.evaluation_text("python_docs", tokenizer), tokenizer, count=6, tokens=40)


@pytest.fixture(scope="module")
def against(run, base, windows):
    return predict.make_reference(base, windows, run.artifacts_dir / "cache")


@pytest.fixture(scope="module")
def blurred(base) -> PreTrainedModel:
    """The base with noise in one layer: a candidate that differs a little."""
    model = checkpoint.load_model(base)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data += 0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return model


def distributions(seed: int, spread: float, shape=(5, 17)) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).log_softmax(-1)


seeds, spreads = st.integers(0, 10**6), st.floats(0.01, 30)


def test_kl_of_a_fair_coin_from_a_biased_one_is_half_log_four_thirds():
    """0.5 ln(0.5/0.25) + 0.5 ln(0.5/0.75) = 0.5 ln(4/3) = 0.1438 nats."""
    fair, biased = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert predict.kl_divergence(fair, biased).item() == pytest.approx(0.5 * log(4 / 3), abs=1e-7)


@given(seeds, spreads)
@EXAMPLES
def test_kl_of_equal_distributions_is_zero(seed, spread):
    p = distributions(seed, spread)
    assert torch.equal(predict.kl_divergence(p, p), torch.zeros(5))


@given(seeds, seeds, spreads)
@EXAMPLES
def test_kl_is_never_negative(one, other, spread):
    """Up to the rounding of log-probabilities of size `spread` in float32."""
    kl = predict.kl_divergence(distributions(one, spread), distributions(other, spread))
    assert kl.min() >= -1e-5
    near = distributions(one, spread) + 1e-4 * distributions(other, 1.0)
    assert predict.kl_divergence(distributions(one, spread), near.log_softmax(-1)).min() >= -1e-5


@given(seeds, seeds, st.floats(0.01, 5))
@EXAMPLES
def test_kl_agrees_with_torch_in_float64(one, other, spread):
    p, q = distributions(one, spread), distributions(other, spread)
    oracle = F.kl_div(q.double(), p.double(), reduction="none", log_target=True).sum(-1)
    assert torch.allclose(predict.kl_divergence(p, q).double(), oracle, rtol=1e-5, atol=1e-5)


def test_kl_is_not_cross_entropy_and_not_symmetric():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.1, 0.9]]).log()
    assert predict.kl_divergence(p, q).item() == pytest.approx(0.5 * log(5) + 0.5 * log(5 / 9), abs=1e-6)
    assert predict.kl_divergence(q, p).item() == pytest.approx(0.1 * log(0.2) + 0.9 * log(1.8), abs=1e-6)


def test_token_scores_of_two_tokens_by_hand():
    ours = torch.tensor([[0.2, 0.8], [0.6, 0.4]]).log()
    theirs = torch.tensor([[0.3, 0.7], [0.4, 0.6]]).log()
    nll, _, agrees = predict.token_scores(ours, theirs, torch.tensor([1, 1]))
    assert nll.tolist() == pytest.approx([-log(0.8), -log(0.4)], abs=1e-6)
    assert agrees.tolist() == [1.0, 0.0]


def test_a_soft_cap_bends_the_logits_before_the_softmax():
    head = torch.nn.Linear(2, 2, bias=False)
    head.weight.data = torch.eye(2)
    found = predict.log_probabilities(torch.tensor([[10.0, -10.0]]), head, predict.Finish(softcap=5.0))
    expected = (5 * torch.tanh(torch.tensor([[2.0, -2.0]]))).log_softmax(-1)
    assert torch.allclose(found, expected)


def test_a_uniform_model_over_v_tokens_has_perplexity_v():
    nll = predict.token_scores(torch.full((12, 7), 1 / 7).log(), distributions(0, 1, (12, 7)), torch.arange(12) % 7)[0]
    assert statistics.perplexity(nll.view(3, 4), resamples=300, seed=0).value == pytest.approx(7, rel=1e-6)


def test_scores_are_those_of_the_models_own_logits_in_float32(base, windows, against, blurred):
    ours, theirs = (model.float() for model in (checkpoint.load_model(base), checkpoint.load_model(base)))
    ours.load_state_dict(blurred.state_dict())
    exact = replace(against, hidden=predict.hidden_states(theirs, windows))
    scores = predict.score_model(ours, exact)
    with torch.inference_mode():
        ours, theirs = (model(windows).logits[:, :-1].log_softmax(-1) for model in (ours, theirs))
    nll = F.cross_entropy(ours.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(len(windows), -1)
    kl = F.kl_div(ours.double(), theirs.double(), reduction="none", log_target=True).sum(-1).float()
    assert torch.allclose(scores.nll, nll, atol=1e-4)
    assert torch.allclose(scores.kl, kl, atol=1e-5)
    assert torch.equal(scores.agrees, (ours.argmax(-1) == theirs.argmax(-1)).float())


def test_the_length_of_a_chunk_changes_no_score(against, blurred, monkeypatch):
    whole = predict.score_model(blurred, against)
    monkeypatch.setattr(predict, "CHUNK_TOKENS", 7)
    chunked = predict.score_model(blurred, against)
    assert whole.kl.mean() > 1e-4
    for name in vars(whole):
        assert torch.allclose(getattr(whole, name), getattr(chunked, name), atol=2e-5), name


def test_a_damaged_reference_is_measured_again(base, windows, tmp_path):
    first = predict.make_reference(base, windows[:2], tmp_path)
    (cached,) = tmp_path.iterdir()
    for damaged in (cached.read_bytes()[:-10], b"", b"not safetensors at all"):
        cached.write_bytes(damaged)
        again = predict.make_reference(base, windows[:2], tmp_path)
        assert torch.equal(again.hidden, first.hidden)
    assert [path.name for path in tmp_path.iterdir()] == [cached.name]


def test_the_reference_is_computed_once_for_the_same_base_and_windows(base, windows, tmp_path, monkeypatch):
    first = predict.make_reference(base, windows[:2], tmp_path)
    other = predict.make_reference(base, windows[2:4], tmp_path)
    assert other.identity != first.identity
    monkeypatch.setattr(cache, "save_tensors", lambda *arguments: pytest.fail("computed again"))
    again = predict.make_reference(base, windows[:2], tmp_path)
    assert torch.equal(again.hidden, first.hidden)


def test_logits_scaled_after_the_head_are_refused_not_ignored(base):
    model = checkpoint.load_model(base)
    model.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match="llama models make logits of their hidden states in a way that is not known"):
        predict.output_head(model)


def test_logits_that_a_model_scales_behind_its_head_are_scored_as_scaled(windows, tmp_path):
    """Granite divides them by `logits_scaling`; the oracle is transformers' own forward pass."""
    model = checkpoint.load_model(families.make_model("granite", tmp_path / "granite"), dtype=torch.float32)
    assert model.config.logits_scaling == 2
    hidden = predict.hidden_states(model, windows[:1])[0]
    with torch.inference_mode():
        found = predict.log_probabilities(hidden, *predict.output_head(model))
        expected = model(windows[:1]).logits[0].log_softmax(-1)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.fixture
def padded(base, tmp_path):
    """The blurred base's words in an embedding with 56 rows more, none of which any text has."""

    def make(noise: float) -> PreTrainedModel:
        model = checkpoint.load_model(base)
        model.resize_token_embeddings(1080, mean_resizing=False)
        model.model.layers[1].mlp.down_proj.weight.data *= 1 + noise
        model.get_input_embeddings().weight.data[1024:] = 1.0
        return model

    return make


@pytest.mark.filterwarnings("ignore:The new embeddings")
def test_padded_rows_are_left_out_where_two_models_have_unequal_many(against, base, padded):
    same = predict.score_model(padded(0.0), against)
    assert same.kl.abs().max() < 1e-5
    other = padded(0.3)
    scores = predict.score_model(other, against)
    with torch.inference_mode():
        ours = other(against.windows).logits[:, :-1, :1024].float().log_softmax(-1)
        theirs = checkpoint.load_model(base)(against.windows).logits[:, :-1].float().log_softmax(-1)
    kl = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    assert scores.kl.mean() == pytest.approx(float(kl.mean()), rel=0.05)  # logits in bf16 here
    back = replace(against, head=padded(0.0).get_output_embeddings())  # the reference may be the padded one, too
    assert predict.score_model(checkpoint.load_model(base), back).kl.abs().max() < 1e-5


def test_a_head_of_fewer_rows_than_there_are_words_is_refused(against):
    with pytest.raises(ValueError, match=r"a head of 1,000 rows cannot be compared with tiny-llama, .* 1,024 words"):
        predict.score_logits(lambda tokens: torch.zeros(len(tokens), 1000), against)


def test_models_of_other_words_are_refused_by_name(base, tmp_path):
    folder = families.make_model("llama-odd-vocabulary", tmp_path / "other")
    predict.refuse_other_words(base, base)
    predict.refuse_other_words(base, base.path)
    with pytest.raises(ValueError, match=r"other \(1,031 words\) and tiny-llama \(1,024\) have different tok"):
        predict.refuse_other_words(base, folder)


def test_a_bf16_head_loses_nothing_beyond_float32_rounding():
    generator = torch.Generator().manual_seed(5)
    head = torch.nn.Linear(96, 700, bias=False, dtype=torch.bfloat16)
    head.weight.data = torch.randn(700, 96, generator=generator).bfloat16()
    hidden = torch.randn(33, 96, generator=generator).bfloat16()
    exact = (hidden.double() @ head.weight.double().T).log_softmax(-1)
    assert (predict.log_probabilities(hidden, head) - exact).abs().max() < 2e-5
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
