"""Texts that took long to generate, one JSON line each, appended as they arrive: a killed run goes on where it was.

A line is `{"key": ..., "text": ..., "seconds": ...}`: what was asked, the answer, and the time since the answer before
(the first of a batch bears the time of all), so that the speed of answering is known also when it is read back. A line
that was cut off, as the last one of a killed run is, counts as not there and is asked again.

What it does not do: know what a key means, or remove old lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm.auto import tqdm


def resumed(
    path: Path, keys: list[str], generate: Callable[[list[int]], Iterable[tuple[int, str]]], *, progress: str = ""
) -> list[str]:
    """The text of each key: from the file where it is known, else from `generate` and appended to the file.

    `generate` gets the indices of the missing keys and yields (position in that list, text), batch after batch.
    """
    known = _known(path)
    missing = [i for i, key in enumerate(keys) if key not in known]
    path.parent.mkdir(parents=True, exist_ok=True)
    done = len(keys) - len(missing)
    with tqdm(total=len(keys), initial=done, desc=progress, disable=not progress, leave=False) as bar:
        answers, start = generate(missing) if missing else (), time.perf_counter()
        for position, text in answers:
            now = time.perf_counter()
            known[keys[missing[position]]] = row = {"text": text, "seconds": round(now - start, 4)}
            start = now
            _append(path, json.dumps({"key": keys[missing[position]], **row}))
            bar.update()
    return [known[key]["text"] for key in keys]


def seconds(path: Path, keys: list[str]) -> float | None:
    """Seconds that these answers took when they were generated; None when that of one of them is not known."""
    known = _known(path)
    taken = [known.get(key, {}).get("seconds") for key in dict.fromkeys(keys)]
    return None if None in taken else sum(taken)


def _known(path: Path) -> dict[str, dict]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    known = {}
    for line in lines:
        try:
            row = json.loads(line)
            known[row["key"]] = {"text": row["text"], "seconds": row.get("seconds")}
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError):  # cut off: asked again
            continue
    return known


def _append(path: Path, line: str) -> None:
    """One write; a line that a killed run left open is closed first."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())
