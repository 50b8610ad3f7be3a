"""Arguments by kind: the JSON schema that a kind's text stands for, how a value is drawn, and how people say it.

A kind is an integer range `1..9`, a decimal range `0.5..9.5`, either with a `$` before it (money), an enumeration
`a|b`, an open choice `(a|b)` that the schema does not list, a name such as `date` (`NAMED`), `%` or `%5..60` (a
fraction said in per cent), a pool of strings, `#pool` (numbers that are said in words), `[kind]` (a list),
`[first,kind]` (a list that begins otherwise, such as cash flows), `[[kind]]` (rows of equal length), `{kind}` (a list
in which values may repeat) or `&record` (an object whose fields stand in the pool files, with the sentences that say it
behind a `~`).

It also reads the text files that come with the package: prompts, frames and the pools of values.

A line of a pool file is `name=value; value => said one / said two`: what stands behind an arrow is how people say the
value before it. Where the pool's name begins with `#`, its values are numbers: `7 => a week / seven days`. Lines that
begin with `&` are records.
"""

from __future__ import annotations

import calendar
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from avalab.lab.errors import InputError

MILLION = 1_000_000

PER_CENT = (*range(1, 13), 5, 10, 15, 18, 20, 25, 30, 40, 50, 60, 75, 80, 90, 95, 99)  # those that are said as such

PER_CENT += (0.5, 1.5, 2.5, 3.2, 3.75, 4.5, 6.5, 7.25, 9.8, 12.5, 22)

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

SCALES = {"billion": 1000 * MILLION, "million": MILLION, "thousand": 1000}

MONTHS = tuple(calendar.month_name[1:])


def read_packaged(folder: str, name: str) -> str:
    """A packaged data file's text. Raises FileNotFoundError."""
    return resources.files("avalab").joinpath("data", folder, name).read_text(encoding="utf-8")


def data_files(folder: str) -> list[str]:
    """The domain files of a packaged folder, sorted."""
    names = [entry.name for entry in resources.files("avalab").joinpath("data", folder).iterdir()]
    return sorted(n for n in names if n.endswith(".txt") and n != "README.txt" and not n.startswith("pools"))


@cache
def lines_of(name: str) -> tuple[str, ...]:
    """The lines of a prompt file without empty lines and comments."""
    return tuple(line for line in read_packaged("prompts", name).splitlines() if line and not line.startswith("#"))


@cache
def pool_lines() -> tuple[str, ...]:
    """The lines of all pool files."""
    names = sorted(entry.name for entry in resources.files("avalab").joinpath("data", "domains").iterdir())
    return tuple(
        line for name in names if name.startswith("pools") for line in read_packaged("domains", name).splitlines()
    )


@cache
def pools() -> dict[str, dict[str, list[str]]]:
    """Pool -> value -> the ways to say it: the value itself, or what stands behind its `=>`."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in pool_lines():
        name, marked, values = line.partition("=")
        if marked and re.fullmatch(r"#?\w+", name.strip()):
            pairs = [value.partition("=>") for value in values.split(";")]
            said = {value.strip(): [s.strip() for s in (forms or value).split(" / ")] for value, _, forms in pairs}
            found[name.strip()] = said
    return found


@cache
def said_forms() -> dict[str, list[str]]:
    """The values of all pools that are said in other words than they are passed."""
    named = [pool for name, pool in pools().items() if not name.startswith("#")]
    return {value: forms for pool in named for value, forms in pool.items() if forms != [value]}


@cache
def said_numbers() -> dict[float, list[str]]:
    """Number -> every way to say it in the pools of numbers, in small letters: 7 -> a week, seven days."""
    found: dict[float, list[str]] = {}
    for pool in (pool for name, pool in pools().items() if name.startswith("#")):
        for value, forms in pool.items():
            found.setdefault(float(value), []).extend(form.lower() for form in forms)
    return found


@dataclass(frozen=True)
class Kind:
    """A sort of argument: what it looks like in a schema, and how one is drawn."""

    schema: dict
    sample: Callable[[random.Random], object]


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
    kind, _, text = kind.partition("=")
    try:
        default = json.loads(text) if text else None
    except json.JSONDecodeError:
        default = text
    return Parameter(name.rstrip("?"), kind, description, name.endswith("?"), default)


@cache
def records() -> dict[str, tuple[tuple[Parameter, ...], tuple[str, ...]]]:
    """Record -> (its fields, the sentences that say it, such as `{field} over {value}`; perhaps none)."""
    found = {}
    for row in (row for row in pool_lines() if row.startswith("&")):
        name, rest = row.split(" ", 1)
        fields, *sentences = rest.split("~")
        parsed = tuple(parameter(part.strip()) for part in fields.split(";"))
        found[name] = (parsed, tuple(sentence.strip() for sentence in sentences))
    return found


# --- what a kind is, and how a value is drawn ------------------------------------------------------------------------


@cache
def kind_of(text: str) -> Kind:
    """The schema and sampler that a kind's text stands for. Raises ValueError for an unknown one."""
    if text.startswith("["):
        return _list_kind(text[1:-1])
    if text.startswith("{"):
        item = kind_of(text[1:-1])
        return _listed(item, lambda rng: [item.sample(rng) for _ in range(rng.randint(3, 6))])
    if text.startswith("&"):
        fields = records()[text][0]
        properties = {p.name: {**kind_of(p.kind).schema, "description": p.description} for p in fields}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        return Kind(schema, lambda rng: {p.name: kind_of(p.kind).sample(rng) for p in fields})
    if text.startswith("%"):
        low, _, high = (text[1:] or "0.5..30").partition("..")
        usual = [value for value in PER_CENT if float(low) <= value <= float(high)]
        return _typed("number", lambda rng: round(rng.choice(usual) / 100, 6))
    if text in NAMED:
        return NAMED[text]
    if ".." in text:
        return _range(*text.removeprefix("$").split(".."))
    if "|" in text:
        choices = text.strip("()").split("|")
        listed = {} if text.startswith("(") else {"enum": choices}
        return Kind({"type": "string", **listed}, lambda rng: rng.choice(choices))
    if text.startswith("#") and text in pools():
        values = [json.loads(value) for value in pools()[text]]
        whole = all(isinstance(value, int) for value in values)
        return _typed("integer" if whole else "number", lambda rng: rng.choice(values))
    if text in pools():
        return _typed("string", lambda rng: _pooled(text, rng))
    raise InputError(f"unknown kind {text!r}; a range, an enumeration, %, {', '.join([*NAMED, *pools()])}")


