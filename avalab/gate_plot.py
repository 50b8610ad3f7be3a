"""Two figures about quality gates: what each rejects, and what leaving one out does to a model trained on the rest.

`rejections` reads `rejected_share` (rejected by the gate, whatever the others say) and `rejected_alone_share` (by no
other gate) of subjects that are gates. `losses` reads a loss and its paired rise over a baseline of subjects that are
training sets. The style and the checks are those of `marks`.

What it does not do: train, or decide whether a difference is one (the records carry the verdict).
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context

from avalab import marks, tables
from avalab.experiment import Record

REJECTED, ALONE = "rejected_share", "rejected_alone_share"


@rc_context(marks.STYLE)
def rejections(records: list[Record], *, path: Path | None = None) -> marks.Picture:
    """Bars of the share of candidates that each gate rejects, the part that no other gate rejects in front.

    Raises ValueError when there is no such record.
    """
    whole, alone = (tables.measured(records, metric) for metric in (REJECTED, ALONE))
    if not whole or whole.keys() != alone.keys():
        raise ValueError(f"{REJECTED} of {', '.join(whole) or 'nothing'}, {ALONE} of {', '.join(alone) or 'nothing'}")
    figure, (axes,) = marks.row_figure(whole, baseline="")
    for values, look in ((whole, {"color": "0.85"}), (alone, {"color": marks.COLOURS[0], "hatch": marks.HATCHES[1]})):
        widths = [_per_cent(r.value) for r in values.values()]
        label = "rejected by this gate" if values is whole else "and by no other"
        axes.barh(range(len(values)), widths, height=0.7, label=label, edgecolor="0.15", linewidth=0.5, **look)
    for row, (gate, record) in enumerate(whole.items()):
        low, high = _per_cent(record.low), _per_cent(record.high)
        axes.plot([low, high], [row, row], color="black", lw=1.2)
        text = f"{_per_cent(record.value):.0f} %, alone {_per_cent(alone[gate].value):.0f} %"
        axes.annotate(text, (high, row), (6, 0), textcoords="offset points", va="center", fontsize=9)
    widest = max(_per_cent(r.high) for r in whole.values())
    axes.set(xlabel="share of the candidates [%]", xlim=(0, 1.35 * max(10.0, widest)))  # room for the text
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    said = "; ".join(
        f"{g} {_per_cent(r.value):.0f} %, alone {_per_cent(alone[g].value):.0f} %" for g, r in whole.items()
    )
    return marks.finish(figure, path, f"Rejected by each gate, bars: 95 % intervals. {said}.", records, (REJECTED,))


@rc_context(marks.STYLE)
def losses(records: list[Record], part: str, *, baseline: str, path: Path | None = None) -> marks.Picture:
    """The loss of each subject and its paired rise over the baseline, with 95 % intervals; dashed: the baseline."""
    metrics = (f"answer_loss:{part}", f"answer_loss_rise:{part}")
    values = [tables.measured(records, metric, baseline) for metric in metrics]
    subjects = {s: None for s in values[0] if s in values[1]}
    figure, panels = marks.row_figure(subjects, baseline, panels=2)
    for axes, metric, value in zip(panels, metrics, values, strict=True):
        for subject, style in marks.subject_styles(records, baseline, subjects).items():
            marks.dot(axes, value[subject], list(subjects).index(subject), **style)
        axes.axvline(value[baseline].value, color=marks.BASELINE_COLOUR, lw=1.2, ls="--", zorder=1)
        name = "rise over the baseline, paired" if "rise" in metric else "loss of the right answer"
        axes.set(xlabel=f"{name} [{value[baseline].unit}]")
        axes.locator_params(axis="x", nbins=5)
    found = "; ".join(f"{s} {tables.show(values[1][s])}" for s in subjects if s != baseline)
    alt = f"Loss and its rise over {baseline} (dashed), bars: 95 % intervals. Rise: {found}."
    return marks.finish(figure, path, alt, records, metrics)


def _per_cent(share: float) -> float:
    return 100 * share
