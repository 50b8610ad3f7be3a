"""Linear layers whose weight is on its grid in every forward pass and can still be trained: fake quantizers.

w' = s (q - z), with integer codes q and zero points z, and scales s rounded to the bfloat16 they are stored in.
Rounding has no useful gradient, so it is taken as the identity (straight-through: Bengio et al. 2013, arXiv 1308.3432):

- codes re-rounded, q = clip(round(w/s + z)): inside the range dw'/dw = 1, dw'/ds = q - z - w/s, dw'/dz = 0; outside
  dw'/dw = 0, dw'/ds = q - z, dw'/dz = -s. That is LSQ (Esser et al. 2020, arXiv 1902.08153, eq. 3), with LSQ+'s zero
  point (Bhalgat et al. 2020, arXiv 2004.09576);
- codes that stay: dw'/ds = q - z exactly, dw'/dz = -s (EfficientQAT's end-to-end stage, Chen et al. 2024, arXiv
  2407.11062).

A layer's parameters are dimensionless, so that one learning rate serves all: `log_scale` (s = s0 exp), `shift` of the
zero points in steps and, where codes are re-rounded, `position` of the weights in steps. AdamW's learning rate times a
factor of `RATES` is how far a step moves each. The weight a layer computes with is bit for bit the one that the file
will decode to; `rounded` takes it out again.

`Torchao` is the same with torchao's `IntxFakeQuantizer` and learned ranges, started at the file's scales and whole zero
points (torchao 0.18's own asymmetric ranges start in units of the weight and are then cut, LOG.md); the weight starts
within the cells of the file's codes. All three are trained in their own units and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from avalab.kernels.formats import Grid, Rounded
from avalab.lab.errors import InputError
from avalab.models import walk

RATES = {"log_scale": 1.0, "shift": 10.0, "position": 10.0}

PARTS = ("codes", "scales", "zero_points")

CELL = 0.45  # of a step: how far from its code a weight may start, so that the codes start as they are in the file


def straight_through(
    weight: Float[Tensor, "rows cols"],
    scales: Float[Tensor, "rows groups"],
    zero_points: Float[Tensor, "rows groups"],
    grid: Grid,
) -> Float[Tensor, "rows cols"]:
    """The weight rounded onto the grid, with LSQ's gradients for weight, scales and (whole) zero points."""
    return _StraightThrough.apply(weight, scales, zero_points, grid.low, grid.high)


def decoded(
    codes: Int8[Tensor, "rows cols"], scales: Float[Tensor, "rows groups"], zero_points: Float[Tensor, "rows groups"]
) -> Float[Tensor, "rows cols"]:
    """(q - z) s for codes that stay as they are, with gradients for scales and zero points."""
    return _Decoded.apply(codes, scales, zero_points)


