"""Examples are reproducible, refined, refused with a name, read back as written, and made of a model's own answers."""

import json
from collections import Counter
from functools import partial

import pytest
from transformers import PreTrainedModel  # noqa: F401  before avalab reaches torchao: its warnings are its own

from avalab.data import calls, drafts, gates, repeats, synthesize, toolbox
from avalab.data.arguments import lines_of, ways_to_say
from avalab.data.synthesize import select_answers
from avalab.lab.run import ROOT
from avalab.measure import answers

FEW = 40
TOOL = {"name": "f", "description": "Do.", "parameters": {"type": "object", "properties": {}}}
ASKED = [{"role": "user", "content": "Do it"}, {"role": "assistant", "content": "Done"}]


def told(text: str):
    def teacher(messages):
        teacher.asked.append(messages[0]["content"])
        return text

    teacher.asked = []
    return teacher


@pytest.fixture
def row():
    return gates.standard_gates()


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    reports = [
        synthesize.write_examples(tmp_path / f"{i}", count=FEW, seed=seed, sets=[]) for i, seed in enumerate((3, 3, 4))
    ]
    hashes = [{name: f["sha256"] for name, f in report["files"].items()} for report in reports]
    assert hashes[0] == hashes[1] != hashes[2]
    assert (tmp_path / "0" / "README.md").read_text() == (tmp_path / "1" / "README.md").read_text()


def test_what_is_loaded_is_what_was_generated(tmp_path):
    made = list(synthesize.generate(FEW, 5, row=gates.standard_gates([])))
    report = synthesize.write_examples(tmp_path, count=FEW, seed=5, sets=[])
    loaded = synthesize.load_examples(tmp_path)
    order = sorted(made, key=lambda e: e["kind"])
    assert json.dumps(loaded) == json.dumps(order)
    assert sum(f["examples"] for f in report["files"].values()) == report["counts"]["accepted"] == FEW
    assert all(m["role"] != "system" for line in open_lines(tmp_path) for m in line["messages"])


def test_the_seed_of_the_data_card_makes_the_committed_examples_again():
    """The first ones, with the evaluation sets at hand: where BFCL is not, a few were rejected that now pass."""
    written, again = open_lines(ROOT / "data" / "synthetic_datasets"), []
    for example in synthesize.generate(FEW, seed=7, row=gates.standard_gates(repeats.evaluation_sets())):
        again.append({**example, "messages": example["messages"][-2:]} in written)
    assert sum(again) >= 0.9 * FEW


def open_lines(folder):
    return [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]


@pytest.mark.parametrize("kind", drafts.KINDS)
def test_every_kind_is_made_and_passes_the_gates(kind, row):
    made = list(synthesize.generate(6, 1, kinds=(kind,), row=row))
    assert {example["kind"] for example in made} == {kind}
    for example in made:
        assert gates.verdict(example, gates.STANDARD) == ("", "")


def test_the_checker_of_the_leaderboard_accepts_our_answers(row):
    for example in synthesize.generate(30, 2, kinds=("single_call", "several_candidates", "parallel_calls"), row=row):
        expected = [{c["name"]: {k: [v] for k, v in c["arguments"].items()}} for c in example["calls"]]
        nested = any(isinstance(v, dict | list) for c in example["calls"] for v in c["arguments"].values())
        case = calls.Case("x", "parallel", [], example["tools"], expected)
        verdict = calls.check_calls(case, calls.parse_calls(example["messages"][-1]["content"]))
        assert verdict.correct or nested, verdict


def test_refusals_and_questions_back_call_nothing(row):
    for example in synthesize.generate(20, 2, kinds=("no_function", "missing_argument"), row=row):
        assert calls.parse_calls(example["messages"][-1]["content"]) == "no_call"
        assert example["calls"] == []


def test_not_to_call_is_one_tokens_decision():
    openings = {line.split()[0] for name in ("refusals.txt", "ask_back.txt") for line in lines_of(name)}
    assert openings == {"I"}


