"""The matrix: every family through every verb, kept cell by cell, and written as a table (`make families`).

1. A family's model is made in a folder of its own, and the verbs of `family_cells.VERBS` run on it one after the other,
   in a process that imports the libraries once.
2. A cell works; is refused, by an error of the lab's own, whose line is kept; is `not here`, for a library that is not
   installed; or is a defect: any other exception, a wrong result, a crash, a cell that takes too long. After a defect
   the remaining verbs run in a new process.
3. A row whose base artefact has another row's weights, byte for byte, takes over its cells of the slowest verbs.
4. A cell is run again when the code that it reaches, its row, or a library's version has changed. What was not here is
   always tried again.
5. `results/families` holds one file of cells a family, and the README with the table and every line that a cell said.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path

from avalab.cli.family_cells import SLOW, VERBS, Subject, Verb
from avalab.lab import artifacts, process
from avalab.lab.code import code_of
from avalab.lab.errors import InputError, LabError, ProcessFailed, Unavailable
from avalab.lab.run import ROOT, write_atomically
from avalab.measure.families import FAMILIES, make_model

FOLDER = ROOT / "results" / "families"

WORKS, REFUSED, NOT_HERE, DEFECT = OUTCOMES = ("works", "refused", "not here", "defect")

TABLE = "avalab.cli.family_cells:VERBS"

LIBRARIES = (
    *("torch", "transformers", "peft", "bitsandbytes", "torchao", "llmcompressor", "auto-round", "nncf"),
    *("openvino", "openvino-genai", "onnx", "onnxruntime", "onnxruntime-genai", "gguf"),
)

GROUPS = {
    "use": "Load, evaluate, chat, train",
    "export": "Export, and the engine that reads it",
    "quantize": "Quantize",
    "prune": "Prune",
}

Cells = dict[str, dict]  # verb -> outcome, line, seconds, code


# --- running ---------------------------------------------------------------------------------------------------------


def outcome(verb: Verb, subject: Subject) -> dict:
    """What a verb does to a family: outcome, line and seconds. Nothing that it raises comes through, nor its output."""
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found, line = WORKS, verb.run(subject)
    except Unavailable as error:
        found, line = NOT_HERE, str(error)
    except ProcessFailed as error:  # something ended badly that was not foreseen
        found, line = DEFECT, f"{type(error).__name__}: {error}"
    except LabError as error:
        found, line = REFUSED, str(error)
    except Exception as error:  # what nobody foresaw is what is looked for
        found, line = DEFECT, f"{type(error).__name__}: {error}"
    return {"outcome": found, "line": _clean(line, subject), "seconds": round(time.perf_counter() - start, 1)}


def _clean(line: str, subject: Subject) -> str:
    """One line of moderate length without this machine's paths."""
    for path in (subject.scratch, subject.scratch.resolve(), ROOT, Path(sys.prefix)):
        line = line.replace(f"{path}/", "")
    words = " ".join(line.split())
    return words if len(words) <= 400 else words[:400] + " ..."


def run_cells(request: dict) -> dict:
    """In a child process: run the verbs in turn until one has a defect; a line is written as each begins and ends."""
    scratch = Path(request["scratch"])
    os.environ["AVALAB_ARTIFACTS"] = str(scratch / "artifacts")
    folder = Path(request["model"])
    subject = Subject(request["family"], folder, scratch)
    module, _, table = request["table"].partition(":")
    verbs = getattr(importlib.import_module(module), table)
    with Path(request["told"]).open("a", encoding="utf-8", buffering=1) as told:
        for name in request["verbs"]:
            # Libraries collect garbage in every step; what they brought along themselves need not be looked through.
            gc.collect()
            gc.freeze()
            print(json.dumps({"begun": name, "at": time.time()}), file=told)
            faulthandler.dump_traceback_later(verbs[name].limit_seconds, exit=True)
            found = outcome(verbs[name], subject)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps({"verb": name, **found}), file=told)
            if found["outcome"] == DEFECT:
                break
    return {}


def run_family(name: str, verbs: Sequence[str], keep: Callable[[str, dict], object], *, table: str = TABLE) -> None:
    """Run verbs of a table on a family; `keep(verb, cell)` is called for each as it ends.

    The table is named, `module:name`, since it is looked up in another process.
    """
    waiting = list(verbs)
    module, _, variable = table.partition(":")
    limits = {verb: row.limit_seconds for verb, row in getattr(importlib.import_module(module), variable).items()}
    with tempfile.TemporaryDirectory(prefix="avalab-families-") as scratch, ThreadPoolExecutor(1) as beside:
        model, told = make_model(name, Path(scratch) / "model"), Path(scratch) / "told.jsonl"
        request = {"family": name, "scratch": scratch, "model": str(model), "told": str(told), "table": table}
        while waiting:
            told.write_text("", encoding="utf-8")
            limit = sum(limits[verb] for verb in waiting) + 60
            child = beside.submit(_child, request | {"verbs": waiting}, limit)
            for verb, cell in _cells(told, child, limits):
                keep(verb, cell)
                waiting.remove(verb)