def _typed(json_type: str, sample: Callable[[random.Random], object]) -> Kind:
    return Kind({"type": json_type}, sample)


def _listed(item: Kind, sample: Callable[[random.Random], object]) -> Kind:
    return Kind({"type": "array", "items": item.schema}, sample)


NAMED = {
    "bool": _typed("boolean", lambda rng: rng.random() < 0.67),
    "date": _typed("string", lambda r: f"20{r.randint(24, 27)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}"),
    "time": _typed("string", lambda r: f"{r.randint(6, 22):02}:{r.choice((0, 0, 15, 30, 45)):02}"),
    "real": _typed("number", lambda r: round(r.uniform(0.5, 99), 1)),
    "amount": _typed("number", lambda r: r.randint(200, 90000) / 100),
    "truth": _typed("boolean", lambda r: r.random() < 0.5),
    "date of 2026": _typed("string", lambda r: f"2026-{r.randint(1, 12):02}-{r.randint(1, 28):02}"),
    "time by five": _typed("string", lambda r: f"{r.randint(6, 22):02}:{r.randrange(0, 60, 5):02}"),
    "code": _typed("string", lambda r: f"{r.choice('ABKMRX')}{r.choice('CDFLT')}-{r.randint(1000, 9999)}"),
}


def _list_kind(text: str) -> Kind:
    first, _, others = ("", "", text) if text.startswith("[") else text.rpartition(",")
    item = kind_of(others)

    def sample(rng: random.Random) -> list:
        if text.startswith("["):  # rows of equal length
            rows, columns, cell = rng.choice((2, 2, 3)), rng.choice((2, 2, 3, 4)), kind_of(text[1:-1])
            return [[cell.sample(rng) for _ in range(columns)] for _ in range(rows)]
        return [*([kind_of(first).sample(rng)] if first else []), *_distinct(item, rng)]

    return _listed(item, sample)


def _distinct(item: Kind, rng: random.Random) -> list:
    if item.schema["type"] in ("integer", "number"):
        count = rng.randint(2, 9)
    else:  # most people name one or two of the values on offer, never all
        count = rng.choice((1, 1, 1, 2, 2, 3)) if "enum" in item.schema else rng.randint(1, 4)
    drawn = [item.sample(rng) for _ in range(count)]
    seen = [next(iter(value.values())) if isinstance(value, dict) else value for value in drawn]
    return [value for i, value in enumerate(drawn) if seen[i] not in seen[:i]]  # a record is known by its first field


def _pooled(pool: str, rng: random.Random) -> str:
    """A value of a pool; `<other>` in it stands for a value of another pool, which makes many paths of few words."""
    value = rng.choice(list(pools()[pool]))
    return re.sub(r"<(\w+)>", lambda match: _pooled(match.group(1), rng), value)


def _range(low: str, high: str) -> Kind:
    if high.startswith("-"):  # both ends are below zero
        mirrored = _range(high[1:], low[1:])
        return Kind(mirrored.schema, lambda rng: -mirrored.sample(rng))
    if "." in low + high:
        places = len(high.partition(".")[2])
        return _typed("number", lambda rng: _decimal(float(low), float(high), places, rng))
    if int(high) >= MILLION:
        return _typed("integer", lambda rng: _round_amount(int(low), int(high), rng))
    if int(high) > 5000 and int(low) % 100 == 0:  # amounts that people would name
        return _typed("integer", lambda rng: rng.randrange(int(low), int(high), 100))
    return _typed("integer", lambda rng: rng.randint(int(low), int(high)))


