"""What the measurements of the kernels record."""

import subprocess
import sys

import pytest
import torch

from avalab.kernels import product, weight
from avalab.kernels.product import error_bound, sample_weight
from avalab.lab import trackers
from avalab.lab.run import PROFILES, ROOT, Run
from avalab.measure import kernel_bench


def test_arms_take_turns_and_two_rounds_warm_up():
    calls = []
    arms = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = trackers.interleaved(arms, 3)
    assert "".join(calls) == "ab" * 5
    assert [len(samples) for samples in found.values()] == [3, 3]


def test_the_limits_prediction_is_the_slower_of_computing_and_reading(monkeypatch):
    """100 operations at 1,000 a second take 100 ms, 10 bytes 10 ms: half of an arm that took 200 ms."""
    monkeypatch.setattr(trackers, "interleaved", lambda *_: {"bf16": [100.0, 200.0, 300.0]})
    run = Run("10_kernels", "smoke")
    arms, read = {"bf16": lambda: torch.ones(2)}, {"bf16": 10}
    kernel_bench.record_arms(run, "subject", arms, flops=100, read=read, limits=(1000.0, 1000.0))
    assert [(r.metric, r.value) for r in run.records] == [("kernel_ms", 200.0), ("roofline_fraction", 0.5)]
    assert run.records[0].samples == [100.0, 200.0, 300.0]


def test_every_profile_has_sizes():
    assert all(profile.pick(kernel_bench.SIZES) for profile in PROFILES.values())


@pytest.mark.parametrize("kind", ["nf4", "int4_zero_point"])
def test_every_arm_of_the_product_computes_the_same(kind):
    w, x = product.prepare_small_batches(sample_weight("cpu", kind=kind)), torch.ones(3, 192, dtype=torch.bfloat16)
    exact = product.product_reference(x.double(), w)
    for arm in kernel_bench.product_arms(x, w, weight.decode(w, torch.bfloat16)).values():
        assert ((arm().double() - exact).abs() <= error_bound(x, w)).all()


def test_every_arm_of_the_layer_and_the_loss_returns_its_gradients():
    for arms, count in ((kernel_bench.lora_arms("cpu", (64, 128), tokens=8, rank=2), 3),):
        assert all(len(arm()) == count for arm in arms.values())
    for trained in (True, False):
        arms = kernel_bench.loss_arms("cpu", (8, 16, 64), trained=trained)
        gradients = [arm() for arm in arms.values()]
        assert [len(each) for each in gradients] == [2 if trained else 1] * 3
        for each in gradients[1:]:
            torch.testing.assert_close(gradients[0], each, rtol=0.05, atol=0.01)


# --- kernels of other projects -----------------------------------------------------------------------------------


def installed(monkeypatch, folder, module, source):
    """A package of that name, as if pip had put it there."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)


def test_a_peer_that_is_installed_is_called_with_our_inputs(monkeypatch, tmp_path):
    source = """
import torch
calls = []
def linear_cross_entropy(hidden, head, targets, impl):
    calls.append(impl)
    return torch.nn.functional.cross_entropy((hidden @ head.T).float(), targets)
"""
    installed(monkeypatch, tmp_path, "cut_cross_entropy", source)
    arms, dropped = kernel_bench.agreeing_arms(kernel_bench.loss_arms("cpu", (8, 16, 64), trained=True), "dense")
    import cut_cross_entropy

    assert "cut-cross-entropy" in arms
    assert dropped == {}
    assert cut_cross_entropy.calls == ["torch_compile"]  # on a CPU
    assert "loss:cut-cross-entropy" not in kernel_bench.reasons("cpu")


def test_a_peer_that_fails_or_computes_something_else_is_left_out_with_the_reason():
    one = torch.ones(4)

    def broken():
        raise RuntimeError("no such instruction\nat line 7")

    arms = {"bf16": lambda: one, "near": lambda: 1.01 * one, "wrong": lambda: 2 * one, "broken": broken}
    kept, dropped = kernel_bench.agreeing_arms(arms, "bf16")
    assert list(kept) == ["bf16", "near"]
    assert dropped == {
        "wrong": "computes something else: 1 of the result away",
        "broken": "fails here: no such instruction",
    }


def test_nan_from_a_peer_counts_as_something_else():
    arms = {"bf16": lambda: torch.ones(2), "nan": lambda: torch.full((2,), float("nan"))}
    assert list(kernel_bench.agreeing_arms(arms, "bf16")[0]) == ["bf16"]


def test_a_missing_peer_is_a_record_without_value_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(kernel_bench, "find_spec", lambda module: None if module == "liger_kernel" else True)
    run = Run("10_kernels", "smoke")
    kernel_bench.record_missing_kernels(run)
    notes = {r.subject: r.note for r in run.records if r.metric == "kernel_ms" and r.value is None}
    assert notes["loss:liger"] == "not installed: pip install liger-kernel (and it needs a GPU)"
    assert notes["product int4_zero_point:gemlite"] == "needs a GPU"
    assert "loss:cut-cross-entropy" not in notes  # installed, and it has a form for a CPU
    assert notes["product:triton"] == "needs a GPU"


def test_on_a_gpu_only_what_is_not_installed_is_missing(monkeypatch):
    monkeypatch.setattr(kernel_bench, "find_spec", lambda module: None if module == "gemlite" else True)
    assert list(kernel_bench.reasons("cuda")) == ["product int4_zero_point:gemlite"]


def test_a_missing_peer_has_no_arm(monkeypatch):
    monkeypatch.setattr(kernel_bench, "find_spec", lambda module: None)
    assert set(kernel_bench.loss_arms("cpu", (8, 16, 64), trained=False)) == {"avalab", "dense", "dense-bf16"}


def test_peak_memory_of_the_dense_loss_is_at_least_its_float32_logits():
    tokens, width, vocab = 64, 8, 65536
    # In a process of its own: here, memory that earlier tests freed would be used again and nothing would grow.
    call = f"kernel_bench.peak_bytes('cpu', {(tokens, width, vocab)}, 'dense', trained=False)"
    code = f"from avalab.measure import kernel_bench; print({call})"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(printed) >= 4 * tokens * vocab
