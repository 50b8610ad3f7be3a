"""Where answers and embeddings are kept: in memory, in a file of sqlite's, in a Redis that nodes share.

`Layers` asks them in this order and keeps what is found further out nearer by. No store ever fails a request: a full
disk, a damaged file or a Redis that is gone means that something is computed again, and is said in the log once.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from avalab.lab.errors import InputError, Unavailable

log = logging.getLogger("avalab.serve")

FILE = "answers.sqlite"

RETRY_SECONDS = 5.0  # a Redis that was gone is asked again after

SECONDS = 0.25  # at most, for one question to Redis


class Memory:
    """Texts in memory within `max_bytes`; what was used longest ago leaves."""

    name = "memory"

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.rows: OrderedDict[str, bytes] = OrderedDict()

    def get(self, key: str) -> bytes | None:
        """What is kept under a key."""
        if key in self.rows:
            self.rows.move_to_end(key)
        return self.rows.get(key)

    def put(self, key: str, value: bytes) -> None:
        """Keep a value; one larger than the whole is not."""
        self.bytes -= len(self.rows.pop(key, b""))
        self.rows[key] = value
        self.bytes += len(value)
        self.shrink(self.max_bytes)

    def shrink(self, target_bytes: int) -> None:
        """Let values go until the rest fits."""
        while self.rows and self.bytes > target_bytes:
            self.bytes -= len(self.rows.popitem(last=False)[1])


class Disk:
    """Texts in `answers.sqlite` of a folder, which several servers may use at once."""

    name = "disk"

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.max_bytes, self.lock, self.told, self.since = max_bytes, threading.Lock(), False, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = sqlite3.connect(folder / FILE, timeout=5.0, check_same_thread=False, isolation_level=None)
            self.file.execute("PRAGMA journal_mode=WAL")
            self.file.execute("PRAGMA synchronous=NORMAL")
            self.file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value BLOB, used INTEGER)")
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"cache_dir {folder} cannot be used: {error}; name a folder that can be written") from None

    def get(self, key: str) -> bytes | None:
        """What is kept under a key; None also where the file cannot be read."""
        rows = self._do("SELECT value FROM answers WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    def put(self, key: str, value: bytes) -> None:
        """Keep a value; the oldest leave when there is too much."""
        newest = "(SELECT COALESCE(MAX(used), 0) + 1 FROM answers)"  # an order that no clock disturbs
        self._do(f"INSERT OR REPLACE INTO answers VALUES (?, ?, {newest})", (key, value))
        self.since += len(value)
        if self.since > self.max_bytes // 8:
            self.since = 0
            kept = (
                "SELECT key FROM (SELECT key, SUM(LENGTH(value)) OVER (ORDER BY used DESC) s FROM answers) WHERE s <= ?"
            )
            self._do(f"DELETE FROM answers WHERE key NOT IN ({kept})", (self.max_bytes,))

    def _do(self, statement: str, values: tuple) -> list[tuple]:
        try:
            with self.lock:
                return self.file.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            if not self.told:
                log.warning("the cache on disk cannot be used and answers are computed again: %s", error)
            self.told = True
            return []

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Shared:
    """Texts in a Redis server that several nodes ask."""

    name = "redis"

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            import redis
        except ImportError:
            raise Unavailable('a shared cache needs the package redis: pip install -e ".[serve]"') from None
        try:
            self.client = redis.Redis.from_url(url, socket_timeout=SECONDS, socket_connect_timeout=SECONDS)
        except ValueError as error:
            raise InputError(f"redis_url {url!r} is none: {error}; such as redis://127.0.0.1:6379/0") from None
        self.errors, self.clock, self.closed_until, self.told = (redis.RedisError, OSError), clock, 0.0, False

    def get(self, key: str) -> bytes | None:
        """What any node has kept under a key; None where Redis does not answer."""
        return self._do(lambda: self.client.get(f"avalab:{key}"))

    def put(self, key: str, value: bytes) -> None:
        """Keep a value for every node; how long is Redis's own policy (maxmemory)."""
        self._do(lambda: self.client.set(f"avalab:{key}", value))

    def _do(self, ask: Callable) -> bytes | None:
        if self.clock() < self.closed_until:
            return None
        try:
            found = ask()
        except self.errors as error:
            self.closed_until = self.clock() + RETRY_SECONDS
            if not self.told:
                log.warning("Redis does not answer and is left out for %g s at a time: %s", RETRY_SECONDS, error)
            self.told = True
            return None
        self.told = False
        return found if isinstance(found, bytes) else None

    def close(self) -> None:
        """Close the connection."""
        self.client.close()


class Layers:
    """Stores from near to far, and how often each had what was asked for."""

    def __init__(self, stores: Sequence[Memory | Disk | Shared]) -> None:
        self.stores = tuple(stores)
        self.hits = {store.name: 0 for store in self.stores}
        self.misses = 0

    def get(self, key: str) -> bytes | None:
        """The value in the nearest store that has it, which the nearer ones then have, too."""
        for at, store in enumerate(self.stores):
            if (found := store.get(key)) is not None:
                for nearer in self.stores[:at]:
                    nearer.put(key, found)
                self.hits[store.name] += 1
                return found
        self.misses += 1
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keep a value in every store."""
        for store in self.stores:
            store.put(key, value)

    def shrink(self, target_bytes: int) -> None:
        """Let go of values in memory."""
        for store in self.stores:
            if isinstance(store, Memory):
                store.shrink(target_bytes)

    def stats(self) -> dict:
        """Hits by store, misses, the rate, and what memory holds."""
        asked = sum(self.hits.values()) + self.misses
        memory = next((store for store in self.stores if isinstance(store, Memory)), None)
        return {
            "hits": sum(self.hits.values()),
            "hits_by_store": dict(self.hits),
            "misses": self.misses,
            "hit_rate": sum(self.hits.values()) / asked if asked else 0.0,
            "entries": len(memory.rows) if memory else 0,
            "bytes": memory.bytes if memory else 0,
        }

    def close(self) -> None:
        """Close what has something to close."""
        for store in self.stores:
            if not isinstance(store, Memory):
                store.close()
