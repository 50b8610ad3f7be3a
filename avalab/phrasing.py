"""Tool specifications read from data files, arguments drawn by type, and requests phrased in many styles.

1. `tools()` reads `domains/*.txt` (the format stands in `domains/README.txt`) and the training half of
   `avalab.toolbox`; a tool of the standard library without a description takes its docstring's first sentence.
2. `sample` draws arguments: a kind is an integer range `1..9`, a decimal range `0.5..9.5`, either with a `$` before it
   (money, which people write in their own ways), an enumeration `a|b`, `bool`, `%` (a fraction said in per cent), a
   pool of strings, `[kind]` (a list) or `&record` (a nested object).
3. `phrase` fills one of the tool's sentences and sets it into a frame. Square brackets hold what is said only when its
   argument is given: that is how optional and missing arguments come about.
4. `describe` renders the JSON schema; a `Dress` varies spelling, where defaults stand and the names of the types, so
   that a model reads the schema instead of remembering the function.

What it does not do: decide whether an example is good (that is `gates`) or which kinds of example there are.
"""

from __future__ import annotations

import calendar
import inspect
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

from avalab import toolbox
from avalab.toolbox import Kind

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
MONTHS = tuple(calendar.month_name[1:])
PYTHON_DIALECT = {"number": "float", "object": "dict"}  # as many published tool lists spell the types
VERBS = {  # first word of a description -> (verbs that may begin the name, words that may stand for it)
    "Compute": (("calculate", "compute", "get", "determine"), ("Calculate", "Compute", "Determine", "Calculates")),
    "Return": (("get", "fetch", "lookup", "retrieve"), ("Get", "Retrieve", "Return", "Look up", "Fetch")),
    "Estimate": (("estimate", "calculate", "predict"), ("Estimate", "Calculate", "Work out")),
    "List": (("list", "get", "show"), ("List", "Get a list of", "Show")),
    "Search": (("search", "find"), ("Search",)),
    "Make": (("make", "create", "generate"), ("Make", "Create", "Generate")),
}
_SEGMENT = re.compile(r"\[([^\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a tool; `kind` is the text of the data file, `default` is None where there is none."""

    name: str
    kind: str
    description: str
    optional: bool = False
    default: object = None


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


@dataclass(frozen=True)
class Dress:
    """How a schema is spelt: `case` of names, a domain prefix, default in the description or as a field, type names,
    a verb before a function's name and another first word of its description.
    """

    case: str = "snake"
    prefixed: bool = False
    default_in_text: bool = True
    python_types: bool = False
    verb: str = ""
    opening: str = ""


@cache
def tools() -> tuple[Tool, ...]:
    """Every tool that training may use, in a fixed order; none of the toolbox's held-out ones."""
    found = [tool for name in data_files("domains") for tool in _parse_domain(read("domains", name))]
    return (*found, *_toolbox_tools())


def read(folder: str, name: str) -> str:
    """A packaged data file's text. Raises FileNotFoundError."""
    return resources.files("avalab").joinpath(folder, name).read_text(encoding="utf-8")


def data_files(folder: str) -> list[str]:
    """The domain files of a packaged folder, sorted."""
    names = [entry.name for entry in resources.files("avalab").joinpath(folder).iterdir()]
    return sorted(n for n in names if n.endswith(".txt") and n not in ("README.txt", "pools.txt"))


@cache
def lines_of(name: str) -> tuple[str, ...]:
    """The lines of a prompt file without empty lines and comments."""
    return tuple(line for line in read("prompts", name).splitlines() if line and not line.startswith("#"))


@cache
def _pools() -> dict[str, list[str]]:
    rows = [line.split("=", 1) for line in read("domains", "pools.txt").splitlines() if "=" in line]
    return {name.strip(): [value.strip() for value in values.split(";")] for name, values in rows}


@cache
def _records() -> dict[str, tuple[Parameter, ...]]:
    rows = [row.split(" ", 1) for row in read("domains", "pools.txt").splitlines() if row.startswith("&")]
    return {name: tuple(_parameter(part.strip()) for part in fields.split(";")) for name, fields in rows}


def _parse_domain(text: str) -> Iterator[Tool]:
    for block in re.split(r"\n\s*\n", text.strip()):
        head, *rest = block.splitlines()
        if head.startswith("@"):
            domain, (head, *rest) = head[1:].strip(), rest
        name, _, description = head.partition(":")
        fields = [field for line in rest if line.lstrip()[0] not in ">!~" for field in line.split(";")]
        parameters = tuple(_parameter(field.strip()) for field in fields)
        marks = {">": "question", "!": "order", "~": "whole"}
        said = [line.strip() for line in rest if line.lstrip()[0] in marks]
        sentences = tuple((marks[line[0]], line[1:].strip()) for line in said)
        yield Tool(name, domain, description.strip() or _docstring(name), parameters, sentences)


def _parameter(line: str) -> Parameter:
    name, kind, description = line.split(" ", 2)
    kind, _, default = kind.partition("=")
    return Parameter(name.rstrip("?"), kind, description, name.endswith("?"), _value(default) if default else None)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _docstring(name: str) -> str:
    paragraph = " ".join(inspect.getdoc(toolbox.resolve(name)).split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph)[0]


def _toolbox_tools() -> Iterator[Tool]:
    """The toolbox's training tools, from its public table and schemas."""
    rows = [line.split(" | ") for line in toolbox.TOOLS.splitlines() if line]
    for (name, parameters, request, *_), schema in zip(rows, toolbox.tools(), strict=True):
        if toolbox.split_of(name) == "train":
            pairs = [part.split("=") for part in parameters.split()]
            described = {p.rstrip("?"): toolbox.KINDS[kind].description for p, kind in pairs}
            parsed = tuple(
                Parameter(p.rstrip("?"), f"toolbox:{kind}", described[p.rstrip("?")].capitalize() + ".", p[-1] == "?")
                for p, kind in pairs
            )
            domain, frame = ("library", "question") if "." in name else ("personal", "order")
            yield Tool(name, domain, schema["description"], parsed, ((frame, request),))


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
        choices = text.split("|")
        return Kind("", {"type": "string", "enum": choices}, lambda rng: rng.choice(choices))
    if text in _pools():
        return Kind("", {"type": "string"}, lambda rng: rng.choice(_pools()[text]))
    raise ValueError(f"unknown kind {text!r}; a range, an enumeration, {', '.join([*_SIMPLE, *_pools()])}")


_SIMPLE = {
    "bool": Kind("", {"type": "boolean"}, lambda rng: rng.random() < 0.6),
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
        return Kind("", {"type": "number"}, lambda rng: round(rng.uniform(float(low), float(high)), places))
    if int(high) > 5000 and int(low) % 100 == 0:  # amounts that people would name
        return Kind("", {"type": "integer"}, lambda rng: rng.randrange(int(low), int(high), 100))
    return Kind("", {"type": "integer"}, lambda rng: rng.randint(int(low), int(high)))


def _distinct(item: Kind, rng: random.Random) -> list:
    drawn = [item.sample(rng) for _ in range(rng.randint(2, 5))]
    return [value for i, value in enumerate(drawn) if value not in drawn[:i]]


def _record_kind(fields: tuple[Parameter, ...]) -> Kind:
    schema = _object_schema(fields, {p.name: p.name for p in fields}, Dress())
    return Kind("", schema, lambda rng: {p.name: kind_of(p.kind).sample(rng) for p in fields})


def dressed(tool: Tool, rng: random.Random) -> Dress:
    """A random spelling; the standard library's names stay as they are."""
    if tool.in_library:
        return Dress(python_types=rng.random() < 0.5, default_in_text=rng.random() < 0.5)
    case = rng.choice(("snake", "snake", "snake", "camel"))
    verbs, openings = VERBS.get(tool.description.split()[0], (("",), ("",)))
    already = tool.name.split("_")[0] in {"find", "search", *(verb for row, _ in VERBS.values() for verb in row)}
    verb = "" if already or rng.random() < 0.4 else rng.choice(verbs)
    flags = (rng.random() < 0.3, rng.random() < 0.6, rng.random() < 0.5)
    return Dress(case, *flags, verb, rng.choice(openings))


def spelt(name: str, dress: Dress) -> str:
    """A name in the dress's case: `table_size` or `tableSize`."""
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others)) if dress.case == "camel" else name


