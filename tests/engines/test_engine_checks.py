"""A library that crashes: a child process opens an artefact first, and the signal becomes a message or other options.

The engines are stand-ins in this file, whose `load` ends the process that calls it; the artefact is the tiny model.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from avalab import engines
from avalab.engines import engine
from avalab.engines import gguf as gguf_file
from avalab.engines.engine import Engine
from avalab.lab import artifacts, process
from avalab.lab.run import Run
from avalab.measure import cell

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny-llama"


def opened(folder: Path) -> Engine:
    facts = engine.Facts(context=64, vocabulary=8, stops=())
    return Engine("onnx", folder, facts, {"opened": True}, lambda state, request: [1], lambda *_: torch.zeros(3, 8))


def load_with_one_thread_divides_by_zero(artifact, *, threads: int = 0) -> Engine:
    if threads == 1:
        os.kill(os.getpid(), signal.SIGFPE)
    return opened(artifact)


def load_aborts(artifact, *, threads: int = 0) -> Engine:
    os.abort()


def load_is_killed(artifact, *, threads: int = 0) -> Engine:
    os.kill(os.getpid(), signal.SIGKILL)


def load_refuses(artifact, *, threads: int = 0) -> Engine:
    raise ValueError(f"{artifact} is damaged")


def load_crashes_when_it_runs(artifact, *, threads: int = 0) -> Engine:
    found = opened(artifact)
    return Engine("onnx", found.folder, found.facts, found.state, lambda *_: os.abort(), None)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of the engine onnx, by its own file."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "genai_config.json").write_text("{}")
    return made


@pytest.fixture(autouse=True)
def checks(tmp_path, monkeypatch) -> Path:
    """Nothing known of any engine, the library installed in version 1.2, and calls of children that are counted."""
    monkeypatch.setattr(engine, "CHECKS", tmp_path / "checks")
    monkeypatch.setattr(engine.metadata, "version", lambda package: "1.2")
    return tmp_path / "checks"


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The options of each child that was started."""
    started, call = [], process.call

    def counted(target: str, request: dict, **about) -> dict:
        started.append(request["options"])
        return call(target, request, **about)

    monkeypatch.setattr(process, "call", counted)
    return started


def use(load, monkeypatch) -> None:
    monkeypatch.setitem(engines.ENGINES, "onnx", load)


def test_threads_are_left_to_an_engine_that_dies_with_those_asked_for_and_it_says_so_once_found(
    folder, calls, monkeypatch, caplog
):
    """Two children the first time, none the second; a number of threads that nothing is known of starts one more."""
    use(load_with_one_thread_divides_by_zero, monkeypatch)
    found = engines.load("onnx", folder, threads=1)
    assert found.note.startswith("threads were left to onnx: onnxruntime-genai 1.2 dies with SIGFPE on this processor")
    assert found.note in caplog.text
    assert calls == [{"threads": 1}, {"threads": 0}]
    assert engines.load("onnx", folder, threads=1).note == found.note
    assert len(calls) == 2
    assert engines.load("onnx", folder, threads=2).note == ""
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("load", "name"), [(load_aborts, "SIGABRT"), (load_crashes_when_it_runs, "SIGABRT"), (load_is_killed, "SIGKILL")]
)
def test_an_engine_that_dies_with_every_option_is_unavailable_and_the_signal_is_named(load, name, folder, monkeypatch):
    use(load, monkeypatch)
    with pytest.raises(engines.EngineUnavailable, match=rf"1\.2 dies with {name} .* with threads=1; export the model"):
        engines.load("onnx", folder, threads=1)


def test_a_crash_is_kept_but_not_a_lack_of_memory(folder, checks, calls, monkeypatch):
    use(load_aborts, monkeypatch)
    for _ in range(2):
        with pytest.raises(engines.EngineUnavailable, match="its own options"):
            engines.load("onnx", folder)
    assert len(calls) == 1
    assert [json.loads(file.read_text())["signal"] for file in checks.iterdir()] == ["SIGABRT"]
    use(load_is_killed, monkeypatch)
    for file in checks.iterdir():
        file.unlink()
    with pytest.raises(engines.EngineUnavailable, match="SIGKILL"):
        engines.load("onnx", folder)
    assert not list(checks.iterdir())


