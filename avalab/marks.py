"""What the figures are drawn with: one style, one way to write a file, and the marks that several figures share.

A figure starts with `new_figure` or `row_figure`, in the `STYLE` of matplotlib's `rc_context`; subjects get their
colours and markers from `subject_styles`; `finish` names what was recorded without a value and writes the PNG. A PNG
is 900 pixels wide and at most 100 kB, and is displayed as it is saved.

Source: a zero has no place on a logarithmic axis: the axis is then linear below a marked threshold (the bi-symmetric
log of Webber 2013).

What it does not do: choose what is drawn (`plots`, `roofline`, `accuracy_plot`), or average and test anything.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from avalab import labels
from avalab.experiment import Record
from avalab.tables import scaled

WIDTH_INCHES, DPI, MAX_BYTES = 9.0, 100, 100_000
BASELINE_COLOUR = "black"
COLOURS = seaborn.color_palette("colorblind", 10).as_hex()
MARKERS = "osD^vPXph<"
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++", "oo")
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


def new_figure(height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure that pyplot does not know: nothing to close, and a notebook does not show it a second time."""
    figure = Figure((WIDTH_INCHES, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])


def row_figure(subjects: dict, baseline: str, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with one row for each subject, the first on top, the baseline's name in bold."""
    figure, axes = new_figure(1.3 + 0.27 * len(subjects), panels)
    first = axes[0]
    first.set_yticks(range(len(subjects)), list(subjects))
    first.set_ylim(len(subjects) - 0.4, -0.6)
    for label in first.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == baseline else "normal")
    return figure, axes


def finish(figure: Figure, path: Path | None, alt: str, records: list[Record], metrics: Sequence[str]) -> Picture:
    """Name what has no value, render at most `MAX_BYTES`, and put the file in place with one rename."""
    missing = {r.subject: r.note for r in records if r.metric in metrics and r.value is None}
    if missing:
        note = "not measured: " + ", ".join(sorted(missing))
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


def subject_styles(records: list[Record], baseline: str, wanted: Iterable[str]) -> dict[str, dict]:
    """Colour and marker of the wanted subjects: one pair for a family of all records; the baseline has its own."""
    subjects = [s for s in dict.fromkeys(r.subject for r in records) if not s.startswith("layer ")]
    families = list(dict.fromkeys(family(s) for s in subjects if s != baseline))
    look = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(families)
    }
    own = {"color": BASELINE_COLOUR, "marker": "*", "markersize": 13}
    return {s: own if s == baseline else look[family(s)] for s in wanted}


def family(subject: str) -> str:
    """The method a subject belongs to, which decides its colour: the word before the first hyphen of its last step."""
    return subject.rsplit("+", 1)[-1].split("-")[0]


def dot(axes: Axes, across: Record | float, up: Record | float, **style) -> None:
    """One marker with the error bars of whichever coordinate is a record with an interval."""
    (x, xerr), (y, yerr) = _with_error(across), _with_error(up)
    style = {"markersize": 7, "mec": "black", "mew": 0.6, "elinewidth": 1.2, "capsize": 3, "zorder": 3, **style}
    axes.errorbar(x, y, yerr=yerr, xerr=xerr, ls="none", **style)


def _with_error(coordinate: Record | float) -> tuple[float, list | None]:
    if not isinstance(coordinate, Record):
        return coordinate, None
    value, low, high, _ = scaled(coordinate)
    return value, None if low is None or high is None else [[max(0, value - low)], [max(0, high - value)]]


def stack_bars(axes: Axes, subjects: Iterable[str], sizes: dict[str, dict[str, float]]) -> np.ndarray:
    """Draw the bars of each component behind those before it; returns where each row ends."""
    ends = np.zeros(len(list(subjects)))
    for i, (name, size) in enumerate(sizes.items()):
        look = {"color": COLOURS[i % 10], "hatch": HATCHES[i % 7], "edgecolor": "0.15", "linewidth": 0.5, "height": 0.7}
        widths = np.array([size.get(s, 0) for s in subjects])
        label = "MLP" if name == "mlp" else name.replace("_", " ")
        axes.barh(range(len(widths)), widths, left=ends, label=label, **look)
        ends = ends + widths
    return ends


