"""Activations times a 4-bit weight: y = x W^T, and its transpose g W, with W decoded a tile at a time.

Forms of the product, best first:
- `library`: few rows of activations on a CPU, at the speed of reading the codes, by kernels that libraries bring:
  bitsandbytes' for NF4 (AVX-512 bf16) and torch's own for int4. Each reads codes and bf16 scales in an order of its
  own: `prepare` makes that second copy, half a byte a weight. Without it, or those instructions, the tiled form serves;
- `triton`: up to `triton.FEW_ROWS` rows on a GPU, decoding inside the product;
- `tiles`: W is decoded to the activations' dtype some 2^20 weights at a time, into memory that stays in cache, and the
  matrix library (oneDNN, cuBLAS) multiplies the tile. Decoding costs the same for any number of activations: this is
  the form for prefill and training. A tile holds whole rows (for x W^T) or whole columns (for g W): no sum is split;
- `reference`: decode everything, multiply. The definition.
The decoding of a tile has forms of its own (`DECODE`), all bit-equal to the reference; bitsandbytes' native code is
about three times as fast as torch's operators.

Checks: a product may differ from its float64 value by four roundings of every term (`error_bound`), a decoded weight
not by a bit.
What it does not do: gradients (`lora`), quantize the activations, or use more threads than torch was given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from avalab.kernels.dispatch import Form, choose_form
from avalab.kernels.formats import LEVELS
from avalab.kernels.weight import (
    DTYPES,
    NESTED_GROUP,
    NestedScales,
    SmallBatch,
    Weight4,
    decode,
    decode_by_pairs,
    group_scales,
    take,
)
from avalab.lab.errors import InputError

TILE_WEIGHTS = {"cpu": 2**20, "cuda": 2**24}  # a few MiB of cache; few launches

PANEL_COLS = 256  # fewer columns a panel make the matrix library slow

# Rows of activations up to which each beats the tiled form, on 4096 x 4096, one thread of a Zen 5.
SMALL_BATCH = {"bitsandbytes": 64, "int4pack": 48}

INT4PACK_GROUPS = (32, 64, 128, 256)

LANES = 32  # rows of the weight that the kernels take together

KINDS = ("nf4", "nf4_nested", "int4", "int4_zero_point", "int4_minimum")  # of samples


def multiply(x: Float[Tensor, "*batch cols"], weight: Weight4) -> Float[Tensor, "*batch rows"]:
    """The product: x times the transposed weight, in x's dtype and on its device, by the best form there is.

    Raises ValueError for a dtype or device without a form, columns that differ, or an x that wants a gradient.
    """
    _refuse(x, weight, weight.shape[1], "columns")
    return choose_form("product", PRODUCT, x.device, x, weight).run(x, weight)


def multiply_transposed(g: Float[Tensor, "*batch rows"], weight: Weight4) -> Float[Tensor, "*batch cols"]:
    """g times the weight: the gradient of `product` with respect to x. Raises what `multiply` raises."""
    _refuse(g, weight, weight.shape[0], "rows")
    return choose_form("product_transposed", TRANSPOSED, g.device, g, weight).run(g, weight)


def _refuse(x: Tensor, weight: Weight4, width: int, name: str) -> None:
    if x.shape[-1] != width:
        raise InputError(
            f"activations of {x.shape[-1]} values do not match the {width} {name} of a {weight.shape} weight"
        )
    if x.dtype not in DTYPES:
        raise InputError(f"activations are {x.dtype}; the product takes {', '.join(str(d) for d in DTYPES)}")
    if x.device != weight.device:
        raise InputError(f"activations are on {x.device}, the weight on {weight.device}; move one (Weight4.to)")
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError("activations want a gradient, which this product does not give; use avalab.kernels.linear")


def product_reference(x: Float[Tensor, "*batch cols"], weight: Weight4) -> Float[Tensor, "*batch rows"]:
    """Decode, multiply."""
    return x @ decode(weight, x.dtype).T


def transposed_reference(g: Float[Tensor, "*batch rows"], weight: Weight4) -> Float[Tensor, "*batch cols"]:
    """Decode, multiply."""
    return g @ decode(weight, g.dtype)


def product_tiles(x: Float[Tensor, "*batch cols"], weight: Weight4) -> Float[Tensor, "*batch rows"]:
    """The product, some rows of the weight at a time."""
    (rows, cols), flat = weight.shape, x.reshape(-1, x.shape[-1])
    step = max(1, _tile_weights(x) // cols)
    if step >= rows:
        return x @ decoded(weight, x.dtype).T
    out, room = x.new_empty(len(flat), rows), x.new_empty(len(flat) * step)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        # Into contiguous memory, then copied: oneDNN writes a slice of a wider matrix at half its speed.
        y = room[: len(flat) * (part.stop - first)].view(len(flat), -1)
        out[:, part] = torch.mm(flat, decoded(take(weight, part), x.dtype).T, out=y)
    return out.view(*x.shape[:-1], rows)


def transposed_tiles(g: Float[Tensor, "*batch rows"], weight: Weight4) -> Float[Tensor, "*batch cols"]:
    """The transposed product, some groups of columns at a time."""
    (rows, cols), flat, size = weight.shape, g.reshape(-1, g.shape[-1]), weight.group_size
    out = g.new_empty(len(flat), cols)
    step = max(PANEL_COLS, _tile_weights(g) // rows) // size * size or size
    for first in range(0, cols, step):
        part = slice(first, min(first + step, cols))
        out[:, part] = flat @ decoded(take(weight, slice(None), part), g.dtype)
    return out.view(*g.shape[:-1], cols)


def _tile_weights(x: Tensor) -> int:
    return TILE_WEIGHTS.get(x.device.type, TILE_WEIGHTS["cuda"])


def decoded(weight: Weight4, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
    """The weight in `dtype`, by the fastest form that gives the reference's bits."""
    return choose_form("decode", DECODE, weight.device, weight, dtype).run(weight, dtype)


