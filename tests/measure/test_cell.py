"""A cell: what is timed and counted by pencil, a real cell of the tiny model, and cells that fail."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel  # noqa: F401  (before what reaches torchao)

from avalab import cli, engines
from avalab.engines.engine import Engine, Facts, Request
from avalab.lab import process, trackers
from avalab.lab.run import Run
from avalab.measure import cell
from avalab.measure.cell import Cell, Workload
from avalab.models.sizes import weight_file_bytes

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny-llama"
WORK = Workload(prompts=(4, 16, 4000), new_tokens=3, samples=2, threads=1)
SMALL = Workload(prompts=(4,), new_tokens=3, samples=2, threads=1, batches=(1, 4))
CELL = Cell(
    runtime_bytes=100,
    load_seconds=[1.5],
    load_peak_bytes=300,
    loaded_bytes=250,
    peak_bytes=400,
    load_average=0.5,
    first={"16": [0.1, 0.2, 0.4]},
    further={"16": [[0.01, 0.03], [0.02, 0.02], [0.05, 0.05]]},
    joules={"16": [3.0, 6.0, 9.0]},
    when="2026-01-01T00:00:00+00:00",
    read_bytes_per_s=1e9,
    bytes_read_per_token=10_000_000,
)


def values(run: Run) -> dict[str, float | None]:
    return {record.metric: record.value for record in run.records}


def test_bytes_are_those_of_weights_in_any_engines_files(tmp_path):
    sizes = {"a.gguf": 5, "model.onnx": 7, "model.onnx.data": 11, "openvino_model.bin": 13, "x.safetensors": 17}
    for name, size in (sizes | {"openvino_tokenizer.bin": 100, "tokenizer.json": 100}).items():
        (tmp_path / name).write_bytes(bytes(size))
    assert weight_file_bytes(tmp_path) == 5 + 7 + 11 + 13 + 17


def test_a_token_counts_from_the_call_until_it_is_told(monkeypatch):
    """A clock that ticks one second a reading: started at 1, tokens told at 2, 3 and 4."""
    ticks = iter(range(1, 10))
    monkeypatch.setattr(trackers.time, "perf_counter", lambda: next(ticks))

    def new_tokens(state: dict, request: Request) -> list[int]:
        assert request.stops == ()
        for token in range(request.max_new_tokens):
            request.on_token(token)
        return []

    engine = Engine("counting", TINY, Facts(100, 10, (2,)), {"model": 1}, new_tokens, None)
    assert cell.time_tokens(engine, [1], 3) == [1, 2, 3]


def test_what_was_measured_becomes_records_by_pencil(own_run, artifact):
    """Median of 0.1, 0.2, 0.4 s: 200 ms, 16 / 0.2 = 80 token/s; two tokens in 0.04, 0.04 and 0.1 s: 50 token/s."""
    cell.record_cell(own_run, artifact, engine="torch", work=WORK, cell=CELL)
    found = values(own_run)
    assert found["artifact_bytes"] == (TINY / "model.safetensors").stat().st_size
    assert found["load_seconds"] == 1.5
    assert [found[f"peak_rss_bytes:{name}"] for name in ("load", "idle", "inference")] == [300, 250, 400]
    assert found["time_to_first_token_ms:prompt16:p50"] == pytest.approx(200)
    assert found["token_latency_ms:prompt16:p50"] == pytest.approx(25)
    assert found["prefill_tokens_per_s:prompt16"] == pytest.approx(80)
    assert found["decode_tokens_per_s:prompt16"] == pytest.approx(50)
    assert found["peak_rss_bytes:engine"] == 300
    assert found["roofline_fraction"] == pytest.approx(50 * 10_000_000 / 1e9)
    assert found["energy_joules_per_token:prompt16"] == pytest.approx(2)
    assert {record.engine for record in own_run.records} == {"torch"}


def test_a_machine_that_shows_no_energy_is_one_record_that_says_so(own_run, artifact):
    silent = replace(CELL, energy_note="not measured: no counter", joules={"16": []})
    cell.record_cell(own_run, artifact, engine="torch", work=WORK, cell=silent, subject="tiny in torch")
    (record,) = [r for r in own_run.records if r.metric.startswith("energy")]
    assert (record.subject, record.value, record.note) == ("tiny in torch", None, "not measured: no counter")


def test_two_visits_of_a_cell_are_one_with_the_samples_of_both_and_the_highest_peak():
    other = replace(
        CELL, peak_bytes=500, loaded_bytes=240, load_seconds=[2.5], first={"16": [0.3]}, read_bytes_per_s=2e9
    )
    both = cell.merge_cells([CELL, other])
    assert both.first == {"16": [0.1, 0.2, 0.4, 0.3]}
    assert len(both.further["16"]) == 6
    assert (both.peak_bytes, both.loaded_bytes, both.load_seconds) == (500, 245, [1.5, 2.5])
    assert both.read_bytes_per_s == 2e9
    assert cell.merge_cells([CELL]) == CELL


def test_a_cell_is_measured_in_a_process_of_its_own(artifact):
    """Prompts that the context of 1,024 tokens does not hold are left out."""
    found = cell.measure_cell(artifact, "torch", work=WORK)
    assert {length: len(samples) for length, samples in found.first.items()} == {"4": 2, "16": 2}
    assert [len(steps) for steps in found.further["16"]] == [2, 2]
    assert 0 < found.runtime_bytes < found.peak_bytes
    assert found.read_bytes_per_s > 0
    assert found.energy_note or all(map(len, found.joules.values()))
    assert min(found.first["4"]) > 0
    assert found.bytes_read_per_token == (TINY / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("again", "said"), [(0.1, ""), (0.7, "disturbed: others kept 0.7 processors busy")])
def test_a_disturbed_cell_is_measured_again_and_flagged_if_that_is_no_better(artifact, monkeypatch, again, said):
    answers = iter([asdict(replace(CELL, others=others)) for others in (0.8, again)])
    monkeypatch.setattr(cell, "ask_engine", lambda *_: next(answers))
    found = cell.measure_cell(artifact, "torch", work=WORK)
    assert (found.others, found.note) == (again, said)
    assert next(answers, None) is None


def test_a_cell_that_takes_too_long_says_so(artifact):
    with pytest.raises(RuntimeError, match=r"^tiny in torch took longer than 0.01 s$"):
        cell.measure_cell(artifact, "torch", work=replace(WORK, limit_seconds=0.01))


@pytest.mark.parametrize(
    ("engine", "work", "says"),
    [
        ("torch", replace(WORK, new_tokens=1), "got 1 and 2"),
        ("onnx", replace(WORK, predictable=True), "predicted for the engine torch only, got onnx"),
    ],
)
def test_what_cannot_be_measured_is_refused(artifact, engine, work, says):
    with pytest.raises(ValueError, match=says):
        cell.measure_cell(artifact, engine, work=work)


def test_what_an_engine_refuses_reaches_the_caller_as_the_same_error(artifact, in_this_process):
    with pytest.raises(engines.NotSupported, match="onnx cannot load tiny"):
        cell.measure_cell(artifact, "onnx", work=WORK)


def test_a_process_that_dies_says_why(artifact, monkeypatch):
    monkeypatch.setattr(process, "_run", lambda arguments, limit: -9)
    with pytest.raises(RuntimeError, match=r"tiny in torch failed: killed by SIGKILL, most likely out of memory"):
        cell.measure_cell(artifact, "torch", work=WORK)


def test_the_command_prints_a_cell_as_json(artifact, monkeypatch, capsys):
    monkeypatch.setattr(cell, "measure_cell", lambda artifact, engine, work: CELL)
    arguments = ["bench", str(artifact.path), "--engine", "torch", "--profile", "smoke", "--json"]
    monkeypatch.setattr("sys.argv", ["avalab", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert "decode_tokens_per_s:prompt16" in {r["metric"] for r in json.loads(capsys.readouterr().out)}


# --- several sequences at once ----------------------------------------------------------------------------------------


def test_every_batch_size_has_its_samples_and_takes_time(artifact, in_this_process):
    found = cell.measure_batches(artifact, "torch", work=SMALL)
    assert list(found) == ["1", "4"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for each in found.values() for seconds in each.values())


def test_an_engine_without_batches_names_those_that_have_them():
    with pytest.raises(engines.NotSupported, match="llamacpp offers no batches here; torch, openvino, onnx do"):
        cell.run_batches({"engine": "llamacpp", "batches": (1, 4)})


def test_a_file_that_is_larger_than_the_limit_is_refused_before_anything_starts(artifact, monkeypatch):
    monkeypatch.setattr(process, "call", lambda *a, **k: pytest.fail("started"))
    work = Workload(memory_cap_gib=0.001)
    with pytest.raises(ValueError, match=r"the file of tiny is 0\.00 GiB, the limit 0\.001 GiB in all"):
        cell.measure_cell(artifact, "torch", work=work)


def test_an_artefact_that_takes_more_than_the_limit_ends_in_one_line(artifact):
    """The tiny model in torch allocates more than its file's own 2 MB and 1 MB beside."""
    cap = (artifact.bytes + 2**20) / 2**30
    work = Workload(prompts=(8,), new_tokens=2, samples=1, threads=1, memory_cap_gib=cap)
    with pytest.raises(RuntimeError, match="tiny in torch failed") as raised:
        cell.measure_cell(artifact, "torch", work=work)
    assert "\n" not in str(raised.value)
