"""Compressors that come with an inference engine: NNCF's data-aware int4 for OpenVINO, k-quant for ONNX Runtime.

| function | what the library does | embedding and head |
|---|---|---|
| `nncf_int4` | activation-aware scales, then scales re-estimated on the windows; asymmetric, groups of 64 | int8 |
| `onnx_k_quant` | the search for scale and minimum of llama.cpp's k-quants, groups of 32, no data | int4 |

Both fill a folder that the engine of that name loads. What they do not do: choose windows, score, or time themselves.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Int
from torch import Tensor

from avalab import engines
from avalab.engines import onnx, openvino

LIMIT_SECONDS = 3600
K_QUANT = ("algo_config=k_quant", "is_symmetric=false")


def nncf_int4(folder: Path, out: Path, windows: Int[Tensor, "window time"], *, group_size: int = 64) -> None:
    """Fill `out` with an OpenVINO model in int4, NNCF's AWQ and scale estimation on the windows."""
    for module in ("openvino_genai", "nncf"):
        engines.require("openvino", module, openvino.INSTALL)
    import nncf
    import openvino as runtime

    graph = engines.OWN_FILES["openvino"]
    nncf.set_log_level(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        openvino.export(folder, Path(temporary), "f16")
        model = nncf.compress_weights(
            runtime.Core().read_model(str(Path(temporary) / graph)),
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=group_size,
            ratio=1.0,
            dataset=nncf.Dataset([_inputs(window) for window in windows]),
            subset_size=len(windows),
            awq=True,
            scale_estimation=True,
        )
        runtime.save_model(model, str(out / graph), compress_to_fp16=False)
        for file in Path(temporary).iterdir():
            if not file.name.startswith(graph.removesuffix(".xml")):
                shutil.copyfile(file, out / file.name)


def onnx_k_quant(folder: Path, out: Path) -> None:
    """Fill `out` with an ONNX Runtime GenAI model in int4 by that library's k-quant.

    Raises RuntimeError with the builder's last line when it fails.
    """
    for module in ("onnxruntime_genai", "onnx_ir"):
        engines.require("onnx", module, onnx.INSTALL)
    with tempfile.TemporaryDirectory() as cache:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", "int4", "-c", cache]
        command = [*builder, "-i", str(folder.resolve()), "-o", str(out.resolve()), "--extra_options", *K_QUANT]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cache, timeout=LIMIT_SECONDS)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"the ONNX model builder failed on {folder.name}: {last}")
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def _inputs(window: Tensor) -> dict[str, np.ndarray]:
    """One window as the stateful graph reads it, from an empty cache."""
    tokens = window.numpy()[None]
    positions = np.arange(tokens.shape[1])[None]
    return {
        "input_ids": tokens,
        "position_ids": positions,
        "attention_mask": np.ones_like(tokens),
        "beam_idx": np.zeros(1, np.int32),
    }
