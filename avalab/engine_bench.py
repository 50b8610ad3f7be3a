"""One cell of the race: an artefact in an engine, measured in a process of its own.

1. A fresh process imports the package (its resident memory is then the *runtime*), loads the artefact in the engine
   and generates once at each prompt length, which is also the warm-up.
2. Samples: prompts of random tokens, another one each time (an engine that remembers prompts gains nothing), lengths
   interleaved, exactly `new_tokens` greedy tokens each. A token counts once the engine tells it: the first one ends the
   time to first token, each further one is a latency.
3. Peaks of resident memory, while loading and while generating, are reset in between (see `probe`).

Prefill speed is the prompt over the time to first token, one head product included. A cell that fails (library missing,
artefact not read, out of memory, out of time) is a record without value whose note says why; the race goes on.

What it does not do: batches, quality, GPU memory, or decide which cells are run.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from avalab import cost, engines, probe
from avalab.artifacts import Artifact
from avalab.experiment import Run, load_average

WEIGHT_FILES = (".safetensors", ".gguf", ".onnx", ".data", ".bin")
FAILURES = {"EngineUnavailable": engines.EngineUnavailable, "NotSupported": engines.NotSupported}


@dataclass(frozen=True)
class Race:
    """Sizes of a cell: tokens, samples at each prompt length, threads (0: the engine's choice), seconds at most."""

    prompts: tuple[int, ...] = (16, 512)
    new_tokens: int = 32
    samples: int = 7
    threads: int = 0
    seed: int = 0
    limit_seconds: float = 600


@dataclass(frozen=True)
class Cell:
    """What was measured: bytes and seconds. Samples by prompt length: to the first token, then of each further one."""

    runtime_bytes: int
    load_seconds: float
    load_peak_bytes: int
    idle_bytes: int
    peak_bytes: int
    load_average: float
    first: dict[str, list[float]]
    further: dict[str, list[list[float]]]


def measure(artifact: Artifact | Path, engine: str, *, race: Race = Race()) -> Cell:
    """Measure one cell.

    Raises EngineUnavailable or NotSupported as the engine does, RuntimeError in one line for any other failure:
    killed (out of memory, mostly), stopped after `limit_seconds`, or an error of the engine.
    """
    folder = Path(artifact.path if isinstance(artifact, Artifact) else artifact).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "cell.json"
        request = json.dumps({"folder": str(folder), "engine": engine, **asdict(race)})
        command = [sys.executable, "-m", "avalab.engine_bench", request, str(result)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=race.limit_seconds)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{folder.name} in {engine} took longer than {race.limit_seconds:g} s") from error
        if done.returncode or not result.is_file():
            raise RuntimeError(f"{folder.name} in {engine} failed: {_why(done)}")
        answer = json.loads(result.read_text())
    if "error" in answer:
        raise FAILURES.get(answer["error"], RuntimeError)(answer["message"])
    return Cell(**answer)


def main(request: str, result: str) -> None:
    """Measure what the JSON `request` describes in this process and write the JSON answer to the file `result`."""
    try:
        answer = run(json.loads(request))
    except Exception as error:  # told to the parent, which raises it
        answer = {"error": type(error).__name__, "message": str(error) or type(error).__name__}
    Path(result).write_text(json.dumps(answer))


def run(request: dict) -> dict:
    """All measurements of one cell; `request` holds `folder`, `engine` and the fields of `Race`."""
    facts = {"load_average": load_average(), "runtime_bytes": probe.memory()["rss"]}
    probe.reset_peak("cpu")
    start = time.perf_counter()
    engine = engines.load(request["engine"], Path(request["folder"]), threads=request["threads"])
    facts["load_seconds"] = time.perf_counter() - start
    facts |= {"load_peak_bytes": probe.memory()["peak"], "idle_bytes": probe.memory()["rss"]}
    probe.reset_peak("cpu")
    draw, new = random.Random(request["seed"]), request["new_tokens"]
    lengths = [n for n in request["prompts"] if n + new <= engine.facts.context]
    first, further = ({str(n): [] for n in lengths} for _ in range(2))
    for sample in range(request["samples"] + 1):
        for length in lengths:
            prompt = [draw.randrange(engine.facts.vocabulary) for _ in range(length)]
            told = timed(engine, prompt, new)
            if sample:  # the first round warms up
                first[str(length)].append(told[0])
                further[str(length)].append([b - a for a, b in itertools.pairwise(told)])
    return facts | {"peak_bytes": probe.memory()["peak"], "first": first, "further": further}


def timed(engine: engines.Engine, prompt: list[int], new_tokens: int) -> list[float]:
    """Seconds from the call to each token of one generation."""
    told: list[float] = []
    start = time.perf_counter()
    engine.generate(prompt, new_tokens, on_token=lambda token: told.append(time.perf_counter() - start), past_end=True)
    return told


def record(run: Run, artifact: Artifact, *, engine: str, race: Race = Race()) -> Cell | None:
    """Measure a cell and append it to `run`; a failed one is one record with a note, and None is returned."""
    about = {"artifact_sha256": artifact.sha256, "engine": engine, "threads": race.threads}
    try:
        cell = measure(artifact, engine, race=race)
    except (RuntimeError, ValueError) as error:
        run.record(artifact.name, "decode_tokens_per_s", None, "token/s", note=str(error), **about)
        return None
    add_records(run, artifact, engine=engine, race=race, cell=cell)
    return cell


def add_records(run: Run, artifact: Artifact, *, engine: str, race: Race, cell: Cell) -> None:
    """Append what was measured of a cell to `run`."""
    about = {"artifact_sha256": artifact.sha256, "engine": engine, "threads": race.threads}
    about["details"] = {"load_average": cell.load_average, "runtime_bytes": cell.runtime_bytes}

    def add(metric: str, value: float, unit: str, **more) -> None:
        run.record(artifact.name, metric, value, unit, **about, **more)

    add("artifact_bytes", weight_bytes(artifact.path), "byte")
    add("load_seconds", cell.load_seconds, "s", n=1)
    for name, size in (("load", cell.load_peak_bytes), ("idle", cell.idle_bytes), ("inference", cell.peak_bytes)):
        add(f"peak_rss_bytes:{name}", size, "byte")
    for length, first in cell.first.items():
        _add_speeds(add, int(length), first, cell.further[length])


def _add_speeds(add, length: int, first: list[float], further: list[list[float]]) -> None:
    latencies = {"time_to_first_token_ms": first, "token_latency_ms": [s for steps in further for s in steps]}
    for metric, seconds in latencies.items():
        samples = [1000 * s for s in seconds]
        for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            low, high = cost.quantile_interval(samples, q)
            value = cost.quantile(samples, q)
            add(f"{metric}:prompt{length}:{name}", value, "ms", low=low, high=high, n=len(samples))
    rates = {"prefill_tokens_per_s": [length / s for s in first]}
    rates["decode_tokens_per_s"] = [len(steps) / sum(steps) for steps in further]
    for metric, samples in rates.items():
        low, high = cost.quantile_interval(samples)
        add(f"{metric}:prompt{length}", cost.quantile(samples, 0.5), "token/s", low=low, high=high, n=len(samples),
            samples=samples)  # fmt: skip


def weight_bytes(folder: Path) -> int:
    """Bytes of the files that hold weights, whatever the engine; tokenizers not counted."""
    files = [path for path in folder.iterdir() if path.suffix in WEIGHT_FILES and "tokenizer" not in path.name]
    return sum(path.stat().st_size for path in files)


def _why(done: subprocess.CompletedProcess) -> str:
    if done.returncode == -9:
        return "killed, most likely out of memory"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"


if __name__ == "__main__":
    main(*sys.argv[1:])
