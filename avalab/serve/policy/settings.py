"""The server's settings, by the names that its first users gave them, from a TOML or JSON file.

A file holds the keys at its top or in a table `[serve]`; the command line overrules it. Sizes are numbers of MiB where
the name says so, or texts such as `4GiB`.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from avalab.lab.errors import InputError, MissingFile

UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

LEAST = {  # smallest value of a number
    **dict.fromkeys(("max_batch_size", "max_memory_mb", "workers", "context", "prefill_tokens", "queue_limit"), 1),
    **dict.fromkeys(("target_latency_ms", "ageing_ms", "request_timeout_s", "max_body_mb", "max_prompt_chars"), 0.001),
    **dict.fromkeys(("max_wait_time_ms", "threads", "answers_mb", "max_swap_wait_ms", "prefix_mb", "port"), 0),
}


@dataclass(frozen=True)
class Settings:
    """How a server batches, what it keeps in memory, and its limits."""

    # Batching
    max_batch_size: int = 8  # requests that a worker computes at once
    max_wait_time_ms: float = 5.0  # that the first request of a batch waits for others
    dynamic_batching: bool = True  # the size follows the latency target
    target_latency_ms: float = 200.0  # between two tokens of an answer, 90 of 100 times
    priority_threshold: float = 7.0  # from this priority on (0 to 10) a request is urgent
    ageing_ms: float = 2000.0  # of waiting, after which a request counts one level more
    prefill_tokens: int = 128  # of a prompt read at once, between which urgent requests get in
    # Models
    max_memory_mb: float = 4096.0  # of all models in memory
    workers: int = 1  # processes of a model, at most
    threads: int = 0  # of a worker; 0: its share of the processors
    context: int = 2048  # tokens of a request and its answer
    max_swap_wait_ms: float = 2000.0  # that a request waits while models in memory are served
    preload: bool = True  # what is learnt from the order in which agents ask
    pinned: tuple[str, ...] = ()  # names of models that never leave
    # Caches
    cache_dir: str = ""  # of answers and embeddings on disk; "": in memory only
    redis_url: str = ""  # of a Redis server that several nodes share
    answers_mb: float = 256.0  # of kept answers; 0: none
    prefix_mb: float = 512.0  # of kept key-value caches of shared beginnings; 0: none
    # Limits
    max_body_mb: float = 8.0
    max_prompt_chars: int = 400_000
    queue_limit: int = 256
    request_timeout_s: float = 300.0
    api_key: str = ""  # needed beyond loopback
    log_file: str = ""  # one JSON line a request, rotating; "": standard error

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if hasattr(self, name) and getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it is {least:g} or more")
        if not 0 <= self.priority_threshold <= 11:
            raise InputError(f"priority_threshold is {self.priority_threshold}; it is 0 to 10, or 11 for nobody urgent")

    @property
    def max_bytes(self) -> int:
        """`max_memory_mb` in bytes."""
        return int(self.max_memory_mb * 2**20)


def read_settings(path: Path | str | None = None, **given: Any) -> Settings:
    """The settings of a file, overruled by what is `given` and not None.

    Raises MissingFile, or InputError naming the key, what it holds and what it may hold.
    """
    rows = _rows(Path(path)) if path else {}
    return _checked(rows | {name: value for name, value in given.items() if value is not None}, str(path or "options"))


def _rows(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFile(f"no settings at {path}; give a .toml or .json file")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    found = found.get("serve", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}; settings are an object of names and values")
    return found


def _checked(rows: dict[str, Any], where: str) -> Settings:
    known = {field.name: field for field in fields(Settings)}
    values = {}
    for name, value in rows.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise InputError(f"{where}: no setting {name!r}{hint}")
        values[name] = _typed(name, value, known[name].default, where)
    return replace(Settings(), **values)


def _typed(name: str, value: Any, default: Any, where: str) -> Any:
    wanted = type(default)
    if name.endswith("_mb") and isinstance(value, str):
        return size_bytes(value) / 2**20
    if wanted is tuple and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"{where}: {name} is {value!r}; it is a {wanted.__name__}, such as {default!r}")


def size_bytes(text: str) -> int:
    """`4GiB`, `512 MiB` or `98362432` in bytes. Raises InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS:
        raise InputError(f"{text!r} is no size; write one as 4GiB, 512MiB or a number of bytes")
    return int(float(found[1]) * UNITS[found[2].upper()])
