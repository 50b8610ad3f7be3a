"""Examples on disk: one JSONL file a kind, a data card beside them, and the way back.

A line is `kind`, `tools`, `messages` (a request and an answer), `calls` and `source`. The system message follows from
tools and kind: it is left out of the file and rebuilt by `load`, which halves the bytes.

What it does not do: make or judge examples (that is `synthesize` and `gates`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from avalab import drafts, gates, toolbox
from avalab.artifacts import sha256_of
from avalab.experiment import write_atomically

FIELDS = ("kind", "tools", "messages", "calls")
JSON_PROMPT = "Reply with one JSON object, and nothing else, that satisfies this JSON schema:\n"
CARD = """# Synthetic function-calling examples

Made by `avalab.synthesize`, without a model unless a teacher is named: tools from the standard library's callables and
hand-designed everyday domains (`avalab/domains`), arguments drawn by type, requests phrased by templates, and every
example checked by the gates of `avalab.gates`. Names, addresses and figures are invented.

A line is `kind`, `tools`, `messages` (user, assistant), `calls`, `source`; `avalab.synthesize.load` adds the system
message. Licence: that of this project. Limits: English only; template wording is more regular than people's; a grounded
value is said in the request, but not proven to belong to its parameter."""


def with_system(example: dict) -> dict:
    """The example with its system message, which follows from its tools and kind; unchanged when it has one."""
    messages = example["messages"]
    if messages[0]["role"] == "system" or not example["tools"]:
        return example
    content = toolbox.system_prompt(example["tools"])
    if example["kind"] == "structured_output":
        content = JSON_PROMPT + json.dumps(gates.checked_schema(example["tools"][0]), ensure_ascii=False)
    return {**example, "messages": [{"role": "system", "content": content}, *messages]}


def store(path: Path | str, examples: list[dict]) -> dict[str, dict]:
    """Write `<kind>.jsonl` files into the folder `path`; returns name -> sha256, bytes, examples of each.

    Files of kinds that are not among the examples are of an older set: they are removed at the end.
    """
    folder, files = Path(path), {}
    for kind in sorted({example["kind"] for example in examples}):
        rows = [without_system(example) for example in examples if example["kind"] == kind]
        file = folder / f"{kind}.jsonl"
        write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        files[file.name] = {"sha256": sha256_of(file), "bytes": file.stat().st_size, "examples": len(rows)}
    for kind in drafts.KINDS:
        if f"{kind}.jsonl" not in files:
            (folder / f"{kind}.jsonl").unlink(missing_ok=True)
    return files


def without_system(example: dict) -> dict:
    """The example as a line of a file holds it."""
    return {**example, "messages": [m for m in example["messages"] if m["role"] != "system"]}


def load(path: Path | str) -> list[dict]:
    """The examples of a JSONL file, or of every one in a folder (by name), with their system messages.

    Raises ValueError naming file and line for a line that is not JSON, misses a field or holds an invalid schema;
    FileNotFoundError where there is no such file.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} holds no .jsonl file")
    return [example for file in files for example in _read(file)]


def _read(file: Path) -> Iterator[dict]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold other line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:
            return
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not JSON ({error})") from error
        if complaint := _malformed(example):
            raise ValueError(f"{file}:{number}: {complaint}")
        yield with_system(example)


def _malformed(example: object) -> str:
    """What a line of a data set lacks, or ""."""
    if missing := [field for field in FIELDS if not isinstance(example, dict) or field not in example]:
        return f"no field {', '.join(missing)}"
    parts = {"tools": ("name", "parameters"), "messages": ("role", "content"), "calls": ("name", "arguments")}
    for field, wanted in parts.items():
        if not isinstance(example[field], list) or (field == "messages" and len(example[field]) < 2):
            return f"no field {field} that is a list" + (" of a request and an answer" if field == "messages" else "")
        for item in example[field]:
            if lacks := [name for name in wanted if not isinstance(item, dict) or name not in item]:
                return f"no field {', '.join(lacks)} in an item of {field}"
    try:
        for tool in example["tools"]:
            gates.checked_schema(tool)
    except ValueError as error:
        return str(error)
    return ""


def card(report: dict) -> str:
    """The data card in Markdown, of the report of `synthesize.write`."""
    rows = [f"| `{name}` | {f['examples']} | {f['bytes']} | `{f['sha256']}` |" for name, f in report["files"].items()]
    gate_rows = [f"| {name} | {number} |" for name, number in report["counts"].items()]
    spread = [
        f"| {name.replace('_', ' ')} | {value} |" for name, value in report["diversity"].items() if name != "kinds"
    ]
    arguments = f"count={report['count']}, seed={report['seed']}"
    arguments += f", kinds={tuple(report['kinds'])}" if report["kinds"] else ""
    return "\n".join(
        [
            *CARD.splitlines(),
            "",
            f"Made again with `synthesize.write(folder, {arguments})` on Python {report['python']}; teacher: "
            f"{report['teacher']}.",
            "",
            *["| file | examples | bytes | sha256 |", "|---|---|---|---|", *rows, ""],
            *["| gate | examples |", "|---|---|", *gate_rows, ""],
            *["| diversity | |", "|---|---|", *spread, ""],
            *_compared(report["evaluation"]),
        ]
    )


def _compared(evaluation: dict[str, str]) -> list[str]:
    if not evaluation:
        return ["These examples were compared with no evaluation set.", ""]
    rows = [f"| {name} | `{digest}` |" for name, digest in evaluation.items()]
    claim = "No function name and no run of eight words is in these evaluation sets (SHA-256 of what was compared)."
    return [claim, "", "| evaluation set | sha256 |", "|---|---|", *rows, ""]
