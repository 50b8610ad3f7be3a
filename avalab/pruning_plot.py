"""Figures of pruning: quality against sparsity, one line a score, and speed against size.

The style, the colours and the checks are those of `marks`. A subject is named by its score, its pattern and its share
(`wanda-s50`, `wanda-2of4`, `influence-layers-s20`); those without a pattern are joined to one line a score, the others
stand alone, hollow, with their name. What it does not do: measure, test or average.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from avalab import marks, tables
from avalab.experiment import Record

_JOINED = re.compile(r"\w+-s[\d.]+")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


@rc_context(marks.STYLE)
def curves(
    records: list[Record],
    metrics: Sequence[str],
    *,
    baseline: str = "bf16",
    apart: float = 0.0,
    path: Path | None = None,
) -> marks.Picture:
    """Each of `metrics` against the share of weights that is gone (`sparsity`), a panel each; dashed: the baseline.

    Hollow points, which no line joins, are named in the first panel. `apart` moves the scores sideways from each other
    by as many per cent, where their error bars would hide each other.

    Raises ValueError when the baseline lacks one of the metrics or nothing has a sparsity.
    """
    shares = tables.measured(records, "sparsity", baseline)
    figure = Figure((marks.WIDTH_INCHES, 5.0), dpi=marks.DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        values = tables.measured(records, metric, baseline)
        shifts = _shifts([s for s in values if _JOINED.fullmatch(s)], apart)
        points = {s: (100 * shares[s].value + shifts.get(s, 0), value) for s, value in values.items() if s in shares}
        alone, drawn = _draw_lines(axes, records, points, baseline)
        marks.scale_y(axes, [tables.scaled(value)[0] for _, value in points.values()])
        level = tables.scaled(values[baseline])[0]
        axes.axhline(level, color=marks.BASELINE_COLOUR, lw=1.2, ls="--", zorder=1)
        if alone and axes is panels[0]:  # the same markers mean the same in the others
            marks.place_names(axes, alone, [], drawn)
        axes.set(xlabel="weights removed from the linear layers [%]", ylabel=tables.axis_label(values[baseline]))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=6, frameon=False)
    worst = max(values, key=lambda s: values[s].value)
    alt = f"{' and '.join(map(tables.words, metrics))} against sparsity, dashed: {baseline}. Highest: {worst}."
    return marks.finish(figure, path, alt, records, metrics)


@rc_context(marks.STYLE)
def speed_up(
    records: list[Record],
    metrics: Sequence[str] = ("prefill_tokens_per_s", "decode_tokens_per_s"),
    *,
    baseline: str = "bf16",
    path: Path | None = None,
) -> marks.Picture:
    """How many times faster against how many times fewer parameters; on the grey line both are the same.

    Bars are the subject's own intervals over the baseline's value. Raises ValueError when the baseline lacks a metric.
    """
    sizes = tables.measured(records, "parameters", baseline)
    figure, panels = marks.new_figure(5.2, len(metrics))
    for axes, metric in zip(panels, metrics, strict=True):
        values = tables.measured(records, metric, baseline)
        ratios = {s: sizes[baseline].value / sizes[s].value for s in values if s in sizes}
        points = {s: (ratio, values[s].value / values[baseline].value) for s, ratio in ratios.items()}
        for subject, style in marks.subject_styles(records, baseline, points).items():
            _draw_ratio(axes, points[subject], values[subject], values[baseline].value, style)
        ends = [1, 1.05 * max(ratios.values())]
        axes.plot(ends, ends, color="0.6", zorder=1)
        corner = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "fontsize": 8, "color": "0.4"}
        axes.text(0.98, 0.02, "grey: as many times faster as smaller", **corner)
        axes.axhline(1, color=marks.BASELINE_COLOUR, lw=1.2, ls="--", zorder=1)
        axes.margins(x=0.5, y=0.2)
        axes.set(xlabel=f"{baseline} parameters / parameters [x]", ylabel=f"speed / {baseline} speed [x]")
        axes.set_title(tables.words(metric))
        marks.place_names(axes, points, [baseline], [(e, e) for e in ends])
    fastest = max(points, key=lambda s: points[s][1])
    alt = f"Speed against size, dashed: {baseline}. Fastest {tables.words(metrics[-1])}: {fastest}."
    return marks.finish(figure, path, alt, records, metrics)


def _shifts(subjects: list[str], apart: float) -> dict[str, float]:
    """How far each subject moves sideways: the scores stand `apart` from each other, around their share."""
    families = list(dict.fromkeys(map(marks.family, subjects)))
    return {s: apart * (families.index(marks.family(s)) - (len(families) - 1) / 2) for s in subjects}


def _draw_lines(
    axes: Axes, records: list[Record], points: dict[str, tuple[float, Record]], baseline: str
) -> tuple[dict[str, tuple[float, float]], list[tuple[float, float]]]:
    """Draw every point, hollow where it stands alone, and the lines of the others.

    Returns the lone points, and one path along all lines: they start at the baseline, so it goes there and back.
    """
    styles, families, alone = marks.subject_styles(records, baseline, points), {}, {}
    for subject, (share, value) in points.items():
        height = tables.scaled(value)[0]
        joined = subject == baseline or bool(_JOINED.fullmatch(subject))
        marks.dot(axes, share, value, **styles[subject] | ({} if joined else {"mfc": "white"}))
        if joined:
            families.setdefault(marks.family(subject), []).append((share, height, subject))
        else:
            alone[subject] = share, height
    start, path = families.pop(baseline), []
    for (family, line), dash in zip(families.items(), DASHES * len(families), strict=False):
        *along, names = zip(*sorted(start + line), strict=True)
        path += [*zip(*along, strict=True), *reversed(list(zip(*along, strict=True)))]
        look = {k: v for k, v in styles[names[-1]].items() if k in ("color", "marker")}
        axes.plot(*along, ls=dash, lw=1.4, zorder=2, label=family, ms=5, **look)
    return alone, path


def _draw_ratio(axes: Axes, point: tuple[float, float], value: Record, base: float, style: dict) -> None:
    bars = None
    if value.low is not None and value.high is not None:
        bars = [[max(0, value.value - value.low) / base], [max(0, value.high - value.value) / base]]
    look = {"markersize": 7, "mec": "black", "mew": 0.6, "elinewidth": 1.2, "capsize": 3, "zorder": 3, **style}
    axes.errorbar(*point, yerr=bars, ls="none", **look)