# --- kernels of libraries for few rows --------------------------------------------------------------------------


def prepare_small_batches(weight: Weight4) -> Weight4:
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


# --- checks ------------------------------------------------------------------------------------------------------


def error_bound(x: Float[Tensor, "*batch cols"], weight: Weight4) -> Float64[Tensor, "*batch rows"]:
    """What a product may differ from its exact value by, entry by entry.

    Rounded are the weight, its scale, its level or offset, and the sum: four roundings of the dtype, of terms as large
    as the largest weight of their group can make them.
    """
    zero_points = 0 if weight.zero_points is None else weight.zero_points.float()[..., None]
    reach = (weight.levels - zero_points).abs().amax(-1) * group_scales(weight).abs()
    if weight.minimums is not None:
        reach = reach + weight.minimums.float().abs()
    reach = reach.repeat_interleave(weight.group_size, 1).double()
    return 4 * torch.finfo(x.dtype).eps * (x.double().abs() @ reach.T)


def sample_weight(
    device: str | torch.device, *, kind: str, rows: int = 96, cols: int = 192, group_size: int = 64
) -> Weight4:
    """A weight of random codes, one of `KINDS`; always the same for the same arguments."""
    generator = torch.Generator().manual_seed(rows * cols)
    codes = torch.randint(0, 256, (rows, cols // 2), generator=generator).to(torch.uint8)
    scales = torch.rand(rows, cols // group_size, generator=generator) + 0.1
    offsets = torch.randint(0, 16, scales.shape, generator=generator).float()
    levels = nf4_levels() if kind.startswith("nf4") else torch.arange(16.0) - (8 if kind == "int4" else 0)
    if kind == "nf4_nested":
        nested = torch.randint(0, 256, (scales.numel(),), generator=generator).to(torch.uint8)
        absmax = torch.rand(-(-scales.numel() // NESTED_GROUP), generator=generator) + 0.5
        scales = NestedScales(nested, torch.linspace(-1, 1, 256), absmax, torch.tensor(2.0))
    zero_points = offsets if kind == "int4_zero_point" else None
    minimums = -offsets if kind == "int4_minimum" else None
    return Weight4(codes, levels, scales, zero_points=zero_points, minimums=minimums).to(device)


def product_check(run: Callable, *batches: int, kinds: tuple[str, ...] = KINDS) -> Callable[[str], None]:
    """A check for `Form`: `run` on bf16 activations of each number of rows stays within `error_bound` of float64."""

    def check(device: str) -> None:
        for kind in kinds:
            weight = prepare_small_batches(sample_weight(device, kind=kind))
            if run is product_library and weight.small_batch is None:
                continue
            exact = decode(weight, torch.float64).T
            for batch in batches:
                generator = torch.Generator().manual_seed(batch)
                x = torch.randn(batch, weight.shape[1], generator=generator).bfloat16().to(device)
                if not ((run(x, weight).double() - x.double() @ exact).abs() <= error_bound(x, weight)).all():
                    raise ArithmeticError(f"{kind} times {batch} rows is outside the error bound")

    return check


def _check_transposed(device: str) -> None:
    for kind in KINDS:
        weight = sample_weight(device, kind=kind)
        g = torch.randn(3, weight.shape[0], generator=torch.Generator().manual_seed(3)).double().to(device)
        torch.testing.assert_close(transposed_tiles(g, weight), g @ decode(weight, torch.float64))


def decode_check(run: Callable, kinds: tuple[str, ...] = KINDS) -> Callable[[str], None]:
    """A check for `Form`: `run` decodes to the reference's bits."""

    def check(device: str) -> None:
        for kind in kinds:
            weight = sample_weight(device, kind=kind)
            if not torch.equal(run(weight, torch.bfloat16), decode(weight, torch.bfloat16)):
                raise ArithmeticError(f"{kind} decodes to other bits than the reference")

    return check


def _product_triton(x: Tensor, weight: Weight4) -> Tensor:
    from avalab.kernels import triton as triton_kernels

    return triton_kernels.product(x, weight)


def _serves_product_triton(x: Tensor, weight: Weight4) -> bool:
    if x.device.type != "cuda" or x.dtype == torch.float64:
        return False
    from avalab.kernels import triton as triton_kernels

    return triton_kernels.serves(weight) and 0 < x.numel() <= triton_kernels.FEW_ROWS * x.shape[-1]


def _decode_triton(weight: Weight4, dtype: torch.dtype) -> Tensor:
    from avalab.kernels import triton as triton_kernels

    return triton_kernels.decode(weight, dtype)


def _serves_decode_triton(weight: Weight4, dtype: torch.dtype) -> bool:
    return weight.device.type == "cuda" and dtype != torch.float64


PRODUCT = (
    Form("library", product_library, serves_product, product_check(product_library, 1, 3, 16)),
    Form("triton", _product_triton, _serves_product_triton, product_check(_product_triton, 1, 3)),
    Form("tiles", product_tiles, check=product_check(product_tiles, 5)),
    Form("reference", product_reference),
)

TRANSPOSED = (
    Form("tiles", transposed_tiles, check=_check_transposed),
    Form("reference", transposed_reference),
)

DECODE = (
    Form("library", decode_library, serves_decode, decode_check(decode_library, ("nf4", "nf4_nested"))),
    Form("triton", _decode_triton, _serves_decode_triton, decode_check(_decode_triton)),
    Form("tiles", decode_by_pairs, check=decode_check(decode_by_pairs)),
    Form("reference", decode),
)