def test_money_is_written_as_people_write_it_and_stays_grounded():
    assert ways_to_say(45_000, "$100..90000") == [
        "$45,000",
        "45000 dollars",
        "45000",
        "$45k",
        "45 thousand dollars",
    ]
    assert ways_to_say(8.5, "$1.00..9.50") == ["$8.50", "8.50 dollars", "8.50"]
    for said in ways_to_say(45_000, "$100..90000"):
        request = {"messages": [{"role": "user", "content": f"I earn {said} a year."}], "tools": []}
        assert gates.grounded(request | {"calls": [{"name": "tax", "arguments": {"income": 45_000}}]}) == ""


def test_a_missing_argument_is_asked_for_and_belongs_to_the_function(row):
    for example in synthesize.generate(20, 3, kinds=("missing_argument",), row=row):
        required = example["tools"][0]["parameters"]["required"]
        words = ["".join(f" {c.lower()}" if c.isupper() else c for c in p).replace("_", " ") for p in required]
        assert any(word in example["messages"][-1]["content"] for word in words)


def test_structured_output_is_json_that_the_system_message_describes(row):
    for example in synthesize.generate(10, 3, kinds=("structured_output",), row=row):
        assert example["messages"][0]["content"].startswith(synthesize.JSON_PROMPT)
        assert json.loads(example["messages"][-1]["content"]) == example["calls"][0]["arguments"]


def test_reasoning_ends_with_its_answer(row):
    for example in synthesize.generate(20, 3, kinds=("reasoning",), row=row):
        answer = example["messages"][-1]["content"]
        assert answer.endswith("</tool_call>") if example["calls"] else "Answer: " in answer


def test_no_surviving_example_names_the_gate(monkeypatch):
    monkeypatch.setattr(synthesize, "PATIENCE", 5)
    with pytest.raises(ValueError, match=r"no example survives.*'never'.*0 of 3"):
        list(synthesize.generate(3, 0, row={"never": lambda example: "never good enough"}))


def test_a_kind_that_never_passes_is_noticed_among_kinds_that_do(monkeypatch):
    monkeypatch.setattr(synthesize, "PATIENCE", 5)
    gate = {"no_reasons": lambda example: "no" if example["kind"] == "reasoning" else ""}
    with pytest.raises(ValueError, match=r"5 of reasoning in a row.*'no_reasons'"):
        list(synthesize.generate(10_000, 0, kinds=("reasoning", "instruction"), row=gate))


def test_every_accepted_example_and_every_rejection_is_counted():
    counts = Counter()
    made = list(synthesize.generate(FEW, 9, row=gates.standard_gates([]), counts=counts))
    by_gate = sum(number for name, number in counts.items() if name.startswith("refined:"))
    assert counts["accepted"] == len(made) == FEW
    assert counts["refined"] == by_gate <= FEW


def test_candidates_are_the_first_attempts_before_any_gate():
    made = synthesize.candidates(FEW, 5)
    accepted = list(synthesize.generate(FEW, 5, row={}))
    assert made == accepted
    with pytest.raises(ValueError, match=r"unknown kind 'poem'"):
        synthesize.candidates(1, 0, kinds=("poem",))


def test_a_teacher_who_can_answer_ahead_is_asked_once_for_all():
    class Patient:
        asked, __name__ = [], "patient"

        def ahead(self, questions, progress=""):
            self.asked.append(list(questions))

        def __call__(self, messages):
            assert messages in self.asked[0]
            return '{"request": "Would you do this for me?"}' if len(self.asked[0]) % 2 == 0 else "rubbish"

    teacher, counts = Patient(), Counter()
    made = synthesize.candidates(FEW, 5, kinds=("single_call",), teacher=teacher, counts=counts)
    assert [len(questions) for questions in teacher.asked] == [FEW]
    assert {example["messages"][-2]["content"] for example in made} == {"Would you do this for me?"}
    teacher.asked = []
    assert synthesize.candidates(3, 5, kinds=("single_call",), teacher=teacher, counts=counts) == []
    assert counts["rejected:teacher_format"] == 3


def test_an_unknown_kind_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"unknown kind 'poem'; choose of single_call"):
        synthesize.generate(1, 0, kinds=("poem",), row={})


