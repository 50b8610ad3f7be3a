"""A matrix of scenarios and metrics: a cell a number with its unit, and a word where it is missing.

Columns have units of their own, so a colour says how good a cell is within its column: dark is the better end of a
share (0 to 100 %), and of any other quantity the best of its column. A row of which nothing was measured stays, and
the figure names it below.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
from matplotlib import rc_context

from avalab.lab.errors import InputError
from avalab.report import style
from avalab.report.style import STYLE, Picture, Records
from avalab.report.tables import described, frame

MISSING = "not here"


def scenarios(records: Records, metrics: Sequence[str], *, path: Path | None = None) -> Picture:
    """Records `metric:scenario` as a matrix, scenarios in their order of appearance.

    Raises InputError where none of the metrics was recorded.
    """
    found = frame(records)
    found = found[found.name.isin(metrics) & (found.part != "")]
    if found.empty:
        raise InputError(f"no {', '.join(metrics)} of a scenario among these records")
    rows, columns = list(found.part.unique()), [metric for metric in metrics if metric in set(found.name)]
    with rc_context(STYLE):
        figure, (axes,) = style.new_figure(1.4 + 0.42 * len(rows))
        grid = found.drop_duplicates(["part", "name"], keep="last").pivot(index="part", columns="name", values="value")
        grid = grid.reindex(index=rows, columns=columns)
        shade = pandas.DataFrame({metric: _goodness(grid[metric], metric) for metric in columns})
        axes.imshow(np.ma.masked_invalid(shade.to_numpy(float)), cmap="Blues", vmin=0, vmax=1.35, aspect="auto")
        for at, row in enumerate(rows):
            for across, metric in enumerate(columns):
                value = grid.loc[row, metric]
                text = MISSING if np.isnan(value) else _short(value, metric)
                look = {"color": "0.45", "style": "italic"} if np.isnan(value) else {}
                axes.text(across, at, text, ha="center", va="center", fontsize=9, **look)
        labels = [f"{described(m).words}\n[{described(m).unit}]" for m in columns]
        axes.set_xticks(range(len(columns)), labels, fontsize=8)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.grid(False)
    absent = [row for row in rows if grid.loc[row].isna().all()]
    first = columns[0]
    said = "; ".join(f"{row} {_short(grid.loc[row, first], first)}" for row in rows if row not in absent)
    alt = f"{described(first).words} by scenario: {said}; not to be had here: {', '.join(absent) or 'nothing'}."
    unmeasured = found[found.part.isin(absent)].assign(subject=lambda each: each.part)
    return style.finish(figure, path, alt, unmeasured, list(unmeasured.metric.unique()))


def _short(value: float, metric: str) -> str:
    """A value as a cell holds it, in the unit of its column."""
    return f"{value * described(metric).factor:.3g}"


def _goodness(column: pandas.Series, metric: str) -> pandas.Series:
    """0 to 1 for each cell of a column, 1 the best."""
    about = described(metric)
    if about.unit == "%":
        return column if about.higher_is_better else 1 - column
    best = column.max() if about.higher_is_better else column.min()
    return column / best if about.higher_is_better else best / column
