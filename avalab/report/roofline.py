"""Kernels against the limit of the machine and against peers: the figures and verdicts of notebook 10.

A subject is `<work>:<arm>`: one piece of work (`product nf4 4096x4096 batch 1`) done by one of its forms (`avalab`).
A kernel that reads b bytes to do f operations has the intensity f / b, and cannot do more operations a second than
min(peak, intensity x read rate). Both are measured beside the kernel and kept in its record's details; the read rate
depends on the size of the weight, so the roof is a band. Bytes are those of the weights, without activations.
Source: Williams, Waterman and Patterson, "Roofline" (2009).
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avalab.lab.errors import InputError
from avalab.lab.run import Record
from avalab.report import style
from avalab.report.style import BASELINE_COLOUR, COLOURS, STYLE, Picture, dot, finish, new_figure
from avalab.report.tables import frame

OURS, PLAIN = "avalab", ("bf16", "dense", "reference")  # of every work one plain form is the baseline

LOOKS = {
    "avalab": (COLOURS[0], "o"),
    "bf16": (BASELINE_COLOUR, "*"),
    "dense": (BASELINE_COLOUR, "D"),
    "dense-bf16": ("0.5", "d"),
    "reference": (BASELINE_COLOUR, "H"),
    "bitsandbytes": (COLOURS[1], "s"),
    "bitsandbytes-decoded": (COLOURS[3], "v"),
    "peft-bitsandbytes": (COLOURS[4], "P"),
    "torch-int4pack": (COLOURS[2], "^"),
    "bitsandbytes-gemm": (COLOURS[1], ">"),
    "bitsandbytes-gemv": (COLOURS[1], "<"),
    "gemlite": (COLOURS[5], "p"),
    "liger": (COLOURS[5], "h"),
    "cut-cross-entropy": (COLOURS[6], "8"),
}

UNKNOWN_LOOK = (COLOURS[7], "X")

QUANTITIES = {"kernel_ms": "time", "peak_bytes": "peak memory"}


@rc_context(STYLE)
def roofline(records: list[Record], path: Path | None = None) -> Picture:
    """Operations a second against operations for each byte read, under the machine's measured roof.

    One panel an operation; a line joins the batches of one form on one shape. Pass the records of one thread count.
    Work whose operations are not counted is left out.
    """
    timed = [r for r in records if r.metric == "kernel_ms" and r.value is not None and r.details.get("flops", 1)]
    if not timed:
        raise InputError(f"no kernel_ms with a value among {len(records)} records")
    panels: dict[str, list[Record]] = {}
    for record in timed:
        name, kind, *_ = record.subject.split()
        title = f"product, {kind}" if name == "product" else "training step: LoRA, loss"
        panels.setdefault(title, []).append(record)
    figure, every = new_figure(4.6, len(panels))
    for axes, (name, group) in zip(every, sorted(panels.items()), strict=True):
        _roof(axes, group)
        _lines(axes, group)
        axes.set(xscale="log", yscale="log", title=name, xlabel="intensity [FLOP/byte]")
    every[0].set_ylabel("reached [GFLOP/s]")
    _legend(figure, timed)
    shares = [r for r in records if r.metric == "roofline_fraction" and r.value and r.subject.endswith(f":{OURS}")]
    nearest = max(shares, key=lambda r: r.value, default=None)
    found = f" Nearest to it: {nearest.subject}, {nearest.value:.0%}." if nearest else ""
    alt = f"{len(timed)} timed kernels below the measured roof (grey band: slowest to fastest read rate).{found}"
    return finish(figure, path, alt, records, ("kernel_ms",))


@rc_context(STYLE)
def ratios(panels: dict[str, tuple[list[Record], str]], path: Path | None = None) -> Picture:
    """Every form of every work relative to its plain form; panels: title -> (records, metric).

    Bars are the fastest and slowest sample.
    """
    found = {title: _by_work(records, metric) for title, (records, metric) in panels.items()}
    for title, works in found.items():
        if not works or not all(_plain(arms) for arms in works.values()):
            raise InputError(f"{title!r}: every work needs a value of {' or '.join(PLAIN)}; works: {list(works)}")
    names = list(dict.fromkeys(work for works in found.values() for work in works))
    figure, every = style.row_figure(names, "", len(found))
    for axes, (title, works) in zip(every, found.items(), strict=True):
        shown = QUANTITIES.get(panels[title][1], panels[title][1])
        style.baseline_line(axes, x=1)
        for work, arms in works.items():
            _row_of_ratios(axes, names.index(work), arms)
        axes.set(xscale="log", title=title, xlabel=f"{shown} over that of the plain form [1]")
        style.plain_ticks(axes.xaxis)
    kept = [r for records, metric in panels.values() for r in records if r.metric == metric]
    _legend(figure, kept)
    alt = f"{', '.join(found)}: forms of {len(names)} works relative to plain torch; left of the line is less."
    return finish(figure, path, alt, kept, tuple(metric for _, metric in panels.values()))


def _roof(axes: Axes, group: list[Record]) -> None:
    """The band between the roofs of the slowest and the fastest read rate, with its numbers."""
    rates, peaks = ([r.details[key] for r in group] for key in ("bytes_per_s", "flops_per_s"))
    across = np.geomspace(min(map(_intensity, group)) / 3, max(map(_intensity, group)) * 3, 200)
    low, high = (np.minimum(f(peaks), across * f(rates)) / 1e9 for f in (min, max))
    axes.fill_between(across, low, high, color="0.85", zorder=0)
    axes.plot(across, high, color="0.35", lw=1.6, zorder=1)
    spans = [" to ".join(dict.fromkeys(f"{f(each) / 1e9:.3g}" for f in (min, max))) for each in (rates, peaks)]
    words = f"roof: {spans[0]} GB/s,\n{spans[1]} GFLOP/s"
    axes.text(0.97, 0.03, words, transform=axes.transAxes, ha="right", va="bottom", fontsize=9)


def _lines(axes: Axes, group: list[Record]) -> None:
    found = frame(group).assign(x=[*map(_intensity, group)], arm=[r.subject.rpartition(":")[2] for r in group])
    found["value"] = [r.details["flops"] / r.value / 1e6 for r in group]  # operations a ms -> GFLOP/s
    found["shape"] = found.subject.str.rpartition(":")[0].str.partition(" batch ")[0]
    for (arm, _), curve in found.sort_values("x").groupby(["arm", "shape"], sort=False):
        colour, marker = LOOKS.get(arm, UNKNOWN_LOOK)
        look = {"color": colour, "marker": marker, "ms": 9 if arm == "bf16" else 6, "mec": "black", "mew": 0.5}
        axes.plot(curve.x, curve.value, lw=0.8, zorder=3 if arm == OURS else 2, **look)


def _intensity(record: Record) -> float:
    return record.details["flops"] / record.details["bytes"]


def _row_of_ratios(axes: Axes, row: int, arms: dict[str, Record]) -> None:
    base = _plain(arms).value
    places = row + 0.12 * (np.arange(len(arms)) - (len(arms) - 1) / 2)  # side by side: equal forms stay visible
    for place, (arm, record) in zip(places, arms.items(), strict=True):
        colour, marker = LOOKS.get(arm, UNKNOWN_LOOK)
        look = {"color": colour, "marker": marker, "zorder": 4 if arm == OURS else 3, "capsize": 0}
        bar = (record.low or record.value, record.high or record.value)
        axes.plot([b / base for b in bar], [place, place], color=colour, lw=1.2, zorder=2)
        dot(axes, record.value / base, float(place), **look)


def _legend(figure: Figure, records: list[Record]) -> None:
    present = {r.subject.rpartition(":")[2] for r in records if r.value is not None}
    arms = [arm for arm in LOOKS if arm in present] + sorted(present - LOOKS.keys())
    looks = [LOOKS.get(arm, UNKNOWN_LOOK) for arm in arms]
    shown = {arm: {"color": c, "marker": m, "ls": "none"} for arm, (c, m) in zip(arms, looks, strict=True)}
    style.legend_above(figure, shown, columns=4, size=9)


def _by_work(records: list[Record], metric: str) -> dict[str, dict[str, Record]]:
    """work -> arm -> the newest record with a value."""
    works: dict[str, dict[str, Record]] = {}
    for record in records:
        work, _, arm = record.subject.rpartition(":")
        if record.metric == metric and record.value is not None:
            works.setdefault(work, {})[arm] = record
    return works


def _plain(arms: dict[str, Record]) -> Record | None:
    return next((arms[name] for name in PLAIN if name in arms), None)


# --- tables and verdicts ---


def time_rows(records: list[Record]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows of a table: `median ms (share of the limit)`, a row each work, a column each form."""
    timed, shares = _by_work(records, "kernel_ms"), _by_work(records, "roofline_fraction")
    arms = [arm for arm in LOOKS if any(arm in work for work in timed.values())]
    rows = []
    for work, found in timed.items():
        cells = {arm: f"{record.value:.3g}" for arm, record in found.items()}
        for arm, share in shares.get(work, {}).items():
            cells[arm] += f" ({share.value:.0%})"
        rows.append((work, *[cells.get(arm, "") for arm in arms]))
    return ("median ms (share of the limit)", *arms), tuple(rows)


