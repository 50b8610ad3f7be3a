"""The tools that exist without a download: split by name, described as they are, asked for in full."""

import inspect
import json

import jsonschema
import pytest

from avalab.data import toolbox


def test_train_and_heldout_chats_name_no_common_function():
    names = {
        split: {tool["name"] for chat in toolbox.function_calling_examples(400, 0, split) for tool in chat["tools"]}
        for split in toolbox.SPLITS
    }
    assert len(names["train"]) > 25
    assert len(names["heldout"]) >= 8
    assert names["train"].isdisjoint(names["heldout"])


def test_every_tool_is_a_valid_function_description_with_a_name_of_its_own():
    described = toolbox.tools()
    assert len({tool["name"] for tool in described}) == len(described) >= 40
    for tool in described:
        jsonschema.Draft202012Validator.check_schema(tool["parameters"])
        assert set(tool["parameters"]["required"]) <= set(tool["parameters"]["properties"])
        assert len(tool["description"]) > 10


def test_the_same_seed_gives_the_same_chats_and_another_seed_others():
    first, again, other = (list(toolbox.function_calling_examples(20, seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("split", toolbox.SPLITS)
def test_every_call_satisfies_the_schema_of_a_listed_tool(split):
    for example in toolbox.function_calling_examples(300, 3, split):
        schemas = {tool["name"]: tool["parameters"] for tool in example["tools"]}
        for call in example["calls"]:
            jsonschema.validate(call["arguments"], schemas[call["name"]] | {"additionalProperties": False})


def test_the_answer_is_the_calls_as_json():
    for example in toolbox.function_calling_examples(50, 4):
        answer = example["messages"][-1]["content"].removeprefix("<tool_call>").removesuffix("</tool_call>")
        assert json.loads(answer) == example["calls"]


@pytest.mark.parametrize("split", toolbox.SPLITS)
def test_the_request_names_every_argument(split):
    for example in toolbox.function_calling_examples(300, 7, split):
        request = example["messages"][1]["content"].lower()
        for value in example["calls"][0]["arguments"].values():
            for part in value if isinstance(value, list) else [value]:
                assert str(part).lower() in request


@pytest.mark.parametrize("split", toolbox.SPLITS)
def test_a_call_of_a_library_tool_can_be_carried_out(split):
    for example in toolbox.function_calling_examples(300, 8, split):
        name, arguments = example["calls"][0]["name"], dict(example["calls"][0]["arguments"])
        if "." in name:
            function = toolbox.resolve(name)
            kinds = {parameter.name: parameter.kind for parameter in inspect.signature(function).parameters.values()}
            positional = [arguments.pop(p) for p in kinds if kinds[p] == inspect.Parameter.POSITIONAL_ONLY]
            function(*positional, **arguments)


def test_a_library_tool_requires_what_its_signature_requires():
    for tool in toolbox.tools():
        if "." in tool["name"]:
            parameters = inspect.signature(toolbox.resolve(tool["name"])).parameters
            listed = [parameters[name] for name in tool["parameters"]["properties"]]
            required = [p.name for p in listed if p.default is inspect.Parameter.empty]
            assert tool["parameters"]["required"] == required, tool["name"]


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown split 'test'; choose one of train, heldout"):
        toolbox.function_calling_examples(1, 0, "test")
