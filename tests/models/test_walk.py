"""The walk over a model's blocks: what every linear layer reads, before and after changes; the files it leaves."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, LlamaConfig, LlamaForCausalLM

from avalab.measure import families
from avalab.models import checkpoint, walk


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
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
    sites = list(walk.calibration_sites(model, WINDOWS))
    visited = [name for site in sites for name in site.layers]
    assert sorted(visited) == sorted(walk.linear_layers(model))
    assert [len(site.layers) for site in sites] == [3, 1, 2, 1] * 3
    assert [site.block for site in sites] == [0] * 4 + [1] * 4 + [2] * 4
    assert {site.tokens for site in sites} == {40}


def test_a_moment_is_the_mean_outer_product_of_what_the_layer_reads(model):
    for site in walk.calibration_sites(model, WINDOWS):
        rows = inputs_of(model, next(iter(site.layers)))
        torch.testing.assert_close(site.moment, rows.T @ rows / len(rows), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(site.cross, site.moment, atol=1e-6, rtol=1e-4)


def test_changed_weights_are_seen_by_what_follows_and_the_cross_moment_keeps_the_original(model):
    original = {name: inputs_of(model, name) for name in walk.linear_layers(model)}
    for site in walk.calibration_sites(model, WINDOWS):
        name = next(iter(site.layers))
        now = inputs_of(model, name)
        torch.testing.assert_close(site.moment, now.T @ now / len(now), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(site.cross, original[name].T @ now / len(now), atol=1e-6, rtol=1e-4)
        for layer in site.layers.values():
            layer.weight.data = layer.weight.data * 0.9


def test_batches_change_nothing(model, monkeypatch):
    whole = [site.moment for site in walk.calibration_sites(model, WINDOWS)]
    monkeypatch.setattr(walk, "BATCH_WINDOWS", 1)
    for site, moment in zip(walk.calibration_sites(model, WINDOWS), whole, strict=True):
        torch.testing.assert_close(site.moment, moment, atol=1e-6, rtol=1e-4)


def test_no_hook_is_left_behind(model):
    next(walk.calibration_sites(model, WINDOWS))
    list(walk.calibration_sites(model, WINDOWS))
    walk.gradient_pass(model, WINDOWS, list(walk.linear_layers(model)), lambda *_: None)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_gradients_are_those_of_the_sampled_labels_and_equal_seeds_give_equal_ones(model):
    """With gradient g of the outputs, the weight's gradient is g^T x: an oracle by autograd on the weight itself."""
    name = "model.layers.1.mlp.down_proj"
    found: list[torch.Tensor] = []

    def measure(_layer, inputs, gradients) -> None:
        found.append(gradients.flatten(0, 1).T @ inputs.detach().flatten(0, 1))

    for seed in (0, 0, 1):
        walk.gradient_pass(model, WINDOWS, [name], measure, seed=seed)
    loss = walk._sampled_loss(model(WINDOWS).logits.flatten(0, 1), 0)
    (expected,) = torch.autograd.grad(loss, model.get_submodule(name).weight)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_no_calibration_text_is_refused(model):
    with pytest.raises(ValueError, match=r"\(0, 10\)"):
        next(walk.calibration_sites(model, WINDOWS[:0]))


def test_moments_are_those_of_the_calibration_walk(model, tmp_path):
    walk.measure_moments(model, WINDOWS, tmp_path)
    for site in walk.calibration_sites(model, WINDOWS):
        for name in site.layers:
            torch.testing.assert_close(walk.stored_moment(tmp_path, name), site.moment, atol=1e-6, rtol=1e-4)
        assert [f".{n}" for n in walk.stored_readers(tmp_path, name)] == [n[n.index(".", 14) :] for n in site.layers]


def test_influence_is_one_less_the_cosine_of_what_enters_and_leaves_a_block(model, tmp_path):
    walk.measure_moments(model, WINDOWS, tmp_path)
    with torch.no_grad():
        states = model(WINDOWS, output_hidden_states=True).hidden_states
    for block in range(2):  # the last of the hidden states is after the final norm
        expected = 1 - torch.cosine_similarity(states[block], states[block + 1], dim=-1).mean()
        assert walk.stored_influence(tmp_path, block) == pytest.approx(float(expected), rel=1e-4)


def findings(folder: Path, block: int) -> dict[str, list]:
    """What a block's file holds, without the seconds that it took."""
    return {
        name: value.tolist() for name, value in load_file(walk.block_file(folder, block)).items() if name != "seconds"
    }


def test_a_killed_walk_goes_on_at_the_first_block_without_a_file(model, tmp_path, monkeypatch):
    whole, resumed, done = tmp_path / "whole", tmp_path / "resumed", []
    walk.measure_moments(model, WINDOWS, whole)
    measure = walk._of_block

    def killed_in_the_second(block, calls, index):
        if index == 1 and done == [0]:
            done.append("killed")
            raise KeyboardInterrupt
        done.append(index)
        return measure(block, calls, index)

    monkeypatch.setattr(walk, "_of_block", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        walk.measure_moments(model, WINDOWS, resumed)
    walk.measure_moments(model, WINDOWS, resumed)
    walk.measure_moments(model, WINDOWS, resumed)
    assert done == [0, "killed", 1, 2]
    for index in range(3):
        assert findings(whole, index) == findings(resumed, index)


def test_a_damaged_file_is_measured_again(model, tmp_path):
    walk.measure_moments(model, WINDOWS, tmp_path)
    before, path = findings(tmp_path, 1), walk.block_file(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:50])
    walk.measure_moments(model, WINDOWS, tmp_path)
    assert findings(tmp_path, 1) == before


