"""Answers that are given again: 0 false hits on minimal pairs, nearly all restatements found, and what a key holds."""

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avalab.serve.policy import answers

PAIRS = Path(__file__).with_name("minimal_pairs.txt")


def pairs() -> list[tuple[str, str, str]]:
    """(kind, one text, the other) of each line."""
    found = []
    for line in PAIRS.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        kind, _, text = line.partition(" | ")
        if kind == "swap":
            first, second = re.findall(r"\[(.*?)\]", text)
            plain = re.sub(r"[\[\]]", "", text)
            other = re.sub(r"\[.*?\]", "\0", text).replace("\0", second, 1).replace("\0", first, 1)
        else:
            begin, inner, end = re.match(r"(.*)\{(.*)\}(.*)", text).groups()
            half = inner.index("/") if inner.count("/") == 1 else len(inner) // 2 if kind != "unit" else 4
            plain, other = begin + inner[:half] + end, begin + inner[half + 1 :] + end
        found.append((kind, plain, other))
    return found


def asked(text: str, **more) -> dict:
    return {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}], **more}


def near(text: str, **more) -> str | None:
    return answers.near_key("model", "template", asked(text, **more))


def test_there_are_two_hundred_minimal_pairs_of_five_kinds():
    found = pairs()
    assert len(found) >= 200
    assert {kind for kind, *_ in found} == {"negation", "antonym", "number", "unit", "swap"}
    assert all(one != other for _, one, other in found)


@pytest.mark.parametrize("kind", ["negation", "antonym", "number", "unit", "swap"])
def test_no_minimal_pair_is_taken_for_the_same_request(kind):
    wrong = [(one, other) for found, one, other in pairs() if found == kind and near(one) == near(other)]
    assert not wrong


def test_restatements_in_white_space_and_case_are_found_95_times_in_100():
    rng, hits, tried = random.Random(0), 0, 0
    for _, *texts in pairs():
        for text in texts:
            spaced = re.sub(" ", lambda _: rng.choice([" ", "  ", "\n", "\t"]), text)
            for restated in (spaced, f"  {text}\n", text[0].lower() + text[1:], text.capitalize(), text.title()):
                tried += 1
                hits += near(restated) == near(text)
    assert hits / tried >= 0.95, f"{hits} of {tried}"


def test_politeness_and_articles_are_left_out_and_a_question_is_no_order():
    assert near("Please open the door") == near("Could you open a door") == near("open door.")
    assert near("open the door?") != near("open the door")


@given(st.text(max_size=60))
def test_the_signature_does_not_change_by_normalising_twice(text):
    assert answers.signature(answers.normalised(text)) == answers.signature(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 9), ("tools", [{"name": "f"}]), ("stop", ["x"]), ("response_format", {"type": "json_object"}),
    ],
)  # fmt: skip
def test_a_parameter_tool_model_or_template_changes_every_key(name, value):
    plain = asked("hello there")
    for key in (answers.exact_key, answers.near_key):
        keys = {
            key("m", "t", plain),
            key("m2", "t", plain),
            key("m", "t2", plain),
            key("m", "t", {**plain, name: value}),
        }
        assert len(keys) == 4


def test_the_exact_key_ignores_line_ends_and_outer_space_and_nothing_else():
    def key(text: str) -> str:
        return answers.exact_key("m", "t", asked(text))

    assert key("a\r\nb ") == key("a\nb")
    assert key("é") == key("e\u0301")
    assert len({key("a b"), key("a  b"), key("A b")}) == 3


def test_an_earlier_message_counts_to_the_letter_in_a_near_match():
    one, other = asked("go"), asked("go")
    other["messages"][0]["content"] = "be brief."
    assert answers.near_key("m", "t", one) != answers.near_key("m", "t", other)


def test_code_and_quotes_are_compared_to_the_letter():
    assert near("run `ls  -A`") != near("run `ls -a`")
    assert near('say "Hi"') != near('say "hi"')


def test_only_greedy_requests_are_kept():
    assert answers.is_greedy({})
    assert answers.is_greedy({"temperature": 0.0})
    assert not answers.is_greedy({"temperature": 0.7})
    assert not answers.is_greedy({"n": 2})


def test_the_cosine_of_a_right_angle_is_zero_and_near_needs_nine_tenths():
    assert answers.cosine([1.0, 0.0], [0.0, 2.0]) == 0
    assert answers.cosine([3.0, 4.0], [6.0, 8.0]) == pytest.approx(1)
    assert answers.is_near(None, [1.0])
    assert not answers.is_near([1.0, 0.0], [0.7, 0.7])