def _through(values: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of the identity for `values`."""
    return values + (rounded - values).detach()


class FakeQuantized(nn.Module):
    """A linear layer on a grid. With `weight`, codes are re-rounded from it; without, they stay and scales are learnt.

    The base class is what a model is made of.
    """

    def __init__(
        self, layer: nn.Linear, start: Rounded, *, weight: Float[Tensor, "rows cols"] | None, zeros: bool = False
    ) -> None:
        super().__init__()
        self.grid, self.bias = start.grid, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("codes", start.codes, persistent=False)
        self.register_buffer("scales", start.scales.float(), persistent=False)
        self.register_buffer("zero_points", start.zero_points.float(), persistent=False)
        self.log_scale = nn.Parameter(torch.zeros_like(self.scales))
        self.shift = nn.Parameter(torch.zeros_like(self.scales)) if zeros and not start.grid.symmetric else None
        self.position = None if weight is None else nn.Parameter(positions(start, weight) / RATES["position"])

    def parts(self) -> tuple[Tensor, Tensor]:
        """Scales and whole zero points as they are now, each `rows groups`, differentiable."""
        scales = self.scales * (RATES["log_scale"] * self.log_scale).exp()
        scales = _through(scales, scales.bfloat16().float())  # as they are stored
        if self.shift is None:
            return scales, self.zero_points
        shifted = self.zero_points + RATES["shift"] * self.shift
        return scales, _through(shifted, shifted.round()).clamp(self.grid.low, self.grid.high)

    def on_grid(self) -> Float[Tensor, "rows cols"]:
        """The weight that the forward pass uses, in float32."""
        scales, zeros = self.parts()
        if self.position is None:
            return decoded(self.codes, scales, zeros)
        return straight_through(self._latent(), scales, zeros, self.grid)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return F.linear(x, self.on_grid().to(x.dtype), self.bias)

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """What is stored: codes, scales and zero points."""
        scales, zeros = self.parts()
        codes = self.codes
        if self.position is not None:
            codes = _rounded_codes(self._latent(), scales, zeros, self.grid.low, self.grid.high).flatten(1)
        return Rounded(self.grid, codes.to(torch.int8), scales.bfloat16(), zeros.to(torch.int8))

    def trainable(self, position_rate: float, scale_rate: float) -> list[tuple[nn.Parameter, float]]:
        """The parameters with the step that moves weights by so much of a quantization step, scales by such a share."""
        kinds = (("position", position_rate), ("shift", position_rate), ("log_scale", scale_rate))
        found = [(getattr(self, name), rate / RATES[name]) for name, rate in kinds]
        return [(parameter, rate) for parameter, rate in found if parameter is not None]

    def settle(self) -> None:
        """Fix the codes as they are now; scales start again from where they are."""
        now = self.rounded()
        self.restore(now.codes, now.scales.float(), now.zero_points.float())

    def restore(
        self,
        codes: Int8[Tensor, "rows cols"],
        scales: Float[Tensor, "rows groups"],
        zero_points: Float[Tensor, "rows groups"],
    ) -> None:
        """Be what a layer with these parts was when it was settled."""
        device = self.scales.device
        self.codes, self.scales, self.zero_points = (part.to(device) for part in (codes, scales, zero_points))
        self.position = None
        self.log_scale.data.zero_()
        if self.shift is not None:
            self.shift.data.zero_()

    def _latent(self) -> Tensor:
        steps = self.position.unflatten(1, (self.scales.shape[1], -1))
        return (steps * (self.scales * RATES["position"])[..., None]).flatten(1)


class Torchao(nn.Module):
    """A linear layer whose weight goes through torchao's fake quantizer.

    The base class is what a model is made of.
    """

    def __init__(self, layer: nn.Linear, start: Rounded, weight: Float[Tensor, "rows cols"]) -> None:
        super().__init__()
        self.grid, self.bias = start.grid, layer.bias
        steps = positions(start, weight).unflatten(1, (start.scales.shape[1], -1))
        self.weight = nn.Parameter((steps * start.scales.float()[..., None]).flatten(1))
        self.quantizer = quantizer(start)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return F.linear(x, self.quantizer(self.weight).to(x.dtype), self.bias)

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """What is stored: scales as bfloat16 keeps them, whole zero points, and the nearest codes."""
        grid, scales = self.grid, self.quantizer.scale.clamp(min=1e-8).bfloat16()
        zeros = self.quantizer.zero_point.round().clamp(grid.low, grid.high)
        codes = _rounded_codes(self.weight, scales.float(), zeros, grid.low, grid.high)
        return Rounded(grid, codes.flatten(1).to(torch.int8), scales, zeros.to(torch.int8))


def quantizer(start: Rounded) -> nn.Module:
    """torchao's fake quantizer with the scales and zero points of a rounded layer as what it learns first."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    grid: Grid = start.grid
    config = IntxFakeQuantizeConfig(
        getattr(torch, f"int{grid.bits}"),
        group_size=grid.group_size,
        is_symmetric=grid.symmetric,
        is_dynamic=False,
        range_learning=True,
    )
    made = IntxFakeQuantizer(config)
    made.scale = nn.Parameter(start.scales.float().clone())
    made.zero_point = nn.Parameter(start.zero_points.float().clone(), requires_grad=not grid.symmetric)
    made._initialized = True  # what `initialize_fake_quantizers` sets, once ranges are there
    return made


def replace_layers(
    model: PreTrainedModel,
    layers: Mapping[str, Rounded],
    *,
    weights: Mapping[str, Tensor] | None = None,
    zeros: bool = False,
    torchao: bool = False,
) -> None:
    """Put a fake quantizer where each named linear layer is, and freeze everything else.

    With `weights` (those before rounding; torchao's needs them) codes are re-rounded while training. Raises ValueError
    for a layer that the model does not have.
    """
    model.requires_grad_(False)
    known = walk.linear_layers(model)
    for name, start in layers.items():
        if name not in known:
            raise InputError(f"no linear layer {name!r}; this model has {', '.join(list(known)[:3])}, ...")
        weight = None if weights is None else weights[name]
        if torchao:
            fake = Torchao(known[name], start, weight)
        else:
            fake = FakeQuantized(known[name], start, weight=weight, zeros=zeros)
        walk.replace_linear(model, name, fake.to(known[name].weight.device))


def positions(start: Rounded, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """Where each weight starts, in steps: as before rounding, but within the cell of the code that the file has."""
    scales = start.scales.float()[..., None]
    levels = start.codes.float().unflatten(1, (scales.shape[1], -1)) - start.zero_points.float()[..., None]
    wanted = weight.detach().float().unflatten(1, (scales.shape[1], -1)) / scales
    return torch.minimum(torch.maximum(wanted, levels - CELL), levels + CELL).flatten(1)


def fake_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The fake quantizers of a model, of either kind, by qualified name."""
    kinds = (FakeQuantized, Torchao)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _rounded_codes(weight: Tensor, scales: Tensor, zeros: Tensor, low: int, high: int) -> Tensor:
    groups = weight.unflatten(1, (scales.shape[1], -1))
    return (groups / scales[..., None]).add_(zeros[..., None]).round_().clamp_(low, high)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, scales: Tensor, zeros: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(weight, scales, zeros)
        ctx.ends = low, high
        levels = _rounded_codes(weight, scales, zeros, low, high).sub_(zeros[..., None])
        return levels.mul_(scales[..., None]).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        weight, scales, zeros = ctx.saved_tensors
        low, high = ctx.ends
        gradient = gradient.unflatten(1, (scales.shape[1], -1))
        exact = (weight.unflatten(1, (scales.shape[1], -1)) / scales[..., None]).add_(zeros[..., None])
        nearest = exact.round()
        codes = nearest.clamp(low, high)
        inside = codes == nearest
        through = gradient * inside
        # q - z - w/s inside and q - z outside: in both cases codes - (exact where inside, else z)
        reference = torch.where(inside, exact, zeros[..., None])
        for_scales = (codes.sub_(reference)).mul_(gradient).sum(-1)
        for_zeros = (through - gradient).sum(-1) * scales if ctx.needs_input_grad[2] else None
        return through.flatten(1), for_scales, for_zeros, None, None


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales, zeros)
        return _levels(codes, zeros).mul_(scales[..., None]).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor, Tensor | None]:
        codes, scales, zeros = ctx.saved_tensors
        gradient = gradient.unflatten(1, (scales.shape[1], -1))
        for_scales = _levels(codes, zeros).mul_(gradient).sum(-1)
        return None, for_scales, -gradient.sum(-1) * scales if ctx.needs_input_grad[2] else None


def _levels(codes: Tensor, zeros: Tensor) -> Tensor:
    return codes.unflatten(1, (zeros.shape[1], -1)).float().sub_(zeros[..., None])
