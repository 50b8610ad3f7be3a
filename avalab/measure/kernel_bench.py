"""A benchmark of every kernel against the limit of this machine and its peers: `python -m avalab.measure.kernel_bench`.

1. The machine's limits are measured in the same run: bytes read a second from a buffer of the weight's own size, and
   operations a second of a square bf16 matrix product.
2. Every operation runs as all its arms in turn, warmed up, raw samples kept. An arm that fails, or computes something
   else than the plain form, is dropped and its record says why; so does that of one that cannot run here.
3. `roofline_fraction` is the limit's prediction, the larger of operations / peak and bytes / rate, over the median.
4. Peak memory is the growth of resident memory in a process of its own, one an arm (allocated memory on a GPU).

Arms of the 4-bit product: ours, bf16 (what 4 bits must not be slower than), bitsandbytes' own entry point in its
inference layout, its decode-then-multiply form for training, and torch's int4 kernel (which torchao calls). Of
encoding: the definition in plain torch, and bitsandbytes. Of the layer with an adapter: autograd over bitsandbytes'
decoding, as peft has it. Of the loss: full logits widened to float32, as transformers has it, and in bf16. Beside them
stand the kernels of other projects (`PEERS`), where they are installed: cut cross-entropy (Wijmans et al. 2024), which
on a CPU is a compiled dense loss, Liger kernel (Hsu et al. 2024), GemLite and bitsandbytes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from avalab import kernels
from avalab.kernels import encoding, formats, product
from avalab.kernels.product import sample_weight
from avalab.kernels.weight import Weight4, decode, group_scales
from avalab.lab import trackers
from avalab.lab.run import PROFILES, Run, load_average
from avalab.lab.statistics import median_and_range
from avalab.lab.trackers import Arms

ALLOWED_DIFFERENCE = 0.05  # of the plain form's result, in norm: bf16 and 4-bit scales in bf16 stay far below

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


def matrix_peak(side: int, device: str = "cpu") -> float:
    """Operations a second of a bf16 matrix product of this side: the best of five."""
    a = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    return 2 * side**3 / min(trackers.interleaved({"peak": lambda: a @ a}, 5, device)["peak"]) * 1e3


def read_rate(size: int, device: str = "cpu") -> float:
    """Bytes a second read from a buffer of `size` bytes: the best of five sums."""
    data = torch.ones(max(1, size // 4), device=device)
    return data.nbytes / min(trackers.interleaved({"read": data.sum}, 5, device)["read"]) * 1e3


def record_products(run: Run, sizes: Sizes) -> None:
    """Every form of the 4-bit product and its peers, for each format, shape and batch."""
    peak = matrix_peak(sizes.peak_side, run.device)
    for kind, (rows, cols) in itertools.product(("nf4", "int4_zero_point"), sizes.shapes):
        weight = product.prepare_small_batches(sample_weight(run.device, kind=kind, rows=rows, cols=cols))
        dense = decode(weight, torch.bfloat16)
        limits = peak, read_rate(rows * cols // 2, run.device)
        for batch in sizes.batches:
            x = torch.randn(batch, cols, device=run.device).bfloat16()
            arms = product_arms(x, weight, dense)
            read = {name: dense.nbytes if name == "bf16" else rows * cols // 2 for name in arms}
            subject, flops = f"product {kind} {rows}x{cols} batch {batch}", 2 * batch * rows * cols
            record_arms(run, subject, arms, flops=flops, read=read, limits=limits)


def record_encodings(run: Run, sizes: Sizes) -> None:
    """A bf16 weight rounded to NF4 and packed, and its peers; no operations are counted, only what has to be read."""
    for rows, cols in sizes.shapes:
        arms = encode_arms(run.device, (rows, cols))
        limits = matrix_peak(sizes.peak_side, run.device), read_rate(2 * rows * cols, run.device)
        read = dict.fromkeys(arms, 2 * rows * cols)
        record_arms(run, f"encode nf4 {rows}x{cols}", arms, flops=0, read=read, limits=limits)


def record_lora(run: Run, sizes: Sizes) -> None:
    """One forward and backward pass of a quantised linear layer with LoRA, and its peers."""
    rows, cols = sizes.shapes[0]
    arms = lora_arms(run.device, (rows, cols), tokens=sizes.lora_tokens, rank=sizes.rank)
    flops = 2 * sizes.lora_tokens * (2 * rows * cols + 3 * sizes.rank * (rows + cols))
    read = {name: (4 if name == "bf16" else 1) * rows * cols for name in arms}  # there and back
    limits = matrix_peak(sizes.peak_side, run.device), read_rate(rows * cols // 2, run.device)
    subject = f"lora nf4 {rows}x{cols} tokens {sizes.lora_tokens}"
    record_arms(run, subject, arms, flops=flops, read=read, limits=limits)


def record_losses(run: Run, sizes: Sizes) -> None:
    """Chunked and dense losses with a trained and a frozen head: time, and peak memory in a process of its own."""
    tokens, width, vocab = sizes.loss
    limits = matrix_peak(sizes.peak_side, run.device), read_rate(2 * width * vocab, run.device)
    for trained in (True, False):
        subject = f"loss {tokens}x{width}x{vocab} {'trained' if trained else 'frozen'}"
        arms = loss_arms(run.device, sizes.loss, trained=trained)
        flops, read = 2 * tokens * width * vocab * (3 if trained else 2), dict.fromkeys(arms, 2 * width * vocab)
        for arm in record_arms(run, subject, arms, flops=flops, read=read, limits=limits):
            flags = ["--profile", run.profile_name, "--device", run.device, "--peak", arm]
            command = [sys.executable, "-m", "avalab.measure.kernel_bench", *flags, *([] if trained else ["--frozen"])]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            details = {"load_average": load_average()}
            run.record(f"{subject}:{arm}", "peak_bytes", int(printed.split()[-1]), "byte", n=1, details=details)


def record_missing_kernels(run: Run) -> None:
    """A record without value for every peer, and every form of ours, that cannot run here; its note says why."""
    found = reasons(run.device)
    if not run.device.startswith("cuda"):
        operations = ("encode", "product", "linear_cross_entropy", "linear_kl")
        found |= {f"{operation}:triton": "needs a GPU" for operation in operations}
    for subject, reason in found.items():
        run.record(subject, "kernel_ms", None, "ms", note=reason)


def record_arms(
    run: Run, subject: str, arms: Arms, *, flops: int, read: dict[str, int], limits: tuple[float, float]
) -> list[str]:
    """Time the arms that agree with the plain one and return their names.

    `flops`: operations of the work, `read`: bytes by arm, `limits`: operations and bytes a second.
    """
    arms, dropped = agreeing_arms(arms, next(arm for arm in PLAIN if arm in arms))
    for name, reason in dropped.items():
        run.record(f"{subject}:{name}", "kernel_ms", None, "ms", note=reason)
    for name, samples in trackers.interleaved(arms, run.profile.pick(SIZES).samples, run.device).items():
        details = {"flops": flops, "bytes": read[name], "load_average": load_average()}
        details |= {"flops_per_s": limits[0], "bytes_per_s": limits[1]}
        record, found = partial(run.record, f"{subject}:{name}", details=details), median_and_range(samples)
        record("kernel_ms", unit="ms", samples=samples, **vars(found))
        if flops:  # where nobody counted them, reading alone is no limit to speak of
            least = max(flops / limits[0], read[name] / limits[1]) * 1e3
            record("roofline_fraction", least / found.value, "1", n=found.n)
    return list(arms)


def peak_bytes(device: str, size: tuple[int, int, int], arm: str, *, trained: bool) -> int:
    """Growth of this process's memory (of a GPU's allocated memory) in one step of the loss, over its inputs."""
    loss_arms(device, SIZES["smoke"].loss, trained=trained)[arm]()  # libraries and checks are in memory before
    step = loss_arms(device, size, trained=trained)[arm]
    gc.collect()
    trackers.reset_peak_memory(device)
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        step()
        return trackers.peak_gpu_memory(device) - before
    before = trackers.process_memory()["peak"]
    step()
    return trackers.process_memory()["peak"] - before


# --- what is timed against what ---------------------------------------------------------------------------------------


def product_arms(x: Tensor, weight: Weight4, dense: Tensor) -> Arms:
    """x times a weight of `product.prepare_small_batches`, whose decoded form is `dense`."""
    arms: Arms = {"avalab": lambda: kernels.multiply(x, weight), "bf16": lambda: x @ dense.T}
    small = weight.small_batch
    if small is not None and small.kernel == "int4pack":
        arms["torch-int4pack"] = lambda: product.product_library(x, weight)
    if x.is_cuda and weight.zero_points is not None:
        arms["torch-int4pack"] = _int4pack_gpu(x, weight)
    if product.is_nf4(weight.to("cpu")) and product.native_code():
        arms["bitsandbytes-decoded"] = lambda: functional.linear(x, product.decode_library(weight, x.dtype))
        if small is not None:
            arms["bitsandbytes"] = _bitsandbytes(x, weight)
    kind = "nf4" if weight.zero_points is None else "int4_zero_point"
    return arms | peer_arms(f"product {kind}", str(x.device), x, weight)


def _int4pack_gpu(x: Tensor, weight: Weight4) -> Callable[[], Tensor]:
    """torch's int4 product on a GPU: weights as (code - 8) * scale + offset."""
    scales = group_scales(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack(weight.codes.contiguous(), 8)
    both = torch.stack((scales, (8 - weight.zero_points) * scales), -1).transpose(0, 1).bfloat16().contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, weight.group_size, both)


