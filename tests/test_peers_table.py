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
