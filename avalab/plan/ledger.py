"""A ledger of shrinking steps one after another: what each of them cost in bytes, divergence and accuracy.

A step's cost is not its own alone: it is what the step does to the model it was given, so that another order has
another ledger.

`Ledger` is the same on disk (sqlite): a row a step, named by everything that it depends on, written when the step has
ended. A process that is killed loses the step it was in and no other. Several processes may write at once. Losses are
kept window by window, so that the cost of a step is a paired difference with an interval, and the costs of a chain add
up to its end exactly.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from avalab.lab import artifacts, process, statistics
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, MissingFile
from avalab.lab.run import Record, Run, time_now
from avalab.lab.statistics import Estimate
from avalab.models import adapters, checkpoint

VERSION = 1  # of the tables; another one's file is refused

TABLES = """
create table if not exists about (version integer not null);
create table if not exists steps (
    key text primary key, chain text not null, position integer not null, verb text not null, parameters text not null,
    artifact text not null, sha256 text not null, bytes integer not null, seconds real not null, finished text not null,
    losses text not null, calls text not null
);
"""

WAIT_SECONDS = 30.0  # for another process that writes


def shipped_bytes(artifact: Artifact) -> int:
    """Bytes of the weights that a user needs: an adapter's and its base's."""
    return artifact.bytes + (checkpoint.base_of(artifact).bytes if artifact.format == "peft" else 0)


def ledger(run: Run, subjects: Sequence[str], metrics: Sequence[str]) -> list[Record]:
    """Append `cost:<metric>` of every subject of the chain but the first: its value less that of the one before.

    Raises ValueError for a subject without one of the metrics.
    """
    known = {(r.subject, r.metric): r for r in run.records}
    found = []
    for before, after in pairwise(subjects):
        for metric in metrics:
            if missing := [s for s in (before, after) if (s, metric) not in known]:
                raise InputError(f"no {metric} of {missing[0]!r}; measure every step before its ledger")
            old, new = known[before, metric], known[after, metric]
            more = {"n": new.n, "artifact_sha256": new.artifact_sha256}
            details = {"before": before, "value_before": old.value, "value": new.value}
            cost = new.value - old.value
            found.append(run.record(after, f"cost:{metric}", cost, new.unit, **more, details=details))
    return found


def dequantised(artifact: Artifact) -> Artifact:
    """The bf16 artefact, beside it, of a bitsandbytes 4-bit one's values: so that pruning can come after rounding.

    Raises ValueError for another format.
    """
    if artifact.format != "bitsandbytes":
        raise InputError(f"{artifact.name} is in format {artifact.format!r}; only bitsandbytes 4-bit ones are decoded")

    def save(folder: Path) -> None:
        model = checkpoint.load_model(artifact, packed=False)
        adapters.replace_quantised(model)
        with process.quietly():
            checkpoint.save_model(model, checkpoint.load_tokenizer(artifact), folder)

    out = artifact.path.with_name(f"{artifact.name}+bf16")
    step = {"step": "dequantise", "dtype": "bfloat16"}
    return artifacts.make_artifact(out, save, base=artifact, step=step, format="bf16")


# --- on disk ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One finished step: the artefact it made, losses of text by window, calls right or wrong by case."""

    key: str
    chain: str
    position: int
    verb: str
    artifact: str  # its folder
    sha256: str
    bytes: int
    parameters: dict = field(default_factory=dict)
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # KL divergence to the chain's beginning, in nats
    calls: list[bool] = field(default_factory=list)
    finished: str = ""


@dataclass(frozen=True)
class Cost:
    """What a step changed: bytes, divergence, and share of right calls; None where one of both was not measured."""

    entry: Entry
    bytes: int
    kl: Estimate | None
    calls: Estimate | None


class Ledger:
    """The steps in a file. Raises InputError for a file of another version, or one that is no ledger."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._begin()
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path} is no ledger ({error}); name another file, or delete it") from error

    def _begin(self) -> None:
        with self._open() as database:
            database.executescript(TABLES)
            database.execute("begin immediate")
            found = database.execute("select version from about").fetchone()
            if found is None:
                database.execute("insert into about values (?)", (VERSION,))
            elif found[0] != VERSION:
                raise InputError(
                    f"{self.path} is a ledger of version {found[0]}, and this is version {VERSION}; name another file"
                )

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=WAIT_SECONDS, factory=_Closing)
        database.execute("pragma synchronous = full")
        return database

    def entry(self, key: str) -> Entry | None:
        """A finished step, or None."""
        with self._open() as database:
            row = database.execute("select * from steps where key = ?", (key,)).fetchone()
        return _read(row) if row else None

    def chain(self, chain: str) -> list[Entry]:
        """The finished steps of a chain in their order."""
        with self._open() as database:
            rows = database.execute("select * from steps where chain = ? order by position", (chain,)).fetchall()
        return [_read(row) for row in rows]

    def chains(self) -> list[str]:
        """Names of the chains, in alphabetical order."""
        with self._open() as database:
            return [name for (name,) in database.execute("select distinct chain from steps order by chain")]

    def write(self, entry: Entry) -> Entry:
        """Add a step, or replace the one of its key."""
        row = (entry.key, entry.chain, entry.position, entry.verb, json.dumps(entry.parameters, sort_keys=True))
        row += (entry.artifact, entry.sha256, entry.bytes, entry.seconds, entry.finished or time_now())
        row += (json.dumps(entry.losses), json.dumps(entry.calls))
        with self._open() as database:
            database.execute(f"insert or replace into steps values ({', '.join('?' * len(row))})", row)
        return entry

    def once(self, key: str, compute: Callable[[], Entry]) -> Entry:
        """The step of a key if it has ended and its artefact is still what it was, else what `compute` makes now."""
        known = self.entry(key)
        if known:
            try:
                if artifacts.load_artifact(known.artifact).sha256 == known.sha256:
                    return known
            except (InputError, MissingFile):  # deleted or altered since: made again
                pass
        start = time.perf_counter()
        made = compute()
        return self.write(Entry(**vars(made) | {"seconds": time.perf_counter() - start, "finished": time_now()}))

    def costs(self, chain: str, *, resamples: int = 2000, seed: int = 0) -> list[Cost]:
        """What each step of a chain but the first changed; their sums are the end less the beginning."""
        return [_cost(a, b, resamples, seed) for a, b in pairwise(self.chain(chain))]


class _Closing(sqlite3.Connection):
    """A connection whose `with` commits (or rolls back) and closes it."""

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.close()


def _read(row: tuple) -> Entry:
    key, chain, position, verb, parameters, artifact, sha256, size, seconds, finished, losses, calls = row
    about = {"parameters": json.loads(parameters), "seconds": seconds, "finished": finished}
    scores = {"losses": json.loads(losses), "calls": json.loads(calls)}
    return Entry(key, chain, position, verb, artifact, sha256, size, **about, **scores)


def _cost(before: Entry, after: Entry, resamples: int, seed: int) -> Cost:
    kl = calls = None
    if before.losses and len(before.losses) == len(after.losses):
        windows = [np.array(each.losses)[:, None] for each in (after, before)]
        kl = statistics.paired_difference(*windows, resamples=resamples, seed=seed)
    if before.calls and len(before.calls) == len(after.calls):
        calls = statistics.share_difference(after.calls, before.calls)
    return Cost(after, after.bytes - before.bytes, kl, calls)
