"""llama.cpp: its engine, K types by its quantiser, and the flags that it is built with.

Tolerances: rounded weights of at least 4 bits move the tiny model's first block by less than 0.05 nats a token.
"""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from avalab import engines
from avalab.engines import gguf as gguf_file
from avalab.engines import llamacpp
from avalab.engines.engine import TINY
from avalab.lab import artifacts
from avalab.lab.run import ROOT
from avalab.models import checkpoint

CPUINFO = "processor\t: 0\nflags\t\t: fpu {}\nbugs\t\t: none\n"


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Tokens of Python source, read by every engine."""
    return checkpoint.load_tokenizer(TINY)((ROOT / "avalab" / "lab" / "artifacts.py").read_text()).input_ids[:128]


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """Calibration tokens: another file of Python source."""
    ids = checkpoint.load_tokenizer(TINY)((ROOT / "avalab" / "models" / "checkpoint.py").read_text()).input_ids
    return torch.tensor(ids[:256]).view(4, 64)


@pytest.mark.needs("llama_cpp")
@pytest.mark.parametrize("block", ["f32", "bf16", "q5_1", "q5_0", "q4_1"])
def test_llamacpp_reads_every_block_type_that_is_written(block, made, prompt, divergence, reference):
    folder = made(f"gguf-{block}")
    ours, theirs = (e.logits(prompt) for e in (engines.load("llamacpp", folder, threads=1), reference(folder)))
    assert divergence(ours, theirs) < 0.005


@pytest.mark.needs("llama_cpp")
def test_a_prompt_longer_than_a_batch_is_read_in_parts(made, prompt, divergence, reference):
    """600 tokens in batches of 512: the last logits are those of the whole prompt."""
    folder, long = made("gguf-f32"), (prompt * 100)[:600]
    engine = engines.load("llamacpp", folder, threads=1)
    ours, theirs = engine.logits(long), reference(folder).logits(long)
    assert divergence(ours[-50:], theirs[-50:]) < 0.005
    assert engine.generate(long, 4, past_end=True)[0] == int(ours[-1].argmax())


@pytest.mark.needs("llama_cpp")
def test_the_cache_of_llamacpp_bounds_the_context(made, prompt):
    engine = engines.load("llamacpp", made("gguf-q8_0"), context=32)
    with pytest.raises(ValueError, match="exceed the model's context of 32"):
        engine.generate(prompt, 32)


# --- K types -----------------------------------------------------------------------------------------------------


def test_the_importance_of_a_column_is_its_mean_square_under_the_files_name(small, windows):
    """The gate's inputs are the up projection's; the oracle is a hook on the layer."""
    found = llamacpp.importance(small, windows)
    model, seen = checkpoint.load_model(small), []
    layer = model.model.layers[0].mlp.gate_proj
    layer.register_forward_hook(lambda module, given, output: seen.append(given[0].float().square()))
    with torch.inference_mode():
        model(windows)
    expected = seen[0].flatten(0, 1).mean(0)
    torch.testing.assert_close(torch.from_numpy(found["blk.0.ffn_gate.weight"]), expected, atol=0, rtol=0.02)  # bf16
    assert np.array_equal(found["blk.0.ffn_gate.weight"], found["blk.0.ffn_up.weight"])
    assert len(found) == 7
    assert all(column.flags.c_contiguous for column in found.values())


@pytest.mark.needs("llama_cpp")
@pytest.mark.parametrize("mixture", llamacpp.MIXTURES)
def test_a_k_mixture_computes_the_same_in_llamacpp_and_transformers(mixture, small, text, divergence, reference):
    """Rows of 128 are no multiple of 256: llama.cpp takes blocks of 32 for them, and says which."""
    made = llamacpp.write(small, mixture)
    ours, theirs = (engines.load(name, made, threads=1).logits(text) for name in ("llamacpp", "torch"))
    assert divergence(ours, theirs) < 0.005
    assert divergence(ours, reference(small).logits(text)) < 0.05
    assert set(made.card["measured"]["formats"]) <= {"f32", "q8_0", "q5_1", "q5_0", "q4_0"}
    assert (made.path / "Modelfile").read_text().startswith(f"FROM ./small.{mixture}.gguf\n")


@pytest.mark.needs("llama_cpp")
def test_rows_that_256_divides_become_k_blocks(tmp_path):
    config = LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
                         vocab_size=1024, max_position_embeddings=64)  # fmt: skip

    def save(folder: Path) -> None:
        checkpoint.save_model(LlamaForCausalLM(config).bfloat16(), checkpoint.load_tokenizer(TINY), folder)

    about = {"base": {"name": "x", "sha256": "y"}, "recipe": [], "format": "bf16"}
    made = llamacpp.write(artifacts.write_artifact("wide", tmp_path, save, **about), "q4_k_m")
    assert set(made.card["measured"]["formats"]) == {"f32", "q4_k", "q6_k"}
    assert engines.load("llamacpp", made, threads=1).logits([5, 6]).isfinite().all()


@pytest.mark.needs("llama_cpp")
def test_an_importance_matrix_changes_the_weights_for_the_better(small, text, windows, divergence, reference):
    """Same bytes, weighted rounding: closer to the dense model on other text of the same kind."""
    plain = llamacpp.write(small, "q5_k_m")
    weighted = llamacpp.write(small, "q5_k_m", windows=windows, out=small.path.parent / "weighted")
    assert plain.bytes == weighted.bytes
    dense = reference(small).logits(text)
    assert divergence(reference(weighted).logits(text), dense) < divergence(reference(plain).logits(text), dense)


def test_a_missing_quantiser_is_named_with_the_way_to_get_it(small, monkeypatch):
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == "llama_cpp" else here(n, *rest))
    with pytest.raises(
        engines.EngineUnavailable, match=r"needs the package llama_cpp; install it: make setup-llamacpp"
    ):
        llamacpp.write(small, "q4_k_m")
    with pytest.raises(ValueError, match=r"no weights 'q7_k' for llama\.cpp's quantiser; choose one of q6_k, q5_k_m"):
        llamacpp.write(small, "q7_k")
    with pytest.raises(ValueError, match=r"no block type 'q4_k_m' is written.*\(K types: llamacpp\)"):
        gguf_file.export(small.path, small.path / "x.gguf", "q4_k_m")


# --- the build ---------------------------------------------------------------------------------------------------


def test_a_processor_gets_the_instruction_sets_that_it_lists_and_no_others():
    found = llamacpp.build_flags(CPUINFO.format("sse4_2 avx avx2 fma f16c bmi2"))
    assert found[:3] == ["-DGGML_NATIVE=OFF", "-DGGML_SSE42=ON", "-DGGML_AVX=ON"]
    assert "-DGGML_BMI2=ON" in found
    assert {"-DGGML_AVX512=OFF", "-DGGML_AVX_VNNI=OFF"} <= set(found)
    assert not [flag for flag in found if "AMX" in flag]


def test_avx512_needs_all_its_parts_and_vbmi_goes_by_two_names():
    parts = "avx512f avx512cd avx512vl avx512dq"
    assert "-DGGML_AVX512=OFF" in llamacpp.build_flags(CPUINFO.format(parts))
    found = llamacpp.build_flags(CPUINFO.format(f"{parts} avx512bw avx512vbmi"))
    assert {"-DGGML_AVX512=ON", "-DGGML_AVX512_VBMI=ON", "-DGGML_AVX512_VNNI=OFF"} <= set(found)


def test_a_processor_that_lists_no_flags_builds_natively():
    assert llamacpp.build_flags("Features\t: fp asimd\n") == ["-DGGML_NATIVE=ON"]


def test_a_missing_compiler_for_llamacpp_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler \(c\+\+, g\+\+ or clang\+\+\); install one"):
        llamacpp.print_build_flags()
