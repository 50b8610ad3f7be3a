"""Low-rank adapters: put into a model, trained fast, shipped in PEFT's format, merged; and training without them.

W x becomes W x + (alpha / rank) B A x with W frozen; A is drawn, B starts at zero, so that the model starts unchanged
(Hu et al. 2021, arXiv 2106.09685, section 4.1). With a 4-bit W this is QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

1. `attach_adapters` lets PEFT put float32 adapters on the chosen layers and freezes the rest.
2. `apply_fused` replaces PEFT's forward pass by `kernels.linear`: base product and low-rank products in the base's
   dtype, adapters rounded to it on the fly, no decoded weight kept for the gradient. `decoded` holds a 4-bit weight
   in bf16 while training: more memory (2 bytes a weight), fewer decodings.
3. `save_adapters` writes what `checkpoint.load_model` puts back onto the base, which must be beside it.
4. `merge_adapters` adds s B A to the dequantised weights and rounds once, to bf16: an ordinary artefact, to be
   quantised again. Merging into 4 bits would round the update away where it is below half a step of the grid.

Without adapters, `apply_wide_weights` trains the linear layers themselves. bf16 has eight bits of precision, so a step
of one thousandth of a weight is rounded away: weights are kept in float32 and rounded on the way into each product, as
mixed-precision training does (Micikevicius et al. 2018, arXiv 1710.03740, section 3.1); `restore_narrow_weights` rounds
once more, to be saved. In bytes a weight: 4, 4 for the gradient and 8 for AdamW, where adapters take 0.2 at rank 16.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from avalab import kernels
from avalab.kernels import Weight4
from avalab.kernels.packed.weight import PackedWeight, decode
from avalab.lab import artifacts, process
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.models import checkpoint, walk
from avalab.models.inference.layers import PackedLinear

ADAPTER = "default"  # PEFT's name for the only one


def attach_adapters(
    model: PreTrainedModel,
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    target_modules: tuple[str, ...] = ("attention", "mlp"),
    seed: int = 0,
) -> None:
    """Put float32 LoRA adapters on the target layers (kinds, globs or names) and freeze everything else.

    Raises ValueError for a rank below 1, a dropout outside [0, 1) or targets that match nothing.
    """
    from peft import LoraConfig

    if rank < 1 or not 0 <= dropout < 1:
        raise InputError(f"rank is {rank}, dropout {dropout}; rank must be at least 1 and dropout in [0, 1)")
    names = walk.select_linear(model, target_modules)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that carry an adapter, by qualified name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def apply_fused_adapters(model: PreTrainedModel, *, decoded: bool = True) -> None:
    """Let every adapter layer without dropout compute through `kernels.linear`; see the module for `decoded`."""
    for layer in adapter_layers(model).values():
        if isinstance(layer.lora_dropout[ADAPTER], nn.Identity):
            layer.forward = partial(_fused, layer, frozen_weight(layer.base_layer, decoded=decoded))


def _fused(layer: nn.Module, weight: Weight4 | PackedWeight | Tensor, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    y = kernels.linear(x, weight, a=a, b=b, scaling=layer.scaling[ADAPTER])
    bias = layer.base_layer.bias
    return y if bias is None else y + bias


def frozen_weight(layer: nn.Module, *, decoded: bool) -> Weight4 | PackedWeight | Tensor:
    """A linear layer's weight ["rows cols"]: dense, or packed where it is stored so and `decoded` is False.

    Raises ValueError for a quantised layer that is not bitsandbytes' 4-bit one.
    """
    if type(layer) is nn.Linear:
        return layer.weight.detach()
    if isinstance(layer, PackedLinear):
        return decode(layer.packed, torch.bfloat16) if decoded else layer.packed
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        raise InputError(f"adapters go on bf16 or bitsandbytes 4-bit layers, not on {type(layer).__name__}")
    packed = {"weight": layer.weight.data, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    weight = kernels.from_bitsandbytes(packed)
    return kernels.decode(weight, torch.bfloat16) if decoded else weight


def save_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter in PEFT's format, without the path of the machine it was trained on."""
    model.peft_config[ADAPTER].base_model_name_or_path = None
    model.peft_config[ADAPTER].inference_mode = True
    process.quiet_libraries()
    model.save_pretrained(folder)


