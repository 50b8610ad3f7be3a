"""Scores of ensembles: one member is that member, held-out windows are apart, gaps are paired, speed is recorded."""

import pytest
import torch
from transformers import PreTrainedModel  # noqa: F401  its warnings come before the package's type checks

from avalab.compress import quantize
from avalab.data import corpora
from avalab.models import checkpoint, predict
from avalab.serve import ensemble, ensemble_scores

pytestmark = pytest.mark.usefixtures("few_docstrings")


@pytest.fixture(scope="module")
def tokenizer(base):
    return checkpoint.load_tokenizer(base)


@pytest.fixture(scope="module")
def pair(run, base):
    return [
        quantize.compress_artifact(base, "nf4", run=run),
        quantize.compress_artifact(base, "rtn", run=run, group_size=32),
    ]


@pytest.fixture(scope="module")
def text(tokenizer):
    return corpora.text("python_docs", tokenizer)


@pytest.fixture(scope="module")
def against(run, base, text, tokenizer):
    windows = corpora.profile_windows(run, text, tokenizer)[:4]
    return predict.make_reference(base, windows, run.artifacts_dir / "cache")


@pytest.fixture(scope="module")
def held_out(run, few_docstrings, tokenizer):
    return ensemble_scores.held_out_windows(run, tokenizer, 4)


def test_held_out_windows_are_none_of_those_that_artefacts_are_calibrated_on_and_no_evaluation_text(
    run, held_out, tokenizer
):
    used = {tuple(w.tolist()) for w in corpora.calibration_windows(run, tokenizer)}
    assert used.isdisjoint(tuple(w.tolist()) for w in held_out)
    texts = corpora.evaluation_texts(run, tokenizer)
    forbidden = set().union(*(corpora.shingles(t.content) for t in texts))
    assert held_out.shape == (4, run.profile.calibration_tokens)
    decoded = " ".join(tokenizer.batch_decode(held_out, skip_special_tokens=True))
    shared = corpora.shingles(decoded) & forbidden
    assert not shared, "where two docstrings meet, eight words could be shared by chance only"
    with pytest.raises(ValueError, match="calibration text has"):
        ensemble_scores.held_out_windows(run, tokenizer, 10**6)


def test_an_ensemble_of_one_scores_as_that_one_does(run, pair, against):
    alone = predict.score_model(checkpoint.load_model(pair[0]), against)
    found = ensemble_scores.score_distributions(run, {"one": ensemble.assemble(pair[:1], "mean")}, against)["one"]
    for column in ("nll", "kl", "agrees"):
        torch.testing.assert_close(getattr(found, column), getattr(alone, column), atol=2e-5, rtol=0)


def test_the_fitted_mixture_loses_no_more_than_any_member_where_it_was_fitted(run, base, pair, held_out):
    reference = predict.make_reference(base, held_out, run.artifacts_dir / "cache")
    targets = ensemble_scores.target_log_probabilities(tuple(pair), reference, run)
    weights = ensemble.fit_weights(targets)
    mixed = ensemble.assemble(pair, "weighted", weights=weights)
    nll = ensemble_scores.score_distributions(run, {"weighted": mixed}, reference)["weighted"].nll.mean()
    assert float(nll) == pytest.approx(ensemble.mixture_loss(targets, weights), abs=1e-4)
    assert float(nll) <= float(-targets.mean(1).max()) + 1e-4


def test_two_roundings_together_are_nearer_to_the_base_than_they_are_on_average(run, pair, against):
    made = {n: ensemble.assemble(m, "mean") for n, m in {"a": pair[:1], "b": pair[1:], "both": pair}.items()}
    kl = {
        name: float(found.kl.mean()) for name, found in ensemble_scores.score_distributions(run, made, against).items()
    }
    assert kl["both"] <= (kl["a"] + kl["b"]) / 2


def test_scores_are_read_back_and_no_model_is_loaded_for_them(run, pair, against, monkeypatch):
    made = {"mean-2": ensemble.assemble(pair, "mean")}
    first = ensemble_scores.score_distributions(run, made, against)["mean-2"]
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("the scores were known"))
    torch.testing.assert_close(ensemble_scores.score_distributions(run, made, against)["mean-2"].kl, first.kl)


