"""Generation: reproducible, refined, refused with a name, and read back as it was written."""

import json
from collections import Counter

import pytest

from avalab.data import calls, drafts, gates, repeats, synthesize
from avalab.data.arguments import ways_to_say
from avalab.lab import words
from avalab.lab.run import ROOT

FEW = 40


def told(text: str):
    def teacher(messages):
        teacher.asked.append(messages[0]["content"])
        return text

    teacher.asked = []
    return teacher


@pytest.fixture
def row():
    return gates.standard()


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    reports = [
        synthesize.write_examples(tmp_path / f"{i}", count=FEW, seed=seed, sets=[]) for i, seed in enumerate((3, 3, 4))
    ]
    hashes = [{name: f["sha256"] for name, f in report["files"].items()} for report in reports]
    assert hashes[0] == hashes[1] != hashes[2]
    assert (tmp_path / "0" / "README.md").read_text() == (tmp_path / "1" / "README.md").read_text()


def test_what_is_loaded_is_what_was_generated(tmp_path):
    made = list(synthesize.generate(FEW, 5, row=gates.standard([])))
    report = synthesize.write_examples(tmp_path, count=FEW, seed=5, sets=[])
    loaded = synthesize.load_examples(tmp_path)
    order = sorted(made, key=lambda e: e["kind"])
    assert json.dumps(loaded) == json.dumps(order)
    assert sum(f["examples"] for f in report["files"].values()) == report["counts"]["accepted"] == FEW
    assert all(m["role"] != "system" for line in open_lines(tmp_path) for m in line["messages"])


def test_the_seed_of_the_data_card_makes_the_committed_examples_again():
    """The first ones, with the evaluation sets at hand: where BFCL is not, a few were rejected that now pass."""
    written, again = open_lines(ROOT / "data" / "synthetic_datasets"), []
    for example in synthesize.generate(FEW, seed=7, row=gates.standard(repeats.evaluation_sets())):
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
    openings = {line.split()[0] for name in ("refusals.txt", "ask_back.txt") for line in words.lines_of(name)}
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
    made = list(synthesize.generate(FEW, 9, row=gates.standard([]), counts=counts))
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
    monkeypatch.setattr(gates, "standard", lambda sets=(): {"never": lambda example: "no"})
    with pytest.raises(ValueError, match=r"no example survives"):
        synthesize.write_examples(tmp_path, count=5, seed=2, sets=[])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
