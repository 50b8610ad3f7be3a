"""The tools of a chat: read from a file or taken from the toolbox, checked, and really executed, in the sandbox.

A tool is a row of data: name, description, JSON schema of its arguments, and a callable `module:function` of the
standard library that stands on the list of pure ones in `gates`. There is no way to name other code, and no tool has an
effect. A call is checked against its tool's schema and runs in a process of its own in the `sandbox`, because pure is
not quick: `math.factorial(10**9)` is ended by the time limit.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jsonschema

from avalab.data import gates, toolbox
from avalab.data.calls import Call
from avalab.lab import sandbox
from avalab.lab.errors import InputError

FIELDS = ("name", "description", "parameters", "callable")

BUILT_IN = ("math", "statistics", "calendar")  # modules of the toolbox's tools that are on offer without a file

SECONDS, MEMORY_BYTES = 5.0, 256 << 20  # of one call

SHOWN_CHARACTERS = 1000  # of a result

# What the sandbox runs. Many built-in functions take their arguments by place only: then in the schema's order.
PROGRAM = """
import importlib, inspect, json
module, name, arguments = json.loads({request!r})
function = getattr(importlib.import_module(module), name)
try:
    by_name = inspect.signature(function).bind(**arguments)
except (TypeError, ValueError):
    by_name = None
result = function(**arguments) if by_name else function(*arguments.values())
print(json.dumps(result, default=str, ensure_ascii=False))
"""


@dataclass(frozen=True)
class Tool:
    """A function on offer; `callable` is `module:function` and whitelisted."""

    name: str
    description: str
    parameters: dict
    callable: str

    @property
    def described(self) -> dict:
        """What the model sees."""
        return {"name": self.name, "description": self.description, "parameters": self.parameters}


@dataclass(frozen=True)
class Result:
    """What a call gave: the value as JSON, or with `failed` the reason there is none."""

    text: str
    failed: bool = False


def built_in() -> list[Tool]:
    """The toolbox's tools of a few pure modules."""
    offered = [tool for tool in toolbox.tools() if tool["name"].rpartition(".")[0] in BUILT_IN]
    return [Tool(**tool, callable=":".join(tool["name"].rsplit(".", 1))) for tool in offered]


def read_tools(path: Path | str) -> list[Tool]:
    """The tools of a file: a JSON list of objects with the FIELDS.

    Raises ValueError naming the file, and the tool that lacks a field, has an invalid schema or another one's name, or
    whose callable is not whitelisted.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} holds no list of tools; each is an object with {', '.join(FIELDS)}")
    tools: dict[str, Tool] = {}
    for number, row in enumerate(rows, start=1):
        try:
            if not isinstance(row, dict) or set(row) != set(FIELDS):
                raise InputError(f"a tool has {', '.join(FIELDS)}; this is {json.dumps(row)[:80]}")
            if not all(isinstance(row[field], str) for field in ("name", "description", "callable")):
                raise InputError("name, description and callable are text")
            gates.checked_schema(row)
            pure_function(row["callable"])
            if row["name"] in tools:
                raise InputError(f"the name {row['name']!r} stands twice")
            tools[row["name"]] = Tool(**row)
        except ValueError as error:
            raise InputError(f"{path}, tool {number}: {error}") from error
    return list(tools.values())


def pure_function(name: str) -> Callable:
    """The function of `module:function`. Raises ValueError for one that is not on the list of pure ones."""
    module, _, function = name.partition(":")
    if not function.isidentifier() or function.startswith("_") or not gates.is_pure(f"{module}.{function}"):
        modules = ", ".join(sorted(gates.PURE_MODULES))
        raise InputError(f"callable {name!r} is none of the lab's pure functions (module:function, of {modules})")
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise InputError(f"callable {name!r}: {module} has no such function")
    return found


def execute(tools: Sequence[Tool], call: Call, *, seconds: float = SECONDS) -> Result:
    """Check a call against its tool's schema and run it in the sandbox, for at most `seconds`."""
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        return Result(f"there is no function {call.name!r}", failed=True)
    pure_function(tool.callable)  # also of a tool that no file was read for
    if wrong := argument_error(tool.described, call):
        return Result(wrong, failed=True)
    schema = gates.checked_schema(tool.described)
    places = [name for name in schema.get("properties", {}) if name in call.arguments]
    ordered = {name: call.arguments[name] for name in dict.fromkeys([*places, *call.arguments])}
    request = json.dumps([*tool.callable.split(":"), ordered])
    outcome = sandbox.run_code(PROGRAM.format(request=request), seconds=seconds, memory_bytes=MEMORY_BYTES)
    if outcome.status == "finished":
        return Result(shortened(outcome.stdout.strip()))
    return Result(why_ended(outcome, seconds), failed=True)


def argument_error(described: dict, call: Call) -> str:
    """What is wrong with the arguments of a call to a tool so described; "" where they fit its schema."""
    wrong = jsonschema.Draft202012Validator(gates.checked_schema(described)).iter_errors(call.arguments)
    error = jsonschema.exceptions.best_match(wrong)
    return error.message if error else ""


def shortened(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """A result, cut where it is long."""
    return text if len(text) <= most else text[: most - 3] + "..."


def why_ended(outcome: sandbox.Outcome, seconds: float) -> str:
    """One line on a process of the sandbox that did not come to its end."""
    said = (outcome.stderr.strip().splitlines() or ["it ended early"])[-1]
    ends = {"error": said, "timeout": f"no result within {seconds:g} s", "memory": "it needs too much memory"}
    return ends.get(outcome.status, "the process was ended")


def shown_call(call: Call) -> str:
    """`math.comb(n=5, k=2)`."""
    arguments = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    return f"{call.name}({arguments})"