def _bitsandbytes(x: Tensor, weight: Weight4) -> Callable[[], Tensor]:
    """bitsandbytes' inference path, entered as its Linear4bit enters it."""
    from bitsandbytes import functional as bnb_functional
    from bitsandbytes import matmul_4bit

    small = weight.small_batch
    state = bnb_functional.QuantState(
        absmax=small.scales,
        shape=torch.Size(weight.shape),
        code=weight.levels,
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    state.packing_format_for_cpu = True
    return lambda: matmul_4bit(x, small.codes, state)


def encode_arms(device: str, shape: tuple[int, int]) -> Arms:
    """A bf16 weight of this shape into codes of NF4: groups of 64, scales in float32."""
    weight, format = torch.randn(*shape, device=device).mul_(0.02).bfloat16(), formats.FORMATS["nf4"]
    arms: Arms = {
        "avalab": lambda: kernels.encode(weight, format).codes,
        "reference": lambda: encoding.encode_reference(weight, format).codes,
    }
    if product.native_code():
        from bitsandbytes import functional as bnb_functional

        arms["bitsandbytes"] = lambda: bnb_functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")[0]
    return arms


def lora_arms(device: str, shape: tuple[int, int], *, tokens: int, rank: int) -> Arms:
    """Forward and backward of a layer of this shape with an adapter, gradients of input and adapter."""
    weight = sample_weight(device, kind="nf4", rows=shape[0], cols=shape[1])
    dense = decode(weight, torch.bfloat16)
    shapes = ((tokens, shape[1]), (rank, shape[1]), (shape[0], rank))
    x, a, b = (torch.randn(each, device=device).bfloat16().requires_grad_() for each in shapes)

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward().sum(), (x, a, b))

    arms: Arms = {
        "avalab": step(lambda: kernels.linear(x, weight, a=a, b=b)),
        "bf16": step(lambda: functional.linear(x, dense) + (x @ a.T) @ b.T),
    }
    if product.native_code():
        arms["peft-bitsandbytes"] = step(lambda: _Decoded.apply(x, weight) + (x @ a.T) @ b.T)
    return arms


