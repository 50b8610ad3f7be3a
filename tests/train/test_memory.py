"""Predicted training memory: activations agree with what autograd keeps; parts add up to what a person can redo."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from avalab.models import adapters, sizes
from avalab.models.attention import apply_packed_attention
from avalab.models.sizes import Shape
from avalab.train import loop, memory
from avalab.train.memory import TrainingStep


def kept_bytes(shape: Shape, tokens: int, rank: int) -> int:
    """Bytes of tensors that autograd keeps for the backward pass of one row of one example."""
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp, head_dim=shape.head_dim,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    adapters.attach_adapters(model, rank=rank)
    adapters.apply_fused_adapters(model)
    apply_packed_attention(model)
    student = loop.Student(model, lambda hidden, head, batch: hidden.float().mean())
    ids = torch.arange(tokens)[None]
    batch = {"input_ids": ids, "position_ids": ids, "labels": ids, "boundaries": torch.tensor([0, tokens])}
    student(**batch)  # the kernels' own checks run in the first call
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage_ = tensor.untyped_storage()
        if storage_.data_ptr() not in owned and tensor.numel() >= tokens:
            kept[storage_.data_ptr()] = (storage_.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student(**batch)
    copies = 2 * rank * sum(rows + columns for rows, columns in shape.linears().values()) * shape.layers
    return sum(size for size, _ in kept.values()) - copies


@pytest.mark.parametrize("tokens", [64, 200])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_activations_agree_with_what_autograd_keeps(tokens, kv_heads):
    shape, rank = Shape(512, 96, 256, 6, 4, kv_heads, 32, True), 4
    step = TrainingStep(tokens, tokens, rank)
    predicted = memory.predict_memory(shape, step)["activations"]
    assert predicted == pytest.approx(kept_bytes(shape, tokens, rank), rel=0.08)


def test_parts_can_be_redone_with_a_pencil():
    shape = Shape(vocab=10, hidden=4, mlp=8, layers=2, heads=2, kv_heads=1, head_dim=2, tied=True)
    step = TrainingStep(tokens=3, example_tokens=3, rank=1, method="bf16")
    parts = memory.predict_memory(shape, step)
    # rows + columns: q 8, k 6, v 6, o 8, gate 12, up 12, down 12 = 64 in each of two blocks; 18 bytes each
    assert parts["adapters"] == 2 * 64 * 18
    # 8*4+8 + 2*(8+4+8) + 2*4 + 4*2 + 2*2*3 + 6*8 + 14 = 170 a token and block
    assert parts["activations"] == 170 * 3 * 2
    assert parts["backward"] == 6 * 8 * 3
    assert parts["weights"] == sizes.predict_artifact_bytes(shape, sizes.BF16)
    # 6 a channel and 4 a token; then bf16 logits of the three tokens, or three numbers of four bytes a word
    assert parts["loss"] == 3 * (6 * 4 + 4) + 2 * 10 * 3
    assert memory.predict_memory(shape, replace(step, chunked_loss=False))["loss"] == 3 * (6 * 4 + 4) + 12 * 10 * 3


def test_recomputing_and_smaller_optimizers_need_less_and_decoding_more():
    shape = memory.KNOWN_SHAPES["qwen2.5-1.5b"]
    step = TrainingStep(tokens=1024, example_tokens=1024, on_gpu=True)
    total = {name: sum(memory.predict_memory(shape, s).values()) for name, s in {
        "plain": step,
        "recompute": replace(step, recompute=True),
        "8-bit": replace(step, optimizer_bytes=2),
        "decoded": replace(step, decoded=True),
        "dense loss": replace(step, chunked_loss=False),
    }.items()}  # fmt: skip
    assert total["plain"] < total["dense loss"]
    assert total["recompute"] < total["8-bit"] < total["plain"] < total["decoded"]
