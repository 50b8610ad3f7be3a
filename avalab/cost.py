"""What a model costs: bytes on disk, memory, seconds; each predicted by a formula and measured.

Bytes on disk are the subject of `avalab.storage`.

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
    runtime      the process before any weights, measured (`Measurement.runtime_bytes`); 0 on a GPU

Not in the formula: temporary tensors of an engine's own kernels (LLM.int8() holds int32 products), and what malloc
keeps after they were freed, which varies from run to run and which the measurement excludes (see the probe).

**Time** (`measure`): raw samples from a process of its own (`avalab.probe`). The interval of a median or percentile is
one of order statistics (Conover, Practical Nonparametric Statistics, section 3.2), so it needs no model of the noise;
with too few samples there is none. `roofline_fraction` = decode tokens/s x bytes read a token / read rate.

What it does not do: score quality, or run other engines than torch.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binom

from avalab import probe, storage
from avalab.artifacts import Artifact, sha256_of_text
from avalab.code import code_of
from avalab.experiment import Run, write_atomically
from avalab.storage import Shape, Storage


@dataclass(frozen=True)
class Workload:
    """What is generated: sizes in tokens; `threads` 0 leaves torch's own choice."""

    prompt_tokens: int = 256
    new_tokens: int = 32
    samples: int = 9
    threads: int = 0
    seed: int = 0
    memory_cap_gib: float | None = None  # enforced on a GPU


def workload(run: Run) -> Workload:
    """The latency workload of a run's profile."""
    sizes = run.profile
    return Workload(
        sizes.prompt_tokens,
        sizes.new_tokens,
        sizes.latency_samples,
        seed=run.seed,
        memory_cap_gib=sizes.memory_cap_gib,
    )


def predict_memory(
    model: Shape,
    stored: Storage,
    *,
    weight_bytes: int,
    work: Workload,
    runtime_bytes: int = 0,
    device: str = "cpu",
) -> dict[str, int]:
    """Peak bytes of inference at batch 1, part by part, and their `total`; formulas in the module's docstring.

    `runtime_bytes` is the process before any weights (`Measurement.runtime_bytes`), 0 to predict GPU memory.
    """
    tokens, b = work.prompt_tokens, 2
    attention = 2 * model.hidden + 2 * (model.heads + 2 * model.kv_heads) * model.head_dim
    linears = model.linears().values()
    weights = sum(rows * columns for rows, columns in linears) * model.layers
    embedding = model.vocab * model.hidden
    cpu = not device.startswith("cuda")
    parts = {
        "weights": weight_bytes,
        "copies": int(weights * stored.copy_bits / 8 + embedding * stored.embedding_copy_bits / 8) if cpu else 0,
        "kv_cache": kv_cache_bytes(model, context=tokens + work.new_tokens, bytes_per_value=b),
        "activations": tokens * b * max(2 * model.hidden + 3 * model.mlp, attention),
        "logits": model.vocab * b,
        "workspace": b * max(rows * columns for rows, columns in linears) if stored.decodes else 0,
        "runtime": runtime_bytes,
    }
    return parts | {"total": sum(parts.values())}


