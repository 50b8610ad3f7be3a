"""Tools read from data files, the schemas that a model sees of them, and requests phrased in many styles.

1. `tools()` reads `domains/*.txt` (the format stands in `domains/README.txt`) and the training half of
   `avalab.data.toolbox`; a tool of the standard library without a description takes its docstring's first sentence.
2. `sample` draws arguments by kind (`arguments`).
3. `core` fills one of the tool's sentences and `phrase` sets it into a frame. Square brackets hold what is said only
   when its argument is given: that is how optional and missing arguments come about.
4. `describe` renders the JSON schema; a `Dress` varies spelling, where defaults stand and the names of the types, so
   that a model reads the schema instead of remembering the function.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from avalab.data import toolbox
from avalab.data.arguments import data_files, kind_of, lines_of, parameter, read_packaged, say_value
from avalab.data.toolbox import Tool

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
class Dress:
    """How a schema is spelt: `case` of names, a domain prefix, default in the description or as a field, type names,
    a verb before a function's name, another first word of its description, whole numbers that are passed as text
    (`quoted`), and a choice that is passed as a list of choices (`wrapped`).
    """

    case: str = "snake"
    prefixed: bool = False
    default_in_text: bool = True
    python_types: bool = False
    verb: str = ""
    opening: str = ""
    quoted: bool = False
    wrapped: bool = False


@cache
def tools() -> tuple[Tool, ...]:
    """Every tool that training may use, in a fixed order; none of the toolbox's held-out ones."""
    texts = [read_packaged("domains", name) for name in data_files("domains")]
    found = [tool for text in texts for tool in parse_domain(text)]
    for tool in toolbox.rows():
        if toolbox.split_of(tool.name) == "train":
            spelt_out = tuple(replace(p, description=p.description.capitalize() + ".") for p in tool.parameters)
            found.append(replace(tool, parameters=spelt_out))
    return tuple(found)


def parse_domain(text: str) -> Iterator[Tool]:
    """The tools of a domain file."""
    marks = {">": "question", "!": "order", "~": "whole"}
    for block in re.split(r"\n\s*\n", text.strip()):
        head, *rest = block.splitlines()
        if head.startswith("@"):
            domain, (head, *rest) = head[1:].strip(), rest
        name, _, description = head.partition(":")
        lines = [line.strip() for line in rest]
        fields = [field for line in lines if line[0] not in marks for field in line.split(";")]
        parameters = tuple(parameter(field.strip()) for field in fields)
        sentences = tuple((marks[line[0]], line[1:].strip()) for line in lines if line[0] in marks)
        yield Tool(name, domain, description.strip() or toolbox.docstring_of(name), parameters, sentences)


def dressed(tool: Tool, rng: random.Random) -> Dress:
    """A random spelling; the standard library's names and types stay as they are."""
    if tool.in_library:
        return Dress(python_types=rng.random() < 0.5, default_in_text=rng.random() < 0.5)
    case = rng.choice(("snake", "snake", "snake", "camel"))
    verbs, openings = VERBS.get(tool.description.split()[0], (("",), ("",)))
    already = tool.name.split("_")[0] in {"find", "search", *(verb for row, _ in VERBS.values() for verb in row)}
    verb = "" if already or rng.random() < 0.4 else rng.choice(verbs)
    flags = (rng.random() < 0.3, rng.random() < 0.6, rng.random() < 0.5)
    return Dress(case, *flags, verb, rng.choice(openings), quoted=rng.random() < 0.08, wrapped=rng.random() < 0.15)


def spelt(name: str, dress: Dress) -> str:
    """`table_size` or `tableSize`."""
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
    properties = {}
    for p in tool.parameters:
        schema = {**_passed_as(kind_of(p.kind).schema, dress), "description": p.description}
        if p.default is not None and dress.default_in_text:
            schema["description"] += f" Default is {p.default!r}."
        elif p.default is not None:
            schema["default"] = p.default
        properties[spelt(p.name, dress)] = schema
    required = [spelt(p.name, dress) for p in tool.parameters if not p.optional]
    schema = {"type": "object", "properties": properties, "required": required}
    first, _, rest = tool.description.partition(" ")
    return {
        "name": name_of(tool, dress),
        "description": f"{dress.opening or first} {rest}",
        "parameters": _renamed_types(schema) if dress.python_types else schema,
    }


def passed(tool: Tool, arguments: dict, dress: Dress) -> dict:
    """The arguments as a call passes them: spelt, and as text or lists where the schema says so."""
    if tool.in_library:
        return arguments
    own = {p.name: kind_of(p.kind).schema for p in tool.parameters}
    found = {}
    for name, value in arguments.items():
        asked, given = _passed_as(own[name], dress)["type"], own[name]["type"]
        found[spelt(name, dress)] = value if asked == given else [value] if asked == "array" else str(value)
    return found


def _passed_as(schema: dict, dress: Dress) -> dict:
    """A kind's schema in this dress."""
    if dress.quoted and schema["type"] == "integer":
        return schema | {"type": "string"}
    if dress.wrapped and "enum" in schema:
        return {"type": "array", "items": schema}
    return schema


def _renamed_types(schema: dict) -> dict:
    renamed = {**schema, "type": PYTHON_DIALECT.get(schema["type"], schema["type"])}
    if "items" in schema:
        renamed["items"] = _renamed_types(schema["items"])
    if "properties" in schema:
        renamed["properties"] = {name: _renamed_types(value) for name, value in schema["properties"].items()}
    return renamed


def sample(tool: Tool, rng: random.Random) -> dict:
    """Arguments of one call under the tool's own parameter names; an optional one is there in two of three calls."""
    drawn = {}
    for p in tool.parameters:
        if not p.optional or rng.random() < 0.67:
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
    text = _SLOT.sub(lambda match: say_value(arguments[match.group(1)], rng, kinds[match.group(1)]), text)
    named = set(_SLOT.findall(template)) | set(re.findall(r"\[(\w+)=", template))
    # "a course in {subject}" and "economics"
    text = re.sub(r"\b([Aa]) (?=(?!one\b)[aeio]|\$?(8|1[18]\b))", r"\1n ", text)
    tail = ""
    for name in (name for name in arguments if name not in named):
        said = name.replace("_", " ")
        if isinstance(arguments[name], bool):
            tail += f", {said} {rng.choice(('on', 'yes', 'true') if arguments[name] else ('off', 'no', 'false'))}"
        else:
            form = rng.choice((", with {} {}", ", {} {}", ", {}: {}", ", and {} {}"))
            tail += form.format(said, say_value(arguments[name], rng, kinds[name]))
    end = re.search(r"[?.!]$", text) if frame == "whole" else None
    return frame, (text[: end.start()] + tail + end.group() if end else text + tail)


def _segment(segment: str, arguments: dict) -> str:
    if choice := re.match(r"(\w+)=([^|]*)\|(.*)", segment):
        name, if_true, if_false = choice.groups()
        return (if_true if arguments[name] else if_false) if name in arguments else ""
    return segment if set(_SLOT.findall(segment)) <= set(arguments) else ""


def phrase(frame: str, text: str, rng: random.Random) -> str:
    """The request: the text in one of its frame's styles."""
    if frame != "whole":
        text = rng.choice(lines_of(f"frames_{frame}.txt")).replace("{}", text)
    if rng.random() < 0.15:
        text = rng.choice(lines_of("openings.txt")) + " " + text
    return text[0].upper() + text[1:] if rng.random() < 0.9 else text.rstrip(".?")
