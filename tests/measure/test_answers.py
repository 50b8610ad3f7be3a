"""Answers in any engine: what is asked once, what is counted, what an engine keeps, and the loss of right answers."""

import json
import math
import re

import pytest
import torch
from transformers import PreTrainedModel

from avalab import engines
from avalab.data import calls, grammars, packing, toolbox
from avalab.data.calls import Case, Verdict
from avalab.lab import sandbox
from avalab.lab.run import ROOT, Run
from avalab.lab.sandbox import Problem
from avalab.measure import answers
from avalab.measure.answers import Question, Respondent
from avalab.models import checkpoint

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


def test_each_wrong_answer_is_counted_under_its_error():
    other = call(a=1, b=2).replace("add", "sub")
    texts = [call(a=1, b=2), call(a=1, b=3), call(a=2, b=2), call(a=1), "I cannot.", "<tool_call>[{", other]
    verdicts = answers.judge_calls([case()] * len(texts), texts)
    assert [v.correct for v in verdicts] == [True, *[False] * 6]
    counted = {"wrong_value": 2, "missing_argument": 1, "no_call": 1, "not_json": 1, "wrong_function": 1}
    assert answers.count_errors(verdicts) == counted


def test_a_prompt_beyond_the_context_is_not_asked_and_counts_as_wrong_with_a_word(respondent, own_run, monkeypatch):
    """Two of three prompts of a category in which the empty answer would be right."""
    asked = calls.cases("toolbox_irrelevance", 3)
    lengths = sorted(len(respondent.tokenizer(calls.case_prompt(respondent.tokenizer, c)).input_ids) for c in asked)
    short = Respondent(respondent.artifact)
    monkeypatch.setattr(Respondent, "context", lengths[0] + answers.CALL_TOKENS)
    monkeypatch.setattr(Respondent, "model", respondent.model)
    verdicts = answers.record_calls(own_run, "x", short, category="toolbox_irrelevance", mode="free", limit=3)
    expected = sum(length > lengths[0] for length in lengths)
    assert expected
    assert [v.error for v in verdicts].count("too_long") == expected
    assert not any(v.correct for v in verdicts if v.error == "too_long")
    (record,) = own_run.records
    said = f"{expected} of 3 prompts exceed the context of {lengths[0] + answers.CALL_TOKENS:,} tokens"
    assert record.note.startswith(said)


RIGHT, WRONG, SILENT = Verdict(True), Verdict(False, "wrong_value"), Verdict(False, "no_call")


@pytest.mark.parametrize(
    ("free", "grammar", "forced", "says"),
    [
        (  # eight cases that only forcing gets right: p = 2 / 2^8
            [SILENT] * 8,
            [SILENT] * 8,
            [RIGHT] * 8,
            "the form is what is missing: right when a call is forced 100%, in free form 0% (p = 0.0078); "
            "left the choice (grammar), it calls in 0 of 8 cases that need a call",
        ),
        ([WRONG] * 8, [WRONG, *[SILENT] * 7], [WRONG] * 8, "more than the form is missing"),
        ([RIGHT] * 4, [RIGHT] * 4, [RIGHT] * 3 + [WRONG], "the form is not what is missing"),
        ([RIGHT] * 8, [RIGHT] * 8, [WRONG] * 8, "forcing a call does harm"),
    ],
)
def test_the_line_that_reads_the_modes_follows_mcnemars_test(free, grammar, forced, says):
    assert answers.read_modes({"free": free, "grammar": grammar, "forced": forced}).startswith(says)


def test_the_accepted_answer_of_every_toolbox_case_is_right():
    for category in ("toolbox_simple", "toolbox_multiple"):
        asked = calls.cases(category, 40)
        perfect = [
            json.dumps({"name": name, "arguments": {k: v for k, (v,) in accepted.items()}})
            for name, accepted in (next(iter(c.expected[0].items())) for c in asked)
        ]
        assert all(v.correct for v in answers.judge_calls(asked, perfect))


