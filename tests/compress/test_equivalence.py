"""Transforms that change weights and not the function: families, exactness, what they gain, what is refused."""

import pytest
import torch
import transformers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.granite import modeling_granite
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.smollm3 import modeling_smollm3

from avalab import cli
from avalab.compress import equivalence, quantize, rounding
from avalab.compress.equivalence import Pair
from avalab.data import corpora
from avalab.models import checkpoint, predict, walk

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CHANGING = equivalence.TRANSFORMS[1:]
TOKENS = torch.arange(120).reshape(4, 30) * 7 % 60
NORMS = (
    modeling_llama.LlamaRMSNorm,
    modeling_qwen2.Qwen2RMSNorm,
    modeling_qwen3.Qwen3RMSNorm,
    modeling_mistral.MistralRMSNorm,
    modeling_phi3.Phi3RMSNorm,
    modeling_smollm3.SmolLM3RMSNorm,
    modeling_granite.GraniteRMSNorm,
    modeling_olmo2.Olmo2RMSNorm,
)


@pytest.fixture
def exact_norms(monkeypatch):
    """Norms that compute in the weights' type; the library's use float32."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gain = self.weight if isinstance(self, NORMS) else 1 + self.weight
        epsilon = self.variance_epsilon if isinstance(self, NORMS) else self.eps
        return gain * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon)

    for norm in (*NORMS, modeling_gemma2.Gemma2RMSNorm, modeling_gemma3.Gemma3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


GROUPS = {name: count for name, count in HEADS.items() if name != "head_dim"}


def gemma() -> Gemma3ForCausalLM:
    kinds = ["sliding_attention", "full_attention"]
    rotary = {kind: {"rope_type": "default", "rope_theta": 10.0 if kind[0] == "s" else 1e6} for kind in kinds}
    more = {"layer_types": kinds, "rope_parameters": rotary, "query_pre_attn_scalar": 8, "sliding_window": 4}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **HEADS, **more))


FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, mlp_bias=True, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **{k: n for k, n in HEADS.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS)),
    "gemma3": gemma,
    "gemma2": lambda: _of(transformers.Gemma2Config, query_pre_attn_scalar=8, sliding_window=4, **HEADS),
    "mistral": lambda: _of(transformers.MistralConfig, sliding_window=4, **HEADS),
    "phi3": lambda: _of(transformers.Phi3Config, pad_token_id=0, **GROUPS),
    "smollm3": lambda: _of(transformers.SmolLM3Config, pad_token_id=0, eos_token_id=1, bos_token_id=2, **GROUPS),
    "granite": lambda: _of(transformers.GraniteConfig, residual_multiplier=0.5, logits_scaling=2.0, **GROUPS),
    "olmo2": lambda: _of(transformers.Olmo2Config, pad_token_id=0, eos_token_id=1, **GROUPS),
    "stablelm": lambda: _of(transformers.StableLmConfig, use_qkv_bias=True, **GROUPS),
    "stablelm-parallel": lambda: _of(transformers.StableLmConfig, use_parallel_residual=True, **GROUPS),
}


def _of(configuration, **more) -> PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_config(configuration(**SIZES, **more), dtype=torch.float32)


def random_model(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Norms and biases away from 0 and 1, and some channels far larger than others."""
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.5)
            if "layernorm" in name:
                parameter[::5] *= 12
            elif "embed" not in name:
                parameter.mul_(5)
                parameter[::7] *= 8
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("transform", CHANGING)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_change_and_the_function_does_not(family, transform):
    model = random_model(family)
    before, weights = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    equivalence.apply_transform(model, TOKENS, transform)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert ("model.layers.1.self_attn.o_proj.weight" in changed) or transform == "scale"
    assert changed
    torch.testing.assert_close(logits(model), before, atol=1e-9, rtol=1e-9)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("family", FAMILIES)
