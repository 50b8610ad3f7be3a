"""Chats: two forms become one, nothing is lost silently, and every published template shows all that is said."""

import json
from pathlib import Path

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from avalab.data import calls, chats, packing, synthesize, toolbox
from avalab.data.calls import Call, Case
from avalab.lab.run import ROOT

PUBLISHED = sorted(
    path.stem for path in Path(trl.__file__).parent.glob("chat_templates/*.jinja") if "training" not in path.stem
)
MISTRAL = (  # as Mistral 7B Instruct 0.3 has it: the system text stands in the last request, roles alternate
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set loop_messages = "
    "messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user/assistant') }}{%- endif %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
WRAPPED = {"type": "function", "function": WEATHER}
CALL = {"name": "get_weather", "arguments": {"city": "Köln"}}
ASKED = {"role": "user", "content": "The weather in Köln?"}


def openai_call(arguments, number="1"):
    called = {"name": "get_weather", "arguments": arguments}
    return {"id": number, "type": "function", "function": called}


def answered(arguments):
    return [ASKED, {"role": "assistant", "content": None, "tool_calls": [openai_call(arguments)]}]


@pytest.fixture
def odd(tokenizer):
    """A tokenizer with a chat template of a test's own."""

    def with_template(template, name="odd"):
        made = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-llama")
        made.chat_template, made.name_or_path = template, name
        return made

    return with_template


# --- reading


@pytest.mark.parametrize(
    "example",
    [
        {"tools": [WRAPPED], "messages": answered(json.dumps(CALL["arguments"]))},
        {"tools": [WRAPPED], "messages": answered(CALL["arguments"])},
        {"tools": [WEATHER], "messages": answered(CALL["arguments"])},
        {"tools": json.dumps([WRAPPED]), "messages": answered(json.dumps(CALL["arguments"], ensure_ascii=False))},
        {"functions": [WEATHER], "messages": [ASKED, {"role": "assistant", "content": "", "function_call": CALL}]},
        {"tools": [WEATHER], "calls": [CALL], "messages": [ASKED, {"role": "assistant", "content": None}]},
        {"tools": [WEATHER], "messages": [ASKED, {"role": "assistant", "content": toolbox.call_text([CALL])}]},
        {
            "tools": [WRAPPED],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "The weather in Köln?"}]},
                answered(CALL["arguments"])[1],
            ],
        },
    ],
)
def test_the_same_example_in_every_form_is_learned_as_the_same_chat(tmp_path, example):
    """The call stands once in the answer, as an object; the tools stand in the prompt."""
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(example) + "\n", encoding="utf-8")
    (found,) = synthesize.load_examples(file)
    answer = '<tool_call>[{"name": "get_weather", "arguments": {"city": "Köln"}}]</tool_call>'
    assert found["messages"][1:] == [ASKED, {"role": "assistant", "content": answer}]
    assert found["messages"][0] == {"role": "system", "content": toolbox.system_prompt([WEATHER])}
    assert found["calls"] == [CALL]


def test_tools_reach_the_prompt_beside_a_system_message_of_the_examples_own(tmp_path, tokenizer):
    own = {"role": "system", "content": "You are terse."}
    (tmp_path / "data.jsonl").write_text(json.dumps({"tools": [WRAPPED], "messages": [own, *answered("{}")]}))
    (found,) = synthesize.load_examples(tmp_path)
    case = Case("x", "own", [own, ASKED], [WEATHER], [])
    prompt = calls.case_prompt(tokenizer, case)
    assert all(text in prompt for text in ("get_weather", "You are terse."))
    assert chats.chat_text(tokenizer, found["messages"]).startswith(prompt)  # trained on what is evaluated
    stored = synthesize.without_system(found)
    assert stored["messages"][0] == own
    assert synthesize.with_system(stored) == found


