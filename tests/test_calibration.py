"""The walk over a model's blocks: what every linear layer reads, before and after changes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from avalab import calibration, models


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


WINDOWS = torch.arange(40).view(4, 10) % 64


def inputs_of(model: LlamaForCausalLM, name: str) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(WINDOWS)
    handle.remove()
    return torch.cat(seen).flatten(0, 1)


def test_every_linear_layer_is_visited_once_and_those_with_one_input_together(model):
    sites = list(calibration.walk(model, WINDOWS))
    visited = [name for site in sites for name in site.layers]
    assert sorted(visited) == sorted(models.linear_layers(model))
    assert [len(site.layers) for site in sites] == [3, 1, 2, 1] * 2
    assert [site.block for site in sites] == [0] * 4 + [1] * 4
    assert {site.tokens for site in sites} == {40}


def test_a_moment_is_the_mean_outer_product_of_what_the_layer_reads(model):
    for site in calibration.walk(model, WINDOWS):
        rows = inputs_of(model, next(iter(site.layers)))
        torch.testing.assert_close(site.moment, rows.T @ rows / len(rows), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(site.cross, site.moment, atol=1e-6, rtol=1e-4)


def test_changed_weights_are_seen_by_what_follows_and_the_cross_moment_keeps_the_original(model):
    original = {name: inputs_of(model, name) for name in models.linear_layers(model)}
    for site in calibration.walk(model, WINDOWS):
        name = next(iter(site.layers))
        now = inputs_of(model, name)
        torch.testing.assert_close(site.moment, now.T @ now / len(now), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(site.cross, original[name].T @ now / len(now), atol=1e-6, rtol=1e-4)
        for layer in site.layers.values():
            layer.weight.data = layer.weight.data * 0.9


def test_batches_change_nothing(model, monkeypatch):
    whole = [site.moment for site in calibration.walk(model, WINDOWS)]
    monkeypatch.setattr(calibration, "BATCH_WINDOWS", 1)
    for site, moment in zip(calibration.walk(model, WINDOWS), whole, strict=True):
        torch.testing.assert_close(site.moment, moment, atol=1e-6, rtol=1e-4)


def test_no_hook_is_left_behind(model):
    next(calibration.walk(model, WINDOWS))
    list(calibration.walk(model, WINDOWS))
    calibration.gradient_pass(model, WINDOWS, list(models.linear_layers(model)), lambda *_: None)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_gradients_are_those_of_the_sampled_labels_and_equal_seeds_give_equal_ones(model):
    """With gradient g of the outputs, the weight's gradient is g^T x: an oracle by autograd on the weight itself."""
    name = "model.layers.1.mlp.down_proj"
    found: list[torch.Tensor] = []

    def measure(_layer, inputs, gradients) -> None:
        found.append(gradients.flatten(0, 1).T @ inputs.detach().flatten(0, 1))

    for seed in (0, 0, 1):
        calibration.gradient_pass(model, WINDOWS, [name], measure, seed=seed)
    loss = calibration._sampled_loss(model(WINDOWS).logits.flatten(0, 1), 0)
    (expected,) = torch.autograd.grad(loss, model.get_submodule(name).weight)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_no_calibration_text_is_refused(model):
    with pytest.raises(ValueError, match=r"\(0, 10\)"):
        next(calibration.walk(model, WINDOWS[:0]))