def test_a_rejected_example_goes_back_at_most_k_rounds():
    counts, seen = Counter(), []
    gate = {"never": lambda example: seen.append(example["messages"][0]["content"]) or "no"}
    assert synthesize.refine("single_call", "s", row=gate, counts=counts, rounds=4) == "never"
    assert len(seen) == counts["rejected:never"] == 5
    assert counts["abandoned"] == 1
    assert len(set(seen)) > 1


def test_other_words_for_the_same_calls_are_tried_when_the_wording_was_at_fault():
    seen = []

    def second_time(example):
        seen.append(example)
        return "" if len(seen) == 2 else "try again"

    counts = Counter()
    accepted = synthesize.refine("single_call", "s", row={"grounded": second_time}, counts=counts)
    assert accepted["calls"] == seen[0]["calls"]
    assert counts == {"rejected:grounded": 1, "refined": 1, "refined:grounded": 1}


def test_a_teachers_wording_replaces_ours_and_the_calls_stay():
    plain = synthesize.refine("single_call", "s", row={}, counts=Counter())
    teacher = told('Sure! {"request": "Say it   otherwise."}')
    example = synthesize.refine("single_call", "s", row={}, counts=Counter(), teacher=teacher)
    assert example["messages"][0]["content"] == "Say it otherwise."
    assert example["calls"] == plain["calls"]
    assert example["source"].startswith("teacher:")
    assert plain["messages"][0]["content"] in teacher.asked[0]


@pytest.mark.parametrize("rubbish", ["", "I cannot.", '{"request": 3}', '{"other": "x"}', "{broken", "[1]"])
def test_a_teacher_who_talks_rubbish_is_counted_and_told_why(rubbish):
    teacher, counts = told(rubbish), Counter()
    assert synthesize.refine("single_call", "s", row={}, counts=counts, teacher=teacher) == "teacher_format"
    assert counts["rejected:teacher_format"] == 3
    assert "refused because" not in teacher.asked[0]
    assert all("refused because it was not" in asked or "was not a text" in asked for asked in teacher.asked[1:])


def test_a_teacher_who_drops_a_value_is_told_which_one():
    teacher, counts = told('{"request": "Please do what I have in mind for me."}'), Counter()
    assert (
        synthesize.refine("parallel_calls", "t", row=dict(gates.STANDARD), counts=counts, teacher=teacher) == "grounded"
    )
    assert "is not said in the request" in teacher.asked[1]


def test_a_failed_generation_leaves_the_old_files_alone(tmp_path, monkeypatch):
    synthesize.write_examples(tmp_path, count=5, seed=1, sets=[])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(synthesize, "PATIENCE", 3)
    monkeypatch.setattr(gates, "standard_gates", lambda sets=(): {"never": lambda example: "no"})
    with pytest.raises(ValueError, match=r"no example survives"):
        synthesize.write_examples(tmp_path, count=5, seed=2, sets=[])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# --- files


