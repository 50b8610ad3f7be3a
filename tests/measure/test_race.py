"""The race: its order, its end, its failures and its memory of what was measured; engines are played by a stand-in."""

import json
from dataclasses import replace

import pytest
from transformers import PreTrainedModel  # noqa: F401  (before what reaches torchao)

from avalab import engines
from avalab.compress import quantize
from avalab.lab import artifacts
from avalab.lab.run import Run
from avalab.measure import cell, race
from avalab.measure.cell import Cell, Workload
from avalab.measure.race import Entry

STEADY = Cell(
    runtime_bytes=100,
    load_seconds=[1.0],
    load_peak_bytes=300,
    loaded_bytes=250,
    peak_bytes=400,
    load_average=0.5,
    first={"16": [0.1] * 6},
    further={"16": [[0.02, 0.02]] * 6},
    joules={"16": []},
    when="2026-01-01T00:00:00+00:00",
    energy_note="not measured: no counter",
)
SHAKY = replace(STEADY, first={"16": [0.1, 0.2]}, further={"16": [[0.02, 0.02], [0.04, 0.04]]})
SMALL = Workload(samples=2, new_tokens=3)


@pytest.fixture
def entries(base):
    return [Entry(f"{name} in {name}", base, name, 1) for name in ("torch", "openvino", "onnx")]


def played(monkeypatch, behaviour: dict) -> list[str]:
    """Let `measure` answer by engine; returns the growing list of engines that were asked."""
    asked: list[str] = []

    def measure(artifact, engine, *, work):
        asked.append(engine)
        answer = behaviour[engine]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(cell, "measure_cell", measure)
    return asked


def hold(run: Run, entries: list[Entry], cap: float = 1e9):
    return race.hold_race(run, entries, work=SMALL, cap_seconds=cap)


def test_a_cell_is_settled_when_the_interval_of_every_median_is_narrow():
    """Six equal samples have an interval of width zero; two have none."""
    assert race.is_settled(STEADY)
    assert not race.is_settled(SHAKY)
    assert not race.is_settled(replace(STEADY, first={"16": [0.1, 0.1, 0.1, 0.1, 0.1, 0.2]}))


def test_settled_cells_are_visited_once_and_others_until_the_cap(own_run, entries, monkeypatch):
    """The cap of no seconds ends the race after every cell's first visit."""
    asked = played(monkeypatch, {"torch": STEADY, "openvino": SHAKY, "onnx": STEADY})
    found = hold(own_run, entries, cap=0)
    assert sorted(asked) == ["onnx", "openvino", "torch"]
    assert all(isinstance(each, Cell) for each in found.values())


def test_a_cell_that_is_not_settled_is_visited_again_and_its_samples_are_kept(own_run, entries, monkeypatch):
    asked = played(monkeypatch, {"torch": STEADY, "openvino": SHAKY, "onnx": STEADY})
    ticks = iter(range(10**6))
    monkeypatch.setattr(race.time, "monotonic", lambda: next(ticks))  # a visit takes one second
    found = hold(own_run, entries, cap=5)
    assert asked.count("openvino") == 4  # three first visits, then one second each until there are more than five
    assert asked.count("torch") == asked.count("onnx") == 1
    assert len(found[entries[1]].first["16"]) == 8


def test_a_race_that_the_cap_ended_goes_on_only_under_a_longer_cap(own_run, entries, monkeypatch):
    asked = played(monkeypatch, {"torch": STEADY, "openvino": SHAKY, "onnx": STEADY})
    ticks = iter(range(10**6))
    monkeypatch.setattr(race.time, "monotonic", lambda: next(ticks))  # a visit takes one second
    for cap, visits in ((5, 4), (5, 4), (4, 4), (8, 7)):
        hold(own_run, entries, cap=cap)
        assert asked.count("openvino") == visits
    assert asked.count("torch") == asked.count("onnx") == 1


