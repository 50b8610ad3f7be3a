"""Rounded layers as a compressed-tensors checkpoint, which transformers and vLLM load without this package.

Linear layers are `pack-quantized`: codes packed densely into int32 words, a bf16 scale and (asymmetric) a packed zero
point a group; layers of one grid form one group of the configuration, listed by name. The embedding may be
`int-quantized`: int8 codes under its own name with a scale a row. A tied embedding is stored once: the head shares its
codes and repeats the scales.

An embedding among the rounded layers is packed as they are, in a group of its own. transformers and vLLM refuse such a
file (the embedding has no tensor called `weight`); `models.load` reads it through `packed_embedding`.

Source: the format of compressed-tensors 0.19, whose own functions pack. What it does not do: choose or round.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from jaxtyping import BFloat16, Float, Int8
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from avalab.numerics import Grid, Rounded
from avalab.packed_embedding import GROUP

INT8_ROWS = "int8-rows"


@dataclass(frozen=True)
class Packed:
    """A compressed checkpoint in memory: tensors by name, the model's configuration, and what was measured."""

    tensors: dict[str, Tensor]
    config: dict
    generation: GenerationConfig | None
    measured: dict

    def save_pretrained(self, folder: Path) -> None:
        """Write model.safetensors and config.json."""
        save_file(self.tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        if self.generation is not None:
            self.generation.save_pretrained(folder)


def pack(model: PreTrainedModel, layers: dict[str, Rounded], *, int8_rows_of: str = "", measured: dict) -> Packed:
    """The checkpoint of a model whose `layers` were rounded and, if named, whose embedding goes to int8 rows.

    `layers` are linear ones and may hold the embedding, too, which only this package then loads.
    """
    tied = bool(model.config.tie_word_embeddings)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    tensors = {n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in layers}
    if tied:
        tensors.pop(f"{head}.weight", None)
    groups: dict[str, dict] = {}
    for name, part in layers.items():
        tensors |= {f"{name}.{key}": value for key, value in packed_tensors(part).items()}
        kind = GROUP if name == embedding else part.grid.name
        groups.setdefault(kind, _group(part.grid))["targets"].append(name)
    if int8_rows_of:
        readers = [int8_rows_of, *([head] if tied else [])]
        codes, scales = int8_rows(tensors[f"{int8_rows_of}.weight"])
        tensors |= {f"{int8_rows_of}.weight": codes} | {f"{name}.weight_scale": scales.clone() for name in readers}
        groups[INT8_ROWS] = _scheme("int-quantized", readers, num_bits=8, symmetric=True, strategy="channel")
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config["quantization_config"] = _quantization(groups, ignore=[] if int8_rows_of and tied else [head])
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    return Packed(kept, config, model.generation_config, measured)


def packed_tensors(rounded: Rounded) -> dict[str, Tensor]:
    """A layer's tensors by the names that compressed-tensors gives them."""
    bits = rounded.grid.bits
    found = {
        "weight_packed": pack_to_int32(rounded.codes, bits),
        "weight_scale": rounded.scales.bfloat16(),
        "weight_shape": torch.tensor(rounded.codes.shape),
    }
    if not rounded.grid.symmetric:
        found["weight_zero_point"] = pack_to_int32(rounded.zero_points, bits, packed_dim=0).contiguous()
    return found


def stored_bytes(rows: int, columns: int, grid: Grid) -> int:
    """Bytes of a packed layer's four tensors."""
    groups = columns // grid.group_size
    packed = rows * ceil(columns * grid.bits / 32) * 4
    zeros = 0 if grid.symmetric else ceil(rows * grid.bits / 32) * 4 * groups
    return packed + zeros + rows * groups * 2 + 16


def int8_rows(
    table: Float[Tensor, "rows cols"],
) -> tuple[Int8[Tensor, "rows cols"], BFloat16[Tensor, "rows 1"]]:
    """Symmetric int8 codes with one bf16 scale a row."""
    scales = (table.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-8).bfloat16()
    return (table.float() / scales.float()).round().clamp(-127, 127).to(torch.int8), scales


def _group(grid: Grid) -> dict:
    how = {"num_bits": grid.bits, "symmetric": grid.symmetric, "strategy": "group", "group_size": grid.group_size}
    return _scheme("pack-quantized", [], **how)


def _scheme(format: str, targets: list[str], **weights: object) -> dict:
    shared = {"type": "int", "dynamic": False, "observer": "memoryless_minmax"}
    return {"format": format, "targets": targets, "weights": shared | weights}


def _quantization(groups: dict[str, dict], *, ignore: list[str]) -> dict:
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {name if name == GROUP else f"group_{at}": g for at, (name, g) in enumerate(groups.items())},
        "ignore": ignore,
        "version": compressed_tensors.__version__,
    }
