"""One token through a packed model in one native call, against transformers."""

import pytest
import torch
from transformers import DynamicCache

from avalab import engines
from avalab.compress import quantize
from avalab.kernels.packed import native
from avalab.lab.errors import InputError
from avalab.models import checkpoint
from avalab.models.inference import step as steps

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler here")


@pytest.fixture(scope="module")
def small(run, base):
    return quantize.compress_artifact(base, "rtn", run=run, bits=4, group_size=64, embedding="int8")


@pytest.fixture(scope="module")
def model(small):
    return checkpoint.load_model(small, dtype=torch.float32)


def test_logits_of_a_step_are_those_of_the_model(model):
    tokens = torch.randint(3, 500, (1, 40))
    with torch.inference_mode():
        expected, cache = model(tokens).logits[0], DynamicCache(config=model.config)
        model(tokens[:, :11], past_key_values=cache)
        step = steps.native_step(model)
        step.begin(cache, 40)
        found = torch.stack([step.next(int(token)) for token in tokens[0, 11:]])
    torch.testing.assert_close(found, expected[11:], rtol=1e-3, atol=1e-3)


def test_a_full_cache_is_said(model):
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[3, 4]]), past_key_values=cache)
    step = steps.native_step(model)
    step.begin(cache, 2)
    with pytest.raises(InputError, match="the cache holds 2 tokens and is full"):
        step.next(5)


def test_the_engine_writes_the_tokens_that_it_writes_without_the_step(small):
    engine = engines.load("torch", small, dtype=torch.float32)
    assert engine.state["native"] is not None
    found = engine.generate(list(range(3, 60)), 24, past_end=True)
    engine.state["native"] = None
    assert engine.generate(list(range(3, 60)), 24, past_end=True) == found


def test_families_and_layers_that_the_step_does_not_compute_are_left_to_the_model(small, family_model, model):
    assert steps.native_step(checkpoint.load_model(small, packed=False)) is None
    assert steps.native_step(checkpoint.load_model(family_model("gemma3"))) is None


def test_a_step_that_disagrees_with_its_model_is_not_used(model, monkeypatch, caplog):
    monkeypatch.setattr(model.base_model.norm, "variance_epsilon", 10.0)
    assert steps.native_step(model) is None
    assert "differs from llama" in caplog.text
