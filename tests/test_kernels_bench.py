"""What the measurements of the kernels record."""

import subprocess
import sys

import pytest
import torch

from avalab.experiment import PROFILES, ROOT, Run
from avalab.kernels import bench, bench_arms, library, product, weight
from avalab.kernels.product_checks import error_bound, sample


def test_arms_take_turns_and_two_rounds_warm_up():
    calls = []
    arms = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = bench.interleaved(arms, 3)
    assert "".join(calls) == "ab" * 5
    assert [len(samples) for samples in found.values()] == [3, 3]


def test_the_limits_prediction_is_the_slower_of_computing_and_reading(monkeypatch):
    """100 operations at 1,000 a second take 100 ms, 10 bytes 10 ms: half of an arm that took 200 ms."""
    monkeypatch.setattr(bench, "interleaved", lambda *_: {"arm": [100.0, 200.0, 300.0]})
    run = Run("10_kernels", "smoke")
    bench._record(run, "subject", {"arm": print}, (100, {"arm": 10}), (1000.0, 1000.0))
    assert [(r.metric, r.value) for r in run.records] == [("kernel_ms", 200.0), ("roofline_fraction", 0.5)]
    assert run.records[0].samples == [100.0, 200.0, 300.0]


def test_every_profile_has_sizes():
    assert bench.SIZES.keys() == PROFILES.keys()


@pytest.mark.parametrize("kind", ["nf4", "int4_zero_point"])
def test_every_arm_of_the_product_computes_the_same(kind):
    w, x = library.prepare(sample("cpu", kind=kind)), torch.ones(3, 192, dtype=torch.bfloat16)
    exact = product.product_reference(x.double(), w)
    for arm in bench_arms.product_arms(x, w, weight.decode(w, torch.bfloat16)).values():
        assert ((arm().double() - exact).abs() <= error_bound(x, w)).all()


def test_every_arm_of_the_layer_and_the_loss_returns_its_gradients():
    for arms, count in ((bench_arms.lora_arms("cpu", (64, 128), tokens=8, rank=2), 3),):
        assert all(len(arm()) == count for arm in arms.values())
    for trained in (True, False):
        arms = bench_arms.loss_arms("cpu", (8, 16, 64), trained=trained)
        gradients = [arm() for arm in arms.values()]
        assert [len(each) for each in gradients] == [2 if trained else 1] * 3
        for each in gradients[1:]:
            torch.testing.assert_close(gradients[0], each, rtol=0.05, atol=0.01)


def test_peak_memory_of_the_dense_loss_is_at_least_its_float32_logits():
    tokens, width, vocab = 64, 8, 65536
    # In a process of its own: here, memory that earlier tests freed would be used again and nothing would grow.
    call = f"bench.peak_bytes('cpu', {(tokens, width, vocab)}, 'dense', trained=False)"
    code = f"from avalab.kernels import bench; print({call})"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(printed) >= 4 * tokens * vocab
