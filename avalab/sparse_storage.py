"""What zeros save on disk: a model file in which pruned layers keep only what is left of them.

| layout | of a layer with rows x cols weights | bytes |
|---|---|---|
| `bitmask` | one bit a weight, the kept ones in bf16, row by row | rows x ceil(cols / 8) + 2 x kept |
| `2:4` | two of every four in bf16, and two bits for the place of each | rows x cols x (1/8 + 1) |

The bitmask is that of compressed-tensors' `sparse-bitmask`, which its present version can no longer write; the second
is the layout of sparse tensor cores (Mishra et al. 2021, arXiv 2104.08378). Everything else in the file is as in the
dense one. `write` and `read` are inverse to the bit. A group of four with more zeros than two keeps zeros as values.

Engines here read dense weights: the file saves disk and download, not memory or time.
What it does not do: prune, or multiply.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "model.sparse"  # safetensors inside; another suffix, so that nothing loads it for the weights
LAYOUTS = ("bitmask", "2:4")


def write(tensors: dict[str, Tensor], sparse: list[str], path: Path, *, layout: str = "bitmask") -> int:
    """Write a model's tensors, those named in `sparse` compressed; returns the file's bytes.

    Raises ValueError for an unknown layout, or a tensor that does not have its zeros.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    compress = to_bitmask if layout == "bitmask" else to_two_of_four
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in sparse:
            stored[name] = tensor.detach().cpu().contiguous()
            continue
        try:
            parts = compress(tensor.detach().cpu())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        stored |= {f"{name}.{part}": value for part, value in parts.items()}
    save_file(stored, path, metadata={"layout": layout})
    return path.stat().st_size


def read(path: Path) -> dict[str, Tensor]:
    """The dense tensors of a file that `write` made."""
    stored = load_file(path)
    dense = {name: tensor for name, tensor in stored.items() if not name.endswith((".values", ".mask", ".places"))}
    for name in (key.removesuffix(".values") for key in stored if key.endswith(".values")):
        shape = dense.pop(f"{name}.shape")
        values = stored[f"{name}.values"]
        if f"{name}.mask" in stored:
            dense[name] = from_bitmask(stored[f"{name}.mask"], values, shape)
        else:
            dense[name] = from_two_of_four(stored[f"{name}.places"], values)
    return dense


def predicted_bytes(rows: int, columns: int, kept: int, *, layout: str = "bitmask") -> int:
    """Bytes of one layer's tensors in bf16, the header left out."""
    if layout == "2:4":
        return rows * columns // 8 + rows * columns + 16
    return rows * -(-columns // 8) + 2 * kept + 16


def to_bitmask(weight: Float[Tensor, "rows cols"]) -> dict[str, Tensor]:
    """`mask` (eight columns a byte, the first in the lowest bit), `values` in row order, `shape`."""
    kept = weight != 0
    return {"mask": pack_bits(kept), "values": weight[kept], "shape": torch.tensor(weight.shape)}


def from_bitmask(
    mask: UInt8[Tensor, "rows bytes"], values: Float[Tensor, "kept"], shape: Int[Tensor, "2"]
) -> Float[Tensor, "rows cols"]:
    """The weight that `to_bitmask` took apart."""
    rows, columns = shape.tolist()
    weight = torch.zeros(rows, columns, dtype=values.dtype)
    weight[unpack_bits(mask, columns)] = values
    return weight


def to_two_of_four(weight: Float[Tensor, "rows cols"]) -> dict[str, Tensor]:
    """`values` (two of every four columns), `places` (two bits each, four to a byte), `shape`.

    Raises ValueError for columns that eight does not divide or four neighbours with more than two non-zeros.
    """
    if weight.shape[1] % 8:
        raise ValueError(f"the 2:4 layout needs columns in eights, got {weight.shape[1]}")
    groups = weight.unflatten(1, (-1, 4))
    if ((groups != 0).sum(2) > 2).any():
        raise ValueError("four neighbours hold more than two non-zeros; use the bitmask layout")
    places = (groups != 0).to(torch.uint8).argsort(dim=2, descending=True, stable=True)[..., :2].sort(dim=2).values
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    packed = (places.flatten(1).unflatten(1, (-1, 4)).to(torch.uint8) << shifts).sum(2, dtype=torch.uint8)
    values = groups.gather(2, places).flatten(1).contiguous()
    return {"values": values, "places": packed, "shape": torch.tensor(weight.shape)}


def from_two_of_four(
    places: UInt8[Tensor, "rows bytes"], values: Float[Tensor, "rows half"]
) -> Float[Tensor, "rows cols"]:
    """The weight that `to_two_of_four` took apart."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    index = ((places[..., None] >> shifts) & 3).flatten(1).unflatten(1, (-1, 2)).long()
    groups = torch.zeros(*index.shape[:2], 4, dtype=values.dtype)
    return groups.scatter_(2, index, values.unflatten(1, (-1, 2))).flatten(1)


def pack_bits(mask: Bool[Tensor, "rows cols"]) -> UInt8[Tensor, "rows bytes"]:
    """Eight columns a byte, the first in the lowest bit; the last byte of a row is filled up with zeros."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, "rows bytes"], columns: int) -> Bool[Tensor, "rows cols"]:
    """The mask that `pack_bits` packed."""
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :columns].bool()
