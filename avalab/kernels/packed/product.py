"""Activations times a packed weight, y = x W^T, and its transpose g W, with W decoded a tile at a time or not at all.

Forms of the product, best first:
- `native`: up to `NATIVE_ROWS` rows of activations on a CPU: decoded in registers, nothing is written (`packed.cpp`);
- `tiles`: some 2^20 weights are decoded at a time to the activations' dtype, and the matrix library multiplies them;
  on a CPU with matrix units (AMX) these are oneDNN's to use. The tile's decoding is native where that is there;
- `reference`: decode everything, multiply. The definition.

Gradients: of x alone, through g W (`linear` of `avalab.kernels.lora` has adapters, too).
Native arithmetic is float32 whatever the activations' dtype; a result is rounded once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from avalab.kernels.dispatch import Form, choose_form
from avalab.kernels.formats import LEVELS, Grid, Rounded
from avalab.kernels.packed import native
from avalab.kernels.packed.weight import (
    CHUNK,
    LANES,
    PARTS,
    Factors,
    PackedWeight,
    by_groups,
    decode,
    decode_rows,
    from_rounded,
    pack,
)
from avalab.kernels.weight import DTYPES
from avalab.lab.errors import InputError

NATIVE_ROWS = 8  # of activations up to which a product in registers beats one of decoded tiles

TILE_WEIGHTS = 2**20  # a few MiB of cache

NATIVE_DTYPES = (torch.float32, torch.bfloat16)

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}


def multiply(x: Float[Tensor, "*batch cols"], weight: PackedWeight) -> Float[Tensor, "*batch rows"]:
    """x times the transposed weight, in x's dtype; no gradient (`linear` has it).

    Raises InputError for columns that differ, another device, a dtype without a form or an x that wants a gradient.
    """
    _refuse(x, weight, weight.shape[1], "columns")
    return choose_form("packed_product", PRODUCT, x.device, x, weight).run(x, weight)


def multiply_transposed(g: Float[Tensor, "*batch rows"], weight: PackedWeight) -> Float[Tensor, "*batch cols"]:
    """g times the weight: the gradient of `multiply` with respect to x. Raises what `multiply` raises."""
    _refuse(g, weight, weight.shape[0], "rows")
    return choose_form("packed_transposed", TRANSPOSED, g.device, g, weight).run(g, weight)


def _refuse(x: Tensor, weight: PackedWeight, width: int, name: str) -> None:
    if x.shape[-1] != width:
        raise InputError(f"activations of {x.shape[-1]} values do not match the {width} {name} of a packed weight")
    if x.dtype not in DTYPES:
        raise InputError(f"activations are {x.dtype}; the product takes {', '.join(map(str, DTYPES))}")
    if x.device != weight.device:
        raise InputError(f"activations are on {x.device}, the packed weight on {weight.device}; move one (`to`)")
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError("activations want a gradient, which this product does not give; use avalab.kernels.linear")


def product_reference(x: Float[Tensor, "*batch cols"], weight: PackedWeight) -> Float[Tensor, "*batch rows"]:
    """Decode, multiply."""
    return x @ decode(weight, x.dtype).T


def transposed_reference(g: Float[Tensor, "*batch rows"], weight: PackedWeight) -> Float[Tensor, "*batch cols"]:
    """Decode, multiply."""
    return g @ decode(weight, g.dtype)


def product_tiles(x: Float[Tensor, "*batch cols"], weight: PackedWeight) -> Float[Tensor, "*batch rows"]:
    """The product, some row blocks of the weight at a time."""
    (rows, cols), flat = weight.shape, x.reshape(-1, x.shape[-1])
    step = max(1, TILE_WEIGHTS // (cols * LANES))
    if step >= len(weight.codes):
        return x @ decoded_transposed(weight, (0, len(weight.codes)), (0, cols), x.dtype)
    out = x.new_empty(len(flat), rows)
    for first in range(0, len(weight.codes), step):
        last = min(first + step, len(weight.codes))
        part = slice(first * LANES, min(last * LANES, rows))
        out[:, part] = flat @ decoded_transposed(weight, (first, last), (0, cols), x.dtype)
    return out.view(*x.shape[:-1], rows)


def transposed_tiles(g: Float[Tensor, "*batch rows"], weight: PackedWeight) -> Float[Tensor, "*batch cols"]:
    """The transposed product, some columns at a time: no sum is split."""
    (rows, cols), flat = weight.shape, g.reshape(-1, g.shape[-1])
    unit = max(CHUNK, weight.group_size) if weight.group_size < cols else CHUNK
    step = max(256, TILE_WEIGHTS // rows) // unit * unit or unit
    out = g.new_empty(len(flat), cols)
    for first in range(0, cols, step):
        part = (first, min(first + step, cols))
        out[:, slice(*part)] = flat @ decoded_transposed(weight, (0, len(weight.codes)), part, g.dtype).T
    return out.view(*g.shape[:-1], cols)


def decoded_transposed(
    weight: PackedWeight, blocks: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype
) -> Float[Tensor, "cols rows"]:
    """Some columns of some row blocks, transposed; natively where that is there."""
    form = choose_form("packed_decode", DECODE, weight.device, weight, dtype)
    return form.run(weight, blocks, columns, dtype)


def _decode_reference(
    weight: PackedWeight, blocks: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype
) -> Float[Tensor, "cols rows"]:
    kept = min(blocks[1] * LANES, weight.rows) - blocks[0] * LANES
    return decode_rows(weight, *blocks, dtype)[:kept, slice(*columns)].T


# --- native ----------------------------------------------------------------------------------------------------------


class _Factors(ctypes.Structure):
    _fields_ = [
        ("numbers", ctypes.c_void_p),
        ("multipliers", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("multiplier_dtype", ctypes.c_int32),
        ("span", ctypes.c_int64),
    ]


class _Weight(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "low", "high")),
        *((name, _Factors) for name in ("scales", "minimums", "zeros")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "group", "padded")),
        ("bits", ctypes.c_int32),
    ]


_described: WeakKeyDictionary[PackedWeight, tuple[_Weight, Tensor]] = WeakKeyDictionary()


def described(weight: PackedWeight) -> _Weight:
    """What native code reads of a weight; made once, and alive as long as the weight."""
    found = _described.get(weight)
    if found is None:
        tables = _tables(weight)
        (rows, cols), padded = weight.shape, len(weight.codes) * LANES
        factors = (_pointers(part, weight.groups) for part in (weight.scales, weight.minimums, weight.zeros))
        places = (weight.codes.data_ptr(), tables[0].data_ptr(), tables[1].data_ptr())
        found = _Weight(*places, *factors, rows, cols, weight.group_size, padded, weight.bits), tables
        _described[weight] = found
    return found[0]


def _tables(weight: PackedWeight) -> Float[Tensor, "2 16"]:
    """Values of the lowest four bits of a code, and of those above: looked up by four bits that hold others, too."""
    index = torch.arange(16)
    if weight.bits <= 4:
        values = torch.arange(2.0**weight.bits) + weight.low if weight.levels is None else weight.levels
        return torch.stack((values[index % 2**weight.bits], torch.zeros(16)))
    return torch.stack((index.float() + weight.low, 16.0 * (index % 2 ** min(weight.bits - 4, 4))))


def _pointers(factors: Factors | None, groups: int) -> _Factors:
    if factors is None:
        return _Factors()
    numbers, multipliers = factors.numbers, factors.multipliers
    kind = 0 if multipliers is None else KINDS[multipliers.dtype]
    place = None if multipliers is None else multipliers.data_ptr()
    return _Factors(numbers.data_ptr(), place, KINDS[numbers.dtype], kind, groups // len(numbers))


def product_native(x: Float[Tensor, "*batch cols"], weight: PackedWeight) -> Float[Tensor, "*batch rows"]:
    """The product in registers."""
    flat = x.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.rows)
    native.library().packed_multiply(
        ctypes.byref(described(weight)),
        flat.data_ptr(),
        flat.numel() // flat.shape[-1],
        x.dtype == torch.bfloat16,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def serves_native(x: Tensor, weight: PackedWeight) -> bool:
    """Few rows of float32 or bf16 on a CPU, and the compiled kernels are there."""
    few = 0 < x.numel() <= NATIVE_ROWS * x.shape[-1]
    return few and _native_takes(weight, x.dtype) and not torch.compiler.is_compiling()


def _native_takes(weight: PackedWeight, dtype: torch.dtype) -> bool:
    if weight.device.type != "cpu" or dtype not in NATIVE_DTYPES or native.library() is None:
        return False
    return weight.bits <= 4 or weight.levels is None


def decode_native(
    weight: PackedWeight, blocks: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype
) -> Float[Tensor, "cols rows"]:
    """A tile by native code."""
    kept = min(blocks[1] * LANES, weight.rows) - blocks[0] * LANES
    out = torch.empty(columns[1] - columns[0], kept, dtype=dtype)
    asked = (ctypes.byref(described(weight)), *blocks, *columns, dtype == torch.bfloat16, out.data_ptr(), kept)
    native.library().packed_decode(*asked, torch.get_num_threads())
    return out


# --- checks ----------------------------------------------------------------------------------------------------------


@cache
def samples() -> tuple[PackedWeight, ...]:
    """A weight of every number of bits, with zero points, minimums, levels and two-level scales among them."""
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) + 0.1

    found = []
    for bits in PARTS:
        grid = Grid(bits, 64)
        codes, zeros = (
            torch.randint(grid.low, grid.high + 1, shape, generator=generator).to(torch.int8)
            for shape in ((72, 192), (72, 3))
        )
        found.append(from_rounded(Rounded(grid, codes, drawn(72, 3), zeros)))
    codes = torch.randint(0, 16, (40, 256), generator=generator)
    multipliers = torch.randint(1, 64, (40, 16), generator=generator).to(torch.uint8)
    two_level = Factors(by_groups(drawn(40, 1).half()), by_groups(multipliers))
    found.append(pack(codes, 4, two_level, group_size=16, minimums=two_level))
    found.append(pack(codes, 4, Factors(by_groups(drawn(40, 4))), group_size=64, levels=torch.tensor(LEVELS["nf4"])))
    return tuple(found)


def error_bound(x: Tensor, weight: PackedWeight) -> Tensor:
    """What a product may differ from its exact value by: four roundings of terms as large as a group's can be."""
    exact = weight.levels if weight.levels is not None else torch.tensor([0.0, 2.0**weight.bits - 1]) + weight.low
    reach = exact.abs().max() * torch.ones(weight.groups, len(weight.codes) * LANES)
    if weight.zeros is not None:
        reach = reach + weight.zeros.dense(weight.groups).abs()
    reach = reach * weight.scales.dense(weight.groups).abs()
    if weight.minimums is not None:
        reach = reach + weight.minimums.dense(weight.groups).abs()
    reach = reach.T[: weight.rows].repeat_interleave(weight.group_size, 1).double()
    return 4 * torch.finfo(x.dtype).eps * (x.double().abs() @ reach.T)


