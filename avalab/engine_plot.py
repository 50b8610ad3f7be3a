"""Figures of the race: quality against memory, latency percentiles, and speed against batch, coloured by engine.

Subjects are `<artefact> in <engine>`. An engine has one colour and one marker in all figures, and the base in torch is
the baseline; an artefact has one line style. Pass the records of one thread count. Style and checks are those of
`marks`. What it does not do: measure, choose or average.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from avalab import marks, tables
from avalab.experiment import Record

BASELINE = "bf16 in torch"
ENGINES = ("torch", "openvino", "onnx", "llamacpp", "vllm", "tensorrt")  # others follow in order of appearance
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
PERCENTILES = {"p50": "o", "p95": "^", "p99": "D"}


@rc_context(marks.STYLE)
def front(
    records: list[Record],
    quality: str,
    *,
    memory: str = "peak_rss_bytes:engine",
    baseline: str = BASELINE,
    path: Path | None = None,
) -> marks.Picture:
    """A quality metric against peak memory, a point each subject, and the stairs of the Pareto front.

    Raises ValueError when the baseline lacks one of the metrics.
    """
    across, up = (tables.measured(records, metric, baseline) for metric in (memory, quality))
    points = {s: (tables.scaled(across[s])[0], tables.scaled(up[s])[0]) for s in across if s in up}
    sign = -1 if tables.described(quality).higher_is_better else 1
    best = _front({s: (a, sign * b) for s, (a, b) in points.items()})
    figure, (axes,) = marks.new_figure(6.0)
    marks.scale_y(axes, [b for _, b in points.values()])
    corners = [points[s] for s in best]
    stairs = [corners[0], *[p for (_, b), (c, d) in pairwise(corners) for p in ((c, b), (c, d))]]
    axes.plot(*zip(*stairs, strict=True), color="0.6", zorder=1)
    for subject in points:
        marks.dot(axes, across[subject], up[subject], **_look(records, subject, baseline))
    axes.margins(x=0.14, y=0.1)
    label = tables.axis_label(across[baseline]).replace("peak memory, engine", "peak memory above the runtime")
    axes.set(xlabel=label, ylabel=tables.axis_label(up[baseline]))
    marks.place_names(axes, {s.partition(" in ")[0] + _suffix(s, points): p for s, p in points.items()}, [], stairs)
    _legend(figure, records, points, baseline)
    alt = f"{tables.words(quality)} against memory of {len(points)} subjects. On the Pareto front: {', '.join(best)}."
    return marks.finish(figure, path, alt, records, (memory, quality))


@rc_context(marks.STYLE)
def latencies(
    records: list[Record], metrics: Sequence[str], *, baseline: str = BASELINE, path: Path | None = None
) -> marks.Picture:
    """50th, 95th and 99th percentile of each of `metrics` (without `:p50`), a panel each, a row each subject.

    Raises ValueError when the baseline lacks one of the metrics.
    """
    values = {(m, p): tables.measured(records, f"{m}:{p}", baseline) for m in metrics for p in PERCENTILES}
    subjects = {s: None for s in values[metrics[0], "p50"] if all(s in value for value in values.values())}
    figure, panels = marks.row_figure(subjects, baseline, panels=len(metrics))
    for axes, metric in zip(panels, metrics, strict=True):
        for row, subject in enumerate(subjects):
            colour = _look(records, subject, baseline)["color"]
            ends = [tables.scaled(values[metric, p][subject])[0] for p in PERCENTILES]
            axes.plot(ends, [row] * len(ends), "-", color=colour, lw=1, zorder=2)
            for end, (percentile, marker) in zip(ends, PERCENTILES.items(), strict=True):
                look = {"mfc": colour if percentile == "p50" else "white", "mec": colour, "ms": 7, "zorder": 3}
                axes.plot(end, row, marker, ls="none", label=None if row else percentile, **look)
        shown = values[metric, "p50"][baseline]
        axes.axvline(tables.scaled(shown)[0], color=marks.BASELINE_COLOUR, lw=1.2, ls="--", zorder=1)
        axes.set(xscale="log", xlabel=_shortened(tables.axis_label(shown)))
        _plain_ticks(axes.xaxis, *axes.get_xlim())
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    fastest = min(subjects, key=lambda s: values[metrics[-1], "p50"][s].value)
    alt = f"Percentiles of {' and '.join(map(tables.words, metrics))}; dashed: {baseline}. Fastest at last: {fastest}."
    return marks.finish(figure, path, alt, records, [f"{metric}:p50" for metric in metrics])


@rc_context(marks.STYLE)
def batches(records: list[Record], *, baseline: str = BASELINE, path: Path | None = None) -> marks.Picture:
    """Prefill and decode speed of all sequences together against their number, a line each subject.

    Raises ValueError when nothing was measured in batches.
    """
    metrics, lines = ("prefill_tokens_per_s", "decode_tokens_per_s"), {}
    for record in records:
        name, _, part = record.metric.partition(":")
        if name in metrics and re.fullmatch(r"batch\d+", part) and record.value is not None:
            lines.setdefault((name, record.subject), {})[int(part[5:])] = record
    if not lines:
        raise ValueError(f"nothing was measured in batches among {len(records)} records")
    figure, panels = marks.new_figure(5.2, len(metrics))
    subjects = list(dict.fromkeys(subject for _, subject in lines))
    for axes, metric in zip(panels, metrics, strict=True):
        for subject, dash in zip(subjects, DASHES * len(subjects), strict=False):
            points = sorted(lines.get((metric, subject), {}).items())
            look = _look(records, subject, baseline) | {"ls": dash, "lw": 1.3, "ms": 6, "mec": "black", "mew": 0.5}
            look.pop("markersize", None)
            axes.plot([n for n, _ in points], [r.value for _, r in points], label=subject, **look)
        axes.set(xscale="log", yscale="log", xlabel="sequences at once [1]", title=tables.words(metric))
        axes.set_xticks(sorted({n for line in lines.values() for n in line}), minor=False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        _plain_ticks(axes.yaxis, *axes.get_ylim())
    panels[0].set_ylabel("all sequences together [tokens/s]")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    most = max((r.value, s) for (m, s), line in lines.items() if m == metrics[1] for r in line.values())
    alt = f"Speed against batch of {len(subjects)} subjects. Fastest decode: {most[1]}, {most[0]:.0f} tokens/s."
    return marks.finish(figure, path, alt, records, [f"{metrics[1]}:batch"])


def _front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Subjects that no other one beats in both coordinates, smaller being better, from the left."""
    kept = [
        s for s, (a, b) in points.items() if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in points.values())
    ]
    return sorted(kept, key=points.get)


