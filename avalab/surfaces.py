"""How people say a value: numbers as digits, words, millions or `a week`, money, dates, lists, records.

What it does not do: choose values (`argument_kinds`) or sentences (`phrasing`).
"""

from __future__ import annotations

import calendar
import json
import random
import re

from avalab import argument_kinds, packaged_text
from avalab.argument_kinds import MILLION

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SCALES = {"billion": 1000 * MILLION, "million": MILLION, "thousand": 1000}
MONTHS = tuple(calendar.month_name[1:])


def shown(value: object, rng: random.Random, kind: str = "") -> str:
    """One way to say a value; lists are joined, records are said by their sentence or as `key value` pairs."""
    if isinstance(value, list):
        return _table(value, rng) if isinstance(value[0], list) else _listed(value, rng, kind[1:-1])
    return _told(value, rng, kind) if isinstance(value, dict) else rng.choice(surfaces(value, kind))


def _listed(values: list, rng: random.Random, kind: str) -> str:
    parts = [shown(item, rng, kind) for item in values]
    if not isinstance(values[0], str | dict) and rng.random() < 0.4:
        return f"[{', '.join(map(_digits, values))}]"
    last = rng.choice((" and ", " and ", ", and ", ", "))
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


def _table(rows: list[list], rng: random.Random) -> str:
    """Rows of numbers: `[[1, 2], [3, 4]]`, `[1, 2] and [3, 4]` or `(1, 2), (3, 4)`."""
    said = [", ".join(map(_digits, row)) for row in rows]
    bare = ", ".join(f"[{row}]" for row in said)
    return rng.choice((f"[{bare}]", f"[{bare}]", " and ".join(f"[{row}]" for row in said), f"({'), ('.join(said)})"))


def _told(record: dict, rng: random.Random, kind: str) -> str:
    fields, sentences = argument_kinds.records().get(kind, ((), ()))
    kinds = {field.name: field.kind for field in fields}
    parts = {key: shown(item, rng, kinds.get(key, "")) for key, item in record.items()}
    if sentences:
        return rng.choice(sentences).format(**parts)
    return "(" + ", ".join(f"{key.replace('_', ' ')} {part}" for key, part in parts.items()) + ")"


def _digits(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.10g}"


def surfaces(value: object, kind: str = "") -> list[str]:
    """The ways in which a scalar may be said; the likely ones several times."""
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if kind.startswith("#"):
        return packaged_text.pools()[kind][json.dumps(value)]
    if kind.startswith("$"):
        return _amounts(value)
    if isinstance(value, int):
        words = [WORDS[value]] if 1 <= value <= 12 else _in_words(value) * (2 if abs(value) >= MILLION else 1)
        return [str(value), str(value), *words, *([f"{value:,}"] if abs(value) >= 10_000 else [])]
    if isinstance(value, float):
        return _per_cent(value) if kind.startswith("%") else [f"{value:.10g}"]
    if re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        year, month, day = map(int, value.split("-"))
        return [value, f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}"]
    if re.fullmatch(r"\d\d:\d\d", value):
        hour, minute = map(int, value.split(":"))
        return [value, f"{(hour - 1) % 12 + 1}{f':{minute:02}' if minute else ''} {'am' if hour < 12 else 'pm'}"]
    if value in packaged_text.said_forms():
        return packaged_text.said_forms()[value]
    return [value.replace("_", " ")] if re.fullmatch(r"[a-z]+(_[a-z]+)+", value) else [value]


def _per_cent(share: float) -> list[str]:
    said = f"{round(share * 100, 4):g}"
    return [f"{said}%", f"{said}%", f"{said}%", f"{said} percent", f"{said} per cent"]


def _in_words(value: int) -> list[str]:
    """`40 thousand`, `3.4 million`, `-2 billion`: amounts from ten thousand that have at most two decimals so."""
    for word, scale in SCALES.items():
        if abs(value) >= scale and scale >= MILLION:
            return [f"{value / scale:.10g} {word}"] if value % (scale // 100) == 0 else []
    return [f"{value // 1000} thousand"] if abs(value) >= 10_000 and value % 1000 == 0 else []


def _amounts(value: float) -> list[str]:
    """The ways in which people write an amount of money: $45,000, 45000 dollars, $45k, $3.4 million."""
    if isinstance(value, float):
        return [f"${value:.2f}", f"{value:.2f} dollars", f"{value:.2f}"]
    words = [form for said in _in_words(value) for form in (f"{said} dollars", f"${said}")]
    short = [f"${value // 1000}k"] if value % 1000 == 0 and value < MILLION else []
    return [f"${value:,}", f"{value} dollars", str(value), *short, *(words if value >= MILLION else words[:1])]
