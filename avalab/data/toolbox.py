"""Tools and function-calling chats that exist without any download.

Two sources, in one table: standard-library callables (dotted names), whose description is read from the docstring and
whose parameter types, which the library does not annotate, stand in the table; and everyday domains, written here.
A row is a tool: `name | parameter=kind ... | request | description`; a kind is a JSON schema and a sampler, an optional
parameter ends in `?`, the request names every required argument. No tool bears the name of one of the 1,909 functions
of BFCL v4. A chat: draw a tool of the split, draw its arguments by kind, phrase the request, put the tool among up to
two others. A hash of the name decides the split, so train and heldout never share a function.

What it does not do: quality gates, parallel or missing calls, teachers (that is `synthesize`, with `tools()` as its
source). Docstrings, and so descriptions, differ between Python versions; names and arguments do not.
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


def _drawn(json_type: str, description: str, draw: Callable[[random.Random], object]) -> Kind:
    return Kind(description, {"type": json_type}, draw)


def _integer(description: str, low: int, high: int) -> Kind:
    return _drawn("integer", description, lambda rng: rng.randint(low, high))


def _one_of(description: str, values: str, *, closed: bool = False) -> Kind:
    choices = values.split(";")
    closed_set = {"enum": choices} if closed else {}
    return Kind(description, {"type": "string", **closed_set}, lambda rng: rng.choice(choices))


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

TOOLS = """
math.comb | n=whole k=few | the number of ways to choose {k} of {n} things
math.isqrt | n=whole | the whole square root of {n}
math.radians | x=real | {x} degrees in radians
math.ceil | x=real | {x} rounded up
math.fsum | seq=reals | the exact sum of {seq}
statistics.mean | data=reals | the average of {data}
statistics.stdev | data=reals | the sample standard deviation of {data}
statistics.geometric_mean | data=reals | the geometric mean of {data}
statistics.quantiles | data=reals n?=few | the cut points of {data}
calendar.isleap | year=year | whether {year} is a leap year
calendar.weekday | year=year month=month day=day | the weekday of day {day} of month {month} in {year}
calendar.monthrange | year=year month=month | the number of days in month {month} of {year}
difflib.get_close_matches | word=word possibilities=words n?=few | the words most like {word} among {possibilities}
heapq.nlargest | n=few iterable=integers | the {n} largest of {iterable}
heapq.nsmallest | n=few iterable=integers | the {n} smallest of {iterable}
textwrap.shorten | text=text width=width | the text "{text}" cut to {width} characters
textwrap.fill | text=text width?=width | the paragraph "{text}" filled
textwrap.indent | text=text prefix=word | the text "{text}" with {prefix} before each line
html.escape | s=text quote?=truth | the text "{s}" made safe for HTML
shlex.split | s=text | the shell words of "{s}"
re.escape | pattern=text | the text "{pattern}" with special characters escaped
fnmatch.fnmatch | name=path pat=pattern | whether {name} matches {pat}
posixpath.dirname | p=path | the folder of the path {p}
ipaddress.ip_address | address=address | the address object of {address}
urllib.parse.quote_plus | string=text | the text "{string}" quoted for a URL
urllib.parse.unquote | string=text | the URL text "{string}" decoded
reserve_desk | city=city date=date screens?=few | reserve a desk in {city} on {date} | Reserve a desk in an office.
plan_trip | origin=city target=city date=date | plan a trip from {origin} to {target} on {date} | Find trains.
forecast_rain | city=city date=date | tell me whether it rains in {city} on {date} | Say how likely rain is.
remind_person | person=person message=text time=time | remind {person} at {time} that {message} | Send a reminder.
dim_room_light | room=room level=level | set the light in the {room} to {level} | Set how bright a room is.
heat_room | room=room degrees=degrees until?=time | heat the {room} to {degrees} degrees | Set a room's temperature.
play_piece | piece=song room=room loop?=truth | play {piece} in the {room} | Play music in a room.
change_length | value=real source=unit target=unit | convert {value} {source} to {target} | Convert a length.
exchange_money | sum=amount source=currency target=currency | exchange {sum} {source} into {target} | Convert money.
invoice | person=person sum=amount currency=currency | send {person} an invoice over {sum} {currency} | Send an invoice.
log_expense | amount=amount purpose=word date=date | log {amount} spent on {purpose} on {date} | Note an expense.
translate_phrase | phrase=text language=language | translate "{phrase}" into {language} | Translate a text.
book_lesson | language=language person=person time=time | book {language} with {person} at {time} | Book a lesson.
move_meeting | person=person date=date time=time | move the meeting with {person} to {date} at {time} | Move a meeting.
add_to_shopping | items=words urgent?=truth | add {items} to the shopping list | Add items to the shopping list.
rename_photo | source=path title=word | rename the photo {source} to {title} | Rename a picture.
"""

QUESTIONS = "What is {}?;Please work out {}.;I need {}.;Tell me {}.;Could you find {} for me?;Give me {}."

ORDERS = "Please {}.;Could you {}?;I want you to {}.;Can you {} for me?;{}, please.;Go ahead and {}."


@dataclass(frozen=True)
class Row:
    """One tool as the tables above hold it; `optional` is the set of parameters that may be left out."""

    name: str
    kinds: dict[str, str]
    optional: frozenset[str]
    request: str
    description: str


def resolve(name: str) -> Callable:
    """The standard-library callable of a dotted tool name, e.g. `math.comb`."""
    module, function = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), function)


def tools() -> list[dict]:
    """Every tool as a function description: name, description, parameters (JSON schema of an object)."""
    return [_describe(row) for row in _rows()]


def split_of(name: str) -> str:
    """`train` or `heldout`, by a hash of the tool's name."""
    return SPLITS[int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELDOUT_ONE_IN == 0]


