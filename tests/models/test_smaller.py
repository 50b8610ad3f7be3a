"""A smaller model computes what the large one does with the same parts switched off."""

import json

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from avalab.models import checkpoint
from avalab.models.smaller import Kept, channels_of, configuration, query_heads, save_smaller, structure_sizes

TOKENS = torch.arange(24).view(2, 12)
SHAPE = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}


OTHER = {  # of other families
    **{"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "eos_token_id": 2},
}


def model_of(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = SHAPE | {"num_attention_heads": 6, "num_key_value_heads": 3} | more
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request) -> LlamaForCausalLM:
    return model_of(tie_word_embeddings=request.param, attention_bias=True)


def smaller(model: PreTrainedModel, kept: Kept, folder) -> PreTrainedModel:
    save_smaller(model, kept, folder)
    return checkpoint.load_model(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits


def switch_off(weight: torch.Tensor, kept: torch.Tensor) -> None:
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[kept] = False
    weight.data[:, gone] = 0


def test_without_mlp_channels_the_model_computes_what_zeroed_columns_do(model, tmp_path):
    kept = [torch.arange(block, 48, 2) for block in (0, 1, 0)]
    small = smaller(model, Kept(channels=kept), tmp_path)
    for block, channels in zip(model.model.layers, kept, strict=True):
        switch_off(block.mlp.down_proj.weight, channels)
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=1e-4)
    assert small.config.intermediate_size == 24


def test_without_query_heads_or_whole_groups_too(model, tmp_path):
    of = structure_sizes(model)
    heads = [torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5]), torch.tensor([0, 2, 4])]
    groups = [torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([0, 1])]
    queries = [query_heads(g, of) for g in groups]
    cuts = {"heads": Kept(heads=heads), "groups": Kept(heads=queries, kv_heads=groups)}
    for name, kept in cuts.items():
        (tmp_path / name).mkdir()
        small = smaller(model, kept, tmp_path / name)
        whole = model_of(tie_word_embeddings=model.config.tie_word_embeddings, attention_bias=True)
        for block, chosen in zip(whole.model.layers, kept.heads, strict=True):
            switch_off(block.self_attn.o_proj.weight, channels_of(chosen, of.head_dim))
        torch.testing.assert_close(logits(small), logits(whole), atol=1e-5, rtol=1e-4)
        assert small.config.num_attention_heads == len(kept.heads[0])
    assert small.config.num_key_value_heads == 2


def test_without_blocks_the_rest_follow_each_other_and_generate(model, tmp_path):
    small = smaller(model, Kept(blocks=[0, 2]), tmp_path)
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.model.layers[1].self_attn.o_proj.bias.data.zero_()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=1e-4)
    generated = small.generate(TOKENS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 15)  # the cache knows the blocks by their new numbers


def test_without_hidden_channels_norms_average_over_those_that_are_left(tmp_path):
    """With zeroed channels the large model's norms still divide by the old width: the roots' ratio takes that out."""
    model, kept = model_of(rms_norm_eps=0.0), torch.arange(36)
    small = smaller(model, Kept(hidden=kept), tmp_path)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.weight.data *= (36 / 48) ** 0.5
    switch_off(model.model.embed_tokens.weight, kept)
    for block in model.model.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.weight.data[36:] = 0
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=1e-4)
    assert small.config.hidden_size == 36
    assert small.config.head_dim == 8


def test_keeping_everything_keeps_every_tensor(model, tmp_path):
    small = smaller(model, Kept(), tmp_path)
    assert all(torch.equal(small.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_configuration_lists_kinds_of_the_blocks_that_are_left(model):
    model.config.layer_types = ["a", "b", "c"]
    assert configuration(model, Kept(blocks=[0, 2])).layer_types == ["a", "c"]
    assert model.config.layer_types == ["a", "b", "c"]


def test_a_model_of_another_shape_is_refused_naming_what_it_lacks(model):
    del model.model.layers[0].mlp.gate_proj
    with pytest.raises(ValueError, match="llama blocks have no gate_proj; of such models whole layers"):
        structure_sizes(model)


def test_another_width_is_refused_where_embeddings_are_scaled_by_it(model, tmp_path):
    model.config.model_type = "gemma2"
    with pytest.raises(ValueError, match="gemma2 scales its embeddings by the hidden width"):
        save_smaller(model, Kept(hidden=torch.arange(8)), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_the_saved_configuration_names_the_class(model, tmp_path):
    save_smaller(model, Kept(blocks=[1]), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_layers_without_positions_keep_their_places_when_blocks_go(tmp_path):
    """SmolLM3's list says which layers rotate: what is left equals the whole with a block switched off."""
    shape = {**OTHER, "num_hidden_layers": 4, "bos_token_id": 1, "no_rope_layers": [1, 0, 1, 1]}
    whole = SmolLM3ForCausalLM(SmolLM3Config(**shape, pad_token_id=0)).eval()
    small = smaller(whole, Kept(blocks=[1, 2, 3]), tmp_path)
    whole.model.layers[0].self_attn.o_proj.weight.data.zero_()
    whole.model.layers[0].mlp.down_proj.weight.data.zero_()
    torch.testing.assert_close(logits(small), logits(whole), atol=1e-5, rtol=1e-4)
    assert list(small.config.no_rope_layers) == [0, 1, 1]


def test_norms_over_all_heads_lose_the_channels_of_those_that_go(tmp_path):
    """OLMo 2 normalises queries and keys as wholes; the tensors that are left fit the configuration."""
    whole = Olmo2ForCausalLM(Olmo2Config(**OTHER, pad_token_id=0)).eval()
    small = smaller(whole, Kept(heads=[torch.tensor([0, 2, 3, 5])] * 2), tmp_path)
    assert small.model.layers[0].self_attn.q_norm.weight.shape == (32,)
    assert small.model.layers[0].self_attn.k_norm.weight.shape == (16,)
    assert logits(small).isfinite().all()


def test_a_configuration_that_cannot_say_what_was_cut_is_refused(tmp_path):
    """StableLM's heads are as wide as hidden size over heads, whatever the configuration says."""
    model = StableLmForCausalLM(StableLmConfig(**OTHER))
    with pytest.raises(ValueError, match=r"stablelm configuration cannot say what was cut.*mlp_channels"):
        save_smaller(model, Kept(heads=[torch.tensor([0, 2, 3, 5])] * 2), tmp_path)
    assert not list(tmp_path.iterdir())
