"""Compressed-tensors checkpoints: rounded layers written, read back, and exchanged in place.

Linear layers are `pack-quantized`: codes packed densely into int32 words, a bf16 scale and (asymmetric) a packed zero
point a group; layers of one grid form one group of the configuration, listed by name. The embedding may be
`int-quantized`: int8 codes under its own name with a scale a row. A tied embedding is stored once: the head shares its
codes and repeats the scales. transformers and vLLM load such a file without this package, unless the embedding is
packed as the linear layers are (it has no tensor called `weight` then), which `stored` reads.

- `pack` makes a checkpoint of a model and its rounded layers.
- `packed_layers` reads every `pack-quantized` layer back, whoever rounded it: llmcompressor's rtn, gptq and awq write
  what `pack` writes. Bits, group size and symmetry follow from the tensors' shapes: each layer keeps its own grid.
- `replace_layers` copies an artefact with other numbers in the slots that are there: name, shape and type of every
  tensor stay, hence so do the bytes and whatever reads the file.
- `replace_embedding` rounds the embedding of a library's checkpoint to int8 rows. In a small model the embedding is
  half of the compressed file; at equal bytes only files with the same embedding compare fairly.

Source: the format of compressed-tensors 0.19, whose own functions pack and unpack.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from jaxtyping import BFloat16, Float, Int8
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from avalab.kernels.formats import Grid, Rounded
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.models import loading, stored

INT8_ROWS = "int8-rows"

WEIGHTS = "model.safetensors"

CODES, SCALES, ZEROS = "weight_packed", "weight_scale", "weight_zero_point"


@dataclass(frozen=True)
class Packed:
    """A compressed checkpoint in memory: tensors by name, the model's configuration, and what was measured."""

    tensors: dict[str, Tensor]
    config: dict
    generation: GenerationConfig | None
    measured: dict

    def save_pretrained(self, folder: Path) -> None:
        """Write model.safetensors and config.json."""
        _save(self.tensors, self.config, Path(folder))
        if self.generation is not None:
            self.generation.save_pretrained(folder)


def pack_model(model: PreTrainedModel, layers: dict[str, Rounded], *, int8_rows_of: str = "", measured: dict) -> Packed:
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
        kind, grid = stored.PACKED_EMBEDDING if name == embedding else part.grid.name, part.grid
        scheme = _scheme(
            "pack-quantized",
            [],
            num_bits=grid.bits,
            symmetric=grid.symmetric,
            strategy="group",
            group_size=grid.group_size,
        )
        groups.setdefault(kind, scheme)["targets"].append(name)
    if int8_rows_of:
        readers = [int8_rows_of, *([head] if tied else [])]
        tensors |= _int8_tensors(tensors[f"{int8_rows_of}.weight"], readers)
        groups[INT8_ROWS] = _row_scheme(readers)
    config = loading.configuration(model)
    config["quantization_config"] = _quantization(groups, ignore=[] if int8_rows_of and tied else [head])
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    return Packed(kept, config, model.generation_config, measured)


def packed_layers(artifact: Artifact) -> dict[str, Rounded]:
    """The packed linear layers by qualified name, in the model's order of names.

    Raises ValueError for an artefact that has none, naming its format.
    """
    files = sorted(artifact.path.glob("*.safetensors"))
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    embedding = stored.packed_embedding_name(artifact.path)
    names = {name.removesuffix(f".{CODES}") for name in tensors if name.endswith(f".{CODES}")} - {embedding}
    if not names:
        raise InputError(
            f"{artifact.name} is in format {artifact.format!r} and holds no packed layers; "
            "training through the rounding starts from rtn, gptq, awq or ava"
        )

    def in_order(name: str) -> list[tuple[int, str]]:  # layer 2 before layer 10
        return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

    return {name: _rounded(name, tensors) for name in sorted(names, key=in_order)}


def replace_layers(
    source: Artifact, folder: Path, layers: dict[str, Rounded], *, others: dict[str, Tensor] | None = None
) -> None:
    """Fill `folder` with the source's files, the named layers and other tensors exchanged.

    Raises ValueError for a tensor that the source does not have, or has in another shape or type.
    """
    fresh = {f"{name}.{key}": t for name, part in layers.items() for key, t in packed_tensors(part).items()}
    fresh |= others or {}
    for path in sorted(p for p in source.path.iterdir() if p.is_file() and p.name != artifacts.CARD):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
            continue
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        tensors = load_file(path)
        for name in tensors.keys() & fresh.keys():
            new, old = fresh.pop(name), tensors[name]
            if new.shape != old.shape or new.dtype != old.dtype:
                raise InputError(
                    f"{name} is {tuple(old.shape)} of {old.dtype} in the file, not {tuple(new.shape)} of {new.dtype}: "
                    "training may not change the bytes"
                )
            tensors[name] = new.detach().cpu().contiguous()
        save_file(tensors, folder / path.name, metadata=about)
    if fresh:
        raise InputError(f"{source.name} has no tensor {sorted(fresh)[0]}; only what is there can be replaced")


