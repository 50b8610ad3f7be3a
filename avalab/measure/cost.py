"""The cost of a model: bytes on disk, memory, seconds, each predicted by a formula and measured; and of its zeros.

Bytes on disk are the subject of `avalab.models.sizes`, measurements that of `avalab.measure.cell`.

**Memory** (`predict_memory`), for `T = batch x prompt` tokens, hidden size d, MLP size f, b bytes a value:

    weights      the artefact's bytes (memory-mapped on a CPU, resident once touched)
    copies       what the torch engine makes beside them: bitsandbytes re-packs 4-bit weights for an AVX512-BF16 CPU,
                 layers that round activations are unpacked to bf16 (`Storage.copy_bits` a linear weight)
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

**Zeros** (`record_sparse_speed`): whether they make one linear layer faster. A row of `KERNELS` prepares a weight and
its inputs once and returns the product to be timed: dense bf16, what transformers runs; dense float32; compressed
sparse rows (CSR); 2:4 on the sparse tensor cores of a GPU; ONNX Runtime where it is installed, given the weight as a
dense and as a sparse tensor. Each is compared with the dense product first, and they take turns in every round, weights
out of cache. What a kernel cannot do here is recorded with its reason.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from avalab import engines
from avalab.engines import onnxruntime as onnxruntime_engine
from avalab.lab import artifacts, statistics, trackers
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cache_path, cached_document
from avalab.lab.code import code_of
from avalab.lab.errors import InputError, ProcessFailed
from avalab.lab.run import Run, load_average
from avalab.measure import cell
from avalab.measure.cell import Cell, Workload
from avalab.models import sizes
from avalab.models.sizes import Shape, Storage

# --- what a model costs -----------------------------------------------------------------------------------------------


def workload(run: Run) -> Workload:
    """What is asked of an artefact to learn its cost, in the sizes of a run's profile."""
    return Workload(
        prompts=(run.profile.prompt_tokens,),
        new_tokens=run.profile.new_tokens,
        samples=run.profile.latency_samples,
        seed=run.seed,
        device=run.device,
        predictable=True,
        memory_cap_gib=run.profile.memory_cap_gib,
    )


def predict_memory(
    model: Shape, stored: Storage, *, weight_bytes: int, work: Workload, runtime_bytes: int = 0
) -> dict[str, int]:
    """Peak bytes of inference at batch 1, part by part, and their `total`; formulas in the module's docstring.

    `runtime_bytes` is the process before any weights (`Cell.runtime_bytes`), 0 to predict GPU memory.
    """
    tokens, b = max(work.prompts), 2
    attention = 2 * model.hidden + 2 * (model.heads + 2 * model.kv_heads) * model.head_dim
    layer_weights = [rows * columns for rows, columns in model.linears().values()]
    copy_bits = sum(layer_weights) * model.layers * stored.copy_bits
    parts = {
        "weights": weight_bytes,
        "copies": 0 if work.device.startswith("cuda") else int(copy_bits / 8),
        "kv_cache": sizes.kv_cache_bytes(model, context=tokens + work.new_tokens, bytes_per_value=b),
        "activations": tokens * b * max(2 * model.hidden + 3 * model.mlp, attention),
        "logits": model.vocab * b,
        "workspace": b * max(layer_weights) if stored.decodes else 0,
        "runtime": runtime_bytes,
    }
    return parts | {"total": sum(parts.values())}


def refuse_over_cap(name: str, engine: str, parts: Mapping[str, int], cap_gib: float | None, *, tokens: int) -> None:
    """Raise InputError, with the prediction, for what would not fit into a limit: nothing is started to find out.

    `parts` are those of `predict_memory`; the process before any weights does not count.
    """
    counted = {part: size for part, size in parts.items() if part not in ("total", "runtime")}
    needed = sum(counted.values())
    if cap_gib and needed > cap_gib * 2**30:
        largest = sorted(counted, key=lambda part: -counted[part])[:3]
        shown = ", ".join(f"{part.replace('_', ' ')} {counted[part] / 2**30:.2f}" for part in largest)
        raise InputError(
            f"{name} in {engine} would need {needed / 2**30:.2f} GiB at {tokens:,} tokens ({shown}), the limit is "
            f"{cap_gib:g} GiB: not started; take fewer bits, a smaller model or a shorter context"
        )


