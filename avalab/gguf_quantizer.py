"""K-quants by llama.cpp's own quantiser: its mixtures of block types, with or without an importance matrix.

1. The dense artefact becomes a GGUF file of 16-bit floats (`gguf_export`).
2. With windows of calibration tokens: the importance of a column is the mean square of what it is multiplied with,
   which is what llama.cpp's imatrix tool averages, from one walk over the blocks (`calibration`).
3. `llama_model_quantize` writes the file; which tensor gets which block type is its choice. Rows that 256 does not
   divide fall back to blocks of 32 (q4_k to q5_0, q6_k to q8_0): a narrow model's file is larger than its name says.

What it does not do: choose types, or importance of the embedding, which no activation multiplies.
"""

from __future__ import annotations

import ctypes
import logging
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from jaxtyping import Int
from torch import Tensor

from avalab import artifacts, calibration, exported, gguf_export, models
from avalab.artifacts import Artifact
from avalab.engines import dense, kinds
from avalab.engines.llamacpp import INSTALL

MIXTURES = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
ENGINES = ("torch", "llamacpp")  # OpenVINO GenAI reads no K types


def write(
    artifact: Artifact, mixture: str, *, windows: Int[Tensor, "window time"] | None = None, out: Path | None = None
) -> Artifact:
    """Quantise a dense artefact into `<name>+gguf-<mixture>` beside it or `out`; one made before is reused.

    Raises ValueError for an unknown mixture or a model that is not dense, EngineUnavailable without llama-cpp-python.
    """
    dense.check(artifact.path, mixture, known=MIXTURES, form="llama.cpp's quantiser")
    kinds.require("llamacpp", "llama_cpp", INSTALL)
    text = "" if windows is None else artifacts.sha256_of_text(str(windows.tolist()))
    step = {"step": "llama.cpp", "mixture": mixture, "calibration": text}
    about = exported.Export(step, f"gguf-{mixture}", ENGINES)
    return exported.write(artifact, about, lambda folder: quantise(artifact, folder, mixture, windows), out=out)


def quantise(
    artifact: Artifact, out: Path, mixture: str, windows: Int[Tensor, "window time"] | None = None
) -> dict[str, object]:
    """Fill `out` with one GGUF file; the block types that llama.cpp chose are returned under `formats`.

    Raises RuntimeError with llama.cpp's code when it fails.
    """
    import gguf

    target = out / f"{artifact.name}.{mixture}.gguf"
    columns = {} if windows is None else importance(artifact, windows)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "model.gguf"
        gguf_export.export(artifact.path, source, "f16")
        _quantise_file(source, target, mixture, columns)
        modelfile = (source.parent / "Modelfile").read_text()
    (out / "Modelfile").write_text(modelfile.replace(source.name, target.name))
    gguf_export.copy_beside(artifact.path, out)
    types = Counter(tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(target).tensors)
    return {"formats": dict(sorted(types.items())), "calibration_tokens": 0 if windows is None else windows.numel()}


def importance(artifact: Artifact, windows: Int[Tensor, "window time"]) -> dict[str, np.ndarray]:
    """Mean squared input of each column, float32, by the file's name of each linear layer."""
    model = models.load(artifact)
    names = gguf_export.file_names(gguf_export.checked_config(artifact.path))
    found = {}
    for site in calibration.walk(model, windows):
        column = site.moment.detach().diagonal().contiguous().float().numpy()  # read through a bare pointer
        found |= {names(f"{layer}.weight"): column for layer in site.layers}
    return found


def _quantise_file(source: Path, target: Path, mixture: str, columns: dict[str, np.ndarray]) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mixture.upper()}")
    rows = (llama_cpp.llama_model_imatrix_data * (len(columns) + 1))()  # the last one, nameless, ends the list
    for row, (name, values) in zip(rows, columns.items(), strict=False):
        row.name, row.size = name.encode(), values.size
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if columns:
        parameters.imatrix = rows
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # a line a tensor
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if code:
        raise RuntimeError(f"llama.cpp stopped with code {code} while quantising {source.name} to {mixture}")