def test_irrelevance_cases_list_only_other_heldout_tools_and_want_no_call():
    asked = calls.cases("toolbox_irrelevance", 20)
    answerable = calls.cases("toolbox_simple", 20)
    for without, fitting in zip(asked, answerable, strict=True):
        listed = {f["name"] for f in without.functions}
        assert without.messages == fitting.messages
        assert fitting.functions[0]["name"] not in listed
        assert {toolbox.split_of(name) for name in listed} == {"heldout"}
    assert answers.judge_calls(asked[:2], ["No tool fits.", call(a=1, b=2)])[0].correct
    assert answers.count_errors(answers.judge_calls(asked[:1], [call(a=1, b=2)])) == {"unwanted_call": 1}


def test_a_longer_list_of_cases_begins_with_the_shorter_one():
    assert calls.cases("toolbox_multiple", 9)[:4] == calls.cases("toolbox_multiple", 4)


def test_an_unknown_category_names_those_that_exist():
    with pytest.raises(ValueError, match=r"unknown category 'simpel'.*simple_python.*toolbox_simple"):
        calls.cases("simpel", 1)


def test_a_forced_call_cannot_be_asked_of_a_case_that_wants_none():
    assert answers.call_metric("irrelevance", "grammar") == "irrelevance_accuracy"
    assert answers.call_metric("multiple", "forced") == "call_accuracy_forced:multiple"
    assert answers.answerable(["multiple", "live_irrelevance"], "forced") == ["multiple"]
    with pytest.raises(ValueError, match="choose free or grammar"):
        answers.call_metric("irrelevance", "forced")
    with pytest.raises(ValueError, match="unknown mode 'loose'"):
        answers.call_metric("multiple", "loose")


def test_a_case_that_brings_a_system_message_keeps_it_after_the_tools(respondent):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add 1 and 2."}]
    text = calls.case_prompt(respondent.tokenizer, case(messages=messages))
    assert text.index('"name": "add"') < text.index("Be brief.") < text.index("Add 1 and 2.")
    assert text.count("<|im_start|>system") == 1
    assert text.endswith("<|im_start|>assistant\n")


def test_a_respondent_loads_its_model_once(respondent):
    assert isinstance(respondent.model, PreTrainedModel)
    assert respondent.model is respondent.model


@pytest.mark.parametrize("mode", list(answers.MODES))
def test_the_tiny_model_answers_each_mode_once_and_is_read_back_after_that(run, respondent, mode, monkeypatch):
    how = {"category": "toolbox_multiple", "mode": mode, "limit": 3}
    verdicts = answers.record_calls(run, "bf16", respondent, **how)
    made = run.records[-1]
    assert (made.metric, made.n, made.unit) == (answers.call_metric("toolbox_multiple", mode), 3, "1")
    assert made.low <= made.value <= made.high
    assert made.artifact_sha256 == respondent.artifact.sha256
    assert sum(made.details["errors"].values()) == sum(not v.correct for v in verdicts)

    assert made.details["items_per_s"] > 0

    unloaded = answers.Respondent(respondent.artifact)
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("the answers were known"))
    assert answers.record_calls(run, "bf16", unloaded, **how) == verdicts
    assert run.records[-1].details == made.details, "the speed is that of the answering, not of the reading"


def test_skipped_cases_are_not_asked_and_skipping_all_of_them_is_refused(run, respondent, monkeypatch):
    how = {"category": "toolbox_simple", "mode": "forced", "limit": 2}
    seen = []
    monkeypatch.setattr(answers, "answer_calls", lambda respondent, asked, *_, **__: seen.extend(asked) or [""] * 2)
    answers.record_calls(run, "bf16", respondent, skip=3, **how)
    assert [case.id for case in seen] == ["toolbox_simple_3", "toolbox_simple_4"]
    assert run.records[-1].details["skipped"] == 3
    monkeypatch.setattr(answers, "cases", lambda category, limit: [])
    with pytest.raises(ValueError, match="skip 9 leaves no case of toolbox_simple"):
        answers.record_calls(run, "bf16", respondent, skip=9, **how)


