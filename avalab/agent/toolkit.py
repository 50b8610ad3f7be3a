"""The tools of an agent: files of one folder, sums, dates, units, documents, Python in the sandbox, and its memory.

A tool is a row: name, description, JSON schema, a function, and whether it writes. `perform` checks a call's arguments
(`serve.tools.argument_error`), asks for confirmation where the tool writes, runs it, and gives the result, or the
reason there is none, as text for the model. A tool that raises what a person may cause has failed; anything else is a
defect and goes on up.

- Files: below the workspace only, links followed before that is decided, of `MOST_BYTES` at most.
- Sums: `+ - * / // % **`, brackets and a few functions, read by `ast` and never evaluated as code.
- Units: by pint (optional extra `agent`).
- Python: in `lab.sandbox`, with a copy of the workspace's files; what the program changes there is lost with it.
"""

from __future__ import annotations

import ast
import base64
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache, partial
from pathlib import Path

from avalab.agent.retrieval.index import Index
from avalab.data.calls import Call
from avalab.lab import sandbox
from avalab.lab.errors import InputError, LabError, MissingFile, Unavailable
from avalab.lab.run import write_atomically
from avalab.serve.tools import Result, argument_error, shortened, why_ended

MOST_BYTES = 1 << 20

SECONDS = 5.0  # of a program

INSTALL = 'pip install "avalab[agent]"'

COPY = """
import base64, pathlib
for _name, _data in {files!r}.items():
    _path = pathlib.Path(_name)
    _path.parent.mkdir(parents=True, exist_ok=True)
    _path.write_bytes(base64.b64decode(_data))
del _name, _data, _path
"""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call; `writes` means that a person is asked first."""

    name: str
    description: str
    parameters: dict
    run: Callable[..., str]
    writes: bool = False

    @property
    def described(self) -> dict:
        """What the model sees."""
        return {"name": self.name, "description": self.description, "parameters": self.parameters}


Confirm = Callable[[Tool, Call], bool]


def never(tool: Tool, call: Call) -> bool:
    """The confirmation where nobody can be asked."""
    return False


def perform(tools: Sequence[Tool], call: Call, *, confirm: Confirm = never) -> Result:
    """Check a call, ask where it writes, and run it."""
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        return Result(f"there is no tool {call.name!r}; there are {', '.join(t.name for t in tools)}", failed=True)
    if wrong := argument_error(tool.described, call):
        return Result(wrong, failed=True)
    if tool.writes and not confirm(tool, call):
        return Result("the user does not allow this call", failed=True)
    try:
        return Result(shortened(tool.run(**call.arguments)))
    except (LabError, OSError) as error:
        return Result(" ".join(str(error).split()), failed=True)


def schema(**properties: tuple[str, str]) -> dict:
    """The JSON schema of an object whose properties, given as (type, description), are all required."""
    described = {name: {"type": kind, "description": said} for name, (kind, said) in properties.items()}
    return {"type": "object", "properties": described, "required": list(properties), "additionalProperties": False}


# --- files -----------------------------------------------------------------------------------------------------------


def file_tools(workspace: Path) -> list[Tool]:
    """Listing, reading and writing below a folder."""
    where = ("string", "path below the workspace, such as notes.txt")
    return [
        Tool("list_files", "List the files of the workspace with their sizes.", schema(), partial(_listed, workspace)),
        Tool("read_file", "Read a text file of the workspace.", schema(path=where), partial(_read, workspace)),
        Tool(
            "write_file",
            "Write a text file of the workspace; one that is there is replaced.",
            schema(path=where, text=("string", "the whole content")),
            partial(_write, workspace),
            writes=True,
        ),
    ]


def _inside(workspace: Path, path: str) -> Path:
    """The file that a path names. Raises InputError for one outside the workspace."""
    root = workspace.resolve()
    found = root if "\0" in path else (root / path).resolve()
    if not found.is_relative_to(root) or found == root:
        raise InputError(f"{path!r} is not a file of the workspace; give a path such as notes.txt")
    return found


def _files(workspace: Path) -> dict[str, Path]:
    root = workspace.resolve()
    found = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if path.resolve().is_relative_to(root)}


def _listed(workspace: Path) -> str:
    found = _files(workspace)
    return f"{len(found)} files, with their bytes: {json.dumps({name: p.stat().st_size for name, p in found.items()})}"


def _read(workspace: Path, path: str) -> str:
    file = _inside(workspace, path)
    if not file.is_file():
        raise MissingFile(f"there is no {path!r}; there are {', '.join(_files(workspace)) or 'no files'}")
    if file.stat().st_size > MOST_BYTES:
        raise InputError(f"{path!r} is larger than {MOST_BYTES:,} bytes")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path!r} is not text") from None


def _write(workspace: Path, path: str, text: str) -> str:
    file = _inside(workspace, path)
    if len(text.encode()) > MOST_BYTES:
        raise InputError(f"a text of {len(text):,} characters is too long; write at most {MOST_BYTES:,} bytes")
    write_atomically(file, text)
    return f"wrote {len(text)} characters to {path}"


def python_tool(workspace: Path | None = None) -> Tool:
    """A program in the sandbox, with a copy of the workspace's files."""
    said = "Run a Python program that prints its result; it sees a copy of the workspace's files."
    return Tool("python", said, schema(code=("string", "the program")), partial(_python, workspace))