def test_the_seconds_of_a_walk_are_kept_for_those_who_share_it(model, tmp_path):
    start = time.perf_counter()
    files = walk.measure_moments(model, WINDOWS, tmp_path)
    files.append(walk.measure_squared_gradients(model, WINDOWS, tmp_path / "g"))
    took = time.perf_counter() - start
    again = [
        *walk.measure_moments(model, WINDOWS, tmp_path),
        walk.measure_squared_gradients(model, WINDOWS, tmp_path / "g"),
    ]
    assert again == files
    assert 0 < walk.stored_seconds(again) == walk.stored_seconds(files) <= took


def test_squared_gradients_are_sums_of_each_tokens_own(model, tmp_path):
    name, seen = "model.layers.1.mlp.up_proj", []
    walk.gradient_pass(model, WINDOWS, [name], lambda _, x, g: seen.append((x.detach(), g)), seed=3)
    walk.measure_squared_gradients(model, WINDOWS, tmp_path / "g", seed=3)
    ((inputs, gradients),) = seen
    each = torch.einsum("wtr,wtc->wtrc", gradients, inputs)
    found = walk.stored_squared_gradient(tmp_path / "g", name)
    torch.testing.assert_close(found.float(), each.square().mean((0, 1)), rtol=1e-2, atol=0)
    assert set(walk.linear_layers(model)) >= {name}


def test_activations_that_are_not_finite_name_the_layer(model, tmp_path):
    model.model.layers[1].post_attention_layernorm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite values: inputs of layers\.1\.mlp\.gate_proj"):
        walk.measure_moments(model, WINDOWS, tmp_path)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["block-000.safetensors"]


def test_no_calibration_text_is_refused_before_a_file_is_written(model, tmp_path):
    with pytest.raises(ValueError, match=r"\(0, 10\)"):
        walk.measure_moments(model, WINDOWS[:0], tmp_path)


@torch.no_grad()
def test_blocks_with_rotary_embeddings_of_their_own_are_read_as_the_model_reads_them(gemma, tmp_path):
    """Gemma 3 alternates two rotary embeddings and masks; also after a walk that was killed in between."""
    names = list(walk.linear_layers(gemma))
    expected = input_moments(gemma, names)
    walk.measure_moments(gemma, WINDOWS, tmp_path)
    walk.block_file(tmp_path, 1).unlink()
    walk.measure_moments(gemma, WINDOWS, tmp_path)
    for name in names:
        torch.testing.assert_close(walk.stored_moment(tmp_path, name), expected[name], atol=1e-5, rtol=1e-3)


def input_moments(model: Gemma3ForCausalLM, names: list[str]) -> dict[str, torch.Tensor]:
    """X^T X / tokens of what the named layers read in one whole pass."""
    read = {}

    def note(name: str):
        return lambda _layer, args: read.update({name: args[0].flatten(0, -2)})

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    model(WINDOWS)
    for handle in handles:
        handle.remove()
    return {name: rows.T @ rows / WINDOWS.numel() for name, rows in read.items()}


def test_a_block_is_found_in_its_layers_name():
    assert walk.block_index("model.layers.7.mlp.down_proj") == 7
    assert walk.block_index("model.layers.12.self_attn.q_proj") == 12


@torch.no_grad()
def test_a_walk_sees_in_every_block_what_the_model_gives_it(gemma):
    """Blocks with and without a sliding window get another rotary embedding and another mask."""
    windows, seen = torch.arange(40).reshape(2, 20), {}
    for index, layer in enumerate(gemma.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args, at=index: seen.update({at: args[0]}))
    gemma(windows)
    expected = {at: walk.second_moment(rows.flatten(0, -2)) / 40 for at, rows in seen.items()}
    for site in walk.calibration_sites(gemma, windows):
        if any(name.endswith("down_proj") for name in site.layers):
            assert torch.allclose(site.moment, expected[site.block], rtol=1e-3, atol=1e-6)


WALKED = ("qwen3", "mistral-sliding", "gemma2", "gemma3", "phi3", "stablelm", "smollm3", "granite", "olmo2", "gpt2")


@pytest.mark.parametrize("family", [*WALKED, "qwen3-moe"])
def test_every_family_is_loaded_and_walked_as_plain_transformers_computes_it(family, tmp_path):
    """Gemma 2's plain form is the eager one: the fused ones leave out its cap on attention."""
    folder, tokens = families.make_model(family, tmp_path / family), torch.arange(3, 83).view(2, 40)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    read: dict[str, torch.Tensor] = {}
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and module is not plain.get_output_embeddings():
            module.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0].flatten(0, 1)}))
    model = checkpoint.load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, atol=1e-3, rtol=1e-4)
    assert read.keys() == walk.linear_layers(model).keys()
    walk.measure_moments(model, tokens, tmp_path / "moments")
    found = {name: moment for site in walk.calibration_sites(model, tokens) for name in site.layers
             for moment in [site.moment]}  # fmt: skip
    assert found.keys() == read.keys()
    for name, rows in read.items():
        expected = rows.T @ rows / len(rows)
        for moment in (found[name], walk.stored_moment(tmp_path / "moments", name)):
            assert (moment - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_a_model_whose_blocks_are_in_no_known_list_is_refused_by_family(model):
    model.model.trunk = model.model.layers
    del model.model.layers
    with pytest.raises(ValueError, match="llama models have no list of blocks called layers or h"):
        walk.blocks(model)
