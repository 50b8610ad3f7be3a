"""Predicted memory of a fine-tuning step: what is held at its peak, part by part, before anything is run.

For one packed row of T tokens, examples of t tokens, hidden width h, MLP width m, query width q, key width k, n heads,
rank r, in bytes:

- weights: `sizes`' bytes of the base format, plus 2 a linear weight when a 4-bit base is held decoded;
- adapters: 4 (float32) + 4 (gradient) + 2 (bf16 copy) a number, and the optimizer's 8 (AdamW) or 2 (8-bit AdamW);
- activations of one block, kept for the backward pass: two norms' float32 inputs 8 h + 8, inputs of the adapters
  2 (2 h + q + m), query, key and value 2 q + 4 k, gate, up and their product's factor 6 m, the adapters' inner values
  14 r; the attention's probabilities 2 n t on a CPU, its output and sums 2 q + 4 n where the fused kernel runs;
- with recomputation, one block's activations and 2 h for each other block's input;
- the backward pass's own: gradients of the widest place, 3 x 2 m T;
- loss: the final norm and the hidden states; one buffer of bf16 logits where they come in chunks (`kernels`), or 12 a
  token and entry where they come at once: a log-softmax in float32 4, its gradient before and after it 4 + 4.

The sum is what a profiler sees a CPU step allocate, within 20 %. Not counted: fragmentation, the CUDA context,
workspaces of libraries: on a GPU leave a margin, on a CPU add the runtime.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch

from avalab.kernels import loss_chunks
from avalab.models import sizes
from avalab.models.sizes import Shape


@dataclass(frozen=True)
class TrainingStep:
    """One micro-batch of training."""

    tokens: int
    example_tokens: int
    rank: int = 16
    method: str = "nf4"  # a row of `quantize.METHODS`, or bf16
    decoded: bool = False
    recompute: bool = False
    optimizer_bytes: int = 8  # a trained number: 8 for AdamW, 2 for its 8-bit form
    chunked_loss: bool = True
    on_gpu: bool = False  # fused attention, and a larger buffer for logits


def predict_memory(shape: Shape, step: TrainingStep) -> dict[str, int]:
    """Bytes of `weights`, `adapters`, `activations`, `backward` and `loss`; their sum is the peak."""
    trained = step.rank * sum(rows + columns for rows, columns in shape.linears().values()) * shape.layers
    dense = 2 * sum(rows * columns for rows, columns in shape.linears().values()) * shape.layers
    stored = (
        sizes.BF16 if step.method == "bf16" else sizes.storage_of_method(step.method, {"double_quantization": True})
    )
    block = step.tokens * block_activation_bytes(shape, step)
    kept = block + 2 * shape.hidden * step.tokens * (shape.layers - 1) if step.recompute else block * shape.layers
    chunk = loss_chunks.tokens_in_chunk("cuda" if step.on_gpu else "cpu", 2 * shape.vocab)
    logits = 2 * shape.vocab * min(step.tokens, chunk) if step.chunked_loss else 12 * shape.vocab * step.tokens
    return {
        "weights": sizes.predict_artifact_bytes(shape, stored) + (dense if step.decoded else 0),
        "adapters": trained * (10 + step.optimizer_bytes),
        "activations": kept,
        "backward": 6 * shape.mlp * step.tokens,
        "loss": step.tokens * (6 * shape.hidden + 4) + logits,
    }


def block_activation_bytes(shape: Shape, step: TrainingStep) -> int:
    """Bytes a token that one block keeps for the backward pass; see the module."""
    h, m, q, k = shape.hidden, shape.mlp, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * q + 4 * shape.heads if step.on_gpu else 2 * shape.heads * step.example_tokens
    inputs = 2 * (2 * h + q + m)
    return 8 * h + 8 + inputs + 2 * q + 4 * k + attention + 6 * m + 14 * step.rank


# Sizes from the models' published configurations.
KNOWN_SHAPES = {
    "llama-3.2-1b": Shape(128256, 2048, 8192, 16, 32, 8, 64, True),
    "qwen2.5-1.5b": Shape(151936, 1536, 8960, 28, 12, 2, 128, True),
    "qwen2.5-3b": Shape(151936, 2048, 11008, 36, 16, 2, 128, True),
    "llama-3.2-3b": Shape(128256, 3072, 8192, 28, 24, 8, 128, True),
}


def peak_bytes(device: str) -> int:
    """Most bytes that this process has held so far: resident, or on a GPU those of torch's tensors."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