def test_several_turns_with_results_keep_their_order_and_the_names_of_functions():
    both = [openai_call({"city": "Rome"}, "a"), openai_call({"city": "Oslo"}, "b")]
    messages = [
        {"role": "developer", "content": "Terse."},
        {"role": "user", "content": ["Two", {"type": "text", "text": "cities."}]},
        {"role": "assistant", "content": "Sure.", "tool_calls": both},
        {"role": "tool", "tool_call_id": "b", "content": "cold"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "hot"}]},
        {"role": "assistant", "reasoning_content": "hm", "content": "Hot and cold."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye", "tool_calls": None},
    ]
    found = chats.normalised({"messages": messages})["messages"]
    assert [m["role"] for m in found] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    assert found[1]["content"] == "Two\ncities."
    assert found[2]["content"].startswith("Sure.\n<tool_call>[{")
    assert found[3:5] == [
        {"role": "tool", "name": "get_weather", "content": "hot"},
        {"role": "tool", "name": "get_weather", "content": "cold"},
    ]
    assert found[5]["content"] == "<think>\nhm\n</think>\n\nHot and cold."


def said(role="user", **message):
    return {"messages": [{"role": role, **message}, {"role": "assistant", "content": "Yes."}]}


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (said(content=3), r"message 1 \(user\): content is 3; it is text"),
        (said(content=None), r"message 1 \(user\): no content"),
        (said(), r"message 1 \(user\): no content"),
        (said("human", content="Hi"), r'message 1: unknown role "human"; choose one of system'),
        (said(None, content="Hi"), r"message 1: unknown role null"),
        (said(content=[{"type": "image_url", "image_url": {"url": "x"}}]), r'"image_url"; only text is kept'),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, r"message 2 \(assistant\) has neither content"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, r"message 2 \(assistant\) has neither content"),
        (
            {"messages": answered("{city: Rome}")},
            r"message 2 \(assistant\): the arguments of 'get_weather' are text th",
        ),
        ({"messages": answered("[1]")}, r"the arguments of 'get_weather' are \[1\]; they are an object"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, r"not a call with a name"),
        ({"messages": [ASKED, ASKED]}, r"the last message is of the role user"),
        ({"messages": []}, r"a list of a request and an answer"),
        (
            {"messages": [*said(content="Hi")["messages"], {"role": "system", "content": "x"}]},
            r"after the chat has beg",
        ),
        ({**said(content="Hi"), "tools": [{"type": "web_search"}]}, r'a tool of the type "web_search"'),
        ({**said(content="Hi"), "tools": [WEATHER, WRAPPED]}, r"'get_weather' stands twice"),
        ({**said(content="Hi"), "tools": [WEATHER], "calls": [CALL]}, r"does not hold the example's calls"),
        (said(content="\ud800"), r"half a surrogate pair"),
        ({**said(content="Hi"), "calls": [{"name": "f", "arguments": {"x": float("nan")}}]}, r"NaN or an infinite"),
        (
            said(content="Hi") | {"messages": [ASKED, {"role": "assistant", "content": "a", "weight": 0}]},
            r"weight 0 is",
        ),
        ("Hi", r'no object with the field messages, but "Hi"'),
        ([said(content="Hi")], r"no object with the field messages"),
    ],
)
def test_what_cannot_be_kept_is_one_line_with_file_and_line(tmp_path, example, message):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(said(content="Hi")) + "\n" + json.dumps(example) + "\n")
    with pytest.raises(ValueError, match=r"^[^\n]*data\.jsonl:2: [^\n]*" + message) as raised:
        synthesize.load_examples(file)
    assert "\n" not in str(raised.value)


def test_blank_lines_byte_order_marks_and_other_line_ends_are_passed_over(tmp_path):
    line = json.dumps(said(content="Hi\u2028there"), ensure_ascii=False)
    file = tmp_path / "data.jsonl"
    file.write_bytes("\r\n".join(["\ufeff" + line, "", "  ", "\ufeff" + line, ""]).encode())
    assert [place[-2:] for place, _ in chats.json_lines(file)] == [":1", ":4"]
    assert [e["messages"][0]["content"] for e in synthesize.load_examples(file)] == ["Hi\u2028there"] * 2


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 10_000, '{"a": 1} {"b": 2}'])
def test_a_line_that_no_reader_can_read_is_named(tmp_path, text):
    (tmp_path / "data.jsonl").write_text(f"\n{text}\n")
    with pytest.raises(ValueError, match=r"data\.jsonl:2: "):
        synthesize.load_examples(tmp_path)


