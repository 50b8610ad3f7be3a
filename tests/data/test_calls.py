"""Function-calling cases, parsing and the checker; the reference's verdicts are recorded in tests/data."""

import json
from functools import partial
from pathlib import Path

import jsonschema
import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st

from avalab.data.calls import ERRORS, Call, Case, Verdict, check_calls, load_cases, parse_calls
from avalab.lab.schemas import to_json_schema

RECORDED = Path(__file__).parent.parent / "data" / "bfcl_verdicts.jsonl"
REFERENCE_ERRORS = {  # the reference's error type, up to the colon where the rest does not matter -> ours
    "simple_function_checker:wrong_func_name": "wrong_function",
    "simple_function_checker:missing_required": "missing_argument",
    "simple_function_checker:missing_optional": "missing_argument",
    "simple_function_checker:unexpected_param": "extra_argument",
    "type_error": "wrong_type",
    "value_error": "wrong_value",
}
WEATHER = {
    "name": "weather.get",
    "description": "Weather of a city.",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string", "description": "City name"},
            "days": {"type": "integer", "default": 1},
            "limits": {"type": "dict", "properties": {"low": {"type": "float"}}, "required": ["low"]},
            "span": {"type": "tuple", "items": {"type": "float"}},
            "note": {"type": "any"},
        },
        "required": ["city"],
    },
}


def weather_case(category="simple_python", **accepted):
    return Case("x", category, [{"role": "user", "content": "?"}], [WEATHER], [{"weather.get": accepted}])


def judge(case, *calls):
    return check_calls(case, [Call("weather.get", arguments) for arguments in calls])


def recorded():
    for line in RECORDED.read_text().splitlines():
        row = json.loads(line)
        case = Case(row["id"], row["category"], [], row["function"], row["expected"])
        for _, calls, reference in row["answers"]:
            yield case, [Call(name, arguments) for name, arguments in calls], reference


def test_every_recorded_answer_gets_the_verdict_of_the_reference_checker():
    """Where the reference raises instead of answering (a list of dictionaries holding something else), it is wrong."""
    differing, count = [], 0
    for case, calls, reference in recorded():
        count += 1
        if check_calls(case, calls).correct != (reference == ""):
            differing.append((case.id, calls, reference))
    assert count >= 1000
    assert not differing, differing[:3]


def test_the_error_class_is_the_one_the_reference_names():
    for case, calls, reference in recorded():
        kind = reference if reference.startswith("simple_function") else reference.split(":")[0]
        if kind in REFERENCE_ERRORS:
            assert check_calls(case, calls).error == REFERENCE_ERRORS[kind]
        elif reference.endswith("wrong_count"):
            assert check_calls(case, calls).error in ("wrong_count", REFERENCE_ERRORS.get(kind))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"city": "new york", "days": 2}, ""),
        ({"city": "New-York.", "days": 2}, ""),  # case, spaces and punctuation do not count
        ({"city": "New York"}, ""),  # days may be left out
        ({"days": 2}, "missing_argument"),
        ({"city": "New York", "limits": {"low": 1.0}}, "extra_argument"),
        ({"city": "New York", "days": "2"}, "wrong_type"),
        ({"city": "New York", "days": 3}, "wrong_value"),
        ({"city": "Boston"}, "wrong_value"),
    ],
)
def test_each_departure_from_the_accepted_call_has_its_own_error_class(arguments, error):
    case = weather_case(city=["New York", "NYC"], days=[2, ""])
    verdict = judge(case, arguments)
    assert (verdict.correct, verdict.error) == (not error, error)
    assert error == "" or error in ERRORS


def test_an_integer_passes_for_a_float_but_a_boolean_and_a_float_for_an_integer_do_not():
    number = {
        **WEATHER,
        "parameters": {**WEATHER["parameters"], "properties": {"x": {"type": "float"}}, "required": []},
    }
    case = Case("x", "simple_python", [], [number], [{"weather.get": {"x": [1.0]}}])
    assert judge(case, {"x": 1}).correct
    assert judge(case, {"x": True}).error == "wrong_type"
    assert judge(weather_case(days=[1], city=[""]), {"city": "", "days": 1.0}).error == "wrong_type"


