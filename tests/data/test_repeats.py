"""Variety: near-duplicates, shares of what was accepted, and what the report counts."""

import pytest

from avalab.data import repeats


def example(request: str, *called: str, description: str = "Book a table.") -> dict:
    tools = [{"name": name, "description": description, "parameters": {}} for name in called]
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": ""}]
    calls = [{"name": name, "arguments": {}} for name in called]
    return {"kind": "single_call", "tools": tools, "messages": messages, "calls": calls}


def test_near_duplicates_are_rejected_and_other_numbers_are_not():
    gate = repeats.near_duplicates()
    text = "Could you book a table at the Copper Pot for me and my {} friends on Friday evening at seven"
    assert gate(example(text.format("old"))) == ""
    assert gate(example(text.format("old") + "!")) != ""
    assert gate(example("Tell me how far the moon is from here")) == ""


def test_the_floor_lets_the_first_ones_through_and_the_share_stops_the_rest():
    gate = repeats.spread({"function": 0.5}, floor=2)
    verdicts = [gate(example(str(i), "f")) for i in range(3)]
    assert verdicts == ["", "", "2 of 2 accepted examples have the function 'f' already"]
    assert [gate(example(str(i), "g")) for i in range(2)] == ["", ""]
    assert gate(example("x", "f")) == "2 of 4 accepted examples have the function 'f' already"
    assert gate(example("y", "h")) == ""
    assert gate(example("z", "f")) == ""  # three of six


@pytest.mark.parametrize(
    ("kind", "requests"),
    [("first word", ["Book one", "book two two two two two"]), ("length", ["One two three", "a b c d"])],
)
def test_first_words_and_lengths_have_shares_too(kind, requests):
    gate = repeats.spread({kind: 0.1}, floor=1)
    assert gate(example(requests[0])) == ""
    assert f"have the {kind}" in gate(example(requests[1]))


def test_the_report_counts_what_a_pencil_counts():
    made = [example("One two", "f"), example("one three four", "g", description="Cancel a table.")]
    found = repeats.report(made)
    assert (found["examples"], found["functions_offered"], found["functions_called"]) == (2, 2, 2)
    assert (found["first_words"], found["words_in_requests"], found["verbs"]) == (1, 4, 2)
    assert repeats.report([])["request_words_5_50_95"] == []
