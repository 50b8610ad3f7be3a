"""Scoring answers: what a pencil finds, what a killed run loses, what is counted, and a run of the tiny model."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import settings
from transformers import PreTrainedModel

from avalab import answer_cache, calls, evaluate, models, sandbox, toolbox
from avalab.calls import Case
from avalab.experiment import Run
from avalab.sandbox import Problem

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True, database=None)
ADD = {
    "name": "add",
    "description": "Add.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
PROBLEM = Problem("t/0", "def one():\n", "    return 1\n", "def check(f):\n    assert f() == 1\n", "one")


def call(**arguments) -> str:
    return f"<tool_call>{json.dumps([{'name': 'add', 'arguments': arguments}])}</tool_call>"


def case(**fields) -> Case:
    question = [{"role": "user", "content": "Add 1 and 2."}]
    given = {"id": "0", "category": "simple_python", "messages": question, "functions": [ADD]}
    return Case(**{**given, "expected": [{"add": {"a": [1], "b": [2]}}], **fields})


# --- shares and pairs --------------------------------------------------------------------------------------------


# --- errors ------------------------------------------------------------------------------------------------------


def test_each_wrong_answer_is_counted_under_its_error():
    other = call(a=1, b=2).replace("add", "sub")
    texts = [call(a=1, b=2), call(a=1, b=3), call(a=2, b=2), call(a=1), "I cannot.", "<tool_call>[{", other]
    verdicts = evaluate.judge([case()] * len(texts), texts)
    assert [v.correct for v in verdicts] == [True, *[False] * 6]
    counted = {"wrong_value": 2, "missing_argument": 1, "no_call": 1, "not_json": 1, "wrong_function": 1}
    assert evaluate.errors(verdicts) == counted


def test_the_accepted_answer_of_every_toolbox_case_is_right():
    for category in ("toolbox_simple", "toolbox_multiple"):
        asked = evaluate.cases(category, 40)
        perfect = [
            json.dumps({"name": name, "arguments": {k: v for k, (v,) in accepted.items()}})
            for name, accepted in (next(iter(c.expected[0].items())) for c in asked)
        ]
        assert all(v.correct for v in evaluate.judge(asked, perfect))


def test_irrelevance_cases_list_only_other_heldout_tools_and_want_no_call():
    asked = evaluate.cases("toolbox_irrelevance", 20)
    answerable = evaluate.cases("toolbox_simple", 20)
    for without, fitting in zip(asked, answerable, strict=True):
        listed = {f["name"] for f in without.functions}
        assert without.messages == fitting.messages
        assert fitting.functions[0]["name"] not in listed
        assert {toolbox.split_of(name) for name in listed} == {"heldout"}
    assert evaluate.judge(asked[:2], ["No tool fits.", call(a=1, b=2)])[0].correct
    assert evaluate.errors(evaluate.judge(asked[:1], [call(a=1, b=2)])) == {"unwanted_call": 1}


def test_a_longer_list_of_cases_begins_with_the_shorter_one():
    assert evaluate.cases("toolbox_multiple", 9)[:4] == evaluate.cases("toolbox_multiple", 4)


def test_an_unknown_category_names_those_that_exist():
    with pytest.raises(ValueError, match=r"unknown category 'simpel'.*simple_python.*toolbox_simple"):
        evaluate.cases("simpel", 1)


def test_a_forced_call_cannot_be_asked_of_a_case_that_wants_none():
    assert evaluate.metric("irrelevance", "grammar") == "irrelevance_accuracy"
    assert evaluate.metric("multiple", "forced") == "call_accuracy_forced:multiple"
    assert evaluate.answerable(["multiple", "live_irrelevance"], "forced") == ["multiple"]
    with pytest.raises(ValueError, match="choose free or grammar"):
        evaluate.metric("irrelevance", "forced")
    with pytest.raises(ValueError, match="unknown mode 'loose'"):
        evaluate.metric("multiple", "loose")


def test_a_case_that_brings_a_system_message_keeps_it_after_the_tools(respondent):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add 1 and 2."}]
    text = evaluate.prompt(respondent.tokenizer, case(messages=messages))
    assert text.index('"name": "add"') < text.index("Be brief.") < text.index("Add 1 and 2.")
    assert text.count("<|im_start|>system") == 1
    assert text.endswith("<|im_start|>assistant\n")


# --- answers on disk ---------------------------------------------------------------------------------------------


def numbered(wanted: list[int]) -> Iterator[tuple[int, str]]:
    return ((position, f"text {index}") for position, index in enumerate(wanted))


def killed_after_two(wanted: list[int]) -> Iterator[tuple[int, str]]:
    yield 1, f"text {wanted[1]}"  # batches come in the order of length, not of the cases
    yield 0, f"text {wanted[0]}"
    raise KeyboardInterrupt


def test_a_killed_run_asks_only_what_it_has_not_written_down(tmp_path):
    path, asked = tmp_path / "cache" / "answers.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        answer_cache.resumed(path, list("abcd"), killed_after_two)

    def rest(wanted: list[int]) -> Iterator[tuple[int, str]]:
        asked.extend(wanted)
        return numbered(wanted)

    assert answer_cache.resumed(path, list("abcd"), rest) == ["text 0", "text 1", "text 2", "text 3"]
    assert asked == [2, 3]


def test_a_line_that_was_cut_off_is_asked_again_and_the_file_stays_readable(tmp_path):
    path, asked = tmp_path / "answers.jsonl", []
    answer_cache.resumed(path, list("abc"), numbered)
    path.write_bytes(path.read_bytes()[:-9])

    def rest(wanted: list[int]) -> Iterator[tuple[int, str]]:
        asked.extend(wanted)
        return numbered(wanted)

    for _ in range(2):  # the second time, nothing is missing
        assert answer_cache.resumed(path, list("abc"), rest) == ["text 0", "text 1", "text 2"]
    assert asked == [2]
    assert [json.loads(line)["key"] for line in path.read_text().splitlines() if line.endswith("}")] == list("abc")


def test_the_time_of_answers_is_kept_with_them_and_unknown_for_lines_without_one(tmp_path, monkeypatch):
    """Clock readings 0, 2, 2 and 5: a batch of two took 2 s, the next answer 3 s."""
    clock = iter([0.0, 2.0, 2.0, 5.0])
    monkeypatch.setattr(answer_cache.time, "perf_counter", lambda: next(clock))
    path = tmp_path / "answers.jsonl"
    answer_cache.resumed(path, list("abc"), numbered)
    assert answer_cache.seconds(path, list("abc")) == 5
    assert answer_cache.seconds(path, list("ab")) == 2
    assert answer_cache.seconds(path, list("abd")) is None
    path.write_text(json.dumps({"key": "a", "text": "of an older version"}) + "\n")
    assert answer_cache.seconds(path, ["a"]) is None


# --- the tiny model ----------------------------------------------------------------------------------------------


def test_a_respondent_loads_its_model_once(respondent):
    assert isinstance(respondent.model, PreTrainedModel)
    assert respondent.model is respondent.model


@pytest.mark.parametrize("mode", list(evaluate.MODES))
def test_the_tiny_model_answers_each_mode_once_and_is_read_back_after_that(run, respondent, mode, monkeypatch):
    how = {"category": "toolbox_multiple", "mode": mode, "limit": 3}
    verdicts = evaluate.record(run, "bf16", respondent, **how)
    made = run.records[-1]
    assert (made.metric, made.n, made.unit) == (evaluate.metric("toolbox_multiple", mode), 3, "1")
    assert made.low <= made.value <= made.high
    assert made.artifact_sha256 == respondent.artifact.sha256
    assert sum(made.details["errors"].values()) == sum(not v.correct for v in verdicts)

    assert made.details["items_per_s"] > 0

    unloaded = evaluate.Respondent(respondent.artifact)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the answers were known"))
    assert evaluate.record(run, "bf16", unloaded, **how) == verdicts
    assert run.records[-1].details == made.details, "the speed is that of the answering, not of the reading"


def test_skipped_cases_are_not_asked_and_skipping_all_of_them_is_refused(run, respondent, monkeypatch):
    how = {"category": "toolbox_simple", "mode": "forced", "limit": 2}
    seen = []
    monkeypatch.setattr(evaluate, "answer_calls", lambda respondent, asked, *_, **__: seen.extend(asked) or [""] * 2)
    evaluate.record(run, "bf16", respondent, skip=3, **how)
    assert [case.id for case in seen] == ["toolbox_simple_3", "toolbox_simple_4"]
    assert run.records[-1].details["skipped"] == 3
    monkeypatch.setattr(evaluate, "cases", lambda category, limit: [])
    with pytest.raises(ValueError, match="skip 9 leaves no case of toolbox_simple"):
        evaluate.record(run, "bf16", respondent, skip=9, **how)


def test_a_forced_answer_is_one_call_to_a_listed_function_or_was_cut_off(run, respondent):
    asked = evaluate.cases("toolbox_multiple", 3)
    texts = evaluate.answer_calls(respondent, asked, "forced", run.artifacts_dir / "cache")
    for one, text in zip(asked, texts, strict=True):
        found = calls.parse_calls(text)
        names = [c.name for c in found] if isinstance(found, list) else []
        assert found == "not_json" or (len(names) == 1 and names[0] in {f["name"] for f in one.functions})


def test_a_completion_ends_where_the_function_ends_and_is_run(run, respondent, monkeypatch):
    completions = iter(["    return 1\nprint(one())\n", "    return 2\n"])
    monkeypatch.setattr(evaluate, "_generated", lambda *_: ((i, next(completions)) for i in range(2)))
    if not {"namespaces", "seccomp"} & set(sandbox.layers()) or not {"root", "landlock"} & set(sandbox.layers()):
        pytest.skip("this machine's sandbox has too few layers to run model-written code")
    problems = [PROBLEM, Problem("t/1", "def one():  # again\n", "", PROBLEM.test, "one")]
    assert evaluate.record_pass_at_1(run, "bf16", respondent, problems) == [True, False]
    made = run.records[-1]
    assert (made.metric, made.value, made.n) == ("pass_at_1", 0.5, 2)
    assert made.details["endings"] == {"finished": 1, "error": 1}
    assert evaluate.answer_code(respondent, problems[:1], run.artifacts_dir / "cache") == ["    return 1"]


def test_code_is_not_run_in_a_sandbox_without_enough_layers(run, respondent, monkeypatch):
    monkeypatch.setattr(sandbox, "layers", lambda: ("limits", "audit"))
    with pytest.raises(ValueError, match="only audit, limits"):
        evaluate.record_pass_at_1(run, "bf16", respondent, [PROBLEM])


def test_the_smoke_profile_brings_its_own_problems_and_they_can_be_solved():
    found = evaluate.problems(Run("11_function_calling", "smoke"))
    lines = (evaluate.ROOT / "data" / "toolbox_problems.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["canonical_solution"] for line in lines]
    assert len(found) == len(solutions) == 4
    for problem, solution in zip(found, solutions, strict=True):
        namespace = {}
        exec(f"{problem.prompt}{solution}\n{problem.test}\ncheck({problem.entry_point})\n", namespace)