def test_parallel_calls_may_come_in_any_order_but_each_counts_once():
    accepted = [{"weather.get": {"city": [city]}} for city in ("Rome", "Oslo")]
    case = Case("x", "parallel", [], [WEATHER], accepted)
    assert judge(case, {"city": "Oslo"}, {"city": "Rome"}).correct
    assert judge(case, {"city": "Oslo"}, {"city": "Oslo"}) == Verdict(False, "wrong_value", "city='Oslo'")
    assert judge(case, {"city": "Oslo"}).error == "wrong_count"


def test_another_function_is_a_wrong_function_also_when_only_the_dot_is_replaced():
    case = weather_case(city=["Rome"])
    assert check_calls(case, [Call("weather_get", {"city": "Rome"})]).error == "wrong_function"


def test_an_irrelevance_case_is_right_exactly_when_nothing_is_called():
    case = Case("x", "irrelevance", [], [WEATHER], [])
    assert check_calls(case, "no_call") == Verdict(True)
    assert check_calls(case, "not_json") == Verdict(True, "not_json")
    assert judge(case, {"city": "Rome"}) == Verdict(False, "unwanted_call", "weather.get")


def test_a_text_without_a_readable_call_carries_its_error_class_into_the_verdict():
    assert check_calls(weather_case(city=["Rome"]), parse_calls("I cannot help.")) == Verdict(False, "no_call")
    assert check_calls(weather_case(city=["Rome"]), parse_calls("<tool_call>[{</tool_call>")) == Verdict(
        False, "not_json"
    )


CALLS = [Call("a.f", {"x": 1, "s": "it's [1]"}), Call("g", {"ok": True, "list": [1, {"k": None}]})]
AS_JSON = json.dumps([{"name": call.name, "arguments": call.arguments} for call in CALLS])
ONE_BY_ONE = [json.dumps({"name": call.name, "arguments": call.arguments}) for call in CALLS]


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>{AS_JSON}</tool_call>",
        f"Sure.\n<tool_call>\n{AS_JSON}\n</tool_call>\nDone.",
        f"<tool_call>{AS_JSON}",
        "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in ONE_BY_ONE),
        f" {AS_JSON}\n",
        f"Here:\n```json\n{AS_JSON}\n```",
        """[a.f(x=1, s="it's [1]"), g(ok=True, list=[1, {'k': None}])]""",
        "<tool_call>[a.f(x=1, s=\"it's [1]\"), g(ok=True, list=[1, {'k': None}])]</tool_call>",
        AS_JSON.replace("arguments", "parameters"),
        json.dumps(
            [{"type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}} for c in CALLS]
        ),
    ],
)
def test_the_same_calls_are_read_from_every_form_models_write(text):
    assert parse_calls(text) == CALLS


def test_a_single_call_may_stand_alone():
    assert parse_calls(ONE_BY_ONE[0]) == CALLS[:1]
    assert parse_calls("g(n=-1, v=x.y)") == [Call("g", {"n": -1, "v": "x.y"})]
    assert parse_calls('{"name": "now"}') == [Call("now", {})]