def kv_cache_bytes(model: Shape, *, context: int, batch: int = 1, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values of every layer for `context` tokens of `batch` sequences."""
    return 2 * model.layers * model.kv_heads * model.head_dim * batch * context * bytes_per_value


@dataclass(frozen=True)
class Measurement:
    """What `avalab.probe` measured of one artefact. Bytes, seconds; lists are raw samples."""

    device: str
    threads: int
    prompt_tokens: int
    load_average: float  # before the measurement began
    runtime_bytes: int  # resident before any weights
    load_seconds: float
    loaded_bytes: int
    load_peak_bytes: int
    first_prefill_seconds: float  # includes what an engine does once: unpacking, re-packing
    prefill_seconds: list[float]
    first_token_seconds: list[float]
    decode_seconds: list[list[float]]  # one list a sample: seconds of each token after the first
    peak_rss_bytes: int  # peak of inference, freed temporaries returned (see the probe)
    timed_peak_rss_bytes: int  # peak while timing: what malloc keeps for itself is in it
    anonymous_bytes: int  # resident after inference: the process's own memory
    file_bytes: int  # resident after inference: mapped files (weights, library code)
    peak_vram_bytes: int | None
    cache_bytes_per_token: int
    weight_bytes_in_memory: int
    bytes_read_per_token: int  # weights without an untied input embedding, and the cache half-way
    memory_read_bytes_per_s: float
    memory_read_bytes_per_s_one_thread: float

    @property
    def decode_rates(self) -> list[float]:
        """Decoded tokens per second, one value a sample."""
        return [len(steps) / sum(steps) for steps in self.decode_seconds]

    @property
    def roofline_fraction(self) -> float:
        """Bytes that decoding reads per second over the measured read rate at that footprint."""
        return quantile(self.decode_rates, 0.5) * self.bytes_read_per_token / self.best_read_bytes_per_s

    @property
    def best_read_bytes_per_s(self) -> float:
        """The better read rate of one thread and all: on a busy processor a single one can be the faster."""
        return max(self.memory_read_bytes_per_s, self.memory_read_bytes_per_s_one_thread)


def measure(
    artifact: Artifact | Path, work: Workload, *, device: str = "cpu", limit_seconds: float = 600
) -> Measurement:
    """Load and run an artefact in a process of its own and return what that cost.

    Raises RuntimeError, one line naming the artefact, when the process fails, is killed or exceeds `limit_seconds`;
    ValueError for fewer than 2 new tokens or no sample.
    """
    if work.new_tokens < 2 or work.samples < 1:
        raise ValueError(f"need at least 2 new tokens and 1 sample, got {work.new_tokens} and {work.samples}")
    request = {"folder": str(storage.folder_of(artifact).resolve()), "device": device, **asdict(work)}
    with tempfile.TemporaryDirectory() as folder:
        result, errors = Path(folder) / "result.json", Path(folder) / "stderr"
        code = _run_probe(request, result, errors, limit_seconds)
        if code is None:
            raise RuntimeError(f"measuring {_name(artifact)} took longer than {limit_seconds:g} s")
        if code:
            raise RuntimeError(f"measuring {_name(artifact)} failed: {_why(code)}: {_last_line(errors)}")
        return Measurement(**json.loads(result.read_text()))


def _run_probe(request: dict, result: Path, errors: Path, limit_seconds: float) -> int | None:
    """Exit status of the measuring process, None when it took too long; the libraries' chatter goes to `errors`.

    The process is forked from a server that has imported the libraries and nothing else: seconds are saved for each
    artefact, and none sees another's memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["avalab.probe"])
    process = context.Process(target=probe.main, args=(json.dumps(request), str(result), str(errors)), daemon=True)
    process.start()
    process.join(limit_seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile, linear between neighbouring samples (type 7 of Hyndman and Fan, 1996)."""
    return float(np.quantile(samples, q))


def quantile_interval(samples: Sequence[float], q: float = 0.5) -> tuple[float | None, float | None]:
    """95 % interval of a quantile from order statistics; a side that the samples are too few for is None."""
    ordered, n = sorted(samples), len(samples)
    low, high = int(binom.ppf(0.025, n, q)), int(binom.ppf(0.975, n, q)) + 1
    return (ordered[low - 1] if low >= 1 else None), (ordered[high - 1] if high <= n else None)


def record(run: Run, subject: str, artifact: Artifact) -> None:
    """Measure an artefact in a process of its own, predict the same, and append both to `run`.

    A measurement of the same bytes, workload and code is read from the run's cache: a killed run goes on where it was.
    """
    work, model = workload(run), storage.shape_of(artifact)
    stored, _ = storage.of_artifact(artifact)
    measurement = cached_measure(artifact, work, run.artifacts_dir / "cache", device=run.device)
    memory = predict_memory(
        model,
        stored,
        weight_bytes=artifact.bytes,
        work=work,
        runtime_bytes=measurement.runtime_bytes if measurement.peak_vram_bytes is None else 0,
        device=run.device,
    )
    predicted = {"artifact": storage.predicted_bytes(artifact), "memory": memory}
    records(run, subject, artifact=artifact, measurement=measurement, predicted=predicted)


def cached_measure(artifact: Artifact, work: Workload, cache: Path, *, device: str = "cpu") -> Measurement:
    """`measure`, or what it returned before for the same artefact, workload, device and measuring code."""
    key = sha256_of_text(json.dumps([artifact.sha256, asdict(work), device, code_of(cached_measure)]))
    path = cache / f"cost-{key[:24]}.json"
    try:
        return Measurement(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # absent, damaged, or of other fields
        measurement = measure(artifact, work, device=device)
        write_atomically(path, json.dumps(asdict(measurement)))
        return measurement


def records(run: Run, subject: str, *, artifact: Artifact, measurement: Measurement, predicted: dict) -> None:
    """Append everything measured to `run`, with raw samples, and what was predicted beside it.

    `predicted` holds `artifact` (dict of `predict_bytes`) and `memory` (dict of `predict_memory`).
    """
    m, cuda = measurement, measurement.peak_vram_bytes is not None
    about = {"artifact_sha256": artifact.sha256, "engine": "torch", "threads": m.threads}
    about["details"] = {"load_average": m.load_average}

    def add(metric: str, value: float, unit: str, **more) -> None:
        run.record(subject, metric, value, unit, **(about | more))

    sizes = storage.bytes_by_component(artifact)
    add("artifact_bytes", sum(sizes.values()), "byte")
    for component, count in sizes.items():
        add(f"artifact_bytes:{component}", count, "byte")
    memory = "peak_vram" if cuda else "peak_rss"
    add("predicted_bytes:artifact", sum(predicted["artifact"].values()), "byte", details=predicted["artifact"])
    add(f"predicted_bytes:{memory}", predicted["memory"]["total"], "byte", details=predicted["memory"])
    resident = {k: getattr(m, k) for k in ("runtime_bytes", "timed_peak_rss_bytes", "anonymous_bytes", "file_bytes")}
    add("peak_rss_bytes", m.peak_rss_bytes, "byte", details=about["details"] | resident)
    add("peak_rss_bytes:load", m.load_peak_bytes, "byte")
    if cuda:
        add("peak_vram_bytes", m.peak_vram_bytes, "byte")
    add(
        "load_seconds",
        m.load_seconds,
        "s",
        n=1,
        details=about["details"] | {"first_prefill_seconds": m.first_prefill_seconds},
    )
    _speed_records(add, m)


def _speed_records(add, m: Measurement) -> None:
    prompt_tokens = m.prompt_tokens
    rates = {
        "prefill_tokens_per_s": [prompt_tokens / s for s in m.prefill_seconds],
        "decode_tokens_per_s": m.decode_rates,
    }
    for metric, samples in rates.items():
        low, high = quantile_interval(samples)
        add(metric, quantile(samples, 0.5), "token/s", low=low, high=high, n=len(samples), samples=samples)
    first = [1000 * s for s in m.first_token_seconds]
    for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        low, high = quantile_interval(first, q)
        raw = {"samples": first} if name == "p50" else {}
        add(f"time_to_first_token_ms:{name}", quantile(first, q), "ms", low=low, high=high, n=len(first), **raw)
    per_rate = m.bytes_read_per_token / m.best_read_bytes_per_s
    low, high = (None if r is None else r * per_rate for r in quantile_interval(m.decode_rates))
    add("roofline_fraction", m.roofline_fraction, "1", low=low, high=high, n=len(m.decode_rates))
    one = {"one_thread": m.memory_read_bytes_per_s_one_thread, "bytes_read_per_token": m.bytes_read_per_token}
    add("memory_read_bytes_per_s", m.memory_read_bytes_per_s, "byte/s", details=one | {"load_average": m.load_average})


def _name(artifact: Artifact | Path) -> str:
    return artifact.name if isinstance(artifact, Artifact) else Path(artifact).name


def _why(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _last_line(file: Path) -> str:
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing on its standard error"
