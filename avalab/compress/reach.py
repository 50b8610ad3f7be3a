"""How much of a model a method reaches: the share of its bytes that an artefact stores otherwise than its base.

Methods change linear layers. A family may keep most of its weights elsewhere: GPT-2's layers are transposed (`Conv1D`),
a mixture's experts are stacked in tensors of three dimensions. What is left alone is left in bf16, and a file that was
to be four times smaller is as large as before.

1. Before any work (`refuse_unreachable`): what linear layers hold of the weights inside the blocks. Below half, the
   method is refused, unless the caller takes a part for enough (`partial`); where they hold nothing, always.
2. Of what was written (`of_artifact`): which tensors of the base are still stored in 16 or 32 bits, by the headers of
   the file; the card says so (`reached_share`, and what stayed by `kept`). An artefact that was not reached at all is
   refused. Files of other engines are judged by their size alone, which bounds the share from below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

from safetensors import safe_open
from torch import nn

from avalab.lab.errors import InputError
from avalab.models import checkpoint, sizes

LEAST = 0.5  # of the weights inside the blocks

PLAIN = {"BF16": 2, "F16": 2, "F32": 4}  # bytes of a number that no method has rounded


def refuse_unreachable(
    model: nn.Module, layers: Mapping[str, nn.Linear], what: str, *, partial: bool, remedy: str
) -> None:
    """Raise ValueError where `layers` hold too little of the model's blocks; `what` is the method, for the message.

    `remedy` says how to be content with a part.
    """
    total, others = 0, Counter()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if _in_block(f"{name}.{key}") and parameter.ndim >= 2:
                total += parameter.numel()
                if name not in layers:
                    others[type(module).__name__ + (", stacked" if parameter.ndim > 2 else "")] += parameter.numel()
    share = sum(layer.weight.numel() for layer in layers.values()) / max(1, total)
    if share >= LEAST or (share and partial):
        return
    kind, count = others.most_common(1)[0] if others else ("no blocks of a known form", total)
    raise InputError(
        f"{what} changes linear layers, which hold {share:.0%} of the weights in the blocks of "
        f"{model.config.model_type} ({kind}: {count / max(1, total):.0%}, which would stay as they are); "
        + (f"{remedy}; " if share else "")
        + "`avalab export --to gguf --weights q8_0` takes the whole model where llama.cpp knows its family"
    )


def of_artifact(base: Path, folder: Path) -> dict:
    """What a card says of the reach: `reached_share` of the base's bytes, and `kept`, shares by part that stayed plain.

    Raises ValueError where nothing was reached: the file would be the base once more.
    """
    before = _tensors(base)
    total = sum(before.values())
    if not list(folder.glob("*.safetensors")):
        written = sizes.weight_file_bytes(folder)
        return {"reached_share_at_least": round(max(0.0, 1 - written / total), 4)}
    names = {*before, *checkpoint.skeleton(base).state_dict()}
    kept: Counter[str] = Counter()
    for name, count in _tensors(folder).items():
        if name in names:
            kept[_part(name)] += count
    share = 1 - sum(kept.values()) / total
    if share <= 0:
        raise InputError("nothing of the model was reached: every weight would be stored as before")
    return {"reached_share": round(share, 4), "kept": {part: round(n / total, 4) for part, n in sorted(kept.items())}}


def in_words(measured: Mapping) -> str:
    """`reached 79 % of the weight bytes; embedding 21 % stays in 16 bits`, or "" of a card that says nothing."""
    if "reached_share" not in measured:
        return ""
    stays = [f"{part} {share:.0%}" for part, share in measured.get("kept", {}).items() if share >= 0.005]
    return f"reached {measured['reached_share']:.0%} of the weight bytes" + (
        f"; in 16 bits: {', '.join(stays)}" if stays else ""
    )


def _tensors(folder: Path) -> dict[str, int]:
    """Bytes, in bf16, of the tensors of 16- and 32-bit numbers in a folder's safetensors files, by their headers."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (a file is no dict)
            found |= {n: 2 * prod(part.get_shape()) for n, part in slices.items() if part.get_dtype() in PLAIN}
    return found


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _part(name: str) -> str:
    """The component of a tensor; experts by that name."""
    return "experts" if ".experts." in name else checkpoint.component(name)