def merge_adapters(adapter: Artifact, *, name: str = "", directory: Path | None = None) -> Artifact:
    """The bf16 artefact of the base with the adapter added in, beside the adapter unless `directory` is given.

    Raises ValueError for an artefact that is no adapter, and what `load_model` raises.
    """
    if adapter.format != "peft":
        raise InputError(f"{adapter.name} is in format {adapter.format!r}; only an adapter can be merged")
    out = (directory or adapter.path.parent) / (name or f"{adapter.name}+merged")

    def fill(folder: Path) -> None:
        model = checkpoint.load_model(checkpoint.base_of(adapter), packed=False)
        if hasattr(model, "hf_quantizer"):
            replace_quantised(model)
        weights = merged_weights(checkpoint.load_model(adapter, packed=False))
        for layer, weight in weights.items():
            walk.linear_layers(model)[layer].weight.data = weight
        checkpoint.save_model(model, checkpoint.load_tokenizer(adapter), folder)

    return artifacts.make_artifact(out, fill, base=adapter, step={"step": "merge", "dtype": "bfloat16"}, format="bf16")


def merged_weights(
    model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Float[Tensor, "rows cols"]]:
    """W + s B A of every adapter layer, summed in float32 and rounded once to `dtype`.

    Raises ValueError for what is more than that: DoRA's magnitudes, biases of adapters, modules trained as a whole.
    """
    merged = {}
    _refuse_other_adapters(model)
    for name, layer in adapter_layers(model).items():
        a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
        weight = frozen_weight(layer.base_layer, decoded=True)
        merged[name] = (weight.float() + layer.scaling[ADAPTER] * (b.float() @ a.float())).to(dtype)
    return merged


def _refuse_other_adapters(model: PreTrainedModel) -> None:
    from peft.utils.other import ModulesToSaveWrapper

    for name, layer in adapter_layers(model).items():
        more = [kind for kind in ("use_dora", "lora_bias") if getattr(layer, kind, {}).get(ADAPTER)]
        if more or ADAPTER not in layer.lora_A:
            raise InputError(f"the adapter of {name} is no plain LoRA ({', '.join(more) or type(layer).__name__})")
    if whole := [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]:
        raise InputError(f"the adapter holds whole modules ({', '.join(whole)}), which are not merged here")


def replace_quantised(model: PreTrainedModel) -> None:
    """Turn bitsandbytes' 4-bit layers into bf16 ones of the same values, and forget that there were any."""
    for name, layer in walk.linear_layers(model).items():
        if type(layer) is not nn.Linear:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            dense.weight = nn.Parameter(frozen_weight(layer, decoded=True), requires_grad=False)
            dense.bias = layer.bias
            walk.replace_linear(model, name, dense)
    checkpoint.forget_quantisation(model)


def apply_wide_weights(model: PreTrainedModel, target_modules: tuple[str, ...] = ("attention", "mlp")) -> None:
    """Make the chosen linear layers trainable in float32 and freeze everything else.

    Raises ValueError for a quantised layer, or targets that match nothing.
    """
    layers, names = walk.linear_layers(model), walk.select_linear(model, target_modules)
    model.requires_grad_(False)
    for name in names:
        layer = layers[name]
        if type(layer) is not nn.Linear:
            raise InputError(
                f"{name} is a {type(layer).__name__}; only bf16 weights can be trained, others by adapters"
            )
        layer.weight.data = layer.weight.data.float()
        layer.weight.requires_grad_(True)
        layer.forward = partial(_rounded, layer)


def _rounded(layer: nn.Linear, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias)


def restore_narrow_weights(model: PreTrainedModel) -> None:
    """Round the trained layers to bf16 and let them compute as usual."""
    for layer in walk.linear_layers(model).values():
        if "forward" in vars(layer):
            del layer.forward
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
