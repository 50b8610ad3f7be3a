"""Whether zeros make anything faster: one linear layer, multiplied by every kernel that this machine has for it.

A row of `KERNELS` prepares a weight once and returns the product to be timed: dense bf16, what transformers runs;
dense float32; compressed sparse rows (CSR) in float32 and bf16; 2:4 on the sparse tensor cores of a GPU; ONNX Runtime
where it is installed, given the weight as a dense and as a sparse tensor. Kernels take turns in every round, so that
what else the machine does hits all of them. What a kernel cannot do here is recorded with its reason. Each product is
compared with the dense one first.

Whole pruned models are measured as all artefacts are (`avalab.cost`): whatever was pruned, they are stored in bf16.
What it does not do: choose layers, or decide what is worth it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from avalab import statistics
from avalab.artifacts import Artifact
from avalab.engines import onnxruntime
from avalab.experiment import Run, load_average

BASELINE = "dense bf16"
TOLERANCE = 0.03  # of the largest output: bf16 has eight bits


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one kernel, a sample a round; no samples and the reason where there is no such kernel."""

    samples: list[float] = field(default_factory=list)
    reason: str = ""


def dense(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Callable[[], Tensor]]:
    """The plain product in a type."""

    def prepare(weight: Tensor, inputs: Tensor) -> Callable[[], Tensor]:
        weight, inputs = weight.to(dtype), inputs.to(dtype)
        return lambda: F.linear(inputs, weight)

    return prepare


def compressed_rows(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Callable[[], Tensor]]:
    """The product with the weight as compressed sparse rows."""

    def prepare(weight: Tensor, inputs: Tensor) -> Callable[[], Tensor]:
        sparse, columns = weight.to(dtype).to_sparse_csr(), inputs.to(dtype).T.contiguous()
        return lambda: (sparse @ columns).T

    return prepare


def semi_structured(weight: Tensor, inputs: Tensor) -> Callable[[], Tensor]:
    """The product with a 2:4 weight on sparse tensor cores."""
    if not weight.is_cuda:
        raise RuntimeError("2:4 kernels need a GPU with sparse tensor cores")
    sparse, rows = torch.sparse.to_sparse_semi_structured(weight.bfloat16()), inputs.bfloat16()
    return lambda: F.linear(rows, sparse)


def onnx_runtime(*, sparse: bool) -> Callable[[Tensor, Tensor], Callable[[], Tensor]]:
    """The product in ONNX Runtime, which makes a weight that it is given as a sparse tensor dense."""

    def prepare(weight: Tensor, inputs: Tensor) -> Callable[[], Tensor]:
        if weight.is_cuda:
            raise RuntimeError("ONNX Runtime is measured on the CPU only")
        product, rows = onnxruntime.product(weight, sparse=sparse), inputs.float()
        return lambda: product(rows)

    return prepare


KERNELS: dict[str, Callable[[Tensor, Tensor], Callable[[], Tensor]]] = {
    BASELINE: dense(torch.bfloat16),
    "dense fp32": dense(torch.float32),
    "CSR fp32": compressed_rows(torch.float32),
    "CSR bf16": compressed_rows(torch.bfloat16),
    "2of4 bf16": semi_structured,
    "dense ONNX fp32": onnx_runtime(sparse=False),
    "sparse ONNX fp32": onnx_runtime(sparse=True),
}


@torch.inference_mode()
def milliseconds(
    weight: Float[Tensor, "rows cols"], *, tokens: int, rounds: int = 9, kernels: Sequence[str] = tuple(KERNELS)
) -> dict[str, Timing]:
    """Times of every kernel on random inputs of `tokens` rows, interleaved.

    Raises ValueError for a kernel whose product is not the dense one.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, weight.shape[1], generator=generator).to(weight.device)
    expected = F.linear(inputs.bfloat16(), weight.bfloat16()).float()
    ready: dict[str, Callable[[], Tensor]] = {}
    found: dict[str, Timing] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "sparse tensors are in beta": nothing a reader can act on
        for name in kernels:
            try:
                ready[name] = KERNELS[name](weight, inputs)
                _refuse_wrong(name, ready[name](), expected)
            except RuntimeError as error:  # a kernel or package that is missing here: the row says which
                ready.pop(name, None)
                found[name] = Timing(reason=str(error).splitlines()[0])
        samples = [{name: _timed(product) for name, product in ready.items()} for _ in range(rounds + 1)]
    timed = {name: Timing([sample[name] for sample in samples[1:]]) for name in ready}
    return {name: (timed | found)[name] for name in kernels}


def best_ratio(found: Mapping[str, Timing]) -> float:
    """Median time of the best sparse kernel over that of the best dense one: above 1 zeros make nothing faster."""
    medians = {name: statistics.quantile(timing.samples).value for name, timing in found.items() if timing.samples}
    sparse = [median for name, median in medians.items() if not name.startswith("dense")]
    return min(sparse) / min(median for name, median in medians.items() if name.startswith("dense"))


def record(
    run: Run, subject: str, artifact: Artifact, weight: Float[Tensor, "rows cols"], *, tokens: int
) -> dict[str, Timing]:
    """Append `layer_ms:<kernel>` with median, interval and samples of one layer's weight; what is missing says why."""
    found = milliseconds(weight, tokens=tokens, rounds=max(5, run.profile.latency_samples))
    density = float((weight != 0).float().mean())
    about = {"artifact_sha256": artifact.sha256, "engine": "torch"}
    about["details"] = {"tokens": tokens, "shape": list(weight.shape), "density": density, "load": load_average()}
    for name, timing in found.items():
        metric = f"layer_ms:{name}"
        if not timing.samples:
            run.record(subject, metric, None, "ms", note=timing.reason, **about)
            continue
        found_ms = vars(statistics.quantile(timing.samples))
        run.record(subject, metric, unit="ms", samples=timing.samples, **found_ms, **about)
    return found


def _timed(product: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    result = product()
    if result.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def _refuse_wrong(name: str, product: Tensor, expected: Tensor) -> None:
    worst = float((product.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if worst > TOLERANCE:
        raise ValueError(f"kernel {name!r} differs from the dense product by {worst:.1%} of the largest output")
