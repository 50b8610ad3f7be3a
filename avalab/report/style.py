"""One style for all figures, the marks that several share, and the way to save one.

A figure starts with `new_figure` or `row_figure`, in the `STYLE` of matplotlib's `rc_context`; `finish` names what was
recorded without a value and writes a PNG of 900 pixels and at most 100 kB, which is displayed as it is saved. Where a
logarithmic axis has to show a zero, it is linear below a marked threshold (the bi-symmetric log of Webber 2013).
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas
import seaborn
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import BboxBase
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from avalab.lab.run import Record
from avalab.report.tables import frame

WIDTH_INCHES, DPI, MAX_BYTES = 9.0, 100, 100_000

BASELINE_COLOUR = "black"

COLOURS = seaborn.color_palette("colorblind", 10).as_hex()

MARKERS = "osD^vPXph<"

HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++", "oo")

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))

STYLE = {
    **seaborn.axes_style("whitegrid"),
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": "0.5",
    "grid.color": "0.9",
    "hatch.linewidth": 0.6,
}

DOT = {"markersize": 7, "mec": "black", "mew": 0.6, "elinewidth": 1.2, "capsize": 3, "zorder": 3}

MARKER_EDGE = 6 * np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)])  # pixels around a marker's centre

Records = Iterable[Record] | pandas.DataFrame


@dataclass(frozen=True, repr=False)
class Picture:
    """A finished figure; a notebook displays `png`, the content of `path` (None: not saved)."""

    png: bytes
    alt: str
    path: Path | None
    figure: Figure = field(compare=False)

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return self.alt


def new_figure(height: float, panels: int = 1, *, rows: int = 1, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure that pyplot does not know: nothing to close, and a notebook does not show it a second time.

    It has so many panels in each of its `rows`, read as a text is.
    """
    figure = Figure((WIDTH_INCHES, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, panels, sharey=sharey, squeeze=False).flat)


