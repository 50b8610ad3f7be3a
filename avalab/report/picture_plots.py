"""Figures of pictures: what each one was taken for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from numpy.typing import ArrayLike

from avalab.lab.errors import InputError
from avalab.lab.run import Record
from avalab.report import style
from avalab.report.style import STYLE, Picture

COLUMNS = 6


@rc_context(STYLE)
def retrieval_grid(
    records: list[Record],
    pictures: Sequence[ArrayLike],
    named: Sequence[str],
    found: Sequence[Sequence[str]],
    *,
    path: Path | None = None,
) -> Picture:
    """Pictures ["y x 3", in 0 to 1], each above the names that were found for it, nearest first; its own is in bold.

    Raises ValueError for no picture, or not as many names as pictures.
    """
    if not len(pictures) or not len(pictures) == len(named) == len(found):
        raise InputError(f"{len(pictures)} pictures, {len(named)} names and {len(found)} lists of what was found")
    rows = -(-len(pictures) // COLUMNS)
    lines = max(map(len, found))
    figure, panels = style.new_figure(rows * (1.3 + 0.2 * lines), COLUMNS, rows=rows)
    for axes in panels:
        axes.axis("off")
    for axes, picture, name, names in zip(panels, pictures, named, found, strict=False):
        axes.imshow(picture)
        for line, text in enumerate(names):
            weight = "bold" if text == name else "normal"
            shown = text if len(text) <= 24 else text[:23] + "…"
            place = (0.5, -0.06 - 0.15 * line)
            axes.text(*place, shown, transform=axes.transAxes, ha="center", va="top", fontsize=7, weight=weight)
    right = sum(names[0] == name for name, names in zip(named, found, strict=True))
    alt = f"{len(pictures)} pictures, each above the {lines} nearest names; the first is right for {right}."
    return style.finish(figure, path, alt, records, ["right_share"])