def record_cost(
    run: Run, subject: str, artifact: Artifact, *, stored: Storage | None = None, again: bool = False
) -> None:
    """Measure an artefact in a process of its own, predict the same, and append both to `run`.

    `stored` is how its weights are stored, where the card's last step does not say (a pruned model). A measurement of
    the same bytes, workload and code is read from the run's cache, unless `again`: a killed run goes on where it was.
    Records say when their figures were measured.
    """
    work, model = workload(run), sizes.shape_of(artifact)
    on_disk = sizes.bytes_by_component(artifact)
    predicted_on_disk = sizes.predict_bytes(model, stored) if stored else sizes.predicted_bytes(artifact)
    storage, tokens = stored or sizes.storage_of_artifact(artifact)[0], max(work.prompts) + work.new_tokens
    needed = predict_memory(model, storage, weight_bytes=artifact.bytes, work=work)
    try:
        refuse_over_cap(artifact.name, "torch", needed, work.memory_cap_gib, tokens=tokens)
    except InputError as error:
        run.record(subject, "peak_rss_bytes", None, "byte", artifact_sha256=artifact.sha256, note=str(error))
        return
    found = cached_cell(artifact, work, run.artifacts_dir / "cache", again=again)
    memory = predict_memory(
        model,
        storage,
        weight_bytes=artifact.bytes,
        work=work,
        runtime_bytes=found.runtime_bytes if found.peak_vram_bytes is None else 0,
    )
    load = {"load_average": found.load_average, "processors_of_others": found.others}
    record = partial(
        run.record,
        subject,
        artifact_sha256=artifact.sha256,
        engine="torch",
        threads=found.torch_threads,
        when=found.when,
        note=found.note,
        details=load,
    )
    record("artifact_bytes", sum(on_disk.values()), "byte")
    for component, count in on_disk.items():
        record(f"artifact_bytes:{component}", count, "byte")
    record("predicted_bytes:artifact", sum(predicted_on_disk.values()), "byte", details=predicted_on_disk)
    kind = "peak_vram" if run.device.startswith("cuda") else "peak_rss"
    record(f"predicted_bytes:{kind}", memory["total"], "byte", details=memory)
    resident = {
        "runtime_bytes": found.runtime_bytes,
        "timed_peak_rss_bytes": found.timed_peak_bytes,
        "anonymous_bytes": found.anonymous_bytes,
        "file_bytes": found.file_bytes,
    }
    record("peak_rss_bytes", found.peak_bytes, "byte", details=load | resident)
    record("peak_rss_bytes:load", found.load_peak_bytes, "byte")
    if found.peak_vram_bytes is not None:
        record("peak_vram_bytes", found.peak_vram_bytes, "byte")
    _record_time(record, found, load)


def cached_cell(artifact: Artifact, work: Workload, cache: Path, *, again: bool = False) -> Cell:
    """`cell.measure_cell` in torch, or what it found before for the same artefact, workload and measuring code.

    What was found before is replaced with `again`.
    """
    code = code_of(cached_cell, engines.ENGINES["torch"])
    key = artifacts.sha256_of_text(json.dumps([artifact.sha256, asdict(work), code]))
    path = cache_path(cache, "cost", key[:24], suffix=".json")
    return Cell(**cached_document(path, lambda: asdict(cell.measure_cell(artifact, "torch", work=work)), again=again))


def _record_time(record: Callable, found: Cell, load: dict) -> None:
    first = {"first_prefill_seconds": found.first_prefill_seconds}
    record("load_seconds", found.load_seconds[0], "s", n=1, details=load | first)
    ((length, seconds),) = found.first.items()
    cell.record_speeds(record, found, length=int(length))
    cell.record_latency(record, "time_to_first_token_ms", seconds, raw=True)
    record("roofline_fraction", unit="1", **vars(statistics.quantile(found.roofline_fractions)))
    reading = {"one_thread": found.read_bytes_per_s_one_thread, "bytes_read_per_token": found.bytes_read_per_token}
    record("memory_read_bytes_per_s", found.read_bytes_per_s, "byte/s", details=load | reading)


# --- whether zeros make a layer faster --------------------------------------------------------------------------------

BASELINE = "dense bf16"

TOLERANCE = 0.03  # of the largest output: bf16 has eight bits