def test_any_factors_cancel_at_every_pair(family):
    model = random_model(family)
    before, pairs = logits(model), 0
    for site in walk.calibration_sites(model, TOKENS):
        pair = equivalence._pair(model, site)
        if pair is None:
            continue
        channels = len(pair.source.weight[pair.first :])
        equivalence.fold(pair, torch.exp(torch.randn(channels, generator=torch.Generator().manual_seed(pairs))))
        pairs += 1
    assert pairs == {"olmo2": 4, "stablelm-parallel": 6}.get(family, 8)
    torch.testing.assert_close(logits(model), before, atol=1e-9, rtol=1e-9)


def test_folding_powers_of_two_costs_bf16_nothing_but_gemmas_gains():
    for family in ("llama", "qwen2", "qwen3"):
        model = random_model(family, torch.bfloat16)
        before = logits(model)
        found = equivalence.scale_channels(model, TOKENS)
        assert set(found) > {"a=0,b=0"} or "a=0,b=0" not in found
        assert torch.equal(logits(model), before)


def test_gemmas_new_gains_are_numbers_that_bf16_holds():
    layer = random_model("gemma3").model.layers[0]
    norm, before = layer.input_layernorm, layer.input_layernorm.weight.clone()
    equivalence.fold(Pair(norm, [layer.self_attn.q_proj]), torch.linspace(0.2, 5, 32))
    assert torch.equal(norm.weight, norm.weight.bfloat16().double())
    torch.testing.assert_close(
        1 + norm.weight, (1 + before) / torch.linspace(0.2, 5, 32).double(), atol=0.02, rtol=0.02
    )


def test_equal_input_gives_equal_weights():
    first, second = (random_model("qwen3", torch.bfloat16) for _ in range(2))
    for model in (first, second):
        equivalence.apply_transform(model, TOKENS, "scale+rotate")
    assert all(torch.equal(t, second.state_dict()[name]) for name, t in first.state_dict().items())


def test_exponents_of_zero_change_nothing():
    model = random_model("llama")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert equivalence.scale_channels(model, TOKENS, exponents=[(0.0, 0.0)]) == {"a=0,b=0": 8}
    assert equivalence.apply_transform(model, TOKENS, "none") == {}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_sixteen_times_the_input_gets_four_times_the_columns_at_half_power():
    """Inputs 16 and 1, a = 1/2: factors 4 and 1, divided by their geometric mean 2."""
    inputs, ones = torch.tensor([16.0, 1.0, 0.0]), torch.ones(3)
    assert equivalence._factors(inputs, ones, 0.5, 0.0).tolist() == [2, 0.5, 1]
    assert equivalence._factors(ones, inputs, 0.0, 0.5).tolist() == [0.5, 2, 1]


def test_a_channel_shared_by_two_query_heads_has_their_mean_and_one_factor():
    """Two key-value heads of one channel, each read by two query heads: columns 0 and 1, 2 and 3."""
    pair = Pair(torch.nn.Linear(1, 2), [torch.nn.Linear(4, 1)], heads=2, sharing=2)
    assert pair.channels(torch.tensor([1.0, 3.0, 5.0, 7.0])).tolist() == [2, 6]
    assert pair.columns(torch.tensor([2.0, 6.0])).tolist() == [2, 2, 6, 6]


def test_the_search_never_takes_factors_that_round_worse():
    """Error of rounding every reader to the nearest, weighted as in the search, over that without factors."""
    model = random_model("llama").requires_grad_(False)
    for site in walk.calibration_sites(model, TOKENS):
        pair = equivalence._pair(model, site)
        cost = rounding.rounding_problem(site.moment, damping=1.0).column_cost
        _, factors = equivalence._best(pair, site.moment.diagonal(), cost, equivalence.EXPONENTS)
        columns = pair.columns(factors)
        ratios = []
        for layer in pair.readers:
            weight = layer.weight.detach().float()
            errors = [equivalence._error(weight * s, cost / s**2) for s in (columns, torch.ones_like(columns))]
            ratios.append(errors[0] / errors[1])
        assert sum(ratios) / len(ratios) < 1.1  # the search saw a sample of rows


