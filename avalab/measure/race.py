"""A race of every artefact in every engine that loads it, under the same conditions, one process a visit.

    python -m avalab.measure.race [--profile P] [--cap SECONDS]        (make bench)

1. `make_forms` writes one base model in the forms that its engines read, each made once and found again; a form whose
   library is missing is a record that says so. `list_entries` pairs them with engines and numbers of threads.
2. A cell is an artefact in an engine with a number of threads. In each round every cell that is not finished is visited
   once, in an order drawn anew: a fresh process loads, warms up and takes a few samples (`avalab.measure.cell`), so
   that a busy moment of the machine, or heat, meets them all.
3. A cell is finished when the 95 % interval of the median of every speed is narrower than `WANTED` of that median, or
   when it failed: a missing library, a refusal, a crash, no memory or no answer in time is a row with a note, and the
   race goes on. At the time cap nothing more is visited, except that every cell is visited once.
4. Each visit is appended to a file as soon as it is there, under a key of artefact, engine, threads, sizes, code and
   machine. A race that was killed goes on where it was; one that ended is read back.
5. `record_batches` then gives the cells of the highest thread count 1, 4 and 16 sequences at once; speeds are those of
   all sequences together, and an engine without batches is one record that says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from avalab import engines
from avalab.compress import quantize
from avalab.data import corpora
from avalab.engines import gguf as gguf_file
from avalab.engines import llamacpp
from avalab.engines import onnx as genai_folder
from avalab.engines import openvino as openvino_engine
from avalab.lab import artifacts, statistics
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cache_path, cached_document
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import PROFILES, ROOT, Run, device_name, load_average, time_now
from avalab.measure import cell
from avalab.measure.cell import Cell, Workload
from avalab.models import checkpoint

FAILED = "decode_tokens_per_s"  # the metric of a record that says why a cell was not measured

WANTED = 0.05  # width of the interval over the median

CAPS = {"smoke": 1.0, "laptop": 400.0}  # seconds of a whole race; others 1800

VISITS = {  # sizes of one; others those of `Workload`
    "smoke": Workload(prompts=(8, 32), new_tokens=4, samples=2, limit_seconds=60),
    "laptop": Workload(prompts=(16, 512), new_tokens=16, samples=3, limit_seconds=120),
}

BATCHES = {  # several sequences at once; others 256 tokens and 32 new ones, 5 samples
    "smoke": Workload(prompts=(8,), new_tokens=4, samples=2, limit_seconds=60, batches=(1, 4)),
    "laptop": Workload(prompts=(32,), new_tokens=8, samples=2, limit_seconds=180),
}

SAME_AS_DENSE = (("gguf", "torch"),)  # the torch engine decodes a GGUF file to the dense model, once more bf16

AVA_BITS = 6  # a weight of the whole model: what GGUF's 4-bit files of a small one come to, embedding included

# --- who takes part ---------------------------------------------------------------------------------------------------


def _ava(base: Artifact, run: Run) -> Artifact:
    """The mixed grid in the size that the run has made already, so that it is found again, else of `AVA_BITS`."""
    made = [a.card for a in artifacts.list_artifacts(run.artifacts_dir) if a.card["base"]["sha256"] == base.sha256]
    steps = [card["recipe"][-1] for card in made if card["recipe"]]
    size = next((step.get("bytes") for step in steps if step.get("step") == "ava"), None)
    if size:
        return quantize.compress_artifact(base, "ava", run=run, bytes=size)
    return quantize.compress_artifact(base, "ava", run=run, bits_per_weight=AVA_BITS)


FORMS: dict[str, Callable[[Artifact, Run], Artifact]] = {
    "bf16": lambda base, run: base,
    "nf4": lambda base, run: quantize.compress_artifact(base, "nf4", run=run, double_quantization=True),
    "torchao-int8": lambda base, run: quantize.compress_artifact(base, "torchao-int8", run=run),
    "ava": _ava,
    "gguf-q8_0": lambda base, run: gguf_file.write(base, "q8_0"),
    "gguf-q4_0": lambda base, run: gguf_file.write(base, "q4_0"),
    "gguf-q4_k_m": lambda base, run: llamacpp.write(
        base, "q4_k_m", windows=corpora.calibration_windows(run, checkpoint.load_tokenizer(base))
    ),
    "gguf-ava": lambda base, run: quantize.compress_artifact(  # over GGUF's own block types, at the bytes of Q4_0
        base, "ava", run=run, bytes=gguf_file.write(base, "q4_0").bytes, format="gguf"
    ),
    "openvino-int8": lambda base, run: openvino_engine.write(base, "int8"),
    "openvino-int4": lambda base, run: openvino_engine.write(base, "int4"),
    "onnx-int4": lambda base, run: genai_folder.write(base, "int4"),
}

SOME = {"smoke": ("bf16", "nf4", "openvino-int4", "onnx-int4")}  # profiles that race a few forms only


@dataclass(frozen=True, eq=False)  # one of its kind: an artefact's card has no hash
class Entry:
    """A cell that takes part: what it is called, the artefact, the engine, threads."""

    subject: str
    artifact: Artifact
    engine: str
    threads: int


def make_forms(run: Run, names: Sequence[str] = ()) -> dict[str, Artifact]:
    """The run's base model in the forms of these names (the profile's without), as far as their libraries are here.

    Raises ValueError for an unknown name.
    """
    if unknown := [name for name in names if name not in FORMS]:
        raise InputError(f"no form {', '.join(unknown)}; choose from {', '.join(FORMS)}")
    base, made = checkpoint.base_artifact(run), {}
    for name in tqdm(names or run.profile.pick(SOME, tuple(FORMS)), desc="make", leave=False):
        try:
            made[name] = FORMS[name](base, run)
        except (engines.EngineUnavailable, ValueError) as error:  # not here, or not of this model's shape
            run.record(name, FAILED, None, "token/s", threads=0, note=f"not measured: {error}")
    return made


def _device(run: Run) -> str:
    return "cuda" if run.device.startswith("cuda") else "cpu"


def thread_counts(profile: str = "") -> tuple[int, ...]:
    """One thread, and all processors that this process may use; one alone where the profile is `smoke`."""
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (1,) if profile == "smoke" else tuple(sorted({1, every}))


def list_entries(
    forms: dict[str, Artifact], *, threads: Sequence[int] = (), skip: Sequence[tuple[str, str]] = ()
) -> list[Entry]:
    """Every artefact in every engine that loads it, with each number of threads; a subject is `nf4 in torch`.

    `skip` holds pairs of an artefact's kind and an engine.
    """
    found = []
    for (name, artifact), count in itertools.product(forms.items(), threads or thread_counts()):
        kind = engines.kind(artifact.path)
        readers = engines.READERS[kind]
        if kind == "gguf":  # not every engine reads every block type
            readers = tuple(engine for engine in readers if engine in artifact.card["engines"])
        for engine in readers:
            if engine in engines.ENGINES and (kind, engine) not in skip:
                found.append(Entry(f"{name} in {engine}", artifact, engine, count))
    return found


def visit_workload(run: Run) -> Workload:
    """What is asked in a visit, in the run's profile; on a GPU the torch engine runs there."""
    return replace(run.profile.pick(VISITS, Workload()), seed=run.seed, device=_device(run))


