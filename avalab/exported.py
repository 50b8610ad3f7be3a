"""An artefact made from another one for an engine: the part that every export shares.

`write` names it after its source, puts the step and a hash of the code of the caller's function into the recipe, and
reuses what the same code made from the same source before.

What it does not do: know a format; the caller's function fills the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from avalab import artifacts
from avalab.artifacts import Artifact
from avalab.code import code_of


@dataclass(frozen=True)
class Export:
    """One kind of export: its step of the recipe, the format, engines that load it."""

    step: dict
    format: str
    engines: Sequence[str]


def write(
    artifact: Artifact, export: Export, save: Callable[[Path], dict | None], *, out: Path | None = None
) -> Artifact:
    """`<name>+<format>` beside the artefact, or the folder `out`, filled by `save` unless it is there already."""
    out = out or artifact.path.parent / f"{artifact.name}+{export.format}"
    recipe = [*artifact.card["recipe"], export.step | {"code": code_of(save)}]
    about = {"format": export.format, "engines": export.engines, "licence": artifact.card.get("licence", "")}
    origin = {"name": artifact.name, "sha256": artifact.sha256}
    found = artifacts.find(out.name, out.parent, recipe, artifact.sha256)
    return found or artifacts.write(out.name, out.parent, save, base=origin, recipe=recipe, **about)
