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

from avalab import artifacts
from avalab.artifacts import Artifact
from avalab.engines import kinds
from avalab.engines.onnx import INSTALL

WEIGHTS = ("fp32", "int8", "int4")
BESIDE = ("config.json", "generation_config.json")
LIMIT_SECONDS = 3600


def write(artifact: Artifact, weights: str = "int4", *, out: Path | None = None) -> Artifact:
    """Export a dense artefact into an ONNX artefact, `<name>+onnx-<weights>` beside it or the folder `out`."""
    out = out or artifact.path.parent / f"{artifact.name}+onnx-{weights}"
    code = artifacts.code_sha256([Path(__file__)])
    recipe = [*artifact.card["recipe"], {"step": "onnxruntime-genai", "weights": weights, "code": code}]
    found = artifacts.find(out.name, out.parent, recipe, artifact.sha256)
    if found:
        return found
    about = {"format": f"onnx-{weights}", "engines": ["onnx"], "licence": artifact.card.get("licence", "")}
    origin = {"name": artifact.name, "sha256": artifact.sha256}

    def save(folder: Path) -> None:
        export(artifact.path, folder, weights)

    return artifacts.write(out.name, out.parent, save, base=origin, recipe=recipe, **about)


def export(folder: Path, out: Path, weights: str = "int4") -> None:
    """Fill `out` with graph, weights, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for unknown weights or a model that is not dense, EngineUnavailable without the libraries,
    RuntimeError with the builder's last line when it fails.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"no weights {weights!r} for ONNX; choose one of {', '.join(WEIGHTS)}")
    if kinds.kind(folder) != "dense":
        raise ValueError(f"{folder.name} is {kinds.kind(folder)}; export the dense model that it was made from")
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
