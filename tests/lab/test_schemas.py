"""Schemas: translated from every dialect, and a grammar, gates and checker that agree with jsonschema."""

import json

import jsonschema
import pytest
import xgrammar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from avalab.data import calls, gates, grammars
from avalab.data.calls import Call, Case
from avalab.lab.run import ROOT
from avalab.lab.schemas import Rewriting, to_json_schema

UNIT = {"type": "string", "enum": ["C", "F"]}
TREE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "null"}]}},
    "required": ["v"],
}


@pytest.fixture(scope="module")
def compiler():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-llama")
    return grammars.grammar_compiler(tokenizer, len(tokenizer))


def tool(parameters, name="f"):
    return {"name": name, "description": "", "parameters": parameters}


def of_x(schema, **more):
    return {"type": "object", "properties": {"x": schema}, "required": ["x"], "additionalProperties": False, **more}


def grammar_takes(compiler, parameters, arguments, name="f"):
    """Whether a call with these arguments is among the texts of the tool's grammar."""
    grammar = grammars.call_grammar(compiler, [tool(parameters, name), tool({"type": "object"}, "g")], refusal=False)
    matcher = xgrammar.GrammarMatcher(grammar.compiled)
    text = json.dumps([{"name": name, "arguments": arguments}], ensure_ascii=False)
    taken = matcher.accept_string(f"<tool_call>{text}</tool_call>") and matcher.is_completed()
    return taken, name in grammar.loosened


def checker_takes(parameters, arguments, expected):
    """Whether the checker takes the arguments where others are expected."""
    case = Case("x", "own", [], [tool(parameters)], calls.accepted_calls([{"name": "f", "arguments": expected}]))
    return calls.check_calls(case, [Call("f", arguments)]).correct


def gate_takes(parameters, arguments):
    call = {"name": "f", "arguments": arguments}
    messages = [{"role": "user", "content": "Do"}, {"role": "assistant", "content": calls.toolbox.call_text([call])}]
    example = {"kind": "single_call", "tools": [tool(parameters)], "messages": messages, "calls": [call]}
    return gates.schema_validity(example) == ""


NEXT = {"v": {"type": "integer"}, "next": {"$ref": "#"}}
TUPLE = {"type": "array", "items": [{"type": "integer"}, {"type": "string"}], "additionalItems": False}
KEYWORDS = {
    "type": UNIT,
    "items": {"type": "array", "items": UNIT},
    "properties": {"type": "object"},
    "$ref": UNIT,
    "enum": UNIT,
}
BFCL_INSIDE = {
    "anyOf": [{"type": "dict", "properties": {"a": {"type": "float"}}}, {"type": "tuple", "items": {"type": "integer"}}]
}
BOTH = [of_x(UNIT, additionalProperties=True), {"type": "object", "properties": {"y": UNIT}, "required": ["y"]}]
EITHER = {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}


def defined(reference, **definitions):
    return of_x(reference, **{"$defs": definitions})


def unit(**more):
    return {"$ref": "#/$defs/U", **more}