def _check_product(run: Callable[..., Tensor], transposed: bool = False) -> Callable[[str], None]:
    def check(device: str) -> None:
        for weight in samples():
            rows, cols = weight.shape
            exact = decode(weight).double()
            exact, bound = (exact, None) if transposed else (exact.T, error_bound)
            moved = weight.to(device)
            for batch, dtype in ((1, torch.float32), (5, torch.float32), (1, torch.bfloat16), (9, torch.bfloat16)):
                x = torch.randn(batch, rows if transposed else cols, generator=torch.Generator().manual_seed(batch))
                x = x.to(dtype)
                gap = (run(x.to(device), moved).double().cpu() - x.double() @ exact).abs()
                allowed = bound(x, weight) if bound else 4 * torch.finfo(dtype).eps * (x.double().abs() @ exact.abs())
                if not (gap <= allowed).all():
                    raise ArithmeticError(f"{weight.bits} bits times {batch} rows of {dtype} is outside the bound")

    return check


def _check_decode(device: str) -> None:
    for weight in samples():
        last, cols = len(weight.codes), weight.shape[1]
        first = max(CHUNK, weight.group_size)
        for blocks, columns in (((0, last), (0, cols)), ((1, last), (first, cols))):
            for dtype in NATIVE_DTYPES:
                asked = (weight.to(device), blocks, columns, dtype)
                if not torch.equal(decode_native(*asked), _decode_reference(*asked)):
                    raise ArithmeticError(f"a tile of {weight.bits} bits differs from the reference's bits")


PRODUCT = (
    Form("native", product_native, serves_native, _check_product(product_native)),
    Form("tiles", product_tiles, check=_check_product(product_tiles)),
    Form("reference", product_reference),
)
TRANSPOSED = (
    Form("tiles", transposed_tiles, check=_check_product(transposed_tiles, transposed=True)),
    Form("reference", transposed_reference),
)
DECODE = (
    Form("native", decode_native, _native_takes, _check_decode),
    Form("reference", _decode_reference),
)
