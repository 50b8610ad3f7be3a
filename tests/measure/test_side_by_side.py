"""The sheet: requests that are read or refused, answers that are kept, an order for each rater, and nobody's name."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel  # noqa: F401  (before what reaches torchao)

from avalab.data import toolbox
from avalab.lab import artifacts
from avalab.measure import people
from avalab.measure.people import Prompt

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny-llama"
ASKED = [Prompt("question", (), "Why?"), Prompt("call", ("math.comb",), "Choose 2 of 5.")]
ANSWERED = {"bf16": ["Because.", "10"], "nf4-dq": ["because", "10 "], "tiny": ["", "11"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    def save(folder: Path) -> None:
        for file in TINY.iterdir():
            if file.suffix in (".json", ".safetensors", ".jinja"):
                (folder / file.name).write_bytes(file.read_bytes())

    base, out = {"name": "x", "sha256": "y"}, tmp_path_factory.mktemp("a")
    return artifacts.write_artifact("tiny", out, save, base=base, recipe=[], format="bf16")


def lines(tmp_path, *rows: str) -> Path:
    path = tmp_path / "requests.txt"
    path.write_text("# a comment\n" + "\n".join(rows) + "\n")
    return path


# --- requests ----------------------------------------------------------------------------------------------------


def test_every_kind_of_request_is_among_the_first_seven_and_no_two_are_equal():
    asked = people.prompts()
    assert {p.kind for p in asked[:7]} == {*people.PLAIN_KINDS, *people.TOOL_KINDS}
    assert len({p.key for p in asked}) == len(asked) >= 20
    assert asked[:4] == people.prompts(4)


def test_tools_on_offer_are_ones_that_training_never_sees():
    offered = {name for prompt in people.prompts() for name in prompt.tools}
    assert {toolbox.split_of(name) for name in offered} == {"heldout"}


def test_the_tools_stand_in_a_system_message_before_the_request():
    plain, call = (prompt.chat for prompt in ASKED)
    assert [message["role"] for message in plain] == ["user"]
    assert [message["role"] for message in call] == ["system", "user"]
    assert "math.comb" in call[0]["content"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("question | Why?", "is not `kind"),
        ("question | - |  ", "is not `kind"),
        ("call | - | Why?", "kind 'call' without tools; choose one of question"),
        ("question | math.comb | Why?", "kind 'question' with tools; choose one of call"),
        ("call | fly_home | Go.", "no tool 'fly_home' in the toolbox"),
    ],
)
def test_a_line_that_is_no_request_is_named_by_file_and_line(tmp_path, row, says):
    path = lines(tmp_path, "question | - | Fine?", row)
    with pytest.raises(ValueError, match=rf"requests\.txt:3: .*{says}"):
        people.prompts(path=path)


# --- answers -----------------------------------------------------------------------------------------------------


def test_answers_are_asked_once_and_a_longer_sheet_begins_with_what_is_known(tiny, tmp_path):
    first = people.answers(tiny, ASKED[:1], tmp_path, new_tokens=4)
    both = people.answers(tiny, ASKED, tmp_path, new_tokens=4)
    assert both[0] == first[0]
    (cache,) = tmp_path.iterdir()
    assert len(cache.read_text().splitlines()) == 2


def test_an_unknown_engine_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="unknown engine 'abacus'; choose one of torch"):
        people.answers(tiny, ASKED, tmp_path, engine="abacus")


# --- the sheet ---------------------------------------------------------------------------------------------------


def test_the_sheet_names_nobody_and_the_key_finds_every_answer(tmp_path):
    sheet = people.make_sheet(tmp_path, ASKED, ANSWERED, {"nf4-dq": {"engine": "openvino"}})
    assert people.load_sheet(tmp_path) == sheet
    text = (tmp_path / "sheet.json").read_text()
    assert not [name for name in (*ANSWERED, "openvino") if name in text]
    key = people.load_key(tmp_path)
    assert key["nf4-dq"]["engine"] == "openvino"
    for name, texts in ANSWERED.items():
        found = [p["answers"][key[name]["answers"][p["key"]]] for p in sheet["prompts"]]
        assert found == [text.strip() for text in texts]


def test_equal_answers_stand_on_the_sheet_once(tmp_path):
    sheet = people.make_sheet(tmp_path, ASKED, ANSWERED, {})
    assert [len(p["answers"]) for p in sheet["prompts"]] == [3, 2]


def test_each_rater_has_an_order_of_their_own_that_a_break_does_not_change(tmp_path):
    asked = people.prompts()
    many = {name: [f"{name} {i}" for i in range(len(asked))] for name in "abcd"}
    sheet = people.make_sheet(tmp_path, asked, many, {})
    one, two = (people.order(sheet, rater) for rater in ("r1", "r2"))
    assert one == people.order(json.loads(json.dumps(sheet)), "r1") != two
    assert sorted(p["key"] for p, _ in one) == sorted(p.key for p in asked)
    places = [ids.index(people.answer_id(asked[0], "a 0")) for p, ids in one + two if p["key"] == asked[0].key]
    assert len({tuple(ids) for _, ids in one}) == len(asked)
    assert len(places) == 2
    firsts = [p["answers"][ids[0]][0] for p, ids in one + two]
    assert {firsts.count(name) >= 4 for name in "abcd"} == {True}, "no artefact is always in the same place"


def test_a_sheet_needs_two_artefacts_and_an_answer_to_every_request(tmp_path):
    with pytest.raises(ValueError, match="nothing to compare: 1 artefact"):
        people.make_sheet(tmp_path, ASKED, {"bf16": ["a", "b"]}, {})
    with pytest.raises(ValueError, match="small has 1 answers to 2 requests"):
        people.make_sheet(tmp_path, ASKED, {"bf16": ["a", "b"], "small": ["a"]}, {})
    assert not list(tmp_path.iterdir())
