"""How much energy a machine has used: its own counters, where it shows them.

1. `counters` lists what can be read: RAPL's packages below /sys/class/powercap (microjoules, starting anew at a stated
   range), and for a GPU the driver's total (NVML, millijoules).
2. `joules` is the difference of two readings of all counters, one start anew per counter allowed for.

A package's counter covers everything that runs on it, idle power included: on a busy machine it says nothing about one
process. Reading RAPL needs rights that many systems give to root only. Source: Linux power capping framework; NVML's
nvmlDeviceGetTotalEnergyConsumption.

What it does not do: estimate energy from time or from a processor's nominal power; without a counter nothing is said.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """One counter: its name, its present value, joules of one step, and where it starts anew (0: never)."""

    name: str
    read: Callable[[], int]
    joules: float
    range: int = 0


def counters(device: str = "cpu", *, root: Path = POWERCAP) -> list[Counter]:
    """The counters that this process may read for a device; an empty list where there are none (see `missing`)."""
    if device.startswith("cuda"):
        return _gpu()
    found = []
    for zone in sorted(root.glob("intel-rapl:*")):
        file = zone / "energy_uj"
        if zone.name.count(":") == 1 and _readable(file):  # sub-zones such as intel-rapl:0:0 are parts of a package
            size = int((zone / "max_energy_range_uj").read_text())
            found.append(Counter((zone / "name").read_text().strip(), lambda f=file: int(f.read_text()), 1e-6, size))
    return found


def missing(device: str = "cpu", *, root: Path = POWERCAP) -> str:
    """Why there is no counter for a device; empty where there is one."""
    if counters(device, root=root):
        return ""
    if device.startswith("cuda"):
        return "not measured: the GPU's driver shows no energy counter"
    if not list(root.glob("intel-rapl:*")):
        return f"not measured: no RAPL counter in {root}"
    return f"not measured: no right to read energy_uj below {root}"


def readings(found: list[Counter]) -> list[int]:
    """The present value of each counter."""
    return [counter.read() for counter in found]


def joules(found: list[Counter], before: list[int], after: list[int]) -> float:
    """Joules between two `readings`, summed over the counters; a counter that started anew once is allowed for."""
    total = 0.0
    for counter, first, last in zip(found, before, after, strict=True):
        steps = last - first
        total += counter.joules * (steps + counter.range if steps < 0 else steps)
    return total


def _readable(file: Path) -> bool:
    try:
        file.read_text()
    except OSError:  # the kernel has let root alone read it since 2020
        return False
    return True


def _gpu() -> list[Counter]:
    """The first GPU's counter, found through its identity: NVML counts GPUs that this process may not see."""
    import torch

    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if not torch.cuda.is_available() or library.nvmlInit_v2():
        return []
    handle, identity = ctypes.c_void_p(), f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    if library.nvmlDeviceGetHandleByUUID(identity.encode(), ctypes.byref(handle)):
        return []

    def read() -> int:
        millijoules = ctypes.c_ulonglong()
        code = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return -1 if code else millijoules.value

    return [Counter("gpu", read, 1e-3)] if read() >= 0 else []
