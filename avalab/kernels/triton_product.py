"""The 4-bit product for a GPU, in Triton: decoding inside the product for few rows, or the decoded weight in one pass.

`product`: a program computes some rows of the weight for up to 16 rows of activations. It walks the columns a part of a
group at a time: bytes are split in halves, the halves looked up in the 16 levels, and multiplied with the even and the
odd columns of x by the matrix units, so nothing is interleaved. Scale, zero point and minimum act on the partial sums,
in float32: sum over groups of scale * (x . level - zero_point * sum(x)) + minimum * sum(x).
`decode`: a byte becomes two weights, without fused multiply-adds, so that the bits are the reference's.
Quantized scales are decoded in both kernels and never stored.

What it does not do: float64, groups that 32 does not divide (the tiled form takes those). Time without a GPU: the
interpreter (TRITON_INTERPRET=1) checks the results only.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from avalab.kernels.weight import NESTED_GROUP, NestedScales, Weight4

FEW_ROWS = 16  # of activations: one tile of the matrix units
BLOCK_ROWS = 16  # of the weight, a program
BLOCK_BYTES = 1024  # decoded by a program


def serves(weight: Weight4) -> bool:
    """Whether the groups are made of parts that the matrix units take."""
    return weight.group_size % 32 == 0


def product(x: Float[Tensor, "*batch cols"], weight: Weight4) -> Float[Tensor, "*batch rows"]:
    """x times the transposed weight, for at most `FEW_ROWS` rows of activations."""
    (rows, cols), flat = weight.shape, x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(len(flat), rows, dtype=x.dtype, device=x.device)
    part = next(size for size in (128, 64, 32) if weight.group_size % size == 0)
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(len(flat), FEW_ROWS))
    codes = weight.codes.contiguous()
    sizes = {"PART": part, "GROUP": weight.group_size, "BLOCK_M": FEW_ROWS, "BLOCK_N": BLOCK_ROWS}
    exact = x.dtype == torch.float32  # not tf32
    _product[grid](flat, codes, out, len(flat), rows, cols, *_arguments(weight), *_kinds(weight), exact, **sizes)
    return out.view(*x.shape[:-1], rows)


def decode(weight: Weight4, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
    """The weight in `dtype`, bit for bit as `avalab.kernels.weight.decode`."""
    codes = weight.codes.contiguous()
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(codes.numel(), BLOCK_BYTES),)
    arguments = (codes, out, codes.numel(), *_arguments(weight), *_kinds(weight))
    _decode[grid](*arguments, GROUP=weight.group_size, BLOCK=BLOCK_BYTES, enable_fp_fusion=False)
    return out


def _arguments(weight: Weight4) -> list[Tensor]:
    """Levels, scales and offsets; where there is none, the levels stand in and are not read."""
    scales, nothing = weight.scales, weight.levels
    parts = list(vars(scales).values()) if isinstance(scales, NestedScales) else [scales, *[nothing] * 3]
    offsets = [nothing if t is None else t for t in (weight.zero_points, weight.minimums)]
    return [tensor.contiguous() for tensor in (weight.levels, *parts, *offsets)]


def _kinds(weight: Weight4) -> tuple[bool, bool, bool]:
    return isinstance(weight.scales, NestedScales), weight.zero_points is not None, weight.minimums is not None


@triton.jit
@no_type_check
def _scale(
    group, mask, scales, nested_levels, nested_absmax, nested_offset, NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr
):  # fmt: skip
    if NESTED:
        level = tl.load(nested_levels + tl.load(scales + group, mask, 0).to(tl.int32))
        return level * tl.load(nested_absmax + group // NESTED_SIZE, mask, 0.0) + tl.load(nested_offset)
    return tl.load(scales + group, mask, 0.0).to(tl.float32)


@triton.jit
@no_type_check
def _product(
    x, codes, out, m_count, rows, cols,
    levels, scales, nested_levels, nested_absmax, nested_offset, zero_points, minimums,
    NESTED: tl.constexpr, ZERO_POINTS: tl.constexpr, MINIMUMS: tl.constexpr, EXACT: tl.constexpr,
    PART: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NESTED_SIZE: tl.constexpr = NESTED_GROUP,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    half = tl.arange(0, PART // 2)
    n_ok, m_ok = n < rows, m < m_count
    byte_at = codes + n[:, None].to(tl.int64) * (cols // 2) + half[None, :]
    x_at = x + m[:, None].to(tl.int64) * cols + 2 * half[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, cols, PART):
        group = n.to(tl.int64) * (cols // GROUP) + first // GROUP
        byte = tl.load(byte_at + first // 2, n_ok[:, None], 0)
        even = tl.load(x_at + first, m_ok[:, None], 0.0)
        odd = tl.load(x_at + first + 1, m_ok[:, None], 0.0)
        high = tl.load(levels + (byte >> 4).to(tl.int32)).to(even.dtype)
        low = tl.load(levels + (byte & 15).to(tl.int32)).to(even.dtype)
        precision: tl.constexpr = "ieee" if EXACT else "tf32"
        dot = tl.dot(even, tl.trans(high), input_precision=precision)
        dot = tl.dot(odd, tl.trans(low), dot, input_precision=precision)
        if ZERO_POINTS or MINIMUMS:
            x_sum = tl.sum(even.to(tl.float32) + odd.to(tl.float32), 1)[:, None]
        if ZERO_POINTS:
            dot -= x_sum * tl.load(zero_points + group, n_ok, 0).to(tl.float32)[None, :]
        scale = _scale(group, n_ok, scales, nested_levels, nested_absmax, nested_offset, NESTED, NESTED_SIZE)
        acc += dot * scale[None, :]
        if MINIMUMS:
            acc += x_sum * tl.load(minimums + group, n_ok, 0.0).to(tl.float32)[None, :]
    out_at = out + m[:, None].to(tl.int64) * rows + n[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), m_ok[:, None] & n_ok[None, :])


@triton.jit
@no_type_check
def _decode(
    codes, out, byte_count,
    levels, scales, nested_levels, nested_absmax, nested_offset, zero_points, minimums,
    NESTED: tl.constexpr, ZERO_POINTS: tl.constexpr, MINIMUMS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, NESTED_SIZE: tl.constexpr = NESTED_GROUP,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < byte_count
    byte = tl.load(codes + at, ok, 0)
    group = 2 * at // GROUP
    scale = _scale(group, ok, scales, nested_levels, nested_absmax, nested_offset, NESTED, NESTED_SIZE)
    high = tl.load(levels + (byte >> 4).to(tl.int32))
    low = tl.load(levels + (byte & 15).to(tl.int32))
    if ZERO_POINTS:
        zero_point = tl.load(zero_points + group, ok, 0).to(tl.float32)
        high, low = high - zero_point, low - zero_point
    high, low = high * scale, low * scale
    if MINIMUMS:
        minimum = tl.load(minimums + group, ok, 0.0).to(tl.float32)
        high, low = high + minimum, low + minimum
    tl.store(out + 2 * at, high.to(out.dtype.element_ty), ok)
    tl.store(out + 2 * at + 1, low.to(out.dtype.element_ty), ok)
