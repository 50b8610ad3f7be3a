"""llama.cpp: the engine for GGUF files through llama-cpp-python's plain C functions, K types by its own quantiser, and
how it is built for this machine.

1. `load`: prompt and steps go through `llama_decode`; logits are copied out and the shared greedy loop chooses. The
   key-value cache is allocated whole: `context` tokens of it, which is then the longest sequence.
2. `write`: the dense artefact becomes a GGUF file of 16-bit floats (`gguf`), and `llama_model_quantize` writes one of a
   mixture of block types, whose choice is its own. With windows of calibration tokens the importance of a column is the
   mean square of what it is multiplied with, which is what llama.cpp's imatrix tool averages, from one walk over the
   blocks (`walk`). Rows that 256 does not divide fall back to blocks of 32 (q4_k to q5_0, q6_k to q8_0).
3. `build_flags`: the package compiles llama.cpp while it is installed (`make setup-llamacpp`). Its native build crashes
   on x86 processors with AMX (release 0.3): there the build gets the instruction sets by name instead, those that
   /proc/cpuinfo lists and AMX left out. On other processors, or where that file is missing, the native build is right.

For a GPU add -DGGML_CUDA=ON to the flags of the build.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from avalab.engines import checks, engine
from avalab.engines import gguf as gguf_file
from avalab.engines.checks import Check
from avalab.engines.engine import Engine
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, ProcessFailed
from avalab.models import checkpoint, gguf_layout, walk

INSTALL = "make setup-llamacpp (it compiles llama.cpp and then the extra [llamacpp]; a C++ compiler is needed)"

BATCH = 512  # tokens of a prompt that are read at once


def load(
    artifact: Artifact | Path, *, context: int = 2048, threads: int = 0, gpu_layers: int = 0, cache_bits: int = 16
) -> Engine:
    """Open a GGUF artefact; `gpu_layers` of its blocks go to a GPU (-1: all), `threads` 0 leaves llama.cpp's choice.

    `cache_bits` 8 keeps keys and values as q8_0, which llama.cpp can only with its fused attention.
    Raises ValueError for a file that llama.cpp refuses (truncated, or with tensors of a type that it does not know).
    """
    folder = engine.folder_for("llamacpp", artifact)
    engine.require("llamacpp", "llama_cpp", INSTALL)
    from llama_cpp import GGML_TYPE_F16, GGML_TYPE_Q8_0, Llama

    facts = engine.model_facts(folder, context=context)
    file, kept = engine.gguf_file(folder), GGML_TYPE_Q8_0 if cache_bits == 8 else GGML_TYPE_F16
    try:
        model = Llama(
            str(file),
            n_ctx=facts.context,
            n_batch=BATCH,
            n_ubatch=BATCH,
            n_threads=threads or None,
            n_threads_batch=threads or None,
            n_gpu_layers=gpu_layers,
            type_k=kept,
            type_v=kept,
            flash_attn=cache_bits == 8,
            verbose=False,
        )
    except ValueError as error:
        raise InputError(f"llama.cpp cannot read {file}: {error}") from error
    return engine.from_reader("llamacpp", folder, facts, {"model": model}, _reader)


def _reader(state: dict, capacity: int, every: bool) -> Callable[[list[int]], Tensor]:
    import llama_cpp

    model, read = state["model"], 0
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)

    def decode(tokens: list[int]) -> Tensor:
        nonlocal read
        size = len(tokens)
        batch = llama_cpp.llama_batch_init(size, 0, 1)
        batch.n_tokens = size
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, read + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = every or index == size - 1
        code = llama_cpp.llama_decode(model.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise ProcessFailed(f"llama.cpp stopped with code {code} while reading {size} tokens from position {read}")
        read += size
        rows = size if every else 1
        found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), shape=(rows, model.n_vocab()))
        return torch.from_numpy(found.copy())  # the library's own memory, overwritten by the next batch

    return lambda tokens: torch.cat([decode(tokens[at : at + BATCH]) for at in range(0, len(tokens), BATCH)])


# --- K types by llama.cpp's quantiser --------------------------------------------------------------------------------

MIXTURES = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")

COARSE = {"q6_k": "q5_0", "q5_k_m": "q5_0", "q4_k_m": "q4_0", "q3_k_m": "q4_0", "q2_k": "q4_0"}  # as coarse, or finer

LEAST = dict.fromkeys(MIXTURES[:3], checks.FLOOR) | {"q3_k_m": 0.5, "q2_k": 1.0}  # of the logits' spread

READ_BY = ("torch", "llamacpp")  # OpenVINO GenAI reads no K types


def write(
    artifact: Artifact, mixture: str, *, windows: Int[Tensor, "window time"] | None = None, out: Path | None = None
) -> Artifact:
    """Quantise a dense artefact into `<name>+gguf-<mixture>` beside it or `out`; one made before is reused.

    Raises ValueError for an unknown mixture or a model that is not dense, EngineUnavailable without llama-cpp-python.
    """
    engine.check_source(artifact.path, mixture, known=MIXTURES, form="llama.cpp's quantiser")
    engine.require("llamacpp", "llama_cpp", INSTALL)
    text = "" if windows is None else artifacts.sha256_of_text(str(windows.tolist()))
    step = {"step": "llama.cpp", "mixture": mixture, "calibration": text}
    about = artifacts.Export(step, f"gguf-{mixture}", READ_BY)
    check = checks.against(artifact, Check(dict.fromkeys(("llamacpp", "torch"), COARSE[mixture]), least=LEAST[mixture]))
    return artifacts.write_export(
        artifact, about, lambda folder: quantise_to_gguf(artifact, folder, mixture, windows), check, out=out
    )


def quantise_to_gguf(
    artifact: Artifact, out: Path, mixture: str, windows: Int[Tensor, "window time"] | None = None
) -> dict[str, object]:
    """Fill `out` with one GGUF file; the block types that llama.cpp chose are returned under `formats`.

    Raises RuntimeError with llama.cpp's code when it fails.
    """
    target = out / f"{artifact.name}.{mixture}.gguf"
    columns = {} if windows is None else importance(artifact, windows)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "model.gguf"
        gguf_file.export(artifact.path, source, "f16")
        _quantise_file(source, target, mixture, columns)
        modelfile = (source.parent / "Modelfile").read_text()
    (out / "Modelfile").write_text(modelfile.replace(source.name, target.name))
    gguf_file.copy_beside(artifact.path, out)
    types = gguf_file.check(target)
    return {"formats": dict(sorted(types.items())), "calibration_tokens": 0 if windows is None else windows.numel()}


def importance(artifact: Artifact, windows: Int[Tensor, "window time"]) -> dict[str, np.ndarray]:
    """Mean squared input of each column, float32, by the file's name of each linear layer."""
    model = checkpoint.load_model(artifact)
    names = gguf_layout.tensor_namer(gguf_file.checked_config(artifact.path))
    found = {}
    for site in walk.calibration_sites(model, windows):
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
        raise ProcessFailed(f"llama.cpp stopped with code {code} while quantising {source.name} to {mixture}")