@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        (defined(unit(), U=UNIT), {"x": "C"}, {"x": "K"}),
        (of_x({"$ref": "#/definitions/Unit"}, definitions={"Unit": UNIT}), {"x": "C"}, {"x": "K"}),
        (defined({"$ref": "#/$defs/a~1b"}, **{"a/b": UNIT}), {"x": "C"}, {"x": "K"}),
        (defined(unit(minimum=3), U={"type": "integer"}), {"x": 3}, {"x": 2}),
        (defined({"allOf": [unit()], "default": "C"}, U=UNIT), {"x": "F"}, {"x": "K"}),
        (of_x({"allOf": [{"type": "number"}, {"maximum": 3}, {"type": "integer"}]}), {"x": 3}, {"x": 4}),
        (of_x({"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}), {"x": None}, {"x": 1}),
        (of_x({"type": "integer", "anyOf": [{"minimum": 9}, {"maximum": 1}]}), {"x": 9}, {"x": 5}),
        (of_x({"oneOf": [{"type": "string"}, {"type": "integer"}]}), {"x": 1}, {"x": None}),
        (of_x({"type": ["string", "null"]}), {"x": "a"}, {"x": 1}),
        (of_x({"type": "string", "nullable": True}), {"x": None}, {"x": 1}),
        (of_x({"type": "string", "enum": ["a"], "nullable": True}), {"x": None}, {"x": "b"}),
        (defined(unit(nullable=True), U=UNIT), {"x": None}, {"x": 1}),
        (of_x(True), {"x": {"any": [1]}}, {}),
        (of_x({"type": "integer"}) | {"properties": {"x": True, "y": False}}, {"x": 1}, {"x": 1, "y": 1}),
        (of_x({"enum": ["°C", "华氏", "½ f"]}), {"x": "°C"}, {"x": "C"}),
        (of_x({"enum": [{"a": [1, {}]}, [], "b"], "type": ["object", "array"]}), {"x": {"a": [1, {}]}}, {"x": "b"}),
        (of_x({"const": [1, "a"]}), {"x": [1, "a"]}, {"x": [1]}),
        (of_x({"minLength": 2}), {"x": 5}, {"x": "a"}),
        (of_x({"properties": {"a": {"type": "integer"}}}), {"x": 5}, {"x": {"a": "b"}}),
        (of_x(TUPLE), {"x": [1]}, {"x": [1, "a", 2]}),
        ({"type": "object", "required": ["z"]}, {"z": 1}, {}),
        ({"type": "object"}, {"any": 1}, None),
        ({}, {"any": 1}, None),
        ({"properties": {}}, {}, {"x": 1}),
        ({"$ref": "#/$defs/P", "$defs": {"P": of_x(UNIT)}}, {"x": "C"}, {"x": 1}),
        (defined({"$ref": "#/$defs/Tree"}, Tree=TREE), {"x": {"v": 1, "next": {"v": 2}}}, {"x": {"v": 1, "next": {}}}),
        (TREE | {"properties": NEXT}, {"v": 1, "next": {"v": 2}}, {"v": 1, "next": {}}),
        ({"properties": KEYWORDS, "required": ["type"]}, {"type": "C", "items": ["F"], "$ref": "C"}, {"type": 1}),
        ({"type": "dict", "properties": {"p": BFCL_INSIDE}}, {"p": {"a": 1.5}}, {"p": {"a": "b"}}),
        ({"allOf": BOTH}, {"x": "C", "y": "F"}, {"x": "C"}),
        ({"properties": {"a": UNIT, "b": UNIT}, **EITHER}, {"b": "C"}, {}),
    ],
)
def test_grammar_gates_and_checker_agree_on_every_kind_of_schema(compiler, parameters, right, wrong):
    assert gates.checked_schema(tool(parameters))
    assert grammar_takes(compiler, parameters, right) == (True, False)
    assert gate_takes(parameters, right)
    assert checker_takes(parameters, right, right)
    if wrong is not None:
        assert grammar_takes(compiler, parameters, wrong) == (False, False)
        assert not gate_takes(parameters, wrong)
        assert not checker_takes(parameters, wrong, right)


def test_a_tool_without_parameters_takes_no_argument(compiler):
    bare = {"name": "now", "description": ""}
    assert gates.checked_schema(bare)["properties"] == {}
    case = Case("x", "own", [], [bare], [{"now": {}}])
    assert calls.check_calls(case, [Call("now", {})]).correct
    assert calls.check_calls(case, [Call("now", {"x": 1})]).error == "extra_argument"
    assert grammars.call_grammar(compiler, [bare], refusal=False).loosened == ()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (of_x({"$ref": "#/$defs/Missing"}), r"\$ref '#/\$defs/Missing' leads nowhere"),
        (of_x({"$ref": "https://json.org/x"}), r"leads out of the schema; write it as #/\$defs/Name"),
        (of_x({"$ref": "#/$defs/A"}, **{"$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}]}}}), "leads back to itself"),
        (of_x({"$ref": "#/required"}), "leads to no schema"),
        ({"type": "string"}, "parameters are of the type string; arguments are an object"),
        ([], r"parameters are \[\]; they are the JSON schema of an object"),
        (of_x(3), "a schema is an object, true or false; this is 3"),
        (of_x({"type": "text"}), "'text' is not valid"),
        (of_x({"enum": "a"}), "'a' is not of type 'array'"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_one_line_with_the_tools_name(parameters, message):
    with pytest.raises(ValueError, match=rf"^tool 'f' is not valid JSON Schema: .*{message}[^\n]*$"):
        gates.checked_schema(tool(parameters))


def test_a_schema_too_large_to_write_out_is_loosened_and_named(compiler):
    """Each definition names the one before twice: written out, there would be a million."""
    layers = {"L0": UNIT} | {
        f"L{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/L{i - 1}"}] * 2} for i in range(1, 20)
    }
    parameters = of_x({"$ref": "#/$defs/L19"}, **{"$defs": layers})
    assert grammar_takes(compiler, parameters, {"x": 3}) == (True, True)


# --- properties: on the same values, the same judgement as jsonschema's

NAMES = st.sampled_from("abc")
SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["", "a", "°C", 'q"\\é', "long text"])


def values(depth=2):
    if not depth:
        return SCALARS
    inner = values(depth - 1)
    return SCALARS | st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)