def _look(records: list[Record], subject: str, baseline: str) -> dict:
    if subject == baseline:
        return {"color": marks.BASELINE_COLOUR, "marker": "*", "markersize": 13}
    place = _engines(records).index(_engine(subject))
    return {"color": marks.COLOURS[place % 10], "marker": marks.MARKERS[place % len(marks.MARKERS)]}


def _engines(records: list[Record]) -> list[str]:
    return list(dict.fromkeys([*ENGINES, *(_engine(r.subject) for r in records)]))


def _engine(subject: str) -> str:
    return subject.rpartition(" in ")[2]


def _suffix(subject: str, points: dict) -> str:
    """The engine, where the artefact's name alone would not tell two points apart."""
    name, _, engine = subject.partition(" in ")
    return f", {engine}" if sum(other.startswith(f"{name} in ") for other in points) > 1 else ""


def _legend(figure: Figure, records: list[Record], points: dict, baseline: str) -> None:
    present = {_engine(s) for s in points}
    looks = {e: _look(records, f"x in {e}", "") for e in _engines(records) if e in present}
    drawn = [Line2D([], [], ls="none", mec="black", mew=0.5, ms=8, **look) for look in looks.values()]
    star = Line2D([], [], ls="none", color=marks.BASELINE_COLOUR, marker="*", ms=12)
    figure.legend([star, *drawn], [baseline, *looks], loc="outside upper left", ncols=7, frameon=False)


def _plain_ticks(axis: Axis, low: float, high: float) -> None:
    """Ticks 1, 2, 5, 10 ... on a short logarithmic axis, powers of ten on a long one, without exponents."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _shortened(label: str) -> str:
    """`time to first token, prompt 512 [ms]` for a label that ends in the percentile."""
    return re.sub(r",? ?prompt(\d+):?,? ?p50", r", prompt of \1", label)
