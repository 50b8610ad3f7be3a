"""Ahead-of-time compilation against transformers in float32 on the same weights: one block of the tiny model.

Tolerance: with float32 throughout, kernels differ by the order of additions: 1e-4 on logits of about 20.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from avalab import engines
from avalab.engines import aot, checks, executorch
from avalab.engines.engine import TINY
from avalab.lab import artifacts

PROMPT = list(range(5, 45))
ALONE = """import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print([name for name in ("transformers", "avalab") if name in sys.modules])"""
compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler: apt-get install g++")


@pytest.fixture(scope="module")
def package(small, tmp_path_factory) -> Path:
    """The first block, compiled ahead of time in float32 for any batch."""
    folder = tmp_path_factory.mktemp("aot") / "aot"
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # half the compiler's time
        aot.export(small.path, folder, "fp32")
    return folder


def without_a_compiler():
    return torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})


@compiler
@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_compiled_package_has_the_logits_of_transformers_at_any_length(count, package, small, reference):
    ours, theirs = engines.load("aot", package).logits(PROMPT[:count]), reference(small).logits(PROMPT[:count])
    assert ours.shape == (count, 1024)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@compiler
def test_a_compiled_package_gives_the_greedy_tokens_of_transformers(package, small):
    """Each step reads the cache that the program keeps; all 24 tokens equal."""
    model = AutoModelForCausalLM.from_pretrained(small.path, dtype=torch.float32)
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
def test_the_program_beside_a_package_needs_torch_and_nothing_of_the_model_or_the_lab(package, small, reference):
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


def test_a_missing_compiler_is_named_with_the_way_out(tmp_path):
    with without_a_compiler(), pytest.raises(engines.EngineUnavailable) as caught:
        aot.export(TINY, tmp_path / "out")
    assert "needs the C++ compiler no-such-compiler, not found: install one (apt-get install g++" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("export", "form", "known"),
    [(aot, "the compiled package", "fp32, bf16"), (executorch, "ExecuTorch", "fp32")],
)
def test_unknown_weights_and_quantised_models_are_refused_before_anything_is_compiled(export, form, known, tmp_path):
    with pytest.raises(ValueError, match=f"no weights 'int3' for {form}; choose one of {known}"):
        export.export(TINY, tmp_path / "out", "int3")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    with pytest.raises(ValueError, match=f"is bitsandbytes, and {form} is made of dense models; export the model"):
        export.export(tmp_path, tmp_path / "out", "fp32")


# --- commands ----------------------------------------------------------------------------------------------------


def test_the_compile_command_says_where_the_package_is_and_how_to_run_it_without_the_lab(
    tiny_artifact, tmp_path, monkeypatch, command
):
    def compiled(folder: Path, out: Path, weights: str, *, dynamic: bool) -> None:
        (out / "model.pt2").write_bytes(bytes(2_000_000))
        (out / "asked.json").write_text(json.dumps([folder.name, weights, dynamic]))

    monkeypatch.setattr(aot, "export", compiled)
    monkeypatch.setattr(checks, "compare", lambda *arguments, **options: {})  # there is no code in the package
    out = tmp_path / "there"
    code, said = command("compile", "--model", tiny_artifact.path, "--dynamic", "--out", out)
    assert not code
    assert said.startswith(f"{out}: 2.0 MB, aot-bf16\nload it with the engine aot\nwithout the lab: python {out}/gen")
    assert json.loads((out / "asked.json").read_text()) == ["tiny", "bf16", True]
    assert artifacts.load_artifact(out).card["engines"] == ["aot"]


def test_the_compile_command_says_in_one_line_which_compiler_is_missing(tiny_artifact, tmp_path, command):
    with without_a_compiler():
        code, said = command("compile", "--model", tiny_artifact.path, "--out", tmp_path / "there")
    assert code == 2
    assert said.startswith("avalab: engine aot needs the C++ compiler no-such-compiler")
    assert said.count("\n") == 1
    assert not (tmp_path / "there").exists()