def line(**fields) -> dict:
    return {"kind": "no_function", "tools": [], "calls": [], "messages": ASKED, **fields}


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("{broken", r"data\.jsonl:2: not JSON"),
        ('{"kind": "x", "tools": [], "calls": []}', r"data\.jsonl:2: no field messages"),
        ("[]", r"data\.jsonl:2: no object with the field messages, but \[\]"),
        (json.dumps(line(messages=ASKED[:1])), r"data\.jsonl:2: no field messages that is a list of a request and an"),
        (json.dumps(line(messages="Hi")), r"data\.jsonl:2: no field messages that is a list"),
        (
            json.dumps(line(messages=[{"role": "user"}, ASKED[1]])),
            r"data\.jsonl:2: message 1 \(user\): no content",
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


def test_what_this_command_did_not_make_or_was_changed_since_is_replaced_by_force_only(tmp_path):
    make = partial(synthesize.write_examples, count=4, seed=1, kinds=("reasoning",), sets=[])
    (tmp_path / "notes.txt").write_text("mine")
    make(tmp_path)  # beside other files
    make(tmp_path)  # over its own
    set_file, card = tmp_path / "reasoning.jsonl", tmp_path / "README.md"
    for file, text in (
        (set_file, set_file.read_text() + "\n"),
        (card, "# My project"),
        (tmp_path / "instruction.jsonl", "{}\n"),
    ):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()} | {file.name: text.encode()}
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"holds .*{file.name}.* that this command did not make.*--force"):
            make(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        make(tmp_path, replace=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_card_claims_no_comparison_that_was_not_made():
    report = {"count": 1, "seed": 2, "kinds": ["reasoning"], "python": "3", "teacher": "none", "counts": {}}
    report |= {"diversity": {"verbs": 3, "kinds": {}}, "files": {}, "evaluation": {}}
    text = synthesize.data_card(report)
    assert "compared with no evaluation set" in text
    assert "count=1, seed=2, kinds=('reasoning',)" in text
    assert "| bfcl-v4 | `abc` |" in synthesize.data_card(report | {"evaluation": {"bfcl-v4": "abc"}})


# --- a model's own answers


@pytest.fixture(scope="module")
def requests():
    return list(toolbox.function_calling_examples(8, 5))


def right(request: dict) -> str:
    return request["messages"][-1]["content"]


def test_right_answers_are_kept_and_what_cannot_be_read_or_verified_is_counted(requests):
    invented = json.loads(json.dumps(requests[3]["calls"]))
    invented[0]["arguments"] = dict.fromkeys(invented[0]["arguments"], 123456)
    texts = [right(requests[0]), "I cannot do that.", "<tool_call>[{", f"<tool_call>{json.dumps(invented)}</tool_call>"]
    counts = Counter()
    kept = select_answers(requests[:4], texts, source="self", row=gates.standard_gates([]), counts=counts)
    assert [e["calls"] for e in kept] == [requests[0]["calls"]]
    assert (counts["answered"], counts["accepted"]) == (4, 1)
    assert (counts["rejected:no_call"], counts["rejected:not_json"]) == (1, 1)
    assert counts["rejected:schema_validity"] + counts["rejected:grounded"] == 1


def test_a_kept_answer_is_an_example_like_the_synthetic_ones(requests, tmp_path):
    texts = [f"Sure. {right(r)} Done." for r in requests]
    kept = select_answers(requests, texts, source="self:tiny-llama", row=dict(gates.STANDARD))
    for example in kept:
        request = requests[example["request"]]
        assert example["messages"][:2] == request["messages"][:2]
        assert calls.parse_calls(example["messages"][-1]["content"]) == [calls.Call(**c) for c in request["calls"]]
        assert example["source"] == "self:tiny-llama"
    synthesize.store_examples(tmp_path, kept)
    assert len(synthesize.load_examples(tmp_path)) == len(kept) > 4


def test_the_answers_in_the_requests_are_not_looked_at(requests):
    texts = [right(r) for r in requests]
    blind = [{**r, "calls": [], "messages": r["messages"][:2]} for r in requests]
    kept = [select_answers(given, texts, source="self", row=dict(gates.STANDARD)) for given in (requests, blind)]
    assert kept[0] == kept[1]


def test_precision_is_the_share_of_kept_answers_that_are_right(requests):
    """Two answers with the right calls and two with another request's: precision 2/4."""
    kept = select_answers(requests[:4], [right(r) for r in requests[:4]], source="self", row={})
    kept[2]["calls"], kept[3]["calls"] = kept[3]["calls"], [{"name": "no_such", "arguments": {}}]
    found = synthesize.precision(kept, requests)
    assert (found.value, found.n) == (0.5, 4)
    with pytest.raises(ValueError, match="n must be positive"):
        synthesize.precision([], requests)


def test_nothing_asked_is_nothing_kept():
    assert select_answers([], [], source="self", row={}) == []


def test_the_tiny_models_own_answers_pass_the_gates_that_they_are_said_to_pass(run, respondent, requests):
    counts, cases = Counter(), synthesize.answer_cases(requests)
    texts = answers.answer_calls(respondent, cases, "forced", run.artifacts_dir / "cache")
    kept = select_answers(requests, texts, source="self", row=gates.standard_gates([]), counts=counts)
    assert counts["answered"] == len(requests)
    assert counts["accepted"] == len(kept)
    for example in kept:
        assert gates.verdict(example, gates.STANDARD) == ("", "")
