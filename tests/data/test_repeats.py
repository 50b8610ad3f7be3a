"""Near duplicates, shares of what was accepted, what the report counts, and overlap with evaluation sets."""

import pytest

from avalab.data import repeats

SECRET = {"name": "secret_tool", "parameters": {}}
TOOL = {"name": "book_table", "description": "Book it.", "parameters": {"type": "object", "properties": {}}}


def example(request: str, *called: str, description: str = "Book a table.") -> dict:
    tools = [{"name": name, "description": description, "parameters": {}} for name in called]
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": ""}]
    calls = [{"name": name, "arguments": {}} for name in called]
    return {"kind": "single_call", "tools": tools, "messages": messages, "calls": calls}


def test_near_duplicates_are_rejected_and_other_numbers_are_not():
    gate = repeats.near_duplicate_gate()
    text = "Could you book a table at the Copper Pot for me and my {} friends on Friday evening at seven"
    assert gate(example(text.format("old"))) == ""
    assert gate(example(text.format("old") + "!")) != ""
    assert gate(example("Tell me how far the moon is from here")) == ""


def test_the_floor_lets_the_first_ones_through_and_the_share_stops_the_rest():
    gate = repeats.spread_gate({"function": 0.5}, floor=2)
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
    gate = repeats.spread_gate({kind: 0.1}, floor=1)
    assert gate(example(requests[0])) == ""
    assert f"have the {kind}" in gate(example(requests[1]))


def test_the_report_counts_what_a_pencil_counts():
    made = [example("One two", "f"), example("one three four", "g", description="Cancel a table.")]
    found = repeats.diversity_report(made)
    assert (found["examples"], found["functions_offered"], found["functions_called"]) == (2, 2, 2)
    assert (found["first_words"], found["words_in_requests"], found["verbs"]) == (1, 4, 2)
    assert repeats.diversity_report([])["request_words_5_50_95"] == []


# --- overlap: a name, a run of eight words, and nothing less ---


def offering(request: str, **changed) -> dict:
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": "Done."}]
    return {"messages": messages, "tools": [{**TOOL, **changed}], "calls": []}


@pytest.fixture(scope="module")
def gate():
    return repeats.overlap_gate(
        [repeats.evaluation_set("known", ["One two three four five six seven eight nine"], [SECRET])]
    )


def test_a_run_of_eight_words_is_found_and_seven_are_not(gate):
    assert gate(offering("zero one two three four five six seven")) == ""
    assert "known has the words" in gate(offering("Zero, one two three four five six seven eight!"))


def test_a_short_text_is_not_a_find_even_if_it_is_a_whole_question_of_the_set():
    short = repeats.overlap_gate([repeats.evaluation_set("known", ["What is the time?"], [])])
    assert short(offering("What is the time?")) == ""


def test_a_function_name_is_found_among_the_tools_on_offer(gate):
    assert gate(offering("For 2", name="secret_tool")) == "known has the function secret_tool"


def test_descriptions_are_compared_at_every_depth(gate):
    inner = {"type": "string", "description": "two three four five six seven eight nine"}
    nested = {"type": "object", "properties": {"who": {"type": "array", "items": inner}}}
    assert repeats.descriptions({**TOOL, "parameters": nested})[-1] == inner["description"]
    assert "known has the words" in gate(offering("For 2", parameters=nested))


def test_a_system_message_is_ours_and_not_compared(gate):
    told = offering("For 2")
    told["messages"].insert(0, {"role": "system", "content": "one two three four five six seven eight"})
    assert gate(told) == ""


def test_the_sets_at_hand_have_names_words_and_a_hash_of_their_own():
    sets = {known.name: known for known in repeats.evaluation_sets()}
    assert {"toolbox-heldout", "python-docs"} <= sets.keys()
    assert sets["toolbox-heldout"].functions
    assert len({known.sha256 for known in sets.values()}) == len(sets)
    assert all(known.shingles for known in sets.values())
