"""The text files that come with the package: prompts, frames and the pools of values that arguments are drawn from.

A line of a pool file is `name=value; value => said one / said two`: what stands behind an arrow is how people say the
value before it. Where the pool's name begins with `#`, its values are numbers: `7 => a week / seven days`. Lines that
begin with `&` are records (`data.arguments`).
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources


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
