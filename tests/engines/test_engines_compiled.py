"""Engines of compiled models, each against transformers in float32 on the same weights: one block of the tiny model.

Tolerance: with float32 throughout, kernels differ by the order of additions: 1e-4 on logits of about 20.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from avalab import cli, engines
from avalab.engines import aot, executorch
from avalab.lab import artifacts
from avalab.models import checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny-llama"
PROMPT = list(range(5, 45))
ALONE = """import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print([name for name in ("transformers", "avalab") if name in sys.modules])"""
compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler: apt-get install g++")
needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="executorch is not installed: pip install -e '.[executorch]'"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The tiny model's first block, with embedding and head: it compiles in seconds."""
    model = checkpoint.load_model(TINY)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    folder = tmp_path_factory.mktemp("small") / "small"
    checkpoint.save_model(model, checkpoint.load_tokenizer(TINY), folder)
    return folder


@pytest.fixture(scope="module")
def package(small, tmp_path_factory) -> Path:
    """It, compiled ahead of time in float32 for any batch."""
    folder = tmp_path_factory.mktemp("aot") / "aot"
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # half the compiler's time
        aot.export(small, folder, "fp32")
    return folder


@pytest.fixture(scope="module")
def program(small, tmp_path_factory) -> Path:
    """It, as an ExecuTorch program of 64 tokens."""
    folder = tmp_path_factory.mktemp("executorch") / "executorch"
    executorch.export(small, folder, context=64)
    return folder


def reference(folder: Path) -> engines.Engine:
    return engines.load("torch", folder, dtype=torch.float32)


def without_a_compiler():
    return torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})


# --- ahead of time -----------------------------------------------------------------------------------------------


@compiler
@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_compiled_package_has_the_logits_of_transformers_at_any_length(count, package, small):
    ours, theirs = engines.load("aot", package).logits(PROMPT[:count]), reference(small).logits(PROMPT[:count])
    assert ours.shape == (count, 1024)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@compiler
def test_a_compiled_package_gives_the_greedy_tokens_of_transformers(package, small):
    """Each step reads the cache that the program keeps; all 24 tokens equal."""
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    ids, options = torch.tensor([PROMPT]), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, **options)
    seen = []
    found = engines.load("aot", package, threads=1).generate(PROMPT, 24, past_end=True, on_token=seen.append)
    assert found == seen == expected[0, len(PROMPT) :].tolist()


@compiler
def test_a_package_with_a_free_batch_reads_several_sequences_as_it_reads_each(package):
    run, sizes = aot.opened(str(package / "model.pt2"))
    ids = torch.arange(5, 35).view(3, 10)
    together = aot.reader(run, sizes, 12, batch=3)
    first, second = together(ids, every=True), together(ids[:, :2])
    for row in range(3):
        alone = aot.reader(run, sizes, 12)
        torch.testing.assert_close(alone(ids[row : row + 1], every=True)[0], first[row], atol=1e-4, rtol=0)
        torch.testing.assert_close(alone(ids[row : row + 1, :2])[0], second[row], atol=1e-4, rtol=0)


@compiler
def test_the_program_beside_a_package_needs_torch_and_nothing_of_the_model_or_the_lab(package, small):
    arguments = [package / "generate.py", package / "model.pt2", 8, *PROMPT]
    command = [sys.executable, "-I", "-c", ALONE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, imported = done.stdout.strip().splitlines()
    assert [int(token) for token in tokens.split()] == reference(small).generate(PROMPT, 8, past_end=True)
    assert imported == "[]"


@compiler
def test_a_compiled_engine_refuses_more_tokens_than_the_model_has_positions(package):
    with pytest.raises(ValueError, match=r"1020 \+ 5 tokens exceed the model's context of 1024"):
        engines.load("aot", package).generate([5] * 1020, 5)


@compiler
def test_a_damaged_package_is_refused_by_its_name(package, tmp_path):
    shutil.copytree(package, tmp_path / "cut")
    file = tmp_path / "cut" / "model.pt2"
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"torch cannot load the package .*cut/model\.pt2"):
        engines.load("aot", tmp_path / "cut")


def test_other_engines_name_the_one_that_loads_a_package(tmp_path):
    (tmp_path / "model.pt2").touch()
    with pytest.raises(engines.NotSupported, match=r"llamacpp cannot load .* \(aot\); aot can"):
        engines.load("llamacpp", tmp_path)


def test_a_missing_compiler_is_named_with_the_way_out(tmp_path):
    with without_a_compiler(), pytest.raises(engines.EngineUnavailable) as caught:
        aot.export(TINY, tmp_path / "out")
    assert "needs the C++ compiler no-such-compiler, not found: install one (apt-get install g++" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("export", "says"),
    [(aot, "package; choose one of fp32, bf16"), (executorch, "ExecuTorch; choose one of fp32")],
)
def test_unknown_weights_and_quantised_models_are_refused_before_anything_is_compiled(export, says, tmp_path):
    with pytest.raises(ValueError, match=f"no weights 'int3' for .*{says}"):
        export.export(TINY, tmp_path / "out", "int3")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    with pytest.raises(ValueError, match=r"is bitsandbytes; export the dense model that it was made from"):
        export.export(tmp_path, tmp_path / "out", "fp32")