@dataclass(frozen=True)
class Target:
    """A claim to be tested: at least `wanted` times faster than the peers, or at most `wanted` times their cost."""

    claim: str
    device: str  # cpu, on one thread, or cuda
    works: str  # regular expression of the works it speaks about
    wanted: float
    peers: tuple[str, ...] = ()  # none: the value itself
    metric: str = "kernel_ms"
    at_most: bool = False  # ours / peer; otherwise peer / ours


@dataclass(frozen=True)
class Verdict:
    """What the records say of a target; `value` None: not measured, `reason` says why."""

    target: Target
    value: float | None = None
    low: float | None = None  # of the rounds: each round times all forms in turn
    high: float | None = None
    reason: str = ""  # or the worst case

    @property
    def reached(self) -> bool | None:
        """None when not measured."""
        if self.value is None:
            return None
        return self.value <= self.target.wanted if self.target.at_most else self.value >= self.target.wanted

    @property
    def words(self) -> str:
        """`not reached: 1.25x of 3x`, `reached: ...` or `not measured: <reason>`; and when the rounds disagree."""
        if self.value is None:
            return f"not measured: {self.reason}"
        split = self.low is not None and self.low < self.target.wanted < self.high
        found = f"{'reached' if self.reached else 'not reached'}: {self.value:.3g}x of {self.target.wanted:g}x"
        return found + (" (rounds on both sides)" if split else "")