class _Decoded(torch.autograd.Function):
    """The whole weight decoded forward and again backward: what bitsandbytes' autograd function does."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight4) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, product.decode_library(weight, x.dtype))

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g @ product.decode_library(ctx.weight, g.dtype), None


def loss_arms(device: str, size: tuple[int, int, int], *, trained: bool) -> Arms:
    """Forward and backward of head and loss for (tokens, width, vocabulary), the head `trained` or frozen."""
    tokens, width, vocab = size
    head = torch.randn(vocab, width, device=device).mul_(0.05).bfloat16().requires_grad_(trained)
    hidden = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device=device)
    wanted = (hidden, head) if trained else (hidden,)

    def step(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), wanted)

    peers = peer_arms("loss", device, hidden, head, targets)
    return {
        "avalab": step(lambda: kernels.linear_cross_entropy(hidden, head, targets)),
        "dense": step(lambda: functional.cross_entropy((hidden @ head.T).float(), targets)),
        "dense-bf16": step(lambda: functional.cross_entropy(hidden @ head.T, targets)),
    } | {name: step(peer) for name, peer in peers.items()}


# --- kernels of other projects ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """One kernel of another project; `make` takes an operation's inputs and returns the call that is timed."""

    arm: str
    package: str  # as pip knows it; its module has the same name with underscores
    operation: str
    make: Callable[..., Callable[[], Tensor]]
    needs_gpu: bool = True


def why_missing(peer: Peer, device: str) -> str:
    """Why a peer cannot run here; empty when it can be tried."""
    if find_spec(peer.package.replace("-", "_")) is None:
        return f"not installed: pip install {peer.package}" + (" (and it needs a GPU)" if peer.needs_gpu else "")
    return "needs a GPU" if peer.needs_gpu and not device.startswith("cuda") else ""


def peer_arms(operation: str, device: str, *inputs: object) -> Arms:
    """The calls of all peers that compute `operation` and can run on `device`."""
    return {
        peer.arm: peer.make(*inputs) for peer in PEERS if peer.operation == operation and not why_missing(peer, device)
    }


