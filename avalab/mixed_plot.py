"""Figures of mixed precision: predicted against measured divergence, and divergence against bytes with the forecast.

The style, the colours and the checks are those of `marks`. A subject `single ...` is one choice measured alone; it is
drawn hollow. What it does not do: measure, fit or test.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes

from avalab import marks, tables
from avalab.experiment import Record

SINGLE = "single "


@rc_context(marks.STYLE)
def predicted_and_measured(
    records: list[Record], metric: str, *, predicted: str = "predicted_kl_divergence", path: Path | None = None
) -> marks.Picture:
    """Measured `metric` against `predicted` of single choices (hollow) and whole allocations, on logarithmic axes.

    Raises ValueError when no subject has both.
    """
    across, up = tables.measured(records, predicted), tables.measured(records, metric)
    both = [s for s in across if s in up and across[s].value > 0 and up[s].value > 0]
    if not both:
        raise ValueError(f"no subject has both {predicted} and {metric}")
    figure, (axes,) = marks.new_figure(5.6)
    whole = {s: (across[s].value, up[s].value) for s in both if not s.startswith(SINGLE)}
    single = [(across[s].value, up[s].value) for s in both if s.startswith(SINGLE)]
    if single:
        axes.plot(*zip(*single, strict=True), "o", mfc="white", mec=marks.COLOURS[0], ms=6, label="one layer alone")
    for number, (subject, _) in enumerate(whole.items()):
        label = "whole allocation" if number == 0 else None
        marks.dot(axes, across[subject], up[subject], color=marks.COLOURS[1], marker="D", label=label)
    ends = [min(*(across[s].value for s in both)), max(*(across[s].value for s in both), 0)]
    axes.plot(ends, ends, color=marks.BASELINE_COLOUR, lw=1.2, ls="--", zorder=1, label="measured = predicted")
    _logarithmic(axes)
    marks.place_names(axes, whole, [], [(e, e) for e in ends])
    axes.set(xlabel="expected rise in KL divergence [nats/token]", ylabel=tables.axis_label(up[both[0]]))
    axes.legend(loc="lower right", frameon=False)
    alt = f"{tables.words(metric)} against what was expected: {len(single)} single choices, {len(whole)} allocations."
    return marks.finish(figure, path, alt, records, (metric,))


@rc_context(marks.STYLE)
def forecast(
    records: list[Record],
    metric: str,
    curve: Sequence[tuple[float, float]],
    *,
    baseline: str = "bf16",
    path: Path | None = None,
) -> marks.Picture:
    """Measured `metric` of every artefact against its bytes, and the forecast of a curve of (bytes, divergence)."""
    sizes, values = tables.measured(records, "artifact_bytes", baseline), tables.measured(records, metric, baseline)
    points = {s: (tables.scaled(sizes[s])[0], tables.scaled(values[s])[0]) for s in sizes if s in values}
    figure, (axes,) = marks.new_figure(6.0)
    marks.scale_y(axes, [y for _, y in points.values()])
    line = [(1e-6 * size, cost) for size, cost in curve]
    axes.plot(*zip(*line, strict=True), color="0.5", lw=1.4, zorder=1, label="forecast of the allocation")
    for subject, style in marks.subject_styles(records, baseline, points).items():
        marks.dot(axes, sizes[subject], values[subject], **style)
    axes.set(xlabel=tables.axis_label(sizes[baseline]), ylabel=tables.axis_label(values[baseline]))
    marks.relative_axis(axes, points[baseline][0], baseline)
    marks.place_names(axes, points, [s for s in points if marks.family(s) == "ava"], line)
    axes.legend(loc="upper right", frameon=False)
    least = min((s for s in points if s != baseline), key=lambda s: points[s][1])
    alt = f"{tables.words(metric)} against file size of {len(points)} artefacts. Lowest: {least}."
    return marks.finish(figure, path, alt, records, (metric, "artifact_bytes"))


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
