"""torchao's fake quantizers on an artefact's own grids: the library's quantization-aware training as one arm.

Each layer gets torchao's `IntxFakeQuantizer` with learned ranges, started at the file's scales and zero points; the
float32 weight behind it starts at the original's, within the cells of the file's codes. All three are trained in their
own units, as the library has them, and rounded once at the end: scales to bfloat16, codes for those scales.

torchao 0.18's own asymmetric ranges are not used: they come with zero points in units of the weight, which are then cut
to whole numbers (LOG.md). Given whole zero points, its forward pass and gradients are those of `fake_quant`.

What it does not do: fake-quantise activations, keep the best step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from avalab import fake_quant, models
from avalab.numerics import Grid, Rounded


class Torchao(nn.Module):
    """A linear layer whose weight goes through torchao's fake quantizer.

    The base class is what a model is made of.
    """

    def __init__(self, layer: nn.Linear, start: Rounded, weight: Float[Tensor, "rows cols"]) -> None:
        super().__init__()
        self.grid, self.bias = start.grid, layer.bias
        steps = fake_quant.positions(start, weight).unflatten(1, (start.scales.shape[1], -1))
        self.weight = nn.Parameter((steps * start.scales.float()[..., None]).flatten(1))
        self.quantizer = quantizer(start)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return F.linear(x, self.quantizer(self.weight).to(x.dtype), self.bias)

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """What is stored: scales as bfloat16 keeps them, whole zero points, and the nearest codes."""
        grid, scales = self.grid, self.quantizer.scale.clamp(min=1e-8).bfloat16()
        zeros = self.quantizer.zero_point.round().clamp(grid.low, grid.high)
        groups = self.weight.unflatten(1, (scales.shape[1], -1))
        codes = (groups / scales.float()[..., None] + zeros[..., None]).round_().clamp_(grid.low, grid.high)
        return Rounded(grid, codes.flatten(1).to(torch.int8), scales, zeros.to(torch.int8))


def quantizer(start: Rounded) -> nn.Module:
    """torchao's fake quantizer with the scales and zero points of a rounded layer as what it learns first."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    grid: Grid = start.grid
    how = {"group_size": grid.group_size, "is_symmetric": grid.symmetric, "is_dynamic": False, "range_learning": True}
    made = IntxFakeQuantizer(IntxFakeQuantizeConfig(getattr(torch, f"int{grid.bits}"), **how))
    made.scale = nn.Parameter(start.scales.float().clone())
    made.zero_point = nn.Parameter(start.zero_points.float().clone(), requires_grad=not grid.symmetric)
    made._initialized = True  # what `initialize_fake_quantizers` sets, once ranges are there
    return made


def replace_layers_torchao(
    model: PreTrainedModel, layers: Mapping[str, Rounded], *, weights: Mapping[str, Tensor]
) -> None:
    """Put torchao's fake quantizer where each named linear layer is, and freeze everything else."""
    model.requires_grad_(False)
    known = models.linear_layers(model)
    for name, start in layers.items():
        made = Torchao(known[name], start, weights[name]).to(known[name].weight.device)
        models.replace_linear(model, name, made)
