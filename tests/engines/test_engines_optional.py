"""Engines of optional libraries, each against transformers in float32 on the same weights; missing ones are skipped.

Tolerances. With its own kernels in float32 an engine differs by the order of additions. By default the engines round
activations to 8 bits where weights have 4 or 8, and keep keys and values in 16 or 8: a KL divergence of 0.005 nats a
token bounds that on the tiny model (its own 4-bit rounding costs 0.03 to 0.06).

A library may crash natively: `engines.load` has a child process open each format with the same options first, so that
such a crash fails a test and never ends pytest's process.
"""

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from avalab import engines
from avalab.data import grammars
from avalab.engines import gguf as gguf_file
from avalab.engines import onnx as genai_folder
from avalab.engines import openvino as openvino_engine
from avalab.engines.engine import Engine
from avalab.lab import artifacts, process
from avalab.models import checkpoint, predict

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny-llama"
PROMPT = "def area(width, height):"
ADD = {"name": "add", "parameters": {"type": "dict", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}}
TEXTS = (PROMPT, "<|im_start|>user\nHéllo 2026! it's we'll  two\t日本語<|im_end|>\n", "x=1234567;  y = 3.14159")
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


def needs(module: str, extra: str):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed: pip install -e '.[{extra}]'")


needs_openvino, needs_onnx = needs("openvino_genai", "openvino"), needs("onnxruntime_genai", "onnx")
needs_llamacpp = needs("llama_cpp", "llamacpp")
every_reader_of_gguf = pytest.mark.parametrize(
    "name", [pytest.param("openvino", marks=needs_openvino), pytest.param("llamacpp", marks=needs_llamacpp)]
)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return checkpoint.load_tokenizer(TINY)(PROMPT).input_ids


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Function from what is asked for (`gguf-q8_0`, `openvino-int8`, `onnx-fp32`) to the tiny model's folder."""
    folder = tmp_path_factory.mktemp("engines")

    def folder_of(name: str) -> Path:
        target, (form, weights) = folder / name, name.split("-")
        if not target.is_dir():
            target.mkdir()
            if form == "gguf":
                gguf_file.export(TINY, target / "m.gguf", weights)
            else:
                {"openvino": openvino_engine, "onnx": genai_folder}[form].export(TINY, target, weights)
        return target

    return folder_of


@functools.cache
def reference(folder: Path) -> Engine:
    return engines.load("torch", folder, dtype=torch.float32)


@functools.cache
def opened(name: str, folder: Path) -> Engine:
    """An engine that several tests share; none of them closes it."""
    return engines.load(name, folder, threads=1)


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean KL divergence from the reference, nats a token."""
    return float(predict.kl_divergence(theirs.log_softmax(-1), ours.log_softmax(-1)).mean())


# --- GGUF in every engine ----------------------------------------------------------------------------------------


@every_reader_of_gguf
@pytest.mark.parametrize("block", ["f16", "q8_0"])
def test_a_gguf_file_gives_the_greedy_tokens_of_transformers(name, block, made, prompt):
    """16 tokens, all equal: at 8 bits and more no choice of the tiny model is close enough to flip."""
    folder = made(f"gguf-{block}")
    engine = opened(name, folder)
    assert engine.generate(prompt, 16, past_end=True) == reference(folder).generate(prompt, 16, past_end=True)


@every_reader_of_gguf
@pytest.mark.parametrize("block", ["f16", "q8_0", "q4_0"])
def test_a_gguf_file_gives_the_distributions_of_transformers(name, block, made, prompt):
    folder = made(f"gguf-{block}")
    ours, theirs = (e.logits(prompt) for e in (opened(name, folder), reference(folder)))
    assert ours.shape == theirs.shape == (len(prompt), 1024)
    assert divergence(ours, theirs) < 0.005


@every_reader_of_gguf
def test_a_grammar_makes_a_readable_call_in_every_engine(name, made, prompt):
    tokenizer = checkpoint.load_tokenizer(TINY)
    grammar = grammars.call_grammar(grammars.compiler(tokenizer, 1024), [ADD], refusal=False, max_calls=1)
    engine = opened(name, made("gguf-q8_0"))
    text = tokenizer.decode(engine.generate(prompt, 120, grammar), skip_special_tokens=True)
    call = json.loads(text.removeprefix(grammars.BEGIN).removesuffix(grammars.END))
    assert (call[0]["name"], list(call[0]["arguments"])) == ("add", ["a"])


@every_reader_of_gguf
def test_tokens_are_told_as_they_come_and_generations_do_not_hang_together(name, made, prompt):
    engine, seen = opened(name, made("gguf-q8_0")), []
    first = engine.generate(prompt, 8, past_end=True, on_token=seen.append)
    assert seen == first
    engine.generate(prompt[:3], 4)
    engine.logits(prompt[:5])
    assert engine.generate(prompt, 8, past_end=True) == first


@every_reader_of_gguf
def test_a_closed_engine_of_another_library_says_so(name, made, prompt):
    engine = engines.load(name, made("gguf-q8_0"), threads=1)
    engine.close()
    with pytest.raises(ValueError, match=f"this {name} engine of gguf-q8_0 is closed"):
        engine.generate(prompt, 1)


def token_ids_of_llamacpp(request: dict) -> dict:
    """In a process of its own: what llama.cpp's tokenizer makes of a text."""
    from llama_cpp import Llama

    model = Llama(request["file"], vocab_only=True, verbose=False)
    return {"ids": model.tokenize(request["text"].encode(), add_bos=False, special=True)}


