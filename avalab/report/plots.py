"""Six kinds of picture over one frame of records, and the figures of the notebooks as calls of them.

1. `points`: values with intervals, a panel for each metric, a row for each subject.
2. `pareto`: two metrics against each other, every subject with its name, and the stairs of the Pareto front.
3. `bars`: parts of a whole, one behind the other.
4. `lines`: curves, each a series of a tidy frame.
5. `heat_map`: what changing one module does to the model.
6. `predicted_against_measured`: their ratio and the band that is allowed for it; `predicted_and_measured`: both.

A figure starts from `tables.frame` of the records. An axis label ends in a unit, the baseline always has the same
colour, intervals are the records' own. A family of methods (the word before the first hyphen) has a colour and a
marker, parts of bars have hatches: nothing depends on colour alone. What was recorded without a value is named below.
A figure comes back as a `style.Picture`, with a description of what it shows inside; where records lack what it shows,
it raises ValueError naming what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from avalab.lab.errors import InputError
from avalab.lab.run import Record
from avalab.report import style
from avalab.report.style import BASELINE_COLOUR, COLOURS, STYLE, Picture, Records, baseline_line, family, subject_styles
from avalab.report.tables import (
    axis_label,
    components,
    described,
    frame,
    measured,
    metric_words,
    number,
    predictions,
    value_text,
)

# What is predicted before it is measured, and the error that the design allows the prediction.
BANDS = {"artifact_bytes": 0.01, "peak_rss_bytes": 0.15, "peak_vram_bytes": 0.15}

REJECTED, ALONE = "rejected_share", "rejected_alone_share"  # by a gate; by no other gate

SINGLE = "single "  # how a subject begins that is one choice measured alone

WINDOW = 15  # steps of the running median of a training loss

_JOINED = re.compile(r"\w+-s[\d.]+")  # `wanda-s50` is joined to the other shares of wanda; `wanda-2of4` stands alone

# --- 1. points with intervals ---


@rc_context(STYLE)
def points(
    records: Records,
    metrics: Sequence[str],
    *,
    baseline: str = "bf16",
    dashed: float | None = None,
    dotted: float | None = None,
    labels: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    hollow_at_zero: bool = False,
    limits: tuple[float, float | None] | None = None,
    alt: str,
    path: Path | None = None,
) -> Picture:
    """Values with 95 % intervals, a panel for each of `metrics`, a row for each subject.

    The dashed line is the baseline's value, and a subject needs every metric to get a row; or it stands at `dashed` in
    every panel (`dotted`: a grey one beside it), and a subject needs one of them. `labels` of metrics and `names` of
    subjects replace the usual ones; `hollow_at_zero` empties the markers whose interval holds zero.
    """
    found, needed = frame(records), all if dashed is None else any
    values = [measured(found, metric, baseline if dashed is None else None) for metric in metrics]
    order = values[0].index if dashed is None else found.subject.unique()
    subjects = [s for s in order if needed(s in value.index for value in values)]
    if not subjects:
        raise InputError(f"no {', '.join(metrics)} was recorded with a value")
    figure, panels = style.row_figure(subjects, baseline, len(metrics), names=names)
    looks = subject_styles(found, baseline, subjects)
    for axes, metric, value in zip(panels, metrics, values, strict=True):
        for row, subject in enumerate(subjects):
            if subject in value.index:
                at = value.loc[subject]
                hollow = hollow_at_zero and not (at.low > 0 or at.high < 0)
                style.dot(axes, at, row, **looks[subject], **({"mfc": "white"} if hollow else {}))
        baseline_line(axes, x=value.value[baseline] if dashed is None else dashed)
        if dotted is not None:
            axes.axvline(dotted, color="0.5", lw=1.2, ls=":", zorder=1)
        label = (labels or {}).get(metric) or axis_label(value).replace(", ", ",\n")
        axes.locator_params(axis="x", nbins=6 if len(metrics) < 3 else 4)
        axes.margins(x=0.1)
        axes.set(xlabel=label, xlim=limits)
    return style.finish(figure, path, alt, found, metrics)


def accuracy(
    records: list[Record], metrics: Sequence[str], *, baseline: str = "bf16", path: Path | None = None
) -> Picture:
    """Shares of right answers with 95 % intervals; dashed: the baseline. Paired tests decide, not overlapping bars."""
    shares = "; ".join(f"{s} {value_text(r)}" for s, r in measured(records, metrics[0]).record.items())
    alt = f"{metric_words(metrics[0])}, dashed: {baseline}. {shares}."
    return points(records, metrics, baseline=baseline, limits=(-3, 103), alt=alt, path=path)


def recovery(records: list[Record], parts: Sequence[str], *, path: Path | None = None) -> Picture:
    """Records `recovered:<part>` in per cent; dotted: the student before it was taught, dashed: the teacher."""
    metrics = [f"recovered:{part}" for part in parts]
    labels = {f"recovered:{part}": f"recovered, {part.replace('_', ' ')} [%]" for part in parts}
    shares = "; ".join(f"{s} {share:.0f} %" for s, share in measured(records, metrics[0]).value.items())
    alt = f"Recovered of {parts[0]}, dotted: before, dashed: the teacher. {shares}."
    return points(records, metrics, dashed=100, dotted=0, labels=labels, alt=alt, path=path)


def gaps(records: list[Record], metrics: Sequence[str], *, path: Path | None = None) -> Picture:
    """Paired differences to one artefact each (dashed), named by the detail `against`; `kl_gap:<text>` and so on.

    Hollow: no difference was found.
    """
    found = frame(records)
    said = {"kl_gap": "KL above the single's", "nll_gap": "loss above the single's"}
    shown = found[found.metric.isin(metrics) & found.value.notna()]
    labels = {
        r.metric: f"{said.get(r.name, r.name)},\n{r.part.replace('_', ' ')} [{r.unit}]"
        for r in shown[["metric", "name", "part", "unit"]].itertuples(index=False, name="Row")
    }
    opponents = {r.subject: r.details["against"] for m in reversed(metrics) for r in measured(found, m).record}
    names = {subject: f"{subject} against {other}" for subject, other in opponents.items()}
    first = "; ".join(f"{s} {value_text(r)}" for s, r in measured(found, metrics[0]).record.items())
    alt = f"Gap to the single artefact (dashed), right is worse, hollow: not distinguishable. {first}."
    return points(found, metrics, dashed=0, labels=labels, names=names, hollow_at_zero=True, alt=alt, path=path)


def losses(records: list[Record], part: str, *, baseline: str, path: Path | None = None) -> Picture:
    """The loss of each subject and its paired increase over the baseline, with 95 % intervals; dashed: the baseline."""
    loss, increase = f"answer_loss:{part}", f"answer_loss_rise:{part}"
    measured(records, loss, baseline)  # refuses a baseline without one
    labels = {
        loss: "loss of the right answer [nats/token]",
        increase: "increase over the baseline, paired [nats/token]",
    }
    found = "; ".join(f"{s} {value_text(r)}" for s, r in measured(records, increase).record.items() if s != baseline)
    alt = f"Loss and its increase over {baseline} (dashed), bars: 95 % intervals. Increase: {found}."
    return points(records, (loss, increase), baseline=baseline, labels=labels, alt=alt, path=path)


# --- 2. one metric against another, by name ---


@rc_context(STYLE)
def pareto(
    records: Records,
    x: str = "artifact_bytes",
    y: str = "kl_divergence",
    *,
    baseline: str = "bf16",
    looks: Mapping[str, dict] | None = None,
    names: Mapping[str, str] | None = None,
    legend: Mapping[str, dict] | None = None,
    xlabel: str = "",
    forecast: Sequence[tuple[float, float]] = (),
    path: Path | None = None,
) -> Picture:
    """Two metrics against each other, a name beside each subject, and the stairs of the Pareto front.

    The y axis is logarithmic when its values span a factor of 20, and linear below the smallest decade if one is zero.
    `looks` and `names` of subjects replace the usual ones, a `legend` explains looks, and `forecast` is a curve of what
    was expected, as shown.
    """
    found = frame(records)
    across, up = measured(found, x, baseline), measured(found, y, baseline)
    where = style.positions(across, up)
    signs = [-1 if described(metric).higher_is_better else 1 for metric in (x, y)]
    front = [
        (a * signs[0], b * signs[1]) for a, b in pareto_front((a * signs[0], b * signs[1]) for a, b in where.values())
    ]
    best = [s for s in where if where[s] in front]
    stairs = [front[0], *[p for (_, b), (c, d) in pairwise(front) for p in ((c, b), (c, d))]]
    figure, (axes,) = style.new_figure(6.4)
    style.scale_y(axes, (b for _, b in where.values()))
    axes.margins(x=0.14, y=0.08)
    axes.plot(*zip(*stairs, strict=True), color="0.6", zorder=1)
    if forecast:
        axes.plot(
            *zip(*forecast, strict=True), color="0.3", lw=1.4, ls="-.", zorder=1, label="forecast of the allocation"
        )
        axes.legend(loc="upper right", frameon=False)
    style.dots(axes, across, up, looks or subject_styles(found, baseline, where))
    axes.set_title("grey stairs: Pareto front, its members in bold; bars: 95 % intervals")
    axes.set(xlabel=xlabel or axis_label(across), ylabel=axis_label(up))
    style.relative_axis(axes, where[baseline][0], baseline)
    if legend:
        style.legend_above(figure, legend, columns=7)
    shown = {s: (names or {}).get(s, s) for s in where}
    style.place_names(
        axes, {shown[s]: at for s, at in where.items()}, bold={shown[s] for s in best}, drawn=[stairs, forecast]
    )
    order = sorted(best, key=lambda s: where[s]) if looks else best
    drawn = f"{metric_words(y)} against {metric_words(x)} of {len(where)} subjects"
    alt = f"{drawn}. On the Pareto front: {', '.join(order)}."
    return style.finish(figure, path, alt, found, (x, y))


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, smaller being better, sorted by the first (Pareto 1906)."""
    points = set(points)
    return sorted(p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points))


