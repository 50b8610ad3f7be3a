"""How llama.cpp is built for this machine: `python -m avalab.llamacpp_build` prints the flags for CMAKE_ARGS.

llama-cpp-python compiles llama.cpp while it is installed. Its native build crashes on x86 processors with AMX (release
0.3): there the build gets the instruction sets by name instead, those that /proc/cpuinfo lists and AMX left out. On
other processors, or where that file is missing, the native build is right.

What it does not do: build (`make setup-llamacpp` does), or GPU flags (add -DGGML_CUDA=ON).
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

# The build's name of an instruction set: the processor's flags that it needs.
SETS = {
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


def flags(cpuinfo: str) -> list[str]:
    """CMake flags for the processor that the text of /proc/cpuinfo describes."""
    listed = {word for line in cpuinfo.splitlines() if line.startswith("flags") for word in line.split()[2:]}
    if not listed:  # not x86, or not Linux
        return ["-DGGML_NATIVE=ON"]
    found = [name for name, needs in SETS.items() if (any if name in EITHER else all)(f in listed for f in needs)]
    missing = [name for name in SETS if name not in found]
    return ["-DGGML_NATIVE=OFF", *(f"-DGGML_{n}=ON" for n in found), *(f"-DGGML_{n}=OFF" for n in missing)]


def here() -> str:
    """The flags for this machine, as CMAKE_ARGS takes them."""
    x86_linux = platform.machine() in ("x86_64", "AMD64") and CPUINFO.is_file()
    return " ".join(flags(CPUINFO.read_text() if x86_linux else ""))


def missing_compiler() -> str:
    """One line that names what a build lacks; empty where a C++ compiler is there (pip brings cmake and ninja)."""
    if any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return ""
    return "no C++ compiler (c++, g++ or clang++); install one: apt-get install g++, or conda install gxx"


if __name__ == "__main__":
    if missing := missing_compiler():
        raise SystemExit(missing)
    print(here())