A, G = CALLS
A_LLAMA, G_LLAMA = (json.dumps({"name": call.name, "parameters": call.arguments}) for call in CALLS)
MENTION = '<tool_call>{"name": "wrong", "arguments": {}}</tool_call>'
FG, THEN_G = [Call("f", {"x": 1}), Call("g", {})], [Call("f", {"x": 1}), Call("g", {"y": "a"})]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # Qwen 2.5, Qwen 3, Hermes: a block a call; reasoning first
        (f"<think>\nI could call {MENTION} or not.\n</think>\n\n<tool_call>\n{ONE_BY_ONE[0]}\n</tool_call>", [A]),
        (f"I may call {MENTION}.\n</think>\n<tool_call>\n{ONE_BY_ONE[0]}\n</tool_call>", [A]),
        (f"<think>{MENTION}</think>No function fits.", "no_call"),
        (f"<think>Perhaps {MENTION} and then", "no_call"),
        (f"<scratch_pad>{MENTION}</scratch_pad><tool_call>{ONE_BY_ONE[0]}</tool_call>", [A]),
        (f"<tool_call>{ONE_BY_ONE[0]}</tool_call><think>{MENTION}</think><tool_call>{ONE_BY_ONE[1]}", CALLS),
        (
            '<tool_call>{"name": "f", "arguments": {"s": "a </think> b"}}</tool_call>',
            [Call("f", {"s": "a </think> b"})],
        ),
        (f"<tool_call>\n{ONE_BY_ONE[0]}\n{ONE_BY_ONE[1]}\n</tool_call>", CALLS),
        (f"<tool_call>{ONE_BY_ONE[0]}, {ONE_BY_ONE[1]}</tool_call>", CALLS),
        (f"<tool_call>{ONE_BY_ONE[0]}}}</tool_call>", "not_json"),
        (f"<tool_call>\n```json\n{ONE_BY_ONE[0]}\n```\n</tool_call>", [A]),
        # Qwen 2.5 Coder: bare JSON, and on it goes
        (f"{ONE_BY_ONE[0]}\n{ONE_BY_ONE[1]}", CALLS),
        (f"{ONE_BY_ONE[0]}\n\nThis call does what you asked for.", [A]),
        (f"{ONE_BY_ONE[0]}<|im_end|>\n<|im_start|>user\nThanks", [A]),
        (f"To do that, I call:\n{AS_JSON}\nDone.", CALLS),
        (f"{ONE_BY_ONE[0]}}}", "not_json"),
        (f'{ONE_BY_ONE[0]}\n{{"name": "g", "argu', "not_json"),
        ('The answer is {"name": "Rome"}, [1].', "no_call"),
        # Qwen 3 Coder: tags
        (
            "<tool_call>\n<function=a.f>\n<parameter=x>\n1\n</parameter>\n<parameter=s>\nit's [1]\n</parameter>\n"
            "</function>\n</tool_call>",
            [A],
        ),
        # Llama 3.1, 3.2
        (f"{A_LLAMA}<|eot_id|>", [A]),
        (f"<|python_tag|>{A_LLAMA}; {G_LLAMA}<|eom_id|>", CALLS),
        ('{"type": "function", "name": "now", "parameters": {}}', [Call("now", {})]),
        ('<function=now>{"zone": "UTC"}</function>', [Call("now", {"zone": "UTC"})]),
        ("[f(x=1), g(y='a')]\n\nThese two.", THEN_G),
        # Mistral, with and without its own tokens
        (f"[TOOL_CALLS] {AS_JSON}</s>", CALLS),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "VvvODy9mT"}]</s>', FG[:1]),
        ('[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[CALL_ID]a1[ARGS]{}</s>', FG),
        ('f{"x": 1}', FG[:1]),
        ('[THINK]f[ARGS]{"x": 2}[/THINK][TOOL_CALLS]f{"x": 1}', FG[:1]),
        ("[TOOL_CALLS] nothing", "not_json"),
        # Gemma: fenced Python or JSON
        ("```tool_code\nf(x=1)\n```", FG[:1]),
        ("```tool_code\nprint(f(x=1))\ng(y='a')\n```\nI ran both.", THEN_G),
        ("First.\n```tool_code\nf(x=1)\n```\nThen.\n```tool_code\ng()\n```", FG),
        ("```python\n[f(x=1), g()]\n```", FG),
        (f"```json\n{ONE_BY_ONE[0]}\n{ONE_BY_ONE[1]}\n```", CALLS),
        (f"```json\n{AS_JSON}", CALLS),
        ("```python\nx = 1\n```", "no_call"),
    ],
)
def test_what_published_templates_write_is_read_as_they_mean_it(text, found):
    assert parse_calls(text) == found