# --- 3. bars ---


def bars(axes: Axes, parts: pandas.DataFrame, looks: Sequence[dict] = ()) -> pandas.Series:
    """A row of bars for each row of `parts`, a column behind the other; returns where each row ends."""
    ends = parts.cumsum(axis=1)
    for i, name in enumerate(parts):
        look = {"color": COLOURS[i % 10], "hatch": style.HATCHES[i % 7]} if i >= len(looks) else looks[i]
        left = ends[name] - parts[name]
        axes.barh(range(len(parts)), parts[name], left=left, label=name, height=0.7, edgecolor="0.15", lw=0.5, **look)
    return ends.iloc[:, -1]


@rc_context(STYLE)
def bytes_by_component(records: list[Record], path: Path | None = None, *, baseline: str = "bf16") -> Picture:
    """Stacked bars of `artifact_bytes:<component>`; a tick marks the predicted total, a line the baseline's total."""
    found = frame(records)
    totals = measured(found, "artifact_bytes", baseline)
    predicted = predictions(found, "artifact_bytes").predicted.reindex(totals.index)
    figure, (axes,) = style.row_figure(totals.index, baseline)
    ends = bars(
        axes, components(found, totals).rename(columns=lambda name: "MLP" if name == "mlp" else name.replace("_", " "))
    )
    halo = [withStroke(linewidth=4.5, foreground="white")]
    axes.plot(predicted, range(len(totals)), "|", ms=18, mew=2.5, color="crimson", zorder=4, label="predicted",
              path_effects=halo)  # fmt: skip
    base = totals.value[baseline]
    for row, (end, size) in enumerate(zip(np.fmax(ends, predicted), totals.value, strict=True)):
        _write_beside(axes, f"{number(size)} MB, {100 * size / base:.1f} %", end, row)
    baseline_line(axes, x=base)
    axes.set(xlabel="size of the weight files [MB]", xlim=(0, 1.22 * totals.value.max()))
    style.legend_above(figure, columns=8)
    alt = f"Bytes by component of {len(totals)} artefacts; dashed: {baseline}, {number(base)} MB; the tick: predicted."
    return style.finish(figure, path, alt, found, ("artifact_bytes",))


