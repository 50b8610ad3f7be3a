"""Chains of shrinking steps: the ledger's differences, bytes that are shipped, and 4-bit values that can be pruned."""

import random
import subprocess
import sys
import time

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


# --- on disk ----------------------------------------------------------------------------------------------------------


def entry(position, size, losses, calls=()):
    return ledger.Entry(
        f"k{position}", "m/r", position, "verb", "folder", "sha", size, losses=losses, calls=list(calls)
    )


def test_costs_of_a_chain_on_disk_add_up_to_its_end_and_carry_intervals(tmp_path):
    book = ledger.Ledger(tmp_path / "book.sqlite")
    for row in (
        entry(0, 100, [0.0, 0.0, 0.0], [True, True]),
        entry(1, 80, [0.5, 0.7, 0.6], [True, False]),
        entry(2, 30, [0.6, 0.9, 0.9], [False, False]),
    ):
        book.write(row)
    first, second = book.costs("m/r", resamples=200)
    assert (first.bytes, second.bytes) == (-20, -50)
    assert first.kl.value + second.kl.value == pytest.approx(0.8)
    assert second.kl.low <= second.kl.value <= second.kl.high
    assert (first.calls.value, second.calls.value) == (-0.5, -0.5)
    assert book.chains() == ["m/r"]


def test_a_file_of_another_version_or_of_something_else_is_refused(tmp_path):
    book = ledger.Ledger(tmp_path / "book.sqlite")
    with book._open() as database:
        database.execute("update about set version = 9")
    with pytest.raises(ValueError, match="is a ledger of version 9, and this is version 1"):
        ledger.Ledger(tmp_path / "book.sqlite")
    (tmp_path / "text").write_text("nothing of a database" * 100)
    with pytest.raises(ValueError, match="text is no ledger"):
        ledger.Ledger(tmp_path / "text")


WORKING = """
import sys, time
from pathlib import Path
from avalab.lab import artifacts
from avalab.plan.ledger import Entry, Ledger

folder = Path(sys.argv[1])
book = Ledger(folder / "book.sqlite")
print("ready", flush=True)
for position in range(6):
    def compute():
        with (folder / "asked").open("a") as file:
            file.write(f"{position}\\n")
        def save(out):
            (out / "weights.gguf").write_text(f"step {position}" * 1000)
            time.sleep(0.02)
        base = {"name": "b", "sha256": "0"}
        made = artifacts.write_artifact(f"s{position}", folder, save, base=base, recipe=[], format="gguf")
        about = str(made.path), made.sha256, made.bytes
        return Entry(f"k{position}", "m/r", position, "v", *about, losses=[1.0 * position])
    book.once(f"k{position}", compute)
print("done", flush=True)
"""


def test_a_chain_killed_at_many_points_goes_on_where_it_was(tmp_path):
    draw, killed = random.Random(1), 0
    for _ in range(30):
        command = [sys.executable, "-c", WORKING, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            child.stdout.readline()
            time.sleep(draw.random() * 0.08)
            child.kill()
            done = "done" in child.stdout.read()
        killed += not done
        book = ledger.Ledger(tmp_path / "book.sqlite")
        for row in book.chain("m/r"):
            assert artifacts.load_artifact(row.artifact).sha256 == row.sha256
        if done:
            break
    assert (done, killed > 2) == (True, True)
    asked = (tmp_path / "asked").read_text().split()
    assert len(asked) <= 6 + killed, "a finished step was made again"
    assert [row.position for row in book.chain("m/r")] == list(range(6))


def test_a_step_whose_artefact_was_altered_is_made_again(tmp_path):
    book, made = ledger.Ledger(tmp_path / "book.sqlite"), []

    def compute():
        made.append(1)
        base = {"name": "b", "sha256": "0"}
        found = artifacts.write_artifact(
            "s", tmp_path, lambda out: (out / "w.gguf").write_text("x") and None, base=base, recipe=[], format="gguf"
        )
        return ledger.Entry("k", "c", 0, "v", str(found.path), found.sha256, found.bytes)

    for _ in range(2):
        book.once("k", compute)
    (tmp_path / "s" / "w.gguf").write_text("y")
    book.once("k", compute)
    assert len(made) == 2
