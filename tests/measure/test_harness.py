"""lm-evaluation-harness: how its numbers become records without it, and a local task with it."""

import importlib.util
import json
import math

import pytest
import torch
from transformers import PreTrainedModel  # noqa: F401  before the package, whose modules reach torchao

from avalab import engines
from avalab.lab.assets import AssetUnavailable
from avalab.measure import harness
from avalab.models import checkpoint

ROW = {"name": "seasons", "alias": "seasons", "sample_len": 10, "acc,none": 0.8, "acc_stderr,none": 0.4 / 3}
CHOICES = ["the ship left at dawn", "doors close at nine", "seven"]
CASES = [
    {"question": f"Say {word}:", "choices": CHOICES, "answer": i % 3} for i, word in enumerate("abcdefghijkl")
]  # fmt: skip
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3}}
"""

with_the_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra `harness`)"
)


def answer(row: dict, task: str = "seasons") -> dict:
    counted = {task: {"original": 50, "effective": 10}}
    return {"results": {task: row}, "n-samples": counted, "versions": {task: 3}, "n-shot": {task: 5}}


# --- conversion --------------------------------------------------------------------------------------------------


def test_eight_of_ten_right_become_a_share_with_the_score_interval():
    """sqrt(0.8 x 0.2 / 9) = 0.4 / 3 is the error the harness gives; Wilson's interval of 8 of 10 is 0.490 to 0.943."""
    (score,) = harness.score_tasks(answer(ROW))
    assert (score.task, score.metric, score.estimate.value, score.estimate.n) == ("seasons", "acc", 0.8, 10)
    assert (score.estimate.low, score.estimate.high) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert (score.details["version"], score.details["shots"], score.details["documents"]) == (3, 5, 50)


def test_all_right_does_not_mean_that_nothing_is_uncertain():
    found = harness.interval(1.0, 0.0, 10)
    assert found.low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)


def test_a_mean_that_is_no_share_has_the_normal_interval():
    found = harness.interval(0.8, 0.05, 10)
    assert (found.low, found.high) == pytest.approx((0.8 - 0.098, 0.8 + 0.098), abs=1e-4)
    assert harness.interval(23.5, 0.5, 10).high == pytest.approx(23.5 + 0.98, abs=1e-4)


def test_without_a_standard_error_there_is_no_interval():
    (score,) = harness.score_tasks(answer({**ROW, "acc_stderr,none": "N/A"}))
    assert (score.estimate.low, score.estimate.high, score.details["stderr"]) == (None, None, None)


