"""Models of random weights that tests of several modules share."""

import pytest


@pytest.fixture
def gemma():
    """A model of two blocks with sliding windows and one without, their rotary bases far apart."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    rotary = {
        kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(kinds[:2], (10.0, 1e6), strict=True)
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 16, "sliding_window": 4}
    config = Gemma3TextConfig(**sizes, **heads, layer_types=kinds, rope_parameters=rotary)
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.randn_like(parameter).bfloat16().float()
    return model