@rc_context(STYLE)
def rejections(records: list[Record], *, path: Path | None = None) -> Picture:
    """Bars of the share of candidates that each gate rejects, first the part that no other gate rejects."""
    found = frame(records)
    whole, alone = measured(found, REJECTED), measured(found, ALONE)
    if whole.empty or set(whole.index) != set(alone.index):
        has = {name: ", ".join(rows.index) or "nothing" for name, rows in ((REJECTED, whole), (ALONE, alone))}
        raise InputError(", ".join(f"{name} of {gates}" for name, gates in has.items()))
    figure, (axes,) = style.row_figure(whole.index, baseline="")
    parts = pandas.DataFrame(
        {"by this gate alone": alone.value, "by others, too": whole.value - alone.value}, whole.index
    )
    bars(axes, parts, [{"color": COLOURS[0], "hatch": style.HATCHES[1]}, {"color": "0.85"}])
    said = {gate: f"{r.value:.0f} %, alone {alone.value[gate]:.0f} %" for gate, r in whole.iterrows()}
    for row, (gate, text) in enumerate(said.items()):
        axes.plot(whole.loc[gate, ["low", "high"]], [row, row], color="black", lw=1.2)
        _write_beside(axes, text, whole.high[gate], row)
    axes.set(xlabel="share of the candidates rejected [%]", xlim=(0, 1.35 * max(10.0, whole.high.max())))
    style.legend_above(figure, columns=2)
    listed = "; ".join(f"{gate} {text}" for gate, text in said.items())
    return style.finish(figure, path, f"Rejected by each gate, bars: 95 % intervals. {listed}.", found, (REJECTED,))


