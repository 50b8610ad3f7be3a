"""The figure of long contexts: time a token and peak memory against the context's length, measured and predicted.

A series is one artefact in one engine with one cache precision, with a colour and a marker of its own. Solid lines join
what was measured (bars: 95 % interval of the median), dashed ones what the formulas of `context` give: for memory
a prediction, for time the bound that reading all bytes sets.

The style and the checks are those of `marks`. What it does not do: measure, predict or average.
"""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from avalab import marks
from avalab.experiment import Record

TIME, TIME_BOUND = "token_latency_ms", "predicted_token_latency_ms"
MEMORY, MEMORY_PREDICTED = "peak_rss_bytes", "predicted_bytes:peak_rss"
_AT = re.compile(r"(?P<name>.+):context(?P<length>\d+):cache(?P<bits>\d+)")

Series = tuple[str, str, int]  # artefact, engine, bits of the cache


@rc_context(marks.STYLE)
def figure(records: list[Record], path: Path | None = None) -> marks.Picture:
    """Two panels over the length of the context: latency a token, and peak memory.

    Records of other metrics are passed over. Raises ValueError when no length was measured.
    """
    found = series_of(records)
    if not any(TIME in metrics for metrics in found.values()):
        raise ValueError(f"no {TIME} at a context length with a value among {len(records)} records")
    figure = Figure((marks.WIDTH_INCHES, 4.6), dpi=marks.DPI, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for index, metrics in enumerate(found.values()):
        look = {"color": marks.COLOURS[index % 10], "marker": marks.MARKERS[index % len(marks.MARKERS)]}
        _draw(left, metrics, (TIME, TIME_BOUND), 1.0, look)
        _draw(right, metrics, (MEMORY, MEMORY_PREDICTED), 1e-6, look)
    lengths = sorted({length for metrics in found.values() for points in metrics.values() for length in points})
    left.set(ylabel="median time a token [ms]", ylim=(0, None))
    right.set(ylabel="peak memory [MB]", ylim=(0, None))
    for axes in (left, right):
        _scale_lengths(axes, lengths)
    _legend(figure, found)
    timed = [r for r in records if (at := _AT.fullmatch(r.metric)) and at["name"] == TIME]
    return marks.finish(figure, path, _alt(found), timed, sorted({r.metric for r in timed}))


def series_of(records: list[Record]) -> dict[Series, dict[str, dict[int, Record]]]:
    """Records with a value as series -> metric -> length -> record; the last one of a length counts."""
    found: dict[Series, dict[str, dict[int, Record]]] = {}
    for record in records:
        at = _AT.fullmatch(record.metric)
        if at and record.value is not None:
            metrics = found.setdefault((record.subject, record.engine, int(at["bits"])), {})
            metrics.setdefault(at["name"], {})[int(at["length"])] = record
    return found


def _draw(axes: Axes, metrics: dict, names: tuple[str, str], factor: float, look: dict) -> None:
    """What was measured as points with bars on a solid line, what was predicted as a dashed line."""
    measured, predicted = (sorted(metrics.get(name, {}).items()) for name in names)
    values = [factor * r.value for _, r in measured]
    bars = [[_below(r, factor) for _, r in measured], [_above(r, factor) for _, r in measured]]
    style = {"ms": 6, "mec": "black", "mew": 0.6, "lw": 1.6, "elinewidth": 1.2, "capsize": 3, **look}
    axes.errorbar([length for length, _ in measured], values, yerr=bars, **style)
    axes.plot([n for n, _ in predicted], [factor * r.value for _, r in predicted], ls="--", lw=1.4, color=look["color"])


def _below(record: Record, factor: float) -> float:
    return 0.0 if record.low is None else max(0.0, record.value - record.low) * factor


def _above(record: Record, factor: float) -> float:
    return 0.0 if record.high is None else max(0.0, record.high - record.value) * factor


def _scale_lengths(axes: Axes, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("context [tokens]")


def _legend(figure: Figure, found: dict[Series, dict]) -> None:
    handles = [
        Line2D([], [], color=marks.COLOURS[i % 10], marker=marks.MARKERS[i % len(marks.MARKERS)], mec="black", mew=0.6,
               label=_name(series))
        for i, series in enumerate(found)
    ]  # fmt: skip
    handles.append(Line2D([], [], color="0.3", ls="--", label="predicted (time: bound by reading)"))
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=9)


def _name(series: Series) -> str:
    subject, engine, bits = series
    return f"{subject} in {engine}, {bits}-bit cache"


def _alt(found: dict[Series, dict]) -> str:
    """A sentence a series: what the longest context measured costs, beside what was predicted."""
    sentences = []
    for series, metrics in found.items():
        if TIME not in metrics:
            continue
        longest = max(metrics[TIME])
        text = f"{_name(series)}, {longest:,} tokens: {metrics[TIME][longest].value:.3g} ms a token"
        if longest in metrics.get(TIME_BOUND, {}):
            text += f" (bound {metrics[TIME_BOUND][longest].value:.3g})"
        if longest in metrics.get(MEMORY, {}):
            text += f", {metrics[MEMORY][longest].value / 1e6:,.0f} MB"
        if longest in metrics.get(MEMORY_PREDICTED, {}):
            text += f" (predicted {metrics[MEMORY_PREDICTED][longest].value / 1e6:,.0f})"
        sentences.append(text)
    return f"Time and memory against the context's length. {'; '.join(sentences)}."
