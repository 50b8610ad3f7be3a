"""What the forms of the 4-bit product are checked against before they are used, and by the tests.

A product may differ from its float64 value by four roundings of every term (`error_bound`); a decoded weight not by a
bit.

What it does not do: cover every shape; the tests draw those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from avalab.kernels.library import nf4_levels, prepare, product_library
from avalab.kernels.weight import NESTED_GROUP, NestedScales, Weight4, decode, group_scales

KINDS = ("nf4", "nf4_nested", "int4", "int4_zero_point", "int4_minimum")


def error_bound(x: Float[Tensor, "*batch cols"], weight: Weight4) -> Float64[Tensor, "*batch rows"]:
    """What a product may differ from its exact value by, entry by entry.

    Rounded are the weight, its scale, its level or offset, and the sum: four roundings of the dtype, of terms as large
    as the largest weight of their group can make them.
    """
    zero_points = 0 if weight.zero_points is None else weight.zero_points.float()[..., None]
    reach = (weight.levels - zero_points).abs().amax(-1) * group_scales(weight).abs()
    if weight.minimums is not None:
        reach = reach + weight.minimums.float().abs()
    reach = reach.repeat_interleave(weight.group_size, 1).double()
    return 4 * torch.finfo(x.dtype).eps * (x.double().abs() @ reach.T)


def sample(device: str | torch.device, *, kind: str, rows: int = 96, cols: int = 192, group_size: int = 64) -> Weight4:
    """A weight of random codes, one of `KINDS`; always the same for the same arguments."""
    generator = torch.Generator().manual_seed(rows * cols)
    codes = torch.randint(0, 256, (rows, cols // 2), generator=generator).to(torch.uint8)
    scales = torch.rand(rows, cols // group_size, generator=generator) + 0.1
    offsets = torch.randint(0, 16, scales.shape, generator=generator).float()
    levels = nf4_levels() if kind.startswith("nf4") else torch.arange(16.0) - (8 if kind == "int4" else 0)
    if kind == "nf4_nested":
        scales = _nested(scales, generator)
    zero_points = offsets if kind == "int4_zero_point" else None
    minimums = -offsets if kind == "int4_minimum" else None
    return Weight4(codes, levels, scales, zero_points=zero_points, minimums=minimums).to(device)


def _nested(scales: Tensor, generator: torch.Generator) -> NestedScales:
    codes = torch.randint(0, 256, (scales.numel(),), generator=generator).to(torch.uint8)
    absmax = torch.rand(-(-scales.numel() // NESTED_GROUP), generator=generator) + 0.5
    return NestedScales(codes, torch.linspace(-1, 1, 256), absmax, torch.tensor(2.0))


def product_check(run: Callable, *batches: int, kinds: tuple[str, ...] = KINDS) -> Callable[[str], None]:
    """A check for `Form`: `run` on bf16 activations of each number of rows stays within `error_bound` of float64."""

    def check(device: str) -> None:
        for kind in kinds:
            weight = prepare(sample(device, kind=kind))
            if run is product_library and weight.small_batch is None:
                continue
            exact = decode(weight, torch.float64).T
            for batch in batches:
                generator = torch.Generator().manual_seed(batch)
                x = torch.randn(batch, weight.shape[1], generator=generator).bfloat16().to(device)
                if not ((run(x, weight).double() - x.double() @ exact).abs() <= error_bound(x, weight)).all():
                    raise ArithmeticError(f"{kind} times {batch} rows is outside the error bound")

    return check


def transposed_check(run: Callable) -> Callable[[str], None]:
    """A check for `Form`: `run` equals g times the decoded weight in float64."""

    def check(device: str) -> None:
        for kind in KINDS:
            weight = sample(device, kind=kind)
            g = torch.randn(3, weight.shape[0], generator=torch.Generator().manual_seed(3)).double().to(device)
            torch.testing.assert_close(run(g, weight), g @ decode(weight, torch.float64))

    return check


def decode_check(run: Callable, kinds: tuple[str, ...] = KINDS) -> Callable[[str], None]:
    """A check for `Form`: `run` decodes to the reference's bits."""

    def check(device: str) -> None:
        for kind in kinds:
            weight = sample(device, kind=kind)
            if not torch.equal(run(weight, torch.bfloat16), decode(weight, torch.bfloat16)):
                raise ArithmeticError(f"{kind} decodes to other bits than the reference")

    return check