def hold_race(run: Run, entries: list[Entry], *, work: Workload, cap_seconds: float) -> dict[Entry, Cell | str]:
    """Run the race and append its records to `run`; a cell's value is what was measured, or why nothing was."""
    file = run.artifacts_dir / "cache" / "race.jsonl"
    keys = {entry: visit_key(entry, work, run) for entry in entries}
    known = _read_visits(file)
    visits = {entry: known.get(keys[entry], []) for entry in entries}
    missing: dict[str, str] = {}  # engine -> what it lacks here

    def waiting() -> list[Entry]:
        return [e for e in entries if not _is_finished(visits[e], cap_seconds) and e.engine not in missing]

    def is_late() -> bool:
        return sum(visit.get("seconds", 0) for each in visits.values() for visit in each) > cap_seconds

    def keep(entry: Entry, row: dict) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:  # a line that a killed race left open is closed by the first \n
            lines.write("\n" + json.dumps({"key": keys[entry], **row}) + "\n")
        visits[entry].append(row)

    started = False
    while waiting() and not (started and is_late()):
        started = True
        order = sorted(waiting(), key=lambda e: (e.subject, e.threads))
        random.Random(f"{run.seed} {sum(map(len, visits.values()))}").shuffle(order)
        for entry in tqdm(order, desc="race", leave=False):
            if entry.engine in missing or (visits[entry] and is_late()):
                continue
            try:
                keep(entry, visit(entry, work, len(visits[entry])))
            except engines.EngineUnavailable as error:
                missing[entry.engine] = str(error)  # not kept in the file: it may be installed tomorrow
    for entry in waiting():
        keep(entry, {"end": "time cap", "cap_seconds": cap_seconds})
    outcomes = {
        entry: _merged(seen) or next((v["failed"] for v in seen if "failed" in v), missing.get(entry.engine, ""))
        for entry, seen in visits.items()
    }
    _record_outcomes(run, outcomes, work)
    return outcomes


def entries_that_ran(outcomes: dict[Entry, Cell | str]) -> list[Entry]:
    """The entries of the highest number of threads that ran."""
    ran = [entry for entry, outcome in outcomes.items() if isinstance(outcome, Cell)]
    most = max((entry.threads for entry in ran), default=0)
    return [entry for entry in ran if entry.threads == most]


def visit(entry: Entry, work: Workload, number: int) -> dict:
    """One visit: `cell` and `seconds`, or `failed`. Raises EngineUnavailable without the engine's library."""
    start = time.monotonic()
    own = replace(work, threads=entry.threads, seed=work.seed + 1000 * number)  # prompts of its own
    try:
        found = {"cell": asdict(cell.measure_cell(entry.artifact, entry.engine, work=own))}
    except engines.EngineUnavailable:
        raise
    except (RuntimeError, ValueError, MemoryError) as error:
        found = {"failed": str(error)}
    return found | {"seconds": time.monotonic() - start}


