"""Votes: ties, abstentions, spellings, and what never changes the winner."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avalab.serve import ensemble

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, database=None)
WORDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=7)


def call(name: str = "add", **arguments) -> str:
    return f"<tool_call>{json.dumps([{'name': name, 'arguments': arguments}])}</tool_call>"


def test_two_of_three_win_with_two_thirds():
    assert ensemble.elect(["b", "a", "a"], ensemble.text_key) == ensemble.Outcome(1, 2 / 3)


def test_a_tie_goes_to_the_answer_that_came_first():
    assert ensemble.elect(["b", "a", "a", "b"], ensemble.text_key).voter == 0
    assert ensemble.elect(["a", "b"], ensemble.text_key) == ensemble.Outcome(0, 0.5)


def test_calls_are_equal_however_their_arguments_are_ordered():
    assert ensemble.call_key(call(a=1, b="x")) == ensemble.call_key(call(b="x", a=1))
    assert ensemble.call_key("add(a=1, b='x')") == ensemble.call_key(call(a=1, b="x"))
    assert ensemble.call_key(call(a=1)) != ensemble.call_key(call(a=2))
    assert ensemble.call_key(call("sub", a=1)) != ensemble.call_key(call(a=1))


def test_every_refusal_is_the_same_answer_and_a_damaged_call_abstains():
    assert ensemble.call_key("No tool fits.") == ensemble.call_key("I cannot do that.") == ""
    assert ensemble.call_key("<tool_call>[{") is None
    assert ensemble.elect(["<tool_call>[{", "<tool_call>[{", call(a=1)]) == ensemble.Outcome(2, 1 / 3)


def test_where_all_abstain_the_first_one_speaks_and_nobody_agrees():
    assert ensemble.elect(["<tool_call>[{", "<tool_call>{"]) == ensemble.Outcome(0, 0.0)


def test_each_question_is_voted_on_alone():
    columns = [["a", "x"], ["b", "x"], ["b", "y"]]
    assert ensemble.plurality(columns, ensemble.text_key) == (["b", "x"], [2 / 3, 2 / 3])


@given(WORDS)
@EXAMPLES
def test_the_winner_has_the_most_votes_and_is_the_first_of_those_that_do(words):
    found = ensemble.elect(words, ensemble.text_key)
    winner = words[found.voter]
    most = max(words.count(word) for word in words)
    assert words.count(winner) == most
    assert found.agreement == most / len(words)
    assert not any(words.count(word) == most for word in words[: found.voter])


@given(WORDS)
@EXAMPLES
def test_one_more_vote_for_the_winner_changes_nothing(words):
    winner = words[ensemble.elect(words, ensemble.text_key).voter]
    more = [*words, winner]
    assert more[ensemble.elect(more, ensemble.text_key).voter] == winner


def test_nobody_and_voters_with_different_questions_are_refused():
    with pytest.raises(ValueError, match="at least one answer"):
        ensemble.elect([])
    with pytest.raises(ValueError, match="voters answered 1, 2 questions"):
        ensemble.plurality([["a"], ["a", "b"]])