def _child(request: dict, limit_seconds: float) -> ProcessFailed | None:
    """Run the cells in a process of its own; how it failed, if it did."""
    try:
        target = "avalab.cli.families:run_cells"
        process.call(target, request, limit_seconds=limit_seconds, label=request["family"])
    except ProcessFailed as error:
        return error
    return None


def _cells(told: Path, child: Future[ProcessFailed | None], limits: Mapping[str, int]) -> Iterator[tuple[str, dict]]:
    """The cells that a child tells of, as it does; the one that it dies in is a defect.

    Raises ProcessFailed for a child that never began one.
    """
    begun, read = None, 0
    while True:
        ended = child.done()  # before what it told is read
        lines = told.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()  # a last one may be half written
        for line in map(json.loads, lines[read:]):
            begun = line if "begun" in line else None
            if not begun:
                yield line.pop("verb"), line
        read = len(lines)
        if ended:
            break
        time.sleep(0.1)
    death = child.result()
    if not lines:
        raise ProcessFailed(f"no cell was begun: {death}")
    if begun:
        verb, seconds = begun["begun"], time.time() - begun["at"]
        late = seconds >= limits[verb] and not isinstance(death, process.Killed)
        line = f"took longer than {limits[verb]} s" if late else str(death)
        yield verb, {"outcome": DEFECT, "line": line, "seconds": round(seconds, 1)}


def code_key(name: str, verb: str) -> str:
    """What a cell's result depends on, as a hash: the code it reaches, its row and command, the libraries' versions."""
    row = VERBS[verb]
    code = code_of(row.run, *row.code, "avalab.measure.families:_write_base", "avalab.measure.families:_write_adapter")
    parts = [code, repr(FAMILIES[name]), repr(getattr(row.run, "keywords", "")), repr(versions())]
    return artifacts.sha256_of_text("\n".join(parts))[:12]


def versions() -> dict[str, str]:
    """The libraries that are here."""
    found = {}
    for library in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def chosen(only: str) -> tuple[list[str], list[str]]:
    """Families and verbs that globs with commas name; all of those of which nothing is named.

    Raises ValueError for a glob that fits neither.
    """
    families, verbs = [], []
    for glob in filter(None, (part.strip() for part in only.split(","))):
        fitting = [name for name in FAMILIES if fnmatchcase(name, glob)]
        named = [name for name in VERBS if fnmatchcase(name, glob) or fnmatchcase(name.replace(", ", " "), glob)]
        if not fitting and not named:
            raise InputError(f"{glob!r} fits no family ({', '.join(FAMILIES)}) and no verb ({'; '.join(VERBS)})")
        families += fitting
        verbs += named
    return [n for n in FAMILIES if n in families] or list(FAMILIES), [v for v in VERBS if v in verbs] or list(VERBS)


def read_cells(folder: Path) -> dict[str, Cells]:
    """The kept cells of every family that has some."""
    files = {name: folder / f"{name}.json" for name in FAMILIES}
    return {name: json.loads(file.read_text())["cells"] for name, file in files.items() if file.is_file()}


