"""A packed weight decoded on a CPU by torch's own operators, to the reference's bits, in few passes over memory.

Two codes of a byte are looked up together in a table of 256 pairs of levels; levels that are consecutive integers are
unpacked by torch's operator for embedding tables of 4 bits. Zero points, scales and minimums then act in place on
float32, whose broadcast operators are vectorised, and one copy rounds to the wanted dtype: an operator that reads one
dtype and writes another costs three times as much.

What it does not do: use native code of other libraries (`library`), or serve a GPU well (`triton_product`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from avalab.kernels.weight import Weight4, group_scales


def decode_by_pairs(weight: Weight4, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
    """`weight.decode`, bit for bit."""
    values = _by_unpacking(weight)
    if values is None:
        values = _by_table(weight).view(-1, weight.group_size)
        if weight.zero_points is not None:
            values.sub_(weight.zero_points.reshape(-1, 1).float())
    values.mul_(group_scales(weight).reshape(-1, 1))
    if weight.minimums is not None:
        values.add_(weight.minimums.reshape(-1, 1).float())
    return values.view(weight.shape).to(dtype)


def _by_unpacking(weight: Weight4) -> Float32[Tensor, "group size"] | None:
    """Integer levels less their zero points, by torch's operator for 4-bit embedding tables; None where it cannot.

    The operator reads a row's codes, the low half of a byte first, then its scale and offset in float16: a group is
    taken for a row, its scale is 1 and its offset, a whole number, exact.
    """
    if weight.device.type != "cpu" or not _ascend(weight.levels):
        return None
    codes, lowest = weight.codes.reshape(-1, weight.group_size // 2), weight.levels[0]
    offsets = lowest.expand(len(codes)) if weight.zero_points is None else lowest - weight.zero_points.reshape(-1)
    facts = torch.stack((torch.ones_like(offsets), offsets), 1).half()
    if not torch.equal(facts[:, 1].float(), offsets.float()):
        return None
    rows = torch.empty(len(codes), codes.shape[1] + 4, dtype=torch.uint8)
    torch.bitwise_or(codes << 4, codes >> 4, out=rows[:, :-4])
    rows[:, -4:] = facts.view(torch.uint8)
    return torch.ops.quantized.embedding_bag_4bit_unpack(rows)


def _ascend(levels: Float32[Tensor, "16"]) -> bool:
    """Whether the levels are consecutive whole numbers, ascending."""
    return torch.equal(levels, torch.arange(16.0) + levels[0].round())


def _by_table(weight: Weight4) -> Float32[Tensor, "value"]:
    """Levels from one table of 256 pairs of them: a byte is looked up once, as 8 bytes.

    A pair of float32 travels as one float64, which `index_select` copies at memory speed without looking inside.
    """
    byte = torch.arange(256, device=weight.device)
    pairs = torch.stack((weight.levels[byte >> 4], weight.levels[byte & 15]), -1).view(torch.float64).view(-1)
    return pairs.index_select(0, weight.codes.reshape(-1).int()).view(torch.float32).view(-1)
