"""Small wheels of the sources' own form give tools, tasks and examples that pass every gate and repeat no test."""

import gzip
import json
import zipfile
from collections import Counter
from random import Random

import pytest
from transformers import PreTrainedModel  # noqa: F401  before avalab reaches torchao: its warnings are its own

from avalab.data import calls, gates, repeats, sources, synthesize
from avalab.data.sources import ansible, azure, botocore, home_assistant, nestful, recipes, teaching
from avalab.data.sources.catalogue import Catalogue, Step, Task, brief, sayable, slim, snake_case, tool_of
from avalab.lab import assets
from avalab.lab.errors import InputError


def wheel(path, files):
    with zipfile.ZipFile(path / "small.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path / "small.whl"


def test_an_operation_of_botocore_becomes_a_tool_and_its_example_a_task(tmp_path):
    service = {
        "operations": {
            "AttachVolume": {"input": {"shape": "AttachRequest"}, "documentation": "<p>Attaches a volume. More.</p>"}
        },
        "shapes": {
            "AttachRequest": {
                "type": "structure",
                "required": ["VolumeId"],
                "members": {"VolumeId": {"shape": "Id", "documentation": "The volume."}, "Force": {"shape": "Bool"}},
            },
            "Id": {"type": "string"},
            "Bool": {"type": "boolean"},
        },
    }
    given = {"title": "To attach a volume", "input": {"VolumeId": "vol-1"}}
    folder = "botocore/data/ec2/2016-11-15"
    path = wheel(
        tmp_path,
        {
            f"{folder}/service-2.json.gz": gzip.compress(json.dumps(service).encode()),
            f"{folder}/examples-1.json": json.dumps({"examples": {"AttachVolume": [given]}}),
        },
    )
    found = botocore.read(path)
    tool = found.tools["ec2"]["attach_volume"]
    assert tool["description"] == "Attaches a volume."
    assert tool["parameters"]["properties"]["VolumeId"] == {"type": "string", "description": "The volume."}
    assert tool["parameters"]["required"] == ["VolumeId"]
    assert found.tasks == (Task("ec2", "To attach a volume.", (Step("attach_volume", {"VolumeId": "vol-1"}),)),)


AZURE = '''
@register_command("disk show")
class Show(AAZCommand):
    """Show a disk.

    :example: Show one disk of a group.
        az disk show -n MyDisk --resource-group Mine --count 3

    :example: Show what the shell computes.
        az disk show -n $(name) -g Mine
    """

    @classmethod
    def _build_arguments_schema(cls):
        _args_schema = cls._args_schema
        _args_schema.name = AAZStrArg(options=["-n", "--name"], help="Name of the disk.", required=True)
        _args_schema.resource_group = AAZResourceGroupNameArg(required=True)
        _args_schema.count = AAZIntArg(help={"short-summary": "How many."})

    def _execute_operations(self):
        not even Python
'''


def test_a_command_of_azure_is_read_from_its_syntax_tree_alone(tmp_path):
    found = azure.read(wheel(tmp_path, {"azure/cli/command_modules/vm/aaz/latest/disk/_show.py": AZURE}))
    tool = found.tools["disk show"]["disk_show"]
    assert [*tool["parameters"]["properties"]] == ["name", "resource_group", "count"]
    assert tool["parameters"]["required"] == ["name", "resource_group"]
    assert tool["parameters"]["properties"]["count"] == {"type": "integer", "description": "How many."}
    (task,) = found.tasks  # the line that needs a shell is none
    assert task.title == "Show one disk of a group."
    assert task.steps[0].arguments == {"name": "MyDisk", "resource_group": "Mine", "count": 3}


ANSIBLE = '''
DOCUMENTATION = r"""
module: mount
short_description: Control mount points
options:
  path: {description: [Where.], type: path, required: true}
  state: {description: The state., type: str, choices: [mounted, absent]}
"""
EXAMPLES = r"""
- name: Mount the data disk
  ansible.posix.mount: {path: /data, state: mounted}
- name: Mount what a variable names
  ansible.posix.mount: {path: "{{ where }}", state: mounted}
"""
'''


def test_a_module_of_ansible_is_read_and_its_templates_are_left_out(tmp_path):
    found = ansible.read(wheel(tmp_path, {"ansible_collections/ansible/posix/plugins/modules/mount.py": ANSIBLE}))
    assert found.tools["ansible/posix"]["mount"]["parameters"]["required"] == ["path"]
    assert [task.steps[0].arguments for task in found.tasks] == [{"path": "/data", "state": "mounted"}]
    assert not sources.SOURCES["ansible"].kept


def nestful_wheel(path):
    spec = [
        {
            "name": "Find_Place",
            "description": "Find.",
            "query_parameters": {"query": {"type": "string", "required": True}},
        },
        {
            "name": "Near",
            "description": "What is near.",
            "query_parameters": {"lat": {"type": "number", "required": True}},
        },
    ]
    output = [
        {"name": "Find_Place", "arguments": {"query": "Rome"}, "label": "v1", "response": [{"at": {"lat": 41.9}}]},
        {"name": "Near", "arguments": {"lat": "$v1.at.lat$"}, "label": "v2"},
        {"name": "Near", "arguments": {"lat": "$v9.at.lat$"}},
    ]
    rows = [{"input": f"What can I see near Rome on day {i}?", "output": output} for i in range(9)]
    files = {}
    for stem in nestful.SETS.values():
        files |= {f"{stem}-spec.json": json.dumps(spec), f"{stem}-data.json": json.dumps(rows)}
    return wheel(path, files)


def test_a_chain_of_calls_passes_on_what_was_returned_and_ends_where_that_is_not_known(tmp_path):
    task = nestful.read(nestful_wheel(tmp_path)).tasks[0]
    assert [step.arguments for step in task.steps] == [{"query": "Rome"}, {"lat": 41.9}]


def test_no_request_is_both_trained_on_and_in_the_second_test(tmp_path):
    path = nestful_wheel(tmp_path)
    trained = {task.title for task in nestful.read(path).tasks}
    tested = nestful.held_out_cases(path)
    assert trained
    assert tested
    assert trained.isdisjoint(case.messages[0]["content"] for case in tested)
    right = calls.Call("Find_Place", {"query": "Rome"})
    assert all(calls.check_calls(case, [right]).correct for case in tested)


def test_a_sentence_of_home_assistant_says_every_value_of_its_call(tmp_path):
    pytest.importorskip("hassil", reason="sentence templates need hassil: pip install -e '.[calls]'")
    english = {
        "expansion_rules": {"the": "(the|my)"},
        "lists": {"fan_speed": {"range": {"from": 10, "to": 90}}},
        "intents": {
            "HassFanSetSpeed": {
                "data": [{"sentences": ["set [<the>] {area} fan[s] to {fan_speed:percentage}[%| percent]"]}]
            }
        },
    }
    path = wheel(tmp_path, {"home_assistant_intents/data/en.json": json.dumps(english)})
    found = home_assistant.read(path)
    assert found == home_assistant.read(path)
    assert len(found.tasks) == home_assistant.DRAWS
    for task in found.tasks:
        values = task.steps[0].arguments
        assert values["area"] in task.title
        assert str(values["percentage"]) in task.title


# --- recipes ---------------------------------------------------------------------------------------------------------


def small_catalogue():
    """Two services of four tools, and tasks that do not say their values."""
    tools: dict = {}
    tasks = []
    for service, thing in (("files", "folder"), ("mail", "letter")):
        tools[service] = {}
        for verb in ("open", "remove", "rename", "copy"):
            properties = {
                f"{thing}Name": {"type": "string", "description": f"Which {thing} is meant."},
                "times": {"type": "integer", "description": "How often it is tried."},
            }
            name = f"{verb}_{thing}"
            tools[service][name] = tool_of(name, f"{verb.title()} the {thing} of a user.", properties, [f"{thing}Name"])
            for i in range(3):
                step = Step(name, {f"{thing}Name": f"{thing}-{verb}-{i}", "times": i + 2})
                tasks.append(Task(service, f"To {verb} the {thing} for me", (step,)))
    return Catalogue(tools, tuple(tasks))


@pytest.fixture
def small(monkeypatch):
    catalogue = small_catalogue()
    for cached in (recipes._catalogue, recipes._by_service, recipes._chains, recipes.kinds_of):
        cached.cache_clear()
    monkeypatch.setattr(sources, "read_catalogue", lambda name: catalogue)
    yield catalogue
    for cached in (recipes._catalogue, recipes._by_service, recipes._chains, recipes.kinds_of):
        cached.cache_clear()


def test_examples_of_a_source_pass_the_gates_and_are_the_same_for_a_seed(small):
    counts = Counter()
    made = [
        list(synthesize.generate(24, 3, row=gates.standard_gates([]), counts=counts, source="botocore")) for _ in "ab"
    ]
    assert made[0] == made[1]
    assert counts["rejected:schema_validity"] == counts["rejected:grounded"] == 0
    assert {e["licence"] for e in made[0]} == {"Apache-2.0"}
    assert {e["source"] for e in made[0]} == {"botocore:terse"}
    assert {"several_candidates", "no_function"} <= {e["kind"] for e in made[0]}


def test_distractors_are_of_the_same_service_and_refusals_never_offer_what_is_wanted(small):
    for seed in range(60):
        example = recipes.several_candidates("botocore", Random(f"c{seed}"), Random(f"w{seed}"))
        assert len({tool["description"].split()[2] for tool in example["tools"]}) == 1
        refused = recipes.no_function("botocore", Random(f"c{seed}"), Random(f"w{seed}"))
        verb, thing = refused["messages"][0]["content"].split()[0], refused["messages"][0]["content"].split()[2]
        assert not [t for t in refused["tools"] if t["description"].lower().startswith(f"{verb.lower()} the {thing}")]


def test_masking_renames_everything_that_is_described_and_the_calls_with_it():
    tools = [*small_catalogue().tools["mail"].values()][:2]
    call = {"name": tools[0]["name"], "arguments": {"letterName": "a", "times": 2}}
    made, (passed,) = recipes.masked(tools, [call], Random(1))
    assert passed["name"] == made[0]["name"] != tools[0]["name"]
    assert passed["arguments"] == {"arg_1": "a", "arg_2": 2}
    assert [t["description"] for t in made] == [t["description"] for t in tools]
    assert made[0]["parameters"]["required"] == ["arg_1"]


def test_what_is_missing_is_not_said_and_is_asked_for(small):
    example = recipes.missing_argument("botocore", Random(3), Random(4))
    request, answer = (message["content"] for message in example["messages"])
    assert not example["calls"]
    assert "name" in answer
    assert not any(f"-{i}" in request for i in range(3))


def test_a_dialogue_shows_results_that_hold_what_later_calls_pass_on():
    shown = recipes.shown([{"at": {"lat": 41.9, "x": None}, "names": ["a", "b", "c", "d", "e", "f", "g"]}], [41.9])
    assert shown["[0].at.lat"] == 41.9
    assert len(shown) == recipes.SHOWN


def test_a_source_of_chains_gives_dialogues_whose_values_stand_in_what_came_before(small, monkeypatch, tmp_path):
    chains = nestful.read(nestful_wheel(tmp_path))
    monkeypatch.setattr(sources, "read_catalogue", lambda name: chains)
    assert set(recipes.kinds_of("nestful")) == {"multi_turn"}
    seen = set()
    for seed in range(20):
        example = recipes.multi_turn("nestful", Random(seed), Random(seed)) | {"source": "nestful:sentence"}
        assert gates.verdict(synthesize.with_system(example), gates.STANDARD) == ("", "")
        seen.add(len(example["messages"]))
    assert seen == {2, 4}


class Teacher:
    """Says the request in a sentence of its own, and calls what it is told to."""

    def __init__(self, right):
        self.right = right

    def __call__(self, messages):
        task = messages[0]["content"].rpartition("Task: ")[2].split("\n")[0]
        return json.dumps({"request": f"Could you please {task}"})

    def calls(self, example):
        made = example["calls"] if self.right else [{"name": "other", "arguments": {}}]
        return "<tool_call>" + json.dumps(made) + "</tool_call>"

    def calls_ahead(self, examples, *, progress=""):
        pass


def test_a_teacher_says_terse_requests_and_has_to_agree_with_the_calls(small):
    counts = Counter()
    made = list(
        synthesize.generate(8, 1, row=gates.standard_gates([]), counts=counts, source="botocore", teacher=Teacher(True))
    )
    assert all(e["messages"][1]["content"].startswith("Could you please") for e in made)
    assert counts["rejected:agreement"] == 0
    row, kinds = gates.standard_gates([]), ("single_call",)
    never = synthesize.generate(1, 1, row=row, kinds=kinds, source="botocore", teacher=Teacher(False))
    with pytest.raises(InputError, match="agreement"):
        next(never)
    example = next(example for example in made if teaching.asked(example))
    assert "wrong_function" in teaching.agreement_gate(Teacher(False))(example | {"calls": example["calls"][:1]})


def test_an_unknown_source_and_a_kind_that_a_source_has_not_are_refused_by_name(small):
    with pytest.raises(InputError, match="unknown source 'aws'; choose of botocore"):
        sources.source("aws")
    with pytest.raises(InputError, match="unknown kind 'reasoning' of botocore"):
        synthesize.generate(1, 1, row={}, kinds=("reasoning",), source="botocore")


def test_a_set_of_a_source_is_stored_with_its_licence_and_read_back(small, tmp_path):
    report = synthesize.write_examples(tmp_path / "set", count=16, seed=2, sets=[], source="botocore")
    loaded = synthesize.load_examples(tmp_path / "set")
    assert len(loaded) == report["counts"]["accepted"] == 16
    assert all(example["licence"] == "Apache-2.0" for example in loaded)
    assert "botocore (Apache-2.0)" in (tmp_path / "set" / "README.md").read_text()


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_documentation_is_cut_to_its_first_sentence():
    assert brief("<p>Deletes the <code>x</code> of a table. It is gone then.</p>") == "Deletes the x of a table."
    assert brief("<note>Old.</note><p>Lists users</p>") == "Lists users."
    assert len(brief("word " * 100)) <= 161


def test_names_are_cut_into_words():
    assert snake_case("DescribeDBInstances") == "describe_db_instances"
    assert snake_case("vm image list") == "vm_image_list"


def test_what_nobody_would_say_is_no_task():
    assert sayable({"a": 1, "b": ["x", "y"]})
    assert not any(map(sayable, [{}, {"a": []}, {"a": "x" * 60}, {"a": None}, dict.fromkeys("abcdefg", 1)]))


def test_a_tool_keeps_what_is_required_or_used_and_a_few_more():
    tool = tool_of("f", "Do.", {c: {"type": "string"} for c in "abcdefgh"}, ["h"])
    assert [*slim(tool, ["f"])["parameters"]["properties"]] == ["a", "b", "c", "f", "h"]


# --- the real wheels, where they are here ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["botocore", "home-assistant", "nestful"])
def test_examples_of_the_real_wheel_share_no_name_and_no_eight_words_with_an_evaluation_set(name):
    if assets.verified(sources.SOURCES[name].asset) is None:
        pytest.skip(f"asset {sources.SOURCES[name].asset} is not fetched: avalab assets {sources.SOURCES[name].asset}")
    sets = repeats.evaluation_sets()
    made = list(synthesize.generate(20, 5, row=gates.standard_gates(sets), source=name))
    again = repeats.overlap_gate(sets)
    assert [again(example) for example in made] == [""] * 20
