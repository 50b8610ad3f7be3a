"""Whole weights: float32 while training, bf16 around it, and nothing else moves."""

import pytest
import torch
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.lab.run import ROOT
from avalab.models import adapters, checkpoint, walk

TINY = ROOT / "data" / "tiny-llama"
TOKENS = torch.arange(5, 45)[None]


@pytest.fixture
def model():
    return checkpoint.load_model(TINY)


def test_wide_weights_change_no_output_and_are_the_only_ones_trained(model):
    with torch.no_grad():
        before = model(TOKENS).logits
        adapters.apply_wide_weights(model)
        assert torch.equal(model(TOKENS).logits, before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.removesuffix(".weight") for name in trained} == set(walk.linear_layers(model))
    assert {p.dtype for p in trained.values()} == {torch.float32}


def test_a_step_too_small_for_bf16_is_kept_until_it_counts(model):
    adapters.apply_wide_weights(model, ("down_proj",))
    layer = model.model.layers[0].mlp.down_proj
    before = layer.weight.detach().clone()
    for _ in range(16):
        layer.weight.data *= 1 + 2**-11  # a quarter of bf16's half step
    adapters.restore_narrow_weights(model)
    assert layer.weight.dtype == torch.bfloat16
    assert (layer.weight != before.to(torch.bfloat16)).float().mean() > 0.9


def test_restored_models_have_their_usual_layers(model, tmp_path):
    adapters.apply_wide_weights(model)
    adapters.restore_narrow_weights(model)
    assert not any("forward" in vars(layer) for layer in walk.linear_layers(model).values())
    checkpoint.save_model(model, checkpoint.load_tokenizer(TINY), tmp_path)
    with torch.no_grad():
        assert torch.equal(checkpoint.load_model(tmp_path)(TOKENS).logits, checkpoint.load_model(TINY)(TOKENS).logits)


def test_targets_that_match_nothing_are_refused(model):
    with pytest.raises(ValueError, match="'experts' matches no linear layer"):
        adapters.apply_wide_weights(model, ("experts",))


def test_layers_that_are_no_plain_linear_ones_are_refused(model):
    class Odd(torch.nn.Linear):
        pass

    walk.replace_linear(model, "model.layers.0.mlp.down_proj", Odd(384, 128))
    with pytest.raises(ValueError, match=r"down_proj is a Odd; only bf16 weights can be trained"):
        adapters.apply_wide_weights(model)