def _write_beside(axes: Axes, text: str, end: float, row: int) -> None:
    axes.annotate(text, (end, row), (6, 0), textcoords="offset points", va="center", fontsize=9)


# --- 4. lines ---


def lines(axes: Axes, curves: pandas.DataFrame, looks: Mapping[str, dict]) -> None:
    """A line for each `series` of a tidy frame with `x`, `value`, `low` and `high`, the interval as error bars."""
    for series, curve in curves.groupby("series", sort=False):
        style.line(axes, curve.sort_values("x"), label=series, **looks[series])


@rc_context(STYLE)
def loss_curves(
    records: list[Record], *, metric: str = "train_loss", scale: str = "log", path: Path | None = None
) -> Picture:
    """Training loss against tokens, a curve for each `train_loss` record: each step thin, on top its running median.

    Held-out losses are the markers. A step of rehearsal rows has a loss near zero: its targets are the base's own.
    Another `metric` whose records hold `samples`, one a step, is drawn alike.
    """
    curves = [record for record in records if record.metric == metric and record.samples]
    if not curves:
        raise InputError(f"no {metric} record with samples; record a training run first")
    figure, (axes,) = style.new_figure(3.6)
    for curve, look in zip(curves, style.looks(map(str, range(len(curves)))).values(), strict=True):
        tokens, held_out = curve.details["tokens"], curve.details.get("held_out")
        axes.plot(tokens, curve.samples, color=look["color"], lw=0.6, alpha=0.5)
        axes.plot(tokens, running_median(curve.samples), color=look["color"], lw=2, label=f"{curve.subject}, training")
        if held_out:
            label = f"{curve.subject}, held out"
            axes.plot(*zip(*held_out, strict=True), ls="none", mec="black", label=label, **look)
    words, unit = metric_words(metric), curves[0].unit
    axes.set(xlabel="training tokens [1]", ylabel=f"{words} [{unit}]", yscale=scale)
    style.legend_above(figure, columns=3)
    alt = (
        f"{words.capitalize()} against tokens. "
        + "; ".join(f"{c.subject}: {c.samples[0]:.2f} to {c.value:.3f}" for c in curves)
        + "."
    )
    return style.finish(figure, path, alt, records, [metric])