# --- how llama.cpp is built for this machine -------------------------------------------------------------------------

SETS = {  # the build's name of an instruction set: the processor's flags that it needs
    "SSE42": ("sse4_2",),
    "AVX": ("avx",),
    "AVX2": ("avx2",),
    "FMA": ("fma",),
    "F16C": ("f16c",),
    "BMI2": ("bmi2",),
    "AVX_VNNI": ("avx_vnni",),
    "AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "AVX512_VBMI": ("avx512_vbmi", "avx512vbmi"),
    "AVX512_VNNI": ("avx512_vnni",),
    "AVX512_BF16": ("avx512_bf16",),
}

EITHER = {"AVX512_VBMI"}  # kernels name this flag one way or the other

CPUINFO = Path("/proc/cpuinfo")


def build_flags(cpuinfo: str) -> list[str]:
    """CMake flags for the processor that the text of /proc/cpuinfo describes."""
    listed = {word for line in cpuinfo.splitlines() if line.startswith("flags") for word in line.split()[2:]}
    if not listed:  # not x86, or not Linux
        return ["-DGGML_NATIVE=ON"]
    found = [name for name, needs in SETS.items() if (any if name in EITHER else all)(f in listed for f in needs)]
    missing = [name for name in SETS if name not in found]
    return ["-DGGML_NATIVE=OFF", *(f"-DGGML_{n}=ON" for n in found), *(f"-DGGML_{n}=OFF" for n in missing)]


def print_build_flags() -> None:
    """Print the flags for this machine, as CMAKE_ARGS takes them; exit with one line where a compiler is missing."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):  # pip brings cmake and ninja
        raise SystemExit(
            "no C++ compiler (c++, g++ or clang++); install one: apt-get install g++, or conda install gxx"
        )
    x86_linux = platform.machine() in ("x86_64", "AMD64") and CPUINFO.is_file()
    print(" ".join(build_flags(CPUINFO.read_text() if x86_linux else "")))