def test_what_failed_is_a_row_with_a_note_and_the_race_goes_on(own_run, entries, monkeypatch):
    played(monkeypatch, {"torch": STEADY, "openvino": RuntimeError("killed, most likely out of memory"),
                         "onnx": engines.NotSupported("onnx cannot load this")})  # fmt: skip
    found = hold(own_run, entries)
    assert isinstance(found[entries[0]], Cell)
    notes = {r.subject: r.note for r in own_run.records if r.value is None and r.metric == "decode_tokens_per_s"}
    assert notes == {
        "openvino in openvino": "killed, most likely out of memory",
        "onnx in onnx": "onnx cannot load this",
    }


def test_a_missing_library_is_said_once_for_each_engine_and_asked_for_again_next_time(own_run, base, monkeypatch):
    entries = [Entry(f"{name} in onnx", base, "onnx", threads) for name in ("a", "b") for threads in (1, 2)]
    asked = played(monkeypatch, {"onnx": engines.EngineUnavailable("engine onnx needs the package x; install it")})
    hold(own_run, entries)
    assert asked == ["onnx"]
    (record,) = own_run.records
    assert (record.subject, record.note) == ("onnx", "not measured: engine onnx needs the package x; install it")
    asked.clear()
    hold(own_run, entries)
    assert asked == ["onnx"]


def test_a_killed_race_goes_on_and_a_finished_one_is_read_back(own_run, entries, monkeypatch):
    asked = played(monkeypatch, {"torch": STEADY, "openvino": KeyboardInterrupt(), "onnx": STEADY})
    with pytest.raises(KeyboardInterrupt):
        _hold_interrupted(own_run, entries, monkeypatch)
    before = [name for name in asked if name != "openvino"]
    file = own_run.artifacts_dir / "cache" / "race.jsonl"
    if file.is_file():
        file.write_text(file.read_text() + '{"key": "half-wri')  # the line that was being written
    asked.clear()
    played_again = played(monkeypatch, dict.fromkeys(("torch", "openvino", "onnx"), STEADY))
    hold(own_run, entries)
    assert sorted(before + played_again) == ["onnx", "openvino", "torch"]
    played_again.clear()
    hold(own_run, entries)
    assert played_again == []


def _hold_interrupted(run: Run, entries: list[Entry], monkeypatch) -> None:
    answer = cell.measure_cell

    def measure(artifact, engine, *, work):
        if engine == "openvino":
            raise KeyboardInterrupt
        return answer(artifact, engine, work=work)

    monkeypatch.setattr(cell, "measure_cell", measure)
    hold(run, entries)


def test_other_sizes_or_another_number_of_threads_are_other_measurements(own_run, entries):
    first, *_ = entries
    keys = {race.visit_key(first, SMALL, own_run), race.visit_key(replace(first, threads=2), SMALL, own_run)}
    keys |= {race.visit_key(first, replace(SMALL, new_tokens=4), own_run), race.visit_key(entries[1], SMALL, own_run)}
    assert len(keys) == 4
    assert race.visit_key(first, SMALL, own_run) == race.visit_key(first, SMALL, own_run)


def test_the_order_of_a_round_is_drawn_anew(own_run, base, monkeypatch):
    """Eight cells, two rounds: the same order would be a coincidence of one in 40,320."""
    entries = [Entry(f"{i} in torch", base, "torch", i + 1) for i in range(8)]
    order: list[int] = []

    def measure(artifact, engine, *, work):
        order.append(work.threads)
        return SHAKY if len(order) <= 8 else STEADY

    monkeypatch.setattr(cell, "measure_cell", measure)
    ticks = iter(range(10**6))
    monkeypatch.setattr(race.time, "monotonic", lambda: next(ticks))
    hold(own_run, entries, cap=15)
    assert sorted(order[:8]) == sorted(order[8:16]) == list(range(1, 9))
    assert order[:8] != order[8:16]


# --- who takes part -----------------------------------------------------------------------------------------------


