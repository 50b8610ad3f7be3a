"""What a source of real tools gives: its services, their tools, and tasks with the calls that solve them.

A tool is in the lab's form (`name`, `description`, `parameters` as JSON Schema). Documentation is long and schemas are
deep, and a small model reads both at every question: `brief` keeps a description's first sentence, `slim` the
parameters that are required, that a task uses, and a few more.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

LONGEST_DESCRIPTION = 160  # characters of a tool's or parameter's

LONGEST_VALUE = 48  # characters of a text that a request has to repeat

MOST_LEAVES = 6  # values that a call passes, nested ones included

OPTIONAL = 3  # parameters that a tool shows beside those that are required or used

TITLE_WORDS = 3  # fewer say nothing of what is wanted


@dataclass(frozen=True)
class Step:
    """One call, by the tool's name, and, where the source says it, what it returned."""

    tool: str
    arguments: dict
    result: object = None


@dataclass(frozen=True)
class Task:
    """What is wanted, in the source's words, and the calls that do it; `says_all`: the title states every value."""

    service: str
    title: str
    steps: tuple[Step, ...]
    says_all: bool = False


@dataclass(frozen=True)
class Catalogue:
    """Tools by service and by name, and tasks."""

    tools: dict[str, dict[str, dict]]
    tasks: tuple[Task, ...] = field(default_factory=tuple)

    def within(self, services: Iterable[str]) -> Catalogue:
        """The part of these services."""
        kept = {name: self.tools[name] for name in services if name in self.tools}
        return replace(self, tools=kept, tasks=tuple(task for task in self.tasks if task.service in kept))


def brief(text: str) -> str:
    """The first sentence of a documentation without markup, cut at a word where it is too long."""
    text = re.sub(r"<(note|important|caution)>.*?</\1>", " ", text or "", flags=re.DOTALL)
    plain = html.unescape(re.sub(r"<[^>]*>|``?|\*\*?|\[([^\]]*)\]\([^)]*\)", lambda m: m.group(1) or " ", text))
    plain = " ".join(plain.split())
    sentence = re.split(r"(?<=[a-z\d)\"'])[.:;] +(?=[A-Z])", plain)[0].strip(" .:")
    if len(sentence) > LONGEST_DESCRIPTION:
        sentence = sentence[:LONGEST_DESCRIPTION].rpartition(" ")[0].rstrip(" ,;(")
    return f"{sentence}." if sentence else ""


def leaves(value: object) -> Iterator[object]:
    """Every scalar in a value."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def sayable(arguments: dict) -> bool:
    """Whether a person could say these arguments: few, short, printable, at least one, and no object in an object."""
    found = list(leaves(arguments))
    if _hollow(arguments):
        return False
    if not 1 <= len(found) <= MOST_LEAVES or _depth(arguments) > 3:
        return False
    texts = [value for value in found if isinstance(value, str)]
    return all(0 < len(t) <= LONGEST_VALUE and t.isprintable() and t.isascii() for t in texts) and None not in found


def _hollow(value: object) -> bool:
    """Whether a list or an object in it holds nothing."""
    inner = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and (not value or any(map(_hollow, inner)))


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0


def slim(tool: dict, used: Iterable[str] = (), *, optional: int = OPTIONAL) -> dict:
    """The tool with its required and used parameters and the first `optional` others, in the order of the source."""
    schema = tool["parameters"]
    kept = {*schema.get("required", ()), *used}
    others = [name for name in schema["properties"] if name not in kept][:optional]
    properties = {name: value for name, value in schema["properties"].items() if name in kept or name in others}
    return {**tool, "parameters": {**schema, "properties": properties}}


def tool_of(name: str, description: str, properties: dict[str, dict], required: Iterable[str]) -> dict:
    """A tool in the lab's form."""
    listed = [wanted for wanted in required if wanted in properties]
    schema = {"type": "object", "properties": properties, "required": listed}
    return {"name": name, "description": brief(description), "parameters": schema}


def snake_case(name: str) -> str:
    """`DescribeDBInstances` as `describe_db_instances`, `vm image list` as `vm_image_list`."""
    split = re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"\W+", "_", split).strip("_").lower()
