"""A linear layer of a frozen weight with a low-rank adapter: y = x W^T + s (x A^T) B^T, both directions.

The weight has 4 bits, or is packed, or is dense: then nothing is decoded, and what is saved are the adapter's copies
and sums.

Method:
1. forward: the 4-bit product; x A^T, a few numbers a token, is kept; s B^T times it is added into the product's own
   memory;
2. backward, with g = dL/dy: dx = g W + s (g B) A, where W is decoded again, a panel of columns at a time, and never
   kept; dB = s g^T (x A^T), dA = s (g B)^T x. The weight itself gets no gradient.
What autograd keeps is x, A, B and x A^T: no decoded weight, no dense update.

Sources: Hu et al. 2021 (LoRA), eq. 3; Dettmers et al. 2023 (QLoRA), eq. 5.
What it does not do: dropout on the adapter's input (apply it to x's branch outside).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from avalab.kernels.dispatch import Form, choose_form
from avalab.kernels.packed import product as packed
from avalab.kernels.packed.weight import PackedWeight
from avalab.kernels.packed.weight import decode as decode_packed
from avalab.kernels.product import multiply, multiply_transposed, sample_weight
from avalab.kernels.weight import Weight4, decode
from avalab.lab.errors import InputError


def linear(
    x: Float[Tensor, "*batch cols"],
    weight: Weight4 | PackedWeight | Float[Tensor, "rows cols"],
    *,
    a: Float[Tensor, "rank cols"] | None = None,
    b: Float[Tensor, "rows rank"] | None = None,
    scaling: float = 1.0,
) -> Float[Tensor, "*batch rows"]:
    """x W^T + scaling (x A^T) B^T, differentiable in x, A and B; without A and B, x W^T.

    A dense weight has x's dtype and gets no gradient. Adapters of another dtype than x (float32 masters) are rounded
    to it, and their gradients come back in theirs.
    Raises ValueError for one adapter matrix without the other or shapes that do not fit, and what `multiply` raises.
    """
    rows, cols = weight.shape
    if (a is None) != (b is None):
        raise InputError(f"an adapter is A and B, got only {'B' if a is None else 'A'}")
    if a is not None and (a.shape[1] != cols or b.shape != (rows, a.shape[0])):
        raise InputError(f"A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a weight of {(rows, cols)}")
    if a is not None:
        a, b = a.to(x.dtype), b.to(x.dtype)
    return choose_form("lora", LORA, x.device, x, weight).run(x, weight, a, b, scaling)


def lora_reference(
    x: Tensor, weight: Weight4 | PackedWeight | Tensor, a: Tensor | None, b: Tensor | None, scaling: float
) -> Tensor:
    """Three dense products, autograd's own gradients."""
    y = x @ _decoded(weight, x.dtype).T
    return y if a is None else y + scaling * (x @ a.T) @ b.T


def _decoded(weight: Weight4 | PackedWeight | Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, PackedWeight):
        return decode_packed(weight, dtype)
    return decode(weight, dtype) if isinstance(weight, Weight4) else weight.detach()


def _product(x: Tensor, weight: Weight4 | PackedWeight | Tensor) -> Tensor:
    if isinstance(weight, PackedWeight):
        return packed.multiply(x, weight)
    return multiply(x, weight) if isinstance(weight, Weight4) else x @ weight.T


def _transposed(g: Tensor, weight: Weight4 | PackedWeight | Tensor) -> Tensor:
    if isinstance(weight, PackedWeight):
        return packed.multiply_transposed(g, weight)
    return multiply_transposed(g, weight) if isinstance(weight, Weight4) else g @ weight


class _Lora(torch.autograd.Function):
    """The method above; tensors are flattened to [token, ...] by `lora_fused`."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Weight4 | PackedWeight | Tensor, a: Tensor | None, b: Tensor | None, scaling: float
    ) -> Tensor:
        y = _product(x, weight)
        inner = None if a is None else x @ a.T
        if a is not None:
            y.addmm_(inner, b.T, alpha=scaling)
        ctx.weight, ctx.scaling = weight, scaling
        # x is needed for dA only: without an adapter, or with A frozen, it is not kept alive.
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a, b, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, a, b, inner = ctx.saved_tensors
        wants_x, _, wants_a, wants_b, _ = ctx.needs_input_grad
        outer = None if b is None else ctx.scaling * (g @ b)
        dx = None
        if wants_x:
            dx = _transposed(g, ctx.weight)
            if a is not None:
                dx.addmm_(outer, a)
        da = outer.T @ x if wants_a else None
        db = ctx.scaling * (g.T @ inner) if wants_b else None
        return dx, None, da, db, None


def lora_fused(
    x: Tensor, weight: Weight4 | PackedWeight | Tensor, a: Tensor | None, b: Tensor | None, scaling: float
) -> Tensor:
    """`lora_reference` with the weight decoded tile by tile in both directions."""
    y = _Lora.apply(x.reshape(-1, x.shape[-1]), weight, a, b, scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(device: str) -> None:
    four = sample_weight(device, kind="int4_zero_point", rows=32, cols=64)
    for weight in (four, decode(four, torch.float64)):
        generator = torch.Generator().manual_seed(2)
        parts = [torch.randn(s, generator=generator).double().to(device) for s in ((5, 64), (4, 64), (32, 4))]
        found = []
        for run in (lora_fused, lora_reference):
            x, a, b = (part.clone().requires_grad_() for part in parts)
            with torch.enable_grad():
                y = run(x, weight, a, b, 0.5)
                found.append([y, *torch.autograd.grad(y.square().sum(), (x, a, b))])
        torch.testing.assert_close(*found)


LORA = (
    Form("tiles", lora_fused, check=_check),
    Form("reference", lora_reference),
)
