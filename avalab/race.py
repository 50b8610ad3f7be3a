"""The race: every artefact in every engine that loads it, under the same conditions, one process a visit.

    python -m avalab.race [--profile P] [--cap SECONDS]        (make bench)

1. A cell is an artefact in an engine with a number of threads. In each round every cell that is not finished is visited
   once, in an order drawn anew: a fresh process loads, warms up and takes a few samples (`engine_bench`), so that a
   busy moment of the machine, or heat, meets them all.
2. A cell is finished when the 95 % interval of the median of every speed is narrower than `WANTED` of that median, or
   when it failed: a missing library, a refusal, a crash, no memory or no answer in time is a row with a note, and the
   race goes on. At the time cap nothing more is visited, except that every cell is visited once.
3. Each visit is appended to a file as soon as it is there, under a key of artefact, engine, threads, sizes, code and
   machine. A race that was killed goes on where it was; one that ended is read back.

What it does not do: choose among the cells (`budgets`), or score them (`engine_quality`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from tqdm.auto import tqdm

from avalab import artifacts, contestants, cost, engine_bench, engines, process
from avalab.contestants import Entry
from avalab.engine_bench import Cell, Race
from avalab.experiment import PROFILES, ROOT, Run, device_name, load_average

WANTED = 0.05  # width of the interval over the median
CAPS = {"smoke": 1.0, "laptop": 400.0}  # seconds of a whole race; others 1800
SIZES = {  # of a visit
    "smoke": Race(prompts=(8, 32), new_tokens=4, samples=2, limit_seconds=60),
    "laptop": Race(prompts=(16, 512), new_tokens=16, samples=3, limit_seconds=120),
}


def sizes(run: Run) -> Race:
    """The sizes of a visit in the run's profile; on a GPU the torch engine runs there."""
    race = SIZES.get(run.profile_name, Race(limit_seconds=600))
    return replace(race, seed=run.seed, device="cuda" if run.device.startswith("cuda") else "cpu")


def hold(run: Run, taking_part: list[Entry], *, race: Race, cap_seconds: float) -> dict[Entry, Cell | str]:
    """Run the race and append its records to `run`; a cell's value is what was measured, or why nothing was."""
    file = run.artifacts_dir / "cache" / "race.jsonl"
    keys = {entry: key(entry, race, run) for entry in taking_part}
    known = _read(file)
    visits = {entry: known.get(keys[entry], []) for entry in taking_part}
    missing: dict[str, str] = {}  # engine -> what it lacks here
    for number in itertools.count():
        waiting = [e for e in taking_part if not _finished(visits[e], cap_seconds) and e.engine not in missing]
        if number and _seconds(visits) > cap_seconds:
            for entry in waiting:
                _append(file, keys[entry], {"end": "time cap", "cap_seconds": cap_seconds}, visits[entry])
        elif waiting:
            _round(run, waiting, race=race, state=(file, keys, visits, missing), cap_seconds=cap_seconds)
            continue
        break
    outcomes = {entry: _outcome(visits[entry], missing.get(entry.engine, "")) for entry in taking_part}
    _record(run, outcomes, race)
    return outcomes


def _round(run: Run, waiting: list[Entry], *, race: Race, state: tuple, cap_seconds: float) -> None:
    """Visit each waiting cell once, in an order of the round's own, unless the cap was reached meanwhile."""
    file, keys, visits, missing = state
    order = sorted(waiting, key=lambda e: (e.subject, e.threads))
    random.Random(f"{run.seed} {sum(map(len, visits.values()))}").shuffle(order)
    for entry in tqdm(order, desc="race", leave=False):
        if entry.engine in missing or (visits[entry] and _seconds(visits) > cap_seconds):
            continue
        try:
            _append(file, keys[entry], visit(entry, race, len(visits[entry])), visits[entry])
        except engines.EngineUnavailable as error:
            missing[entry.engine] = str(error)  # not kept in the file: it may be installed tomorrow


def measured(outcomes: dict[Entry, Cell | str]) -> list[Entry]:
    """The entries of the highest number of threads that ran."""
    ran = [entry for entry, outcome in outcomes.items() if isinstance(outcome, Cell)]
    most = max((entry.threads for entry in ran), default=0)
    return [entry for entry in ran if entry.threads == most]


def visit(entry: Entry, race: Race, number: int) -> dict:
    """One visit: `cell` and `seconds`, or `failed`. Raises EngineUnavailable without the engine's library."""
    start = time.monotonic()
    own = replace(race, threads=entry.threads, seed=race.seed + 1000 * number)  # prompts of its own
    try:
        cell = asdict(engine_bench.measure(entry.artifact, entry.engine, race=own))
    except engines.EngineUnavailable:
        raise
    except (RuntimeError, ValueError, MemoryError) as error:
        return {"failed": str(error), "seconds": time.monotonic() - start}
    return {"cell": cell, "seconds": time.monotonic() - start}


