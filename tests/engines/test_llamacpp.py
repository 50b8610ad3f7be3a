"""llama.cpp: its engine, K types by its quantiser, and the flags that it is built with.

Tolerances: rounded weights of at least 4 bits move the tiny model's first block by less than 0.05 nats a token.
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from avalab import engines
from avalab.data import grammars
from avalab.engines import gguf as gguf_file
from avalab.engines import llamacpp
from avalab.engines.engine import TINY
from avalab.lab import artifacts, llamacpp_library, process
from avalab.lab.errors import Unavailable
from avalab.lab.llamacpp_library import Model
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


@pytest.mark.needs("xllamacpp")
@pytest.mark.parametrize("block", ["f32", "bf16", "q5_1", "q5_0", "q4_1"])
def test_llamacpp_reads_every_block_type_that_is_written(block, made, prompt, divergence, reference):
    folder = made(f"gguf-{block}")
    ours, theirs = (e.logits(prompt) for e in (engines.load("llamacpp", folder, threads=1), reference(folder)))
    assert divergence(ours, theirs) < 0.005


@pytest.mark.needs("xllamacpp")
def test_a_prompt_longer_than_a_batch_is_read_in_parts(made, prompt, divergence, reference):
    """600 tokens in batches of 512: the last logits are those of the whole prompt."""
    folder, long = made("gguf-f32"), (prompt * 100)[:600]
    engine = engines.load("llamacpp", folder, threads=1)
    ours, theirs = engine.logits(long), reference(folder).logits(long)
    assert divergence(ours[-50:], theirs[-50:]) < 0.005
    assert engine.generate(long, 4, past_end=True)[0] == int(ours[-1].argmax())


@pytest.mark.needs("xllamacpp")
def test_the_cache_of_llamacpp_bounds_the_context(made, prompt):
    engine = engines.load("llamacpp", made("gguf-q8_0"), context=32)
    with pytest.raises(ValueError, match="exceed the model's context of 32"):
        engine.generate(prompt, 32)


@pytest.mark.needs("xllamacpp")
def test_a_prefix_that_is_kept_gives_the_tokens_of_one_that_is_read_again(made, prompt):
    """A chat that grows, one that differs early, one that is a part of the last, and logits in between."""
    folder = made("gguf-f32")
    plain, keeps = (engines.load("llamacpp", folder, threads=1, keep_prefix=kept) for kept in (False, True))
    first = (prompt * 20)[:100]
    grown = [*first, *plain.generate(first, 6, past_end=True), *prompt]
    for tokens in (first, grown, [*first[:40], *prompt], first[:20], first[:20]):
        assert keeps.generate(tokens, 6, past_end=True) == plain.generate(tokens, 6, past_end=True)
    assert torch.allclose(keeps.logits(grown), plain.logits(grown), atol=1e-4)
    assert keeps.generate(first, 6, past_end=True) == plain.generate(first, 6, past_end=True)


def builds_here() -> list[str]:
    return [name for name, found in llamacpp_library.BUILDS.items() if found()]


@pytest.mark.needs("xllamacpp")
@pytest.mark.parametrize("build", llamacpp_library.BUILDS)
@pytest.mark.parametrize("block", ["f16", "q8_0", "q4_1"])
def test_every_build_that_is_here_continues_as_transformers_does(block, build, made, prompt, reference):
    """Greedy tokens of the same file. In a process of its own: libraries of the same names do not share one."""
    if build not in builds_here():
        pytest.skip(f"the build {build} is not here: {llamacpp_library.INSTALL}")
    folder = made(f"gguf-{block}")
    request = {"folder": str(folder), "build": build, "prompt": prompt}
    found = process.call(f"{__name__}:continuation", request, limit_seconds=120)
    assert found["tokens"] == reference(folder).generate(prompt, 12, past_end=True)


def continuation(request: dict) -> dict:
    """In a process of its own: greedy tokens of one build."""
    engine = llamacpp.load(Path(request["folder"]), threads=1, build=request["build"])
    return {"tokens": engine.generate(request["prompt"], 12, past_end=True)}


@pytest.mark.needs("xllamacpp")
def test_a_generation_ends_before_the_token_that_stops_it(made, prompt, monkeypatch):
    engine = engines.load("llamacpp", made("gguf-q8_0"), threads=1)
    free = engine.generate(prompt, 8, past_end=True)
    stopped = replace(engine, facts=replace(engine.facts, stops=(free[4],)))
    assert stopped.generate(prompt, 8) == free[: free.index(free[4])]


@pytest.mark.needs("xllamacpp")
def test_a_call_is_made_within_the_labs_grammar(made, prompt):
    folder = made("gguf-q8_0")
    tokenizer, engine = checkpoint.load_tokenizer(TINY), engines.load("llamacpp", folder, threads=1)
    compiler = grammars.grammar_compiler(tokenizer, engine.facts.vocabulary)
    add = {"name": "add", "parameters": {"type": "dict", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}}
    grammar = grammars.call_grammar(compiler, [add], refusal=False, max_calls=1)
    text = tokenizer.decode(engine.generate(prompt, 64, grammar))
    assert re.fullmatch(r'<tool_call>\[\{"name": "add", "arguments": \{"a": (true|false)\}\}\]</tool_call>', text)


@pytest.mark.needs("xllamacpp")
def test_a_file_that_llamacpp_refuses_is_one_line_in_its_words(made, tmp_path):
    """A whole file, by its header, of an architecture that nobody knows."""
    file, library = tmp_path / "odd.gguf", llamacpp_library.opened(llamacpp_library.find())
    content = engines.gguf_file(made("gguf-q8_0")).read_bytes()
    size = b"\x05" + bytes(7)
    file.write_bytes(content.replace(b"llama.", b"lhama.").replace(size + b"llama", size + b"lhama"))
    says = r"llama\.cpp cannot read .*odd\.gguf: .*unknown model architecture: 'lhama'"
    with pytest.raises(ValueError, match=says) as refusal:
        Model(library, file, context=32, batch=32, threads=1)
    assert "\n" not in str(refusal.value)


@pytest.mark.needs("xllamacpp")
def test_a_library_whose_parameters_have_moved_is_refused(monkeypatch):
    """As of a later release: the context's default is looked for where something else stands."""
    build = llamacpp_library.find()
    monkeypatch.setattr(llamacpp_library, "_OPEN", {})
    monkeypatch.setitem(llamacpp_library.DEFAULTS, "llama_context_default_params", {"n_ctx": 4096})
    with pytest.raises(Unavailable, match=r"llama\.cpp .* cannot be used: .*gives n_ctx 512, not 4096: another layout"):
        llamacpp_library.opened(build)