_LARGE = r" .* batch (?!1$|16$)\d+$"

_BNB, _DECODED = "bitsandbytes", "bitsandbytes-decoded"

_FUSED = ("liger", "cut-cross-entropy")

_PEERS = (_BNB, _DECODED, "bitsandbytes-gemm", "bitsandbytes-gemv", "torch-int4pack", "gemlite")

_GPU_PRODUCT = "product .* 14336x4096 batch 1$"

TARGETS = (
    Target("large-batch NF4, faster than bitsandbytes' entry point", "cpu", "product nf4" + _LARGE, 3.0, (_BNB,)),
    Target("large-batch NF4, faster than bitsandbytes decoded", "cpu", "product nf4" + _LARGE, 3.0, (_DECODED,)),
    Target("large-batch 4 bit, speed of bf16", "cpu", "product" + _LARGE, 0.8, ("bf16",)),
    Target("batch-1 NF4, speed of bitsandbytes", "cpu", "product nf4 .* batch 1$", 1.0, (_BNB, _DECODED)),
    Target("encoding NF4, speed of bitsandbytes", "cpu", "encode nf4", 1.0, (_BNB,)),
    Target("chunked loss, memory of the dense loss", "cpu", "loss ", 0.2, ("dense",), "peak_bytes", at_most=True),
    Target("chunked loss, time of the dense loss", "cpu", "loss ", 1.1, ("dense",), at_most=True),
    Target("batch-1 4 bit, share of the read rate", "cuda", _GPU_PRODUCT, 0.8, metric="roofline_fraction"),
    Target("batch-1 4 bit, faster than the best peer", "cuda", _GPU_PRODUCT, 1.2, _PEERS),
    Target("LoRA step, faster than peft + bitsandbytes", "cuda", "lora ", 1.5, ("peft-bitsandbytes",)),
    Target("LoRA step, memory of peft's", "cuda", "lora ", 1.0, ("peft-bitsandbytes",), "peak_bytes", at_most=True),
    Target("chunked loss, time of the best fused peer", "cuda", "loss ", 1.1, _FUSED, at_most=True),
    Target("chunked loss, memory of the best fused peer", "cuda", "loss ", 1.1, _FUSED, "peak_bytes", at_most=True),
    Target("loss at 152k, memory of dense", "cuda", "loss .*x151936 ", 0.1, ("dense",), "peak_bytes", at_most=True),
    Target("whole model's decoding, faster than transformers + bitsandbytes", "cuda", "decode ", 3.0,
           ("transformers-bitsandbytes",), "decode_tokens_per_s"),
    Target("whole model's training step, faster than peft + bitsandbytes", "cuda", "train ", 1.5,
           ("peft-bitsandbytes",), "train_tokens_per_s"),
)  # fmt: skip


