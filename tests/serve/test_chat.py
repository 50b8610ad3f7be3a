"""The chat: turns with a scripted model and with the tiny one."""

import json

import pytest
from transformers import PreTrainedModel  # noqa: F401  before the package, whose modules reach torchao

from avalab.data import calls, chats, grammars
from avalab.measure import answers
from avalab.models import checkpoint
from avalab.serve import chat as serve_chat
from avalab.serve.tools import Tool

COMB = {
    "name": "ways",
    "description": "The ways to choose k of n things.",
    "parameters": {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "k": {"type": "integer"}},
        "required": ["n", "k"],
    },
    "callable": "math:comb",
}
FACTORIAL = {
    "name": "factorial",
    "description": "The factorial of n.",
    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
    "callable": "math:factorial",
}
TOOLS = [Tool(**COMB), Tool(**FACTORIAL)]


def text_of(*found: tuple[str, dict]) -> str:
    listed = [{"name": name, "arguments": arguments} for name, arguments in found]
    return f"<tool_call>{json.dumps(listed)}</tool_call>"


def scripted(*texts: str):
    """A model that gives these answers one after the other."""
    left = list(texts)
    return lambda chat: left.pop(0)


# --- turns -------------------------------------------------------------------------------------------------------


def test_a_call_is_shown_executed_and_its_result_goes_back():
    said, chat = [], serve_chat.opening(TOOLS)
    answer = scripted(text_of(("ways", {"n": 5, "k": 2})), "There are 10 ways.")
    chat = serve_chat.respond("How many?", chat, TOOLS, answer, say=said.append)
    assert said == ["  -> ways(n=5, k=2)", "  <- 10"]
    assert [m["role"] for m in chat] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat[3] == {"role": "tool", "name": "ways", "content": "10"}
    assert chat[4]["content"] == "There are 10 ways."


def test_parallel_calls_have_a_result_each_and_a_failure_is_a_result():
    found = text_of(("ways", {"n": 5, "k": 2}), ("ways", {"n": 5}))
    said = []
    chat = serve_chat.respond("Both?", [], TOOLS, scripted(found, "Done."), say=said.append)
    assert [m["content"] for m in chat if m["role"] == "tool"] == ["10", '{"error": "\'k\' is a required property"}']
    assert said[3] == "  <- failed: 'k' is a required property"


def test_a_model_that_repeats_its_call_is_stopped():
    found = text_of(("ways", {"n": 5, "k": 2}))
    said = []
    chat = serve_chat.respond("How many?", [], TOOLS, scripted(found, found, "never asked"), say=said.append)
    assert len(said) == 2
    assert [m["role"] for m in chat] == ["user", "assistant", "tool", "assistant"]


def test_a_model_that_always_calls_something_else_is_stopped_too():
    numbers = iter(range(100))
    chat = serve_chat.respond(
        "Go on.", [], TOOLS, lambda chat: text_of(("factorial", {"n": next(numbers)})), say=lambda text: None
    )
    assert sum(m["role"] == "assistant" for m in chat) == serve_chat.ROUNDS


def test_a_call_that_cannot_be_read_is_said_to_be_one():
    said = []
    serve_chat.respond("How many?", [], TOOLS, scripted("<tool_call>[{"), say=said.append)
    assert said == ["(this call cannot be read)"]


def test_a_full_context_loses_its_oldest_turns_and_keeps_the_system_message():
    """Four messages of one token each fit: the system message and the last turn with its three."""
    roles = ["system", "user", "assistant", "user", "assistant", "tool"]
    chat = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    assert serve_chat.fitted(chat, len, 6) == chat
    assert [m["content"] for m in serve_chat.fitted(chat, len, 5)] == ["0", "3", "4", "5"]
    with pytest.raises(ValueError, match="take 4 tokens; the model has room for 3"):
        serve_chat.fitted(chat, len, 3)


# --- the tiny model ----------------------------------------------------------------------------------------------


