"""Overlap with evaluation sets: a name, a run of eight words, and nothing less."""

import pytest

from avalab.data import repeats

SECRET = {"name": "secret_tool", "parameters": {}}
TOOL = {"name": "book_table", "description": "Book it.", "parameters": {"type": "object", "properties": {}}}


def example(request: str, **changed) -> dict:
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": "Done."}]
    return {"messages": messages, "tools": [{**TOOL, **changed}], "calls": []}


@pytest.fixture(scope="module")
def gate():
    return repeats.overlap([repeats.evaluation_set("known", ["One two three four five six seven eight nine"], [SECRET])])


def test_a_run_of_eight_words_is_found_and_seven_are_not(gate):
    assert gate(example("zero one two three four five six seven")) == ""
    assert "known has the words" in gate(example("Zero, one two three four five six seven eight!"))


def test_a_short_text_is_not_a_find_even_if_it_is_a_whole_question_of_the_set():
    short = repeats.overlap([repeats.evaluation_set("known", ["What is the time?"], [])])
    assert short(example("What is the time?")) == ""


def test_a_function_name_is_found_among_the_tools_on_offer(gate):
    assert gate(example("For 2", name="secret_tool")) == "known has the function secret_tool"


def test_descriptions_are_compared_at_every_depth(gate):
    inner = {"type": "string", "description": "two three four five six seven eight nine"}
    nested = {"type": "object", "properties": {"who": {"type": "array", "items": inner}}}
    assert repeats.descriptions({**TOOL, "parameters": nested})[-1] == inner["description"]
    assert "known has the words" in gate(example("For 2", parameters=nested))


def test_a_system_message_is_ours_and_not_compared(gate):
    told = example("For 2")
    told["messages"].insert(0, {"role": "system", "content": "one two three four five six seven eight"})
    assert gate(told) == ""


def test_the_sets_at_hand_have_names_words_and_a_hash_of_their_own():
    sets = {known.name: known for known in repeats.evaluation_sets()}
    assert {"toolbox-heldout", "python-docs"} <= sets.keys()
    assert sets["toolbox-heldout"].functions
    assert len({known.sha256 for known in sets.values()}) == len(sets)
    assert all(known.shingles for known in sets.values())
