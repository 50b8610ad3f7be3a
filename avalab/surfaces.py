"""How people say a value: numbers as digits, words or millions, money, dates, times, lists, records.

What it does not do: choose values (`argument_kinds`) or sentences (`phrasing`).
"""

from __future__ import annotations

import calendar
import random
import re

from avalab import packaged_text
from avalab.argument_kinds import MILLION

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
MONTHS = tuple(calendar.month_name[1:])


def shown(value: object, rng: random.Random, kind: str = "") -> str:
    """One way to say a value; lists are joined, records become `key value` pairs."""
    if isinstance(value, list):
        parts = [shown(item, rng, kind[1:-1]) for item in value]
        if not isinstance(value[0], str | dict) and rng.random() < 0.4:
            return f"[{', '.join(f'{item:.10g}' for item in value)}]"
        last = rng.choice((" and ", " and ", ", and ", ", "))
        return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key.replace('_', ' ')} {shown(item, rng)}" for key, item in value.items()) + ")"
    return rng.choice(surfaces(value, kind))


def surfaces(value: object, kind: str = "") -> list[str]:
    """The ways in which a scalar may be said; the likely ones several times."""
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if kind.startswith("$"):
        return _amounts(value)
    if isinstance(value, int):
        words = [WORDS[value]] if 1 <= value <= 12 else []
        words += [f"{value / MILLION:g} million"] * 2 if value >= MILLION and value % (MILLION // 10) == 0 else []
        return [str(value), str(value), *words, *([f"{value:,}"] if value >= 10_000 else [])]
    if isinstance(value, float):
        return [f"{round(value * 100, 4):g}%"] if kind == "%" else [f"{value:.10g}"]
    if re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        year, month, day = map(int, value.split("-"))
        return [value, f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}"]
    if re.fullmatch(r"\d\d:\d\d", value):
        hour, minute = map(int, value.split(":"))
        return [value, f"{(hour - 1) % 12 + 1}{f':{minute:02}' if minute else ''} {'am' if hour < 12 else 'pm'}"]
    if value in packaged_text.said_forms():
        return packaged_text.said_forms()[value]
    return [value.replace("_", " ")] if re.fullmatch(r"[a-z]+(_[a-z]+)+", value) else [value]


def _amounts(value: float) -> list[str]:
    """The ways in which people write an amount of money: $45,000, 45000 dollars, $45k."""
    plain = f"{value:.2f}" if isinstance(value, float) else str(value)
    short = [f"${value // 1000}k"] if isinstance(value, int) and value % 1000 == 0 else []
    return [f"${value:,}" if isinstance(value, int) else f"${plain}", f"{plain} dollars", plain, *short]