def settled(cell: Cell, wanted: float = WANTED) -> bool:
    """Whether the interval of the median of every speed is narrower than `wanted` of the median."""
    rates = [*cell.first.values(), *map(engine_bench.decode_rates, cell.further.values())]
    return all(_width(samples) <= wanted for samples in rates)


def key(entry: Entry, race: Race, run: Run) -> str:
    """What a visit depends on, as one hash: artefact, engine, threads, sizes, code and machine."""
    about = [entry.artifact.sha256, entry.engine, entry.threads, asdict(race), device_name(run.device)]
    return artifacts.sha256_of_text(json.dumps([*about, _code(entry.engine)]))[:24]


@cache
def _code(engine: str) -> str:
    here = Path(__file__).parent
    files = [Path(m.__file__) for m in (process, engine_bench)] + [here / "engines" / "engine.py"]
    return artifacts.code_sha256([*files, *sorted((here / "engines").glob(f"{engine}*.py"))])


def _width(samples: Sequence[float]) -> float:
    low, high = cost.quantile_interval(samples)
    return float("inf") if low is None or high is None else (high - low) / cost.quantile(samples, 0.5)


def _cells(visits: list[dict]) -> list[Cell]:
    return [Cell(**visit["cell"]) for visit in visits if "cell" in visit]


def _finished(visits: list[dict], cap_seconds: float) -> bool:
    """A cap ends a race only for those who do not grant it more time."""
    if any("failed" in visit or visit.get("cap_seconds", -1) >= cap_seconds for visit in visits):
        return True
    return bool(visits) and settled(engine_bench.merged(_cells(visits)))


def _seconds(visits: dict[Entry, list[dict]]) -> float:
    return sum(visit.get("seconds", 0) for each in visits.values() for visit in each)


def _outcome(visits: list[dict], missing: str) -> Cell | str:
    cells = _cells(visits)
    if cells:
        return engine_bench.merged(cells)
    return next((visit["failed"] for visit in visits if "failed" in visit), missing)


def _record(run: Run, outcomes: dict[Entry, Cell | str], race: Race) -> None:
    """A missing library is said once for each engine, everything else cell by cell."""
    said = set()
    for entry, outcome in outcomes.items():
        own = replace(race, threads=entry.threads)
        if isinstance(outcome, Cell):
            how = {"engine": entry.engine, "race": own, "cell": outcome, "subject": entry.subject}
            engine_bench.add_records(run, entry.artifact, **how)
        elif not outcome.startswith("engine "):
            how = {"artifact": entry.artifact, "engine": entry.engine, "threads": entry.threads}
            engine_bench.add_failure(run, entry.subject, outcome, **how)
        elif entry.engine not in said:
            engine_bench.add_failure(run, entry.engine, f"not measured: {outcome}", engine=entry.engine)
            said.add(entry.engine)


def _append(file: Path, identity: str, row: dict, visits: list[dict]) -> None:
    """One write a line; a line that a killed race left open is closed by the empty one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" + json.dumps({"key": identity, **row}) + "\n")
    visits.append(row)


def _read(file: Path) -> dict[str, list[dict]]:
    """Visits by key; a line that a killed race left half-written is not there."""
    found: dict[str, list[dict]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
            found.setdefault(row.pop("key"), []).append(row)
        except (ValueError, AttributeError, KeyError, TypeError):
            continue
    return found


def main() -> None:
    """`make bench`."""
    from avalab import engine_batches

    parser = argparse.ArgumentParser(description="Race every artefact in every engine that loads it.")
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    parser.add_argument("--cap", type=float, default=None, help="seconds of the race; a cell is visited at least once")
    chosen = parser.parse_args()
    run = Run("bench", chosen.profile)
    print(f"load average {load_average()}")
    how = {"threads": contestants.thread_counts(chosen.profile), "skip": contestants.SAME_AS_DENSE}
    taking_part = contestants.entries(contestants.make(run), **how)
    cap = chosen.cap if chosen.cap is not None else CAPS.get(chosen.profile, 1800.0)
    engine_batches.record_all(run, measured(hold(run, taking_part, race=sizes(run), cap_seconds=cap)))
    for record in run.records:
        shown = record.note if record.value is None else f"{record.value:14.4g} {record.unit}"
        print(f"{record.subject:28} {record.threads:2} threads  {record.metric:36} {shown}")
    print(f"load average {load_average()}; records: {run.save().relative_to(ROOT)}")


if __name__ == "__main__":
    main()
