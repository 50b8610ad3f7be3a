"""Kernels for few rows of activations that installed libraries bring for a CPU, and what they read.

At batch 1 a product takes as long as reading its codes. Two libraries' native kernels run at that speed, so they are
called rather than written again: bitsandbytes' for NF4 (AVX-512 bf16) and torch's own `_weight_int4pack_mm_for_cpu` for
int4. Each reads codes and bf16 scales in an order of its own: `prepare` makes that second copy, half a byte a weight.
bitsandbytes also decodes NF4 in native code, to the reference's bits, about three times as fast as torch's operators.

What it does not do: need bitsandbytes. Without it, or on a CPU without those instructions, the tiled form serves, and a
log message says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from avalab.kernels.weight import SmallBatch, Weight4, group_scales
from avalab.numerics import LEVELS

# Rows of activations up to which each beats the tiled form, on 4096 x 4096, one thread of a Zen 5.
SMALL_BATCH = {"bitsandbytes": 64, "int4pack": 48}
INT4PACK_GROUPS = (32, 64, 128, 256)
LANES = 32  # rows of the weight that the kernels take together


def prepare(weight: Weight4) -> Weight4:
    """The weight with a second copy of its codes for small batches, where a library here has a kernel for it.

    Otherwise the weight as it is: another format or group size, rows that 32 does not divide, a GPU, another CPU.
    """
    if weight.device.type != "cpu" or weight.shape[0] % LANES or weight.minimums is not None:
        return weight
    if is_nf4(weight):
        fast = native_code() == "avx512_bf16"
        return replace(weight, small_batch=_bitsandbytes_layout(weight)) if fast else weight
    steps = weight.levels.sort().values.diff()
    if weight.group_size in INT4PACK_GROUPS and bool((steps == 1).all()):
        return replace(weight, small_batch=_int4pack_layout(weight))
    return weight


def is_nf4(weight: Weight4) -> bool:
    """Whether bitsandbytes' kernels take the weight: NF4 levels, groups of 64, nothing added."""
    plain = weight.zero_points is None and weight.minimums is None
    return weight.group_size == 64 and plain and torch.equal(weight.levels, nf4_levels())


@cache
def nf4_levels() -> Float[Tensor, "16"]:
    """The levels of NF4 by code."""
    return torch.tensor(LEVELS["nf4"])


@cache
def native_code() -> str:
    """What bitsandbytes has for this CPU: "" nothing, "cpu" decoding, "avx512_bf16" the small-batch kernel as well."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about an optional download that is not used here
    try:
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
        from bitsandbytes.functional import has_avx512bf16
    except ImportError:
        found = ""
    else:
        mock = isinstance(lib, ErrorHandlerMockBNBNativeLibrary)
        found = "" if mock else "avx512_bf16" if has_avx512bf16() else "cpu"
    logger.setLevel(level)
    if found != "avx512_bf16":
        logging.getLogger(__name__).warning(
            "no small-batch NF4 kernel for this CPU (bitsandbytes, AVX-512 bf16): by tiles"
        )
    return found


def _nibbles(weight: Weight4) -> Tensor:
    return torch.stack((weight.codes >> 4, weight.codes & 15), -1)


def _bitsandbytes_layout(weight: Weight4) -> SmallBatch:
    """32 rows together, two columns at a time: 16 rows in the low halves of 32 bytes, 16 in the high halves."""
    rows, cols = weight.shape
    low, high = _nibbles(weight).view(rows // LANES, 2, 16, cols // 2, 2).permute(1, 0, 3, 2, 4)
    codes = (high << 4 | low).reshape(rows, cols // 2)
    return SmallBatch("bitsandbytes", codes, group_scales(weight).T.to(torch.bfloat16).contiguous())


def _int4pack_layout(weight: Weight4) -> SmallBatch:
    """torch's order, of weights written as (code - 8) * scale + offset."""
    lowest = weight.levels.min()
    codes = (weight.levels - lowest)[_nibbles(weight).int()].view(weight.shape).int()  # two's complement becomes 0..15
    scales = group_scales(weight)
    zero_points = 0.0 if weight.zero_points is None else weight.zero_points
    both = torch.stack((scales, (lowest + 8 - zero_points) * scales), -1).transpose(0, 1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return SmallBatch("int4pack", packed, both.to(torch.bfloat16).contiguous())


def product_library(x: Float[Tensor, "*batch cols"], weight: Weight4) -> Float[Tensor, "*batch rows"]:
    """x times the transposed weight, of a weight from `prepare`."""
    rows, cols = weight.shape
    # Named overloads and no needless views: at batch 1 of a small layer a microsecond is a few per cent.
    small, flat = weight.small_batch, x if x.ndim == 2 and x.is_contiguous() else x.reshape(-1, cols).contiguous()
    if small.kernel == "int4pack":
        run = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        y = run(flat, small.codes, weight.group_size, small.scales)
    elif torch.compiler.is_compiling():  # a compiler sees into operators, not into native code
        y = torch.ops.bitsandbytes.gemv_4bit.default(flat, small.codes, (rows, cols), small.scales, weight.levels, 64)
    else:
        y = flat.new_empty(len(flat), rows)
        sizes = [c_int64(size) for size in (len(flat), rows, cols)]
        places = [c_void_p(tensor.data_ptr()) for tensor in (flat, small.codes, small.scales, y)]
        _native_product()(*sizes, *places, c_int64(64), c_int64(cols), c_int64(rows))
    return y if x.ndim == 2 else y.view(*x.shape[:-1], rows)


@cache
def _native_product() -> Callable[..., None]:
    """bitsandbytes' native NF4 product of few rows: sizes, pointers, group size, strides of input and output.

    Called without the operator around it, whose Python costs several microseconds: much, for a small model's layer.
    """
    from bitsandbytes.cextension import lib

    return lib.gemv_4bit_inference_cpu_nf4_bf16


def serves_product(x: Float[Tensor, "*batch cols"], weight: Weight4) -> bool:
    """Few bf16 rows, and a weight from `prepare`."""
    if weight.small_batch is None or x.dtype != torch.bfloat16:
        return False
    return 0 < x.numel() <= SMALL_BATCH[weight.small_batch.kernel] * x.shape[-1]


def decode_library(weight: Weight4, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
    """NF4 decoded by bitsandbytes' native code."""
    codes, scales = weight.codes.contiguous(), group_scales(weight).reshape(-1)
    return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, 64, "nf4", list(weight.shape), dtype)


def serves_decode(weight: Weight4, dtype: torch.dtype) -> bool:
    """NF4 on a CPU, to bf16 or float32, where bitsandbytes has native code."""
    wanted = weight.device.type == "cpu" and dtype in (torch.bfloat16, torch.float32)
    return wanted and is_nf4(weight) and native_code() != ""