# --- ExecuTorch --------------------------------------------------------------------------------------------------


@needs_executorch
@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_program_of_fixed_sizes_has_the_logits_of_transformers_at_any_length(count, program, small):
    """One token, a chunk filled up, and a chunk and a part of one."""
    ours, theirs = engines.load("executorch", program).logits(PROMPT[:count]), reference(small).logits(PROMPT[:count])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@needs_executorch
def test_a_program_gives_the_greedy_tokens_of_transformers_to_the_end_of_its_context(program, small):
    ours, theirs = engines.load("executorch", program), reference(small)
    assert ours.generate(PROMPT, 24, past_end=True) == theirs.generate(PROMPT, 24, past_end=True)
    with pytest.raises(ValueError, match=r"40 \+ 25 tokens exceed the model's context of 64"):
        ours.generate(PROMPT, 25)


@needs_executorch
def test_a_damaged_program_is_refused_by_its_name(program, tmp_path):
    shutil.copytree(program, tmp_path / "cut")
    file = tmp_path / "cut" / "model.pte"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"ExecuTorch cannot load .*cut/model\.pte"):
        engines.load("executorch", tmp_path / "cut")


# --- commands ----------------------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *arguments) -> tuple[object, str]:
    """Exit code, and what was printed, of a command."""
    monkeypatch.setattr("sys.argv", ["avalab", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    return stopped.value.code, printed.out + printed.err


@pytest.fixture
def tiny(tmp_path) -> Path:
    """An artefact of the tiny model."""

    def save(folder: Path) -> None:
        shutil.copytree(TINY, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))

    about = {"base": {"name": "x", "sha256": "y"}, "recipe": [], "format": "bf16"}
    return artifacts.write_artifact("tiny", tmp_path, save, **about).path


def test_the_compile_command_says_where_the_package_is_and_how_to_run_it_without_the_lab(
    tiny, tmp_path, monkeypatch, capsys
):
    def compiled(folder: Path, out: Path, weights: str, *, dynamic: bool) -> None:
        (out / "model.pt2").write_bytes(bytes(2_000_000))
        (out / "asked.json").write_text(json.dumps([folder.name, weights, dynamic]))

    monkeypatch.setattr(aot, "export", compiled)
    out = tmp_path / "there"
    code, said = command(monkeypatch, capsys, "compile", "--model", tiny, "--dynamic", "--out", out)
    assert not code
    assert said.startswith(f"{out}: 2.0 MB, aot-bf16\nload it with the engine aot\nwithout the lab: python {out}/gen")
    assert json.loads((out / "asked.json").read_text()) == ["tiny", "bf16", True]
    assert artifacts.load_artifact(out).card["engines"] == ["aot"]


def test_the_compile_command_says_in_one_line_which_compiler_is_missing(tiny, tmp_path, monkeypatch, capsys):
    with without_a_compiler():
        code, said = command(monkeypatch, capsys, "compile", "--model", tiny, "--out", tmp_path / "there")
    assert code == 1
    assert said.startswith("avalab: engine aot needs the C++ compiler no-such-compiler")
    assert said.count("\n") == 1
    assert not (tmp_path / "there").exists()


def test_the_tensorrt_command_says_what_is_missing_on_a_machine_without_it(monkeypatch, capsys):
    if importlib.util.find_spec("tensorrt_llm") and torch.cuda.is_available():
        pytest.skip("this machine has TensorRT-LLM")
    code, said = command(monkeypatch, capsys, "tensorrt", "--precision", "fp16")
    assert code == 1
    assert "engine tensorrt needs" in said
    code, said = command(monkeypatch, capsys, "tensorrt", "--precision", "fp12")
    assert (code, said) == (2, "avalab: no precision 'fp12'; choose one of fp16, bf16, fp32\n")


def test_the_export_command_says_what_executorch_needs(tiny, tmp_path, monkeypatch, capsys):
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == "executorch" else here(n, *rest))
    code, said = command(monkeypatch, capsys, "export", tiny, "--to", "executorch", "--out", tmp_path / "there")
    assert (code, said.count("\n")) == (1, 1)
    assert "engine executorch needs the package executorch; install it" in said


def test_the_export_command_refuses_unknown_formats_and_calibration_where_nothing_is_calibrated(
    tiny, tmp_path, monkeypatch, capsys
):
    code, said = command(monkeypatch, capsys, "export", tiny, "--to", "steam", "--out", tmp_path / "there")
    assert (code, "choose one of onnx, onnx-genai, gguf, openvino, executorch, aot" in said) == (2, True)
    arguments = ["export", tiny, "--calibrate", "--out", tmp_path / "there"]
    code, said = command(monkeypatch, capsys, *arguments, "--to", "openvino")
    assert (code, said) == (2, "avalab: openvino takes no calibration text; onnx and gguf do\n")


def test_every_kind_with_a_file_of_its_own_has_a_reader():
    assert set(engines.OWN_FILES) <= set(engines.READERS)
    assert {name for able in engines.READERS.values() for name in able} == set(engines.ENGINES)