def system_prompt(tools: list[dict]) -> str:
    """The system message that lists these tools; data/tiny-llama's chat template renders the same text."""
    return json.dumps(tools, ensure_ascii=False).join(TOOL_PROMPT)


def function_calling_examples(count: int, seed: int, split: str = "train") -> Iterator[dict]:
    """`count` chats: `{"messages", "tools", "calls"}`; messages are system, user and assistant.

    Equal arguments yield equal chats. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    rows = [row for row in _rows() if split_of(row.name) == split]
    rng = random.Random(f"{split}-{seed}")
    return (_example(rows, rng) for _ in range(count))


@cache
def _rows() -> tuple[Row, ...]:
    return tuple(_parse(line) for line in TOOLS.splitlines() if line)


def _parse(line: str) -> Row:
    name, parameters, request, *description = line.split(" | ")
    pairs = [parameter.split("=") for parameter in parameters.split()]
    return Row(
        name=name,
        kinds={parameter.rstrip("?"): kind for parameter, kind in pairs},
        optional=frozenset(parameter[:-1] for parameter, _ in pairs if parameter.endswith("?")),
        request=request,
        description=description[0] if description else _first_sentence(resolve(name)),
    )


def _first_sentence(function: Callable) -> str:
    paragraph = " ".join(inspect.getdoc(function).split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph)[0]


def _describe(row: Row) -> dict:
    properties = {
        parameter: {**KINDS[kind].schema, "description": KINDS[kind].description}
        for parameter, kind in row.kinds.items()
    }
    required = [parameter for parameter in row.kinds if parameter not in row.optional]
    schema = {"type": "object", "properties": properties, "required": required}
    return {"name": row.name, "description": row.description, "parameters": schema}


def _example(rows: list[Row], rng: random.Random) -> dict:
    row = rng.choice(rows)
    listed = rng.sample([other for other in rows if other is not row], rng.choice((0, 0, 1, 1, 2)))
    listed.insert(rng.randint(0, len(listed)), row)
    chosen = [p for p in row.kinds if p not in row.optional or rng.random() < 0.5]
    arguments = {parameter: KINDS[row.kinds[parameter]].sample(rng) for parameter in chosen}
    described = [_describe(other) for other in listed]
    calls = [{"name": row.name, "arguments": arguments}]
    answer = f"<tool_call>{json.dumps(calls, ensure_ascii=False)}</tool_call>"
    contents = {"system": system_prompt(described), "user": _phrase(row, arguments, rng), "assistant": answer}
    messages = [{"role": role, "content": content} for role, content in contents.items()]
    return {"messages": messages, "tools": described, "calls": calls}


def _phrase(row: Row, arguments: dict, rng: random.Random) -> str:
    shown = {parameter: _shown(value) for parameter, value in arguments.items()}
    extra = "".join(f", with {parameter} {shown[parameter]}" for parameter in arguments if parameter in row.optional)
    frame = rng.choice((QUESTIONS if "." in row.name else ORDERS).split(";"))
    sentence = frame.format(row.request.format(**shown) + extra)
    return sentence[0].upper() + sentence[1:]


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:-1])) + f" and {value[-1]}"
    return json.dumps(value) if isinstance(value, bool) else str(value)
