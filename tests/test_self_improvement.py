"""Self-improvement: only what can be verified is kept, verification is measured, and the tiny model can do a round."""

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedModel  # noqa: F401  before avalab reaches torchao: its warnings are its own

from avalab import answers, calls, gates, models, self_improvement, synthesize, toolbox
from avalab.self_improvement import precision, self_improve


@pytest.fixture(scope="module")
def requests():
    return list(toolbox.function_calling_examples(8, 5))


def answering(texts: list[str], monkeypatch) -> None:
    monkeypatch.setattr(answers, "answer_calls", lambda *_, **__: texts)


def right(request: dict) -> str:
    return request["messages"][-1]["content"]


def test_right_answers_are_kept_and_what_cannot_be_read_or_verified_is_counted(respondent, requests, monkeypatch):
    invented = json.loads(json.dumps(requests[3]["calls"]))
    invented[0]["arguments"] = dict.fromkeys(invented[0]["arguments"], 123456)
    texts = [right(requests[0]), "I cannot do that.", "<tool_call>[{", f"<tool_call>{json.dumps(invented)}</tool_call>"]
    answering(texts, monkeypatch)
    counts = Counter()
    kept = self_improve(respondent, requests[:4], cache=Path("unused"), row=gates.standard([]), counts=counts)
    assert [e["calls"] for e in kept] == [requests[0]["calls"]]
    assert (counts["answered"], counts["accepted"]) == (4, 1)
    assert (counts["rejected:no_call"], counts["rejected:not_json"]) == (1, 1)
    assert counts["rejected:schema_validity"] + counts["rejected:grounded"] == 1


def test_a_kept_answer_is_an_example_like_the_synthetic_ones(respondent, requests, monkeypatch, tmp_path):
    answering([f"Sure. {right(r)} Done." for r in requests], monkeypatch)
    kept = self_improve(respondent, requests, cache=Path("unused"), row=dict(gates.STANDARD))
    for example in kept:
        request = requests[example["request"]]
        assert example["messages"][:2] == request["messages"][:2]
        assert calls.parse_calls(example["messages"][-1]["content"]) == [calls.Call(**c) for c in request["calls"]]
        assert example["source"] == "self:tiny-llama"
    synthesize.example_files.store(tmp_path, kept)
    assert len(synthesize.load(tmp_path)) == len(kept) > 4


def test_the_answers_in_the_requests_are_not_looked_at(respondent, requests, monkeypatch):
    texts = [right(r) for r in requests]
    answering(texts, monkeypatch)
    blind = [{**r, "calls": [], "messages": r["messages"][:2]} for r in requests]
    kept = [
        self_improve(respondent, given, cache=Path("unused"), row=dict(gates.STANDARD)) for given in (requests, blind)
    ]
    assert kept[0] == kept[1]


def test_precision_is_the_share_of_kept_answers_that_are_right(respondent, requests, monkeypatch):
    """Two answers with the right calls and two with another request's: precision 2/4."""
    answering([right(r) for r in requests[:4]], monkeypatch)
    kept = self_improve(respondent, requests[:4], cache=Path("unused"), row={})
    kept[2]["calls"], kept[3]["calls"] = kept[3]["calls"], [{"name": "no_such", "arguments": {}}]
    found = precision(kept, requests)
    assert (found.value, found.n) == (0.5, 4)
    with pytest.raises(ValueError, match="n must be positive"):
        precision([], requests)


def test_nothing_asked_is_nothing_kept_and_an_unknown_mode_is_refused(run, respondent, requests):
    cache = run.artifacts_dir / "cache"
    assert self_improve(respondent, [], cache, row={}) == []
    with pytest.raises(ValueError, match="unknown mode 'loud'"):
        self_improve(respondent, requests[:1], cache, row={}, mode="loud")


def test_a_round_of_the_tiny_model_is_resumed_from_the_cache(run, respondent, requests, monkeypatch):
    cache, counts = run.artifacts_dir / "cache", Counter()
    kept = self_improve(respondent, requests, cache, row=gates.standard([]), mode="forced", counts=counts)
    assert counts["answered"] == len(requests)
    assert counts["accepted"] == len(kept)
    for example in kept:
        assert gates.verdict(example, gates.STANDARD) == ("", "")
    unloaded = answers.Respondent(respondent.artifact)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the answers were known"))
    again = self_improvement.self_improve(unloaded, requests, cache, row=gates.standard([]), mode="forced")
    assert again == kept
