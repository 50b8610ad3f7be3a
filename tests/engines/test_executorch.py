"""ExecuTorch programs against transformers in float32 on the same weights, and the commands of exports and TensorRT.

The model is one block of the tiny one; in float32 logits of about 20 differ by 1e-4, the order of additions.
"""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from avalab import engines
from avalab.engines import executorch

PROMPT = list(range(5, 45))


@pytest.fixture(scope="module")
def program(small, tmp_path_factory) -> Path:
    """The first block as an ExecuTorch program of 64 tokens."""
    folder = tmp_path_factory.mktemp("executorch") / "executorch"
    executorch.export(small.path, folder, context=64)
    return folder


@pytest.mark.needs("executorch")
@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_program_of_fixed_sizes_has_the_logits_of_transformers_at_any_length(count, program, small, reference):
    """One token, a chunk filled up, and a chunk and a part of one."""
    ours, theirs = engines.load("executorch", program).logits(PROMPT[:count]), reference(small).logits(PROMPT[:count])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.needs("executorch")
def test_a_program_gives_the_greedy_tokens_of_transformers_to_the_end_of_its_context(program, small, reference):
    ours, theirs = engines.load("executorch", program), reference(small)
    assert ours.generate(PROMPT, 24, past_end=True) == theirs.generate(PROMPT, 24, past_end=True)
    with pytest.raises(ValueError, match=r"40 \+ 25 tokens exceed the model's context of 64"):
        ours.generate(PROMPT, 25)


@pytest.mark.needs("executorch")
def test_a_damaged_program_is_refused_by_its_name(program, tmp_path):
    shutil.copytree(program, tmp_path / "cut")
    file = tmp_path / "cut" / "model.pte"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"ExecuTorch cannot load .*cut/model\.pte"):
        engines.load("executorch", tmp_path / "cut")


# --- commands ----------------------------------------------------------------------------------------------------


def test_the_tensorrt_command_says_what_is_missing_on_a_machine_without_it(command):
    if importlib.util.find_spec("tensorrt_llm") and torch.cuda.is_available():
        pytest.skip("this machine has TensorRT-LLM")
    code, said = command("tensorrt", "--precision", "fp16")
    assert code == 2
    assert "engine tensorrt needs" in said
    code, said = command("tensorrt", "--precision", "fp12")
    assert (code, said) == (2, "avalab: no precision 'fp12'; choose one of fp16, bf16, fp32\n")


def test_the_export_command_says_what_executorch_needs(tiny_artifact, tmp_path, monkeypatch, command):
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == "executorch" else here(n, *rest))
    code, said = command("export", tiny_artifact.path, "--to", "executorch", "--out", tmp_path / "there")
    assert (code, said.count("\n")) == (2, 1)
    assert "engine executorch needs the package executorch; install it" in said


def test_the_export_command_refuses_unknown_formats_and_calibration_where_nothing_is_calibrated(
    tiny_artifact, tmp_path, command
):
    code, said = command("export", tiny_artifact.path, "--to", "steam", "--out", tmp_path / "there")
    assert (code, "choose one of onnx, onnx-genai, gguf, openvino, executorch, aot" in said) == (2, True)
    arguments = ["export", tiny_artifact.path, "--calibrate", "--out", tmp_path / "there"]
    code, said = command(*arguments, "--to", "openvino")
    assert (code, said) == (2, "avalab: openvino takes no calibration text; onnx and gguf do\n")
