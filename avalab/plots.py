"""Figures: records in, picture out, one style for all of them.

Every figure follows the same rules. An axis label ends in a unit. The baseline is always drawn, always in
`marks.BASELINE_COLOUR`. Intervals are the records' own `low` and `high`. A family of methods (the word before the first
hyphen) has a colour of a colour-blind-safe palette and a marker, parts of bars have hatches: nothing depends on colour
alone. What was recorded without a value is named below the figure, not left out in silence.

A figure comes back as a `Picture` (see `marks`) with a description of what it shows inside. The words and numbers of a
figure are those of `tables`, whose functions for notebooks can be had from here too.

Source: the Pareto front is the set of points that no other point beats on both axes (Pareto 1906).

What it does not do: measure, average or test anything, or see a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from avalab import marks
from avalab.experiment import Record
from avalab.marks import BASELINE_COLOUR, COLOURS, STYLE, Picture, dot, finish, row_figure, subject_styles
from avalab.tables import Table as Table  # for notebooks, like show, show_ratio, table and words
from avalab.tables import axis_label, baseline_first, components, described, measured, number, predicted_record, scaled
from avalab.tables import show as show
from avalab.tables import show_ratio as show_ratio
from avalab.tables import table as table
from avalab.tables import words as words

# What is predicted before it is measured, and the error that the design allows the prediction.
BANDS = {"artifact_bytes": 0.01, "peak_rss_bytes": 0.15, "peak_vram_bytes": 0.15}


@rc_context(STYLE)
def pareto(
    records: list[Record],
    x: str = "artifact_bytes",
    y: str = "kl_divergence",
    *,
    baseline: str = "bf16",
    path: Path | None = None,
) -> Picture:
    """Two metrics against each other, a label beside each subject, and the stairs of the Pareto front.

    The y axis is logarithmic when its values span a factor of 20, and linear below the smallest decade if one is zero.
    Raises ValueError when the baseline lacks one of the metrics.
    """
    across, up = measured(records, x, baseline), measured(records, y, baseline)
    points = {s: (scaled(across[s])[0], scaled(up[s])[0]) for s in across if s in up}
    front = _front(points, x, y)
    best = [s for s in points if points[s] in front]
    figure, (axes,) = marks.new_figure(6.4)
    marks.scale_y(axes, [b for _, b in points.values()])
    stairs = _draw_stairs(axes, front)
    for subject, style in subject_styles(records, baseline, points).items():
        dot(axes, across[subject], up[subject], **style)
    axes.set(xlabel=axis_label(across[baseline]), ylabel=axis_label(up[baseline]))
    marks.relative_axis(axes, points[baseline][0], baseline)
    marks.place_names(axes, points, best, stairs)
    alt = f"{words(y)} against {words(x)} of {len(points)} subjects. On the Pareto front: {', '.join(best)}."
    return finish(figure, path, alt, records, (x, y))


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats, smaller being better in both coordinates; sorted by the first."""
    points = set(points)
    return sorted(p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points))


@rc_context(STYLE)
def heat_map(records: list[Record], metric: str = "kl_divergence", path: Path | None = None) -> Picture:
    """What changing one module does to the model: subjects `layer 07/mlp.down_proj`, columns layers, rows kinds.

    The value is the rise over the unchanged model, which is zero. Raises ValueError when there is no such subject.
    """
    cells = {tuple(s.split("/", 1)): r for s, r in measured(records, metric).items() if s.startswith("layer ")}
    if not cells:
        raise ValueError(f"no {metric} of a subject like 'layer 07/mlp.down_proj' among {len(records)} records")
    rises = {cell: scaled(r)[0] for cell, r in cells.items()}
    layers, kinds = sorted({layer for layer, _ in cells}), list(dict.fromkeys(kind for _, kind in cells))
    figure, (axes,) = marks.new_figure(2.0 + 0.32 * len(kinds))
    label = axis_label(next(iter(cells.values()))).replace(" [", "\nrise over base [")
    marks.colour_cells(axes, rises, layers, kinds, label=label)
    worst = max(rises, key=rises.get)
    corner = (layers.index(worst[0]), kinds.index(worst[1]))
    halo = [withStroke(linewidth=5, foreground="white")]  # the largest cell is as dark as its frame
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec="black", lw=2, clip_on=False, path_effects=halo))
    alt = f"Largest rise (framed): {worst[0]}, {worst[1]}, {show(cells[worst])}"
    axes.set(xlabel="layer [index from 0]", title=alt)
    return finish(figure, path, alt, records, (metric,))