def test_a_file_without_any_example_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text("\ufeff\n\n")
    with pytest.raises(ValueError, match="holds no example"):
        synthesize.load_examples(tmp_path)


TEXT = st.text(max_size=20)
ARGUMENTS = st.dictionaries(
    TEXT, TEXT | st.integers() | st.booleans() | st.none() | st.lists(TEXT, max_size=2), max_size=3
)
CALLS = st.lists(st.builds(dict, name=TEXT.filter(bool), arguments=ARGUMENTS), min_size=1, max_size=3)


@st.composite
def openai_chats(draw):
    """Chats in OpenAI's form: arguments as object or as text, content as text or parts, results, several turns."""
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        content = draw(TEXT)
        messages.append(
            {"role": "user", "content": draw(st.sampled_from([content, [{"type": "text", "text": content}]]))}
        )
        made = draw(CALLS)
        as_text = [c | {"arguments": json.dumps(c["arguments"])} for c in made]
        given = [
            {"id": str(i), "type": "function", "function": c}
            for i, c in enumerate(draw(st.sampled_from([made, as_text])))
        ]
        messages.append({"role": "assistant", "content": draw(st.none() | TEXT), "tool_calls": given})
        messages += [{"role": "tool", "tool_call_id": str(i), "content": draw(TEXT)} for i in range(len(made))]
        messages.append({"role": "assistant", "content": "Done."})
    return {"messages": messages}, made


@given(openai_chats())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_normalising_twice_changes_nothing_and_calls_are_read_back_as_they_were(pair):
    example, made = pair
    once = chats.normalised(example)
    assert chats.normalised(json.loads(json.dumps(once))) == once
    assert [m["role"] for m in once["messages"]] == [m["role"] for m in example["messages"]]
    answer = [m["content"] for m in once["messages"] if m["role"] == "assistant"][-2]
    assert answer.endswith(toolbox.call_text(made))


@given(st.text(max_size=30), st.text(max_size=30).filter(bool))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_preface_is_put_in_once_and_taken_out_again(own, preface):
    for messages in ([ASKED], [{"role": "system", "content": own or "x"}, ASKED]):
        full = chats.prefaced(messages, preface)
        assert full[0]["content"].startswith(preface)
        assert chats.prefaced(full, preface) == full
        if not messages[0]["content"].startswith(preface):
            assert chats.without_preface(full, preface) == messages


# --- rendering

DIALOGUE = [
    {"role": "system", "content": "(the rules)"},
    {"role": "user", "content": "(the request)"},
    {"role": "assistant", "content": "<tool_call>(the call)</tool_call>"},
    {"role": "tool", "name": "f", "content": "(the first result)"},
    {"role": "tool", "name": "g", "content": "(the second result)"},
    {"role": "assistant", "content": "(the answer)"},
]


@pytest.mark.parametrize("name", ["mistral", *PUBLISHED])
def test_every_published_template_shows_all_that_is_said_in_its_order_and_can_be_learned(odd, name):
    """System text, results and answers of the templates of thirty families (TRL's copies), from one road."""
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    tokenizer = odd(MISTRAL if name == "mistral" else path.read_text(), name)
    text = chats.chat_text(tokenizer, DIALOGUE)
    places = [text.find(message["content"]) for message in DIALOGUE]
    assert min(places) >= 0
    assert places == sorted(places)
    for chat in (DIALOGUE, DIALOGUE[1:3]):
        encoded = packing.encode_chat(tokenizer, chat)
        learned = tokenizer.decode([label for label in encoded.labels if label != packing.IGNORED])
        assert chat[-1]["content"] in learned
        assert "(the request)" not in learned