def test_records_name_members_weights_and_the_verdict_of_the_paired_gap(run, pair, base, against, text):
    about = ensemble.assemble(pair, "mean")
    found = ensemble_scores.score_distributions(run, {"mean-2": about}, against)["mean-2"]
    ensemble_scores.record_distributions(run, "mean-2", about, found, text)
    made = {r.metric: r for r in run.records if r.subject == "mean-2"}
    assert made["kl_divergence:python_docs"].details["members"] == [a.name for a in pair]
    assert made["perplexity:python_docs"].low < made["perplexity:python_docs"].value
    single = predict.score_model(checkpoint.load_model(base), against)
    gaps = ensemble_scores.record_gap(run, "mean-2", found, ("bf16", single), text)
    gap = run.records[-1]
    assert (gap.metric, gap.details) == ("kl_gap:python_docs", {"against": "bf16", "verdict": "worse"})
    assert gaps["kl"].value == pytest.approx(float(found.kl.mean()), abs=1e-5)


def test_a_cascade_at_both_ends_is_one_of_its_members(run, pair, against):
    ends = {n: ensemble.assemble(pair, "cascade", threshold=t) for n, t in {"small": 0.0, "large": 1.1}.items()}
    alone = {n: ensemble.assemble([m], "mean") for n, m in zip(ends, pair, strict=True)}
    scores = ensemble_scores.score_distributions(run, {**ends, **{f"{n} alone": a for n, a in alone.items()}}, against)
    for name in ends:
        torch.testing.assert_close(scores[name].kl, scores[f"{name} alone"].kl)


def test_the_rule_for_tokens_wins_back_nine_tenths_of_the_loss_or_asks_nobody(run, base, pair, held_out):
    reference = predict.make_reference(base, held_out, run.artifacts_dir / "cache")
    for small, large in ((pair[1], base), (base, pair[1])):
        rule = ensemble_scores.token_rule(run, (small, large), reference)
        ours, theirs = (-row.mean() for row in ensemble_scores.target_log_probabilities((small, large), reference, run))
        assert rule.loss <= float(ours - 0.9 * (ours - theirs).clamp(min=0)) + 1e-5
        assert (rule.share == 0) == bool(ours <= theirs)


def test_a_subject_too_large_for_the_memory_is_recorded_without_a_value(run, pair, against, monkeypatch):
    def load(artifact, device):
        if artifact.sha256 == pair[1].sha256:
            raise torch.OutOfMemoryError("no room")
        return kept(artifact, device)

    kept = checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", load)
    ensemble_scores.record_speed(run, {"fits": pair[0], "not": ensemble.assemble(pair, "mean")}, against.windows[0])
    made = {r.subject: r for r in run.records[-2:]}
    assert made["fits"].value > 0
    assert (made["not"].value, made["not"].note) == (None, "out of memory with all members loaded")


def test_confidence_is_the_largest_probability_at_each_position(run, base, against):
    sure = ensemble_scores.confidences(base, against.windows, run)
    with torch.inference_mode():
        logits = checkpoint.load_model(base)(against.windows).logits[:, :-1].float()
    assert sure.shape == (len(against.windows), against.windows.shape[1] - 1)
    torch.testing.assert_close(sure, logits.softmax(-1).amax(-1), atol=0.01, rtol=0.05)


def test_the_best_single_artefact_is_the_one_of_least_loss_within_the_bytes():
    losses, sizes = {"a": 0.3, "b": 0.1, "c": 0.0}, {"a": 10, "b": 20, "c": 30}
    assert ensemble_scores.single_best(losses, sizes, 25) == "b"
    assert ensemble_scores.single_best(losses, sizes, 30) == "c"
    with pytest.raises(ValueError, match="at most 5 bytes; the smallest has 10"):
        ensemble_scores.single_best(losses, sizes, 5)


def test_speed_is_recorded_of_artefacts_and_ensembles_alike(run, pair, against):
    subjects = {"nf4": pair[0], "mean-2": ensemble.assemble(pair, "mean")}
    ensemble_scores.record_speed(run, subjects, against.windows[0])
    made = {r.subject: r for r in run.records[-2:] if r.metric == "decode_tokens_per_s"}
    assert set(made) == set(subjects)
    for record in made.values():
        assert record.n == len(record.samples) == 3 * run.profile.latency_samples
        assert record.low <= record.value <= record.high