@st.composite
def objects(draw, depth):
    named = draw(st.dictionaries(NAMES, schemas(depth - 1), max_size=3))
    made = {
        "type": "object",
        "properties": dict(sorted(named.items())),
        "additionalProperties": draw(st.booleans() | schemas(depth - 1)),
    }
    if required := draw(st.lists(st.sampled_from(sorted(named)), unique=True)) if named else []:
        made["required"] = required
    return made


def schemas(depth=2):
    """JSON Schemas over small values: every composition, references to two definitions, one of which holds itself."""
    leaves = st.sampled_from(
        [
            True,
            {},
            {"type": "string"},
            {"type": "integer"},
            {"type": "number"},
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["string", "null"]},
            {"type": ["integer", "object"]},
            {"minLength": 2},
            {"type": "integer", "minimum": -1, "exclusiveMaximum": 4},
            {"type": "integer", "multipleOf": 2},
            {"type": "string", "minLength": 1, "maxLength": 3},
            {"const": "°C"},
            {"enum": ["a", 1, None, [1, "a"], {"a": 1}]},
            {"type": "string", "enum": ["a", 1]},
            {"$ref": "#/$defs/Unit"},
            {"$ref": "#/$defs/Tree"},
        ]
    )
    if not depth:
        return leaves
    inner = schemas(depth - 1)
    several = st.lists(inner, min_size=1, max_size=2)
    lists = st.builds(dict, type=st.just("array"), items=inner | st.just(False), maxItems=st.integers(0, 3))
    tuples = st.builds(dict, type=st.just("array"), prefixItems=several, items=st.just(False) | inner)
    unions = st.builds(lambda members: {"anyOf": members}, several)
    meets = st.builds(lambda members: {"allOf": members}, several)
    beside = st.builds(
        lambda members, kind: {"anyOf": members, "type": kind}, several, st.sampled_from(["object", "integer"])
    )
    return st.one_of(leaves, objects(depth), lists, tuples, unions, meets, beside)


DEFS = {
    "Unit": {"enum": ["C", "°C"]},
    "Tree": {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/Tree"}, "b": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "integer"}]}},
        "additionalProperties": False,
    },
}


def in_order(value, schema_order="abc"):
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in schema_order if key in value}
    return [in_order(item) for item in value] if isinstance(value, list) else value


@given(schema=schemas(), drawn=st.lists(values(), min_size=3, max_size=6))
@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_on_any_schema_grammar_gates_and_checker_judge_a_value_as_jsonschema_does(compiler, schema, drawn):
    """A grammar may have been loosened: then it says so, and still takes whatever is valid."""
    parameters = of_x(schema, **{"$defs": DEFS})
    jsonschema.Draft202012Validator.check_schema(parameters)
    validator = jsonschema.Draft202012Validator(parameters)
    valid = validator.is_valid
    assert gates.checked_schema(tool(parameters))
    all_arguments = [{"x": value} for value in map(in_order, drawn)]
    for arguments in all_arguments:
        right = valid(arguments)
        taken, loosened = grammar_takes(compiler, parameters, arguments)
        assert taken == right or (taken and loosened), (parameters, arguments)
        assert gate_takes(parameters, arguments) == right
        for expected in filter(valid, all_arguments):
            same = json.dumps(arguments) == json.dumps(expected)
            assert checker_takes(parameters, arguments, expected) == same


def test_the_rewriting_of_an_exact_schema_says_that_it_is_exact():
    assert Rewriting(to_json_schema(tool(of_x(UNIT)))).exact
