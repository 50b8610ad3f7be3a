"""What a model costs: bytes on disk, memory, seconds; each predicted by a formula and measured.

Bytes on disk are the subject of `avalab.models.sizes`, measurements that of `avalab.measure.cell`.

**Memory** (`predict_memory`), for `T = batch x prompt` tokens, hidden size d, MLP size f, b bytes a value:

    weights      the artefact's bytes (memory-mapped on a CPU, resident once touched)
    copies       what the torch engine makes beside them: bitsandbytes re-packs 4-bit weights for an AVX512-BF16 CPU,
                 compressed-tensors unpacks to bf16 at the first call (`Storage.copy_bits` a linear weight)
    kv_cache     2 x layers x kv_heads x head_dim x batch x context x b
    activations  the larger of  T b (2d + 3f)  (MLP: residual, its norm, gate, up, their product)  and
                 T b (2d + 2 (heads + 2 kv_heads) head_dim)  (attention, before and after rotation); the fused
                 attention kernel holds no T x T matrix
    logits       batch x vocab x b: generation computes the last position only
    workspace    one largest linear layer in b bytes, where stored weights are decoded on the fly
    runtime      the process before any weights, measured (`Cell.runtime_bytes`); 0 on a GPU

Not in the formula: temporary tensors of an engine's own kernels (LLM.int8() holds int32 products), and what malloc
keeps after they were freed, which varies from run to run and which a predictable cell excludes.

**Time**: `roofline_fraction` = decode tokens/s x bytes read a token / read rate.

Whether zeros make anything faster: one linear layer, multiplied by every kernel that this machine has for it.

A row of `KERNELS` prepares a weight once and returns the product to be timed: dense bf16, what transformers runs;
dense float32; compressed sparse rows (CSR) in float32 and bf16; 2:4 on the sparse tensor cores of a GPU; ONNX Runtime
where it is installed, given the weight as a dense and as a sparse tensor. Kernels take turns in every round, so that
what else the machine does hits all of them. What a kernel cannot do here is recorded with its reason. Each product is
compared with the dense one first.

Whole pruned models are measured as all artefacts are (`avalab.measure.cost`): whatever was pruned, they are stored in
bf16. What it does not do: choose layers, or decide what is worth it.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from avalab import engines
from avalab.engines import onnxruntime as onnxruntime_engine
from avalab.lab import artifacts, statistics
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cached_document
from avalab.lab.code import code_of
from avalab.lab.run import Run, load_average
from avalab.measure import cell
from avalab.measure.cell import Cell, Workload
from avalab.models import sizes
from avalab.models.sizes import Shape, Storage

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
        product, rows = onnxruntime_engine.product(weight, sparse=sparse), inputs.float()
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


def record_sparse_speed(
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


# --- what a model costs ---------------------------------------------------------------------------------------------


def workload(run: Run) -> Workload:
    """What is asked of an artefact to learn its cost, in the sizes of a run's profile."""
    sizes = run.profile
    return Workload(
        prompts=(sizes.prompt_tokens,),
        new_tokens=sizes.new_tokens,
        samples=sizes.latency_samples,
        seed=run.seed,
        device=run.device,
        predictable=True,
        memory_cap_gib=sizes.memory_cap_gib,
    )


def predict_memory(
    model: Shape, stored: Storage, *, weight_bytes: int, work: Workload, runtime_bytes: int = 0
) -> dict[str, int]:
    """Peak bytes of inference at batch 1, part by part, and their `total`; formulas in the module's docstring.

    `runtime_bytes` is the process before any weights (`Cell.runtime_bytes`), 0 to predict GPU memory.
    """
    tokens, b = max(work.prompts), 2
    attention = 2 * model.hidden + 2 * (model.heads + 2 * model.kv_heads) * model.head_dim
    linears = model.linears().values()
    weights = sum(rows * columns for rows, columns in linears) * model.layers
    embedding = model.vocab * model.hidden
    cpu = not work.device.startswith("cuda")
    parts = {
        "weights": weight_bytes,
        "copies": int(weights * stored.copy_bits / 8 + embedding * stored.embedding_copy_bits / 8) if cpu else 0,
        "kv_cache": sizes.kv_cache_bytes(model, context=tokens + work.new_tokens, bytes_per_value=b),
        "activations": tokens * b * max(2 * model.hidden + 3 * model.mlp, attention),
        "logits": model.vocab * b,
        "workspace": b * max(rows * columns for rows, columns in linears) if stored.decodes else 0,
        "runtime": runtime_bytes,
    }
    return parts | {"total": sum(parts.values())}


