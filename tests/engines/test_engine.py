"""What engines share: kinds and refusals, the greedy loop by pencil, and libraries that crash or are missing.

Engines that crash are stand-ins in this file, whose `load` ends the process that calls it: a child process opens an
artefact first, and the signal becomes a message or other options.
"""

import importlib.util
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
from avalab.engines.engine import TINY, Engine, Request
from avalab.lab import artifacts, llamacpp_library, process
from avalab.lab.run import Run
from avalab.measure import cell
from avalab.models import gguf_layout


@pytest.fixture(scope="module")
def tiny():
    return engines.load("torch", TINY, dtype=torch.float32)


# --- kinds and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "kind"),
    [("openvino_model.xml", "openvino"), ("genai_config.json", "onnx"), ("a.gguf", "gguf"), ("config.json", "dense")],
)
def test_a_folder_is_of_the_kind_that_its_files_say(file, kind, tmp_path):
    (tmp_path / file).write_text("{}")
    assert engines.kind(tmp_path) == kind


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "compressed-tensors"])
def test_a_quantised_folder_is_of_its_methods_kind(method, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    assert engines.kind(tmp_path) == method


def test_an_engine_that_cannot_load_an_artefact_names_those_that_can(tmp_path):
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(engines.NotSupported, match=r"torch cannot load .* \(onnx\); onnx can\. torch loads: dense, "):
        engines.load("torch", tmp_path)


def test_an_unknown_engine_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown engine 'steam'; choose one of torch, openvino, onnx, llamacpp"):
        engines.load("steam", TINY)


def test_an_unknown_method_of_quantisation_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "magic"}}')
    with pytest.raises(ValueError, match="quantised by 'magic'"):
        engines.kind(tmp_path)


def test_a_folder_without_a_model_or_with_two_gguf_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no artefact"):
        engines.kind(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"one \.gguf file, found a\.gguf, b\.gguf"):
        engines.gguf_file(tmp_path)


def test_a_missing_library_is_named_with_the_command_that_installs_it():
    with pytest.raises(engines.EngineUnavailable, match=r"engine steam needs the package nosuch; install it: pip x"):
        engines.require("steam", "nosuch", "pip x")


@pytest.mark.parametrize(
    ("prompt", "new", "says"),
    [
        ([], 1, "got none"),
        ([5, 1024], 1, r"ids below 1024.*got ids 5 to 1024"),
        ([-1], 1, "ids below 1024"),
        ([5], 0, "1 or more, got 0"),
        ([5] * 1000, 25, r"1000 \+ 25 tokens exceed the model's context of 1024"),
    ],
)
def test_what_no_model_can_read_is_refused_before_it_runs(prompt, new, says, tiny):
    with pytest.raises(ValueError, match=says):
        tiny.generate(prompt, new)


def test_a_closed_engine_says_so():
    closed = engines.load("torch", TINY)
    closed.close()
    with pytest.raises(ValueError, match=r"this torch engine of tiny-llama is closed; load it again"):
        closed.generate([5], 1)
    with pytest.raises(ValueError, match="closed"):
        closed.logits([5])


def test_every_kind_with_a_file_of_its_own_has_a_reader():
    assert set(engines.OWN_FILES) <= set(engines.READERS)
    assert {name for able in engines.READERS.values() for name in able} == set(engines.ENGINES)


def test_other_engines_name_the_one_that_loads_a_package(tmp_path):
    (tmp_path / "model.pt2").touch()
    with pytest.raises(engines.NotSupported, match=r"llamacpp cannot load .* \(aot\); aot can"):
        engines.load("llamacpp", tmp_path)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("openvino", "openvino_genai", "openvino"),
        ("onnx", "onnxruntime_genai", "onnx"),
        ("onnxruntime", "onnxruntime", "onnx"),
        ("executorch", "executorch", "executorch"),
        ("vllm", "vllm", "vllm"),
        ("tensorrt", "tensorrt_llm", "tensorrt"),
    ],
)
def test_a_missing_library_is_named_with_its_install_command(name, module, extra, monkeypatch, tmp_path):
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == module else here(n, *rest))
    kind = next(kind for kind, able in engines.READERS.items() if name in able)
    (tmp_path / engines.OWN_FILES.get(kind, "model.gguf" if kind == "gguf" else "config.json")).write_text("{}")
    with pytest.raises(engines.EngineUnavailable, match=rf"engine {name} needs .*{module}.*\[{extra}\]"):
        engines.load(name, tmp_path)


# --- the greedy loop ---------------------------------------------------------------------------------------------


def successor(read: list[int]) -> torch.Tensor:
    """A model of ten tokens whose next token is the last one plus one."""
    return torch.nn.functional.one_hot(torch.tensor((read[-1] + 1) % 10), 10).float()


def test_counting_goes_on_until_the_token_that_ends_or_the_number_asked_for():
    seen = []
    assert engine.greedy(successor, Request([2, 3], 9, stops=(7,), on_token=seen.append)) == [4, 5, 6] == seen
    assert engine.greedy(successor, Request([2, 3], 2, stops=(7,))) == [4, 5]
    assert engine.greedy(successor, Request([2, 3], 9)) == [4, 5, 6, 7, 8, 9, 0, 1, 2]


def test_the_prompt_is_read_once_and_then_one_token_at_a_time():
    read = []
    engine.greedy(lambda tokens: read.append(tokens) or successor(tokens), Request([2, 3], 3))
    assert read == [[2, 3], [4], [5]]


