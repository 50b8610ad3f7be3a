"""A model folder for ONNX Runtime GenAI, by that library's own model builder: weights of 32, 8 or 4 bits.

The builder runs in a process of its own (it prints, warns and sets global options). Its 8 and 4 bits are groups of 32
weights rounded to nearest, the head included; the embedding stays in 32 bits unless the head shares it.

What it does not do: calibrate, or export graphs for other runtimes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from avalab import exported
from avalab.artifacts import Artifact
from avalab.engines import dense, kinds
from avalab.engines.onnx import INSTALL

WEIGHTS = ("fp32", "int8", "int4")
BESIDE = ("config.json", "generation_config.json")
LIMIT_SECONDS = 3600


def write(artifact: Artifact, weights: str = "int4", *, out: Path | None = None) -> Artifact:
    """Export a dense artefact into an ONNX artefact, `<name>+onnx-<weights>` beside it or the folder `out`."""
    about = exported.Export(
        {"step": "onnxruntime-genai", "weights": weights}, f"onnx-{weights}", ("onnx",), [Path(__file__)]
    )
    return exported.write(artifact, about, lambda folder: export(artifact.path, folder, weights), out=out)


def export(folder: Path, out: Path, weights: str = "int4") -> None:
    """Fill `out` with graph, weights, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for unknown weights or a model that is not dense, EngineUnavailable without the libraries,
    RuntimeError with the builder's last line when it fails.
    """
    dense.check(folder, weights, known=WEIGHTS, form="ONNX")
    for module in ("onnxruntime_genai", "onnx_ir"):
        kinds.require("onnx", module, INSTALL)
    with tempfile.TemporaryDirectory() as cache:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", weights]
        command = [*builder, "-i", str(folder.resolve()), "-o", str(out.resolve()), "-c", cache]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cache, timeout=LIMIT_SECONDS)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"the ONNX model builder failed on {folder.name}: {last}")
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
