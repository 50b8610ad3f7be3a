"""A model's own answers: only what can be verified is kept, verification is measured, and the tiny model can do it."""

import json
from collections import Counter

import pytest
from transformers import PreTrainedModel  # noqa: F401  before avalab reaches torchao: its warnings are its own

from avalab.data import calls, gates, synthesize, toolbox
from avalab.data.synthesize import precision, select_answers
from avalab.measure import answers


@pytest.fixture(scope="module")
def requests():
    return list(toolbox.function_calling_examples(8, 5))


def right(request: dict) -> str:
    return request["messages"][-1]["content"]


def test_right_answers_are_kept_and_what_cannot_be_read_or_verified_is_counted(requests):
    invented = json.loads(json.dumps(requests[3]["calls"]))
    invented[0]["arguments"] = dict.fromkeys(invented[0]["arguments"], 123456)
    texts = [right(requests[0]), "I cannot do that.", "<tool_call>[{", f"<tool_call>{json.dumps(invented)}</tool_call>"]
    counts = Counter()
    kept = select_answers(requests[:4], texts, source="self", row=gates.standard([]), counts=counts)
    assert [e["calls"] for e in kept] == [requests[0]["calls"]]
    assert (counts["answered"], counts["accepted"]) == (4, 1)
    assert (counts["rejected:no_call"], counts["rejected:not_json"]) == (1, 1)
    assert counts["rejected:schema_validity"] + counts["rejected:grounded"] == 1


def test_a_kept_answer_is_an_example_like_the_synthetic_ones(requests, tmp_path):
    texts = [f"Sure. {right(r)} Done." for r in requests]
    kept = select_answers(requests, texts, source="self:tiny-llama", row=dict(gates.STANDARD))
    for example in kept:
        request = requests[example["request"]]
        assert example["messages"][:2] == request["messages"][:2]
        assert calls.parse_calls(example["messages"][-1]["content"]) == [calls.Call(**c) for c in request["calls"]]
        assert example["source"] == "self:tiny-llama"
    synthesize.store_examples(tmp_path, kept)
    assert len(synthesize.load_examples(tmp_path)) == len(kept) > 4


def test_the_answers_in_the_requests_are_not_looked_at(requests):
    texts = [right(r) for r in requests]
    blind = [{**r, "calls": [], "messages": r["messages"][:2]} for r in requests]
    kept = [select_answers(given, texts, source="self", row=dict(gates.STANDARD)) for given in (requests, blind)]
    assert kept[0] == kept[1]


def test_precision_is_the_share_of_kept_answers_that_are_right(requests):
    """Two answers with the right calls and two with another request's: precision 2/4."""
    kept = select_answers(requests[:4], [right(r) for r in requests[:4]], source="self", row={})
    kept[2]["calls"], kept[3]["calls"] = kept[3]["calls"], [{"name": "no_such", "arguments": {}}]
    found = precision(kept, requests)
    assert (found.value, found.n) == (0.5, 4)
    with pytest.raises(ValueError, match="n must be positive"):
        precision([], requests)


def test_nothing_asked_is_nothing_kept():
    assert select_answers([], [], source="self", row={}) == []


def test_the_tiny_models_own_answers_pass_the_gates_that_they_are_said_to_pass(run, respondent, requests):
    counts, cases = Counter(), synthesize.answer_cases(requests)
    texts = answers.answer_calls(respondent, cases, "forced", run.artifacts_dir / "cache")
    kept = select_answers(requests, texts, source="self", row=gates.standard([]), counts=counts)
    assert counts["answered"] == len(requests)
    assert counts["accepted"] == len(kept)
    for example in kept:
        assert gates.verdict(example, gates.STANDARD) == ("", "")
