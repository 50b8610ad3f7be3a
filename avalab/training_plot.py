"""The figure of a training run: loss against tokens seen, every step as a thin line, its running median on top.

Held-out losses are the markers. A step of rehearsal rows has a loss near zero: its targets are the base's own. The
style is that of `marks`. What it does not do: smooth away a divergence (the thin line shows every step), or compare
runs of different data.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib import rc_context

from avalab import marks
from avalab.experiment import Record

WINDOW = 15  # steps of the running median


@rc_context(marks.STYLE)
def loss_curves(records: list[Record], *, path: Path | None = None) -> marks.Picture:
    """One curve for each `train_loss` record: `samples` over `details["tokens"]`, `details["held_out"]` as markers.

    Raises ValueError when no record holds a curve.
    """
    curves = [record for record in records if record.metric == "train_loss" and record.samples]
    if not curves:
        raise ValueError("no train_loss record with samples; record a training run first")
    figure, (axes,) = marks.new_figure(3.6)
    for curve, colour, marker in zip(curves, marks.COLOURS, marks.MARKERS, strict=False):
        tokens, held_out = curve.details["tokens"], curve.details["held_out"]
        axes.plot(tokens, curve.samples, color=colour, lw=0.6, alpha=0.5)
        axes.plot(tokens, running_median(curve.samples), color=colour, lw=2, label=f"{curve.subject}, training")
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True), marker, color=colour, mec="black", label=f"{curve.subject}, held out"
            )
    axes.set(xlabel="training tokens", ylabel="loss of a step [nats/token]", yscale="log")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # above: six curves leave no room
    alt = "Loss against tokens. " + "; ".join(f"{c.subject}: {c.samples[0]:.2f} to {c.value:.3f}" for c in curves) + "."
    return marks.finish(figure, path, alt, records, ["train_loss"])


def running_median(values: list[float], window: int = WINDOW) -> list[float]:
    """The median of each value and up to `window - 1` values before it."""
    return [statistics.median(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
