"""A mixed-grid checkpoint of `packed` in GGUF's block types, without rounding again.

A stored weight is a whole number of steps, code less zero point, times the scale of its group. Blocks of 32 weights
hold such numbers as they are; `block_of` takes the smallest type that does:

    Q4_0  steps from -8 to 7           Q4_1  a range of 15 steps in each block (its least one is the block's minimum)
    Q5_0  steps from -16 to 15         Q5_1  a range of 31 steps in each block
    Q8_0  steps from -127 to 127

Scales go from bfloat16 to float16, which holds them unless they are tiny; a minimum, scale times least step, is rounded
to float16, by 2^-11 of itself at most. What it costs: bytes. GGUF has no groups of 64 or 128, and between five and
eight bits nothing but super-blocks of 256, so that grids of 6 and 7 bits take 8.5 bits a weight.

What it does not do: choose grids, or write files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from jaxtyping import Float, Int, UInt8
from safetensors import safe_open
from torch import Tensor

from avalab import gguf_blocks
from avalab.numerics import Encoded

BLOCK = 32
RANGES = (("q4_0", -8, 7), ("q4_1", None, 15), ("q5_0", -16, 15), ("q5_1", None, 31), ("q8_0", -127, 127))
Steps = tuple[Tensor, Tensor]  # whole numbers `rows cols`, scales `rows groups`


def tensors(folder: Path) -> Iterator[tuple[str, Tensor | Steps]]:
    """Every parameter by transformers' name: a dense tensor, or steps and scales. Raises ValueError without such."""
    bits = {target: group["weights"]["num_bits"] for group in _groups(folder) for target in group["targets"]}
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for name in sorted(names):
            layer, _, kind = name.rpartition(".")
            if kind == "weight_packed":
                parts = {k: file.get_tensor(f"{layer}.{k}") for k in PARTS if f"{layer}.{k}" in names}
                yield f"{layer}.weight", _unpacked(parts, bits[layer])
            elif kind == "weight" and f"{name}_scale" in names:
                yield name, (file.get_tensor(name).int(), file.get_tensor(f"{name}_scale"))
            elif kind not in (*PARTS, "weight_packed"):
                yield name, file.get_tensor(name)


PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def _groups(folder: Path) -> list[dict]:
    found = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    formats = {group.get("format") for group in found.get("config_groups", {}).values()}
    if not formats or formats - {"pack-quantized", "int-quantized"}:
        raise ValueError(f"{folder.name} holds no packed integers to keep; export it with a block type instead")
    return list(found["config_groups"].values())


def _unpacked(parts: dict[str, Tensor], bits: int) -> Steps:
    rows, columns = parts["weight_shape"].tolist()
    scales = parts["weight_scale"]
    steps = unpack_from_int32(parts["weight_packed"], bits, torch.Size((rows, columns))).int()
    if "weight_zero_point" in parts:
        zeros = unpack_from_int32(parts["weight_zero_point"], bits, torch.Size(scales.shape), packed_dim=0).int()
        steps -= zeros.repeat_interleave(columns // scales.shape[1], dim=1)
    return steps, scales


def block_of(steps: Int[Tensor, "rows cols"]) -> str:
    """The smallest block type that holds these steps, or f16 for none."""
    if steps.shape[1] % BLOCK:
        return "f16"
    blocks = steps.view(-1, BLOCK)
    spread = int((blocks.amax(1) - blocks.amin(1)).max())
    for name, low, high in RANGES:
        if spread <= high if low is None else low <= int(steps.min()) and int(steps.max()) <= high:
            return name
    return "f16"


def encoded(
    steps: Int[Tensor, "rows cols"], scales: Float[Tensor, "rows groups"], block: str
) -> UInt8[Tensor, "rows bytes"] | Float[Tensor, "rows cols"]:
    """The bytes of steps and scales in a block type that `block_of` found; for f16 the values."""
    if block == "f16":
        return (steps * scales.float().repeat_interleave(steps.shape[1] // scales.shape[1], dim=1)).half()
    each = scales.half().repeat_interleave(steps.shape[1] // BLOCK // scales.shape[1], dim=1).flatten()
    format, blocks = gguf_blocks.FORMATS[block], steps.view(-1, BLOCK)
    least = blocks.amin(1) if format.offset else None
    codes = blocks if least is None else blocks - least[:, None]
    minimums = None if least is None else (least * each.float()).half()
    dtype = torch.int8 if format.low < 0 else torch.uint8
    return gguf_blocks.pack(Encoded(format, codes.to(dtype).view(steps.shape), each, minimums))