def test_a_hadamard_matrix_of_two_and_its_parts_where_the_width_is_no_power_of_two():
    half = 0.5**0.5
    torch.testing.assert_close(equivalence.hadamard(2), torch.tensor([[half, half], [half, -half]]).double())
    for width in (8, 96):
        matrix = equivalence.hadamard(width)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(width).double())
    assert (equivalence.hadamard(96) != 0).sum() == 96 * 32


def test_rotation_spreads_a_large_value_channel_over_its_head():
    model = random_model("llama")
    model.model.layers[0].self_attn.v_proj.weight.data[3] *= 100
    equivalence.rotate_values(model)
    sizes = model.model.layers[0].self_attn.v_proj.weight.norm(dim=1)[:8]
    assert sizes.max() / sizes.min() < 1.2


def test_what_cannot_be_transformed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"transform 'spin' is not one of none, scale, rotate, scale\+rotate"):
        equivalence.apply_transform(random_model("llama"), TOKENS, "spin")
    with pytest.raises(ValueError, match="heads of 15 channels, an odd number"):
        equivalence.hadamard(15)
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=64))
    with pytest.raises(ValueError, match=r"'scale' knows blocks of llama, .*, olmo2, not of gpt2: use none"):
        equivalence.apply_transform(gpt, TOKENS, "scale")


# In the compressor


@pytest.fixture(scope="module")
def against(run, base):
    tokenizer = checkpoint.load_tokenizer(base)
    windows = corpora.windows(corpora.evaluation_texts(run, tokenizer)[0], tokenizer, count=4, tokens=64)
    return predict.make_reference(base, windows, run.artifacts_dir / "cache")


@pytest.mark.usefixtures("few_docstrings")
@pytest.mark.parametrize(
    ("form", "plain"),
    [
        ({"format": "gguf", "bytes": 900_000}, "ava-900000b-gguf"),
        ({"bytes": 900_000}, "ava-900000b"),
        ({"bytes": 800_000, "embedding": "packed"}, "ava-800000b-packedemb"),
    ],
)
def test_an_artefact_of_every_form_holds_the_transformed_model(form, plain, run, base, against, monkeypatch):
    """Factors of 2 and 1/2 at every site: a norm or column that kept its own would change the function."""
    factors = torch.tensor([2.0, 0.5])
    monkeypatch.setattr(
        equivalence, "_best", lambda pair, *_: ((1.0, 0.0), factors.repeat(len(pair.source.weight) // 2))
    )
    made = quantize.compress_artifact(base, "ava", run=run, transform="scale+rotate", **form)
    name, end = plain.removesuffix("-packedemb"), "-packedemb" if plain.endswith("emb") else ""
    assert made.name.endswith(f"+{name}-scale+rotate{end}")
    assert made.card["recipe"][-1]["transform"] == "scale+rotate"
    assert made.bytes <= form["bytes"]
    assert float(predict.score_model(checkpoint.load_model(made), against).kl.mean()) < 0.2


def test_a_family_that_a_transform_does_not_know_is_refused_before_calibration():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=64))
    with pytest.raises(ValueError, match="not of gpt2: use none"):
        equivalence.refuse_unknown(model, "rotate")
    equivalence.refuse_unknown(model, "none")


def test_the_command_refuses_an_unknown_transform_in_one_line(monkeypatch, capsys, tmp_path):
    out = str(tmp_path / "x")
    arguments = ["avalab", "quantize", "--method", "ava", "--transform", "spin", "--profile", "smoke", "--out", out]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "unknown transform 'spin'; choose one of none, scale, rotate, scale+rotate" in said
    assert said.strip().count("\n") == 0
