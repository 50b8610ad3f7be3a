"""Answers of several: held-out cases are apart, votes and cascades count what they should, artefacts answer once."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel  # noqa: F401  its warnings come before the package's type checks

from avalab.compress import quantize
from avalab.data import calls
from avalab.lab.artifacts import Artifact
from avalab.measure.answers import Respondent
from avalab.models import checkpoint
from avalab.serve import ensemble, ensemble_scores
from avalab.serve.ensemble_scores import Answered

ASKED = calls.cases("toolbox_multiple", 4)


@pytest.fixture(scope="module")
def pair(run, base):
    return Respondent(quantize.compress_artifact(base, "nf4", run=run)), Respondent(base)


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

    monkeypatch.setattr(ensemble_scores, "alone", alone)


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
    found = ensemble_scores.vote(run, [voter("a"), voter("b"), voter("c")], ASKED[:1], "forced")
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


def test_a_likelier_answer_is_surer_and_an_empty_one_is_not_sure_at_all(pair):
    small, _ = pair
    prompt = calls.case_prompt(small.tokenizer, ASKED[0])
    told = ensemble_scores.text_confidence(small, prompt, "<tool_call>[{")
    noise = ensemble_scores.text_confidence(small, prompt, "zq xj kv")
    assert 0 < noise < told <= 1
    assert ensemble_scores.text_confidence(small, prompt, "") == 0


def test_draws_share_one_model_and_are_answered_once(run, pair, monkeypatch):
    artifact, loads, load = pair[0].artifact, [], checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", lambda *given: loads.append(given) or load(*given))
    how = {"samples": 3, "temperature": 1.0}
    first = ensemble_scores.self_consistency(run, artifact, ASKED[:2], "forced", **how)
    assert len(loads) == 1
    assert ensemble_scores.self_consistency(run, artifact, ASKED[:2], "forced", **how) == first
    assert len(loads) == 1, "the answers were known"
    assert first.seconds > 0
    assert all(1 / 3 <= share <= 1 or share == 0 for share in first.agreement)


def test_the_tiny_models_vote_and_cascade_and_are_recorded(run, pair):
    voted = ensemble_scores.vote(run, pair, ASKED, "forced")
    right = ensemble_scores.record_answers(run, "vote-2", voted, ASKED, mode="forced", sha256="")
    accuracy, seconds = run.records[-2:]
    assert (accuracy.metric, accuracy.n) == ("call_accuracy_forced:toolbox_multiple", 4)
    assert accuracy.value == sum(right) / 4
    assert (seconds.metric, seconds.value) == ("answer_seconds", voted.seconds)
    rule = ensemble_scores.choose_rule(run, pair, ensemble_scores.held_out_cases(ASKED, 3), "forced")
    found, share = ensemble_scores.answer_cascade(run, pair, ASKED, "forced", rule)
    assert len(found.texts) == 4
    assert 0 <= share <= 1


def test_no_samples_and_no_temperature_are_refused(pair):
    for samples, temperature in ((0, 1.0), (3, 0.0)):
        with pytest.raises(ValueError, match="both must be positive"):
            ensemble_scores.draws(pair[0].artifact, samples, temperature=temperature)
