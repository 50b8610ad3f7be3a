"""Four-bit codes on a GPU, in Triton: absolute maximum, nearest level and packing in one pass over the weight.

A program takes some groups, one a row: their even and their odd columns, which become the high and the low halves of
the bytes. A code is the number of midpoints below the value times the reciprocal of the group's maximum; the reciprocal
is rounded to nearest, because its last bit decides ties.

What it does not do: levels that do not ascend, group sizes that are no power of two, double quantization. Time without
a GPU: the interpreter (TRITON_INTERPRET=1) checks the results only.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

BLOCK_BYTES = 1024  # made by a program
SMALLEST = 1e-38  # a scale below is taken for this: the reciprocal must not overflow


def codes_and_scales(
    weight: Float[Tensor, "rows cols"], midpoints: list[float], group_size: int
) -> tuple[UInt8[Tensor, "group half"], Float32[Tensor, "group"]]:
    """Packed codes of `len(midpoints) + 1` ascending levels, and the absolute maximum of each group."""
    flat = weight.contiguous()
    count, half = flat.numel() // group_size, group_size // 2
    codes = torch.empty(count, half, dtype=torch.uint8, device=flat.device)
    scales = torch.empty(count, device=flat.device)
    middles = torch.tensor(midpoints, device=flat.device)
    block = max(1, BLOCK_BYTES // half)
    grid = (triton.cdiv(count, block),)
    sizes = {"MIDDLES": len(midpoints), "HALF": half, "BLOCK": block, "LEAST": SMALLEST}
    _encode[grid](flat, middles, codes, scales, count, **sizes, enable_fp_fusion=False)
    return codes, scales


@triton.jit
@no_type_check
def _encode(
    weight, middles, codes, scales, count,
    MIDDLES: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = group[:, None] * HALF + tl.arange(0, HALF)[None, :]
    ok = (group < count)[:, None]
    even = tl.load(weight + 2 * at, ok, 0.0).to(tl.float32)
    odd = tl.load(weight + 2 * at + 1, ok, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1))
    # A maximum may drop NaN; the sum of differences with itself does not.
    scale += tl.sum(even - even, 1) + tl.sum(odd - odd, 1)
    inverse = tl.div_rn(1.0, tl.maximum(scale, LEAST))[:, None]
    even, odd = even * inverse, odd * inverse
    high = tl.zeros((BLOCK, HALF), tl.int32)
    low = tl.zeros((BLOCK, HALF), tl.int32)
    for index in range(MIDDLES):
        middle = tl.load(middles + index)
        high += (even > middle).to(tl.int32)
        low += (odd > middle).to(tl.int32)
    tl.store(codes + at, (high * 16 + low).to(tl.uint8), ok)
    tl.store(scales + group, scale, group < count)
