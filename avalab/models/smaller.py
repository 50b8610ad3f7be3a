"""A physically smaller model: heads, KV groups, MLP channels, hidden channels or blocks cut out of a Llama-like one.

1. A `Kept` says what stays. Every block loses equally many heads and channels, because a configuration has one number
   for all of them; which ones differs from block to block. Hidden channels are the same everywhere.
2. `save_smaller` slices every tensor by the table of rows and columns below, renumbers the blocks, and writes weights
   and changed configuration: a folder that transformers opens like any other.

A query head is rows of q and columns of o; a KV group is rows of k and v with all its query heads; an MLP channel is
a row of gate and up and a column of down; a hidden channel is a column of what reads the residual stream, a row of
what writes it, and an entry of every norm. Norms then average over the channels that are left, which keeps their
outputs at their size where the channels that go had the usual energy; correcting their gains for what they had
changed nothing.

Mixtures of experts and fused projections are refused, and another width of models that scale embeddings by it (Gemma).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from avalab.lab.errors import InputError
from avalab.models.checkpoint import ATTENTION, MLP

# What a tensor's rows and columns are, by the name of its module.
ROWS = dict.fromkeys(("o_proj", "down_proj"), "hidden") | {
    "q_proj": "heads",
    "k_proj": "kv_heads",
    "v_proj": "kv_heads",
    "gate_proj": "channels",
    "up_proj": "channels",
}

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")  # of the residual stream

COLUMNS = dict.fromkeys(READERS, "hidden") | {"o_proj": "heads", "down_proj": "channels"}


@dataclass(frozen=True)
class Kept:
    """Indices of what stays; None: all. Lists have one entry a block of the original model."""

    heads: list[Int[Tensor, "_"]] | None = None
    kv_heads: list[Int[Tensor, "_"]] | None = None
    channels: list[Int[Tensor, "_"]] | None = None
    hidden: Int[Tensor, "_"] | None = None
    blocks: list[int] | None = None

    @property
    def cuts_inside(self) -> bool:
        """Whether blocks get smaller, not only fewer."""
        return any(part is not None for part in (self.heads, self.kv_heads, self.channels, self.hidden))


@dataclass(frozen=True)
class Sizes:
    """What can be cut, in numbers."""

    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int


def structure_sizes(model: PreTrainedModel, *, inside_blocks: bool = True) -> Sizes:
    """The sizes of a Llama-like model; of another one, too, if nothing is cut inside blocks.

    Raises ValueError naming what a model lacks.
    """
    config, block = model.config, model.base_model.layers[0]
    present = {name.rpartition(".")[2] for name, _ in block.named_modules()}
    if inside_blocks and (missing := [name for name in (*ATTENTION, *MLP) if name not in present]):
        raise InputError(
            f"{config.model_type} blocks have no {', '.join(missing)}; of such models whole layers can be cut, and "
            "weights set to zero"
        )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    blocks = config.num_hidden_layers
    return Sizes(blocks, config.hidden_size, heads, kv_heads, head_dim, config.intermediate_size)


def query_heads(kv_heads: Int[Tensor, "kept"], of: Sizes) -> Int[Tensor, "heads"]:
    """The query heads that share the given KV heads."""
    shared = of.heads // of.kv_heads
    return (kv_heads[:, None] * shared + torch.arange(shared)).flatten()


def channels_of(heads: Int[Tensor, "kept"], head_dim: int) -> Int[Tensor, "channel"]:
    """The rows or columns that belong to whole heads."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def save_smaller(model: PreTrainedModel, kept: Kept, folder: Path) -> None:
    """Write the smaller model's weights and configuration. Raises ValueError for a model it cannot cut."""
    of = structure_sizes(model, inside_blocks=kept.cuts_inside)
    if kept.hidden is not None and "gemma" in (kind := model.config.model_type):
        raise InputError(f"{kind} scales its embeddings by the hidden width, which can therefore not be cut here")
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        block, renamed = _renumbered(name, kept)
        if block == -1:
            continue
        small = _sliced(tensor, name.split(".")[-2], block, kept=kept, of=of)
        tensors[renamed] = small.detach().cpu().contiguous()
    config = configuration(model, kept)
    _refuse_misfits(config, tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def configuration(model: PreTrainedModel, kept: Kept):
    """The model's configuration with the sizes of what is kept."""
    config, of = copy.deepcopy(model.config), structure_sizes(model, inside_blocks=kept.cuts_inside)
    config.architectures = [type(model).__name__]
    if kept.cuts_inside:
        config.head_dim = of.head_dim  # otherwise derived from sizes that change
    if kept.heads is not None:
        config.num_attention_heads = len(kept.heads[0])
    if kept.kv_heads is not None:
        config.num_key_value_heads = len(kept.kv_heads[0])
    if kept.channels is not None:
        config.intermediate_size = len(kept.channels[0])
    if kept.hidden is not None:
        config.hidden_size = len(kept.hidden)
    if kept.blocks is not None:
        for name, value in list(vars(model.config).items()):  # kinds of attention, layers without positions
            of_blocks = isinstance(value, list) and len(value) == of.blocks
            if of_blocks and not name.endswith(("_token_id", "architectures")):
                setattr(config, name, [value[index] for index in kept.blocks])
        config.num_hidden_layers = len(kept.blocks)
    return config


def _refuse_misfits(config: PreTrainedConfig, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError where the family's configuration cannot say what was cut."""
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    for name, tensor in tensors.items():
        if name in expected and expected[name].shape != tensor.shape:
            raise InputError(
                f"a {config.model_type} configuration cannot say what was cut: {name} has {tuple(tensor.shape)} left, "
                f"it means {tuple(expected[name].shape)}; mlp_channels, layers and patterns of zeros remain"
            )


def _renumbered(name: str, kept: Kept) -> tuple[int | None, str]:
    """A tensor's block (None: outside the blocks, -1: of one that goes) and its name in the smaller model."""
    parts = name.split(".")
    if "layers" not in parts:
        return None, name
    at = parts.index("layers") + 1
    block = int(parts[at])
    if kept.blocks is None:
        return block, name
    if block not in kept.blocks:
        return -1, name
    parts[at] = str(kept.blocks.index(block))
    return block, ".".join(parts)


def _sliced(tensor: Tensor, module: str, block: int | None, *, kept: Kept, of: Sizes) -> Tensor:
    kind = "hidden" if module.endswith("norm") else ROWS.get(module)
    if module in ("q_norm", "k_norm"):  # of one head, the same for all, or of all heads (OLMo 2)
        whole = len(tensor) != of.head_dim
        kind = {"q_norm": "heads", "k_norm": "kv_heads"}[module] if whole else None
    rows = _indices(kind, block, kept, of)
    columns = _indices(COLUMNS.get(module), block, kept, of) if tensor.ndim == 2 else None
    tensor = tensor if rows is None else tensor[rows]
    return tensor if columns is None else tensor[:, columns]


def _indices(kind: str | None, block: int | None, kept: Kept, of: Sizes) -> Tensor | None:
    """Which rows or columns of a kind stay; None: all."""
    chosen = getattr(kept, kind) if kind else None
    if chosen is None or kind == "hidden":
        return chosen
    return channels_of(chosen[block], of.head_dim) if kind.endswith("heads") else chosen[block]