def test_a_forced_answer_is_one_call_to_a_listed_function_or_was_cut_off(run, respondent):
    asked = calls.cases("toolbox_multiple", 3)
    texts = answers.answer_calls(respondent, asked, "forced", run.artifacts_dir / "cache")
    for one, text in zip(asked, texts, strict=True):
        found = calls.parse_calls(text)
        names = [c.name for c in found] if isinstance(found, list) else []
        assert found == "not_json" or (len(names) == 1 and names[0] in {f["name"] for f in one.functions})


def test_a_completion_ends_where_the_function_ends_and_is_run(run, respondent, monkeypatch):
    completions = iter(["    return 1\nprint(one())\n", "    return 2\n"])
    monkeypatch.setattr(grammars, "greedy_answers", lambda *_, **__: ((i, next(completions)) for i in range(2)))
    if not {"namespaces", "seccomp"} & set(sandbox.layers()) or not {"root", "landlock"} & set(sandbox.layers()):
        pytest.skip("this machine's sandbox has too few layers to run model-written code")
    problems = [PROBLEM, Problem("t/1", "def one():  # again\n", "", PROBLEM.test, "one")]
    assert answers.record_pass_at_1(run, "bf16", respondent, problems) == [True, False]
    made = run.records[-1]
    assert (made.metric, made.value, made.n) == ("pass_at_1", 0.5, 2)
    assert made.details["endings"] == {"finished": 1, "error": 1}


def test_code_is_not_run_in_a_sandbox_without_enough_layers(run, respondent, monkeypatch):
    monkeypatch.setattr(sandbox, "layers", lambda: ("limits", "audit"))
    with pytest.raises(ValueError, match="only audit, limits"):
        answers.record_pass_at_1(run, "bf16", respondent, [PROBLEM])