FAMILIES = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_6", "llama3_1", "llama3_2", "nemotron_3_nano")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_published_template_renders_is_read_back(tokenizer, family):
    """The templates of TRL, rendered by transformers: whatever they make of calls, these calls are found in it."""
    template = (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text()
    render = partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
    asked = [{"role": "user", "content": "Where?"}]
    prompt = render(asked, add_generation_prompt=True)
    for city in ("Köln", "New York, NY", "it's"):
        made = [Call("find", {"city": city, "days": 3, "near": [True, None]}), Call("geo.now", {"zone": "UTC"})]
        made = made[:1] if family.startswith("llama") else made  # its template writes one
        calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in made]
        whole = render([*asked, {"role": "assistant", "content": "", "tool_calls": calls}])
        assert parse_calls(whole[len(prompt) :]) == made


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no_call"),
        ("Which city do you mean?", "no_call"),
        ("[]", "no_call"),
        ("<tool_call>[]</tool_call>", "no_call"),
        ("<tool_call>Rome</tool_call>", "not_json"),
        ('[{"name": "f", "arguments": {', "not_json"),
        ('{"city": "Rome"}', "not_json"),
        ('{"name": "f", "arguments": [1]}', "not_json"),
        ("[f(1)]", "not_json"),
        ("f(x=1", "not_json"),
        ("[" * 100_000, "not_json"),
        ("f(" * 5_000, "not_json"),
    ],
)
def test_text_that_holds_no_readable_call_gives_an_error_class(text, error):
    assert parse_calls(text) == error


@given(st.text() | st.text(alphabet='<tool_call>/[]{}":,fa=1()`\n '))
def test_parsing_never_raises_and_gives_calls_or_an_error_class(text):
    result = parse_calls(text)
    assert result in ("no_call", "not_json") or all(isinstance(call, Call) for call in result)


def test_the_json_schema_of_a_function_translates_types_at_every_depth():
    schema = to_json_schema(WEATHER)
    properties = schema["properties"]
    assert schema["type"] == "object"
    assert schema["required"] == ["city"]
    assert properties["limits"]["properties"]["low"] == {"type": "number"}
    assert properties["span"] == {"type": "array", "items": {"type": "number"}}
    assert properties["note"] == {}
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate({"city": "Rome", "span": [1, 2.5], "note": [None], "limits": {"low": 3}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"city": "Rome", "unknown": 1}, schema)


def write_category(folder, category, lines, answers=None):
    (folder / "possible_answer").mkdir(exist_ok=True)
    (folder / f"BFCL_v4_{category}.json").write_text("\n".join(lines) + "\n")
    if answers is not None:
        (folder / "possible_answer" / f"BFCL_v4_{category}.json").write_text("\n".join(answers) + "\n")


def question(number):
    messages = [[{"role": "user", "content": f"Question {number}"}]]
    return json.dumps({"id": f"simple_python_{number}", "question": messages, "function": [WEATHER]})


def answer(number):
    return json.dumps({"id": f"simple_python_{number}", "ground_truth": [{"weather.get": {"city": [str(number)]}}]})


def test_cases_join_questions_with_their_answers_by_id(tmp_path):
    write_category(tmp_path, "simple_python", [question(0), question(1)], [answer(1), answer(0)])
    cases = load_cases(tmp_path, "simple_python")
    assert [case.expected for case in cases] == [[{"weather.get": {"city": [n]}}] for n in ("0", "1")]
    assert cases[0].messages == [{"role": "user", "content": "Question 0"}]
    assert load_cases(tmp_path, "simple_python", limit=1) == cases[:1]


def test_an_irrelevance_category_needs_no_answers(tmp_path):
    write_category(tmp_path, "irrelevance", [question(0)])
    assert load_cases(tmp_path, "irrelevance")[0].expected == []


def test_loading_names_the_damaged_line_the_unknown_category_and_the_missing_file(tmp_path):
    write_category(tmp_path, "simple_python", [question(0), "{"], [answer(0)])
    with pytest.raises(ValueError, match=r"BFCL_v4_simple_python\.json:2: not JSON"):
        load_cases(tmp_path, "simple_python")
    write_category(tmp_path, "simple_python", [question(0), '{"id": 1}'], [answer(0)])
    with pytest.raises(ValueError, match=r":2: no field question, function"):
        load_cases(tmp_path, "simple_python")
    with pytest.raises(ValueError, match=r"simple_java.*choose one of simple_python"):
        load_cases(tmp_path, "simple_java")
    with pytest.raises(FileNotFoundError, match="BFCL_v4_multiple"):
        load_cases(tmp_path, "multiple")


def test_a_question_without_its_answer_is_refused(tmp_path):
    write_category(tmp_path, "simple_python", [question(0), question(1)], [answer(0)])
    with pytest.raises(ValueError, match="simple_python_1"):
        load_cases(tmp_path, "simple_python")
