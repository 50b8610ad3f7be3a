"""Tools and function-calling chats that exist without any download.

A row of the table `prompts/toolbox.txt` is a tool: `name | parameter=kind ... | request | description`. Dotted names are callables of the
standard library: the description is the docstring's first sentence, and the types, which the library does not annotate,
stand in the table. The others are everyday domains, written here. A kind is a JSON schema and a sampler, an optional
parameter ends in `?`, the request names every required argument. No tool bears the name of one of the 1,909 functions
of BFCL v4.

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

from avalab.lab.words import lines_of

SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 5  # tools whose name's hash is divisible by this are never trained on
TOOL_PROMPT = (
    "You answer with function calls. These functions exist, described by JSON schema:\n<tools>",
    "</tools>\nChoose the function that does what the user asks and reply in this form only:\n"
    '<tool_call>[{"name": "function", "arguments": {"parameter": "value"}}]</tool_call>',
)


@dataclass(frozen=True)
class Kind:
    """A sort of argument: what it looks like in a schema, and how one is drawn."""

    description: str
    schema: dict
    sample: Callable[[random.Random], object]


@dataclass(frozen=True)
class Row:
    """One tool of the table; `kinds` are those of its parameters by name, `optional` those that may be left out."""

    name: str
    kinds: dict[str, str]
    optional: frozenset[str]
    request: str
    description: str


def _drawn(json_type: str, description: str, draw: Callable[[random.Random], object]) -> Kind:
    return Kind(description, {"type": json_type}, draw)


def _integer(description: str, low: int, high: int) -> Kind:
    return _drawn("integer", description, lambda rng: rng.randint(low, high))


def _one_of(description: str, values: str, *, closed: bool = False) -> Kind:
    choices = values.split(";")
    listed = {"enum": choices} if closed else {}
    return Kind(description, {"type": "string", **listed}, lambda rng: rng.choice(choices))


def _array(description: str, item: Kind) -> Kind:
    schema = {"type": "array", "items": item.schema}
    return Kind(description, schema, lambda rng: [item.sample(rng) for _ in range(rng.randint(3, 6))])


_WHOLE = _integer("a whole number", 10, 60)  # never below what a small whole number can be
_REAL = _drawn("number", "a number", lambda rng: round(rng.uniform(0.5, 99), 1))
_WORD = _one_of(
    "a word", "apple;river;stone;window;garden;music;paper;silver;winter;bridge;copper;market;candle;forest"
)

KINDS: dict[str, Kind] = {
    "whole": _WHOLE,
    "few": _integer("a small whole number", 1, 9),
    "width": _integer("a number of characters", 20, 90),
    "year": _integer("a year", 1950, 2050),
    "month": _integer("a month, 1 to 12", 1, 12),
    "day": _integer("a day of the month", 1, 28),
    "degrees": _integer("a temperature in degrees Celsius", 5, 28),
    "real": _REAL,
    "amount": _drawn("number", "an amount of money", lambda rng: rng.randint(200, 90000) / 100),
    "truth": _drawn("boolean", "true or false", lambda rng: rng.random() < 0.5),
    "integers": _array("a list of whole numbers", _WHOLE),
    "reals": _array("a list of numbers", _REAL),
    "words": _array("a list of words", _WORD),
    "word": _WORD,
    "text": _one_of("a text", "the ship left at dawn;fish & chips cost <5;measure, then decide;doors close at nine"),
    "path": _one_of("a path", "/home/ada/notes.txt;/var/log/system.log;data/table.csv;src/main.py;docs/index.html"),
    "pattern": _one_of("a pattern", "*.txt;*.py;data*;*report*;no?e"),
    "address": _one_of("an address", "192.168.0.7;10.0.0.1;172.16.4.20;8.8.4.4;127.0.0.1"),
    "date": _drawn("string", "a date, YYYY-MM-DD", lambda rng: f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"),
    "time": _drawn("string", "a time, HH:MM", lambda rng: f"{rng.randint(6, 22):02}:{rng.randrange(0, 60, 5):02}"),
    "city": _one_of("a city", "Lisbon;Oslo;Vienna;Nairobi;Quito;Kyoto;Dublin;Prague;Lima;Hanoi"),
    "person": _one_of("a person", "Ada;Noor;Emil;Priya;Tomas;Mei;Sofia;Kwame"),
    "room": _one_of("a room", "kitchen;bedroom;office;hall;bathroom", closed=True),
    "song": _one_of("a piece of music", "Clair de Lune;Blue Train;The Four Seasons;Take Five"),
    "unit": _one_of("a unit", "metre;mile;yard;kilometre;foot", closed=True),
    "currency": _one_of("a currency", "EUR;USD;JPY;NOK;KES", closed=True),
    "language": _one_of("a language", "French;Swahili;Japanese;Polish;Spanish"),
    "level": _one_of("a level", "low;normal;high", closed=True),
}

QUESTIONS = "What is {}?;Please work out {}.;I need {}.;Tell me {}.;Could you find {} for me?;Give me {}."
ORDERS = "Please {}.;Could you {}?;I want you to {}.;Can you {} for me?;{}, please.;Go ahead and {}."


@cache
def rows() -> tuple[Row, ...]:
    """The rows of the table, in its order."""
    found = []
    for line in lines_of("toolbox.txt"):
        name, parameters, request, *description = line.split(" | ")
        pairs = [parameter.split("=") for parameter in parameters.split()]
        kinds = {parameter.rstrip("?"): kind for parameter, kind in pairs}
        optional = frozenset(parameter[:-1] for parameter, _ in pairs if parameter.endswith("?"))
        found.append(Row(name, kinds, optional, request, description[0] if description else docstring_of(name)))
    return tuple(found)


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
    """`count` chats: `{"messages", "tools", "calls"}`; messages are system, user and assistant.

    Equal arguments yield equal chats. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    of_split = [row for row in rows() if split_of(row.name) == split]
    rng = random.Random(f"{split}-{seed}")
    return (_example(of_split, rng) for _ in range(count))


