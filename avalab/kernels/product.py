"""Activations times a 4-bit weight: y = x W^T, and its transpose g W, with W decoded a tile at a time.

Forms of the product, best first:
- `library`: few rows of activations on a CPU and a weight from `library.prepare`, at the speed of reading the codes;
- `triton`: up to `triton_product.FEW_ROWS` rows on a GPU, decoding inside the product;
- `tiles`: W is decoded to the activations' dtype some 2^20 weights at a time, into memory that stays in cache, and the
  matrix library (oneDNN, cuBLAS) multiplies the tile. Decoding costs the same for any number of activations: this is
  the form for prefill and training. A tile holds whole rows (for x W^T) or whole columns (for g W): no sum is split;
- `reference`: decode everything, multiply. The definition.
The decoding of a tile has forms of its own (`DECODE`), all bit-equal to the reference.

What it does not do: gradients (`lora`), quantize the activations, or use more threads than torch was given.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from avalab.kernels.decoding import decode_by_pairs
from avalab.kernels.dispatch import Form, choose
from avalab.kernels.library import decode_library, product_library, serves_decode, serves_product
from avalab.kernels.product_checks import decode_check, product_check, transposed_check
from avalab.kernels.weight import DTYPES, Weight4, decode, take

TILE_WEIGHTS = {"cpu": 2**20, "cuda": 2**24}  # a few MiB of cache; few launches
PANEL_COLS = 256  # fewer columns a panel make the matrix library slow


def multiply(x: Float[Tensor, "*batch cols"], weight: Weight4) -> Float[Tensor, "*batch rows"]:
    """The product: x times the transposed weight, in x's dtype and on its device, by the best form there is.

    Raises ValueError for a dtype or device without a form, columns that differ, or an x that wants a gradient.
    """
    _check(x, weight, weight.shape[1], "columns")
    return choose("product", PRODUCT, x.device, x, weight).run(x, weight)


def multiply_transposed(g: Float[Tensor, "*batch rows"], weight: Weight4) -> Float[Tensor, "*batch cols"]:
    """g times the weight: the gradient of `product` with respect to x. Raises what `multiply` raises."""
    _check(g, weight, weight.shape[0], "rows")
    return choose("product_transposed", TRANSPOSED, g.device, g, weight).run(g, weight)


def _check(x: Tensor, weight: Weight4, width: int, name: str) -> None:
    if x.shape[-1] != width:
        raise ValueError(
            f"activations of {x.shape[-1]} values do not match the {width} {name} of a {weight.shape} weight"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"activations are {x.dtype}; the product takes {', '.join(str(d) for d in DTYPES)}")
    if x.device != weight.device:
        raise ValueError(f"activations are on {x.device}, the weight on {weight.device}; move one (Weight4.to)")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("activations want a gradient, which this product does not give; use avalab.kernels.linear")


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
    return choose("decode", DECODE, weight.device, weight, dtype).run(weight, dtype)


# --- a GPU's kernels, imported only where there is one -----------------------------------------------------------


def product_triton(x: Float[Tensor, "*batch cols"], weight: Weight4) -> Float[Tensor, "*batch rows"]:
    """The product of a few rows of activations, decoded inside it; see `triton_product`."""
    from avalab.kernels import triton_product

    return triton_product.product(x, weight)


def decode_triton(weight: Weight4, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
    """The decoded weight in one pass; see `triton_product`."""
    from avalab.kernels import triton_product

    return triton_product.decode(weight, dtype)


def _serves_triton(x: Tensor, weight: Weight4) -> bool:
    if x.device.type != "cuda" or x.dtype == torch.float64:
        return False
    from avalab.kernels import triton_product

    return triton_product.serves(weight) and 0 < x.numel() <= triton_product.FEW_ROWS * x.shape[-1]


def _serves_triton_decode(weight: Weight4, dtype: torch.dtype) -> bool:
    return weight.device.type == "cuda" and dtype != torch.float64


def _any(*_arguments) -> bool:
    return True


PRODUCT = (
    Form("library", product_library, serves_product, product_check(product_library, 1, 3, 16)),
    Form("triton", product_triton, _serves_triton, product_check(product_triton, 1, 3)),
    Form("tiles", product_tiles, _any, product_check(product_tiles, 5)),
    Form("reference", product_reference, _any),
)
TRANSPOSED = (
    Form("tiles", transposed_tiles, _any, transposed_check(transposed_tiles)),
    Form("reference", transposed_reference, _any),
)
DECODE = (
    Form("library", decode_library, serves_decode, decode_check(decode_library, ("nf4", "nf4_nested"))),
    Form("triton", decode_triton, _serves_triton_decode, decode_check(decode_triton)),
    Form("tiles", decode_by_pairs, _any, decode_check(decode_by_pairs)),
    Form("reference", decode, _any),
)
