"""Engines: what they refuse, the greedy loop by pencil, and the torch engine against transformers' own `generate`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from avalab import engines
from avalab.compress import quantize
from avalab.data import grammars
from avalab.engines import engine
from avalab.engines.engine import Engine, Request
from avalab.lab.run import Run
from avalab.models import checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny-llama"
PROMPT = "def area(width, height):"
ADD = {"name": "add", "parameters": {"type": "dict", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}}


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer(TINY)


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


# --- torch -------------------------------------------------------------------------------------------------------


def reference_tokens(model, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy generation of exactly `count` tokens."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def test_greedy_tokens_and_logits_are_those_of_transformers(tiny, tokenizer):
    """Same library and float32: tokens equal, logits within 1e-4 (a cache changes the order of additions)."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT).input_ids
    assert tiny.generate(prompt, 48, past_end=True) == reference_tokens(model, prompt, 48)
    with torch.inference_mode():
        torch.testing.assert_close(tiny.logits(prompt), model(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["nf4", "torchao-int8", "rtn"])
def test_a_quantised_artefact_gives_the_tokens_of_transformers(method, tmp_path, monkeypatch, tokenizer):
    """Tokens of the loaded artefact itself; 12 of them, in bf16."""
    monkeypatch.setattr(Run, "artifacts_dir", property(lambda self: tmp_path / self.name))
    run = Run("t", "smoke")
    artifact = quantize.compress_artifact(checkpoint.base_artifact(run), method, run=run)
    prompt = tokenizer(PROMPT).input_ids
    loaded = engines.load("torch", artifact)
    assert loaded.generate(prompt, 12, past_end=True) == reference_tokens(loaded.state["model"], prompt, 12)


def test_a_static_cache_changes_no_token(tiny, tokenizer):
    """What `compiled` does, with the compiler left out: single steps over a cache of fixed length."""
    prompt = tokenizer(PROMPT).input_ids
    fixed = replace(tiny, state=tiny.state | {"step": tiny.state["model"].forward})
    assert fixed.generate(prompt, 24, past_end=True) == tiny.generate(prompt, 24, past_end=True)


def test_generation_stops_before_the_end_token(tiny, tokenizer):
    prompt = tokenizer(PROMPT).input_ids
    free = tiny.generate(prompt, 16, past_end=True)
    stopping: Engine = replace(tiny, facts=replace(tiny.facts, stops=(free[5],)))
    assert stopping.generate(prompt, 16) == free[: free.index(free[5])]


def test_a_grammar_makes_a_readable_call(tiny, tokenizer):
    grammar = grammars.call_grammar(grammars.compiler(tokenizer, 1024), [ADD], refusal=False, max_calls=1)
    text = tokenizer.decode(tiny.generate(tokenizer(PROMPT).input_ids, 120, grammar), skip_special_tokens=True)
    call = json.loads(text.removeprefix(grammars.BEGIN).removesuffix(grammars.END))
    assert (call[0]["name"], list(call[0]["arguments"])) == ("add", ["a"])