def _describe(row: Row) -> dict:
    kinds = {parameter: KINDS[kind] for parameter, kind in row.kinds.items()}
    properties = {parameter: {**kind.schema, "description": kind.description} for parameter, kind in kinds.items()}
    required = [parameter for parameter in kinds if parameter not in row.optional]
    schema = {"type": "object", "properties": properties, "required": required}
    return {"name": row.name, "description": row.description, "parameters": schema}


def _example(of_split: list[Row], rng: random.Random) -> dict:
    row = rng.choice(of_split)
    listed = rng.sample([other for other in of_split if other is not row], rng.choice((0, 0, 1, 1, 2)))
    listed.insert(rng.randint(0, len(listed)), row)
    chosen = [p for p in row.kinds if p not in row.optional or rng.random() < 0.5]
    arguments = {parameter: KINDS[row.kinds[parameter]].sample(rng) for parameter in chosen}
    described = [_describe(other) for other in listed]
    calls = [{"name": row.name, "arguments": arguments}]
    messages = [
        {"role": "system", "content": system_prompt(described)},
        {"role": "user", "content": _phrase(row, arguments, rng)},
        {"role": "assistant", "content": call_text(calls)},
    ]
    return {"messages": messages, "tools": described, "calls": calls}


def _phrase(row: Row, arguments: dict, rng: random.Random) -> str:
    shown = {}
    for parameter, value in arguments.items():
        shown[parameter] = json.dumps(value) if isinstance(value, bool) else str(value)
        if isinstance(value, list):
            shown[parameter] = ", ".join(map(str, value[:-1])) + f" and {value[-1]}"
    extra = "".join(f", with {parameter} {shown[parameter]}" for parameter in arguments if parameter in row.optional)
    frame = rng.choice((QUESTIONS if "." in row.name else ORDERS).split(";"))
    sentence = frame.format(row.request.format(**shown) + extra)
    return sentence[0].upper() + sentence[1:]