def scale_y(axes: Axes, values: list[float]) -> None:
    """A logarithmic y axis where the values span a factor of 20, linear below the smallest decade if one is zero."""
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


def relative_axis(axes: Axes, base: float, baseline: str) -> None:
    """A second scale on top: the same quantity in per cent of the baseline's."""
    axes.axvline(base, color=BASELINE_COLOUR, lw=0.8, ls=":", zorder=0)
    if base > 0:
        top = axes.secondary_xaxis("top", functions=(lambda v: 100 * v / base, lambda p: p * base / 100))
        top.set_xlabel(f"relative to {baseline} [%]")


def colour_cells(axes: Axes, rises: dict[tuple, float], layers: list[str], kinds: list[str], *, label: str) -> None:
    """Colour the cell of each (layer, kind), and put a labelled colour bar beside them."""
    seaborn.heatmap(
        [[rises.get((layer, kind), math.nan) for layer in layers] for kind in kinds],
        ax=axes,
        norm=_colour_scale(list(rises.values())),
        cmap="rocket_r",
        linewidths=0.5,
        cbar_kws={"label": label},
        xticklabels=[int(layer.split()[1]) for layer in layers],
        yticklabels=kinds,
    )
    axes.tick_params(axis="both", rotation=0)
    _plain_ticks(axes.collections[0].colorbar)


def _colour_scale(rises: list[float]) -> Normalize:
    wide = min(rises) > 0 and max(rises) / min(rises) > 30
    return LogNorm(min(rises), max(rises)) if wide else Normalize(min(0, *rises), max(rises))


def _plain_ticks(bar: Colorbar) -> None:
    """Ticks 0.001, 0.002, 0.005, 0.01 ... on a logarithmic colour bar: two powers of ten alone cannot be read off."""
    if isinstance(bar.norm, LogNorm):
        ticks = LogLocator(subs=(1, 2, 5)).tick_values(bar.vmin, bar.vmax)
        bar.set_ticks([tick for tick in ticks if bar.vmin <= tick <= bar.vmax])
        bar.set_ticks([], minor=True)
    bar.formatter = FuncFormatter(lambda v, _: f"{v:g}")


def place_names(axes: Axes, points: dict[str, tuple[float, float]], bold: Sequence[str], line: Sequence) -> None:
    """Write each name near its point, clear of names, markers, error bars and the front's `line`."""
    axes.figure.draw_without_rendering()
    centres = axes.transData.transform(list(points.values()))
    texts = [_name_at(axes, name, point, name in bold) for name, point in points.items()]
    sizes = np.array([[t.get_window_extent().width + 4, t.get_window_extent().height] for t in texts])
    bars = [path.vertices for drawn in axes.collections for path in drawn.get_paths()]
    lines = [axes.transData.transform(path) for path in (line, *bars)]
    chosen = labels.place(centres, sizes, lines=lines, frame=np.array(axes.bbox.extents))
    for text, where, centre in zip(texts, chosen, centres, strict=True):
        text.set_position(tuple(where - centre))


def _name_at(axes: Axes, text: str, point: tuple[float, float], bold: bool) -> Annotation:
    """A name at its point, to be moved by pixels; a thin line leads back to the point."""
    line = {"arrowstyle": "-", "lw": 0.6, "color": "0.35", "shrinkA": 0, "shrinkB": 5}
    look = {"fontsize": 9, "fontweight": "bold" if bold else "normal", "ha": "center", "va": "center", "zorder": 5}
    where = {"xycoords": "data", "textcoords": "offset pixels", "in_layout": False, "arrowprops": line}
    label = axes.annotate(text, point, (0, 0), **look, **where)
    label.set_path_effects([withStroke(linewidth=2, foreground="white")])
    return label
