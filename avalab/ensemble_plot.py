"""The figure of gaps: how far each ensemble lies above or below the artefact that it is compared with.

One panel a metric, one row an ensemble, a paired difference with its interval in each; the dashed line at zero is the
single artefact, which may be another one in every row and is named beside it. Intervals that touch zero are drawn
hollow: no difference was found. The style and the checks are those of `marks`. What it does not do: test.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context

from avalab import marks, tables
from avalab.experiment import Record


@rc_context(marks.STYLE)
def gaps(records: list[Record], metrics: Sequence[str], *, path: Path | None = None) -> marks.Picture:
    """Records of `metrics`, such as `kl_gap:python_docs`, whose details say `against` whom, a panel each.

    Raises ValueError when none of them was recorded with a value.
    """
    values = [tables.measured(records, metric) for metric in metrics]
    subjects = dict.fromkeys(r.subject for r in records if any(r.subject in value for value in values))
    if not subjects:
        raise ValueError(f"no {', '.join(metrics)} was recorded")
    figure, panels = marks.row_figure(subjects, "", panels=len(metrics))
    names = {s: next(v[s].details["against"] for v in values if s in v) for s in subjects}
    panels[0].set_yticklabels([f"{s} against {names[s]}" for s in subjects])
    styles = marks.subject_styles(records, "bf16", subjects)
    for axes, metric, value in zip(panels, metrics, values, strict=True):
        for row, subject in enumerate(subjects):
            if subject in value:
                _draw(axes, value[subject], row, styles[subject])
        axes.axvline(0, color=marks.BASELINE_COLOUR, lw=1.2, ls="--", zorder=1)
        name, _, part = metric.partition(":")
        unit = next((record.unit for record in value.values()), "")
        axes.margins(x=0.12)
        axes.set(xlabel=f"{GAPS.get(name, name)}, {part.replace('_', ' ')} [{unit}]".replace(", ", ",\n", 1))
    said = "; ".join(f"{s} {tables.show(values[0][s])}" for s in subjects if s in values[0])
    alt = f"Gap to the single artefact (dashed), right is worse, hollow: not distinguishable. {said}."
    return marks.finish(figure, path, alt, records, metrics)


GAPS = {"kl_gap": "KL above the single's", "nll_gap": "loss above the single's"}


def _draw(axes, record: Record, row: int, style: dict) -> None:
    open_ended = record.low is None or record.high is None
    hollow = {"mfc": "white"} if open_ended or record.low <= 0 <= record.high else {}
    marks.dot(axes, record, row, **style | hollow)
