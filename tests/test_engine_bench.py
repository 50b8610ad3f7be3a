"""One cell of the race: what is timed and counted by pencil, a real cell of the tiny model, and cells that fail."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel  # noqa: F401  (before what reaches torchao)

from avalab import alone, artifacts, cli, engine_bench, engines
from avalab.engine_bench import Cell, Race
from avalab.engines.engine import Engine, Facts, Request
from avalab.experiment import Run

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny-llama"
RACE = Race(prompts=(4, 16, 4000), new_tokens=3, samples=2, threads=1)
CELL = Cell(
    runtime_bytes=100,
    load_seconds=[1.5],
    load_peak_bytes=300,
    idle_bytes=250,
    peak_bytes=400,
    load_average=0.5,
    first={"16": [0.1, 0.2, 0.4]},
    further={"16": [[0.01, 0.03], [0.02, 0.02], [0.05, 0.05]]},
    joules={"16": [3.0, 6.0, 9.0]},
    read_bytes_per_s=1e9,
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "artifacts_dir", property(lambda self: tmp_path / self.name))
    return Run("t", "smoke")


@pytest.fixture
def artifact(tmp_path):
    def save(folder: Path) -> None:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((TINY / name).read_bytes())

    return artifacts.write("tiny", tmp_path, save, base={"name": "x", "sha256": "y"}, recipe=[], format="bf16")


def values(run: Run) -> dict[str, float | None]:
    return {record.metric: record.value for record in run.records}


def test_bytes_are_those_of_weights_in_any_engines_files(tmp_path):
    sizes = {"a.gguf": 5, "model.onnx": 7, "model.onnx.data": 11, "openvino_model.bin": 13, "x.safetensors": 17}
    for name, size in (sizes | {"openvino_tokenizer.bin": 100, "tokenizer.json": 100}).items():
        (tmp_path / name).write_bytes(bytes(size))
    assert engine_bench.weight_bytes(tmp_path) == 5 + 7 + 11 + 13 + 17


def test_a_token_counts_from_the_call_until_it_is_told(monkeypatch):
    """A clock that ticks one second a reading: started at 1, tokens told at 2, 3 and 4."""
    ticks = iter(range(1, 10))
    monkeypatch.setattr(engine_bench.time, "perf_counter", lambda: next(ticks))

    def new_tokens(state: dict, request: Request) -> list[int]:
        assert request.stops == ()
        for token in range(request.max_new_tokens):
            request.on_token(token)
        return []

    engine = Engine("counting", TINY, Facts(100, 10, (2,)), {"model": 1}, new_tokens, None)
    assert engine_bench.timed(engine, [1], 3) == [1, 2, 3]


def test_what_was_measured_becomes_records_by_pencil(run, artifact):
    """Median of 0.1, 0.2, 0.4 s: 200 ms, 16 / 0.2 = 80 token/s; two tokens in 0.04, 0.04 and 0.1 s: 50 token/s."""
    engine_bench.add_records(run, artifact, engine="torch", race=RACE, cell=CELL)
    found = values(run)
    assert found["artifact_bytes"] == (TINY / "model.safetensors").stat().st_size
    assert found["load_seconds"] == 1.5
    assert [found[f"peak_rss_bytes:{name}"] for name in ("load", "idle", "inference")] == [300, 250, 400]
    assert found["time_to_first_token_ms:prompt16:p50"] == pytest.approx(200)
    assert found["token_latency_ms:prompt16:p50"] == pytest.approx(25)
    assert found["prefill_tokens_per_s:prompt16"] == pytest.approx(80)
    assert found["decode_tokens_per_s:prompt16"] == pytest.approx(50)
    assert found["peak_rss_bytes:engine"] == 300
    assert found["roofline_fraction"] == pytest.approx(50 * (TINY / "model.safetensors").stat().st_size / 1e9)
    assert found["energy_joules_per_token:prompt16"] == pytest.approx(2)
    assert {record.engine for record in run.records} == {"torch"}


def test_a_machine_that_shows_no_energy_is_one_record_that_says_so(run, artifact):
    silent = replace(CELL, energy_note="not measured: no counter", joules={"16": []})
    engine_bench.add_records(run, artifact, engine="torch", race=RACE, cell=silent, subject="tiny in torch")
    (record,) = [r for r in run.records if r.metric.startswith("energy")]
    assert (record.subject, record.value, record.note) == ("tiny in torch", None, "not measured: no counter")


def test_two_visits_of_a_cell_are_one_with_the_samples_of_both_and_the_highest_peak():
    other = replace(CELL, peak_bytes=500, idle_bytes=240, load_seconds=[2.5], first={"16": [0.3]}, read_bytes_per_s=2e9)
    both = engine_bench.merged([CELL, other])
    assert both.first == {"16": [0.1, 0.2, 0.4, 0.3]}
    assert len(both.further["16"]) == 6
    assert (both.peak_bytes, both.idle_bytes, both.load_seconds) == (500, 245, [1.5, 2.5])
    assert both.read_bytes_per_s == 2e9
    assert engine_bench.merged([CELL]) == CELL


def test_a_cell_is_measured_in_a_process_of_its_own(artifact):
    """Prompts that the context of 1,024 tokens does not hold are left out."""
    cell = engine_bench.measure(artifact, "torch", race=RACE)
    assert {length: len(samples) for length, samples in cell.first.items()} == {"4": 2, "16": 2}
    assert [len(steps) for steps in cell.further["16"]] == [2, 2]
    assert 0 < cell.runtime_bytes < cell.peak_bytes
    assert cell.read_bytes_per_s > 0
    assert cell.energy_note or all(map(len, cell.joules.values()))
    assert min(cell.first["4"]) > 0


def test_a_cell_that_takes_too_long_is_a_record_that_says_so(run, artifact):
    assert engine_bench.record(run, artifact, engine="torch", race=replace(RACE, limit_seconds=0.01)) is None
    (record,) = run.records
    assert record.value is None
    assert record.note == "tiny in torch took longer than 0.01 s"


def test_what_an_engine_refuses_reaches_the_caller_as_the_same_error(artifact, monkeypatch):
    """The measuring process writes the error down; here both halves without the process."""
    monkeypatch.setattr(alone, "_run", lambda arguments, limit: alone.main(*arguments[:3]) or 0)
    with pytest.raises(engines.NotSupported, match="onnx cannot load tiny"):
        engine_bench.measure(artifact, "onnx", race=RACE)


def test_a_process_that_dies_says_why(artifact, monkeypatch):
    monkeypatch.setattr(alone, "_run", lambda arguments, limit: -9)
    with pytest.raises(RuntimeError, match=r"tiny in onnx failed: killed, most likely out of memory"):
        engine_bench.measure(artifact, "onnx", race=RACE)


def test_the_command_prints_a_cell_as_json(artifact, monkeypatch, capsys):
    monkeypatch.setattr(engine_bench, "measure", lambda artifact, engine, race: CELL)
    arguments = ["bench", str(artifact.path), "--engine", "torch", "--profile", "smoke", "--json"]
    monkeypatch.setattr("sys.argv", ["avalab", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert "decode_tokens_per_s:prompt16" in {r["metric"] for r in json.loads(capsys.readouterr().out)}
