"""Dialogues ask several times about one set of tools, and every turn stays what its example was."""

import pytest

from avalab.data import calls, drafts, synthesize
from avalab.lab.run import ROOT


@pytest.fixture(scope="module")
def examples():
    return synthesize.load_examples(ROOT / "data" / "synthetic_datasets")


@pytest.fixture(scope="module")
def joined(examples):
    return drafts.dialogues(examples, 40, seed=3, families=0.0)


def turns(dialogue: dict) -> list[tuple[str, str]]:
    said = [m["content"] for m in dialogue["messages"] if m["role"] != "system"]
    return list(zip(said[::2], said[1::2], strict=True))


def test_the_same_seed_joins_the_same_dialogues(examples, joined):
    assert drafts.dialogues(examples, 40, seed=3, families=0.0) == joined
    assert drafts.dialogues(examples, 40, seed=4, families=0.0) != joined


def test_every_turn_is_a_request_and_answer_of_a_gated_example(examples, joined):
    known = {(e["messages"][-2]["content"], e["messages"][-1]["content"]) for e in examples}
    requests = {request for request, _ in known}
    for dialogue in joined:
        for request, answer in turns(dialogue):
            refused = calls.parse_calls(answer) == "no_call"
            assert request in requests if refused else (request, answer) in known


def test_every_call_is_to_a_listed_tool_and_every_refused_request_was_made_for_none(examples, joined):
    made_for = {e["messages"][-2]["content"]: e["calls"][0]["name"] for e in examples if e["kind"] == "single_call"}
    for dialogue in joined:
        listed = {tool["name"] for tool in dialogue["tools"]}
        assert {call["name"] for call in dialogue["calls"]} <= listed
        refused = [request for request, answer in turns(dialogue) if calls.parse_calls(answer) == "no_call"]
        assert not {made_for[request] for request in refused} & listed


def test_there_are_one_to_three_calls_and_three_refusals_in_any_order(joined):
    first = set()
    for dialogue in joined:
        refusals = [calls.parse_calls(answer) == "no_call" for _, answer in turns(dialogue)]
        assert (len(refusals) - sum(refusals), sum(refusals)) in {(1, 3), (2, 3), (3, 3)}
        first.add(refusals[0])
    assert first == {True, False}


def test_fewer_than_two_single_calls_are_refused(examples):
    with pytest.raises(ValueError, match="0 of 3 examples are single calls"):
        drafts.dialogues([e for e in examples if e["kind"] == "no_function"][:3], 1, 0)


def test_a_family_offers_tools_of_one_domain_and_refuses_what_its_other_tools_do(examples):
    made_for = {e["messages"][-2]["content"]: e["made_for"] for e in examples if e["kind"] == "single_call"}
    refused_own = 0
    for dialogue in drafts.dialogues(examples, 40, seed=5, families=1.0):
        said = [(made_for[request], calls.parse_calls(answer) == "no_call") for request, answer in turns(dialogue)]
        assert len({tool.partition(".")[0] for tool, _ in said}) == 1
        called = {tool for tool, refused in said if not refused}
        assert 1 <= len(called) <= 3
        assert 2 <= len(dialogue["tools"]) <= 4
        assert not called & {tool for tool, refused in said if refused}
        refused_own += sum(refused for _, refused in said)
    assert refused_own > 20


def test_examples_without_a_note_of_their_tool_join_to_dialogues_of_unlike_tools(examples):
    unnoted = [{k: v for k, v in example.items() if k != "made_for"} for example in examples]
    joined = drafts.dialogues(unnoted, 5, seed=1, families=1.0)
    assert joined == drafts.dialogues(unnoted, 5, seed=1, families=0.0)
