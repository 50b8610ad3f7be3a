"""An embedding below 8 bits in a compressed-tensors checkpoint: found, decoded and put in place while a model loads.

The checkpoint keeps such an embedding as it keeps a packed linear layer: codes in int32 words, a bf16 scale and packed
zero point a row and group, and a group of its own in the configuration. That is a proper compressed-tensors file, but
transformers 5.17 looks for a tensor called `weight` in every embedding and refuses the folder, and so does vLLM: only
this package loads it. (`engines.gguf` with the block type `kept` turns it into a file that others read.)

1. The group is taken out of the configuration that transformers sees; it loads everything else.
2. What it then misses has to be the embedding (and a head tied to it), and nothing more.
3. The decoded rows, integers less zero points times scales, each in bf16, take the place; a tied head shares them.

What it does not do: choose, round or pack (see `ava_targets`, `packing`), or keep the rows packed in memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

GROUP = "packed_embedding"  # its name among the configuration's groups
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
CHUNK_ROWS = 16384  # unpacked at a time


def name_in(folder: Path) -> str:
    """The packed embedding's name in a folder, or nothing where there is none."""
    path = Path(folder) / "config.json"
    groups = (_quantization(json.loads(path.read_text())) if path.is_file() else {}).get("config_groups", {})
    return groups[GROUP]["targets"][0] if GROUP in groups else ""


def from_pretrained(folder: Path, **options) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` that knows packed embeddings; without one it is just that.

    Raises ValueError when the folder lacks other tensors than the embedding, naming the first.
    """
    name = name_in(folder)
    if not name:
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    config = AutoConfig.from_pretrained(folder)
    others = {key: group for key, group in config.quantization_config["config_groups"].items() if key != GROUP}
    config.quantization_config = config.quantization_config | {"config_groups": others}
    if not others:
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):  # missing weights are drawn before they are replaced
        model, told = AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **options)
    table = model.get_input_embeddings()
    filled = {n for n, m in model.named_modules() if getattr(m, "weight", None) is table.weight}
    astray = sorted(set(told["missing_keys"]) - {f"{n}.weight" for n in filled})
    if astray or name not in filled:
        raise ValueError(f"{folder} lacks {', '.join(astray[:1]) or name}: nothing else than the embedding is packed")
    table.weight.data = decode(folder, name, table.weight.dtype).to(table.weight.device)
    return model


def decode(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "rows cols"]:
    """The embedding's values. Raises ValueError for tensors that are not there, naming the folder."""
    parts = _tensors(folder, name)
    rows, columns = parts["weight_shape"].tolist()
    scales = parts["weight_scale"].to(dtype)
    bits = parts["weight_packed"].shape[1] * 32 // columns
    zeros = _unpacked(parts["weight_zero_point"], bits, scales.shape, along=0) if "weight_zero_point" in parts else 0
    zeros = torch.zeros_like(scales) + zeros
    found = torch.empty(rows, columns, dtype=dtype)
    for start in range(0, rows, CHUNK_ROWS):
        part = slice(start, min(start + CHUNK_ROWS, rows))
        codes = _unpacked(parts["weight_packed"][part], bits, (part.stop - start, columns), along=1)
        levels = codes.unflatten(1, (scales.shape[1], -1)).to(dtype) - zeros[part, :, None]
        found[part] = (levels * scales[part, :, None]).flatten(1)
    return found


def _unpacked(words: Tensor, bits: int, shape: tuple[int, ...], *, along: int) -> Tensor:
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    return unpack_from_int32(words, bits, torch.Size(shape), packed_dim=along)


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            found |= {part: file.get_tensor(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in names}
    if not {"weight_packed", "weight_scale", "weight_shape"} <= found.keys():
        raise ValueError(f"{folder} says that {name} is packed, and holds no such tensors")
    return found


def _quantization(config: dict) -> dict:
    return config.get("quantization_config") or {}