def is_settled(found: Cell) -> bool:
    """Whether the interval of the median of every speed is narrower than `WANTED` of the median."""
    medians = map(statistics.quantile, [*found.first.values(), *map(found.decode_rates, found.further)])
    return all(None not in (m.low, m.high) and m.high - m.low <= WANTED * m.value for m in medians)


def visit_key(entry: Entry, work: Workload, run: Run, *, measured: Callable | str = visit) -> str:
    """What a visit, or what `measured` finds, depends on, as one hash: artefact, engine, sizes, code and machine."""
    code = code_of(measured, engines.ENGINES[entry.engine])
    about = [entry.artifact.sha256, entry.engine, entry.threads, asdict(work), device_name(run.device), code]
    return artifacts.sha256_of_text(json.dumps(about))[:24]


def _merged(visits: list[dict]) -> Cell | None:
    cells = [Cell(**visit["cell"]) for visit in visits if "cell" in visit]
    return cell.merge_cells(cells) if cells else None


def _is_finished(visits: list[dict], cap_seconds: float) -> bool:
    """A cap ends a race only for those who do not grant it more time."""
    if any("failed" in visit or visit.get("cap_seconds", -1) >= cap_seconds for visit in visits):
        return True
    found = _merged(visits)
    return found is not None and is_settled(found)


def _record_outcomes(run: Run, outcomes: dict[Entry, Cell | str], work: Workload) -> None:
    """A missing library is said once for each engine, everything else cell by cell."""
    said = set()
    for entry, found in outcomes.items():
        subject, artifact, engine, threads = entry.subject, entry.artifact, entry.engine, entry.threads
        if isinstance(found, Cell):
            own = replace(work, threads=threads)
            cell.record_cell(run, artifact, engine=engine, work=own, cell=found, subject=subject)
        elif not found.startswith("engine "):
            record = partial(run.record, artifact_sha256=artifact.sha256, engine=engine, threads=threads)
            record(subject, FAILED, None, "token/s", note=found)
        elif engine not in said:
            said.add(engine)
            run.record(engine, FAILED, None, "token/s", engine=engine, threads=0, note=f"not measured: {found}")


def _read_visits(file: Path) -> dict[str, list[dict]]:
    """Visits by key; a line that a killed race left half-written is not there."""
    found: dict[str, list[dict]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
            found.setdefault(row.pop("key"), []).append(row)
        except (ValueError, AttributeError, KeyError, TypeError):
            continue
    return found


# --- several sequences at once ----------------------------------------------------------------------------------------


def record_batches(run: Run, entries: list[Entry]) -> None:
    """Measure the cells of the highest thread count at every batch size; read back what was measured before."""
    most = max((entry.threads for entry in entries), default=0)
    sizes = run.profile.pick(BATCHES, Workload(prompts=(256,), new_tokens=32, samples=5, limit_seconds=180))
    work = replace(sizes, threads=most, seed=run.seed, device=_device(run))
    for entry in tqdm([e for e in entries if e.threads == most], desc="batches", leave=False):
        record = partial(
            run.record, entry.subject, artifact_sha256=entry.artifact.sha256, engine=entry.engine, threads=most
        )
        key = visit_key(entry, work, run, measured="avalab.measure.cell:measure_batches")
        path = cache_path(run.artifacts_dir / "cache", "batch-times", key, suffix=".json")
        try:
            kept = cached_document(path, partial(_time_batches, entry, work))
        except engines.EngineUnavailable:
            continue  # the race has said so
        except (RuntimeError, ValueError) as error:
            record("decode_tokens_per_s:batch", None, "token/s", note=str(error))
            continue
        for size, seconds in kept["sizes"].items():
            for name, count in (("prefill", max(work.prompts)), ("decode", work.new_tokens - 1)):
                rates = [int(size) * count / s for s in seconds[name]]
                speed = vars(statistics.quantile(rates))
                record(f"{name}_tokens_per_s:batch{size}", unit="token/s", samples=rates, when=kept["when"], **speed)


def _time_batches(entry: Entry, work: Workload) -> dict:
    return {"when": time_now(), "sizes": cell.measure_batches(entry.artifact, entry.engine, work=work)}


def main() -> None:
    """`make bench`."""
    parser = argparse.ArgumentParser(description="Race every artefact in every engine that loads it.")
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    parser.add_argument("--cap", type=float, default=None, help="seconds of the race; a cell is visited at least once")
    chosen = parser.parse_args()
    run = Run("bench", chosen.profile)
    print(f"load average {load_average()}")
    entries = list_entries(make_forms(run), threads=thread_counts(chosen.profile), skip=SAME_AS_DENSE)
    cap = chosen.cap if chosen.cap is not None else run.profile.pick(CAPS, 1800.0)
    record_batches(run, entries_that_ran(hold_race(run, entries, work=visit_workload(run), cap_seconds=cap)))
    for record in run.records:
        shown = record.note if record.value is None else f"{record.value:14.4g} {record.unit}"
        print(f"{record.subject:28} {record.threads:2} threads  {record.metric:36} {shown}")
    print(f"load average {load_average()}; records: {run.save().relative_to(ROOT)}")


if __name__ == "__main__":
    main()
