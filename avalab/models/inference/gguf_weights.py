"""Weights of a GGUF file, packed as they are, in the place of the decoded ones of a model that was read from it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from avalab.kernels.packed import blocks
from avalab.kernels.packed.weight import PackedWeight
from avalab.lab.errors import InputError
from avalab.models import gguf_layout
from avalab.models.inference import layers


def apply_packed_gguf(model: PreTrainedModel, file: Path) -> int:
    """Put packed layers in the place of linear layers and embedding, in place; how many.

    Layers of other types than `blocks.takes`, and models of a family that `gguf_layout` does not know, stay as they
    are.
    """
    config = model.config
    if config.model_type not in gguf_layout.FAMILIES or gguf_layout.FAMILIES[config.model_type].turned:
        return 0
    stored, names, dtype = _stored_bytes(file), gguf_layout.tensor_namer(config), model.dtype
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    packed_table = None
    for name, module in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear or m is table]:
        if tied and module is head:
            continue
        packed = _packed(f"{name}.weight", module.weight, stored, names, config)
        packed_table = packed if module is table else packed_table
        if packed is not None:
            layers.replace_layer(model, name, packed, dtype)
    if tied and packed_table is not None:
        at = next(name for name, module in model.named_modules() if module is head)
        layers.replace_layer(model, at, packed_table, dtype)
    return len(layers.packed_layers(model))


def _packed(name: str, weight: Tensor, stored: dict, names: object, config: object) -> PackedWeight | None:
    try:
        kind, data = stored[names(name)]
    except (InputError, KeyError):
        return None
    if not blocks.takes(kind, weight.shape[1]) or len(data) != weight.shape[0]:
        return None
    # Where each of the model's rows stands in the file.
    order = gguf_layout.in_file_order(name, torch.arange(len(data)), config).argsort()
    return blocks.from_block_bytes(torch.from_numpy(data.copy())[order], kind)


def _stored_bytes(file: Path) -> dict:
    """Block type and bytes of the file's matrices, by the file's names."""
    from gguf import GGUFReader

    return {t.name: (t.tensor_type.name.lower(), t.data) for t in GGUFReader(file).tensors if t.data.ndim == 2}
