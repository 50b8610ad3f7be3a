"""Operations of Amazon's web services as botocore describes them: typed inputs, and examples with a title each.

A service is a JSON file of operations and shapes, its examples another: title, description and the input of a call. A
shape becomes JSON Schema, four levels deep; deeper ones are any object.
"""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from avalab.data.sources.catalogue import (
    TITLE_WORDS,
    Catalogue,
    Step,
    Task,
    brief,
    sayable,
    snake_case,
    tool_of,
)

DEEPEST = 4

SCALARS = {
    **dict.fromkeys(("integer", "long", "short", "bigdecimal"), "integer"),
    **dict.fromkeys(("float", "double"), "number"),
    **dict.fromkeys(("string", "timestamp", "blob", "character"), "string"),
    "boolean": "boolean",
}

MOST_VALUES = 12  # of an enumeration; a longer one is left open


def read(wheel: Path) -> Catalogue:
    """The services that have examples: their operations, and a task for each example that a person could say."""
    tools, tasks = {}, []
    with zipfile.ZipFile(wheel) as archive:
        for service, described, examples in _services(archive):
            shapes = described["shapes"]
            tools[service] = {}
            for name, operation in described["operations"].items():
                tool = _tool(name, operation, shapes)
                tools[service][tool["name"]] = tool
            for name, given in examples.items():
                shape = shapes.get(described["operations"].get(name, {}).get("input", {}).get("shape"), {})
                for example in given:
                    arguments, title = example.get("input") or {}, _title(example)
                    if title and sayable(arguments) and set(arguments) <= set(shape.get("members", ())):
                        tasks.append(Task(service, title, (Step(snake_case(name), arguments),)))
    return Catalogue(tools, tuple(tasks))


def _services(archive: zipfile.ZipFile) -> Iterator[tuple[str, dict, dict]]:
    """(service, description, examples by operation) of the newest version of each service with examples."""
    named = re.compile(r"botocore/data/([\w-]+)/(\d{4}-\d\d-\d\d)/(examples-1|service-2)\.json(\.gz)?")
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name in archive.namelist():
        if match := named.fullmatch(name):
            found.setdefault(match[1], {}).setdefault(match[2], {})[match[3]] = name
    for service, versions in sorted(found.items()):
        files = versions[max(versions)]
        if len(files) == 2:
            examples = _json(archive, files["examples-1"]).get("examples", {})
            if examples:
                yield service, _json(archive, files["service-2"]), examples


def _json(archive: zipfile.ZipFile, name: str) -> dict:
    content = archive.read(name)
    return json.loads(gzip.decompress(content) if name.endswith(".gz") else content)


def _tool(name: str, operation: dict, shapes: dict) -> dict:
    shape = shapes.get(operation.get("input", {}).get("shape"), {})
    members = shape.get("members", {})
    properties = {
        member: {**_schema(shapes, told["shape"], DEEPEST), "description": _said(told, shapes)}
        for member, told in members.items()
    }
    return tool_of(snake_case(name), operation.get("documentation", ""), properties, shape.get("required", ()))


def _said(told: dict, shapes: dict) -> str:
    return brief(told.get("documentation") or shapes[told["shape"]].get("documentation", ""))


def _schema(shapes: dict, name: str, deeper: int) -> dict:
    shape = shapes[name]
    kind = shape["type"]
    if kind in SCALARS:
        values = shape.get("enum", ())
        return {"type": SCALARS[kind]} | ({"enum": values} if 0 < len(values) <= MOST_VALUES else {})
    if not deeper:
        return {"type": "array" if kind == "list" else "object"}
    if kind == "list":
        return {"type": "array", "items": _schema(shapes, shape["member"]["shape"], deeper - 1)}
    if kind == "map":
        return {"type": "object", "additionalProperties": _schema(shapes, shape["value"]["shape"], deeper - 1)}
    members = {member: _schema(shapes, told["shape"], deeper - 1) for member, told in shape.get("members", {}).items()}
    return {"type": "object", "properties": members, "required": shape.get("required", [])}


def _title(example: dict) -> str:
    """What an example does: its title, or where that only names the operation, its description."""
    title, description = (" ".join((example.get(key) or "").split()) for key in ("title", "description"))
    if len(title.split()) <= TITLE_WORDS or title.endswith("example"):
        title = re.sub(r"^(This|The following) (example|operation|command|code)s? ", "", description)
    return brief(re.sub(r" -.*|\(.*", "", title)) if len(title.split()) >= TITLE_WORDS else ""
