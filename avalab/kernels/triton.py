"""The GPU forms of encoding, loss and product, in Triton; imported only where there is a GPU or the interpreter.

- `codes_and_scales`: absolute maximum, nearest of ascending levels and packing in one pass. A program takes some
  groups, one a row: their even and odd columns become the high and low halves of the bytes. A code is the number of
  midpoints below the value times the reciprocal of the group's maximum, whose last bit decides ties.
- `cross_entropy_rows`, `kl_rows`: as those of `loss_chunks`, a program a row, read twice: first the running maximum,
  the sum of exponentials rescaled to it and one more running sum (of the logits, or of probability times the gap
  between the two models), then the gradient in the logits' place. Nothing of the size of a row is held.
- `product`: some rows of the weight for up to 16 rows of activations. It walks the columns a part of a group at a time:
  bytes are split in halves, looked up in the 16 levels and multiplied with the even and the odd columns of x by the
  matrix units, so nothing is interleaved. Scale, zero point and minimum act on the partial sums, in float32: sum over
  groups of scale * (x . level - zero_point * sum(x)) + minimum * sum(x).
- `decode`: a byte becomes two weights, without fused multiply-adds, so that the bits are the reference's. Quantized
  scales are decoded in both kernels and never stored.

None takes float64. Without a GPU the interpreter (TRITON_INTERPRET=1) checks results, not time.
Source: the running form of the softmax: Milakov and Gimelshein 2018, algorithm 3.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from avalab.kernels.loss_chunks import Labels, Logits, PerToken
from avalab.kernels.weight import NESTED_GROUP, NestedScales, Weight4

BLOCK_BYTES = 1024  # made by a program

BLOCK = 4096  # logits read at a time

FEW_ROWS = 16  # of activations: one tile of the matrix units

BLOCK_ROWS = 16  # of the weight, a program

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
    _encode[grid](
        flat, middles, codes, scales, count,
        MIDDLES=len(midpoints), HALF=half, BLOCK=block, LEAST=SMALLEST, enable_fp_fusion=False,
    )  # fmt: skip
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


# --- loss and gradient of rows of logits -------------------------------------------------------------------------


def cross_entropy_rows(
    logits: Logits, targets: Labels, row_weight: float, *, label_smoothing: float = 0.0, temperature: float = 1.0
) -> PerToken:
    """As `loss_chunks.cross_entropy_rows`."""
    numbers = (logits.stride(0), logits.shape[1], row_weight, label_smoothing, 1 / temperature)
    return _launch_rows(_cross_entropy, logits, targets.contiguous(), numbers)


def kl_rows(
    logits: Logits, teacher: Logits, row_weight: float, *, reverse: bool = False, temperature: float = 1.0
) -> PerToken:
    """As `loss_chunks.kl_rows`."""
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    numbers = (logits.stride(0), teacher.stride(0), logits.shape[1], row_weight, temperature)
    return _launch_rows(_kl, logits, teacher, numbers, REVERSE=reverse)


def _launch_rows(kernel: Any, logits: Tensor, other: Tensor, numbers: tuple, **constants: bool) -> PerToken:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
        kernel[(len(logits),)](logits, other, losses, *numbers, BLOCK=block, **constants)
    return losses


@triton.jit
@no_type_check
def _added(x, top):
    """The running maximum, one block on, and what sums so far shrink by."""
    new = tl.maximum(top, tl.max(x, 0))
    return new, tl.exp(top - new)


@triton.jit
@no_type_check
def _cross_entropy(logits, targets, losses, stride, vocab, row_weight, smoothing, cooling, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, at = logits + row * stride, tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    # The maximum starts finite, so that infinity is never taken from infinity.
    top, mass, total = -3.0e38, 0.0, 0.0
    for first in range(0, vocab, BLOCK):
        ok = first + at < vocab
        x = tl.load(start + first + at, ok, float("-inf")).to(tl.float32) * cooling
        top, shrink = _added(x, top)
        mass = mass * shrink + tl.sum(tl.exp(x - top), 0)
        total += tl.sum(tl.where(ok, x, 0.0), 0)
    normalizer = top + tl.log(mass)
    scored = tl.load(start + target).to(tl.float32) * cooling * (1 - smoothing) + total * (smoothing / vocab)
    tl.store(losses + row, normalizer - scored)
    for first in range(0, vocab, BLOCK):
        ok = first + at < vocab
        x = tl.load(start + first + at, ok, 0.0).to(tl.float32) * cooling
        wanted = tl.where(first + at == target, 1 - smoothing, 0.0) + smoothing / vocab
        gradient = (tl.exp(x - normalizer) - wanted) * (row_weight * cooling)
        tl.store(start + first + at, gradient.to(logits.dtype.element_ty), ok)


@triton.jit
@no_type_check
def _kl(
    logits, teacher, losses, stride, teacher_stride, vocab, row_weight, temperature,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    start, other = logits + row * stride, teacher + row * teacher_stride
    x_top, x_mass, t_top, t_mass, gap_sum = -3.0e38, 0.0, -3.0e38, 0.0, 0.0
    for first in range(0, vocab, BLOCK):
        ok = first + at < vocab
        x = tl.load(start + first + at, ok, float("-inf")).to(tl.float32) / temperature
        t = tl.load(other + first + at, ok, float("-inf")).to(tl.float32) / temperature
        x_top, x_shrink = _added(x, x_top)
        t_top, t_shrink = _added(t, t_top)
        x_part, t_part = tl.exp(x - x_top), tl.exp(t - t_top)
        x_mass = x_mass * x_shrink + tl.sum(x_part, 0)
        t_mass = t_mass * t_shrink + tl.sum(t_part, 0)
        # An entry of no probability adds nothing, even where the other model's logit is infinite too.
        if REVERSE:
            gap_sum = gap_sum * x_shrink + tl.sum(tl.where(x_part == 0, 0.0, x_part * (x - t)), 0)
        else:
            gap_sum = gap_sum * t_shrink + tl.sum(tl.where(t_part == 0, 0.0, t_part * (t - x)), 0)
    x_norm, t_norm = x_top + tl.log(x_mass), t_top + tl.log(t_mass)
    kl = gap_sum / x_mass - x_norm + t_norm if REVERSE else gap_sum / t_mass - t_norm + x_norm
    tl.store(losses + row, kl * temperature * temperature)
    for first in range(0, vocab, BLOCK):
        ok = first + at < vocab
        x = tl.load(start + first + at, ok, 0.0).to(tl.float32) / temperature - x_norm
        t = tl.load(other + first + at, ok, 0.0).to(tl.float32) / temperature - t_norm
        p = tl.exp(x)
        gradient = tl.where(p == 0, 0.0, p * (x - t - kl)) if REVERSE else p - tl.exp(t)
        tl.store(start + first + at, (gradient * (row_weight * temperature)).to(logits.dtype.element_ty), ok)


# --- the 4-bit product -------------------------------------------------------------------------------------------


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
    exact = x.dtype == torch.float32  # not tf32
    _product[grid](
        flat, codes, out, len(flat), rows, cols, *_arguments(weight), exact,
        PART=part, GROUP=weight.group_size, BLOCK_M=FEW_ROWS, BLOCK_N=BLOCK_ROWS,
    )  # fmt: skip
    return out.view(*x.shape[:-1], rows)


def decode(weight: Weight4, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
    """The weight in `dtype`, bit for bit as `avalab.kernels.weight.decode`."""
    codes = weight.codes.contiguous()
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(codes.numel(), BLOCK_BYTES),)
    _decode[grid](
        codes, out, codes.numel(), *_arguments(weight),
        GROUP=weight.group_size, BLOCK=BLOCK_BYTES, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _arguments(weight: Weight4) -> list[Tensor | bool]:
    """Levels, scales and offsets, where there is none the levels, which are not read; then which of them there are."""
    scales, nothing = weight.scales, weight.levels
    nested = isinstance(scales, NestedScales)
    parts = list(vars(scales).values()) if nested else [scales, *[nothing] * 3]
    offsets = [nothing if t is None else t for t in (weight.zero_points, weight.minimums)]
    tensors = [tensor.contiguous() for tensor in (weight.levels, *parts, *offsets)]
    return [*tensors, nested, weight.zero_points is not None, weight.minimums is not None]


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
