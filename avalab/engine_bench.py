"""One cell of the race: an artefact in an engine, measured in a process of its own.

1. A process that has imported the lab's libraries (its resident memory is then the *runtime*) loads the artefact in the
   engine and generates once at each prompt length, which is also the warm-up.
2. Samples: prompts of random tokens, another one each time (an engine that remembers prompts gains nothing), lengths
   interleaved, exactly `new_tokens` greedy tokens each. A token counts once the engine tells it: the first one ends the
   time to first token, each further one is a latency.
3. Peaks of resident memory, while loading and while generating, are reset in between (see `probe`). What the engine and
   the artefact need is the peak above the runtime: it holds the engine's library, which `load` imports; the `torch`
   engine's is in the runtime already, as far as its pages were touched before.
4. The memory read rate is measured last, at the size of the weight files and with the cell's threads: decoding that
   reads all of them for each token cannot be faster. An input embedding that is stored apart is counted, not read.

Prefill speed is the prompt over the time to first token, one head product included. A cell that fails (library missing,
artefact not read, out of memory, out of time) is a record without value whose note says why; the race goes on.

What it does not do: batches (`engine_batches`), quality (`engine_quality`), or decide which cells are run (`race`).
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from avalab import alone, cost, energy, engines, probe
from avalab.artifacts import Artifact
from avalab.experiment import Run, load_average

WEIGHT_FILES = (".safetensors", ".gguf", ".onnx", ".data", ".bin", ".pt2", ".pte")
FAILURES = {"EngineUnavailable": engines.EngineUnavailable, "NotSupported": engines.NotSupported}
QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))


@dataclass(frozen=True)
class Race:
    """Sizes of a cell: tokens, samples at each prompt length, threads (0: the engine's choice), seconds at most.

    `device` is that of the engine `torch`; the others choose theirs.
    """

    prompts: tuple[int, ...] = (16, 512)
    new_tokens: int = 32
    samples: int = 7
    threads: int = 0
    seed: int = 0
    limit_seconds: float = 600
    device: str = "cpu"


@dataclass(frozen=True)
class Cell:
    """What was measured: bytes and seconds. Samples by prompt length: to the first token, then of each further one."""

    runtime_bytes: int
    load_seconds: list[float]  # one a process
    load_peak_bytes: int
    idle_bytes: int
    peak_bytes: int
    load_average: float
    first: dict[str, list[float]]
    further: dict[str, list[list[float]]]
    joules: dict[str, list[float]]  # of each whole generation; empty where the machine shows no energy
    energy_note: str = ""
    read_bytes_per_s: float = 0.0  # memory, at the size of the weight files
    peak_vram_bytes: int | None = None
    threads: int | None = None  # that were used, where they are not those asked for
    note: str = ""  # and why


def measure(artifact: Artifact | Path, engine: str, *, race: Race = Race()) -> Cell:
    """Measure one cell.

    Raises EngineUnavailable or NotSupported as the engine does, RuntimeError in one line for any other failure:
    killed (out of memory, mostly), stopped after `limit_seconds`, or an error of the engine.
    """
    folder = Path(artifact.path if isinstance(artifact, Artifact) else artifact).resolve()
    options, note = engines.usable_options(engine, folder, threads=race.threads)
    request = {"folder": str(folder), "engine": engine, **asdict(race)} | options
    how = {"limit_seconds": race.limit_seconds, "errors": FAILURES, "label": f"{folder.name} in {engine}"}
    cell = Cell(**alone.call(f"{__name__}:run", request, **how))
    return replace(cell, threads=options["threads"], note=note) if note else cell


def run(request: dict) -> dict:
    """All measurements of one cell; `request` holds `folder`, `engine` and the fields of `Race`."""
    facts = {"load_average": load_average(), "runtime_bytes": probe.memory()["rss"]}
    device, folder = request["device"], Path(request["folder"])
    engine, loading = loaded(request)
    facts |= loading
    counters = energy.counters(device)
    found = samples(engine, request, counters)
    facts |= {"peak_bytes": probe.memory()["peak"], "energy_note": energy.missing(device), **found}
    facts["peak_vram_bytes"] = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    engine.close()
    torch.set_num_threads(request["threads"] or torch.get_num_threads())
    return facts | {"read_bytes_per_s": probe.memory_read_rate(weight_bytes(folder), device=device)}


def loaded(request: dict, **options) -> tuple[engines.Engine, dict]:
    """The engine of a request, and what loading it took; the peak of memory starts anew afterwards."""
    if request["engine"] == "torch" and request["device"] != "cpu":
        options["device"] = request["device"]
    probe.reset_peak(request["device"])
    start = time.perf_counter()
    engine = engines.load(request["engine"], Path(request["folder"]), threads=request["threads"], **options)
    facts = {"load_seconds": [time.perf_counter() - start]}
    facts |= {"load_peak_bytes": probe.memory()["peak"], "idle_bytes": probe.memory()["rss"]}
    probe.reset_peak(request["device"])
    return engine, facts


def samples(engine: engines.Engine, request: dict, counters: Sequence[energy.Counter] = ()) -> dict:
    """Times (and joules, with `counters`) of `samples` generations at each prompt length that the context holds."""
    draw, new = random.Random(request["seed"]), request["new_tokens"]
    lengths = [n for n in request["prompts"] if n + new <= engine.facts.context]
    first, further, joules = ({str(n): [] for n in lengths} for _ in range(3))
    for sample in range(request["samples"] + 1):
        for length in lengths:
            prompt = [draw.randrange(engine.facts.vocabulary) for _ in range(length)]
            before = energy.readings(counters)
            told = timed(engine, prompt, new)
            if sample:  # the first round warms up
                first[str(length)].append(told[0])
                further[str(length)].append([b - a for a, b in itertools.pairwise(told)])
                if counters:
                    joules[str(length)].append(energy.joules(counters, before, energy.readings(counters)))
    return {"first": first, "further": further, "joules": joules}


def timed(engine: engines.Engine, prompt: list[int], new_tokens: int) -> list[float]:
    """Seconds from the call to each token of one generation."""
    told: list[float] = []
    start = time.perf_counter()
    engine.generate(prompt, new_tokens, on_token=lambda token: told.append(time.perf_counter() - start), past_end=True)
    return told


def merged(cells: Sequence[Cell]) -> Cell:
    """Several measurements of the same cell as one: all samples, the highest peaks, the best read rate."""

    def most(name: str) -> int | float:
        return max(getattr(cell, name) for cell in cells)

    def middle(name: str) -> int:
        return int(statistics.median(getattr(cell, name) for cell in cells))

    def joined(name: str) -> dict[str, list]:
        return {n: [s for c in cells for s in getattr(c, name)[n]] for n in getattr(cells[0], name)}

    video = [cell.peak_vram_bytes for cell in cells if cell.peak_vram_bytes is not None]
    return Cell(
        **{name: middle(name) for name in ("runtime_bytes", "idle_bytes")},
        **{name: most(name) for name in ("load_peak_bytes", "peak_bytes", "load_average", "read_bytes_per_s")},
        **{name: joined(name) for name in ("first", "further", "joules")},
        load_seconds=[s for cell in cells for s in cell.load_seconds],
        energy_note=cells[0].energy_note,
        threads=cells[0].threads,
        note=cells[0].note,
        peak_vram_bytes=max(video, default=None),
    )


def decode_rates(steps: Sequence[Sequence[float]]) -> list[float]:
    """Tokens a second of each generation, from the seconds of its further tokens."""
    return [len(seconds) / sum(seconds) for seconds in steps]


def record(run: Run, artifact: Artifact, *, engine: str, race: Race = Race()) -> Cell | None:
    """Measure a cell and append it to `run`; a failed one is one record with a note, and None is returned."""
    try:
        cell = measure(artifact, engine, race=race)
    except (RuntimeError, ValueError) as error:
        add_failure(run, artifact.name, str(error), artifact=artifact, engine=engine, threads=race.threads)
        return None
    add_records(run, artifact, engine=engine, race=race, cell=cell)
    return cell


def add_failure(
    run: Run, subject: str, note: str, *, artifact: Artifact | None = None, engine: str = "", threads: int = 0
) -> None:
    """Append the one record of a cell that was not measured."""
    about = {"artifact_sha256": artifact.sha256 if artifact else "", "engine": engine, "threads": threads}
    run.record(subject, "decode_tokens_per_s", None, "token/s", note=note, **about)


def add_records(run: Run, artifact: Artifact, *, engine: str, race: Race, cell: Cell, subject: str = "") -> None:
    """Append what was measured of a cell to `run`, under the artefact's name or `subject`."""
    threads = race.threads if cell.threads is None else cell.threads
    about = {"artifact_sha256": artifact.sha256, "engine": engine, "threads": threads}
    about["details"] = {"load_average": cell.load_average, "runtime_bytes": cell.runtime_bytes}

    def add(metric: str, value: float | None, unit: str, note: str = cell.note, **more) -> None:
        run.record(subject or artifact.name, metric, value, unit, note=note, **about, **more)

    add("artifact_bytes", weight_bytes(artifact.path), "byte")
    load = cell.load_seconds
    add("load_seconds", statistics.median(load), "s", n=len(load), samples=load)
    for name, size in (("load", cell.load_peak_bytes), ("idle", cell.idle_bytes), ("inference", cell.peak_bytes)):
        add(f"peak_rss_bytes:{name}", size, "byte")
    add("peak_rss_bytes:engine", max(0, cell.peak_bytes - cell.runtime_bytes), "byte")
    if cell.peak_vram_bytes is not None:
        add("peak_vram_bytes", cell.peak_vram_bytes, "byte")
    for length, first in cell.first.items():
        _add_speeds(add, int(length), first, cell.further[length])
    _add_limits(add, cell, weight_bytes(artifact.path), race.new_tokens)


def _add_speeds(add, length: int, first: list[float], further: list[list[float]]) -> None:
    latencies = {"time_to_first_token_ms": first, "token_latency_ms": [s for steps in further for s in steps]}
    for metric, seconds in latencies.items():
        samples = [1000 * s for s in seconds]
        for name, q in QUANTILES:
            low, high = cost.quantile_interval(samples, q)
            value = cost.quantile(samples, q)
            add(f"{metric}:prompt{length}:{name}", value, "ms", low=low, high=high, n=len(samples))
    rates = {"prefill_tokens_per_s": [length / s for s in first], "decode_tokens_per_s": decode_rates(further)}
    for metric, samples in rates.items():
        low, high = cost.quantile_interval(samples)
        add(f"{metric}:prompt{length}", cost.quantile(samples, 0.5), "token/s", low=low, high=high, n=len(samples),
            samples=samples)  # fmt: skip


def _add_limits(add, cell: Cell, weights: int, new_tokens: int) -> None:
    """How near decoding came to the memory's read rate, and the energy of a token."""
    shortest = min(cell.further, key=int, default=None)
    if shortest and cell.read_bytes_per_s:
        rates = decode_rates(cell.further[shortest])
        low, high = (None if r is None else r * weights / cell.read_bytes_per_s for r in cost.quantile_interval(rates))
        value = cost.quantile(rates, 0.5) * weights / cell.read_bytes_per_s
        add("roofline_fraction", value, "1", low=low, high=high, n=len(rates))
        add("memory_read_bytes_per_s", cell.read_bytes_per_s, "byte/s")
    if cell.energy_note:
        add("energy_joules_per_token", None, "J/token", note=cell.energy_note)
        return
    for length, joules in cell.joules.items():
        each = [j / new_tokens for j in joules]
        low, high = cost.quantile_interval(each)
        value = cost.quantile(each, 0.5)
        add(f"energy_joules_per_token:prompt{length}", value, "J/token", low=low, high=high, n=len(each))


def weight_bytes(folder: Path) -> int:
    """Bytes of the files that hold weights, whatever the engine; tokenizers not counted."""
    files = [path for path in folder.iterdir() if path.suffix in WEIGHT_FILES and "tokenizer" not in path.name]
    return sum(path.stat().st_size for path in files)
