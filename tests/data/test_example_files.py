"""Examples on disk: read back as written, damaged lines named, the card true."""

import json

import pytest

from avalab.data import synthesize

TOOL = {"name": "f", "description": "Do.", "parameters": {"type": "object", "properties": {}}}
ASKED = [{"role": "user", "content": "Do it"}, {"role": "assistant", "content": "Done"}]


def line(**fields) -> dict:
    return {"kind": "no_function", "tools": [], "calls": [], "messages": ASKED, **fields}


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("{broken", r"data\.jsonl:2: not JSON"),
        ("", r"data\.jsonl:2: not JSON"),
        ('{"kind": "x", "tools": [], "calls": []}', r"data\.jsonl:2: no field messages"),
        ("[]", r"data\.jsonl:2: no field kind"),
        (json.dumps(line(messages=ASKED[:1])), r"data\.jsonl:2: no field messages that is a list of a request and an"),
        (json.dumps(line(messages="Hi")), r"data\.jsonl:2: no field messages that is a list"),
        (
            json.dumps(line(messages=[{"role": "user"}, ASKED[1]])),
            r"data\.jsonl:2: no field content in an item of mess",
        ),
        (json.dumps(line(tools={"f": 1})), r"data\.jsonl:2: no field tools that is a list"),
        (json.dumps(line(calls=[{"name": "f"}])), r"data\.jsonl:2: no field arguments in an item of calls"),
        (json.dumps(line(tools=[{"name": "f", "parameters": {"type": 3}}])), r":2: tool 'f' is not valid JSON Schema"),
    ],
)
def test_a_damaged_line_is_named_by_file_and_number_and_the_file_is_left_alone(tmp_path, damaged, message):
    file = tmp_path / "data.jsonl"
    good = json.dumps(line())
    file.write_text(f"{good}\n{damaged}\n{good}\n")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        synthesize.load_examples(file)
    assert file.read_bytes() == before


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"data\.jsonl is not UTF-8"):
        synthesize.load_examples(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl file"):
        synthesize.load_examples(tmp_path)


def test_a_line_separator_inside_a_text_is_no_end_of_line(tmp_path):
    odd = line(messages=[{"role": "user", "content": "One\u2028two\x85three"}, ASKED[1]])
    synthesize.store_examples(tmp_path, [odd])
    assert synthesize.load_examples(tmp_path) == [odd]


def test_the_system_message_is_left_out_and_comes_back(tmp_path):
    full = synthesize.with_system(line(tools=[TOOL]))
    assert full["messages"][0]["role"] == "system"
    assert synthesize.with_system(full) == full
    assert synthesize.without_system(full) == line(tools=[TOOL])
    synthesize.store_examples(tmp_path, [full])
    assert "system" not in (tmp_path / "no_function.jsonl").read_text()
    assert synthesize.load_examples(tmp_path) == [full]


def test_files_of_an_older_set_go_and_other_files_stay(tmp_path):
    synthesize.store_examples(tmp_path, [line(kind="reasoning"), line()])
    (tmp_path / "notes.txt").write_text("mine")
    assert synthesize.store_examples(tmp_path, [line()])["no_function.jsonl"]["examples"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["no_function.jsonl", "notes.txt"]


def test_the_card_claims_no_comparison_that_was_not_made():
    report = {"count": 1, "seed": 2, "kinds": ["reasoning"], "python": "3", "teacher": "none", "counts": {}}
    report |= {"diversity": {"verbs": 3, "kinds": {}}, "files": {}, "evaluation": {}}
    text = synthesize.data_card(report)
    assert "compared with no evaluation set" in text
    assert "count=1, seed=2, kinds=('reasoning',)" in text
    assert "| bfcl-v4 | `abc` |" in synthesize.data_card(report | {"evaluation": {"bfcl-v4": "abc"}})
