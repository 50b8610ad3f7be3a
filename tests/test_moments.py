"""What calibration leaves behind: one file a block, resumed after a kill, and refusals that name the layer."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from avalab import additivity, calibration, models, moments

WINDOWS = torch.arange(40).view(4, 10) % 64


@pytest.fixture
def model() -> LlamaForCausalLM:
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)).eval()


def test_moments_are_those_of_the_calibration_walk(model, tmp_path):
    moments.measure(model, WINDOWS, tmp_path)
    for site in calibration.walk(model, WINDOWS):
        for name in site.layers:
            torch.testing.assert_close(moments.moment(tmp_path, name), site.moment, atol=1e-6, rtol=1e-4)
        assert [f".{n}" for n in moments.readers(tmp_path, name)] == [n[n.index(".", 14) :] for n in site.layers]


def test_influence_is_one_less_the_cosine_of_what_enters_and_leaves_a_block(model, tmp_path):
    moments.measure(model, WINDOWS, tmp_path)
    with torch.no_grad():
        states = model(WINDOWS, output_hidden_states=True).hidden_states
    for block in range(2):  # the last of the hidden states is after the final norm
        expected = 1 - torch.cosine_similarity(states[block], states[block + 1], dim=-1).mean()
        assert moments.influence(tmp_path, block) == pytest.approx(float(expected), rel=1e-4)


def findings(folder: Path, block: int) -> dict[str, list]:
    """What a block's file holds, without the seconds that it took."""
    return {
        name: value.tolist() for name, value in load_file(moments.path_of(folder, block)).items() if name != "seconds"
    }


def test_a_killed_walk_goes_on_at_the_first_block_without_a_file(model, tmp_path, monkeypatch):
    whole, resumed, done = tmp_path / "whole", tmp_path / "resumed", []
    moments.measure(model, WINDOWS, whole)
    measure = moments._of_block

    def killed_in_the_second(block, calls, index):
        if index == 1 and done == [0]:
            done.append("killed")
            raise KeyboardInterrupt
        done.append(index)
        return measure(block, calls, index)

    monkeypatch.setattr(moments, "_of_block", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        moments.measure(model, WINDOWS, resumed)
    moments.measure(model, WINDOWS, resumed)
    moments.measure(model, WINDOWS, resumed)
    assert done == [0, "killed", 1, 2]
    for index in range(3):
        assert findings(whole, index) == findings(resumed, index)


def test_a_damaged_file_is_measured_again(model, tmp_path):
    moments.measure(model, WINDOWS, tmp_path)
    before, path = findings(tmp_path, 1), moments.path_of(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:50])
    moments.measure(model, WINDOWS, tmp_path)
    assert findings(tmp_path, 1) == before


def test_the_seconds_of_a_walk_are_kept_for_those_who_share_it(model, tmp_path):
    start = time.perf_counter()
    files = moments.measure(model, WINDOWS, tmp_path)
    files.append(moments.squared_gradients(model, WINDOWS, tmp_path / "g"))
    took = time.perf_counter() - start
    again = [*moments.measure(model, WINDOWS, tmp_path), moments.squared_gradients(model, WINDOWS, tmp_path / "g")]
    assert again == files
    assert 0 < moments.seconds(again) == moments.seconds(files) <= took


def test_squared_gradients_are_sums_of_each_tokens_own(model, tmp_path):
    name, seen = "model.layers.1.mlp.up_proj", []
    calibration.gradient_pass(model, WINDOWS, [name], lambda _, x, g: seen.append((x.detach(), g)), seed=3)
    moments.squared_gradients(model, WINDOWS, tmp_path / "g", seed=3)
    ((inputs, gradients),) = seen
    each = torch.einsum("wtr,wtc->wtrc", gradients, inputs)
    found = moments.squared_gradient(tmp_path / "g", name)
    torch.testing.assert_close(found.float(), each.square().mean((0, 1)), rtol=1e-2, atol=0)
    assert set(models.linear_layers(model)) >= {name}


def test_activations_that_are_not_finite_name_the_layer(model, tmp_path):
    model.model.layers[1].post_attention_layernorm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite values: inputs of layers\.1\.mlp\.gate_proj"):
        moments.measure(model, WINDOWS, tmp_path)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["block-000.safetensors"]


def test_no_calibration_text_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"\(0, 10\)"):
        moments.measure(model, WINDOWS[:0], tmp_path)


@torch.no_grad()
def test_blocks_with_rotary_embeddings_of_their_own_are_read_as_the_model_reads_them(tmp_path):
    """Gemma 3 alternates two rotary embeddings and masks; also after a walk that was killed in between."""
    model = alternating()
    names = list(models.linear_layers(model))
    expected = additivity.input_moments(model, WINDOWS, names)
    moments.measure(model, WINDOWS, tmp_path)
    moments.path_of(tmp_path, 1).unlink()
    moments.measure(model, WINDOWS, tmp_path)
    for name in names:
        torch.testing.assert_close(moments.moment(tmp_path, name), expected[name], atol=1e-5, rtol=1e-3)


def alternating() -> Gemma3ForCausalLM:
    kinds, thetas = ["sliding_attention", "full_attention", "sliding_attention"], (10.0, 1e6, 10.0)
    rotary = {k: {"rope_type": "default", "rope_theta": theta} for k, theta in zip(kinds, thetas, strict=True)}
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 8, "sliding_window": 4}
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, layer_types=kinds, rope_parameters=rotary)).eval()
