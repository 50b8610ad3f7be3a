"""What ensembles are worth: scores of distributions and answers on items held out, paired gaps, speed."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel  # noqa: F401  its warnings come before the package's type checks

from avalab.data import calls, corpora
from avalab.lab.artifacts import Artifact
from avalab.measure.answers import Respondent
from avalab.models import checkpoint, predict
from avalab.serve import ensemble, ensemble_scores
from avalab.serve.ensemble_scores import Answered

pytestmark = pytest.mark.usefixtures("few_docstrings")
ASKED = calls.cases("toolbox_multiple", 4)


# --- distributions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(base):
    return checkpoint.load_tokenizer(base)


@pytest.fixture(scope="module")
def text(tokenizer):
    return corpora.evaluation_text("python_docs", tokenizer)


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


def test_an_ensemble_of_one_scores_as_that_one_does(run, quantised, against):
    alone = predict.score_model(checkpoint.load_model(quantised[0]), against)
    found = ensemble_scores.score_distributions(run, {"one": ensemble.assemble(quantised[:1], "mean")}, against)["one"]
    for column in ("nll", "kl", "agrees"):
        torch.testing.assert_close(getattr(found, column), getattr(alone, column), atol=2e-5, rtol=0)


def test_the_fitted_mixture_loses_no_more_than_any_member_where_it_was_fitted(run, base, quantised, held_out):
    reference = predict.make_reference(base, held_out, run.artifacts_dir / "cache")
    targets = ensemble_scores.target_log_probabilities(tuple(quantised), reference, run)
    weights = ensemble.fit_weights(targets)
    mixed = ensemble.assemble(quantised, "weighted", weights=weights)
    nll = ensemble_scores.score_distributions(run, {"weighted": mixed}, reference)["weighted"].nll.mean()
    pooled = ensemble.pool_probabilities(targets[..., None], torch.tensor(weights))
    assert float(nll) == pytest.approx(-float(pooled.mean()), abs=1e-4)
    assert float(nll) <= float(-targets.mean(1).max()) + 1e-4


def test_two_roundings_together_are_nearer_to_the_base_than_they_are_on_average(run, quantised, against):
    made = {
        n: ensemble.assemble(m, "mean") for n, m in {"a": quantised[:1], "b": quantised[1:], "both": quantised}.items()
    }
    kl = {
        name: float(found.kl.mean()) for name, found in ensemble_scores.score_distributions(run, made, against).items()
    }
    assert kl["both"] <= (kl["a"] + kl["b"]) / 2


def test_scores_are_read_back_and_no_model_is_loaded_for_them(run, quantised, against, monkeypatch):
    made = {"mean-2": ensemble.assemble(quantised, "mean")}
    first = ensemble_scores.score_distributions(run, made, against)["mean-2"]
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("the scores were known"))
    torch.testing.assert_close(ensemble_scores.score_distributions(run, made, against)["mean-2"].kl, first.kl)


def test_records_name_members_weights_and_the_verdict_of_the_paired_gap(run, quantised, base, against, text):
    about = ensemble.assemble(quantised, "mean")
    found = ensemble_scores.score_distributions(run, {"mean-2": about}, against)["mean-2"]
    ensemble_scores.record_distributions(run, "mean-2", about, found, text)
    made = {r.metric: r for r in run.records if r.subject == "mean-2"}
    assert made["kl_divergence:python_docs"].details["members"] == [a.name for a in quantised]
    assert made["perplexity:python_docs"].low < made["perplexity:python_docs"].value
    single = predict.score_model(checkpoint.load_model(base), against)
    gaps = ensemble_scores.record_gap(run, "mean-2", found, ("bf16", single), text)
    gap = run.records[-1]
    assert (gap.metric, gap.details) == ("kl_gap:python_docs", {"against": "bf16", "verdict": "worse"})
    assert gaps["kl"].value == pytest.approx(float(found.kl.mean()), abs=1e-5)


def test_a_cascade_at_both_ends_is_one_of_its_members(run, quantised, against):
    ends = {n: ensemble.assemble(quantised, "cascade", threshold=t) for n, t in {"small": 0.0, "large": 1.1}.items()}
    alone = {n: ensemble.assemble([m], "mean") for n, m in zip(ends, quantised, strict=True)}
    scores = ensemble_scores.score_distributions(run, {**ends, **{f"{n} alone": a for n, a in alone.items()}}, against)
    for name in ends:
        torch.testing.assert_close(scores[name].kl, scores[f"{name} alone"].kl)


def test_the_rule_for_tokens_wins_back_nine_tenths_of_the_loss_or_asks_nobody(run, base, quantised, held_out):
    reference = predict.make_reference(base, held_out, run.artifacts_dir / "cache")
    for small, large in ((quantised[1], base), (base, quantised[1])):
        rule = ensemble_scores.token_rule(run, (small, large), reference)
        ours, theirs = (-row.mean() for row in ensemble_scores.target_log_probabilities((small, large), reference, run))
        assert rule.loss <= float(ours - 0.9 * (ours - theirs).clamp(min=0)) + 1e-5
        assert (rule.share == 0) == bool(ours <= theirs)


def test_a_subject_too_large_for_the_memory_is_recorded_without_a_value(run, quantised, against, monkeypatch):
    def load(artifact, device):
        if artifact.sha256 == quantised[1].sha256:
            raise torch.OutOfMemoryError("no room")
        return kept(artifact, device)

    kept = checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", load)
    ensemble_scores.record_speed(
        run, {"fits": quantised[0], "not": ensemble.assemble(quantised, "mean")}, against.windows[0]
    )
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


def test_speed_is_recorded_of_artefacts_and_ensembles_alike(run, quantised, against):
    subjects = {"nf4": quantised[0], "mean-2": ensemble.assemble(quantised, "mean")}
    ensemble_scores.record_speed(run, subjects, against.windows[0])
    made = {r.subject: r for r in run.records[-2:] if r.metric == "decode_tokens_per_s"}
    assert set(made) == set(subjects)
    for record in made.values():
        assert record.n == len(record.samples) == 3 * run.profile.latency_samples
        assert record.low <= record.value <= record.high


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def respondents(base, quantised):
    return Respondent(quantised[0]), Respondent(base)


def perfect(case) -> str:
    (name, accepted), *_ = case.expected[0].items()
    return json.dumps({"name": name, "arguments": {k: v[0] for k, v in accepted.items()}})


def voter(name: str) -> Respondent:
    return Respondent(Artifact(Path(name), {"name": name}))


def saying(monkeypatch, **texts: list[str]) -> None:
    """Let respondents say prepared texts, one list for each name of an artefact."""

    def alone(run, respondent, asked, mode):
        name = respondent.artifact.name
        return Answered(texts[name][: len(asked)], [1.0] * len(asked), {"a": 1.0, "b": 2.0, "c": 4.0}[name])

    monkeypatch.setattr(ensemble_scores, "answer_alone", alone)


def test_held_out_cases_ask_nothing_that_is_scored_and_nothing_twice():
    for category in ("toolbox_simple", "toolbox_multiple"):
        asked = calls.cases(category, 20)
        found = ensemble_scores.held_out_cases(asked, 20)
        questions = [str(case.messages) for case in found]
        assert len(set(questions)) == len(found) == 20
        assert set(questions).isdisjoint(str(case.messages) for case in asked)


def test_a_vote_takes_the_plurality_and_the_time_of_all(monkeypatch, run):
    right, wrong = perfect(ASKED[0]), '{"name": "x", "arguments": {}}'
    saying(monkeypatch, a=[wrong], b=[right], c=[right])
    found = ensemble_scores.answer_by_vote(run, [voter("a"), voter("b"), voter("c")], ASKED[:1], "forced")
    assert found == Answered([right], [2 / 3], 7.0)


def test_a_cascade_takes_the_large_ones_answer_and_time_where_the_small_one_is_unsure(monkeypatch, run):
    saying(monkeypatch, a=["small"] * 4, c=["large"] * 4)
    monkeypatch.setattr(ensemble_scores, "confidence", lambda *_: [0.9, 0.1, 0.8, 0.7])
    rule = ensemble.Rule(0.5, 0.0, 0.0)
    found, share = ensemble_scores.answer_cascade(run, (voter("a"), voter("c")), ASKED, "forced", rule)
    assert (found.texts, share) == (["small", "large", "small", "small"], 0.25)
    assert found.seconds == 1.0 + 0.25 * 4.0


def test_the_threshold_is_chosen_where_the_large_one_is_right_and_the_small_one_is_not(monkeypatch, run):
    right, wrong = [perfect(case) for case in ASKED], ["none"] * 4
    saying(monkeypatch, a=[right[0], wrong[1], right[2], wrong[3]], c=right)
    monkeypatch.setattr(ensemble_scores, "confidence", lambda *_: [0.9, 0.1, 0.8, 0.2])
    rule = ensemble_scores.choose_rule(run, (voter("a"), voter("c")), ASKED, "forced")
    assert rule == ensemble.Rule(0.8, 0.5, 0.0)


def test_a_likelier_answer_is_surer_and_an_empty_one_is_not_sure_at_all(respondents):
    small, _ = respondents
    prompt = calls.case_prompt(small.tokenizer, ASKED[0])
    told = ensemble_scores.text_confidence(small, prompt, "<tool_call>[{")
    noise = ensemble_scores.text_confidence(small, prompt, "zq xj kv")
    assert 0 < noise < told <= 1
    assert ensemble_scores.text_confidence(small, prompt, "") == 0


def test_draws_share_one_model_and_are_answered_once(run, respondents, monkeypatch):
    artifact, loads, load = respondents[0].artifact, [], checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", lambda *given: loads.append(given) or load(*given))
    how = {"samples": 3, "temperature": 1.0}
    first = ensemble_scores.self_consistency(run, artifact, ASKED[:2], "forced", **how)
    assert len(loads) == 1
    assert ensemble_scores.self_consistency(run, artifact, ASKED[:2], "forced", **how) == first
    assert len(loads) == 1, "the answers were known"
    assert first.seconds > 0
    assert all(1 / 3 <= share <= 1 or share == 0 for share in first.agreement)


def test_the_tiny_models_vote_and_cascade_and_are_recorded(run, respondents):
    voted = ensemble_scores.answer_by_vote(run, respondents, ASKED, "forced")
    right = ensemble_scores.record_answers(run, "vote-2", voted, ASKED, mode="forced", sha256="")
    accuracy, seconds = run.records[-2:]
    assert (accuracy.metric, accuracy.n) == ("call_accuracy_forced:toolbox_multiple", 4)
    assert accuracy.value == sum(right) / 4
    assert (seconds.metric, seconds.value) == ("answer_seconds", voted.seconds)
    rule = ensemble_scores.choose_rule(run, respondents, ensemble_scores.held_out_cases(ASKED, 3), "forced")
    found, share = ensemble_scores.answer_cascade(run, respondents, ASKED, "forced", rule)
    assert len(found.texts) == 4
    assert 0 <= share <= 1


def test_no_samples_and_no_temperature_are_refused(respondents):
    for samples, temperature in ((0, 1.0), (3, 0.0)):
        with pytest.raises(ValueError, match="both must be positive"):
            ensemble_scores.sampling_voters(respondents[0].artifact, samples, temperature=temperature)
