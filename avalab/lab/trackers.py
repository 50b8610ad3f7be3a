"""What a measuring process reads of itself and of its machine: times of tokens, memory, memory's read rate, energy.

- **Memory.** Weights on a CPU are memory-mapped from safetensors: their pages count as *file* resident memory, appear
  when first touched and stay. Copies that an engine makes are *anonymous*. Their sum is what is compared. The kernel
  keeps its peak, which `reset_peak_memory` starts anew.
- **Read rate.** The best pass of summing a buffer of the size of what it is compared with, so that caches help both
  alike: decoding that reads all weights for each token cannot be faster (Williams et al., "Roofline", 2009).
- **Energy.** RAPL's packages below /sys/class/powercap (microjoules, starting anew at a stated range), and for a GPU
  the driver's total (NVML's nvmlDeviceGetTotalEnergyConsumption, millijoules). A package's counter covers all that runs
  on it, idle power included: on a busy machine it says nothing about one process. Reading RAPL needs rights that many
  systems give to root only. Nothing is estimated where there is no counter. Source: Linux power capping framework.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

Arms = dict[str, Callable[[], object]]

COLD_BYTES = 2**27  # more than the last cache holds

POWERCAP = Path("/sys/class/powercap")


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock reading covers what was launched."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def interleaved(arms: Arms, samples: int, device: str = "cpu") -> dict[str, list[float]]:
    """Milliseconds of each arm, one after another in every round, after two rounds to warm up.

    Before each arm another buffer is read, so that none finds the weight in cache because of the arm before it.
    """
    import torch

    found, cold = {name: [] for name in arms}, torch.ones(COLD_BYTES // 4, device=device)
    for number in range(samples + 2):
        for name, arm in arms.items():
            cold.sum()
            synchronize(device)
            started = time.perf_counter()
            arm()
            synchronize(device)
            if number >= 2:
                found[name].append((time.perf_counter() - started) * 1e3)
    return found


def processor_seconds() -> tuple[float, float, float]:
    """The clock, and seconds that all processors of the machine, and this process on them, have been busy so far.

    Time that a virtual machine's host gave to others counts as busy.
    """
    every, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = sum(getattr(every, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))  # guests are in user
    return time.perf_counter(), sum(every) - idle, own.user + own.system


def processors_of_others(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """How many processors other processes kept busy between two readings of `processor_seconds`, on average."""
    seconds, busy, own = (last - first for first, last in zip(before, after, strict=True))
    return max(0.0, busy - own) / max(seconds, 1e-9)


def process_memory() -> dict[str, int]:
    """Resident bytes of this process now (`rss` = `anonymous` + `file`) and their `peak` since `reset_peak_memory`.

    Outside Linux only `rss` is known and stands for the peak as well.
    """
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        rss = psutil.Process().memory_info().rss
        return {"rss": rss, "anonymous": 0, "file": 0, "peak": rss}
    kilobytes = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    names = {"rss": "VmRSS", "anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {name: kilobytes[key] * 1024 for name, key in names.items()}


def reset_peak_memory(device: str) -> None:
    """Start a new peak; where the kernel does not allow it, the peak is that of the process's whole life."""
    if Path("/proc/self/clear_refs").exists() and os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()


def peak_gpu_memory(device: str) -> int | None:
    """Peak bytes of a GPU's memory since `reset_peak_memory`; None on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else None


def limit_gpu_memory(device: str, gib: float | None) -> None:
    """Enforce a profile's cap on GPU memory in this process."""
    if gib and device.startswith("cuda"):
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def limit_memory_growth(size: int) -> None:
    """Let this process have at most `size` bytes more of its own memory than it has now, where the system can say so.

    Private writable memory counts (RLIMIT_DATA: heap and anonymous maps, thread stacks too), mapped files do not. What
    asks for more is refused by the system, which libraries tell as being out of memory.
    """
    try:
        import resource  # not on Windows

        held = re.search(r"^VmData:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except (ImportError, OSError):
        return
    if held:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(held[1]) * 1024 + size, most))


def set_malloc_threshold(size: int) -> None:
    """From `size` bytes on, map and unmap each block instead of keeping it; nothing where malloc is not glibc's."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, size)
        libc.mallopt(trim_threshold, 2 * size)


def return_free_memory() -> None:
    """Give freed blocks back to the system, where malloc is glibc's: what is allocated next is then seen to grow."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def memory_read_rate(footprint: int, *, device: str = "cpu", seconds: float = 0.4) -> float:
    """Bytes a second at which this process sums a float32 buffer of `footprint` bytes: the best of 5 passes or more."""
    import torch

    buffer = torch.ones(max(footprint // 4, 1), dtype=torch.float32, device=device)
    best, passes, stop = float("inf"), 0, time.perf_counter() + seconds
    while passes < 5 or time.perf_counter() < stop:
        synchronize(device)
        start = time.perf_counter()
        buffer.sum()
        synchronize(device)
        best, passes = min(best, time.perf_counter() - start), passes + 1
    return buffer.nbytes / best


def best_memory_read_rate(footprint: int, *, threads: int, seconds: float = 0.2) -> float:
    """`memory_read_rate` of one thread or of `threads` (0: torch's choice), whichever is faster."""
    import torch

    every, rates = torch.get_num_threads(), []
    for count in {1, threads or every}:
        torch.set_num_threads(count)
        rates.append(memory_read_rate(footprint, seconds=seconds))
    torch.set_num_threads(every)
    return max(rates)


@dataclass(frozen=True)
class Counter:
    """One counter: its name, its present value, joules of one step, and where it starts anew (0: never)."""

    name: str
    read: Callable[[], int]
    joules: float
    range: int = 0


def energy_counters(device: str = "cpu", *, root: Path = POWERCAP) -> list[Counter]:
    """The counters that this process may read for a device; an empty list where there are none (`why_no_energy`)."""
    if device.startswith("cuda"):
        return _gpu_counters()
    found = []
    for zone in sorted(root.glob("intel-rapl:*")):
        file = zone / "energy_uj"
        if zone.name.count(":") == 1 and _readable(file):  # sub-zones such as intel-rapl:0:0 are parts of a package
            size = int((zone / "max_energy_range_uj").read_text())
            found.append(Counter((zone / "name").read_text().strip(), lambda f=file: int(f.read_text()), 1e-6, size))
    return found


def why_no_energy(device: str = "cpu", *, root: Path = POWERCAP) -> str:
    """Why there is no counter for a device; empty where there is one."""
    if energy_counters(device, root=root):
        return ""
    if device.startswith("cuda"):
        return "not measured: the GPU's driver shows no energy counter"
    known = list(root.glob("intel-rapl:*"))
    return f"not measured: no {'right to read energy_uj below' if known else 'RAPL counter in'} {root}"


def read_counters(counters: Sequence[Counter]) -> list[int]:
    """The present value of each counter."""
    return [counter.read() for counter in counters]


def joules_between(counters: Sequence[Counter], before: list[int], after: list[int]) -> float:
    """Joules between two readings, summed over the counters; a counter that started anew once is allowed for."""
    steps = [last - first for first, last in zip(before, after, strict=True)]
    return sum(c.joules * (n + c.range if n < 0 else n) for c, n in zip(counters, steps, strict=True))


def _readable(file: Path) -> bool:
    try:
        file.read_text()
    except OSError:  # the kernel has let root alone read it since 2020
        return False
    return True


def _gpu_counters() -> list[Counter]:
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