def _round_amount(low: int, high: int, rng: random.Random) -> int:
    """A large amount of one to three digits and zeros, as people name them; every size is as likely as another."""
    value = math.exp(rng.uniform(math.log(low), math.log(high)))
    step = 10 ** max(4, math.floor(math.log10(value)) + 1 - rng.choice((1, 2, 2, 3)))
    return min(max(round(value / step) * step, low), high)


def _decimal(low: float, high: float, places: int, rng: random.Random) -> float:
    """One in four is whole: said without a point, passed with one."""
    whole = rng.random() < 0.25 and math.ceil(low) <= math.floor(high)
    return float(rng.randint(math.ceil(low), math.floor(high))) if whole else round(rng.uniform(low, high), places)


# --- how people say a value -------------------------------------------------------------------------------------------


def say_value(value: object, rng: random.Random, kind: str = "") -> str:
    """One way to say a value; lists are joined, records are said by their sentence or as `key value` pairs."""
    if isinstance(value, list) and isinstance(value[0], list):  # `[[1, 2], [3, 4]]`, `[1, 2] and [3, 4]`, `(1, 2), ...`
        rows = [", ".join(map(_digits, row)) for row in value]
        bare = ", ".join(f"[{row}]" for row in rows)
        said = (f"[{bare}]", f"[{bare}]", " and ".join(f"[{row}]" for row in rows), f"({'), ('.join(rows)})")
        return rng.choice(said)
    if isinstance(value, list):
        parts = [say_value(item, rng, kind[1:-1]) for item in value]
        if not isinstance(value[0], str | dict) and rng.random() < 0.4:
            return f"[{', '.join(map(_digits, value))}]"
        last = rng.choice((" and ", " and ", ", and ", ", "))
        return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]
    if isinstance(value, dict):
        fields, sentences = records().get(kind, ((), ()))
        kinds = {field.name: field.kind for field in fields}
        parts = {key: say_value(item, rng, kinds.get(key, "")) for key, item in value.items()}
        if sentences:
            return rng.choice(sentences).format(**parts)
        return "(" + ", ".join(f"{key.replace('_', ' ')} {part}" for key, part in parts.items()) + ")"
    return rng.choice(ways_to_say(value, kind))


def _digits(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.10g}"


def ways_to_say(value: object, kind: str = "") -> list[str]:
    """The ways in which a scalar may be said; the likely ones several times."""
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if kind.startswith("#"):
        return pools()[kind][json.dumps(value)]
    if kind.startswith("$") and isinstance(value, float):
        return [f"${value:.2f}", f"{value:.2f} dollars", f"{value:.2f}"]
    if kind.startswith("$"):  # $45,000, 45000 dollars, $45k, $3.4 million
        words = [form for said in _in_words(value) for form in (f"{said} dollars", f"${said}")]
        short = [f"${value // 1000}k"] if value % 1000 == 0 and value < MILLION else []
        return [f"${value:,}", f"{value} dollars", str(value), *short, *(words if value >= MILLION else words[:1])]
    if isinstance(value, int):
        words = [WORDS[value]] if 1 <= value <= 12 else _in_words(value) * (2 if abs(value) >= MILLION else 1)
        return [str(value), str(value), *words, *([f"{value:,}"] if abs(value) >= 10_000 else [])]
    if isinstance(value, float) and kind.startswith("%"):
        said = f"{round(value * 100, 4):g}"
        return [f"{said}%", f"{said}%", f"{said}%", f"{said} percent", f"{said} per cent"]
    if isinstance(value, float):
        return [f"{value:.10g}"]
    if re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        year, month, day = map(int, value.split("-"))
        return [value, f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}"]
    if re.fullmatch(r"\d\d:\d\d", value):
        hour, minute = map(int, value.split(":"))
        return [value, f"{(hour - 1) % 12 + 1}{f':{minute:02}' if minute else ''} {'am' if hour < 12 else 'pm'}"]
    if value in said_forms():
        return said_forms()[value]
    return [value.replace("_", " ")] if re.fullmatch(r"[a-z]+(_[a-z]+)+", value) else [value]


def _in_words(value: int) -> list[str]:
    """`40 thousand`, `3.4 million`, `-2 billion`: amounts from ten thousand that have at most two decimals so."""
    for word, scale in SCALES.items():
        if abs(value) >= scale >= MILLION:
            return [f"{value / scale:.10g} {word}"] if value % (scale // 100) == 0 else []
    return [f"{value // 1000} thousand"] if abs(value) >= 10_000 and value % 1000 == 0 else []