def run_matrix(
    families: Iterable[str], verbs: Sequence[str], folder: Path = FOLDER, *, say: Callable[[str], object] = print
) -> None:
    """Run every cell that is missing, stale or `not here`, and keep each in `folder` as it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = dict.fromkeys(verbs, "")
    for name in families:
        cells = read_cells(folder).get(name, {})
        keys = {verb: code_key(name, verb) for verb in verbs}
        wanted = [verb for verb in verbs if _is_stale(cells.get(verb), keys[verb])]
        say(f"{name}: {len(wanted)} of {len(verbs)} cells to run")

        def keep(verb: str, cell: dict, *, name: str = name, cells: Cells = cells, keys: dict = keys) -> None:
            cells[verb] = cell | {"code": keys[verb]}
            ordered = {each: cells[each] for each in VERBS if each in cells}
            rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in ordered.items())
            head = f'{{\n "family": {json.dumps(name)},\n "versions": {json.dumps(versions())},\n "cells": {{\n'
            write_atomically(folder / f"{name}.json", head + rows + "\n }\n}\n")
            say(f"{name:24} {verb:28} {cell['seconds']:6.1f} s  {cell['outcome']}: {cell['line'][:160]}")

        other = FAMILIES[name].same_weights_as
        for verb in [verb for verb in wanted if other and verb in SLOW]:
            cell = read_cells(folder).get(other, {}).get(verb)
            if not _is_stale(cell, code_key(other, verb)):
                keep(verb, cell | {"line": f"{cell['line']}; taken over from {other}, whose weights are the same"})
                wanted.remove(verb)
        run_family(name, wanted, keep)


def _is_stale(cell: dict | None, key: str) -> bool:
    return cell is None or cell["code"] != key or cell["outcome"] == NOT_HERE


# --- the table -------------------------------------------------------------------------------------------------------


def counts(cells: Mapping[str, Cells], verbs: Iterable[str]) -> Counter:
    """How many cells of these verbs have which outcome."""
    return Counter(row[verb]["outcome"] for row in cells.values() for verb in verbs if verb in row)


def table(cells: Mapping[str, Cells], libraries: Mapping[str, str]) -> str:
    """The README of the matrix: counts, a table a group with families as rows, and the lines that cells said."""
    notes: dict[tuple[str, str], int] = {}
    lines = [
        "# Families and verbs",
        "",
        "Tiny random models of every family (`avalab/measure/families.py`) through the commands of `avalab`, run by",
        "`make families`. *works*: logits and greedy tokens are those of plain transformers, as far as the form's bits",
        "allow (`avalab/cli/family_cells.py` says how far); a number leads to a remark. *refused*: one line, which the",
        "note quotes. *not here*: a library that was not installed. *defect*: anything else.",
        "",
        "With " + ", ".join(f"{name} {version}" for name, version in libraries.items()) + ".",
        "",
        "| | " + " | ".join(OUTCOMES) + " |",
        "| --- | " + " | ".join("---:" for _ in OUTCOMES) + " |",
    ]
    for group, title in GROUPS.items():
        found = counts(cells, _of(group))
        lines.append(f"| {title} | " + " | ".join(str(found[each]) for each in OUTCOMES) + " |")
    for group, title in GROUPS.items():
        lines += ["", f"## {title}", "", *_group(cells, group, notes)]
    lines += ["", "## Notes", ""]
    lines += [f"{number}. {outcome}: {_escaped(line)}" for (outcome, line), number in notes.items()]
    return "\n".join(lines) + "\n"


def _of(group: str) -> list[str]:
    return [name for name, verb in VERBS.items() if verb.group == group]


def _group(cells: Mapping[str, Cells], group: str, notes: dict[tuple[str, str], int]) -> list[str]:
    """The table of a group of verbs; notes get their numbers in the order of reading."""
    verbs = _of(group)
    lines = [
        "| family | " + " | ".join(verb.removeprefix(f"{group} ") for verb in verbs) + " |",
        "| --- |" + " --- |" * len(verbs),
    ]
    for name, row in cells.items():
        shown = []
        for verb in verbs:
            cell = row.get(verb, {"outcome": "", "line": ""})
            word = f"**{DEFECT}**" if cell["outcome"] == DEFECT else cell["outcome"]
            said = cell["line"].partition("; ")[2] if cell["outcome"] in (WORKS, "") else cell["line"]
            number = notes.setdefault((cell["outcome"], said), len(notes) + 1) if said else ""
            shown.append(f"{word} {number}".strip())
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def _escaped(line: str) -> str:
    """Markdown shows the line as it stands: an underscore or a star is not the beginning of emphasis."""
    return "".join(f"\\{sign}" if sign in "\\`*_<>[]|" else sign for sign in line)


def write_table(folder: Path = FOLDER) -> dict[str, Cells]:
    """Write the README of a folder of cells, and return them."""
    cells = read_cells(folder)
    write_atomically(folder / "README.md", table(cells, versions()))
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is stale, write the table, and end with exit code 1 if a cell has a defect."""
    parser = argparse.ArgumentParser(prog="python -m avalab.cli.families", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="globs of families and verbs, with commas: 'qwen*,gguf*'")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time, each on one core")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where cells and table are kept")
    given = parser.parse_args(arguments)
    try:
        families, verbs = chosen(given.only)
        for later in (False, True):  # whoever takes cells over comes after those that have them
            part = [name for name in families if bool(FAMILIES[name].same_weights_as) == later]
            if given.jobs > 1:
                _beside(part, verbs, given)
            else:
                run_matrix(part, verbs, given.folder, say=lambda line: print(line, flush=True))
    except LabError as error:
        sys.exit(f"families: {error}")
    found = counts(write_table(given.folder), VERBS)
    print(f"{given.folder / 'README.md'}: " + ", ".join(f"{found[each]} {each}" for each in OUTCOMES))
    sys.exit(1 if found[DEFECT] else 0)


def _beside(families: list[str], verbs: list[str], given: argparse.Namespace) -> None:
    """Several processes of this program, each with a share of the families."""
    shares = [families[number :: given.jobs] for number in range(given.jobs)]
    command = [sys.executable, "-m", "avalab.cli.families", "--folder", str(given.folder), "--only"]
    running = [subprocess.Popen([*command, ",".join([*share, *_globs(verbs)])]) for share in shares if share]
    for each in running:
        each.wait()


def _globs(verbs: list[str]) -> list[str]:
    return [] if verbs == list(VERBS) else [verb.replace(", ", " ") for verb in verbs]


if __name__ == "__main__":
    main()