def row_figure(
    subjects: Sequence[str] | pandas.Index, baseline: str, panels: int = 1, *, names: Mapping[str, str] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with one row for each subject or its other name, the first on top, the baseline's in bold."""
    figure, axes = new_figure(1.3 + 0.27 * len(subjects), panels)
    axes[0].set_yticks(range(len(subjects)), [(names or {}).get(subject, subject) for subject in subjects])
    axes[0].set_ylim(len(subjects) - 0.4, -0.6)
    for label, subject in zip(axes[0].get_yticklabels(), subjects, strict=True):
        label.set_fontweight("bold" if subject == baseline else "normal")
    return figure, axes


def finish(figure: Figure, path: Path | None, alt: str, records: Records, metrics: Sequence[str]) -> Picture:
    """Name what has no value, render at most `MAX_BYTES`, and put the file in place with one rename."""
    found = frame(records)
    missing = found.subject[found.metric.isin(metrics) & found.value.isna()]
    if len(missing):
        note = "not measured: " + ", ".join(sorted(set(missing)))
        figure.supxlabel(note if len(note) < 130 else note[:127] + "...", fontsize=9, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    # A palette of 256 colours is a third of the bytes and looks the same.
    small, about = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE), PngInfo()
    about.add_itxt("Description", alt)
    small.save(packed := io.BytesIO(), format="png", optimize=True, pnginfo=about)
    png = packed.getvalue()
    assert len(png) <= MAX_BYTES, f"{len(png)} bytes of PNG: {alt}"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(png)
        temporary.replace(path)
    return Picture(png, alt, path, figure)


def subject_styles(records: Records, baseline: str, wanted: Iterable[str]) -> dict[str, dict]:
    """Colour and marker of the wanted subjects: one pair for a family of all records; the baseline has its own."""
    subjects = [s for s in frame(records).subject.unique() if s != baseline and not s.startswith("layer ")]
    look = looks(dict.fromkeys(family(s) for s in subjects))
    own = {"color": BASELINE_COLOUR, "marker": "*", "markersize": 13}
    return {s: own if s == baseline else look[family(s)] for s in wanted}


def looks(names: Iterable[str]) -> dict[str, dict]:
    """Name -> a colour and a marker of its own."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }


def family(subject: str) -> str:
    """The method a subject belongs to, which decides its colour: the word before the first hyphen of its last step."""
    return subject.rsplit("+", 1)[-1].split("-")[0]


def dot(axes: Axes, across: pandas.Series | float, up: pandas.Series | float, **look) -> None:
    """One marker; a coordinate that is a row of `measured` has its interval as an error bar."""
    places, bars = [], []
    for at in (across, up):
        row = isinstance(at, pandas.Series)
        ends = [[at.value - at.low], [at.high - at.value]] if row else [[np.nan], [np.nan]]
        places.append(at.value if row else at)
        bars.append(None if np.isnan(ends).any() else np.clip(ends, 0, None).tolist())
    axes.errorbar(*places, yerr=bars[1], xerr=bars[0], ls="none", **DOT | look)


def positions(across: pandas.DataFrame, up: pandas.DataFrame) -> dict[str, tuple[float, float]]:
    """Subject -> its point, of those that have both coordinates."""
    return {s: (across.value[s], up.value[s]) for s in across.index if s in up.index}


def dots(axes: Axes, across: pandas.DataFrame, up: pandas.DataFrame, looks: Mapping[str, dict]) -> None:
    """A `dot` for each subject that has a look."""
    for subject, look in looks.items():
        dot(axes, across.loc[subject], up.loc[subject], **look)


def line(axes: Axes, curve: pandas.DataFrame, **look) -> None:
    """A line through `value` at `x`, with the interval from `low` to `high` as error bars where there is one."""
    ends = [(curve.value - curve.low).clip(lower=0), (curve.high - curve.value).clip(lower=0)]
    bars = None if curve.low.isna().all() else np.nan_to_num(ends)
    axes.errorbar(curve.x, curve.value, yerr=bars, **DOT | look)


def baseline_line(axes: Axes, *, x: float | None = None, y: float | None = None) -> None:
    """The dashed line of the baseline: upright at x, or level at y."""
    draw, where = (axes.axvline, x) if y is None else (axes.axhline, y)
    draw(where, color=BASELINE_COLOUR, lw=1.2, ls="--", zorder=1)


def scale_y(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic y axis where the values span a factor of 20, linear below the smallest decade if one is zero."""
    values = list(values)
    positive = [v for v in values if v > 0]
    if min(values) < 0 or not positive or max(positive) / min(positive) < 20:
        return
    if len(positive) == len(values):
        axes.set_yscale("log")
    else:
        threshold = 10.0 ** math.floor(math.log10(min(positive)))
        axes.set_yscale("symlog", linthresh=threshold, linscale=0.3)
        axes.set_ylim(bottom=-0.5 * threshold, top=2 * max(positive))
        axes.axhspan(-0.5 * threshold, threshold, color="0.93", zorder=0)
        note = f"linear below {threshold:g}"
        axes.text(0.01, threshold, note, transform=axes.get_yaxis_transform(), va="top", fontsize=8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def plain_ticks(axis: Axis) -> None:
    """Ticks 1, 2, 5, 10 ... on a short logarithmic axis, powers of ten on a long one, without exponents."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def colour_cells(axes: Axes, grid: pandas.DataFrame, *, label: str) -> None:
    """Colour each cell of a grid, and put a labelled colour bar beside it; logarithmic above a factor of 30.

    On a logarithmic bar the ticks are 0.001, 0.002, 0.005, 0.01 ...: two powers of ten alone cannot be read off.
    """
    low, high = np.nanmin(grid), np.nanmax(grid)
    norm = LogNorm(low, high) if low > 0 and high > 30 * low else Normalize(min(0, low), high)
    names = {"xticklabels": list(grid.columns), "yticklabels": list(grid.index)}
    seaborn.heatmap(grid, ax=axes, norm=norm, cmap="rocket_r", linewidths=0.5, cbar_kws={"label": label}, **names)
    axes.tick_params(axis="both", rotation=0)
    bar = axes.collections[0].colorbar
    if isinstance(norm, LogNorm):
        ticks = LogLocator(subs=(1, 2, 5)).tick_values(low, high)
        bar.set_ticks([tick for tick in ticks if low <= tick <= high])
        bar.set_ticks([], minor=True)
    bar.formatter = FuncFormatter(lambda v, _: f"{v:g}")


def relative_axis(axes: Axes, base: float, baseline: str) -> None:
    """A second scale on top: the same quantity in per cent of the baseline's."""
    axes.axvline(base, color=BASELINE_COLOUR, lw=0.8, ls=":", zorder=0)
    if base > 0:
        top = axes.secondary_xaxis("top", functions=(lambda v: 100 * v / base, lambda p: p * base / 100))
        top.set_xlabel(f"relative to {baseline} [%]")


def legend_above(figure: Figure, looks: Mapping[str, dict] | None = None, *, columns: int, size: float = 10) -> None:
    """A legend above the panels: of `looks` by name, or of the labels that were drawn in the first panel."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    if looks is not None:
        names, handles = list(looks), [Line2D([], [], **{"mec": "black", "mew": 0.6} | look) for look in looks.values()]
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=size)


def place_names(
    axes: Axes, points: dict[str, tuple[float, float]], *, bold: Iterable[str] = (), drawn: Iterable[Iterable] = ()
) -> None:
    """Write each name near its point, clear of names, markers, error bars and the `drawn` polylines.

    Each name starts at the clearest place around its point, and adjustText pushes all of them apart from there. The
    layout is the same every time: it runs for a number of steps, not for a time.
    """
    axes.figure.draw_without_rendering()
    to_pixels, where = axes.transData, np.reshape(list(points.values()), (-1, 2))
    centres = to_pixels.transform(where)
    paths = [to_pixels.transform(np.reshape(list(path), (-1, 2))) for path in drawn]
    paths += [to_pixels.transform(bar.vertices) for bars in axes.collections for bar in bars.get_paths()]
    avoided = np.concatenate([np.empty((0, 2)), *map(_along, paths), *(centre + MARKER_EDGE for centre in centres)])
    look = {"fontsize": 9, "ha": "center", "va": "center", "zorder": 5, "in_layout": False}
    texts, placed = [], []
    for name, point in points.items():
        weight = "bold" if name in bold else "normal"
        texts.append(axes.text(*point, name, fontweight=weight, **look))
        texts[-1].set_path_effects([withStroke(linewidth=2, foreground="white")])
        placed.append(_clearest(texts[-1].get_window_extent(), avoided, placed, axes.bbox))
        middle = placed[-1].get_points().mean(axis=0)
        texts[-1].set_position(to_pixels.inverted().transform(middle))
    x, y = to_pixels.inverted().transform(avoided).T
    adjust_text(
        texts,
        x=x,
        y=y,
        target_x=where[:, 0],
        target_y=where[:, 1],
        avoid_self=False,
        expand=(1.03, 1.15),
        force_explode=0.0,
        force_pull=0.0,
        prevent_crossings=False,
        iter_lim=400,
        ax=axes,
        arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "0.35", "shrinkB": 5},
    )


def _clearest(box: BboxBase, avoided: np.ndarray, placed: list, frame: BboxBase) -> BboxBase:
    """Of the places around a name's point, near ones first, the one that covers least and lies inside the frame."""
    sides = ((1, 0), (-1, 0), (0.9, 1), (-0.9, 1), (0.9, -1), (-0.9, -1), (0, 1), (0, -1))

    def cost(offer: tuple[float, BboxBase]) -> float:
        far, wide = offer[0], offer[1].padded(2)
        outside = not all(frame.contains(x, y) for x, y in wide.get_points())
        return far / 12 + wide.count_contains(avoided) + 10 * wide.count_overlaps(placed) + 100 * outside

    offers = [
        (far, box.translated(across * (box.width / 2 + 8 + far), up * (box.height / 2 + 8 + far)))
        for far in (0, 10, 20, 32, 46, 64)
        for across, up in sides
    ]
    return min(offers, key=cost)[1]


def _along(vertices: np.ndarray, pixels: float = 6) -> np.ndarray:
    """Points on a path, one about every so many pixels."""
    pieces = [vertices[:1]]
    for start, end in pairwise(vertices):
        steps = np.linspace(0, 1, 2 + int(np.linalg.norm(end - start) / pixels))[1:, None]
        pieces.append(start + steps * (end - start))
    return np.concatenate(pieces)
