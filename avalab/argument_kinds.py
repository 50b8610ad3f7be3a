"""Arguments by kind: the JSON schema that a kind's text stands for, and how a value of it is drawn.

A kind is an integer range `1..9`, a decimal range `0.5..9.5`, either with a `$` before it (money), an enumeration
`a|b`, an open choice `(a|b)` that the schema does not list, `bool`, `%` (a fraction said in per cent), `date`, `time`,
`code`, a pool of strings, `[kind]` (a list) or `&record` (an object whose fields stand in the pool files).

What it does not do: say values (`surfaces`), or know tools.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from functools import cache

from avalab import packaged_text, toolbox
from avalab.toolbox import Kind

MILLION = 1_000_000


@dataclass(frozen=True)
class Parameter:
    """One parameter of a tool; `kind` is the text of the data file, `default` is None where there is none."""

    name: str
    kind: str
    description: str
    optional: bool = False
    default: object = None


def parameter(line: str) -> Parameter:
    """A parameter from `name? kind=default Description.`"""
    name, kind, description = line.split(" ", 2)
    kind, _, default = kind.partition("=")
    return Parameter(name.rstrip("?"), kind, description, name.endswith("?"), _value(default) if default else None)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@cache
def _records() -> dict[str, tuple[Parameter, ...]]:
    rows = [row.split(" ", 1) for row in packaged_text.pool_lines() if row.startswith("&")]
    return {name: tuple(parameter(part.strip()) for part in fields.split(";")) for name, fields in rows}


@cache
def kind_of(text: str) -> Kind:
    """The schema and sampler that a kind's text stands for. Raises ValueError for an unknown one."""
    if text.startswith("toolbox:"):
        return toolbox.KINDS[text.removeprefix("toolbox:")]
    if text.startswith("["):
        item = kind_of(text[1:-1])
        schema = {"type": "array", "items": item.schema}
        return Kind("", schema, lambda rng: _distinct(item, rng))
    if text.startswith("&"):
        return _record_kind(_records()[text])
    if text in _SIMPLE:
        return _SIMPLE[text]
    if ".." in text:
        return _range(*text.removeprefix("$").split(".."))
    if "|" in text:
        choices, listed = text.strip("()").split("|"), not text.startswith("(")
        closed_set = {"enum": choices} if listed else {}
        return Kind("", {"type": "string", **closed_set}, lambda rng: rng.choice(choices))
    if text in packaged_text.pools():
        return Kind("", {"type": "string"}, lambda rng: rng.choice(list(packaged_text.pools()[text])))
    raise ValueError(f"unknown kind {text!r}; a range, an enumeration, {', '.join([*_SIMPLE, *packaged_text.pools()])}")


_SIMPLE = {
    "bool": Kind("", {"type": "boolean"}, lambda rng: rng.random() < 0.67),
    "%": Kind("", {"type": "number"}, lambda rng: rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 2.5)) / 100),
    "date": Kind(
        "", {"type": "string"}, lambda r: f"20{r.randint(24, 27)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}"
    ),
    "time": Kind("", {"type": "string"}, lambda r: f"{r.randint(6, 22):02}:{r.choice((0, 0, 15, 30, 45)):02}"),
    "code": Kind("", {"type": "string"}, lambda r: f"{r.choice('ABKMRX')}{r.choice('CDFLT')}-{r.randint(1000, 9999)}"),
}


def _range(low: str, high: str) -> Kind:
    if "." in low + high:
        places = len(high.partition(".")[2])
        return Kind("", {"type": "number"}, lambda rng: _decimal(float(low), float(high), places, rng))
    if int(high) >= MILLION:
        return Kind("", {"type": "integer"}, lambda rng: rng.randrange(int(low), int(high), MILLION // 10))
    if int(high) > 5000 and int(low) % 100 == 0:  # amounts that people would name
        return Kind("", {"type": "integer"}, lambda rng: rng.randrange(int(low), int(high), 100))
    return Kind("", {"type": "integer"}, lambda rng: rng.randint(int(low), int(high)))


def _decimal(low: float, high: float, places: int, rng: random.Random) -> float:
    """One in four is whole: said without a point, passed with one."""
    whole = rng.random() < 0.25 and math.ceil(low) <= math.floor(high)
    return float(rng.randint(math.ceil(low), math.floor(high))) if whole else round(rng.uniform(low, high), places)


def _distinct(item: Kind, rng: random.Random) -> list:
    if item.schema["type"] in ("integer", "number"):
        count = rng.randint(2, 9)
    else:  # most people name one or two of the values on offer, never all
        count = rng.choice((1, 1, 1, 2, 2, 3)) if "enum" in item.schema else rng.randint(1, 4)
    drawn = [item.sample(rng) for _ in range(count)]
    return [value for i, value in enumerate(drawn) if value not in drawn[:i]]


def _record_kind(fields: tuple[Parameter, ...]) -> Kind:
    properties = {p.name: {**kind_of(p.kind).schema, "description": p.description} for p in fields}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return Kind("", schema, lambda rng: {p.name: kind_of(p.kind).sample(rng) for p in fields})
