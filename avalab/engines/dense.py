"""What the exports of dense models refuse alike, before they load anything.

What it does not do: look at a model's family; each export knows its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avalab.engines import kinds


def check(folder: Path, weights: str, *, known: Sequence[str], form: str) -> None:
    """Raise ValueError for weights that a form of export does not have, or a model that is quantised already."""
    if weights not in known:
        raise ValueError(f"no weights {weights!r} for {form}; choose one of {', '.join(known)}")
    if kinds.kind(folder) != "dense":
        raise ValueError(f"{folder.name} is {kinds.kind(folder)}; export the dense model that it was made from")