def reader(*lines: object):
    """What a person types; an exception is raised where it stands."""
    left = list(lines)

    def read(prompt: str) -> str:
        line = left.pop(0)
        if isinstance(line, type):
            raise line
        return line

    return read


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ raise_exception('no') if m.role == 'tool' }}{{ m.content }}{% endfor %}",
        "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
    ],
)
def test_results_reach_a_model_whose_template_refuses_or_hides_them(respondent, template):
    tokenizer = checkpoint.load_tokenizer(respondent.artifact)
    tokenizer.chat_template = template
    answer = scripted(text_of(("ways", {"n": 47, "k": 2})), "Done.")
    chat = serve_chat.respond("How many?", serve_chat.opening(TOOLS), TOOLS, answer, say=lambda text: None)
    assert "1081" in chats.prompt_text(tokenizer, chat)


def test_under_the_grammar_the_tiny_model_answers_with_a_text_or_a_readable_call(respondent, capsys):
    closed = {"type": "object", "properties": {"n": {"enum": [3, 5, 7]}}, "required": ["n"]}
    tools = [Tool(**FACTORIAL | {"parameters": closed})]
    answer = serve_chat.answerer(respondent, tools, "grammar", new_tokens=200)
    text = answer([*serve_chat.opening(tools), {"role": "user", "content": "What is the factorial of 7?"}])
    assert calls.parse_calls(text) != "not_json"
    assert capsys.readouterr().out.strip() == text.strip(), "what is streamed is the answer"


def test_the_greedy_answer_is_that_of_the_evaluation(respondent):
    tokenizer, chat = respondent.tokenizer, [*serve_chat.opening(TOOLS), {"role": "user", "content": "Hello."}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ((_, expected),) = grammars.greedy_answers(respondent.model, tokenizer, [prompt], max_new_tokens=24)
    assert serve_chat.answerer(respondent, TOOLS, "free", stream=False, new_tokens=24)(chat) == expected


@pytest.mark.parametrize("end", ["/quit", EOFError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", serve_chat.MODES)
def test_a_chat_ends_cleanly(respondent, monkeypatch, mode, end):
    monkeypatch.setattr(serve_chat, "answerer", lambda *_, say: scripted("Hello.", "Again."))
    said = []
    chat = serve_chat.converse(respondent, TOOLS, mode=mode, read=reader("Hi.", "", "Again?", end), say=said.append)
    assert [m["content"] for m in chat[1:]] == ["Hi.", "Hello.", "Again?", "Again."]
    assert "ways, factorial" in said[0]


def test_a_request_that_is_too_long_is_refused_and_the_chat_goes_on(respondent):
    said = []
    read = reader("word " * 4000, "/quit")
    chat = serve_chat.converse(respondent, TOOLS, read=read, say=said.append)
    assert len(chat) == 1
    assert "the model has room for" in said[1]


def test_an_answer_that_is_cut_off_says_so(respondent):
    """One that ends does not: what is streamed above is the answer alone."""
    heard: list[str] = []
    answer = serve_chat.answerer(respondent, TOOLS, "grammar", stream=False, new_tokens=1, say=heard.append)
    answer([{"role": "user", "content": "What is a list?"}])
    assert heard == ["(cut off after 1 tokens)"]


def test_turns_that_no_longer_fit_are_left_out_with_a_notice(respondent):
    """The long turn takes more than half of what there is room for, twice it does not fit."""
    context = respondent.model.config.max_position_embeddings
    unit = len(respondent.tokenizer(" garden").input_ids)
    long = " garden" * (context // 2 // unit)
    chat = [
        {"role": "user", "content": long},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": long},
    ]
    heard: list[str] = []
    serve_chat.answerer(respondent, [], "free", stream=False, new_tokens=4, say=heard.append)(chat)
    assert heard[0] == f"(the 2 oldest messages are left out: the model has room for {context - 4:,} tokens)"


def test_an_unknown_mode_is_refused_before_anything_is_loaded(respondent):
    fresh = answers.Respondent(respondent.artifact)
    with pytest.raises(ValueError, match="unknown mode 'forced'; choose one of free, grammar"):
        serve_chat.converse(fresh, TOOLS, mode="forced")
    assert "model" not in vars(fresh)