def test_a_way_of_extracting_answers_stands_behind_the_metric():
    row = {"sample_len": 4, "exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}
    assert [s.metric for s in harness.score_tasks(answer(row))] == [
        "exact_match:strict-match",
        "exact_match:flexible-extract",
    ]


def test_a_group_counts_the_documents_of_its_members():
    row = {"alias": "g", "sample_len": 30, "sample_count": {"acc,none": 28}, "acc,none": 0.5, "acc_stderr,none": 0.1}
    (score,) = harness.score_tasks(answer(row, "group"))
    assert score.estimate.n == 28


def test_what_is_no_number_is_left_out():
    row = {**ROW, "note,none": "text", "ppl,none": math.nan, "bypass,none": True}
    assert [s.metric for s in harness.score_tasks(answer(row))] == ["acc"]


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(engines.EngineUnavailable, match=r"lm-eval; install it: pip install -e \"\.\[harness\]\""):
        harness.require_harness()


def test_an_unknown_task_is_refused_with_its_neighbours():
    with pytest.raises(ValueError, match=r"unknown task 'helaswag' among 2 .*similar: hellaswag"):
        harness.refuse_unknown(["mmlu", "helaswag"], ["hellaswag", "mmlu"])


class Unreachable:
    """A task manager without a network."""

    all_tasks = ("gsm8k",)

    def load(self, tasks):
        raise ConnectionError("no route\nand much more")


def test_data_out_of_reach_is_one_line_that_names_the_task():
    with pytest.raises(AssetUnavailable, match=r"data of task 'gsm8k' cannot be reached: ConnectionError: no route$"):
        harness.load_task("gsm8k", Unreachable())


@pytest.fixture
def pretended(monkeypatch):
    """A harness that knows two tasks and is killed at the second one when first asked; what it was asked is listed."""
    asked = []

    def ask(loaded):
        (task,) = loaded
        asked.append(task)
        if asked == ["one", "two"]:
            raise KeyboardInterrupt
        return answer(ROW, task)

    manager = type("Manager", (), {"all_tasks": ["one", "two"]})
    monkeypatch.setattr(harness, "load_task", lambda task, *_: [task])
    monkeypatch.setattr(harness, "require_harness", lambda: None)
    monkeypatch.setattr(harness.importlib.metadata, "version", lambda name: "0")
    monkeypatch.setattr(harness, "_manager", lambda folder: manager)
    monkeypatch.setattr(harness, "_asker", lambda *_: ask)
    return asked


def test_a_killed_run_goes_on_with_the_next_task(own_run, pretended):
    base = checkpoint.base_artifact(own_run)
    with pytest.raises(KeyboardInterrupt):
        harness.record_tasks(base, ["one", "two"], run=own_run)
    found = harness.record_tasks(base, ["one", "two"], run=own_run)
    assert pretended == ["one", "two", "two"], "the finished task was not asked again"
    assert [r.metric for r in found] == ["harness:one:acc", "harness:two:acc"]
    assert [r.metric for r in own_run.records] == ["harness:one:acc", *[r.metric for r in found]]


def test_a_record_says_what_it_is_of(own_run, pretended):
    base = checkpoint.base_artifact(own_run)
    (record,) = harness.record_tasks(base, ["one"], run=own_run, limit=10)
    assert (record.subject, record.artifact_sha256, record.n) == (base.name, base.sha256, 10)
    assert (record.details["limit"], record.details["chat"]) == (10, False)


def test_no_task_and_no_folder_are_refused(own_run, pretended, tmp_path):
    base = checkpoint.base_artifact(own_run)
    with pytest.raises(ValueError, match="no task named"):
        harness.record_tasks(base, [], run=own_run)
    with pytest.raises(ValueError, match="is no folder of task files"):
        harness.record_tasks(base, ["one"], run=own_run, folder=tmp_path / "absent")


# --- the real one ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tasks with their data beside them, one of which has lost it, and a group of two."""
    if importlib.util.find_spec("datasets"):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    made = tmp_path / "tasks"
    made.mkdir()
    (made / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in CASES))
    for name, data in (("lab_seasons", "cases.jsonl"), ("lab_again", "cases.jsonl"), ("lab_lost", "absent.jsonl")):
        (made / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    group = {"group": "lab_both", "task": ["lab_seasons", "lab_again"], "aggregate_metric_list": [{"metric": "acc"}]}
    (made / "lab_both.yaml").write_text(json.dumps(group))  # JSON is YAML
    return made


@torch.inference_mode()
def log_likelihood(model, tokenizer, question: str, choice: str) -> float:
    """Of the choice's tokens after the question's."""
    context, whole = tokenizer(question).input_ids, tokenizer(f"{question} {choice}").input_ids
    logits = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return sum(logits[place - 1, whole[place]].item() for place in range(len(context), len(whole)))


@with_the_harness
def test_a_local_task_gives_the_share_that_the_models_own_likelihoods_give(own_run, folder):
    base = checkpoint.base_artifact(own_run)
    (record,) = harness.record_tasks(base, ["lab_seasons"], run=own_run, limit=12, folder=folder)
    model, tokenizer = checkpoint.load_model(base), checkpoint.load_tokenizer(base)
    picked = []
    for case in CASES:
        likely = [log_likelihood(model, tokenizer, case["question"], choice) for choice in CHOICES]
        picked.append(likely.index(max(likely)) == case["answer"])
    assert (record.metric, record.n) == ("harness:lab_seasons:acc", 12)
    assert record.value == pytest.approx(sum(picked) / 12)
    assert record.low <= record.value <= record.high
    assert record.details["version"] == 3


@with_the_harness
def test_a_group_is_scored_with_its_members(own_run, folder):
    found = {
        r.metric: r
        for r in harness.record_tasks(
            checkpoint.base_artifact(own_run), ["lab_both"], run=own_run, limit=12, folder=folder
        )
    }
    whole, *members = (found[f"harness:{name}:acc"] for name in ("lab_both", "lab_seasons", "lab_again"))
    assert [member.n for member in members] == [12, 12]
    assert whole.n == 24
    assert whole.value == pytest.approx(members[0].value)


@with_the_harness
def test_a_local_task_without_its_data_is_named(own_run, folder):
    with pytest.raises(AssetUnavailable, match="data of task 'lab_lost' cannot be reached"):
        harness.record_tasks(checkpoint.base_artifact(own_run), ["lab_lost"], run=own_run, folder=folder)


@with_the_harness
def test_a_hub_task_without_a_network_is_named(own_run):
    with pytest.raises(AssetUnavailable, match="data of task 'hellaswag' cannot be reached"):
        harness.record_tasks(checkpoint.base_artifact(own_run), ["hellaswag"], run=own_run)
