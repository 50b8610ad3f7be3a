"""llama.cpp: the engine for GGUF files, K types by its own quantiser, and how it is built for this machine.

1. `load`: prompt and steps go through llama.cpp's C functions (`llamacpp_library`, which also says which builds there
   are, one of them a wheel); the shared greedy loop chooses from the logits, so that grammars and end tokens are the
   lab's own. The key-value cache is allocated whole: `context` tokens of it, which is then the longest sequence.
2. `write`: the dense artefact becomes a GGUF file of 16-bit floats (`gguf`), and llama.cpp writes one of a mixture of
   block types, whose choice is its own. With windows of calibration tokens the importance of a column is the mean
   square of what it is multiplied with, which is what llama.cpp's imatrix tool averages, from one walk over the blocks
   (`walk`). Rows that 256 does not divide fall back to blocks of 32 (q4_k to q5_0, q6_k to q8_0).
3. `build_flags`: `make setup-llamacpp` compiles llama.cpp, for those who want to. Its native build crashes on x86
   processors with AMX (release 0.3): there the build gets the instruction sets by name instead, those that
   /proc/cpuinfo lists and AMX left out. On other processors, or where that file is missing, the native build is right.

For a GPU add -DGGML_CUDA=ON to the flags of the build and load with `build="python"`.
"""

from __future__ import annotations

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
from avalab.engines.engine import Engine, EngineUnavailable
from avalab.lab import artifacts, llamacpp_library
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import Unavailable
from avalab.lab.llamacpp_library import Library, Model
from avalab.models import checkpoint, gguf_layout, walk

BATCH = 512  # tokens of a prompt that are read at once

LOGITS_BYTES = 2**26  # at most, of a batch whose logits are all asked for


def load(
    artifact: Artifact | Path,
    *,
    context: int = 2048,
    threads: int = 0,
    gpu_layers: int = 0,
    cache_bits: int = 16,
    build: str = "",
    keep_prefix: bool = False,
) -> Engine:
    """Open a GGUF artefact; `gpu_layers` of its blocks go to a GPU (-1: all), `threads` 0 takes every processor.

    `cache_bits` 8 keeps keys and values as q8_0, which llama.cpp can only with its fused attention. `build` is one of
    `llamacpp_library.BUILDS`, "" the first that is here. `keep_prefix` reads only where a prompt differs from the last
    sequence, for chats that grow: other batches, so that a near-tie of two tokens may turn.
    Raises ValueError for a file that llama.cpp refuses (truncated, or with tensors of a type that it does not know).
    """
    folder = engine.folder_for("llamacpp", artifact)
    library = _library(build)
    facts = engine.model_facts(folder, context=context)
    model = Model(
        library,
        engine.gguf_file(folder),
        context=facts.context,
        batch=BATCH,
        threads=threads,
        gpu_layers=gpu_layers,
        cache_type=llamacpp_library.Q8_0 if cache_bits == 8 else llamacpp_library.F16,
    )
    state = {"model": model} | ({"held": []} if keep_prefix else {})
    return engine.from_reader("llamacpp", folder, facts, state, _reader)


def _library(build: str = "", *, among: tuple[str, ...] = ()) -> Library:
    try:
        return llamacpp_library.opened(llamacpp_library.find(build, among=among))
    except Unavailable as error:
        raise EngineUnavailable(f"engine llamacpp: {error}") from error