def running_median(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """The median of each value and up to `window - 1` values before it."""
    return pandas.Series(values).rolling(window, min_periods=1).median().tolist()


@rc_context(STYLE)
def curves(
    records: list[Record], metrics: Sequence[str], *, baseline: str = "bf16", apart: float = 0, path: Path | None = None
) -> Picture:
    """Each of `metrics` against the share of weights that is gone (`sparsity`), a panel each; dashed: the baseline.

    A score's shares are joined; hollow points, which no line joins, are named in the first panel. `apart` moves the
    scores sideways by as many per cent, where their error bars would hide each other.
    """
    found = frame(records)
    shares = 100 * measured(found, "sparsity", baseline).value
    figure, panels = style.new_figure(5.0, len(metrics), sharey=False)
    for axes, metric in zip(panels, metrics, strict=True):
        value = measured(found, metric, baseline)
        joined, alone = _joined_and_alone(value.assign(x=shares).dropna(subset="x"), baseline, apart)
        looks = subject_styles(found, baseline, value.index)
        last = joined.drop_duplicates("series", keep="last").set_index("series").subject
        dashed = zip(last.items(), style.DASHES * len(last), strict=False)
        lines(axes, joined, {score: looks[subject] | {"ls": dash} for (score, subject), dash in dashed})
        style.dot(axes, 0, value.loc[baseline], **looks[baseline])
        for subject, row in alone.iterrows():
            style.dot(axes, row.x, row, **looks[subject], mfc="white")
        style.scale_y(axes, value.value)
        baseline_line(axes, y=value.value[baseline])
        axes.set(xlabel="weights removed from the linear layers [%]", ylabel=axis_label(value))
        if axes is panels[0]:  # the same markers mean the same in the others
            named = {s: (row.x, row.value) for s, row in alone.iterrows()}
            drawn = [list(zip(curve.x, curve.value, strict=True)) for _, curve in joined.groupby("series")]
    style.legend_above(figure, columns=6)
    style.place_names(panels[0], named, drawn=drawn)
    drawn = " and ".join(map(metric_words, metrics))
    alt = f"{drawn} against sparsity, dashed: {baseline}. Highest: {value.value.idxmax()}."
    return style.finish(figure, path, alt, found, metrics)


def _joined_and_alone(
    value: pandas.DataFrame, baseline: str, apart: float
) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """The line of each score from the baseline on, moved by `apart` from the next; and the points of other patterns."""
    value = value.assign(subject=value.index, series=value.index.map(family))
    shares = [subject for subject in value.index if _JOINED.fullmatch(subject)]
    scores = list(value.series[shares].unique())
    moved = value.loc[shares].assign(x=lambda f: f.x + apart * (f.series.map(scores.index) - (len(scores) - 1) / 2))
    starts = [value.loc[[baseline]].assign(series=score, low=np.nan, high=np.nan) for score in scores]
    return pandas.concat([*starts, moved]), value.drop([baseline, *shares])


@rc_context(STYLE)
def by_tokens(records: list[Record], part: str, *, path: Path | None = None) -> Picture:
    """Records `recovered:<part>` in per cent against `train_tokens` of a subject; stages of a recipe are joined.

    The dashed line is the bf16 model, the dotted one the start.
    """
    found = frame(records)
    shares = measured(found, f"recovered:{part}").assign(x=measured(found, "train_tokens").value)
    shares = shares.dropna(subset="x").sort_values("x", kind="stable")
    if shares.empty:
        raise InputError(f"no subject has both recovered:{part} and train_tokens")
    figure, (axes,) = style.new_figure(4.2)
    looks = subject_styles(found, "", shares.index)
    lines(axes, shares.assign(series=shares.index.map(family)), {family(s): look for s, look in looks.items()})
    axes.axhline(0, color="0.5", lw=1.2, ls=":", zorder=1)
    baseline_line(axes, y=100)
    axes.set(xscale="log", xlabel="tokens read while training [1]", ylabel=f"recovered, {part.replace('_', ' ')} [%]")
    axes.margins(x=0.2)
    where = {s: (row.x, row.value) for s, row in shares.iterrows()}
    style.place_names(axes, where, drawn=[where.values()])
    told = "; ".join(f"{s} {share:.0f} %" for s, share in shares.value.items())
    alt = f"Recovered of {part} by tokens of training, dashed: the bf16 model, dotted: untrained. {told}."
    return style.finish(figure, path, alt, found, (f"recovered:{part}",))


# --- 5. heat map ---


@rc_context(STYLE)
def heat_map(records: list[Record], metric: str = "kl_divergence", path: Path | None = None) -> Picture:
    """What changing one module does to the model: subjects `layer 07/mlp.down_proj`, columns layers, rows kinds.

    The value is the increase over the unchanged model, which is zero.
    """
    found = frame(records)
    cells = measured(found[found.subject.str.startswith("layer ")], metric)
    if cells.empty:
        raise InputError(f"no {metric} of a subject like 'layer 07/mlp.down_proj' among {len(found)} records")
    cells[["layer", "kind"]] = [subject.split("/", 1) for subject in cells.index]
    grid = cells.pivot(index="kind", columns="layer", values="value").loc[cells.kind.unique()]
    grid.columns = [int(layer.split()[1]) for layer in grid]
    figure, (axes,) = style.new_figure(2.0 + 0.32 * len(grid))
    label = axis_label(cells).replace(" [", "\nincrease over base [")
    style.colour_cells(axes, grid, label=label)
    worst = cells.loc[cells.value.idxmax()]
    corner = (grid.columns.get_loc(int(worst.layer.split()[1])), grid.index.get_loc(worst.kind))
    halo = [withStroke(linewidth=5, foreground="white")]  # the largest cell is as dark as its frame
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec="black", lw=2, clip_on=False, path_effects=halo))
    alt = f"Largest increase (framed): {worst.layer}, {worst.kind}, {value_text(worst.record)}"
    axes.set(xlabel="layer [index from 0]", ylabel="", title=alt)
    return style.finish(figure, path, alt, found, (metric,))