def test_the_smoke_profile_brings_its_own_problems_and_they_can_be_solved():
    found = answers.code_problems(Run("11_function_calling", "smoke"))
    lines = (ROOT / "data" / "toolbox_problems.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["canonical_solution"] for line in lines]
    assert len(found) == len(solutions) == 4
    for problem, solution in zip(found, solutions, strict=True):
        namespace = {}
        exec(f"{problem.prompt}{solution}\n{problem.test}\ncheck({problem.entry_point})\n", namespace)


# --- engines -----------------------------------------------------------------------------------------------------


def test_an_engines_answers_are_those_of_torch_in_batches(run, respondent, as_torch):
    cache = run.artifacts_dir / "cache"
    asked = calls.cases("toolbox_multiple", 3)
    other = Respondent(respondent.artifact, engine="onnx")
    texts = answers.answer_calls(other, asked, "free", cache)
    assert texts == answers.answer_calls(respondent, asked, "free", cache)
    assert answers.answer_calls(other, asked, "free", cache) == texts
    assert as_torch == ["onnx"]
    assert answers.items_per_s(other, asked, "free", cache) > 0


def test_an_engine_answers_each_case_within_its_grammar(run, respondent, as_torch):
    asked = calls.cases("toolbox_multiple", 3)
    texts = answers.answer_calls(Respondent(respondent.artifact, engine="llamacpp"), asked, "forced", run.artifacts_dir)
    for case, text in zip(asked, texts, strict=True):
        offered = "|".join(re.escape(function["name"]) for function in case.functions)
        assert re.match(rf'<tool_call>\[{{"name": "({offered})", "arguments": {{', text)


def test_an_engine_that_dies_is_asked_only_what_is_missing(base, as_torch, tmp_path, monkeypatch):
    """The engine dies at the second of three questions; the second run starts there, and a third one loads nothing."""
    seen = []
    questions = [Question("One."), Question("Two, which is longer."), Question("Three is the longest of them all.")]
    respondent = Respondent(base, engine="openvino")
    lengths = [len(respondent.tokenizer(q.prompt, add_special_tokens=False).input_ids) for q in questions]

    def dying(self, tokens, limit, grammar):
        if len(tokens) == lengths[1] and len(seen) == 1:
            seen.append("died")
            raise RuntimeError("killed")
        seen.append(len(tokens))
        return [5]

    monkeypatch.setattr(engines.Engine, "generate", dying)
    with pytest.raises(RuntimeError, match="tiny-llama in openvino failed: killed"):
        answers.answer(respondent, questions, tmp_path, task="t", tokens=4)
    found = answers.answer(respondent, questions, tmp_path, task="t", tokens=4)
    assert seen == [lengths[0], "died", *lengths[1:]]
    assert answers.answer(respondent, questions, tmp_path, task="t", tokens=4) == found
    assert as_torch == ["openvino"] * 2


def test_an_engine_that_cannot_read_the_artefact_is_a_record_that_says_so(run, base, in_this_process):
    unable = Respondent(base, engine="onnx")
    assert answers.record_calls(run, "x", unable, category="toolbox_simple", mode="free", limit=2) == []
    record = run.records[-1]
    assert (record.metric, record.value, record.engine) == ("call_accuracy:toolbox_simple", None, "onnx")
    assert record.note.startswith("onnx cannot load tiny-llama")


# --- loss of right answers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples():
    return list(toolbox.function_calling_examples(3, 1, "heldout"))


def test_it_is_the_models_own_loss_over_the_answers_tokens(respondent, examples, tmp_path):
    """transformers computes the same mean from labels that are masked before the answer (it shifts them itself)."""
    found = answers.answer_losses(respondent, examples, tmp_path)
    for example, value in zip(examples, found.tolist(), strict=True):
        encoded = packing.encode_chat(respondent.tokenizer, example["messages"])
        labels = torch.tensor([[packing.IGNORED, *encoded.labels[:-1]]])
        with torch.inference_mode():
            expected = respondent.model(torch.tensor([encoded.ids]), labels=labels).loss.item()
        assert value == pytest.approx(expected, rel=2e-2)  # transformers rounds its logits to bf16


def test_a_model_that_knows_nothing_has_the_logarithm_of_its_vocabulary(respondent, examples, tmp_path, monkeypatch):
    flat = torch.full((1, respondent.model.config.vocab_size), -math.log(respondent.model.config.vocab_size))
    monkeypatch.setattr("avalab.models.predict.log_probabilities", lambda hidden, *_: flat.expand(len(hidden), -1))
    found = answers.answer_losses(respondent, examples[:1], tmp_path)
    assert found.item() == pytest.approx(math.log(respondent.model.config.vocab_size), rel=1e-5)


def test_what_was_scored_is_read_back_without_a_model(respondent, examples, tmp_path, monkeypatch):
    first = answers.answer_losses(respondent, examples, tmp_path)
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("the losses were known"))
    again = answers.answer_losses(answers.Respondent(respondent.artifact), examples, tmp_path)
    assert torch.equal(first, again)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"damaged")
    assert torch.equal(answers.answer_losses(respondent, examples, tmp_path), first)


def test_loss_and_rise_are_recorded_with_the_verdict(run):
    """Two draws, both 0.5 worse than the baseline's: the rise has no spread, whatever the losses' own."""
    theirs = torch.tensor([[0.5, 1.5], [2.5, 3.5]])
    rise = answers.record_answer_loss(run, "x", theirs + 0.5, baseline=theirs, part="held_out", details={"set": "a"})
    loss, recorded = run.records[-2:]
    assert (loss.metric, loss.value, loss.n, loss.details) == (
        "answer_loss:held_out",
        2.5,
        2,
        {"examples": 2, "set": "a"},
    )
    assert loss.low < 0 < 5 < loss.high
    assert (recorded.value, recorded.low, recorded.high, rise.value) == (0.5, 0.5, 0.5, 0.5)
    assert (recorded.unit, recorded.details["verdict"]) == ("nats/token", "worse")


def test_losses_of_other_draws_or_examples_cannot_be_paired(run):
    with pytest.raises(ValueError, match=r"cannot pair losses of shape \(2, 3\) with \(1, 3\)"):
        answers.record_answer_loss(run, "x", torch.ones(2, 3), baseline=torch.ones(1, 3), part="held_out")
