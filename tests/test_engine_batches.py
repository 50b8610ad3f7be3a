"""Batches: sizes and samples of a real cell of the tiny model, speeds by pencil, and engines without batches."""

import pytest
from transformers import PreTrainedModel  # noqa: F401  (before what reaches torchao)

from avalab import engine_batches, engines, process
from avalab.contestants import Entry
from avalab.engine_batches import Batches

SMALL = Batches(prompt_tokens=4, new_tokens=3, samples=2, threads=1, sizes=(1, 4))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Both halves of a call without the process."""
    monkeypatch.setattr(process, "_run", lambda arguments, limit: process.main(*arguments[:3]) or 0)


def test_every_batch_size_has_its_samples_and_takes_time(base):
    found = engine_batches.measure(base.path, "torch", SMALL)
    assert list(found) == ["1", "4"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for each in found.values() for seconds in each.values())


def test_an_engine_without_batches_names_those_that_have_them(base):
    with pytest.raises(engines.NotSupported, match="llamacpp offers no batches here; torch, openvino, onnx do"):
        engine_batches.measure(base.path, "llamacpp", SMALL)


def test_speeds_are_those_of_all_sequences_together(run, base, monkeypatch):
    """Eight tokens of prompt, four sequences, 0.1 s: 320 tokens/s; three further tokens of each in 0.1 s: 120."""
    seconds = {"4": {"prefill": [0.1], "decode": [0.1]}}
    monkeypatch.setattr(engine_batches, "measure", lambda folder, name, work: seconds)
    engine_batches.record_all(run, [Entry("bf16 in torch", base, "torch", 1), Entry("slow", base, "torch", 0)])
    found = {r.metric: r.value for r in run.records if r.subject == "bf16 in torch"}
    assert found["prefill_tokens_per_s:batch4"] == pytest.approx(320)
    assert found["decode_tokens_per_s:batch4"] == pytest.approx(120)
    assert not [r for r in run.records if r.subject == "slow"]


def test_what_fails_is_a_record_and_a_missing_library_was_said_before(run, base, monkeypatch):
    def measure(folder, name, work):
        raise engines.EngineUnavailable("no") if name == "vllm" else engines.NotSupported("no batches")

    monkeypatch.setattr(engine_batches, "measure", measure)
    engine_batches.record_all(run, [Entry(f"a in {name}", base, name, 1) for name in ("vllm", "llamacpp")])
    assert {r.subject: r.note for r in run.records if r.value is None} == {"a in llamacpp": "no batches"}