def test_a_template_that_shows_everything_is_rendered_as_plain_transformers_does(tokenizer):
    for prompt, ours in ((True, chats.prompt_text), (False, chats.chat_text)):
        theirs = tokenizer.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=prompt)
        assert ours(tokenizer, DIALOGUE) == theirs


def test_a_template_that_refuses_system_messages_has_them_in_the_first_request_and_it_is_said_once(odd, capsys):
    gemma = odd((Path(trl.__file__).parent / "chat_templates" / "gemma.jinja").read_text(), "gemma-2")
    texts = [chats.prompt_text(gemma, DIALOGUE[:2]) for _ in range(2)]
    assert texts[0] == texts[1]
    assert "<start_of_turn>user\n(the rules)\n\n(the request)<end_of_turn>\n<start_of_turn>model\n" in texts[0]
    assert capsys.readouterr().err.count("gemma-2 holds no system message") == 1


def test_of_several_named_templates_the_default_one_is_taken_and_no_default_is_refused(odd, tokenizer):
    text = tokenizer.chat_template
    named = odd({"default": text, "rag": "{{ raise_exception('not this') }}"})
    assert chats.chat_text(named, DIALOGUE) == chats.chat_text(tokenizer, DIALOGUE)
    assert chats.chat_text(odd({"only": text}), DIALOGUE) == chats.chat_text(tokenizer, DIALOGUE)
    with pytest.raises(ValueError, match="has chat templates rag, tool_use and none is named default"):
        chats.chat_text(odd({"rag": text, "tool_use": text}), DIALOGUE)


def test_a_model_without_a_template_gets_a_substitute_that_is_said(odd, capsys, monkeypatch):
    bare = odd(None, "base-model")
    text = chats.prompt_text(bare, DIALOGUE[:2])
    turns = ("system\n(the rules)<|im_end|>\n", "user\n(the request)<|im_end|>\n", "assistant\n")
    assert text == "".join(f"<|im_start|>{turn}" for turn in turns)
    monkeypatch.setattr(bare, "get_vocab", dict)
    assert chats.prompt_text(bare, DIALOGUE[1:2]).endswith("user: (the request)\nassistant: ")
    said = capsys.readouterr().err
    assert said.count("base-model has no chat template") == 2
    packing.encode_chat(bare, DIALOGUE)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}", "chat template of odd refuses a chat of user.*: Unexpected end"),
        ("{{ raise_exception('never') }}", "chat template of odd refuses a chat of user.*: never"),
        ("{{ nothing.there.at_all }}", "chat template of odd refuses .*'nothing' is undefined"),
        ("{{ 1 + 'a' }}", "chat template of odd refuses .*unsupported operand"),
        ("Hello", "chat template of odd does not show what a user says"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line_that_names_it(odd, template, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        chats.prompt_text(odd(template), [ASKED])


def test_what_no_tokenizer_can_read_and_a_chat_without_messages_are_refused(tokenizer):
    with pytest.raises(ValueError, match="half a surrogate pair"):
        chats.prompt_text(tokenizer, [{"role": "user", "content": "x\udc80"}])
    with pytest.raises(ValueError, match="without any message"):
        chats.prompt_text(tokenizer, [])


def test_reasoning_is_switched_off_and_no_prompt_changes_with_the_day(odd):
    folder = Path(trl.__file__).parent / "chat_templates"
    qwen = odd((folder / "qwen3.jinja").read_text(), "qwen3")
    assert chats.prompt_text(qwen, [ASKED]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    llama = odd((folder / "llama3_2.jinja").read_text(), "llama3_2")
    assert "Today Date: 26 Jul 2024" in chats.prompt_text(llama, [ASKED])


def test_calls_of_a_plain_call_are_those_of_the_parser():
    assert calls.parse_calls(json.dumps(openai_call('{"city": "Köln"}'))) == [Call(**CALL)]