def replace_embedding(folder: Path) -> None:
    """Round the embedding of the checkpoint in `folder` to int8 rows; linear layers keep their bits.

    Raises ValueError for a checkpoint that is not of compressed-tensors, or whose embedding is not plain.
    """
    config = json.loads((folder / "config.json").read_text())
    quantised = config.get("quantization_config") or {}
    if quantised.get("quant_method") != "compressed-tensors":
        raise InputError(f"{folder.name} is {quantised.get('quant_method', 'dense')}; needed is compressed-tensors")
    tensors = load_file(folder / WEIGHTS)
    found = [name.removesuffix(".weight") for name in tensors if name.endswith("embed_tokens.weight")]
    if len(found) != 1 or not tensors[f"{found[0]}.weight"].is_floating_point():
        raise InputError(f"{folder.name} has no plain embedding in {WEIGHTS}; found {', '.join(found) or 'none'}")
    readers = found + (["lm_head"] if config.get("tie_word_embeddings", True) else [])
    tensors |= _int8_tensors(tensors[f"{found[0]}.weight"], readers)
    groups = {name: {"format": quantised["format"]} | group for name, group in quantised["config_groups"].items()}
    config["quantization_config"] = quantised | {
        "format": "mixed-precision",
        "config_groups": groups | {"embedding": _row_scheme(readers)},
        "ignore": [name for name in quantised.get("ignore", []) if name not in readers],
    }
    _save(dict(sorted(tensors.items())), config, folder)


def packed_tensors(rounded: Rounded) -> dict[str, Tensor]:
    """A layer's tensors by the names that compressed-tensors gives them."""
    bits = rounded.grid.bits
    found = {
        CODES: pack_to_int32(rounded.codes, bits),
        SCALES: rounded.scales.bfloat16(),
        "weight_shape": torch.tensor(rounded.codes.shape),
    }
    if not rounded.grid.symmetric:
        found[ZEROS] = pack_to_int32(rounded.zero_points, bits, packed_dim=0).contiguous()
    return found


def packed_layer_bytes(rows: int, columns: int, grid: Grid) -> int:
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


def int8_rows_bytes(table: Tensor, *, tied: bool) -> int:
    """Bytes of a table in int8 rows; a tied head repeats the scales."""
    return table.numel() + 2 * len(table) * (2 if tied else 1)


def _int8_tensors(table: Tensor, readers: list[str]) -> dict[str, Tensor]:
    """Codes under the name of the first reader, and scales for each: a tied head shares the codes."""
    codes, scales = int8_rows(table)
    return {f"{readers[0]}.weight": codes} | {f"{name}.{SCALES}": scales.clone() for name in readers}


def _save(tensors: dict[str, Tensor], config: dict, folder: Path) -> None:
    fresh = folder / f"{WEIGHTS}.new"  # renamed when whole: the tensors may be read from the file that it replaces
    save_file(tensors, fresh, metadata={"format": "pt"})
    fresh.replace(folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _row_scheme(readers: list[str]) -> dict:
    return _scheme("int-quantized", readers, num_bits=8, symmetric=True, strategy="channel")


def _scheme(format: str, targets: list[str], **weights: object) -> dict:
    shared = {"type": "int", "dynamic": False, "observer": "memoryless_minmax"}
    return {"format": format, "targets": targets, "weights": shared | weights}


def _quantization(groups: dict[str, dict], *, ignore: list[str]) -> dict:
    formats = {group["format"] for group in groups.values()}
    named = {
        name if name == stored.PACKED_EMBEDDING else f"group_{at}": group
        for at, (name, group) in enumerate(groups.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": named,
        "ignore": ignore,
        "version": compressed_tensors.__version__,
    }


def _rounded(name: str, tensors: dict[str, Tensor]) -> Rounded:
    packed, scales = tensors[f"{name}.{CODES}"], tensors[f"{name}.{SCALES}"]
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    groups, bits = scales.shape[1], packed.shape[1] * 32 // columns
    zeros = tensors.get(f"{name}.{ZEROS}")
    grid = Grid(bits, columns // groups, symmetric=zeros is None)
    codes = unpack_from_int32(packed, bits, (rows, columns))
    whole = codes.new_zeros(rows, groups)
    if zeros is not None:
        whole = unpack_from_int32(zeros, bits, (rows, groups), packed_dim=0)
    return Rounded(grid, codes.contiguous(), scales, whole.contiguous())
