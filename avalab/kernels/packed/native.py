"""The native form of packed products: C++ compiled once for this processor, called through ctypes.

`library()` compiles `step.cpp` (and `packed.cpp`, which it includes) with the first of `COMPILERS` that is there
(AVALAB_CXX names another, or nothing: "none"), keeps the binary under the hash of source, compiler, flags and the
processor's features, and opens it. A processor with other features gets a binary of its own; none runs instructions
that it does not have. Threads are those of torch: the binary leaves OpenMP's functions open, and torch's own runtime,
which is there already, fills them.

Without a compiler, or with one that fails (its last line is said once), products run in their torch form.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SWITCH = "AVALAB_CXX"

COMPILERS = ("g++", "clang++", "c++")

FLAGS = ("-O2", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno")

SOURCE, INCLUDED = "step.cpp", "packed.cpp"

COMPILE_SECONDS = 300


def cache_folder() -> Path:
    """Where binaries are kept: AVALAB_NATIVE, or `avalab` in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avalab" / "native"
    return Path(os.environ.get("AVALAB_NATIVE") or default)


def features() -> list[str]:
    """The processor's instruction sets, as the system names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    told = {line.partition(":")[0].strip().lower(): line.partition(":")[2] for line in reversed(lines)}
    return [
        platform.machine(),
        told.get("model name", ""),
        *sorted((told.get("flags") or told.get("features", "")).split()),
    ]


def compiler() -> str:
    """The C++ compiler's path, or nothing."""
    asked = os.environ.get(SWITCH, "")
    if asked:
        return shutil.which(asked) or ""
    return next((path for name in COMPILERS if (path := shutil.which(name))), "")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had; why is in the log, once."""
    found = compiler()
    if not found:
        logging.getLogger(__name__).info("no C++ compiler (%s): packed products run in torch", ", ".join(COMPILERS))
        return None
    try:
        return _declared(ctypes.CDLL(str(_binary(found))))
    except (OSError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).warning("packed products run in torch: %s", _last_line(error))
        return None


def _last_line(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    said = said.decode(errors="replace") if isinstance(said, bytes) else said
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), type(error).__name__)


def _binary(found: str) -> Path:
    """The binary's path; compiled if it is not there. Raises OSError or SubprocessError."""
    source, included = (Path(__file__).with_name(name) for name in (SOURCE, INCLUDED))
    version = subprocess.run([found, "--version"], capture_output=True, timeout=30, check=True).stdout
    told = [*FLAGS, *features(), torch.__version__]
    key = hashlib.sha256(b"\0".join([version, source.read_bytes(), included.read_bytes(), *(t.encode() for t in told)]))
    target = cache_folder() / f"packed-{key.hexdigest()[:24]}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as room:
        made, compiled = Path(room, "packed.so"), f"{room}/packed.o"
        _run(found, *FLAGS, "-c", str(source), "-o", compiled)
        # Linked without -fopenmp: a second OpenMP runtime would bring threads of its own.
        _run(found, "-shared", "-o", str(made), compiled)
        try:
            ctypes.CDLL(str(made))
        except OSError:  # torch brings no runtime that fits: the compiler's own
            _run(found, "-shared", "-fopenmp", "-o", str(made), compiled)
        made.replace(target)
    return target


def _run(*arguments: str) -> None:
    subprocess.run(arguments, capture_output=True, timeout=COMPILE_SECONDS, check=True)


def _declared(opened: ctypes.CDLL) -> ctypes.CDLL:
    if opened.packed_lanes() != 16:
        raise OSError("the compiled kernels are of another layout")
    place, count, switch = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    opened.packed_multiply.argtypes = [place, place, count, switch, place, switch]
    opened.packed_decode.argtypes = [place, *[count] * 4, switch, place, count, switch]
    opened.packed_step.argtypes = [place, place, count, place, switch]
    for function in (opened.packed_multiply, opened.packed_decode, opened.packed_step):
        function.restype = None
    return opened
