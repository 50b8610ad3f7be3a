"""The linear layers of a 4-bit artefact computed by `avalab.kernels`, for inference.

`apply_kernels` takes a model as transformers and bitsandbytes load it and puts a `FourBitLinear` in the place of every
4-bit layer: the stored codes and scales as they are, and beside them, where a library here has a kernel for few rows
of activations, a second copy of the codes in that kernel's order (`kernels.prepare`). Which form computes a call is
`kernels.dispatch`'s choice, made anew for every call: device, rows, the form's own check, AVALAB_KERNELS.

What it does not do: gradients (`adapters.apply_fused`), other formats than bitsandbytes' 4-bit levels with groups that
divide the columns (such a layer stays bitsandbytes' own).
"""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from avalab import adapters, kernels, models
from avalab.kernels import Weight4


class FourBitLinear(nn.Module):
    """x W^T + bias of a packed weight, in x's dtype."""

    def __init__(self, weight: Weight4, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight4, self.bias = weight, bias  # no Parameter: nothing here is trained or saved
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """The product by the best form whose check has passed."""
        y = kernels.multiply(x, self.weight4)
        return y if self.bias is None else y.add_(self.bias)

    def extra_repr(self) -> str:
        """Shape and group size, as printed with the model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.weight4.group_size}"


def apply_kernels(model: PreTrainedModel) -> int:
    """Replace bitsandbytes' 4-bit layers by `FourBitLinear`, in place; how many were replaced.

    Call it before the model's first forward pass: bitsandbytes re-packs the codes then. A weight that the kernels
    refuse (a group of nothing but zeros) stays as it is, and a warning in the log names its layer and group.
    """
    replaced = 0
    for name, layer in models.linear_layers(model).items():
        weight = _packed(name, layer)
        if weight is not None:
            models.replace_linear(model, name, FourBitLinear(weight, layer.bias))
            replaced += 1
    return replaced


def _packed(name: str, layer: nn.Module) -> Weight4 | None:
    if getattr(layer.weight, "quant_state", None) is None:
        return None
    try:
        return kernels.prepare(adapters.frozen_weight(layer, decoded=False))
    except ValueError as error:
        logging.getLogger(__name__).warning("%s stays with bitsandbytes: %s", name, error)
        return None


def mark_static(model: PreTrainedModel) -> None:
    """Tell the compiler that the packed weights stay where they are: a CUDA graph then reads them in place."""
    for layer in model.modules():
        if isinstance(layer, FourBitLinear):
            for tensor in layer.weight4.tensors():
                torch._dynamo.mark_static_address(tensor)