def name_of(tool: Tool, dress: Dress) -> str:
    """The function's name as the schema spells it: `book_table`, `bookTable`, `dining.book_table`."""
    if tool.in_library:
        return tool.name
    name = f"{dress.verb}_{tool.name}" if dress.verb else tool.name
    return (f"{tool.domain}." if dress.prefixed else "") + spelt(name, dress)


def describe(tool: Tool, dress: Dress) -> dict:
    """The function description that a model sees: name, description, parameters."""
    schema = _object_schema(tool.parameters, {p.name: spelt(p.name, dress) for p in tool.parameters}, dress)
    if dress.python_types:
        schema = _renamed_types(schema)
    first, _, rest = tool.description.partition(" ")
    description = f"{dress.opening or first} {rest}"
    return {"name": name_of(tool, dress), "description": description, "parameters": schema}


def _object_schema(parameters: tuple[Parameter, ...], names: dict[str, str], dress: Dress) -> dict:
    properties = {}
    for p in parameters:
        schema = {**kind_of(p.kind).schema, "description": p.description}
        if p.default is not None and dress.default_in_text:
            schema["description"] += f" Default is {p.default!r}."
        elif p.default is not None:
            schema["default"] = p.default
        properties[names[p.name]] = schema
    return {
        "type": "object",
        "properties": properties,
        "required": [names[p.name] for p in parameters if not p.optional],
    }


