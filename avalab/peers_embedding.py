"""An int8 embedding for a compressed-tensors checkpoint whose library leaves the embedding in bf16.

In a small model the embedding is half of the compressed file. A library that cannot round it spends bytes that another
one puts into its linear layers; comparing at equal bytes is only fair with the same embedding. The rows are rounded as
`packing` does it (symmetric, a bf16 scale a row); a tied head shares the codes. Linear layers are copied bit by bit.

What it does not do: change a linear layer, or read checkpoints of several files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from avalab import packing
from avalab.artifacts import CARD

WEIGHTS = "model.safetensors"


def write(source: Path, target: Path) -> None:
    """Fill `target` with the checkpoint in `source`, its embedding in int8.

    Raises ValueError for a checkpoint that is not of compressed-tensors, or whose embedding is not plain.
    """
    config = json.loads((source / "config.json").read_text())
    quantised = config.get("quantization_config") or {}
    if quantised.get("quant_method") != "compressed-tensors":
        raise ValueError(f"{source.name} is {quantised.get('quant_method', 'dense')}; needed is compressed-tensors")
    tensors = load_file(source / WEIGHTS)
    embedding = _embedding(tensors, source)
    readers = [embedding] + (["lm_head"] if config.get("tie_word_embeddings", True) else [])
    codes, scales = packing.int8_rows(tensors[f"{embedding}.weight"])
    tensors |= {f"{embedding}.weight": codes} | {f"{name}.weight_scale": scales.clone() for name in readers}
    config["quantization_config"] = _with_rows(quantised, readers)
    for file in source.iterdir():
        if file.name not in (WEIGHTS, "config.json", CARD):
            shutil.copyfile(file, target / file.name)
    save_file(dict(sorted(tensors.items())), target / WEIGHTS, metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _embedding(tensors: dict, source: Path) -> str:
    found = [name.removesuffix(".weight") for name in tensors if name.endswith("embed_tokens.weight")]
    if len(found) != 1 or not tensors[f"{found[0]}.weight"].is_floating_point():
        raise ValueError(f"{source.name} has no plain embedding in {WEIGHTS}; found {', '.join(found) or 'none'}")
    return found[0]


def _with_rows(quantised: dict, readers: list[str]) -> dict:
    """The configuration with one group more; `readers` are no longer ignored."""
    how = {"num_bits": 8, "symmetric": True, "strategy": "channel", "type": "int", "dynamic": False}
    rows = {"format": "int-quantized", "targets": readers, "weights": how | {"observer": "memoryless_minmax"}}
    groups = {name: {"format": quantised["format"]} | group for name, group in quantised["config_groups"].items()}
    ignore = [name for name in quantised.get("ignore", []) if name not in readers]
    about = {"format": "mixed-precision", "config_groups": groups | {"embedding": rows}, "ignore": ignore}
    return quantised | about
