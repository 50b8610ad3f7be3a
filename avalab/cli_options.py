"""What several sub-commands of `avalab` share: options with their help, and how records are printed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option(help="Embedded model, folder with config.json, or hub id; '' is the profile's own.")
]
Profile = Annotated[str, typer.Option(help="Sizes of calibration and measurement: smoke, laptop, a2000 or long.")]
Seed = Annotated[int, typer.Option(help="Seed of samples, adapters and intervals.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print records as JSON.")]
Mode = Annotated[str, typer.Option(help="free (any text), grammar (a call or a refusal) or forced (a call).")]
Limit = Annotated[int | None, typer.Option(min=1, help="Cases of each task (windows of text); the profile's without.")]
ArtifactFolder = Annotated[Path, typer.Argument(help="Artefact folder (it holds card.json).")]


def print_records(run, as_json: bool) -> None:
    """One line a record, or a JSON list of them."""
    if as_json:
        print(json.dumps([asdict(r) for r in run.records], indent=1, sort_keys=True))
        return
    from avalab import tables

    for record in run.records:
        shown = tables.show(record) if record.value is not None else record.note
        print(f"{record.subject:32} {tables.words(record.metric):36} {shown}")
