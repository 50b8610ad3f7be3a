"""Votes: ties, abstentions, spellings, and what never changes the winner."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avalab import answers_vote

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, database=None)
WORDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=7)


def call(name: str = "add", **arguments) -> str:
    return f"<tool_call>{json.dumps([{'name': name, 'arguments': arguments}])}</tool_call>"


def test_two_of_three_win_with_two_thirds():
    assert answers_vote.elect(["b", "a", "a"], answers_vote.text_key) == answers_vote.Outcome(1, 2 / 3)


def test_a_tie_goes_to_the_answer_that_came_first():
    assert answers_vote.elect(["b", "a", "a", "b"], answers_vote.text_key).voter == 0
    assert answers_vote.elect(["a", "b"], answers_vote.text_key) == answers_vote.Outcome(0, 0.5)


def test_calls_are_equal_however_their_arguments_are_ordered():
    assert answers_vote.call_key(call(a=1, b="x")) == answers_vote.call_key(call(b="x", a=1))
    assert answers_vote.call_key("add(a=1, b='x')") == answers_vote.call_key(call(a=1, b="x"))
    assert answers_vote.call_key(call(a=1)) != answers_vote.call_key(call(a=2))
    assert answers_vote.call_key(call("sub", a=1)) != answers_vote.call_key(call(a=1))


def test_every_refusal_is_the_same_answer_and_a_damaged_call_abstains():
    assert answers_vote.call_key("No tool fits.") == answers_vote.call_key("I cannot do that.") == ""
    assert answers_vote.call_key("<tool_call>[{") is None
    assert answers_vote.elect(["<tool_call>[{", "<tool_call>[{", call(a=1)]) == answers_vote.Outcome(2, 1 / 3)


def test_where_all_abstain_the_first_one_speaks_and_nobody_agrees():
    assert answers_vote.elect(["<tool_call>[{", "<tool_call>{"]) == answers_vote.Outcome(0, 0.0)


def test_each_question_is_voted_on_alone():
    columns = [["a", "x"], ["b", "x"], ["b", "y"]]
    assert answers_vote.vote(columns, answers_vote.text_key) == (["b", "x"], [2 / 3, 2 / 3])


@given(WORDS)
@EXAMPLES
def test_the_winner_has_the_most_votes_and_is_the_first_of_those_that_do(words):
    found = answers_vote.elect(words, answers_vote.text_key)
    winner = words[found.voter]
    most = max(words.count(word) for word in words)
    assert words.count(winner) == most
    assert found.agreement == most / len(words)
    assert not any(words.count(word) == most for word in words[: found.voter])


@given(WORDS)
@EXAMPLES
def test_one_more_vote_for_the_winner_changes_nothing(words):
    winner = words[answers_vote.elect(words, answers_vote.text_key).voter]
    more = [*words, winner]
    assert more[answers_vote.elect(more, answers_vote.text_key).voter] == winner


def test_nobody_and_voters_with_different_questions_are_refused():
    with pytest.raises(ValueError, match="at least one answer"):
        answers_vote.elect([])
    with pytest.raises(ValueError, match="voters answered 1, 2 questions"):
        answers_vote.vote([["a"], ["a", "b"]])