def judge_target(records: list[Record], target: Target) -> Verdict:
    """The worst case of a target among the records (of one thread, for a CPU)."""
    mine = [r for r in records if target.device == "cuda" or r.threads == 1]
    mine = [r for r in mine if r.device.startswith(target.device)]
    if not mine:
        return Verdict(target, reason="no GPU here" if target.device == "cuda" else "no CPU run of one thread here")
    works = {w: arms for w, arms in _by_work(mine, target.metric).items() if re.match(target.works, w) and OURS in arms}
    cases = [_case(target, work, arms[OURS], arms.get(peer)) for work, arms in works.items() for peer in target.peers]
    if not target.peers:
        cases = [Verdict(target, arms[OURS].value, reason=work) for work, arms in works.items()]
    measured = [case for case in cases if case.value is not None]
    missing = f"no {target.metric} of {' or '.join(target.peers) or OURS} for such a work"
    worst = max if target.at_most else min
    return worst(measured, key=lambda case: case.value, default=Verdict(target, reason=missing))


def verdict_rows(judged: list[Verdict]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows of a table of verdicts, the range of the rounds and the worst case beside each."""
    rows = []
    for v in judged:
        span = "" if v.low is None else f"{v.low:.2f} to {v.high:.2f}"
        bound = f"at {'most' if v.target.at_most else 'least'} {v.target.wanted:g}x"
        case = "" if v.value is None else v.reason
        rows.append((f"{v.target.claim} ({v.target.device})", bound, v.words, span, case))
    return ("target", "asked", "verdict", "rounds", "worst case"), tuple(rows)


def _case(target: Target, work: str, ours: Record, peer: Record | None) -> Verdict:
    """The ratio of the medians, with the range of the rounds' own ratios; of speeds, the faster is the larger."""
    if peer is None:
        return Verdict(target)
    above, below = (ours, peer) if target.at_most or target.metric.endswith("_per_s") else (peer, ours)
    rounds = [a / b for a, b in zip(above.samples, below.samples, strict=True)]
    value = statistics.median(above.samples) / statistics.median(below.samples) if rounds else above.value / below.value
    peer_name = peer.subject.rpartition(":")[2]
    return Verdict(target, value, min(rounds, default=None), max(rounds, default=None), f"{work}, {peer_name}")
