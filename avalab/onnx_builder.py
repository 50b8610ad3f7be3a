"""ONNX Runtime GenAI's model builder in a process of its own, as it prints, warns and sets global options.

What it does not do: quantise by itself; what the builder offers for that is asked for in `options`.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("onnxruntime_genai", "onnx_ir")
INSTALL = 'pip install -e ".[onnx]"'
BESIDE = ("config.json", "generation_config.json")
LIMIT_SECONDS = 3600
REFUSAL = "not currently supported"  # of the builder, for a family of models


def build(folder: Path, out: Path, precision: str, *, options: Sequence[str] = ()) -> None:
    """Fill `out` with graph, weights, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for a family that the builder does not know, naming the exports that remain, and RuntimeError
    without its packages or with its last line when it fails.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise RuntimeError(f"the ONNX model builder needs {', '.join(missing)}; install it: {INSTALL}")
    with tempfile.TemporaryDirectory() as cache:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision]
        command = [*builder, "-i", str(folder.resolve()), "-o", str(out.resolve()), "-c", cache]
        command += ["--extra_options", *options] if options else []
        done = subprocess.run(command, capture_output=True, text=True, cwd=cache, timeout=LIMIT_SECONDS)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        if REFUSAL in last:
            raise ValueError(
                f"{folder.name}: {last.partition(': ')[2] or last} That is said by ONNX Runtime GenAI's builder; "
                "packed artefacts stay readable in transformers and vLLM, and `avalab export` writes gguf and openvino"
            )
        raise RuntimeError(f"the ONNX model builder failed on {folder.name}: {last}")
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
