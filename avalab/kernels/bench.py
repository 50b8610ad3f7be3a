"""How close each kernel comes to the limit of this machine, and to its peers: `python -m avalab.kernels.bench`.

Method:
1. the machine's limits are measured in the same run: bytes read a second from a buffer of the weight's own size, and
   operations a second of a square bf16 matrix product;
2. every operation runs as all its arms in turn (ours, the reference's dense form, bitsandbytes), warmed up, raw samples
   kept;
3. the limit's prediction is the larger of operations / peak and bytes / read rate; `roofline_fraction` is prediction /
   median;
4. peak memory is the growth of resident memory in a process of its own, one an arm (allocated memory on a GPU).
Records: `kernel_ms` with samples, `roofline_fraction`, `peak_bytes`; details hold shape, operations, bytes and load
average. An arm that cannot run here leaves a record without value whose note says why.

What it does not do: plot (notebook 10), judge the targets.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from avalab.experiment import PROFILES, Record, Run, load_average
from avalab.kernels import bench_peers, library
from avalab.kernels.bench_arms import Arms, encode_arms, lora_arms, loss_arms, product_arms
from avalab.kernels.product_checks import sample
from avalab.kernels.weight import decode

COLD_BYTES = 2**27  # more than the last cache holds
PLAIN = ("bf16", "dense", "reference")  # the arm that the others must agree with


@dataclass(frozen=True)
class Sizes:
    """What one profile measures."""

    shapes: tuple[tuple[int, int], ...]  # rows, columns of the weights
    batches: tuple[int, ...]  # rows of activations
    rank: int
    lora_tokens: int
    loss: tuple[int, int, int]  # tokens, width, vocabulary
    samples: int
    peak_side: int  # of the square matrix product


SIZES = {
    "smoke": Sizes(((64, 128),), (1, 64), 4, 64, (64, 64, 512), 3, 256),
    "laptop": Sizes(((1536, 576), (4096, 4096)), (1, 16, 512, 2048), 16, 1024, (2048, 576, 49152), 5, 2048),
    "a2000": Sizes(((8192, 2048), (14336, 4096)), (1, 16, 512, 4096), 16, 4096, (4096, 2048, 151936), 15, 8192),
}
SIZES["long"] = SIZES["laptop"]


def measure(run: Run) -> list[Record]:
    """All records of this module for the run's profile and device."""
    sizes = SIZES[run.profile_name]
    products(run, sizes)
    encodings(run, sizes)
    lora(run, sizes)
    losses(run, sizes)
    absent(run)
    return run.records


def absent(run: Run) -> None:
    """A record without value for every peer, and every form of ours, that cannot run here; its note says why."""
    found = bench_peers.reasons(run.device)
    if not run.device.startswith("cuda"):
        found |= dict.fromkeys(
            ("encode:triton", "product:triton", "linear_cross_entropy:triton", "linear_kl:triton"), "needs a GPU"
        )
    for subject, reason in found.items():
        run.record(subject, "kernel_ms", None, "ms", note=reason)


