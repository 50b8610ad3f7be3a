"""A model that answers chats: greedily, by chance, within a grammar."""

import pytest
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.agent import speaker, toolkit
from avalab.engines.engine import TINY
from avalab.lab.errors import InputError

CHAT = [{"role": "user", "content": "What is a list?"}]


@pytest.fixture(scope="module")
def tiny(run):
    opened = speaker.open_model(str(TINY), run)
    yield opened
    opened.close()


def test_a_greedy_answer_is_the_engines_and_is_counted(tiny):
    before = tiny.cost.copy()
    said = tiny.say(CHAT, most=8)
    new = tiny.engine.generate(tiny.tokens(CHAT), 8)
    assert said.text == tiny.tokenizer.decode(new, skip_special_tokens=True)
    spent = tiny.cost.since(before)
    assert (spent.answers, spent.new_tokens, spent.prompt_tokens) == (1, len(new), len(tiny.tokens(CHAT)))


def test_a_draw_is_the_same_for_a_seed_and_seldom_for_another(tiny):
    drawn = [tiny.say(CHAT, most=12, temperature=1.0, seed=seed).text for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_with_functions_an_answer_is_a_call_that_fits(tiny):
    tool = toolkit.calculating_tools()[3]
    said = tiny.say(CHAT, most=64, functions=[tool.described], refusal=False)
    calls = tiny.calls(said.text)
    assert said.is_cut or [call.name for call in calls] == ["weekday"]
    assert said.text.startswith('<tool_call>[{"name": "weekday", "arguments": {"day": "')


def test_the_oldest_turns_are_left_out_and_a_request_without_room_is_refused(tiny):
    turn = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes"}]
    said = tiny.say([*turn * 4, *CHAT], most=4)
    assert said.left_out > 0
    assert said.prompt_tokens <= tiny.engine.facts.context - 4
    assert tiny.room(CHAT, 4) > 0 > tiny.room(turn * 8, 4)
    with pytest.raises(InputError, match="the model has room for"):
        tiny.say([{"role": "user", "content": "word " * 5000}])


def test_what_is_no_model_is_refused_in_one_line(run):
    with pytest.raises(InputError, match="unknown model 'nothing-like-this'"):
        speaker.open_model("nothing-like-this", run)