Product = Callable[[], Tensor]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one kernel, a sample a round; no samples and the reason where there is no such kernel."""

    samples: list[float] = field(default_factory=list)
    reason: str = ""


def dense(weight: Tensor, inputs: Tensor, *, dtype: torch.dtype) -> Product:
    """The plain product in a type."""
    weight, inputs = weight.to(dtype), inputs.to(dtype)
    return lambda: F.linear(inputs, weight)


def compressed_rows(weight: Tensor, inputs: Tensor, *, dtype: torch.dtype) -> Product:
    """The product with the weight as compressed sparse rows."""
    sparse, columns = weight.to(dtype).to_sparse_csr(), inputs.to(dtype).T.contiguous()
    return lambda: (sparse @ columns).T


def semi_structured(weight: Tensor, inputs: Tensor) -> Product:
    """The product with a 2:4 weight on sparse tensor cores."""
    if not weight.is_cuda:
        raise ProcessFailed("2:4 kernels need a GPU with sparse tensor cores")
    sparse, rows = torch.sparse.to_sparse_semi_structured(weight.bfloat16()), inputs.bfloat16()
    return lambda: F.linear(rows, sparse)


def onnx_runtime(weight: Tensor, inputs: Tensor, *, sparse: bool) -> Product:
    """The product in ONNX Runtime, which makes a weight that it is given as a sparse tensor dense."""
    if weight.is_cuda:
        raise ProcessFailed("ONNX Runtime is measured on the CPU only")
    product, rows = onnxruntime_engine.runtime_product(weight, sparse=sparse), inputs.float()
    return lambda: product(rows)


KERNELS: dict[str, Callable[[Tensor, Tensor], Product]] = {
    BASELINE: partial(dense, dtype=torch.bfloat16),
    "dense fp32": partial(dense, dtype=torch.float32),
    "CSR fp32": partial(compressed_rows, dtype=torch.float32),
    "CSR bf16": partial(compressed_rows, dtype=torch.bfloat16),
    "2of4 bf16": semi_structured,
    "dense ONNX fp32": partial(onnx_runtime, sparse=False),
    "sparse ONNX fp32": partial(onnx_runtime, sparse=True),
}


@torch.inference_mode()
def time_kernels(
    weight: Float[Tensor, "rows cols"], *, tokens: int, rounds: int = 9, kernels: Sequence[str] = tuple(KERNELS)
) -> dict[str, Timing]:
    """Times of every kernel on random inputs of `tokens` rows, interleaved.

    Raises ValueError for a kernel whose product is not the dense one.
    """
    inputs = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    expected = F.linear(inputs.bfloat16(), weight.bfloat16()).float()
    scale = expected.abs().max().clamp(min=1e-30)
    ready: dict[str, Product] = {}
    reasons: dict[str, Timing] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "sparse tensors are in beta": nothing a reader can act on
        for name in kernels:
            try:
                product = KERNELS[name](weight, inputs)
                worst = float((product().float() - expected).abs().max() / scale)
            except RuntimeError as error:  # a kernel or package that is missing here: the row says which
                reasons[name] = Timing(reason=str(error).splitlines()[0])
                continue
            if worst > TOLERANCE:
                raise InputError(f"kernel {name!r} differs from the dense product by {worst:.1%} of the largest output")
            ready[name] = product
        timed = trackers.interleaved(ready, rounds, str(weight.device))
    return {name: reasons[name] if name in reasons else Timing(timed[name]) for name in kernels}


def best_ratio(found: Mapping[str, Timing]) -> float:
    """Median time of the best sparse kernel over that of the best dense one: above 1 zeros make nothing faster."""
    medians = {name: statistics.quantile(timing.samples).value for name, timing in found.items() if timing.samples}
    sparse = [median for name, median in medians.items() if not name.startswith("dense")]
    return min(sparse) / min(median for name, median in medians.items() if name.startswith("dense"))


def record_sparse_speed(
    run: Run, subject: str, artifact: Artifact, weight: Float[Tensor, "rows cols"], *, tokens: int
) -> dict[str, Timing]:
    """Append `layer_ms:<kernel>` with median, interval and samples of one layer's weight; what is missing says why."""
    found = time_kernels(weight, tokens=tokens, rounds=max(5, run.profile.latency_samples))
    density = float((weight != 0).float().mean())
    details = {"tokens": tokens, "shape": list(weight.shape), "density": density, "load": load_average()}
    record = partial(run.record, subject, artifact_sha256=artifact.sha256, engine="torch", details=details)
    for name, timing in found.items():
        if timing.samples:
            median = vars(statistics.quantile(timing.samples))
            record(f"layer_ms:{name}", unit="ms", samples=timing.samples, **median)
        else:
            record(f"layer_ms:{name}", None, "ms", note=timing.reason)
    return found