def interleaved(arms: Arms, samples: int, device: str = "cpu") -> dict[str, list[float]]:
    """Milliseconds of each arm, one after another in every round, after two rounds to warm up.

    Before each arm another buffer is read, so that none finds the weight in cache because of the arm before it.
    """
    found, cold = {name: [] for name in arms}, torch.ones(COLD_BYTES // 4, device=device)
    for number in range(samples + 2):
        for name, arm in arms.items():
            cold.sum()
            _wait(device)
            started = time.perf_counter()
            arm()
            _wait(device)
            if number >= 2:
                found[name].append((time.perf_counter() - started) * 1e3)
    return found


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matrix_peak(side: int, device: str = "cpu") -> float:
    """Operations a second of a bf16 matrix product of this side: the best of five."""
    a = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    return 2 * side**3 / min(interleaved({"peak": lambda: a @ a}, 5, device)["peak"]) * 1e3


def read_rate(size: int, device: str = "cpu") -> float:
    """Bytes a second read from a buffer of `size` bytes: the best of five sums."""
    data = torch.ones(max(1, size // 4), device=device)
    return data.nbytes / min(interleaved({"read": data.sum}, 5, device)["read"]) * 1e3


def _record(run: Run, subject: str, arms: Arms, work: tuple[int, dict[str, int]], limits: tuple[float, float]) -> None:
    """Time the arms that agree; work: operations, and bytes read by arm; limits: operations and bytes a second."""
    (flops, read), (arms, dropped) = work, bench_peers.checked(arms, next(arm for arm in PLAIN if arm in arms))
    for name, reason in dropped.items():
        run.record(f"{subject}:{name}", "kernel_ms", None, "ms", note=reason)
    for name, samples in interleaved(arms, SIZES[run.profile_name].samples, run.device).items():
        median, lowest = statistics.median(samples), max(flops / limits[0], read[name] / limits[1]) * 1e3
        details = {"flops": flops, "bytes": read[name], "load_average": load_average()}
        details |= {"flops_per_s": limits[0], "bytes_per_s": limits[1]}
        more = {"n": len(samples), "details": details}
        label = f"{subject}:{name}"
        run.record(label, "kernel_ms", median, "ms", low=min(samples), high=max(samples), samples=samples, **more)
        if flops:  # where nobody counted them, reading alone is no limit to speak of
            run.record(label, "roofline_fraction", lowest / median, "1", **more)


def products(run: Run, sizes: Sizes) -> None:
    """Every form of the 4-bit product and its peers, for each format, shape and batch."""
    peak = matrix_peak(sizes.peak_side, run.device)
    for kind, rows, cols in ((kind, *shape) for kind in ("nf4", "int4_zero_point") for shape in sizes.shapes):
        weight = library.prepare(sample(run.device, kind=kind, rows=rows, cols=cols))
        dense = decode(weight, torch.bfloat16)
        limits = peak, read_rate(rows * cols // 2, run.device)
        for batch in sizes.batches:
            x = torch.randn(batch, cols, device=run.device).bfloat16()
            arms = product_arms(x, weight, dense)
            read = {name: dense.nbytes if name == "bf16" else rows * cols // 2 for name in arms}
            _record(run, f"product {kind} {rows}x{cols} batch {batch}", arms, (2 * batch * rows * cols, read), limits)


def encodings(run: Run, sizes: Sizes) -> None:
    """A bf16 weight rounded to NF4 and packed, and its peers; no operations are counted, only what has to be read."""
    for rows, cols in sizes.shapes:
        arms = encode_arms(run.device, (rows, cols))
        limits = matrix_peak(sizes.peak_side, run.device), read_rate(2 * rows * cols, run.device)
        _record(run, f"encode nf4 {rows}x{cols}", arms, (0, dict.fromkeys(arms, 2 * rows * cols)), limits)


def lora(run: Run, sizes: Sizes) -> None:
    """One forward and backward pass of a quantised linear layer with LoRA, and its peers."""
    rows, cols = sizes.shapes[0]
    arms = lora_arms(run.device, (rows, cols), tokens=sizes.lora_tokens, rank=sizes.rank)
    flops = 2 * sizes.lora_tokens * (2 * rows * cols + 3 * sizes.rank * (rows + cols))
    read = {name: (4 if name == "bf16" else 1) * rows * cols for name in arms}  # there and back
    limits = matrix_peak(sizes.peak_side, run.device), read_rate(rows * cols // 2, run.device)
    _record(run, f"lora nf4 {rows}x{cols} tokens {sizes.lora_tokens}", arms, (flops, read), limits)


def losses(run: Run, sizes: Sizes) -> None:
    """Chunked and dense losses with a trained and a frozen head: time, and peak memory in a process of its own."""
    tokens, width, vocab = sizes.loss
    limits = matrix_peak(sizes.peak_side, run.device), read_rate(2 * width * vocab, run.device)
    for trained in (True, False):
        name = f"loss {tokens}x{width}x{vocab} {'trained' if trained else 'frozen'}"
        arms = loss_arms(run.device, sizes.loss, trained=trained)
        flops = 2 * tokens * width * vocab * (3 if trained else 2)
        _record(run, name, arms, (flops, dict.fromkeys(arms, 2 * width * vocab)), limits)
        timed = {r.subject for r in run.records if r.metric == "kernel_ms" and r.value is not None}
        for arm in (arm for arm in arms if f"{name}:{arm}" in timed):
            peak, details = _peak_alone(run, arm, trained), {"load_average": load_average()}
            run.record(f"{name}:{arm}", "peak_bytes", peak, "byte", n=1, details=details)


def _peak_alone(run: Run, arm: str, trained: bool) -> int:
    flags = ["--profile", run.profile_name, "--device", run.device, "--peak", arm]
    command = [sys.executable, "-m", __spec__.name, *flags, *([] if trained else ["--frozen"])]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak_bytes(device: str, size: tuple[int, int, int], arm: str, *, trained: bool) -> int:
    """Growth of this process's memory (of a GPU's allocated memory) in one step of the loss, over its inputs."""
    loss_arms(device, SIZES["smoke"].loss, trained=trained)[arm]()  # libraries and checks are in memory before
    step = loss_arms(device, size, trained=trained)[arm]
    gc.collect()
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = _resident_peak(reset=True)
    step()
    return _resident_peak() - before


def _resident_peak(*, reset: bool = False) -> int:
    """Peak of resident bytes; where the kernel lets it, since the last `reset`, elsewhere since the process began."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
    except OSError:  # not Linux, or not allowed
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measure and save, or with --peak print one arm's peak of memory."""
    parser = argparse.ArgumentParser(description="Time the kernels against their peers and the machine's limits.")
    parser.add_argument("--profile", choices=list(PROFILES), default="laptop")
    parser.add_argument("--device", default="")
    parser.add_argument("--peak", default="", help="print the peak memory of this arm of the loss, in bytes")
    parser.add_argument("--frozen", action="store_true", help="with --peak: the head is not trained")
    chosen = parser.parse_args()
    if chosen.peak:
        size = SIZES[chosen.profile].loss
        print(peak_bytes(chosen.device, size, chosen.peak, trained=not chosen.frozen))
        return
    run = Run("bench_kernels", chosen.profile)
    print(f"load average {load_average()}, {torch.get_num_threads()} threads")
    for record in measure(run):
        shown = "-" if record.value is None else f"{record.value:.4g}"
        print(f"{record.subject:60} {record.metric:18} {shown:>10} {record.unit} {record.note}")
    print(run.save())


if __name__ == "__main__":
    main()