def reasons(device: str) -> dict[str, str]:
    """`product nf4:gemlite`-like subject -> why that peer is not timed here."""
    found = {f"{peer.operation}:{peer.arm}": why_missing(peer, device) for peer in PEERS}
    return {subject: reason for subject, reason in found.items() if reason}


def agreeing_arms(arms: Arms, plain: str) -> tuple[Arms, dict[str, str]]:
    """The arms that run and agree with the arm `plain`, and the reasons of the others."""

    def flat(result: Tensor | tuple[Tensor, ...]) -> Tensor:
        parts = result if isinstance(result, tuple) else (result,)
        return torch.cat([part.detach().float().flatten() for part in parts])

    kept, dropped, expected = {}, {}, flat(arms[plain]())
    for name, arm in arms.items():
        try:
            gap = float((flat(arm()) - expected).norm() / expected.norm())
        except Exception as error:  # another project's kernel on this machine: whatever it raises is the answer
            said = str(error).strip() or type(error).__name__
            dropped[name] = f"fails here: {said.splitlines()[0]}"
            continue
        if gap <= ALLOWED_DIFFERENCE:
            kept[name] = arm
        else:
            dropped[name] = f"computes something else: {gap:.2g} of the result away"
    return kept, dropped


def _bitsandbytes_product(x: Tensor, weight: Weight4, *, one_row: bool) -> Callable[[], Tensor]:
    """The fused product that `matmul_4bit` takes for inference, or the older one, of one row of activations."""
    import bitsandbytes  # noqa: F401  (its import registers the operators)

    scales, operators = group_scales(weight).reshape(-1), torch.ops.bitsandbytes
    codes, shape = weight.codes.reshape(-1, 1), list(weight.shape)
    if one_row:  # with more it fails the check
        return lambda: operators.gemv_4bit.default(x, codes, shape, scales, weight.levels, weight.group_size)
    return lambda: operators.gemm_4bit.default(x, codes, shape, scales, weight.group_size, "nf4")


def _gemlite(x: Tensor, weight: Weight4) -> Callable[[], Tensor]:
    """GemLite's product of (code - zero point) * scale."""
    from gemlite.helper import A16W4_HQQ_INT

    codes = torch.stack((weight.codes >> 4, weight.codes & 15), -1).view(weight.shape)
    parts = [part.to(x.dtype).reshape(-1, 1) for part in (group_scales(weight), weight.zero_points)]
    layer = A16W4_HQQ_INT(device=str(x.device), dtype=x.dtype).from_weights(codes, *parts)
    return lambda: layer(x)


def _liger(hidden: Tensor, head: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda: liger_fused_linear_cross_entropy(hidden, head, targets)


def _cut_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    form = "cce" if hidden.is_cuda else "torch_compile"
    return lambda: linear_cross_entropy(hidden, head, targets, impl=form)


PEERS = (
    Peer("bitsandbytes-gemm", "bitsandbytes", "product nf4", partial(_bitsandbytes_product, one_row=False)),
    Peer("bitsandbytes-gemv", "bitsandbytes", "product nf4", partial(_bitsandbytes_product, one_row=True)),
    Peer("gemlite", "gemlite", "product int4_zero_point", _gemlite),
    Peer("liger", "liger-kernel", "loss", _liger),
    Peer("cut-cross-entropy", "cut-cross-entropy", "loss", _cut_cross_entropy, needs_gpu=False),
)


def main() -> None:
    """Measure and save, or with --peak print one arm's peak of memory."""
    parser = argparse.ArgumentParser(description="Time the kernels against their peers and the machine's limits.")
    parser.add_argument("--profile", choices=list(PROFILES), default="laptop")
    parser.add_argument("--device", default="")
    parser.add_argument("--peak", default="", help="print the peak memory of this arm of the loss, in bytes")
    parser.add_argument("--frozen", action="store_true", help="with --peak: the head is not trained")
    chosen = parser.parse_args()
    if chosen.peak:
        size = PROFILES[chosen.profile].pick(SIZES).loss
        print(peak_bytes(chosen.device, size, chosen.peak, trained=not chosen.frozen))
        return
    run, sizes = Run("bench_kernels", chosen.profile), PROFILES[chosen.profile].pick(SIZES)
    print(f"load average {load_average()}, {torch.get_num_threads()} threads")
    record_products(run, sizes)
    record_encodings(run, sizes)
    record_lora(run, sizes)
    record_losses(run, sizes)
    record_missing_kernels(run)
    for record in run.records:
        shown = "-" if record.value is None else f"{record.value:.4g}"
        print(f"{record.subject:60} {record.metric:18} {shown:>10} {record.unit} {record.note}")
    print(run.save())


if __name__ == "__main__":
    main()
