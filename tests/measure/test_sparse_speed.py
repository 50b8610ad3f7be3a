"""Kernels: each gives the dense product, a missing one says why, and a wrong one is refused."""

import pytest
import torch

from avalab.measure import cost
from avalab.measure.cost import Timing


def half_zero(rows: int = 32, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < 0.5, 0).bfloat16()


def test_every_kernel_is_timed_or_says_why_not():
    found = cost.milliseconds(half_zero(), tokens=8, rounds=3)
    assert list(found) == list(cost.KERNELS)
    for name, timing in found.items():
        assert (len(timing.samples) == 3 and min(timing.samples) > 0) != bool(timing.reason), name
    assert found[cost.BASELINE].samples
    assert found["CSR fp32"].samples
    assert "GPU" in found["2of4 bf16"].reason


def test_the_best_kernels_of_both_kinds_are_compared_by_their_medians():
    samples = {"dense bf16": [2.0, 4.0, 90.0], "dense fp32": [5.0], "CSR fp32": [6.0, 5.0, 7.0], "CSR bf16": [8.0]}
    found = {name: Timing(list_of) for name, list_of in samples.items()} | {"2of4 bf16": Timing(reason="no GPU")}
    assert cost.best_ratio(found) == 1.5


def test_a_kernel_with_another_product_is_refused(monkeypatch):
    monkeypatch.setitem(cost.KERNELS, "wrong", lambda w, x: lambda: 2 * (x @ w.float().T))
    with pytest.raises(ValueError, match="kernel 'wrong' differs from the dense product by"):
        cost.milliseconds(half_zero(), tokens=4, rounds=1, kernels=("wrong",))
