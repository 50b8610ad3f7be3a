"""A cache for what took long: tensors, JSON documents, and JSON lines that are appended as they arrive.

1. A file is named by everything that its content depends on: artefact, inputs and code (`cache_path`). Nothing is ever
   looked up by its time, and nothing has to be deleted when code or inputs change.
2. Tensors and documents are written under a temporary name and renamed. Lines are appended one by one, so that a killed
   run goes on where it was; each keeps the seconds it took, so that a speed is known when it is read back.
3. What is damaged or cut off counts as absent, and is computed again.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from avalab.lab.run import write_atomically

SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_path(folder: Path, kind: str, *parts: str, suffix: str = ".safetensors") -> Path:
    """The file `kind-part-part...` of a cache; a SHA-256 among the parts is cut to 16 digits."""
    return folder / f"{'-'.join((kind, *(part[:16] if SHA256.fullmatch(part) else part for part in parts)))}{suffix}"


def cached_tensors(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The tensors in a file, or those that `compute` returns, which the file then holds."""
    found = load_tensors(path)
    if found is None:
        found = compute()
        save_tensors(found, path)
    return found


def load_tensors(path: Path) -> dict[str, Any] | None:
    """The tensors in a safetensors file by name; None for a file that is absent or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def save_tensors(tensors: dict[str, Any], path: Path) -> None:
    """Write tensors as safetensors under a temporary name, then rename."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cached_document(path: Path, compute: Callable[[], dict], *, again: bool = False) -> dict:
    """The JSON object in a file, or the one that `compute` returns, which the file then holds (always with `again`)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if again or not isinstance(found, dict):
        found = compute()
        write_atomically(path, json.dumps(found, indent=1, sort_keys=True) + "\n")
    return found


def cached_lines(
    path: Path, keys: list[str], generate: Callable[[list[int]], Iterable[tuple[int, str]]], *, progress: str = ""
) -> list[str]:
    """The text of each key: from the file where it is known, else from `generate` and appended to the file.

    `generate` gets the indices of the missing keys and yields (position in that list, text), batch after batch. A line
    is `{"key": ..., "text": ..., "seconds": ...}`, the seconds since the text before; the first of a batch bears the
    time of all.
    """
    known = known_lines(path)
    missing = [i for i, key in enumerate(keys) if key not in known]
    path.parent.mkdir(parents=True, exist_ok=True)
    done = len(keys) - len(missing)
    with tqdm(total=len(keys), initial=done, desc=progress, disable=not progress, leave=False) as bar:
        texts, start = generate(missing) if missing else (), time.perf_counter()
        for position, text in texts:
            now = time.perf_counter()
            known[keys[missing[position]]] = row = {"text": text, "seconds": round(now - start, 4)}
            start = now
            with path.open("a+b") as file:
                line = json.dumps({"key": keys[missing[position]], **row})
                if file.tell():  # a line that a killed run left open is closed first
                    file.seek(-1, 2)
                    line = line if file.read(1) == b"\n" else f"\n{line}"
                file.write(f"{line}\n".encode())
            bar.update()
    return [known[key]["text"] for key in keys]


def known_lines(path: Path) -> dict[str, dict]:
    """What a file of lines holds: `text` and `seconds` (None where a line does not say) by key."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    known = {}
    for line in lines:
        try:
            row = json.loads(line)
            known[row["key"]] = {"text": row["text"], "seconds": row.get("seconds")}
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError):  # cut off
            continue
    return known


def seconds_of_lines(path: Path, keys: list[str]) -> float | None:
    """Seconds that these texts took when they were generated; None when that of one of them is not known."""
    known = known_lines(path)
    taken = [known.get(key, {}).get("seconds") for key in dict.fromkeys(keys)]
    return None if None in taken else sum(taken)
