"""Making a model smaller from the shell: what is refused from headers alone, and what is never overwritten."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avalab.cli import compress, options
from avalab.compress import quantize
from avalab.lab import artifacts
from avalab.lab.run import ROOT, Run

SMOKE = ("--profile", "smoke")

QUANTIZE = ("quantize", *SMOKE, "--method")

# Refused from arguments and headers alone: no torch is imported for these.
EARLY = {
    ("ava", "--bytes", "0MB"): "'0MB' are 0 bytes",
    ("ava", "--bytes", "1KB"): "a budget of 1,000 bytes is below 2 bits for each of the 1,000,000 weights",
    ("ava", "--bytes", "80MB"): "has about 2.0 MB in bf16, within the budget of 80.0 MB: nothing to compress",
    ("ava", "--bytes", "1MB", "--bits-per-weight", "5"): "two budgets for one file",
    ("gptq", "--group-size", "48"): "a group of 48 does not divide the 3684 columns of model.layers.0.mlp.down_proj",
    ("nf4", "--bits", "4"): "method 'nf4' has no parameter bits; it has: double_quantization",
    ("nf4", "--skip", "*.no_layer"): "skip '*.no_layer' matches no linear layer; names look like model.layers.0.mlp",
    ("nf4", "--symmetric"): "has no parameter symmetric",
    ("rtn", "--bytes", "1MB"): "has no parameter bytes; it has: bits, group_size, symmetric, embedding",
    ("nf4", "--compute-dtype", "int3"): "unknown compute_dtype 'int3'; choose one of bfloat16",
    ("ava", "--format", "rtf"): "unknown format 'rtf'; choose one of transformers, gguf, onnx",
    ("ava", "--transform", "spin"): "unknown transform 'spin'; choose one of none, scale",
    ("nf4", "--model", "/no/such"): "unknown model '/no/such'",
}

WITHOUT_TORCH = """
import sys
from avalab import cli
sys.argv = ["avalab", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""


@pytest.fixture
def model(tmp_path) -> Path:
    """Headers as a Llama's with a million weights in matrices; the numbers are never read."""
    import numpy as np
    from safetensors.numpy import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    shapes = {
        "model.embed_tokens.weight": (4000, 128),
        "model.layers.0.self_attn.q_proj.weight": (128, 128),
        "model.layers.0.mlp.down_proj.weight": (128, 3684),
        "model.layers.0.input_layernorm.weight": (128,),
    }
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("arguments", EARLY, ids=lambda given: " ".join(given))
def test_what_cannot_be_is_refused_from_arguments_and_headers(arguments, model, tmp_path, avalab, monkeypatch):
    monkeypatch.setattr(options, "source_artifact", None)
    method, *rest = arguments
    named = [] if "--model" in rest else ["--model", model]
    code, _, said = avalab(*QUANTIZE, method, *rest, *named, "--out", tmp_path / "out")
    assert (code, said.count("\n")) == (2, 1), said
    assert EARLY[arguments].replace("1,000,000", f"{4000 * 128 + 128 * 128 + 128 * 3684:,}") in said
    assert not (tmp_path / "out").exists()


def test_a_budget_is_refused_without_torch(model, tmp_path):
    arguments = [*QUANTIZE, "ava", "--bytes", "1KB", "--model", str(model), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["2", "False"], done.stderr


def test_a_group_of_skipped_layers_may_be_ragged(model, monkeypatch):
    run = Run("t", "smoke", 0, str(model))
    with pytest.raises(ValueError, match="does not divide the 3684 columns"):
        options.possible_groups(run, "gptq", 64, [])
    options.possible_groups(run, "gptq", 64, ["*.down_proj"])


# What is there already


@pytest.fixture
def small(run, base, tmp_path) -> Path:
    return quantize.compress_artifact(base, "nf4", run=run, out=tmp_path / "small").path


def test_another_artefact_is_not_overwritten_unless_forced(small, avalab):
    before = artifacts.load_artifact(small).sha256
    code, _, said = avalab(*QUANTIZE, "rtn", "--out", small)
    assert code == 2
    assert f"{small} holds another artefact (nf4 of" in said
    assert "--force" in said
    assert artifacts.load_artifact(small).sha256 == before
    code, out, said = avalab(*QUANTIZE, "rtn", "--group-size", "32", "--out", small, "--force")
    assert code == 0, said
    assert artifacts.load_artifact(small).card["recipe"][-1]["step"] == "rtn"
    assert "reached " in out
    aside = [path for path in small.parent.iterdir() if path.name.startswith(".replaced")]
    options._settle(aside[0], small)  # what the end of the process does
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_what_was_set_aside_comes_back_when_nothing_took_its_place(small):
    options.new_folder(small, force=True)
    (aside,) = [path for path in small.parent.iterdir() if path.name.startswith(".replaced")]
    assert not small.exists()
    options._settle(aside, small)
    assert artifacts.load_artifact(small)


def test_the_same_command_finds_its_own_artefact_again(small, avalab):
    written = (small / "model.safetensors").stat().st_mtime_ns
    code, _, said = avalab(*QUANTIZE, "nf4", "--out", small)
    assert code == 0, said
    assert (small / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("command", [("quantize", "--method", "nf4"), ("prune", "--method", "magnitude")])
def test_a_model_is_never_its_own_output(command, force, small, avalab):
    before = artifacts.load_artifact(small).sha256
    code, _, said = avalab(*command, *SMOKE, "--model", small, "--out", small, *force)
    assert code == 2
    assert "is the model that is read; name another folder" in said
    assert artifacts.load_artifact(small).sha256 == before


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_folder_of_other_files_is_never_replaced(force, tmp_path, avalab):
    (tmp_path / "README.md").write_text("mine")
    code, _, said = avalab(*QUANTIZE, "nf4", "--out", tmp_path, *force)
    assert code == 2
    assert "exists and is not an artefact" in said
    assert (tmp_path / "README.md").read_text() == "mine"


# Predicted and measured


def record(subject: str, metric: str, value: float) -> dict:
    return {"notebook": "08", "subject": subject, "metric": metric, "value": value, "unit": "nats/token"}


def test_the_usual_ratio_of_measured_over_predicted_is_computed_from_records(tmp_path):
    """0.3 / 0.2 = 1.5 and 0.1 / 0.2 = 0.5; single layers are not whole files."""
    assert compress._usual_ratios(tmp_path).startswith("no records")
    rows = [
        record("ava-a", "predicted_kl_divergence", 0.2),
        record("ava-a", "kl_divergence:text", 0.3),
        record("ava-a", "kl_divergence:calls", 0.1),
        record("single layer", "predicted_kl_divergence", 0.1),
        record("single layer", "kl_divergence:text", 5.0),
        record("rtn", "kl_divergence:text", 0.7),
    ]
    (tmp_path / "laptop").mkdir()
    (tmp_path / "laptop" / "08_mixed_precision.json").write_text(json.dumps(rows))
    assert compress._usual_ratios(tmp_path) == "in the lab's records it was 0.50 to 1.50 times (2 whole files)"


# Stopped


def test_interrupted_it_shows_a_bar_leaves_nothing_half_written_and_says_so(tmp_path):
    """SIGINT while a bar is seen; a shell's background jobs ignore it, so the child is told not to."""
    arguments = [*QUANTIZE, "ava", "--bits-per-weight", "5", "--out", str(tmp_path / "small")]
    environment = {**os.environ, "AVALAB_DEVICE": "cpu"}
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "avalab.cli", *arguments],
            stderr=said,
            stdout=said,
            env=environment,
            cwd=ROOT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        end = time.monotonic() + 300
        while "sensitivity" not in (tmp_path / "said").read_text() and time.monotonic() < end:
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=120)
    text = (tmp_path / "said").read_text()
    assert code == 130, text
    assert "Traceback" not in text
    assert "stopped" in text.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["said"]
