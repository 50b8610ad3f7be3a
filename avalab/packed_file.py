"""Packed layers out of a compressed-tensors checkpoint, and changed ones back into a file of exactly as many bytes.

`read` unpacks every `pack-quantized` layer into codes, scales and zero points (`numerics.Rounded`), whoever rounded it:
llmcompressor's rtn, gptq and awq write what `packing` writes. Bits, group size and symmetry follow from the tensors'
shapes, so that each layer keeps its own grid.

`write` copies an artefact's folder and puts other numbers into the slots that are there: name, shape and type of every
tensor stay, hence so do the bytes and whatever reads the file. A packed embedding is one of the tensors that stay.

Source: the format of compressed-tensors 0.19, whose own functions pack and unpack.
What it does not do: add, drop or re-shape tensors; other formats (bitsandbytes, GGUF).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from avalab import artifacts, packed_embedding
from avalab.artifacts import Artifact
from avalab.numerics import Grid, Rounded
from avalab.packing import packed_tensors

CODES, SCALES, ZEROS = "weight_packed", "weight_scale", "weight_zero_point"


def read(artifact: Artifact) -> dict[str, Rounded]:
    """The packed linear layers by qualified name, in the model's order of names.

    Raises ValueError for an artefact that has none, naming its format.
    """
    tensors = {name: tensor for path in _files(artifact.path) for name, tensor in load_file(path).items()}
    embedding = packed_embedding.name_in(artifact.path)
    names = [name.removesuffix(f".{CODES}") for name in tensors if name.endswith(f".{CODES}")]
    names = [name for name in names if name != embedding]
    if not names:
        raise ValueError(
            f"{artifact.name} is in format {artifact.format!r} and holds no packed layers; "
            "training through the rounding starts from rtn, gptq, awq or ava"
        )
    return {name: _rounded(name, tensors) for name in sorted(names, key=_in_order)}


def write(
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
            tensors[name] = _fitting(name, fresh.pop(name), tensors[name])
        save_file(tensors, folder / path.name, metadata=about)
    if fresh:
        raise ValueError(f"{source.name} has no tensor {sorted(fresh)[0]}; only what is there can be replaced")


def _fitting(name: str, new: Tensor, old: Tensor) -> Tensor:
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"{name} is {tuple(old.shape)} of {old.dtype} in the file, not {tuple(new.shape)} of {new.dtype}: "
            "training may not change the bytes"
        )
    return new.detach().cpu().contiguous()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


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