def _python(workspace: Path | None, code: str) -> str:
    held = _files(workspace) if workspace else {}
    files = {
        name: base64.b64encode(path.read_bytes()).decode()
        for name, path in held.items()
        if path.stat().st_size <= MOST_BYTES
    }
    program = (COPY.format(files=files) if files else "") + code
    outcome = sandbox.run_code(program, seconds=SECONDS)
    if outcome.status != "finished":
        raise InputError(why_ended(outcome, SECONDS))
    return outcome.stdout.strip() or "(the program printed nothing)"


# --- sums ------------------------------------------------------------------------------------------------------------

OPERATORS: dict[type, Callable] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow},
    **{ast.USub: operator.neg, ast.UAdd: operator.pos},
}

FUNCTIONS: Mapping[str, Callable] = {
    **{f.__name__: f for f in (abs, min, max, round, math.sqrt, math.floor, math.ceil, math.gcd, math.factorial)},
    "sum": lambda *values: math.fsum(values) if any(isinstance(v, float) for v in values) else sum(values),
    "mean": lambda *values: math.fsum(values) / len(values),
}

MOST_DIGITS = 200  # of a result


def calculate(expression: str) -> str:
    """The value of an arithmetical expression. Raises InputError for anything else, or a number that is too long."""
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        if isinstance(error, LabError):
            raise
        said = str(error) or type(error).__name__
        raise InputError(f"{expression!r} cannot be worked out: {said}; write it as 3 * (4 + 5)") from error
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            return value
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _bounded(OPERATORS[type(op)], _value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return _bounded(FUNCTIONS[name], *(v for a in arguments for v in _values(a)))
    raise InputError(f"{ast.unparse(node)!r} is no sum; known are + - * / // % ** and {', '.join(FUNCTIONS)}")


def _values(node: ast.expr) -> list[int | float]:
    return [_value(each) for each in node.elts] if isinstance(node, ast.List | ast.Tuple) else [_value(node)]


def _bounded(function: Callable, *values: int | float) -> int | float:
    """The result of an operation whose size is bounded before it is worked out."""
    if function is operator.pow and isinstance(values[0], int) and isinstance(values[1], int):
        digits = abs(values[1]) * math.log10(max(2, abs(values[0])))
        if digits > MOST_DIGITS:
            raise InputError(f"{values[0]} ** {values[1]} has more than {MOST_DIGITS} digits")
    if function is math.factorial and values[0] > 100:
        raise InputError(f"factorial({values[0]}) has more than {MOST_DIGITS} digits")
    result = function(*values)
    if isinstance(result, complex):
        raise InputError("the result is not a real number")
    return result


# --- dates and units -------------------------------------------------------------------------------------------------


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"{text!r} is no date; write it as 2026-11-29 ({error})") from error


def days_between(start: str, end: str) -> str:
    """How many days lie between two dates; negative where the end comes first."""
    return str((_date(end) - _date(start)).days)


def add_days(start: str, days: int) -> str:
    """The date some days after another, or before it."""
    try:
        return (_date(start) + timedelta(days=days)).isoformat()
    except OverflowError as error:
        raise InputError(f"{days} days from {start} is no date that a calendar has") from error


def weekday(day: str) -> str:
    """The name of a date's day of the week."""
    return _date(day).strftime("%A")


@cache
def _units():
    try:
        import pint
    except ImportError as error:
        raise Unavailable(f"units need pint; install it: {INSTALL}") from error
    return pint.UnitRegistry(cache_folder=None, autoconvert_offset_to_baseunit=True)


def convert_units(value: float, source: str, target: str) -> str:
    """A quantity in another unit. Raises InputError for a unit that there is not, or one of another kind."""
    units = _units()
    try:
        return f"{units.Quantity(value, source).to(target).magnitude:.10g} {target}"
    except Exception as error:  # pint's parser raises what the tokenizer of Python does, too
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{value} {source!r} is not to be had in {target!r}: {said}") from error


def calculating_tools() -> list[Tool]:
    """Sums, dates and units."""
    day, unit = ("string", "YYYY-MM-DD"), ("string", "such as km, kg, degF, hour")
    return [
        Tool(
            "calculate",
            "Work out an arithmetical expression, such as 3 * (4 + 5) or mean(1, 2, 6).",
            schema(expression=("string", "+ - * / // % ** ( ) sum mean min max round sqrt")),
            calculate,
        ),
        Tool("days_between", "Count the days from one date to another.", schema(start=day, end=day), days_between),
        Tool(
            "add_days",
            "Give the date some days after another one; a negative number goes back.",
            schema(start=day, days=("integer", "how many days")),
            add_days,
        ),
        Tool("weekday", "Name the day of the week of a date.", schema(day=day), weekday),
        Tool(
            "convert_units",
            "Give a quantity in another unit.",
            schema(value=("number", "how much"), source=unit, target=unit),
            convert_units,
        ),
    ]


# --- documents -------------------------------------------------------------------------------------------------------


def document_tool(index: Index, *, most: int = 2) -> Tool:
    """Searching an index of documents."""

    def search(question: str) -> str:
        found = index.search(question, most)
        return "\n\n".join(f"[{piece.name}] {piece.text}" for piece in found) or "nothing was found"

    said = "Search the user's documents; gives the passages that fit best."
    return Tool("search_documents", said, schema(question=("string", "what is looked for")), search)