# --- libraries that crash ----------------------------------------------------------------------------------------


def stand_in(folder: Path) -> Engine:
    facts = engine.Facts(context=64, vocabulary=8, stops=())
    return Engine("onnx", folder, facts, {"opened": True}, lambda state, request: [1], lambda *_: torch.zeros(3, 8))


def load_with_one_thread_divides_by_zero(artifact, *, threads: int = 0) -> Engine:
    if threads == 1:
        os.kill(os.getpid(), signal.SIGFPE)
    return stand_in(artifact)


def load_aborts(artifact, *, threads: int = 0) -> Engine:
    os.abort()


def load_is_killed(artifact, *, threads: int = 0) -> Engine:
    os.kill(os.getpid(), signal.SIGKILL)


def load_refuses(artifact, *, threads: int = 0) -> Engine:
    raise ValueError(f"{artifact} is damaged")


def load_crashes_when_it_runs(artifact, *, threads: int = 0) -> Engine:
    found = stand_in(artifact)
    return Engine("onnx", found.folder, found.facts, found.state, lambda *_: os.abort(), None)


@pytest.fixture
def folder(checks, tmp_path) -> Path:
    """A folder of the engine onnx, by its own file."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "genai_config.json").write_text("{}")
    return made


@pytest.fixture
def checks(tmp_path, monkeypatch) -> Path:
    """Nothing known of any engine, the library installed in version 1.2, and calls of children that are counted."""
    monkeypatch.setattr(engine, "CHECKS", tmp_path / "checks")
    monkeypatch.setattr(engine.metadata, "version", lambda package: "1.2")
    return tmp_path / "checks"


@pytest.fixture
def calls(checks, monkeypatch) -> list[dict]:
    """The options of each child that was started."""
    started, call = [], process.call

    def counted(target: str, request: dict, **about) -> dict:
        started.append(request["options"])
        return call(target, request, **about)

    monkeypatch.setattr(process, "call", counted)
    return started


def use(load, monkeypatch) -> None:
    monkeypatch.setitem(engines.ENGINES, "onnx", load)


def load_that_only_the_wheel_survives(artifact, *, build: str = "", **options) -> Engine:
    if build != llamacpp_library.WHEEL:
        os.kill(os.getpid(), signal.SIGSEGV)
    return Engine("llamacpp", artifact, engine.Facts(64, 1024, ()), {"model": 1}, lambda state, request: [1, 2], None)


def test_where_a_build_of_llamacpp_dies_the_wheel_is_opened_and_the_note_says_so(made, calls, monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "llamacpp", load_that_only_the_wheel_survives)
    for name in llamacpp_library.BUILDS:
        build = llamacpp_library.Build(name, "1.2", Path("nowhere"))
        monkeypatch.setitem(llamacpp_library.BUILDS, name, lambda build=build: build)
    found = engines.load("llamacpp", made("gguf-q8_0"))
    assert found.note.startswith(
        "llamacpp was opened with build=xllamacpp: npm llama.cpp 1.2 dies with SIGSEGV on this"
    )
    assert calls == [{}, {"build": "xllamacpp"}]


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
        assert gguf_layout.check(engine.gguf_file(found)) == gguf_layout.check(tmp_path / "large.gguf")


@pytest.mark.parametrize("block", gguf_file.BLOCKS)
def test_the_block_type_of_a_file_is_read_from_its_tensors(block, tmp_path):
    gguf_file.export(TINY, tmp_path / "m.gguf", block)
    assert gguf_file.block_of_file(tmp_path / "m.gguf") == block


def test_a_cell_of_the_benchmark_runs_with_the_other_options_and_its_records_say_so(checks, tmp_path, monkeypatch):
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
    empty = sizes | {
        "when": "2026",
        "load_seconds": [1.0],
        "load_average": 0.0,
        "first": {},
        "further": {},
        "joules": {},
    }
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


# --- draws -------------------------------------------------------------------------------------------------------


def test_a_draw_follows_the_probabilities_and_its_seed():
    """Logits 0 and log 3: a quarter and three quarters; at temperature 0.5 a tenth and nine tenths."""
    logits = torch.tensor([0.0, torch.log(torch.tensor(3.0))])
    for temperature, share in ((1.0, 0.75), (0.5, 0.9)):
        choose = engines.sampler(temperature, seed=0)
        drawn = [choose(logits) for _ in range(2000)]
        assert sum(drawn) / 2000 == pytest.approx(share, abs=0.03)
        again = engines.sampler(temperature, seed=0)
        assert [again(logits) for _ in range(50)] == drawn[:50]
    with pytest.raises(ValueError, match="temperature of a draw is above 0"):
        engines.sampler(0.0, seed=0)


def test_an_engine_takes_the_token_that_is_chosen(tiny):
    assert tiny.generate([5, 6, 7], 3, past_end=True, choose=lambda logits: 9) == [9, 9, 9]
    greedy = tiny.generate([5, 6, 7], 5, past_end=True)
    assert tiny.generate([5, 6, 7], 5, past_end=True, choose=lambda logits: int(logits.argmax())) == greedy


def test_an_engine_that_keeps_its_logits_says_that_it_draws_nothing():
    kept = Engine("vllm", TINY, engine.Facts(16, 32, ()), {"model": 1}, lambda state, request: [], None)
    with pytest.raises(engines.NotSupported, match="vllm chooses tokens itself"):
        kept.generate([1], 2, choose=lambda logits: 0)