def test_no_build_at_all_is_said_with_three_ways_to_get_one(made, monkeypatch):
    for name in llamacpp_library.BUILDS:
        monkeypatch.setitem(llamacpp_library.BUILDS, name, lambda: None)
    with pytest.raises(engines.EngineUnavailable, match=r"npm or python or xllamacpp\) is not here; get it: python -m"):
        engines.load("llamacpp", made("gguf-q8_0"))
    with pytest.raises(ValueError, match="no build 'vulkan' of llama\\.cpp; choose one of npm, python, xllamacpp"):
        llamacpp_library.find("vulkan")


# --- K types -----------------------------------------------------------------------------------------------------


def test_the_importance_of_a_column_is_its_mean_square_under_the_files_name(small, windows):
    """The gate's inputs are the up projection's; the oracle is a hook on the layer."""
    found = llamacpp.importance(small, windows)
    model, seen = checkpoint.load_model(small, packed=False), []
    layer = model.model.layers[0].mlp.gate_proj
    layer.register_forward_hook(lambda module, given, output: seen.append(given[0].float().square()))
    with torch.inference_mode():
        model(windows)
    expected = seen[0].flatten(0, 1).mean(0)
    torch.testing.assert_close(torch.from_numpy(found["blk.0.ffn_gate.weight"]), expected, atol=0, rtol=0.02)  # bf16
    assert np.array_equal(found["blk.0.ffn_gate.weight"], found["blk.0.ffn_up.weight"])
    assert len(found) == 7
    assert all(column.flags.c_contiguous for column in found.values())


@pytest.mark.quantiser
@pytest.mark.parametrize("mixture", llamacpp.MIXTURES)
def test_a_k_mixture_computes_the_same_in_llamacpp_and_transformers(mixture, small, text, divergence, reference):
    """Rows of 128 are no multiple of 256: llama.cpp takes blocks of 32 for them, and says which."""
    made = llamacpp.write(small, mixture)
    ours, theirs = (engines.load(name, made, threads=1).logits(text) for name in ("llamacpp", "torch"))
    assert divergence(ours, theirs) < 0.005
    assert divergence(ours, reference(small).logits(text)) < 0.05
    assert set(made.card["measured"]["formats"]) <= {"f32", "q8_0", "q5_1", "q5_0", "q4_0"}
    assert (made.path / "Modelfile").read_text().startswith(f"FROM ./small.{mixture}.gguf\n")


@pytest.mark.quantiser
def test_rows_that_256_divides_become_k_blocks(tmp_path):
    config = LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
                         vocab_size=1024, max_position_embeddings=64)  # fmt: skip

    def save(folder: Path) -> None:
        checkpoint.save_model(LlamaForCausalLM(config).bfloat16(), checkpoint.load_tokenizer(TINY), folder)

    about = {"base": {"name": "x", "sha256": "y"}, "recipe": [], "format": "bf16"}
    made = llamacpp.write(artifacts.write_artifact("wide", tmp_path, save, **about), "q4_k_m")
    assert set(made.card["measured"]["formats"]) == {"f32", "q4_k", "q6_k"}
    assert engines.load("llamacpp", made, threads=1).logits([5, 6]).isfinite().all()


@pytest.mark.quantiser
def test_an_importance_matrix_changes_the_weights_for_the_better(small, text, windows, divergence, reference):
    """Same bytes, weighted rounding: closer to the dense model on other text of the same kind."""
    plain = llamacpp.write(small, "q5_k_m")
    weighted = llamacpp.write(small, "q5_k_m", windows=windows, out=small.path.parent / "weighted")
    assert plain.bytes == weighted.bytes
    dense = reference(small).logits(text)
    assert divergence(reference(weighted).logits(text), dense) < divergence(reference(plain).logits(text), dense)


def test_a_missing_quantiser_is_named_with_the_way_to_get_it(small, monkeypatch):
    for name in llamacpp_library.QUANTISERS:
        monkeypatch.setitem(llamacpp_library.BUILDS, name, lambda: None)
    with pytest.raises(
        engines.EngineUnavailable, match=r"K types need.*\(npm or python\) is not here; get it: python -m"
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
