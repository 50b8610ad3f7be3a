"""The shortlist: whose rows they are, what is left out and why, and numbers that a pencil gives."""

from types import SimpleNamespace

import pytest

from avalab.data.calls import Verdict
from avalab.lab import process
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import ProcessFailed
from avalab.lab.run import Run
from avalab.measure import answers, context
from avalab.plan import shortlist


def test_the_models_of_a_profile_share_one_list_of_records_and_have_folders_of_their_own():
    whole = Run("t", "sizes")
    runs = shortlist.runs_of(whole)
    assert [shortlist.short_name(run) for run in runs] == ["smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"]
    assert len({run.artifacts_dir for run in runs}) == 3
    assert all(run.records is whole.records for run in runs)


def test_a_model_that_was_asked_for_is_the_only_one():
    assert [run.model for run in shortlist.runs_of(Run("t", "sizes", model="data/tiny-llama"))] == ["data/tiny-llama"]


@pytest.fixture
def rows(run, base):
    return shortlist.make_rows(run, ("bf16", "q8_0"))


def test_a_form_is_a_row_in_every_engine_that_reads_it_with_predicted_bytes_within_two_per_cent(run, rows):
    """Of the tiny model's file the header is a part; of a real one's 0.1 %."""
    assert [row.subject for row in rows] == ["tiny-llama bf16 in torch", "tiny-llama q8_0 in openvino"]
    found = {(r.subject, r.metric): r.value for r in run.records}
    for row in rows:
        measured, predicted = (found[row.subject, m] for m in ("artifact_bytes", "predicted_bytes:artifact"))
        assert measured == pytest.approx(predicted, rel=0.02)


def test_a_form_that_cannot_be_made_is_a_record_that_says_why(own_plan_run):
    assert shortlist.make_rows(own_plan_run, ("published",)) == []
    (record,) = [r for r in own_plan_run.records if r.value is None]
    assert record.subject == "tiny-llama published"
    assert "not made:" in record.note


@pytest.fixture
def own_plan_run(run):
    return Run("t", "smoke", records=[])


def test_what_would_take_too_long_is_refused_with_both_numbers(run, base, monkeypatch):
    """10 minutes for a tenth of the weights are 100 for all of them."""
    made = SimpleNamespace(
        name="small+ava", card={"measured": {"compress_seconds": 600.0}, "base": {"sha256": "other"}}
    )
    monkeypatch.setattr(shortlist, "_made_by_ava", lambda run: [(made, base.bytes // 20)])
    with pytest.raises(
        ProcessFailed, match=r"about 100 minutes for it \(10 measured for small\+ava\), this run allows"
    ):
        shortlist.refuse_long(run, base, 99)
    shortlist.refuse_long(run, base, 101)


def test_less_free_memory_than_making_takes_is_refused_with_both_numbers(base, monkeypatch):
    """11 bytes for each of 10^9 weights, and 2 GB free."""
    large = Artifact(base.path, base.card | {"files": [{"name": "model.safetensors", "bytes": 2 * 10**9}]})
    monkeypatch.setattr(shortlist.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 10**9))
    with pytest.raises(ProcessFailed, match=r"making it takes about 11\.0 GB of memory, 2\.0 GB are free"):
        shortlist.refuse_large(large, "q8_0")
    shortlist.refuse_large(large, "published")


def test_what_was_made_before_is_never_refused(own_plan_run, rows, monkeypatch):
    monkeypatch.setattr(shortlist.psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    assert [row.form for row in shortlist.make_rows(own_plan_run, ("q8_0",))] == ["q8_0"]


def test_calls_of_all_categories_are_one_share_with_every_verdict(own_plan_run, rows, monkeypatch):
    verdicts = {"toolbox_simple": [True, False], "toolbox_multiple": [True, True]}

    def told(run, subject, respondent, *, category: str, **how):
        return [Verdict(right, "" if right else "no_call") for right in verdicts[category]]

    monkeypatch.setattr(answers, "record_calls", told)
    shortlist.record_calls(own_plan_run, rows[:1])
    record = own_plan_run.records[-1]
    assert (record.metric, record.value, record.n) == (shortlist.TOGETHER, 0.75, 4)
    assert record.details["right"] == "1011"


def test_a_point_becomes_memory_above_the_runtime_and_speeds(own_plan_run):
    """Peak 500 of which 100 are the runtime's; tokens of 10, 20 and 30 ms; 48 tokens of prompt in 2 s."""
    point = context.Point(64, 0.02, 2.0, 500, 450, 0.01, (0.01, 0.02, 0.03), details={"memory": {"runtime": 100}})
    shortlist._record_point(lambda metric, *value, **more: own_plan_run.record("s", metric, *value, **more), point)
    found = {r.metric: r.value for r in own_plan_run.records}
    assert found["peak_rss_bytes:engine:context64"] == 400
    assert found["predicted_bytes:peak_rss_bytes:engine:context64"] == 350
    assert found["token_latency_ms:context64"] == pytest.approx(20)
    assert found["decode_tokens_per_s:context64"] == pytest.approx(50)
    assert found["prefill_tokens_per_s:context64"] == pytest.approx(24)


def test_contexts_are_measured_once_and_again_only_when_asked(own_plan_run, rows, monkeypatch):
    asked = []

    def measured(artifact, engine, **how):
        asked.append(how["lengths"])
        return [
            context.Point(n, 0.01, 1.0, 10, 9, samples=(0.01,), details={"memory": {"runtime": 1}}) for n in (32, 64)
        ]

    monkeypatch.setattr(context, "measure_lengths", measured)
    for again in (False, False, True):
        shortlist.record_contexts(own_plan_run, rows[:1], again=again)
    assert asked == [(32, 64)] * 2


def test_a_row_whose_process_dies_is_a_record_and_the_next_row_is_measured(own_plan_run, rows, monkeypatch):
    def dies(*arguments, **how):
        raise process.Killed("q8_0 in llamacpp failed: crashed with SIGSEGV", "SIGSEGV")

    monkeypatch.setattr(shortlist, "measured_contexts", dies)
    shortlist.record_contexts(own_plan_run, rows)
    assert [r.value for r in own_plan_run.records] == [None] * len(rows)
    assert "SIGSEGV" in own_plan_run.records[0].note


def test_a_measurement_that_was_stopped_half_way_is_told_and_tried_again(own_plan_run, rows, monkeypatch):
    about, asked = {"details": {"memory": {"runtime": 1}}}, []

    def stopped(artifact, engine, **how):
        asked.append(how["lengths"])
        rest = context.Point(64, None, None, None, note="stopped after 1 of 2 lengths: killed")
        return [context.Point(32, 0.01, 1.0, 10, 9, samples=(0.01,), **about), rest]

    monkeypatch.setattr(context, "measure_lengths", stopped)
    for _ in range(2):
        shortlist.record_contexts(own_plan_run, rows[1:], again=not asked)
    assert len(asked) == 2
    assert own_plan_run.records[-1].note == "stopped after 1 of 2 lengths: killed"
