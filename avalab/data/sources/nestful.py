"""ComplexFuncBench and two smaller sets as nestful-wrapper carries them: requests, calls with results of real services.

A call's argument may be a result of an earlier one, `$var1.coordinates.latitude$`. Where the earlier result stands in
the file the value is put in, so that a dialogue's calls are those that were really made; a call whose value cannot be
found ends the chain there. One request in three is held out for a second test: a hash of its text decides.

Source: Zhong et al., "ComplexFuncBench" (2025); Basu et al., "NESTFUL" (2024).
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path

from avalab.data.calls import Case, accepted_calls
from avalab.data.sources.catalogue import Catalogue, Step, Task, brief, tool_of

SETS = {  # service -> the file's name without its ending
    "travel": "data_v1/complexfuncbench/complexfuncbench",
    "glaive": "data_v1/non-executable/non-executable-glaive",
    "sgd": "data_v1/non-executable/non-executable-sgd",
}

HELD_OUT_ONE_IN = 3

LISTED = 4  # functions on offer in a case

TYPES = ("string", "integer", "number", "boolean", "array", "object")

LONGEST_REQUEST = 420  # characters

_REFERENCE = re.compile(r"\$(\w+)((?:\.\w+|\[\d+\])*)\$?")


def read(wheel: Path) -> Catalogue:
    """The part that may be trained on."""
    return _read(wheel, held_out=False)


def _read(wheel: Path, *, held_out: bool) -> Catalogue:
    tools, tasks = {}, []
    with zipfile.ZipFile(wheel) as archive:
        for service, stem in SETS.items():
            with archive.open(f"{stem}-spec.json") as file:
                tools[service] = {row["name"]: _tool(row) for row in json.load(file)}
            with archive.open(f"{stem}-data.json") as file:
                rows = json.load(file)
            for row in rows:
                title = " ".join(row["input"].split())
                steps = _steps(row["output"], tools[service])
                if steps and len(title) <= LONGEST_REQUEST and is_held_out(title) == held_out:
                    tasks.append(Task(service, title, steps, says_all=True))
    return Catalogue(tools, tuple(tasks))


def is_held_out(request: str) -> bool:
    """Whether a request belongs to the test."""
    return int(hashlib.sha256(request.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def held_out_cases(wheel: Path) -> list[Case]:
    """The first calls of the held-out requests as cases: the function that begins, among its neighbours."""
    catalogue, found = _read(wheel, held_out=True), []
    for number, task in enumerate(catalogue.tasks):
        first = task.steps[0]
        others = [tool for name, tool in sorted(catalogue.tools[task.service].items()) if name != first.tool]
        at = number % max(1, len(others) - LISTED)
        listed = others[at : at + LISTED - 1]
        listed.insert(number % LISTED, catalogue.tools[task.service][first.tool])
        calls = accepted_calls([{"name": first.tool, "arguments": first.arguments}])
        messages = [{"role": "user", "content": task.title}]
        found.append(Case(f"nestful_{number}", "nestful", messages, listed, calls))
    return found


def _tool(row: dict) -> dict:
    properties, required = {}, []
    for name, told in (row.get("query_parameters") or {}).items():
        kind = told.get("type") if told.get("type") in TYPES else "string"
        values = [value for value in told.get("enum") or told.get("allowed_values") or () if isinstance(value, str)]
        schema = {"type": kind} | ({"enum": values} if values and kind == "string" else {})
        properties[name] = {**schema, "description": brief(told.get("description") or "")}
        required += [name] if told.get("required") is True else []
    return tool_of(row["name"], row.get("description") or "", properties, required)


def _steps(output: list[dict], tools: dict[str, dict]) -> tuple[Step, ...]:
    """The calls up to the first whose arguments are not known, or not in the schema."""
    results: dict[str, object] = {}
    steps = []
    for call in output:
        tool = tools.get(call["name"])
        if tool is None or not isinstance(call.get("arguments"), dict):
            break
        try:
            arguments = {name: _resolved(value, results) for name, value in call["arguments"].items()}
        except (KeyError, IndexError, TypeError):
            break
        if not set(arguments) <= set(tool["parameters"]["properties"]):
            break
        steps.append(Step(call["name"], arguments, call.get("response")))
        if call.get("response") is not None and "label" in call:
            results[call["label"]] = call["response"]
    return tuple(steps)


def _resolved(value: object, results: dict[str, object]) -> object:
    """A value with a reference in it replaced by what it refers to. Raises KeyError where that is not known."""
    if isinstance(value, list):
        return [_resolved(item, results) for item in value]
    if isinstance(value, dict):
        return {key: _resolved(item, results) for key, item in value.items()}
    if not isinstance(value, str) or "$" not in value:
        return value
    match = _REFERENCE.fullmatch(value)
    if match is None:
        raise KeyError(value)
    found = results[match[1]]
    for name, place in re.findall(r"\.(\w+)|\[(\d+)\]", match[2]):
        if isinstance(found, list) and name:
            found = found[0]
        found = found[int(place)] if place else found[name]
    return found
