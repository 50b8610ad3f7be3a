"""The figure of recovery: what share of the damage each student won back, with its interval.

One panel a part (a text, the calls), one row a student; the dashed line at one hundred per cent is the teacher, the
dotted one at zero the student before it was taught. The style, the colours and the checks are those of `marks`.
What it does not do: decide whether two students differ (intervals of the same items overlap long before that).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context

from avalab import marks, tables
from avalab.experiment import Record


@rc_context(marks.STYLE)
def recovery(records: list[Record], parts: Sequence[str], *, path: Path | None = None) -> marks.Picture:
    """Records `recovered:<part>` as per cent, a panel for each of `parts`, a row for each student that has one of them.

    Raises ValueError when none was recorded with a value.
    """
    metrics = [f"recovered:{part}" for part in parts]
    values = [tables.measured(records, metric) for metric in metrics]
    subjects = dict.fromkeys(r.subject for r in records if any(r.subject in value for value in values))
    if not subjects:
        raise ValueError(f"nothing recovered was recorded of {', '.join(parts)}")
    figure, panels = marks.row_figure(subjects, "", panels=len(metrics))
    styles = marks.subject_styles(records, "", subjects)
    for axes, part, value in zip(panels, parts, values, strict=True):
        for row, subject in enumerate(subjects):
            if subject in value:
                _draw(axes, value[subject], row, styles[subject])
        axes.axvline(0, color="0.5", lw=1.2, ls=":", zorder=1)
        axes.axvline(100, color=marks.BASELINE_COLOUR, lw=1.2, ls="--", zorder=1)
        axes.set(xlabel=f"recovered, {part.replace('_', ' ')} [%]")
    shares = "; ".join(f"{s} {100 * values[0][s].value:.0f} %" for s in subjects if s in values[0])
    return marks.finish(figure, path, f"Recovered of {parts[0]}, dashed: the teacher. {shares}.", records, metrics)


def _draw(axes, record: Record, row: int, style: dict) -> None:
    value, ends = 100 * record.value, (100 * record.low, 100 * record.high)
    bars = [[max(0, value - ends[0])], [max(0, ends[1] - value)]]
    look = {"markersize": 7, "mec": "black", "mew": 0.6, "elinewidth": 1.2, "capsize": 3, "zorder": 3, **style}
    axes.errorbar(value, row, xerr=bars, ls="none", **look)
