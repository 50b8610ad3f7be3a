"""llama.cpp's own quantisation: its mixtures of block types, with an importance matrix from the run's windows.

1. The base becomes a GGUF file of 16-bit floats (`gguf_export`).
2. The importance of a column is the mean square of what it is multiplied with over the calibration windows: what
   llama.cpp's own imatrix tool averages, from one walk over the blocks (`calibration`).
3. `llama_model_quantize` writes the file: which tensor gets which block type is its choice. Rows that 256 does not
   divide fall back to blocks of 32 (q4_k to q5_0, q6_k to q8_0), so a narrow model's file is larger than its name says.

The embedding has no importance: no activation multiplies it. Scored from the decoded file (`peers_scores`).
What it does not do: choose types, or run without llama-cpp-python.
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

from avalab import calibration, gguf_export, models
from avalab.artifacts import Artifact

MIXTURES = ("q4_k_m", "q3_k_m", "q2_k")


def quantise(base: Artifact, out: Path, mixture: str, windows: Int[Tensor, "window time"]) -> dict:
    """Fill `out` with one GGUF file; the block types that llama.cpp chose are returned under `formats`.

    Raises ValueError for a mixture not in `MIXTURES` or a family that `gguf_export` does not know, RuntimeError with
    llama.cpp's code when it fails.
    """
    if mixture not in MIXTURES:
        raise ValueError(f"no mixture {mixture!r}; choose one of {', '.join(MIXTURES)}")
    import gguf

    target = out / f"{base.name}.{mixture}.gguf"
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "model.gguf"
        gguf_export.export(base.path, source, "f16")
        _quantise_file(source, target, mixture, importance(base, windows))
    gguf_export.copy_beside(base.path, out)
    types = Counter(tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(target).tensors)
    return {"formats": dict(sorted(types.items())), "calibration_tokens": windows.numel()}


def importance(base: Artifact, windows: Int[Tensor, "window time"]) -> dict[str, np.ndarray]:
    """Mean squared input of each column, float32, by the file's name of each linear layer."""
    model = models.load(base)
    names = gguf_export.file_names(gguf_export.checked_config(base.path))
    found = {}
    for site in calibration.walk(model, windows):
        column = site.moment.detach().diagonal().float().numpy()
        found |= {names(f"{layer}.weight"): column for layer in site.layers}
    return found


def _quantise_file(source: Path, target: Path, mixture: str, columns: dict[str, np.ndarray]) -> None:
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # a line a tensor otherwise
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mixture.upper()}")
    held = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in columns.items()}
    rows = (llama_cpp.llama_model_imatrix_data * (len(held) + 1))()  # the last one, nameless, ends the list
    for row, (name, values) in zip(rows, held.items(), strict=False):
        row.name, row.size = name.encode(), values.size
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    parameters.imatrix = rows
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if code:
        raise RuntimeError(f"llama.cpp stopped with code {code} while quantising {source.name} to {mixture}")
