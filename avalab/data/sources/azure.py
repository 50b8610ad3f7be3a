"""Commands of Microsoft's azure-cli: their generated modules name every argument, and many hold examples.

A module registers a command and builds its arguments; both are read from the source's syntax tree, nothing is run. An
example is a sentence and a command line, which the standard library's `shlex` splits; options are looked up among the
command's own, and an example with an option, a value or a shell's word that cannot be read is left out.
"""

from __future__ import annotations

import ast
import re
import shlex
import zipfile
from pathlib import Path

from avalab.data.sources.catalogue import (
    TITLE_WORDS,
    Catalogue,
    Step,
    Task,
    brief,
    sayable,
    snake_case,
    tool_of,
)

SHOWN_BY_TYPE = {  # arguments whose class says what they are
    "AAZResourceGroupNameArg": (["--resource-group", "-g"], "Name of the resource group."),
    "AAZResourceLocationArg": (["--location", "-l"], "Location, such as a region."),
    "AAZSubscriptionIdArg": (["--subscription"], "Name or ID of the subscription."),
}

TYPES = {"AAZIntArg": "integer", "AAZFloatArg": "number", "AAZBoolArg": "boolean"}

LISTS, OBJECTS = ("AAZListArg",), ("AAZDictArg", "AAZFreeFormDictArg", "AAZObjectArg", "AAZAnyTypeArg")

GLOBAL = {"--query", "--output", "-o", "--debug", "--verbose", "--only-show-errors", "--help"}

TRUTH = {"true": True, "false": False, "yes": True, "no": False}

BEHIND = (
    "    def _execute_operations("  # what stands from here on says nothing of the arguments, and is most of a module
)

_EXAMPLE = re.compile(r":example: *(?P<title>.+)\n(?P<text>(?: {6,}.*\n|\s*\n)+)")

_SHELL = re.compile(r"[$`|<>*{}\\]|&&|;")


def read(wheel: Path) -> Catalogue:
    """The commands of the newest profile; a service is a command's first two words."""
    tools: dict[str, dict[str, dict]] = {}
    tasks = []
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if "/aaz/latest/" in n and n.endswith(".py") and "__" not in n]
        for name in sorted(names):
            command = _command(archive.read(name).decode())
            if command is None:
                continue
            words, described, options, examples = command
            service, tool = " ".join(words.split()[:2]), tool_of(snake_case(words), *described)
            tools.setdefault(service, {})[tool["name"]] = tool
            for title, line in examples:
                arguments = _arguments(line, words, options, tool["parameters"]["properties"])
                wanted = set(tool["parameters"]["required"])
                if arguments and wanted <= set(arguments) and sayable(arguments) and len(title.split()) >= TITLE_WORDS:
                    tasks.append(Task(service, brief(title), (Step(tool["name"], arguments),)))
    return Catalogue(tools, tuple(tasks))


def _command(source: str) -> tuple[str, tuple, dict[str, str], list[tuple[str, str]]] | None:
    """(words, (description, properties, required), option -> property, examples) of a module that has a command."""
    for node in ast.parse(source.partition(BEHIND)[0]).body:
        if not isinstance(node, ast.ClassDef):
            continue
        registered = [d for d in node.decorator_list if isinstance(d, ast.Call) and d.args]
        if not registered:
            continue
        said = ast.get_docstring(node) or ""
        properties, required, options = _properties(node)
        examples = [(m["title"].strip(), m["text"].strip()) for m in _EXAMPLE.finditer(_indented(said))]
        description = said.partition(":example:")[0]
        return ast.literal_eval(registered[0].args[0]), (description, properties, required), options, examples
    return None


def _indented(said: str) -> str:
    """A docstring whose command lines stand deeper than its sentences, with an end of line at its end."""
    return re.sub(r"^ {2,}", " " * 8, said, flags=re.MULTILINE) + "\n"


def _properties(command: ast.ClassDef) -> tuple[dict[str, dict], list[str], dict[str, str]]:
    """The arguments on the top level: JSON Schema by name, the required ones, and the options that give them."""
    properties, required, options = {}, [], {}
    for node in ast.walk(command):
        match node:
            case ast.Assign(
                targets=[ast.Attribute(value=ast.Name(id="_args_schema"), attr=name)],
                value=ast.Call(func=ast.Name(id=kind), keywords=keywords),
            ):
                given = {k.arg: _literal(k.value) for k in keywords}
                flags, text = SHOWN_BY_TYPE.get(kind, ([f"--{name.replace('_', '-')}"], ""))
                schema = {"type": "array", "items": {"type": "string"}} if kind in LISTS else {}
                schema = schema or {"type": TYPES.get(kind, "object" if kind in OBJECTS else "string")}
                if isinstance(given.get("enum"), dict):
                    schema["enum"] = list(given["enum"])
                said = given.get("help")
                said = said.get("short-summary") if isinstance(said, dict) else said
                properties[name] = {**schema, "description": brief(said or text)}
                required += [name] if given.get("required") is True else []
                options |= dict.fromkeys(given.get("options") or flags, name)
    return properties, required, options


def _literal(node: ast.expr) -> object:
    """A value that stands in the source, or None for one that is computed."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _arguments(line: str, words: str, options: dict[str, str], properties: dict[str, dict]) -> dict | None:
    """The arguments that a command line gives, or None where it is another command or cannot be read as one."""
    text = re.sub(r"\\\s*\n", " ", line).split("\n")[0].strip()
    if _SHELL.search(text):
        return None
    try:
        parts = shlex.split(text)
    except ValueError:
        return None
    head = ["az", *words.split()]
    if parts[: len(head)] != head:
        return None
    given: dict[str, list[str]] = {}
    for part in parts[len(head) :]:
        option, _, value = part.partition("=")
        if option in options:
            given[option] = [value] if value else []
        elif part.startswith("-") or not given:
            return None
        else:
            given[next(reversed(given))].append(part)
    found = {options[option]: _value(values, properties[options[option]]) for option, values in given.items()}
    return None if None in found.values() else found


def _value(texts: list[str], schema: dict) -> object:
    """What an option's words stand for, by its type; None where they do not fit."""
    text = " ".join(texts)
    match schema["type"]:
        case "array":
            return texts or None
        case "integer":
            return int(text) if re.fullmatch(r"-?\d+", text) else None
        case "number":
            return float(text) if re.fullmatch(r"-?\d+(\.\d+)?", text) else None
        case "boolean":
            return TRUTH.get(text.lower()) if text else True
        case "object":
            pairs = [part.partition("=") for part in texts]
            return {key: value for key, sign, value in pairs} if pairs and all(sign for _, sign, _ in pairs) else None
    allowed = {value.lower(): value for value in schema.get("enum", ())}
    return (allowed.get(text.lower()) if allowed else text) if len(texts) == 1 else None
