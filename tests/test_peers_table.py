"""The table of peers says what was recorded, where it is from, and what is missing."""

import pytest

from avalab import peers_table
from avalab.experiment import Run


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("avalab.experiment.ROOT", tmp_path)
    monkeypatch.setattr(peers_table, "ROOT", tmp_path)
    return Run("peers", "smoke", 0)


def test_without_records_there_is_no_row_and_the_way_to_get_some(run):
    _, rows, note = peers_table.recorded(run)
    assert rows == ()
    assert "make bench-peers" in note


def test_a_file_has_its_bytes_its_divergence_and_the_ratio_of_every_form(run):
    text = run.profile.eval_texts[0]
    run.record("gptq", "artifact_bytes", 85.9e6, "bytes", n=1)
    run.record("gptq", "compress_seconds", 148.2, "s", n=1)
    run.record("gptq", f"kl_divergence:{text}", 0.0812, "nats/token", low=0.07, high=0.09, n=16)
    run.record("gptq", f"kl_ratio:{text}:packed", 0.4, "1", low=0.35, high=0.45, n=16)
    run.record("autoround", "kl_divergence", None, "nats/token", note="needs the package auto_round")
    run.save()
    header, rows, note = peers_table.recorded(run)
    first, second = (dict(zip(header, row, strict=True)) for row in rows)
    assert [first[name] for name in ("file", "MB", "seconds")] == ["gptq", "85.9", "148"]
    assert first[f"KL, {text}"] == "0.081 [0.070, 0.090]"
    assert first[f"ours/its, packed embedding, {text}"] == "0.40 [0.35, 0.45]"
    assert first[f"ours/its, GGUF, {text}"] == ""
    assert second["MB"] == "needs the package auto_round"
    assert "peers.json" in note


def asked(run, subject: str, right: int, **pairs) -> None:
    """A file with its size and calls, and the differences to the lab's forms by their ending."""
    run.record(subject, "artifact_bytes", 85.9e6, "bytes", n=1)
    run.record(subject, "call_accuracy_forced:all", right / 64, "1", low=0.5, high=0.7, n=64)
    for form, value in pairs.items():
        metric = f"call_accuracy_forced_difference:all{form and ':'}{form}"
        run.record(subject, metric, value, "1", low=value - 0.1, high=value + 0.1, n=64, details={"p_value": 0.6872})


def test_calls_have_two_columns_the_second_against_the_first_form_there_is(run):
    asked(run, "base", 37)
    asked(run, "gptq", 35, **{"": 0.03, "packed": 0.0, "gguf": -0.02})
    asked(run, "gguf-q2_k", 30, gguf=-0.0156)
    run.record("nncf", "artifact_bytes", 85.9e6, "bytes", n=1)
    run.record("nncf", "call_accuracy_forced:all", None, "1", note="not asked: openvino takes no grammar")
    run.record("hqq", "kl_divergence", None, "nats/token", note="needs the package hqq")
    run.save()
    header, rows, _ = peers_table.recorded(run)
    assert header[-2:] == peers_table.CALLS
    assert {row[0]: row[-2:] for row in rows} == {
        "base": ("37 of 64", ""),
        "gptq": ("35 of 64", "+0.03 [-0.07, +0.13], p 0.69"),
        "gguf-q2_k": ("30 of 64", "GGUF: -0.02 [-0.12, +0.08], p 0.69"),
        "nncf": ("not asked: openvino takes no grammar", ""),
        "hqq": ("", ""),
    }


def test_records_of_before_calls_were_asked_have_the_columns_they_had(run):
    run.record("gptq", "artifact_bytes", 85.9e6, "bytes", n=1)
    run.record("hqq", "kl_divergence", None, "nats/token", note="needs the package hqq")
    run.save()
    header, rows, _ = peers_table.recorded(run)
    assert not set(header) & set(peers_table.CALLS)
    assert {len(row) for row in rows} == {len(header)}
