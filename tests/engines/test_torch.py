"""The torch engine: against transformers' own `generate`, its caches, and 4-bit layers through the lab's kernels."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from avalab import engines, kernels
from avalab.compress import quantize
from avalab.data import grammars
from avalab.engines import torch as torch_engine
from avalab.engines.engine import TINY, Engine
from avalab.engines.torch import FourBitLinear
from avalab.kernels import dispatch, product
from avalab.kernels.product import sample_weight
from avalab.lab.run import ROOT
from avalab.models import adapters, checkpoint, walk

ADD = {"name": "add", "parameters": {"type": "dict", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}}


@pytest.fixture(scope="module")
def tiny():
    return engines.load("torch", TINY, dtype=torch.float32)


def reference_tokens(model, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy generation of exactly `count` tokens."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def test_greedy_tokens_and_logits_are_those_of_transformers(tiny, prompt):
    """Same library and float32: tokens equal, logits within 1e-4 (a cache changes the order of additions)."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    assert tiny.generate(prompt, 48, past_end=True) == reference_tokens(model, prompt, 48)
    with torch.inference_mode():
        torch.testing.assert_close(tiny.logits(prompt), model(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["nf4", "torchao-int8", "rtn"])
def test_a_quantised_artefact_gives_the_tokens_of_transformers(method, run, base, prompt):
    """Tokens of the loaded artefact itself; 12 of them, in bf16."""
    artifact = quantize.compress_artifact(base, method, run=run)
    loaded = engines.load("torch", artifact)
    assert loaded.generate(prompt, 12, past_end=True) == reference_tokens(loaded.state["model"], prompt, 12)


def test_a_static_cache_changes_no_token(tiny, prompt):
    """What `compiled` does, with the compiler left out: single steps over a cache of fixed length."""
    fixed = replace(tiny, state=tiny.state | {"step": tiny.state["model"].forward})
    assert fixed.generate(prompt, 24, past_end=True) == tiny.generate(prompt, 24, past_end=True)


def test_generation_stops_before_the_end_token(tiny, prompt):
    free = tiny.generate(prompt, 16, past_end=True)
    stopping: Engine = replace(tiny, facts=replace(tiny.facts, stops=(free[5],)))
    assert stopping.generate(prompt, 16) == free[: free.index(free[5])]


def test_a_grammar_makes_a_readable_call(tiny, prompt):
    tokenizer = checkpoint.load_tokenizer(TINY)
    grammar = grammars.call_grammar(grammars.grammar_compiler(tokenizer, 1024), [ADD], refusal=False, max_calls=1)
    text = tokenizer.decode(tiny.generate(prompt, 120, grammar), skip_special_tokens=True)
    call = json.loads(text.removeprefix(grammars.BEGIN).removesuffix(grammars.END))
    assert (call[0]["name"], list(call[0]["arguments"])) == ("add", ["a"])


# --- bitsandbytes' 4-bit layers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifacts(run, base):
    """The tiny model in three 4-bit forms."""
    return {
        "nf4": quantize.compress_artifact(base, "nf4", run=run),
        "nf4-dq": quantize.compress_artifact(base, "nf4", run=run, double_quantization=True),
        "fp4": quantize.compress_artifact(base, "fp4", run=run),
    }


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4"])
def test_every_4_bit_layer_computes_through_the_kernels_with_the_artefacts_own_values(name, artifacts):
    plain, loaded = checkpoint.load_model(artifacts[name]), engines.load("torch", artifacts[name]).state["model"]
    layers = {key: m for key, m in loaded.named_modules() if isinstance(m, FourBitLinear)}
    assert list(layers) == list(walk.linear_layers(plain))
    for key, module in walk.linear_layers(plain).items():
        from bitsandbytes.functional import dequantize_4bit

        expected = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(kernels.decode(layers[key].weight4, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4"])
def test_logits_are_as_near_to_bitsandbytes_as_bf16_allows(name, artifacts):
    tokens = list(range(5, 45))
    with torch.inference_mode():
        theirs = checkpoint.load_model(artifacts[name])(torch.tensor([tokens])).logits[0].float()
    ours = engines.load("torch", artifacts[name]).logits(tokens)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_the_switch_forces_the_reference_in_a_loaded_engine(artifacts, monkeypatch):
    engine, used = engines.load("torch", artifacts["nf4"]), set()
    choose = dispatch.choose_form

    def watched(operation, forms, device, *arguments, **options):
        form = choose(operation, forms, device, *arguments, **options)
        used.add((operation, form.name))
        return form

    monkeypatch.setattr(product, "choose_form", watched)
    fast = engine.logits([5, 6, 7])
    assert used
    assert ("product", "reference") not in used
    used.clear()
    monkeypatch.setenv(dispatch.SWITCH, "reference")
    assert (engine.logits([5, 6, 7]) - fast).norm() < 0.02 * fast.norm()
    assert used == {("product", "reference")}


def test_a_form_that_fails_its_check_is_not_used_by_the_engine(artifacts, monkeypatch):
    engine = engines.load("torch", artifacts["nf4"])
    expected = engine.logits([5, 6, 7])

    def broken(device):
        raise ArithmeticError("wrong")

    forms = [dispatch.Form(f.name, lambda *_: 1 / 0, f.serves, broken) for f in product.PRODUCT[:-1]]
    monkeypatch.setattr(product, "PRODUCT", (*forms, product.PRODUCT[-1]))
    monkeypatch.setattr(dispatch, "_verdicts", {})
    with pytest.warns(UserWarning, match="failed its check on cpu, not used: wrong"):
        found = engine.logits([5, 6, 7])
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_bias_is_added():
    weight, bias = sample_weight("cpu", kind="nf4"), torch.arange(96.0)
    layer, x = FourBitLinear(weight, bias), torch.ones(2, 192)
    torch.testing.assert_close(layer(x), kernels.multiply(x, weight) + bias)
    assert "in_features=192, out_features=96, group=64" in repr(layer)


def test_layers_below_an_adapter_are_replaced_too(artifacts):
    plain, ours = (checkpoint.load_model(artifacts["nf4"]) for _ in range(2))
    for model in (plain, ours):
        adapters.attach_adapters(model, rank=2, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        model.eval()
    assert torch_engine.apply_kernels(ours) == len(adapters.adapter_layers(ours))
    with torch.inference_mode():
        found, expected = (model(torch.tensor([[5, 6, 7]])).logits.float() for model in (ours, plain))
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_layer_with_a_group_of_zeros_stays_with_bitsandbytes_and_the_log_names_both(artifacts, caplog):
    model = checkpoint.load_model(artifacts["nf4"])
    name, layer = list(walk.linear_layers(model).items())[3]
    layer.weight.quant_state.absmax[2] = 0
    with caplog.at_level(logging.WARNING):
        replaced = torch_engine.apply_kernels(model)
    assert replaced == len(walk.linear_layers(checkpoint.load_model(artifacts["nf4"]))) - 1
    assert f"{name} stays with bitsandbytes: 1 of" in caplog.text
    assert "row 1, group 0" in caplog.text  # two groups of 64 a row
    assert type(walk.linear_layers(model)[name]).__name__ == "Linear4bit"


COMPILE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from avalab import engines
compile, traced = torch.compile, []
def graph(module, inputs):
    traced.append(module)
    return module.forward
torch.compile = lambda f, mode, **options: compile(f, backend=graph, fullgraph=True, **options)
eager, compiled = (engines.load("torch", Path(sys.argv[1]), compiled=c) for c in (False, True))
tokens = [engine.generate(list(range(5, 25)), 12, past_end=True) for engine in (eager, compiled)]
print(tokens[0] == tokens[1], len(traced))
"""


def test_a_compiled_engine_gives_the_same_tokens_in_one_graph(artifacts):
    """The tracing half of the compiler, in a process without the tests' checks of types, which it cannot trace."""
    command = [sys.executable, "-c", COMPILE, str(artifacts["nf4-dq"].path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "1"], done.stderr[-3000:]


def test_a_layer_that_bitsandbytes_keeps_is_not_compiled(artifacts, monkeypatch):
    monkeypatch.setattr(torch_engine, "apply_kernels", lambda model: 0)
    with pytest.raises(engines.NotSupported, match=r"nf4: \d+ layers of bitsandbytes, model.*compiled=False"):
        engines.load("torch", artifacts["nf4"], compiled=True)


def test_a_dense_model_has_nothing_to_replace():
    assert torch_engine.apply_kernels(checkpoint.load_model(TINY)) == 0
