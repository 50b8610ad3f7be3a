"""HQQ's half-quadratic rounding as a checkpoint: rounded by the library, and decoded by it on loading.

1. `write` lets the library round every linear layer (Badri and Shaji 2023, Half-Quadratic Quantization: zero points are
   chosen so that the weights' error is sparse; no data) with its defaults, and keeps what a layer needs: packed codes,
   and a float16 scale and fractional zero point a group.
2. The embedding stays bf16 or goes to int8 rows (`packed.int8_rows`' numbers, handed in by the caller).
3. `from_pretrained` decodes every layer with the library's own `Quantizer` into a dense model.

transformers 5.17 lists HQQ and refuses it ("not available yet"), to compress and to load; what the library saves itself
is pickled, or in safetensors that only transformers would read. Hence this file. The library's tensors that repeat its
settings, 17 a layer, are left out: the configuration holds them once. What it does not do: compute with packed weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

METHOD = "hqq"
WEIGHTS = "model.safetensors"
KEPT = ("W_q", "scale", "zero")


def is_one(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    path = Path(folder) / "config.json"
    return path.is_file() and _settings(json.loads(path.read_text())).get("quant_method") == METHOD


def write(
    model: PreTrainedModel, layers: list[str], folder: Path, *, bits: int, group_size: int, others: dict[str, Tensor]
) -> None:
    """Fill `folder` with the model, its named linear layers rounded by HQQ, everything else as `others` has it."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    how = BaseQuantizeConfig(nbits=bits, group_size=group_size)
    axis = how["weight_quant_params"]["axis"]
    tensors = dict(others)
    for name in layers:
        made = HQQLinear(model.get_submodule(name), how, del_orig=False, compute_dtype=torch.float16, device="cpu")
        parts = {"W_q": made.W_q.data, "scale": made.meta["scale"], "zero": made.meta["zero"]}
        tensors |= {f"{name}.{key}": value.detach().contiguous() for key, value in parts.items()}
    save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config["quantization_config"] = {"quant_method": METHOD, "nbits": bits, "group_size": group_size, "axis": axis}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def from_pretrained(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The dense model of a checkpoint. Raises ValueError for a tensor that is missing, naming it."""
    config = AutoConfig.from_pretrained(folder)
    settings, _ = config.quantization_config, delattr(config, "quantization_config")
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are replaced
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = load_file(Path(folder) / WEIGHTS)
    found = {}
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.W_q" in tensors:
            parts = {key: tensors[f"{layer}.{key}"] for key in KEPT}
            found[name] = _decoded(parts, settings, parameter.shape).to(dtype)
        elif f"{name}_scale" in tensors:
            found[name] = tensors[name].to(dtype) * tensors[f"{name}_scale"].to(dtype)
        elif name in tensors:
            found[name] = tensors[name]
        else:
            raise ValueError(f"{folder} has no tensor for {name}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name])
    return model


def _decoded(parts: dict[str, Tensor], settings: dict, shape: torch.Size) -> Tensor:
    from hqq.core.quantize import Quantizer

    packing = Quantizer.bit_to_packing[settings["nbits"]]
    about = {key: settings[key] for key in ("nbits", "group_size", "axis")} | {"shape": shape, "packing": packing}
    about |= {"view_as_float": False, "compute_dtype": torch.float16, "scale": parts["scale"], "zero": parts["zero"]}
    return Quantizer.dequantize(parts["W_q"], about)


def _settings(config: dict) -> dict:
    return config.get("quantization_config") or {}
