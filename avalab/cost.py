"""What a model costs: bytes on disk, memory, seconds; each predicted by a formula and measured.

Bytes on disk are the subject of `avalab.storage`, measurements that of `avalab.cell`.

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
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from avalab import artifacts, cell, engines, statistics, storage
from avalab.artifacts import Artifact
from avalab.cell import Cell, Workload
from avalab.code import code_of
from avalab.experiment import Run
from avalab.storage import Shape, Storage


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
        "kv_cache": storage.kv_cache_bytes(model, context=tokens + work.new_tokens, bytes_per_value=b),
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
    work, model = workload(run), storage.shape_of(artifact)
    disk = storage.predict_bytes(model, stored) if stored else storage.predicted_bytes(artifact)
    measured = cached_cell(artifact, work, run.artifacts_dir / "cache")
    memory = predict_memory(
        model,
        stored or storage.of_artifact(artifact)[0],
        weight_bytes=artifact.bytes,
        work=work,
        runtime_bytes=measured.runtime_bytes if measured.peak_vram_bytes is None else 0,
    )
    details = {"load_average": measured.load_average}
    about = {"artifact_sha256": artifact.sha256, "engine": "torch", "threads": measured.torch_threads}
    _record_bytes(run, subject, storage.bytes_by_component(artifact), disk, memory, details=details, **about)
    _record_memory(run, subject, measured, details=details, **about)
    _record_time(run, subject, measured, details=details, **about)


def cached_cell(artifact: Artifact, work: Workload, cache: Path) -> Cell:
    """`cell.measure_cell` in torch, or what it found before for the same artefact, workload and measuring code."""
    code = code_of(cached_cell, engines.ENGINES["torch"])
    key = artifacts.sha256_of_text(json.dumps([artifact.sha256, asdict(work), code]))
    path = cache / f"cost-{key[:24]}.json"
    return Cell(**cache.cached_document(path, lambda: asdict(cell.measure_cell(artifact, "torch", work=work))))


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