# --- 6. what was predicted, and measured ---


@rc_context(STYLE)
def predicted_against_measured(
    records: list[Record],
    path: Path | None = None,
    *,
    baseline: str = "bf16",
    bands: Mapping[str, float] = BANDS,
) -> Picture:
    """Measured over predicted of the artefact's bytes and the peak memory, and the band that the design allows.

    The prediction for `peak_rss_bytes` is recorded as `predicted_bytes:peak_rss`, and so on; `bands` names the metrics.
    """
    found = frame(records)
    ratios = {metric: pairs.value / pairs.predicted for metric in bands if len(pairs := predictions(found, metric))}
    if not ratios:
        expected = "predicted_bytes:artifact, :peak_rss or :peak_vram"
        raise InputError(f"no prediction among {len(found)} records; expected {expected}")
    subjects = sorted(dict.fromkeys(s for each in ratios.values() for s in each.index), key=lambda s: s != baseline)
    figure, panels = style.row_figure(subjects, baseline, len(ratios))
    outside = []
    for axes, (metric, ratio) in zip(panels, ratios.items(), strict=True):
        band = bands[metric]
        axes.axvspan(1 - band, 1 + band, color="0.88", zorder=0)
        axes.axvline(1, color="0.5", lw=1, zorder=1)
        for subject, look in subject_styles(found, baseline, ratio.index).items():
            at = (ratio[subject], subjects.index(subject))
            style.dot(axes, *at, **look)
            if abs(ratio[subject] - 1) > band:
                axes.annotate(f"{at[0]:.3f}", at, (0, 7), textcoords="offset points", ha="center", fontsize=8)
                outside.append(f"{subject} {metric_words(metric)} {at[0]:.3f}")
        widest = max(2 * band, 1.3 * (ratio - 1).abs().max())
        title = f"{metric_words(metric)}, band ±{band:.0%}"
        axes.set(xlim=(1 - widest, 1 + widest), title=title, xlabel="measured / predicted [1]")
    alt = f"Measured over predicted. Outside the band: {', '.join(outside) or 'none'}."
    return style.finish(figure, path, alt, found, tuple(ratios))


@rc_context(STYLE)
def predicted_and_measured(
    records: list[Record], metric: str, *, predicted: str = "predicted_kl_divergence", path: Path | None = None
) -> Picture:
    """Measured `metric` against `predicted` of single choices (hollow) and whole allocations, on logarithmic axes."""
    found = frame(records)
    across, up = (rows[rows.value > 0] for rows in (measured(found, predicted), measured(found, metric)))
    where = style.positions(across, up)
    if not where:
        raise InputError(f"no subject has both {predicted} and {metric}")
    single = [at for s, at in where.items() if s.startswith(SINGLE)]
    whole = {s: at for s, at in where.items() if not s.startswith(SINGLE)}
    figure, (axes,) = style.new_figure(5.6)
    axes.plot(*np.reshape(single, (-1, 2)).T, "o", mfc="white", mec=COLOURS[0], ms=6, label="one layer alone")
    for subject in whole:
        style.dot(axes, across.loc[subject], up.loc[subject], color=COLOURS[1], marker="D")
    axes.plot([], [], "D", color=COLOURS[1], mec="black", mew=0.6, label="whole allocation")
    ends = [min(a for a, _ in where.values()), max(a for a, _ in where.values())]
    axes.plot(ends, ends, color=BASELINE_COLOUR, lw=1.2, ls="--", zorder=1, label="measured = predicted")
    axes.set(
        xscale="log", yscale="log", xlabel="expected increase in KL divergence [nats/token]", ylabel=axis_label(up)
    )
    axes.legend(loc="lower right", frameon=False)
    style.place_names(axes, whole, drawn=[zip(ends, ends, strict=True)])
    alt = f"{metric_words(metric)} against what was expected: {len(single)} single choices, {len(whole)} allocations."
    return style.finish(figure, path, alt, found, (metric,))
