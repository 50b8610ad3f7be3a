"""Modules of ansible's collections: documented options, and named example tasks. GPL: read where it runs, never kept.

A module's file holds two texts in YAML, `DOCUMENTATION` and `EXAMPLES`; both are read from its syntax tree, nothing is
run. Of a module's tasks those are taken that call it with plain values; a template (`{{ ... }}`) is not one.
"""

from __future__ import annotations

import ast
import zipfile
from pathlib import Path

import yaml

from avalab.data.sources.catalogue import TITLE_WORDS, Catalogue, Step, Task, brief, leaves, sayable, tool_of

COLLECTIONS = {  # whose subjects are many and whose tasks are short
    *("community/general", "community/docker", "community/mysql", "community/postgresql", "community/mongodb"),
    *("community/crypto", "community/dns", "community/grafana", "community/zabbix", "community/rabbitmq"),
    *("ansible/posix", "kubernetes/core", "containers/podman", "theforeman/foreman", "netbox/netbox"),
}

TYPES = {
    **{"str": "string", "path": "string", "raw": "string", "int": "integer", "float": "number", "bool": "boolean"},
    **{"list": "array", "dict": "object", "json": "object", "jsonarg": "object", "bytes": "string", "bits": "string"},
}

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is built


def read(wheel: Path) -> Catalogue:
    """The modules of COLLECTIONS; a service is a collection."""
    tools: dict[str, dict[str, dict]] = {}
    tasks = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            parts = name.split("/")
            service = "/".join(parts[1:3])
            if service not in COLLECTIONS or "plugins/modules/" not in name or not name.endswith(".py"):
                continue
            texts = _texts(archive.read(name).decode())
            documented = _yaml(texts.get("DOCUMENTATION", ""))
            if not isinstance(documented, dict) or not isinstance(documented.get("options"), dict):
                continue
            tool = _tool(documented)
            tools.setdefault(service, {})[tool["name"]] = tool
            full = f"{service.replace('/', '.')}.{tool['name']}"
            tasks += [Task(service, title, (step,)) for title, step in _tasks(texts.get("EXAMPLES", ""), full, tool)]
    return Catalogue(tools, tuple(tasks))


def _texts(source: str) -> dict[str, str]:
    """The texts that a module assigns on its top level."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return {}
    return {
        node.targets[0].id: node.value.value
        for node in body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def _yaml(text: str) -> object:
    try:
        return yaml.load(text, Loader)  # a safe loader
    except (yaml.YAMLError, ValueError):
        return None


def _tool(documented: dict) -> dict:
    properties, required = {}, []
    for name, option in documented["options"].items():
        schema = {"type": TYPES.get(option.get("type", "str"), "string")}
        if schema["type"] == "array":
            schema["items"] = {"type": TYPES.get(option.get("elements", "str"), "string")}
        if isinstance(option.get("choices"), list) and schema["type"] == "string":
            schema["enum"] = [str(choice) for choice in option["choices"]]
        properties[str(name)] = {**schema, "description": brief(_first(option.get("description")))}
        required += [str(name)] if option.get("required") is True else []
    return tool_of(documented["module"], documented.get("short_description", ""), properties, required)


def _first(description: object) -> str:
    return str(description[0]) if isinstance(description, list) and description else str(description or "")


def _tasks(text: str, full: str, tool: dict) -> list[tuple[str, Step]]:
    """(title, call) of the tasks of a module that name what they do and pass plain values of the declared types."""
    found, properties = [], tool["parameters"]["properties"]
    listed = _yaml(text)
    for task in listed if isinstance(listed, list) else ():
        if not isinstance(task, dict) or not isinstance(task.get("name"), str):
            continue
        arguments = next((task[key] for key in (full, tool["name"]) if isinstance(task.get(key), dict)), None)
        if not arguments or {"loop", "with_items", "when"} & task.keys() or not set(arguments) <= set(properties):
            continue
        title, plain = brief(task["name"]), not any("{{" in str(value) for value in leaves(arguments))
        if plain and sayable(arguments) and len(title.split()) >= TITLE_WORDS and _typed(arguments, properties):
            found.append((title, Step(tool["name"], arguments)))
    return found


def _typed(arguments: dict, properties: dict[str, dict]) -> bool:
    """Whether every value has the declared type: YAML writes a text that is a number without quotation marks."""
    python = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}
    return all(type(value) is python[properties[name]["type"]] for name, value in arguments.items())