def token_ids_of_openvino(request: dict) -> dict:
    """In a process of its own: what GenAI's tokenizer makes of a text."""
    threads = {"INFERENCE_NUM_THREADS": request["threads"]} if request["threads"] else {}
    pipeline = openvino_engine.pipeline(Path(request["file"]), "CPU", ATTENTION_BACKEND="SDPA", **threads)
    encoded = pipeline.get_tokenizer().encode(request["text"], add_special_tokens=False)
    return {"ids": encoded.input_ids.data[0].tolist()}


@every_reader_of_gguf
@pytest.mark.parametrize("text", TEXTS)
def test_readers_of_gguf_cut_text_as_the_tokenizer_beside_the_weights(name, text, made):
    file, expected = engines.gguf_file(made("gguf-q8_0")), checkpoint.load_tokenizer(TINY)(text).input_ids
    request = {"file": str(file), "text": text}
    if name == "openvino":
        request["threads"] = engines.usable_options("openvino", file.parent, threads=1)[0]["threads"]
    found = process.call(f"{__name__}:token_ids_of_{name}", request, limit_seconds=120)
    assert found["ids"] == expected


# --- llama.cpp ---------------------------------------------------------------------------------------------------


@needs_llamacpp
@pytest.mark.parametrize("block", ["f32", "bf16", "q5_1", "q5_0", "q4_1"])
def test_llamacpp_reads_every_block_type_that_is_written(block, made, prompt):
    folder = made(f"gguf-{block}")
    ours, theirs = (e.logits(prompt) for e in (engines.load("llamacpp", folder, threads=1), reference(folder)))
    assert divergence(ours, theirs) < 0.005


@needs_llamacpp
def test_a_prompt_longer_than_a_batch_is_read_in_parts(made, prompt):
    """600 tokens in batches of 512: the last logits are those of the whole prompt."""
    folder, long = made("gguf-f32"), (prompt * 100)[:600]
    engine = engines.load("llamacpp", folder, threads=1)
    ours, theirs = engine.logits(long), reference(folder).logits(long)
    assert divergence(ours[-50:], theirs[-50:]) < 0.005
    assert engine.generate(long, 4, past_end=True)[0] == int(ours[-1].argmax())


@needs_llamacpp
def test_the_cache_of_llamacpp_bounds_the_context(made, prompt):
    engine = engines.load("llamacpp", made("gguf-q8_0"), context=32)
    with pytest.raises(ValueError, match="exceed the model's context of 32"):
        engine.generate(prompt, 32)


# --- OpenVINO ----------------------------------------------------------------------------------------------------


@needs_openvino
@pytest.mark.parametrize("block", ["q8_0", "q4_0"])
def test_openvino_in_float32_has_the_logits_of_transformers(block, made, prompt):
    """Activations, keys and values in float32: logits within 1e-3, the order of additions."""
    folder = made(f"gguf-{block}")
    ours = engines.load("openvino", folder, threads=1, properties=EXACT)
    torch.testing.assert_close(ours.logits(prompt), reference(folder).logits(prompt), atol=1e-3, rtol=0)
    assert ours.generate(prompt, 16, past_end=True) == reference(folder).generate(prompt, 16, past_end=True)


@needs_openvino
def test_openvino_reads_q4_1_as_it_is_where_minimums_are_whole_steps(tmp_path, prompt):
    """Its reader rounds a block's minimum to a whole number of steps; weights of that kind lose nothing."""
    model = checkpoint.load_model(TINY, dtype=torch.float32)
    for layer in checkpoint.linear_layers(model).values():
        blocks = layer.weight.data.view(-1, 32)
        steps = (blocks * 2**5).round().clamp(-7, 8)
        steps[:, 0], steps[:, 1] = -7, 8  # the block's ends, so that its type finds this grid
        layer.weight.data = (steps / 2**7).view(layer.weight.shape)
    model.config.dtype = torch.float32
    checkpoint.save_model(model, checkpoint.load_tokenizer(TINY), tmp_path / "grid")
    (tmp_path / "file").mkdir()
    gguf_file.export(tmp_path / "grid", tmp_path / "file" / "m.gguf", "q4_1")
    ours = engines.load("openvino", tmp_path / "file", threads=1, properties=EXACT).logits(prompt)
    torch.testing.assert_close(ours, reference(tmp_path / "file").logits(prompt), atol=1e-3, rtol=0)


