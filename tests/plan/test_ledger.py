"""Chains of shrinking steps: the ledger's differences, bytes that are shipped, and 4-bit values that can be pruned."""

import pytest
import torch
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.compress import prune, quantize
from avalab.data import toolbox
from avalab.lab import artifacts
from avalab.lab.run import Run
from avalab.models import adapters, checkpoint, walk
from avalab.plan import ledger
from avalab.train import finetune
from avalab.train.loop import Schedule


@pytest.fixture(scope="module")
def nf4(run, base):
    return quantize.compress_artifact(base, "nf4", run=run, double_quantization=True)


def test_a_ledger_adds_up_to_the_whole_difference():
    run = Run("t", "smoke")
    for subject, size, kl in (("bf16", 100, 0.0), ("pruned", 80, 0.5), ("taught", 80, 0.2), ("nf4", 30, 0.25)):
        run.record(subject, "artifact_bytes", size, "bytes")
        run.record(subject, "kl_divergence:text", kl, "nats/token")
    steps = ledger.ledger(run, ["bf16", "pruned", "taught", "nf4"], ["artifact_bytes", "kl_divergence:text"])
    sizes = [r.value for r in steps if r.metric == "cost:artifact_bytes"]
    assert sizes == [-20, 0, -50]
    assert sum(r.value for r in steps if r.metric == "cost:kl_divergence:text") == pytest.approx(0.25)
    assert steps[0].details["before"] == "bf16"


def test_a_step_that_was_not_measured_is_named():
    run = Run("t", "smoke")
    run.record("bf16", "artifact_bytes", 100, "bytes")
    with pytest.raises(ValueError, match="no artifact_bytes of 'pruned'"):
        ledger.ledger(run, ["bf16", "pruned"], ["artifact_bytes"])


def test_dequantised_values_are_those_of_four_bits_and_can_be_pruned_and_quantised_again(run, nf4):
    plain = ledger.dequantised(nf4)
    tokens = torch.arange(5, 45)[None]
    with torch.no_grad():
        ours, theirs = (checkpoint.load_model(a)(tokens).logits.float() for a in (plain, nf4))
    torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.02)  # bf16 products in another order
    assert ledger.dequantised(nf4).sha256 == plain.sha256
    smaller = prune.prune_artifact(plain, "magnitude", "layers", run=run, sparsity=0.25)
    again = quantize.compress_artifact(smaller, "nf4", run=run, double_quantization=True)
    codes = [layer.weight.data for layer in walk.linear_layers(checkpoint.load_model(again)).values()]
    before = {layer.weight.data.numpy().tobytes() for layer in walk.linear_layers(checkpoint.load_model(nf4)).values()}
    assert sum(code.numpy().tobytes() in before for code in codes) >= 0.9 * len(codes), "rounding twice is once"


def test_only_four_bit_artefacts_are_decoded(base):
    with pytest.raises(ValueError, match="is in format 'bf16'; only bitsandbytes"):
        ledger.dequantised(base)


def test_an_adapter_is_shipped_with_its_base(run, base, nf4):
    recipe = finetune.Recipe(rank=2, schedule=Schedule(steps=1))
    examples = list(toolbox.function_calling_examples(2, seed=0))
    tuned = finetune.train_adapter(nf4, examples, run=run, name="tuned", recipe=recipe)
    assert ledger.shipped_bytes(tuned) == tuned.bytes + nf4.bytes
    assert ledger.shipped_bytes(base) == base.bytes
    assert artifacts.load_artifact(tuned.path).format == "peft"
    assert adapters.merge_adapters(tuned).format == "bf16"
