"""Tools and function-calling chats that exist without any download.

A row of the table `prompts/toolbox.txt` is a tool: `name | parameter=kind ... | request | description`; the kinds stand
in `prompts/toolbox_kinds.txt`. Dotted names are callables of the standard library: the description is the docstring's
first sentence, and the types, which the library does not annotate, stand in the table. The others are everyday domains,
written here. An optional parameter ends in `?`, the request names every required one. No tool bears the name of one of
the 1,909 functions of BFCL v4.

A chat: draw a tool of the split, draw its arguments by kind, phrase the request, put the tool among up to two others. A
hash of the name decides the split, so train and heldout never share a function. Docstrings, and so descriptions, differ
between Python versions; names and arguments do not.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from avalab.data.arguments import Parameter, kind_of, lines_of
from avalab.lab.errors import InputError

SPLITS = ("train", "heldout")

HELDOUT_ONE_IN = 5  # tools whose name's hash is divisible by this are never trained on

TOOL_PROMPT = (
    "You answer with function calls. These functions exist, described by JSON schema:\n<tools>",
    "</tools>\nChoose the function that does what the user asks and reply in this form only:\n"
    '<tool_call>[{"name": "function", "arguments": {"parameter": "value"}}]</tool_call>',
)

QUESTIONS = "What is {}?;Please work out {}.;I need {}.;Tell me {}.;Could you find {} for me?;Give me {}."

ORDERS = "Please {}.;Could you {}?;I want you to {}.;Can you {} for me?;{}, please.;Go ahead and {}."


@dataclass(frozen=True)
class Tool:
    """One function: what a schema says of it, and `sentences`, pairs of a frame's name and a template."""

    name: str
    domain: str
    description: str
    parameters: tuple[Parameter, ...]
    sentences: tuple[tuple[str, str], ...]

    @property
    def in_library(self) -> bool:
        """Whether the tool is a callable of the standard library, which keeps its own spelling."""
        return self.domain.startswith("library")


@cache
def rows() -> tuple[Tool, ...]:
    """The rows of the table, in its order."""
    kinds = {name: (kind, description) for name, description, kind in _table("toolbox_kinds.txt")}
    found = []
    for name, parameters, request, *description in _table("toolbox.txt"):
        pairs = [parameter.split("=") for parameter in parameters.split()]
        parsed = tuple(Parameter(p.rstrip("?"), *kinds[kind], optional=p.endswith("?")) for p, kind in pairs)
        domain, frame = ("library", "question") if "." in name else ("personal", "order")
        described = description[0] if description else docstring_of(name)
        found.append(Tool(name, domain, described, parsed, ((frame, request),)))
    return tuple(found)


def _table(name: str) -> list[list[str]]:
    return [line.split(" | ") for line in lines_of(name)]


def resolve(name: str) -> Callable:
    """The standard-library callable of a dotted tool name, e.g. `math.comb`."""
    module, function = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), function)


def docstring_of(name: str) -> str:
    """The first sentence of the docstring of a dotted tool name's callable."""
    paragraph = " ".join(inspect.getdoc(resolve(name)).split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph)[0]


def tools() -> list[dict]:
    """Every tool as a function description: name, description, parameters (JSON schema of an object)."""
    return [_describe(row) for row in rows()]


def split_of(name: str) -> str:
    """`train` or `heldout`, by a hash of the tool's name."""
    return SPLITS[int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELDOUT_ONE_IN == 0]


def system_prompt(tools: list[dict]) -> str:
    """The system message that lists these tools; data/tiny-llama's chat template renders the same text."""
    return json.dumps(tools, ensure_ascii=False).join(TOOL_PROMPT)


def call_text(calls: list[dict]) -> str:
    """The answer that makes these calls."""
    return f"<tool_call>{json.dumps(calls, ensure_ascii=False)}</tool_call>"


def function_calling_examples(count: int, seed: int, split: str = "train") -> Iterator[dict]:
    """`count` chats: `{"messages", "tools", "calls"}`, the same for a seed. Raises ValueError for another split."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    of_split = [row for row in rows() if split_of(row.name) == split]
    rng = random.Random(f"{split}-{seed}")
    return (_example(of_split, rng) for _ in range(count))


def _describe(row: Tool) -> dict:
    properties = {p.name: {**kind_of(p.kind).schema, "description": p.description} for p in row.parameters}
    required = [p.name for p in row.parameters if not p.optional]
    schema = {"type": "object", "properties": properties, "required": required}
    return {"name": row.name, "description": row.description, "parameters": schema}


def _example(of_split: list[Tool], rng: random.Random) -> dict:
    row = rng.choice(of_split)
    listed = rng.sample([other for other in of_split if other is not row], rng.choice((0, 0, 1, 1, 2)))
    listed.insert(rng.randint(0, len(listed)), row)
    chosen = [p for p in row.parameters if not p.optional or rng.random() < 0.5]
    arguments = {p.name: kind_of(p.kind).sample(rng) for p in chosen}
    described = [_describe(other) for other in listed]
    calls = [{"name": row.name, "arguments": arguments}]
    messages = [
        {"role": "system", "content": system_prompt(described)},
        {"role": "user", "content": _phrase(row, arguments, rng)},
        {"role": "assistant", "content": call_text(calls)},
    ]
    return {"messages": messages, "tools": described, "calls": calls}


def _phrase(row: Tool, arguments: dict, rng: random.Random) -> str:
    shown = {}
    for name, value in arguments.items():
        shown[name] = json.dumps(value) if isinstance(value, bool) else str(value)
        if isinstance(value, list):
            shown[name] = ", ".join(map(str, value[:-1])) + f" and {value[-1]}"
    optional = [p.name for p in row.parameters if p.optional and p.name in arguments]
    extra = "".join(f", with {name} {shown[name]}" for name in optional)
    frame = rng.choice((QUESTIONS if row.in_library else ORDERS).split(";"))
    ((_, request),) = row.sentences
    sentence = frame.format(request.format(**shown) + extra)
    return sentence[0].upper() + sentence[1:]