@needs_openvino
@pytest.mark.parametrize(("weights", "allowed"), [("f16", 0.005), ("int8", 0.005), ("int4", 0.15)])
def test_an_openvino_folder_is_close_to_its_dense_model(weights, allowed, made, prompt):
    """Against the dense model: 0.005 is the engine's own rounding, 0.15 bounds int4 with groups of 64."""
    engine = engines.load("openvino", made(f"openvino-{weights}"), threads=1)
    assert divergence(engine.logits(prompt), reference(TINY).logits(prompt)) < allowed
    assert engine.generate(prompt, 4, past_end=True)[0] == int(engine.logits(prompt)[-1].argmax())


@needs_openvino
def test_an_openvino_artefact_names_what_it_was_made_from_and_is_made_once(tmp_path, monkeypatch, prompt):
    # Plain bytes in a file called .bin; whether artefacts may hold one is not this test's matter.

    def save(folder: Path) -> None:
        shutil.copytree(TINY, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))

    base = artifacts.write_artifact("tiny", tmp_path, save, base={"name": "x", "sha256": "y"}, recipe=[], format="bf16")
    made = openvino_engine.write(base, "f16")
    assert (made.name, made.format, made.card["base"]["sha256"]) == ("tiny+openvino-f16", "openvino-f16", base.sha256)
    assert engines.load("openvino", made, threads=1).generate(prompt, 3, past_end=True)
    monkeypatch.setattr(openvino_engine, "export", lambda *arguments: pytest.fail("it was made a second time"))
    assert openvino_engine.write(base, "f16").sha256 == made.sha256


@needs_openvino
def test_openvino_refuses_block_types_that_it_does_not_read_and_says_what_does(made):
    with pytest.raises(engines.NotSupported, match=r"export it as f16, q8_0 or q4_0, or use llamacpp or torch"):
        engines.load("openvino", made("gguf-q5_1"))


@needs_openvino
def test_openvino_leaves_an_artefact_as_it_was(made, prompt):
    """For logits GenAI writes what it read from a GGUF file: not beside the file."""
    folder = made("gguf-q8_0")
    before = sorted(path.name for path in folder.iterdir())
    engines.load("openvino", folder, threads=1).logits(prompt)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_unknown_weights_for_an_export_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no weights 'int3' for OpenVINO; choose one of f16, int8, int4"):
        openvino_engine.export(TINY, tmp_path, "int3")
    with pytest.raises(ValueError, match=r"no weights 'int3' for ONNX; choose one of fp32, int8, int4"):
        genai_folder.export(TINY, tmp_path, "int3")


# --- ONNX Runtime ------------------------------------------------------------------------------------------------


@needs_onnx
def test_onnx_in_float32_has_the_tokens_and_logits_of_transformers(made, prompt):
    """Same weights, 32 bits throughout: logits within 1e-3, tokens equal."""
    ours, theirs = engines.load("onnx", made("onnx-fp32"), threads=1), reference(TINY)
    torch.testing.assert_close(ours.logits(prompt), theirs.logits(prompt), atol=1e-3, rtol=0)
    assert ours.generate(prompt, 32, past_end=True) == theirs.generate(prompt, 32, past_end=True)


@needs_onnx
def test_onnx_int8_is_close_to_its_dense_model(made, prompt):
    engine = engines.load("onnx", made("onnx-int8"), threads=1)
    assert divergence(engine.logits(prompt), reference(TINY).logits(prompt)) < 0.005


@needs_onnx
def test_onnx_refuses_a_graph_that_is_damaged(made, tmp_path):
    for path in made("onnx-fp32").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:5000] if path.suffix == ".onnx" else path.read_bytes())
    with pytest.raises(ValueError, match="ONNX Runtime cannot read"):
        engines.load("onnx", tmp_path)


# --- engines that are not here -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("openvino", "openvino_genai", "openvino"),
        ("onnx", "onnxruntime_genai", "onnx"),
        ("onnxruntime", "onnxruntime", "onnx"),
        ("executorch", "executorch", "executorch"),
        ("llamacpp", "llama_cpp", "llamacpp"),
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