def _reader(state: dict, capacity: int, every: bool) -> Callable[[list[int]], Tensor]:
    model, held = state["model"], state.get("held")
    if held is None or every:
        model.clear()
        if held:
            held.clear()
    at_once = min(BATCH, max(1, LOGITS_BYTES // (4 * model.vocabulary))) if every else BATCH

    begun = held is None or every

    def read(tokens: list[int]) -> Tensor:
        nonlocal begun
        if not begun:
            begun, tokens = True, _unread(model, held, tokens)
        if held is not None and not every:
            held.extend(tokens)
        pieces = (tokens[at : at + at_once] for at in range(0, len(tokens), at_once))
        return torch.cat([torch.from_numpy(model.read(piece, every=every)) for piece in pieces])

    return read


def _unread(model: Model, held: list[int], tokens: list[int]) -> list[int]:
    """The end of a prompt that the cache does not hold, one token at least; what differs is forgotten."""
    most = min(len(held), len(tokens) - 1)
    same = next((at for at in range(most) if held[at] != tokens[at]), most)
    if not model.forget_from(same):
        same = 0
    del held[same:]
    return tokens[same:]


# --- K types by llama.cpp's quantiser --------------------------------------------------------------------------------

MIXTURES = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")

COARSE = {"q6_k": "q5_0", "q5_k_m": "q5_0", "q4_k_m": "q4_0", "q3_k_m": "q4_0", "q2_k": "q4_0"}  # as coarse, or finer

LEAST = dict.fromkeys(MIXTURES[:3], checks.FLOOR) | {"q3_k_m": 0.5, "q2_k": 1.0}  # of the logits' spread

READ_BY = ("torch", "llamacpp")  # OpenVINO GenAI reads no K types


def write(
    artifact: Artifact, mixture: str, *, windows: Int[Tensor, "window time"] | None = None, out: Path | None = None
) -> Artifact:
    """Quantise a dense artefact into `<name>+gguf-<mixture>` beside it or `out`; one made before is reused.

    Raises ValueError for an unknown mixture or a model that is not dense, EngineUnavailable without a build
    of llama.cpp that quantises.
    """
    engine.check_source(artifact.path, mixture, known=MIXTURES, form="llama.cpp's quantiser")
    require_quantiser()
    text = "" if windows is None else artifacts.sha256_of_text(str(windows.tolist()))
    step = {"step": "llama.cpp", "mixture": mixture, "calibration": text}
    about = artifacts.Export(step, f"gguf-{mixture}", READ_BY)
    check = checks.against(artifact, Check(dict.fromkeys(("llamacpp", "torch"), COARSE[mixture]), least=LEAST[mixture]))
    return artifacts.write_export(
        artifact, about, lambda folder: quantise_to_gguf(artifact, folder, mixture, windows), check, out=out
    )


def require_quantiser() -> None:
    """Raise EngineUnavailable, with the way to get one, where no build of llama.cpp that quantises is here."""
    _quantiser_build()


def _quantiser_build() -> llamacpp_library.Build:
    try:
        return llamacpp_library.find(among=llamacpp_library.QUANTISERS)
    except Unavailable as error:
        raise EngineUnavailable(f"K types need llama.cpp's quantiser: {error}") from error


def quantise_to_gguf(
    artifact: Artifact, out: Path, mixture: str, windows: Int[Tensor, "window time"] | None = None
) -> dict[str, object]:
    """Fill `out` with one GGUF file; the block types that llama.cpp chose are returned under `formats`.

    Raises RuntimeError with llama.cpp's code when it fails, EngineUnavailable without a build that quantises.
    """
    require_quantiser()
    config = gguf_file.checked_config(artifact.path)
    target = out / f"{artifact.name}.{mixture}.gguf"
    columns = {} if windows is None else importance(artifact, windows)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "model.gguf"
        gguf_file.export(artifact.path, source, "f16")
        library = _library(_quantiser_build().name)
        llamacpp_library.quantise(library, source, target, mixture, columns)
        modelfile = (source.parent / "Modelfile").read_text()
    (out / "Modelfile").write_text(modelfile.replace(source.name, target.name))
    gguf_file.copy_beside(artifact.path, out, context=gguf_layout.context_of(config))
    types = gguf_layout.check(target)
    return {"formats": dict(sorted(types.items())), "calibration_tokens": 0 if windows is None else windows.numel()}


def importance(artifact: Artifact, windows: Int[Tensor, "window time"]) -> dict[str, np.ndarray]:
    """Mean squared input of each column, float32, by the file's name of each linear layer."""
    model = checkpoint.load_model(artifact, packed=False)
    names = gguf_layout.tensor_namer(gguf_file.checked_config(artifact.path))
    found = {}
    for site in walk.calibration_sites(model, windows):
        column = site.moment.detach().diagonal().contiguous().float().numpy()  # read through a bare pointer
        found |= {names(f"{layer}.weight"): column for layer in site.layers}
    return found


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
