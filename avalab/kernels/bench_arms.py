"""What is timed against what: each operation's arms, ours beside the peers that are installed.

Peers of the 4-bit product: bf16 (what 4 bits must not be slower than), bitsandbytes' own entry point in its inference
layout, its decode-then-multiply form for training, and torch's int4 kernel (which torchao calls). Of encoding: the
definition in plain torch, and bitsandbytes. Of the layer with an adapter: autograd over bitsandbytes' decoding, as peft
has it. Of the loss: full logits widened to float32, as transformers has it, and in bf16. Kernels of other projects,
where they are installed, come from `bench_peers`.

What it does not do: time (`bench`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from avalab import kernels, numerics
from avalab.kernels import bench_peers, encoding, library
from avalab.kernels.bench_peers import Arms
from avalab.kernels.product_checks import sample
from avalab.kernels.weight import Weight4, decode, group_scales


def product_arms(x: Tensor, weight: Weight4, dense: Tensor) -> Arms:
    """x times a weight of `library.prepare`, whose decoded form is `dense`."""
    arms: Arms = {"avalab": lambda: kernels.multiply(x, weight), "bf16": lambda: x @ dense.T}
    small = weight.small_batch
    if small is not None and small.kernel == "int4pack":
        arms["torch-int4pack"] = lambda: library.product_library(x, weight)
    if x.is_cuda and weight.zero_points is not None:
        arms["torch-int4pack"] = _int4pack_gpu(x, weight)
    if library.is_nf4(weight.to("cpu")) and library.native_code():
        arms["bitsandbytes-decoded"] = lambda: functional.linear(x, _decoded_whole(weight))
        if small is not None:
            arms["bitsandbytes"] = _bitsandbytes(x, weight)
    return arms | bench_peers.arms("nf4" if weight.zero_points is None else "int4", str(x.device), x, weight)


def _int4pack_gpu(x: Tensor, weight: Weight4) -> Callable[[], Tensor]:
    """torch's int4 product on a GPU: weights as (code - 8) * scale + offset."""
    scales = group_scales(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack(weight.codes.contiguous(), 8)
    both = torch.stack((scales, (8 - weight.zero_points) * scales), -1).transpose(0, 1).bfloat16().contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, weight.group_size, both)


def _bitsandbytes(x: Tensor, weight: Weight4) -> Callable[[], Tensor]:
    """bitsandbytes' inference path, entered as its Linear4bit enters it."""
    from bitsandbytes import functional as bnb_functional
    from bitsandbytes import matmul_4bit

    small, facts = weight.small_batch, {"blocksize": 64, "quant_type": "nf4", "dtype": torch.bfloat16}
    shape = torch.Size(weight.shape)
    state = bnb_functional.QuantState(absmax=small.scales, shape=shape, code=weight.levels, **facts)
    state.packing_format_for_cpu = True
    return lambda: matmul_4bit(x, small.codes, state)


def _decoded_whole(weight: Weight4) -> Tensor:
    """bitsandbytes' form for training: decode all of the weight, then multiply."""
    arguments = (weight.codes, group_scales(weight).reshape(-1), 64, "nf4", list(weight.shape), torch.bfloat16)
    return torch.ops.bitsandbytes.dequantize_4bit(*arguments)


def encode_arms(device: str, shape: tuple[int, int]) -> Arms:
    """A bf16 weight of this shape into codes of NF4: groups of 64, scales in float32."""
    weight, format = torch.randn(*shape, device=device).mul_(0.02).bfloat16(), numerics.FORMATS["nf4"]
    arms: Arms = {
        "avalab": lambda: kernels.encode(weight, format).codes,
        "reference": lambda: encoding.encode_reference(weight, format).codes,
    }
    if library.native_code():
        from bitsandbytes import functional as bnb_functional

        arms["bitsandbytes"] = lambda: bnb_functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")[0]
    return arms


def lora_arms(device: str, shape: tuple[int, int], *, tokens: int, rank: int) -> Arms:
    """Forward and backward of a layer of this shape with an adapter, gradients of input and adapter."""
    weight = sample(device, kind="nf4", rows=shape[0], cols=shape[1])
    dense = decode(weight, torch.bfloat16)
    shapes = ((tokens, shape[1]), (rank, shape[1]), (shape[0], rank))
    x, a, b = (torch.randn(each, device=device).bfloat16().requires_grad_() for each in shapes)

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward().sum(), (x, a, b))

    arms: Arms = {
        "avalab": step(lambda: kernels.linear(x, weight, a=a, b=b)),
        "bf16": step(lambda: functional.linear(x, dense) + (x @ a.T) @ b.T),
    }
    if library.native_code():
        arms["peft-bitsandbytes"] = step(lambda: _Decoded.apply(x, weight) + (x @ a.T) @ b.T)
    return arms


class _Decoded(torch.autograd.Function):
    """The whole weight decoded forward and again backward: what bitsandbytes' autograd function does."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight4) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, _decoded_whole(weight))

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g @ _decoded_whole(ctx.weight), None


def loss_arms(device: str, size: tuple[int, int, int], *, trained: bool) -> Arms:
    """Forward and backward of head and loss for (tokens, width, vocabulary), the head `trained` or frozen."""
    tokens, width, vocab = size
    head = torch.randn(vocab, width, device=device).mul_(0.05).bfloat16().requires_grad_(trained)
    hidden = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device=device)
    wanted = (hidden, head) if trained else (hidden,)

    def step(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), wanted)

    peers = bench_peers.arms("loss", device, hidden, head, targets)
    return {
        "avalab": step(lambda: kernels.linear_cross_entropy(hidden, head, targets)),
        "dense": step(lambda: functional.cross_entropy((hidden @ head.T).float(), targets)),
        "dense-bf16": step(lambda: functional.cross_entropy(hidden @ head.T, targets)),
    } | {name: step(peer) for name, peer in peers.items()}
