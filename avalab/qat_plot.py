"""The figure of training through the rounding: what came back of a loss against the tokens that training read.

One marker a subject with the interval of its share, tokens on a logarithmic axis; stages of one recipe, which have one
colour, are joined in the order of their tokens. The dashed line is the bf16 model, the dotted one the start.
The style and the checks are those of `marks`. What it does not do: tell a long run from a good recipe.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes

from avalab import marks, tables
from avalab.experiment import Record


@rc_context(marks.STYLE)
def by_tokens(records: list[Record], part: str, *, path: Path | None = None) -> marks.Picture:
    """Records `recovered:<part>` as per cent against `train_tokens` of the same subjects.

    Raises ValueError when no subject has both with a value.
    """
    shares, tokens = tables.measured(records, f"recovered:{part}"), tables.measured(records, "train_tokens")
    subjects = sorted((s for s in shares if s in tokens), key=lambda s: tokens[s].value)
    if not subjects:
        raise ValueError(f"no subject has both recovered:{part} and train_tokens")
    figure, (axes,) = marks.new_figure(4.2)
    styles = marks.subject_styles(records, "", subjects)
    _join(axes, subjects, shares, tokens, styles)
    for subject in subjects:
        value, low, high = (100 * end for end in (shares[subject].value, shares[subject].low, shares[subject].high))
        bars = [[max(0, value - low)], [max(0, high - value)]]
        look = {"markersize": 7, "mec": "black", "mew": 0.6, "elinewidth": 1.2, "capsize": 3, "zorder": 3}
        axes.errorbar(tokens[subject].value, value, yerr=bars, ls="none", **look, **styles[subject])
    axes.axhline(0, color="0.5", lw=1.2, ls=":", zorder=1)
    axes.axhline(100, color=marks.BASELINE_COLOUR, lw=1.2, ls="--", zorder=1)
    axes.set(xscale="log", xlabel="tokens read while training [1]")
    axes.set(ylabel=f"recovered, {part.replace('_', ' ')} [%]")
    axes.margins(x=0.2)
    points = {s: (tokens[s].value, 100 * shares[s].value) for s in subjects}
    marks.place_names(axes, points, [], list(points.values()))
    told = "; ".join(f"{s} {100 * shares[s].value:.0f} %" for s in subjects)
    alt = f"Recovered of {part} by tokens of training, dashed: the bf16 model, dotted: untrained. {told}."
    return marks.finish(figure, path, alt, records, (f"recovered:{part}",))


def _join(axes: Axes, subjects: list[str], shares: dict, tokens: dict, styles: dict) -> None:
    """A line through the subjects of one family."""
    for family in dict.fromkeys(map(marks.family, subjects)):
        members = [s for s in subjects if marks.family(s) == family]
        points = [(tokens[s].value, 100 * shares[s].value) for s in members]
        axes.plot(*zip(*points, strict=True), color=styles[members[0]]["color"], lw=1.0, zorder=2)
