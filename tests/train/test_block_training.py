"""The streams of block-wise training are what the model itself hands from block to block."""

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from avalab.compress import rounding
from avalab.kernels.formats import Grid
from avalab.train import fake_quant, qat
from avalab.train.qat import Blocks

KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


def alternating() -> Gemma3ForCausalLM:
    rotary = {kind: {"rope_type": "default", "rope_theta": 10.0 if kind[0] == "s" else 1e6} for kind in KINDS}
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 8, "sliding_window": 4}
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, layer_types=KINDS, rope_parameters=rotary)).eval()


def test_every_block_aims_at_what_the_teacher_gives_there(monkeypatch):
    """Gemma 3 alternates two rotary embeddings and masks: blocks get their own, not the first one's."""
    teacher, student, aims = alternating(), alternating(), []
    monkeypatch.setattr(qat, "_fit", lambda block, calls, aim, how, random: aims.append(aim) or (1.0, 1.0))
    posed = rounding.problem(torch.eye(16))
    name = "model.layers.1.mlp.up_proj"
    layer = rounding.round_weight(student.get_submodule(name).weight.detach(), posed, Grid(8, 16))
    fake_quant.replace_layers(student, {name: layer})
    windows = torch.arange(60).reshape(3, 20)
    qat.reconstruct(student, teacher, windows, Blocks(windows_per_step=2), seed=0)
    seen = {}
    for at, block in enumerate(teacher.model.layers):
        block.register_forward_hook(lambda _module, _args, given, at=at: seen.update({at: given}))
    with torch.no_grad():
        teacher(windows)
    for at, aim in enumerate(aims):
        given = seen[at][0] if isinstance(seen[at], tuple) else seen[at]
        torch.testing.assert_close(torch.cat(aim), given, atol=1e-5, rtol=1e-4)