def _renamed_types(schema: dict) -> dict:
    renamed = {**schema, "type": PYTHON_DIALECT.get(schema["type"], schema["type"])}
    if "items" in schema:
        renamed["items"] = _renamed_types(schema["items"])
    if "properties" in schema:
        renamed["properties"] = {name: _renamed_types(value) for name, value in schema["properties"].items()}
    return renamed


def sample(tool: Tool, rng: random.Random) -> dict:
    """Arguments of one call under the tool's own parameter names; an optional one is there in half of the calls."""
    drawn = {}
    for p in tool.parameters:
        if not p.optional or rng.random() < 0.5:
            value = kind_of(p.kind).sample(rng)
            if not (p.optional and value == p.default):  # what is the default anyway is not passed
                drawn[p.name] = value
    return drawn


def droppable(tool: Tool) -> list[tuple[str, str]]:
    """(sentence, required parameter) pairs that leave a natural request when the parameter is not said."""
    required = {p.name for p in tool.parameters if not p.optional}
    return [
        (sentence, names[0])
        for _, sentence in tool.sentences
        for segment in _SEGMENT.findall(sentence)
        if len(names := _SLOT.findall(segment)) == 1 and names[0] in required
        if len(_SLOT.findall(sentence)) == len(set(_SLOT.findall(sentence)))
    ]


def core(tool: Tool, arguments: dict, rng: random.Random, sentence: str = "") -> tuple[str, str]:
    """(frame, text): one sentence of the tool with the arguments filled in; what it does not name is appended."""
    pairs = [pair for pair in tool.sentences if pair[1] == sentence] or list(tool.sentences)
    frame, template = rng.choice(pairs)
    kinds = {p.name: p.kind for p in tool.parameters}
    text = _SEGMENT.sub(lambda match: _segment(match.group(1), arguments), template)
    text = _SLOT.sub(lambda match: shown(arguments[match.group(1)], rng, kinds[match.group(1)]), text)
    named = set(_SLOT.findall(template)) | set(re.findall(r"\[(\w+)=", template))
    rest = [p for p in arguments if p not in named]
    text = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)  # "a course in {subject}" and "economics"
    tail = "".join(_appended(p, arguments[p], rng, kinds[p]) for p in rest)
    end = re.search(r"[?.!]$", text) if frame == "whole" else None
    return frame, (text[: end.start()] + tail + end.group() if end else text + tail)


def _segment(segment: str, arguments: dict) -> str:
    if choice := re.match(r"(\w+)=([^|]*)\|(.*)", segment):
        name, if_true, if_false = choice.groups()
        return (if_true if arguments[name] else if_false) if name in arguments else ""
    return segment if set(_SLOT.findall(segment)) <= set(arguments) else ""


def _appended(name: str, value: object, rng: random.Random, kind: str) -> str:
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return f", {words} {rng.choice(('on', 'yes', 'true') if value else ('off', 'no', 'false'))}"
    frame = rng.choice((", with {} {}", ", {} {}", ", {}: {}", ", and {} {}"))
    return frame.format(words, shown(value, rng, kind))


def phrase(frame: str, text: str, rng: random.Random) -> str:
    """The request: the text in one of its frame's styles."""
    if frame != "whole":
        text = rng.choice(lines_of(f"frames_{frame}.txt")).replace("{}", text)
    if rng.random() < 0.15:
        text = rng.choice(lines_of("openings.txt")) + " " + text
    return text[0].upper() + text[1:] if rng.random() < 0.9 else text.rstrip(".?")


def shown(value: object, rng: random.Random, kind: str = "") -> str:
    """One way to say a value; lists are joined, records become `key value` pairs."""
    if isinstance(value, list):
        parts = [shown(item, rng, kind[1:-1]) for item in value]
        if not isinstance(value[0], str | dict) and rng.random() < 0.5:
            return json.dumps(value)
        return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
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
        return [str(value), str(value), *words, *([f"{value:,}"] if value >= 10_000 else [])]
    if isinstance(value, float):
        return [f"{round(value * 100, 4):g}%"] if kind == "%" else [f"{value:.10g}"]
    if re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        year, month, day = map(int, value.split("-"))
        return [value, f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}"]
    if re.fullmatch(r"\d\d:\d\d", value):
        hour, minute = map(int, value.split(":"))
        return [value, f"{(hour - 1) % 12 + 1}{f':{minute:02}' if minute else ''} {'am' if hour < 12 else 'pm'}"]
    return [value.replace("_", " ")] if re.fullmatch(r"[a-z]+(_[a-z]+)+", value) else [value]


def _amounts(value: float) -> list[str]:
    """The ways in which people write an amount of money: $45,000, 45000 dollars, $45k."""
    plain = f"{value:.2f}" if isinstance(value, float) else str(value)
    short = [f"${value // 1000}k"] if isinstance(value, int) and value % 1000 == 0 else []
    return [f"${value:,}" if isinstance(value, int) else f"${plain}", f"{plain} dollars", plain, *short]