def record_cost(run: Run, subject: str, artifact: Artifact, *, stored: Storage | None = None) -> None:
    """Measure an artefact in a process of its own, predict the same, and append both to `run`.

    `stored` is how its weights are stored, where the card's last step does not say (a pruned model). A measurement of
    the same bytes, workload and code is read from the run's cache: a killed run goes on where it was.
    """
    work, model = workload(run), sizes.shape_of(artifact)
    disk = sizes.predict_bytes(model, stored) if stored else sizes.predicted_bytes(artifact)
    measured = cached_cell(artifact, work, run.artifacts_dir / "cache")
    memory = predict_memory(
        model,
        stored or sizes.of_artifact(artifact)[0],
        weight_bytes=artifact.bytes,
        work=work,
        runtime_bytes=measured.runtime_bytes if measured.peak_vram_bytes is None else 0,
    )
    details = {"load_average": measured.load_average}
    about = {"artifact_sha256": artifact.sha256, "engine": "torch", "threads": measured.torch_threads}
    _record_bytes(run, subject, sizes.bytes_by_component(artifact), disk, memory, details=details, **about)
    _record_memory(run, subject, measured, details=details, **about)
    _record_time(run, subject, measured, details=details, **about)


def cached_cell(artifact: Artifact, work: Workload, cache: Path) -> Cell:
    """`cell.measure_cell` in torch, or what it found before for the same artefact, workload and measuring code."""
    code = code_of(cached_cell, engines.ENGINES["torch"])
    key = artifacts.sha256_of_text(json.dumps([artifact.sha256, asdict(work), code]))
    path = cache / f"cost-{key[:24]}.json"
    return Cell(**cached_document(path, lambda: asdict(cell.measure_cell(artifact, "torch", work=work))))


def _record_bytes(
    run: Run,
    subject: str,
    sizes: dict[str, int],
    disk: dict[str, int],
    memory: dict[str, int],
    *,
    details: dict,
    **about,
) -> None:
    """Bytes on disk by component, and what was predicted of them and of memory, part by part."""
    kind = "peak_vram" if run.device.startswith("cuda") else "peak_rss"
    run.record(subject, "artifact_bytes", sum(sizes.values()), "byte", details=details, **about)
    for component, count in sizes.items():
        run.record(subject, f"artifact_bytes:{component}", count, "byte", details=details, **about)
    run.record(subject, "predicted_bytes:artifact", sum(disk.values()), "byte", details=disk, **about)
    run.record(subject, f"predicted_bytes:{kind}", memory["total"], "byte", details=memory, **about)


def _record_memory(run: Run, subject: str, found: Cell, *, details: dict, **about) -> None:
    resident = {
        "runtime_bytes": found.runtime_bytes,
        "timed_peak_rss_bytes": found.timed_peak_bytes,
        "anonymous_bytes": found.anonymous_bytes,
        "file_bytes": found.file_bytes,
    }
    run.record(subject, "peak_rss_bytes", found.peak_bytes, "byte", details=details | resident, **about)
    run.record(subject, "peak_rss_bytes:load", found.load_peak_bytes, "byte", details=details, **about)
    if found.peak_vram_bytes is not None:
        run.record(subject, "peak_vram_bytes", found.peak_vram_bytes, "byte", details=details, **about)


def _record_time(run: Run, subject: str, found: Cell, *, details: dict, **about) -> None:
    first, read = {"first_prefill_seconds": found.first_prefill_seconds}, found.read_bytes_per_s
    run.record(subject, "load_seconds", found.load_seconds[0], "s", n=1, details=details | first, **about)
    ((length, seconds),) = found.first.items()
    cell.record_speeds(run, subject, found, length=int(length), details=details, **about)
    cell.record_latency(run, subject, "time_to_first_token_ms", seconds, raw=True, details=details, **about)
    fraction = vars(statistics.quantile(found.roofline_fractions))
    run.record(subject, "roofline_fraction", unit="1", **fraction, details=details, **about)
    one = {"one_thread": found.read_bytes_per_s_one_thread, "bytes_read_per_token": found.bytes_read_per_token}
    run.record(subject, "memory_read_bytes_per_s", read, "byte/s", details=one | details, **about)