def test_another_version_processor_or_format_is_checked_anew(folder, calls, monkeypatch):
    use(load_with_one_thread_divides_by_zero, monkeypatch)
    engines.load("onnx", folder, threads=2)
    monkeypatch.setattr(engine.metadata, "version", lambda package: "1.3")
    engines.load("onnx", folder, threads=2)
    monkeypatch.setattr(engine, "_processor", lambda: "another one")
    engines.load("onnx", folder, threads=2)
    (folder / "more").write_text("x")
    engines.load("onnx", folder, threads=2)
    engines.load("onnx", folder, threads=2)
    assert len(calls) == 4


def test_an_error_of_the_engine_is_its_own_and_nothing_is_kept(folder, checks, monkeypatch):
    use(load_refuses, monkeypatch)
    with pytest.raises(ValueError, match="is damaged"):
        engines.load("onnx", folder)
    assert not checks.is_dir()


def test_what_a_child_process_opens_is_not_checked_again_and_torch_never_is(folder, calls, monkeypatch):
    monkeypatch.setattr(engine.multiprocessing, "parent_process", lambda: object())
    use(load_with_one_thread_divides_by_zero, monkeypatch)
    engines.load("onnx", folder, threads=2)
    monkeypatch.undo()
    assert engine.usable("torch", load_aborts, TINY, {"threads": 1}) == ({"threads": 1}, "")
    assert not calls


def test_a_large_gguf_file_is_stood_in_for_by_the_tiny_model_in_the_same_blocks(tmp_path, monkeypatch):
    gguf_file.export(TINY, tmp_path / "large.gguf", "q4_0")
    gguf_file.copy_beside(TINY, tmp_path)
    with engine._stand_in(tmp_path) as found:
        assert found == tmp_path
    monkeypatch.setattr(engine, "SMALL_BYTES", 1000)
    with engine._stand_in(tmp_path) as found:
        assert found != tmp_path
        assert gguf_file.check(engine.gguf_file(found)) == gguf_file.check(tmp_path / "large.gguf")


@pytest.mark.parametrize("block", gguf_file.BLOCKS)
def test_the_block_type_of_a_file_is_read_from_its_tensors(block, tmp_path):
    gguf_file.export(TINY, tmp_path / "m.gguf", block)
    assert gguf_file.block_of_file(tmp_path / "m.gguf") == block


def test_a_cell_of_the_benchmark_runs_with_the_other_options_and_its_records_say_so(tmp_path, monkeypatch):
    """The measuring process is told; every record has the threads that were used, and the note."""

    def save(out: Path) -> None:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TINY / name, out / name)
        (out / "genai_config.json").write_text("{}")

    made = artifacts.write_artifact(
        "x", tmp_path, save, base={"name": "x", "sha256": "y"}, recipe=[], format="onnx-int8"
    )
    use(load_with_one_thread_divides_by_zero, monkeypatch)
    sizes = dict.fromkeys(("runtime_bytes", "load_peak_bytes", "loaded_bytes", "peak_bytes"), 1)
    empty = sizes | {"load_seconds": [1.0], "load_average": 0.0, "first": {}, "further": {}, "joules": {}}
    asked, call = [], process.call

    def measured(target: str, request: dict, **about) -> dict:
        if "options" in request:
            return call(target, request, **about)
        asked.append(request["threads"])
        return empty

    monkeypatch.setattr(process, "call", measured)
    run = Run("t", "smoke")
    work = cell.Workload(prompts=(4,), threads=1)
    cell.record_cell(run, made, engine="onnx", work=work, cell=cell.measure_cell(made, "onnx", work=work))
    assert asked == [0]
    assert {record.threads for record in run.records} == {0}
    assert all(record.note.startswith("threads were left to onnx: onnxruntime-genai") for record in run.records)
