"""Quantisers that come with an inference engine, each from a `Job` to a folder that the engine of that name loads.

| function | what the library does | embedding and head |
|---|---|---|
| `openvino_int4` | NNCF without data, as `avalab export` writes it | int8 |
| `nncf_int4` | activation-aware scales, then scales re-estimated on the windows; asymmetric, groups of 64 | int8 |
| `onnx_k_quant` | the search for scale and minimum of llama.cpp's k-quants, groups of 32, no data | int4 |
| `llama_cpp` | a mixture of block types, importance matrix from the windows (`gguf_quantizer`) | 8 bits or fewer |

Each fills `job.out` and returns what it measured. A linear layer that stays in bf16 is not among their options.
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
from torch import Tensor

from avalab import artifacts, engines
from avalab.engines import llamacpp, onnx_graph, openvino
from avalab.libraries import Job

GROUP_SIZE = 64
LIMIT_SECONDS = 3600
K_QUANT = ("algo_config=k_quant", "is_symmetric=false")
GGUF = "gguf-"  # and a mixture: the methods of `llama_cpp`


def openvino_int4(job: Job) -> dict:
    """NNCF's int4 without data."""
    openvino.export(job.folder, job.out, "int4")
    return {}


def nncf_int4(job: Job) -> dict:
    """NNCF's int4 with AWQ and scale estimation on the job's windows."""
    for module in ("openvino_genai", "nncf"):
        engines.require("openvino", module, openvino.INSTALL)
    import nncf
    import openvino as runtime

    graph = engines.OWN_FILES["openvino"]
    nncf.set_log_level(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        openvino.export(job.folder, Path(temporary), "f16")
        model = nncf.compress_weights(
            runtime.Core().read_model(str(Path(temporary) / graph)),
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=GROUP_SIZE,
            ratio=1.0,
            dataset=nncf.Dataset([_inputs(window) for window in job.calibration]),
            subset_size=len(job.calibration),
            awq=True,
            scale_estimation=True,
        )
        runtime.save_model(model, str(job.out / graph), compress_to_fp16=False)
        for file in Path(temporary).iterdir():
            if not file.name.startswith(graph.removesuffix(".xml")):
                shutil.copyfile(file, job.out / file.name)
    return {}


def onnx_k_quant(job: Job) -> dict:
    """ONNX Runtime's k-quant by its GenAI model builder.

    Raises RuntimeError with the builder's last line when it fails.
    """
    for module in ("onnxruntime_genai", "onnx_ir"):
        engines.require("onnx", module, onnx_graph.INSTALL)
    with tempfile.TemporaryDirectory() as cache:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", "int4", "-c", cache]
        folders = ["-i", str(job.folder.resolve()), "-o", str(job.out.resolve())]
        command = [*builder, *folders, "--extra_options", *K_QUANT]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cache, timeout=LIMIT_SECONDS)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"the ONNX model builder failed on {job.folder.name}: {last}")
    for name in ("config.json", "generation_config.json"):
        if (job.folder / name).is_file():
            shutil.copyfile(job.folder / name, job.out / name)
    return {}


def llama_cpp(job: Job) -> dict:
    """llama.cpp's own quantisation into the mixture that the method names."""
    base = artifacts.load(job.folder, verify=False)
    return llamacpp.quantise(base, job.out, job.method.removeprefix(GGUF), job.calibration)


def _inputs(window: Tensor) -> dict[str, np.ndarray]:
    """One window as the stateful graph reads it, from an empty cache."""
    tokens = window.numpy()[None]
    return {
        "input_ids": tokens,
        "position_ids": np.arange(tokens.shape[1])[None],
        "attention_mask": np.ones_like(tokens),
        "beam_idx": np.zeros(1, np.int32),
    }
