"""Tools of a chat: which code a tool may name, and what a call gives."""

import json
import random

import pytest

from avalab.data import toolbox
from avalab.data.arguments import kind_of
from avalab.data.calls import Call
from avalab.serve import tools
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


@pytest.fixture
def write(tmp_path):
    def write(content: object):
        path = tmp_path / "tools.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_a_tool_file_is_read_as_it_stands(write):
    assert tools.read_tools(write([COMB, FACTORIAL])) == TOOLS


@pytest.mark.parametrize(
    "name",
    [
        *("os:system", "subprocess:run", "builtins:eval", "math", "math.comb", "math:__loader__", "math:pi", "re:sub"),
        *("statistics:sys", "textwrap:re", "math:no_such", "importlib:import_module", "shlex:os.system", ":comb", ""),
    ],
)
def test_a_callable_outside_the_list_of_pure_functions_is_refused_by_name(write, name):
    with pytest.raises(ValueError, match=r"tools\.json, tool 1: callable '.*'"):
        tools.read_tools(write([COMB | {"callable": name}]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{", "is not JSON"),
        ({"name": "x"}, "holds no list of tools"),
        ([], "holds no list of tools"),
        ([{"name": "x"}], "tool 1: a tool has name, description, parameters, callable"),
        ([COMB, 7], "tool 2: a tool has"),
        ([COMB | {"name": 7}], "are text"),
        ([COMB, COMB], "tool 2: the name 'ways' stands twice"),
        ([COMB | {"parameters": {"type": "object", "properties": {"n": {"type": 5}}}}], "not valid JSON Schema"),
        ([COMB | {"parameters": "none"}], "not valid JSON Schema"),
    ],
)
def test_a_damaged_tool_file_is_refused_with_the_tool_and_the_reason(write, content, said):
    with pytest.raises(ValueError, match=said):
        tools.read_tools(write(content))


def test_every_built_in_tool_runs_with_arguments_of_its_kinds():
    rng, offered = random.Random(0), tools.built_in()
    rows = {row.name: row for row in toolbox.rows()}
    for tool in offered:
        arguments = {p.name: kind_of(p.kind).sample(rng) for p in rows[tool.name].parameters}
        result = tools.execute(offered, Call(tool.name, arguments))
        expected = toolbox.resolve(tool.name)
        value = expected(*arguments.values()) if tool.name.startswith("math.") else expected(**arguments)
        assert result == tools.Result(json.dumps(value, default=str)), tool.name
    assert {tool.name.split(".")[0] for tool in offered} == set(tools.BUILT_IN)


def test_arguments_reach_a_built_in_function_in_the_order_of_the_schema():
    """C(5, 2) = 10; in the order of the call it would be C(2, 5) = 0."""
    assert tools.execute(TOOLS, Call("ways", {"k": 2, "n": 5})).text == "10"


def test_what_never_ends_is_ended_by_the_time_limit():
    result = tools.execute(TOOLS, Call("factorial", {"n": 10**9}), seconds=0.5)
    assert result == tools.Result("no result within 0.5 s", failed=True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (Call("nothing", {}), "there is no function 'nothing'"),
        (Call("ways", {"n": 5}), "'k' is a required property"),
        (Call("ways", {"n": "five", "k": 2}), "'five' is not of type 'integer'"),
        (Call("ways", {"n": 5, "k": 2, "m": 1}), "Additional properties are not allowed"),
        (Call("factorial", {"n": -1}), "ValueError: factorial() not defined for negative values"),
        (Call("factorial", {"n": 2000}), "ValueError: Exceeds the limit"),
    ],
)
def test_a_call_that_cannot_be_made_says_why(call, said):
    result = tools.execute(TOOLS, call)
    assert result.failed
    assert said in result.text


def test_a_tool_made_by_hand_cannot_name_other_code():
    tool = Tool(**COMB | {"callable": "os:system"})
    with pytest.raises(ValueError, match="callable 'os:system' is none of the lab's pure functions"):
        tools.execute([tool], Call("ways", {"n": 5, "k": 2}))
