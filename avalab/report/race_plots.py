"""Figures of the race: who is how fast, in batches, in long contexts, when smaller, and what is worth its memory.

A subject is an artefact in an engine (`nf4 in torch`), and its engine decides colour and marker. Over the context's
length lines are solid through what was measured and dashed through what formulas give: for memory a prediction, for
time the bound that reading all bytes sets. Records that lack what a figure shows raise InputError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas
from matplotlib import rc_context
from matplotlib.ticker import FixedLocator, NullLocator

from avalab.lab.errors import InputError
from avalab.lab.run import Record
from avalab.report import plots, style
from avalab.report.style import BASELINE_COLOUR, DASHES, STYLE, Picture
from avalab.report.tables import axis_label, frame, measured, metric_words

BASELINE = "bf16 in torch"

ENGINES = ("torch", "openvino", "onnx", "llamacpp", "vllm", "tensorrt")  # others follow in order of appearance

PERCENTILES = {"p50": "o", "p95": "^", "p99": "D"}

RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")

TIME, MEMORY = "token_latency_ms", "peak_rss_bytes"

PREDICTED = {TIME: "predicted_token_latency_ms", MEMORY: "predicted_bytes:peak_rss"}

_AT_CONTEXT = r"(?P<quantity>.+):context(?P<x>\d+):cache(?P<bits>\d+)"


def front(
    records: list[Record],
    quality: str,
    *,
    memory: str = "peak_rss_bytes:engine",
    baseline: str = BASELINE,
    path: Path | None = None,
) -> Picture:
    """A quality metric against peak memory, a point each subject, and the stairs of the Pareto front."""
    found = frame(records)
    across, up = measured(found, memory, baseline), measured(found, quality, baseline)
    looks = _looks(found, [s for s in across.index if s in up.index], baseline)
    artefacts = [s.partition(" in ")[0] for s in looks]
    names = {
        s: a if artefacts.count(a) == 1 else s.replace(" in ", ", ") for s, a in zip(looks, artefacts, strict=True)
    }
    legend = {baseline: looks[baseline]} | {_engine(s): look for s, look in looks.items() if s != baseline}
    xlabel = axis_label(across).replace("peak memory, engine", "peak memory above the runtime")
    return plots.pareto(
        found, memory, quality, baseline=baseline, looks=looks, names=names, legend=legend, xlabel=xlabel, path=path
    )


@rc_context(STYLE)
def latencies(
    records: list[Record], metrics: Sequence[str], *, baseline: str = BASELINE, path: Path | None = None
) -> Picture:
    """50th, 95th and 99th percentile of each of `metrics` (without `:p50`), a panel each, a row each subject."""
    found = frame(records)
    values = {
        m: pandas.DataFrame({p: measured(found, f"{m}:{p}", baseline).value for p in PERCENTILES}) for m in metrics
    }
    order = measured(found, f"{metrics[0]}:p50", baseline).index
    subjects = [s for s in order if all(s in value.dropna().index for value in values.values())]
    looks = _looks(found, subjects, baseline)
    figure, panels = style.row_figure(subjects, baseline, len(metrics))
    for axes, (metric, value) in zip(panels, values.items(), strict=True):
        for row, subject in enumerate(subjects):
            colour, ends = looks[subject]["color"], value.loc[subject]
            axes.plot(ends, [row] * len(ends), "-", color=colour, lw=1, zorder=2)
            for percentile, marker in PERCENTILES.items():
                filled = colour if percentile == "p50" else "white"
                label = None if row else percentile
                axes.plot(ends[percentile], row, marker, ls="none", label=label, mfc=filled, mec=colour, ms=7, zorder=3)
        style.baseline_line(axes, x=value.p50[baseline])
        label = axis_label(measured(found, f"{metric}:p50"))
        axes.set(xscale="log", xlabel=re.sub(r",? ?prompt(\d+):?,? ?p50", r", prompt of \1", label))
        style.plain_ticks(axes.xaxis)
    style.legend_above(figure, columns=3)
    fastest = value.p50[subjects].idxmin()
    alt = f"Percentiles of {' and '.join(map(metric_words, metrics))}; dashed: {baseline}. Fastest at last: {fastest}."
    return style.finish(figure, path, alt, found, [f"{metric}:p50" for metric in metrics])


@rc_context(STYLE)
def batches(records: list[Record], *, baseline: str = BASELINE, path: Path | None = None) -> Picture:
    """Prefill and decode speed of all sequences together against their number, a line each subject."""
    found = frame(records)
    sized = found[found.name.isin(RATES) & found.part.str.fullmatch(r"batch\d+") & found.value.notna()]
    if sized.empty:
        raise InputError(f"nothing was measured in batches among {len(found)} records")
    sized = sized.assign(x=sized.part.str.removeprefix("batch").astype(int), series=sized.subject, low=pandas.NA)
    subjects = list(sized.subject.unique())
    dashes = dict(zip(subjects, DASHES * len(subjects), strict=False))
    looks = {
        s: {"markersize": 6, "lw": 1.3, "ls": dashes[s]} | look for s, look in _looks(found, subjects, baseline).items()
    }
    figure, panels = style.new_figure(5.2, len(RATES))
    for axes, metric in zip(panels, RATES, strict=True):
        plots.lines(axes, sized[sized.name == metric], looks)
        axes.set(xscale="log", yscale="log", xlabel="sequences at once [1]", title=metric_words(metric))
        axes.set_xticks(sorted(sized.x.unique()), minor=False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        style.plain_ticks(axes.yaxis)
    panels[0].set_ylabel("all sequences together [tokens/s]")
    style.legend_above(figure, columns=3, size=9)
    best = sized[sized.name == RATES[1]].sort_values("value").iloc[-1]
    alt = f"Speed against batch of {len(subjects)} subjects. Fastest decode: {best.subject}, {best.value:.0f} tokens/s."
    return style.finish(figure, path, alt, found, [f"{RATES[1]}:batch"])


@rc_context(STYLE)
def speed_up(
    records: list[Record], metrics: Sequence[str] = RATES, *, baseline: str = "bf16", path: Path | None = None
) -> Picture:
    """How many times faster against how many times fewer parameters; on the grey line both are the same.

    Bars are the subject's own intervals over the baseline's value.
    """
    found = frame(records)
    sizes = measured(found, "parameters", baseline)
    smaller = pandas.DataFrame({"value": sizes.value[baseline] / sizes.value, "low": np.nan, "high": np.nan})
    figure, panels = style.new_figure(5.2, len(metrics))
    named = []
    for axes, metric in zip(panels, metrics, strict=True):
        rates = measured(found, metric, baseline)
        faster = rates[["value", "low", "high"]] / rates.value[baseline]
        where = style.positions(smaller, faster)
        style.dots(axes, smaller, faster, style.subject_styles(found, baseline, where))
        ends = [1, 1.05 * max(a for a, _ in where.values())]
        axes.plot(ends, ends, color="0.6", zorder=1)
        corner = axes.annotate(
            "grey: as many times faster as smaller", (0.98, 0.02), xycoords="axes fraction", ha="right"
        )
        corner.set(fontsize=8, color="0.4")
        style.baseline_line(axes, y=1)
        axes.margins(x=0.5, y=0.2)
        axes.set(xlabel=f"{baseline} parameters / parameters [x]", title=metric_words(metric))
        axes.set_ylabel(f"speed / {baseline} speed [x]")
        named.append((axes, where, ends))
    for axes, where, ends in named:  # when every panel has its place
        style.place_names(axes, where, bold=[baseline], drawn=[zip(ends, ends, strict=True)])
    fastest = max(where, key=lambda s: where[s][1])
    alt = f"Speed against size, dashed: {baseline}. Fastest {metric_words(metrics[-1])}: {fastest}."
    return style.finish(figure, path, alt, found, metrics)


@rc_context(STYLE)
def contexts(records: list[Record], path: Path | None = None) -> Picture:
    """Two panels over the length of the context: latency a token, and peak memory, each beside what was predicted.

    A series is one artefact in one engine with one cache precision.
    """
    found = frame(records)
    parts = found.metric.str.extract(f"^{_AT_CONTEXT}$").dropna()
    at = found.join(parts.astype({"x": int}), how="inner").dropna(subset="value")
    at["series"] = [f"{r.subject} in {r.engine}, {r.bits}-bit cache" for r in at.itertuples()]
    at = at.drop_duplicates(["series", "quantity", "x"], keep="last")
    if TIME not in set(at.quantity):
        raise InputError(f"no {TIME} at a context length with a value among {len(found)} records")
    looks = style.looks(at.series.unique())
    figure, (left, right) = style.new_figure(4.6, 2, sharey=False)
    for axes, quantity, label in ((left, TIME, "median time a token [ms]"), (right, MEMORY, "peak memory [MB]")):
        shown = at.assign(**{c: at[c] * (1e-6 if quantity == MEMORY else 1) for c in ("value", "low", "high")})
        plots.lines(axes, shown[shown.quantity == quantity], looks)
        dashed = {s: {"color": look["color"], "ls": "--", "lw": 1.4} for s, look in looks.items()}
        plots.lines(axes, shown[shown.quantity == PREDICTED[quantity]].assign(low=pandas.NA), dashed)
        axes.set(ylabel=label, ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted(at.x.unique().tolist())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("context [tokens]")
    dashed = {"color": "0.3", "ls": "--"}
    style.legend_above(figure, looks | {"predicted (time: bound by reading)": dashed}, columns=2, size=9)
    timed = parts.index[parts.quantity == TIME]
    return style.finish(figure, path, _told(at), found, list(found.metric[timed].unique()))


def _told(at: pandas.DataFrame) -> str:
    """A sentence a series: what the longest context measured costs, beside what was predicted."""
    sentences = []
    for series, found in at.groupby("series", sort=False):
        if TIME in set(found.quantity):
            longest = found.x[found.quantity == TIME].max()
            cost = found[found.x == longest].set_index("quantity").value
            text = f"{series}, {longest:,} tokens: {cost[TIME]:.3g} ms a token"
            text += f" (bound {cost[PREDICTED[TIME]]:.3g})" if PREDICTED[TIME] in cost else ""
            text += f", {cost[MEMORY] / 1e6:,.0f} MB" if MEMORY in cost else ""
            text += f" (predicted {cost[PREDICTED[MEMORY]] / 1e6:,.0f})" if PREDICTED[MEMORY] in cost else ""
            sentences.append(text)
    return f"Time and memory against the context's length. {'; '.join(sentences)}."


def _engine(subject: str) -> str:
    return subject.rpartition(" in ")[2]


def _looks(found: pandas.DataFrame, subjects: Iterable[str], baseline: str) -> dict[str, dict]:
    """Colour and marker of each subject's engine; the baseline has its own."""
    by_engine = style.looks(dict.fromkeys([*ENGINES, *map(_engine, found.subject.unique())]))
    own = {"color": BASELINE_COLOUR, "marker": "*", "markersize": 13}
    return {s: own if s == baseline else by_engine[_engine(s)] for s in subjects}
