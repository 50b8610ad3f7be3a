"""Train a model's linear layers themselves: weights in float32, arithmetic in bf16.

bf16 has eight bits of precision, so a step of one thousandth of a weight is rounded away. `apply_wide_weights` keeps
the weights of the chosen layers in float32 and rounds them on the way into each product, as mixed-precision training
does (Micikevicius et al. 2018, arXiv 1710.03740, section 3.1); `restore_narrow_weights` rounds once more, to bf16, to
be saved. In bytes a weight: 4, 4 for the gradient and 8 for AdamW, where adapters take 0.2 at rank 16.

What it does not do: train embeddings, head and norms, which stay as they are; accept quantised layers.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from avalab import models


def apply_wide_weights(model: PreTrainedModel, target_modules: tuple[str, ...] = ("attention", "mlp")) -> None:
    """Make the chosen linear layers trainable in float32 and freeze everything else.

    Raises ValueError for a quantised layer, or targets that match nothing.
    """
    layers, names = models.linear_layers(model), models.select_linear(model, target_modules)
    model.requires_grad_(False)
    for name in names:
        layer = layers[name]
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"{name} is a {type(layer).__name__}; only bf16 weights can be trained, others by adapters"
            )
        layer.weight.data = layer.weight.data.float()
        layer.weight.requires_grad_(True)
        layer.forward = partial(_rounded, layer)


def _rounded(layer: nn.Linear, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias)


def restore_narrow_weights(model: PreTrainedModel) -> None:
    """Round the trained layers to bf16 and let them compute as usual."""
    for layer in models.linear_layers(model).values():
        if "forward" in vars(layer):
            del layer.forward
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
