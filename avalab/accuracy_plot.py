"""The figure of right and wrong: how many cases each artefact gets right, with the score interval of the share.

One panel a metric, one row an artefact; the baseline's value is the dashed line. The style, the colours and the checks
are those of `marks`. What it does not do: test a difference (overlapping intervals of paired answers decide nothing;
the notebook's table of flips does).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context

from avalab import marks, tables
from avalab.experiment import Record


@rc_context(marks.STYLE)
def accuracy(
    records: list[Record], metrics: Sequence[str], *, baseline: str = "bf16", path: Path | None = None
) -> marks.Picture:
    """Shares with 95 % intervals, a panel for each of `metrics`, a row for each subject that has all of them.

    Raises ValueError when the baseline lacks one of the metrics.
    """
    values = [tables.measured(records, metric, baseline) for metric in metrics]
    subjects = {s: None for s in values[0] if all(s in value for value in values)}
    figure, panels = marks.row_figure(subjects, baseline, panels=len(metrics))
    for axes, value in zip(panels, values, strict=True):
        for subject, style in marks.subject_styles(records, baseline, subjects).items():
            marks.dot(axes, value[subject], list(subjects).index(subject), **style)
        centre, *_, factor = tables.scaled(value[baseline])
        axes.axvline(centre, color=marks.BASELINE_COLOUR, lw=1.2, ls="--", zorder=1)
        axes.set(xlabel=tables.axis_label(value[baseline]).replace(", ", ",\n"), xlim=(-0.03 * factor, 1.03 * factor))
    shares = "; ".join(f"{s} {tables.show(values[0][s])}" for s in subjects)
    alt = f"{tables.words(metrics[0])}, dashed: {baseline}. {shares}."
    return marks.finish(figure, path, alt, records, metrics)