def test_every_artefact_takes_part_in_every_engine_that_loads_it(base):
    found = race.list_entries({"bf16": base}, threads=(1, 2), skip=[("dense", "tensorrt"), ("gguf", "torch")])
    assert {(e.subject, e.threads) for e in found} == {
        ("bf16 in torch", 1),
        ("bf16 in torch", 2),
        ("bf16 in vllm", 1),
        ("bf16 in vllm", 2),
    }


def test_a_form_that_cannot_be_made_here_is_a_record_and_an_unknown_one_is_refused(own_run, monkeypatch):
    def unavailable(base, run):
        raise engines.EngineUnavailable("engine x needs y")

    monkeypatch.setitem(race.FORMS, "onnx-int4", unavailable)
    assert list(race.make_forms(own_run, ["bf16", "onnx-int4"])) == ["bf16"]
    assert own_run.records[0].note == "not measured: engine x needs y"
    with pytest.raises(ValueError, match="no form steam; choose from bf16"):
        race.make_forms(own_run, ["steam"])


def test_the_mixed_grid_is_made_in_the_size_that_was_made_before(own_run, base, monkeypatch):
    asked: list[dict] = []
    monkeypatch.setattr(quantize, "compress_artifact", lambda base, method, run, **size: asked.append(size) or base)
    race.make_forms(own_run, ["ava"])
    own_run.artifacts_dir.mkdir(parents=True, exist_ok=True)
    recipe = [{"step": "ava", "bytes": 700_000}]
    origin = {"name": base.name, "sha256": base.sha256}
    artifacts.write_artifact(
        "x+ava", own_run.artifacts_dir, lambda folder: None, base=origin, recipe=recipe, format="ava"
    )
    race.make_forms(own_run, ["ava"])
    assert asked == [{"bits_per_weight": race.AVA_BITS}, {"bytes": 700_000}]


def test_a_race_of_real_cells_leaves_records_and_a_file(own_run, base):
    """One cell of the tiny model, at the cap after its first visit."""
    small = Workload(prompts=(4,), new_tokens=3, samples=1, limit_seconds=120)
    entry = Entry("bf16 in torch", base, "torch", 1)
    found = race.hold_race(own_run, [entry], work=small, cap_seconds=0)
    assert isinstance(found[entry], Cell)
    metrics = {record.metric for record in own_run.records}
    assert {"prefill_tokens_per_s:prompt4", "peak_rss_bytes:engine", "roofline_fraction"} <= metrics
    lines = (own_run.artifacts_dir / "cache" / "race.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["seconds"] > 0


# --- several sequences at once ----------------------------------------------------------------------------------------


def test_speeds_are_those_of_all_sequences_together(own_run, base, monkeypatch):
    """Eight tokens of prompt, four sequences, 0.1 s: 320 tokens/s; three further tokens of each in 0.1 s: 120."""
    seconds = {"4": {"prefill": [0.1], "decode": [0.1]}}
    monkeypatch.setattr(cell, "measure_batches", lambda artifact, engine, work: seconds)
    race.record_batches(own_run, [Entry("bf16 in torch", base, "torch", 1), Entry("slow", base, "torch", 0)])
    found = {r.metric: r.value for r in own_run.records if r.subject == "bf16 in torch"}
    assert found["prefill_tokens_per_s:batch4"] == pytest.approx(320)
    assert found["decode_tokens_per_s:batch4"] == pytest.approx(120)
    assert not [r for r in own_run.records if r.subject == "slow"]


def test_what_fails_is_a_record_and_a_missing_library_was_said_before(own_run, base, monkeypatch):
    def measure(artifact, name, work):
        raise engines.EngineUnavailable("no") if name == "vllm" else engines.NotSupported("no batches")

    monkeypatch.setattr(cell, "measure_batches", measure)
    race.record_batches(own_run, [Entry(f"a in {name}", base, name, 1) for name in ("vllm", "llamacpp")])
    assert {r.subject: r.note for r in own_run.records if r.value is None} == {"a in llamacpp": "no batches"}