@rc_context(STYLE)
def bytes_by_component(records: list[Record], path: Path | None = None, *, baseline: str = "bf16") -> Picture:
    """Stacked bars of `artifact_bytes:<component>`; a tick marks the predicted total, a line the baseline's total."""
    totals = measured(records, "artifact_bytes", baseline)
    figure, (axes,) = row_figure(totals, baseline)
    ends = marks.stack_bars(axes, totals, components(records, totals))
    base = scaled(totals[baseline])[0]
    for row, record in enumerate(totals.values()):
        end = max(ends[row], _mark_prediction(axes, row, predicted_record(records, record)))
        share = f"{number(scaled(record)[0])} MB, {100 * scaled(record)[0] / base:.1f} %"
        axes.annotate(share, (end, row), (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(base, color=BASELINE_COLOUR, lw=1.2, ls="--")
    axes.set(xlabel="size of the weight files [MB]", xlim=(0, 1.22 * max(scaled(r)[0] for r in totals.values())))
    figure.legend(loc="outside upper left", ncols=8, frameon=False, columnspacing=1.2, handlelength=1.6)
    alt = f"Bytes by component of {len(totals)} artefacts; dashed: {baseline}, {number(base)} MB; the tick: predicted."
    return finish(figure, path, alt, records, ("artifact_bytes",))


@rc_context(STYLE)
def predicted_against_measured(records: list[Record], path: Path | None = None, *, baseline: str = "bf16") -> Picture:
    """Measured over predicted of the artefact's bytes and the peak memory, and the band that the design allows.

    The prediction for `peak_rss_bytes` is recorded as `predicted_bytes:peak_rss`, and so on.
    Raises ValueError when nothing was predicted.
    """
    ratios = {metric: pairs for metric in BANDS if (pairs := _predictions(records, metric))}
    if not ratios:
        expected = "predicted_bytes:artifact, :peak_rss or :peak_vram"
        raise ValueError(f"no prediction among {len(records)} records; expected {expected}")
    subjects = baseline_first({s: None for pairs in ratios.values() for s in pairs}, baseline)
    figure, panels = row_figure(subjects, baseline, panels=len(ratios))
    outside = []
    for axes, (metric, pairs) in zip(panels, ratios.items(), strict=True):
        _draw_band(axes, metric, pairs)
        for subject, style in subject_styles(records, baseline, pairs).items():
            outside += _ratio_dot(axes, list(subjects).index(subject), *pairs[subject], style)
    alt = f"Measured over predicted. Outside the band: {', '.join(outside) or 'none'}."
    return finish(figure, path, alt, records, tuple(ratios))


@rc_context(STYLE)
def speed(records: list[Record], path: Path | None = None, *, baseline: str = "bf16") -> Picture:
    """Prefill and decode rates with intervals, a row for each artefact; the line is the baseline."""
    metrics = ("prefill_tokens_per_s", "decode_tokens_per_s")
    values = [measured(records, metric, baseline) for metric in metrics]
    subjects = baseline_first({s: None for value in values for s in value}, baseline)
    figure, panels = row_figure(subjects, baseline, panels=2)
    for axes, value in zip(panels, values, strict=True):
        for subject, style in subject_styles(records, baseline, value).items():
            dot(axes, value[subject], list(subjects).index(subject), **style)
        axes.axvline(scaled(value[baseline])[0], color=BASELINE_COLOUR, lw=1.2, ls="--", zorder=1)
        axes.set(xlabel=axis_label(value[baseline]))
        axes.set_xlim(left=0)
    fastest = max(values[1], key=lambda s: values[1][s].value)
    alt = f"Speed with 95 % intervals; dashed: {baseline}. Fastest decode: {fastest}, {show(values[1][fastest])}."
    return finish(figure, path, alt, records, metrics)


@rc_context(STYLE)
def latency(
    records: list[Record], path: Path | None = None, *, metric: str = "time_to_first_token_ms", baseline: str = "bf16"
) -> Picture:
    """Every raw sample of a latency and its 50th, 95th and 99th percentile, a row for each artefact.

    The samples may be kept with any record of the metric, such as `time_to_first_token_ms:p50`.
    Raises ValueError when the baseline has no samples.
    """
    sampled = [replace(r, metric=metric) for r in records if r.metric.partition(":")[0] == metric and r.samples]
    timed = measured(sampled, metric, baseline)
    figure, (axes,) = row_figure(timed, baseline)
    for row, (subject, record) in enumerate(timed.items()):
        samples = scaled(record)[3] * np.array(record.samples)
        _draw_samples(axes, row, samples, COLOURS[0] if row else BASELINE_COLOUR)
        if subject == baseline:
            axes.axvline(np.percentile(samples, 50), color=BASELINE_COLOUR, lw=1.2, ls="--", zorder=1)
    axes.set(xlabel=axis_label(timed[baseline]))
    axes.set_xlim(left=0)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    fewest = min(len(r.samples) for r in timed.values())
    alt = f"{words(metric)}: every sample and its percentiles, at least {fewest} samples a row; dashed: {baseline}."
    return finish(figure, path, alt, records, (metric,))


# ------------------------------------------------------------------------------------------------- parts of figures


def _predictions(records: list[Record], metric: str) -> dict[str, tuple[Record, Record]]:
    """Subject -> what was measured and what was predicted, where there are both."""
    return {s: (r, p) for s, r in measured(records, metric).items() if (p := predicted_record(records, r))}


def _draw_band(axes: Axes, metric: str, pairs: dict[str, tuple[Record, Record]]) -> None:
    """The allowed band in grey, on an axis wide enough for it and every measured/predicted."""
    band = BANDS[metric]
    axes.axvspan(1 - band, 1 + band, color="0.88", zorder=0)
    axes.axvline(1, color="0.5", lw=1, zorder=1)
    furthest = max([2 * band, *(1.3 * abs(r.value / p.value - 1) for r, p in pairs.values())])
    title = f"{words(metric)}, band ±{band:.0%}"
    axes.set(xlim=(1 - furthest, 1 + furthest), title=title, xlabel="measured / predicted [1]")


def _draw_samples(axes: Axes, row: int, samples: np.ndarray, colour: str) -> None:
    """A thin mark for each sample of a row, and a marker at each percentile."""
    axes.plot(samples, [row] * len(samples), "|", color="0.55", ms=9, zorder=2)
    for q, marker in ((50, "o"), (95, "^"), (99, "D")):
        look = {"mfc": colour if q == 50 else "none", "mec": colour, "mew": 1.4, "ls": "none", "zorder": 3}
        axes.plot(np.percentile(samples, q), row, marker, ms=8, label=None if row else f"p{q}", **look)


def _ratio_dot(axes: Axes, row: int, actual: Record, predicted: Record, style: dict) -> list[str]:
    """Draw measured/predicted of one subject; outside the band with its value beside it, and its name returned."""
    ratio = actual.value / predicted.value
    dot(axes, ratio, row, **style)
    if abs(ratio - 1) <= BANDS[actual.metric]:
        return []
    axes.annotate(f"{ratio:.3f}", (ratio, row), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    return [f"{actual.subject} {words(actual.metric)} {ratio:.3f}"]


def _mark_prediction(axes: Axes, row: int, predicted: Record | None) -> float:
    """A tick at the predicted total; returns where it is (0 without a prediction)."""
    if predicted is None:
        return 0.0
    x = scaled(predicted)[0]
    style = {"ms": 18, "mew": 2.5, "color": "crimson", "path_effects": [withStroke(linewidth=4.5, foreground="white")]}
    axes.plot(x, row, "|", ls="none", zorder=4, label="predicted" if row == 0 else None, **style)
    return x


def _front(points: dict[str, tuple[float, float]], x: str, y: str) -> list[tuple[float, float]]:
    """Members of the front, the metrics' own directions considered, from the best in x on."""
    across, up = (-1 if described(m).higher_is_better else 1 for m in (x, y))
    return [(across * a, up * b) for a, b in pareto_front((across * a, up * b) for a, b in points.values())]


def _draw_stairs(axes: Axes, front: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Draw the line of steps through the members of a front; returns its corners."""
    stairs = [front[0], *[p for (_, b), (c, d) in pairwise(front) for p in ((c, b), (c, d))]]
    axes.margins(x=0.14)
    axes.plot(*zip(*stairs, strict=True), color="0.6", zorder=1)
    axes.set_title("grey stairs: Pareto front, its members in bold; bars: 95 % intervals")
    return stairs
