"""The gate figures: what they say, and what they refuse."""

import pytest

from avalab import gate_plot, marks
from avalab.experiment import Record

SHARES = {"grounded": (0.4, 0.25), "execution": (0.0, 0.0)}
REJECTED = [
    Record("t", gate, metric, value, "1", low=max(0.0, value - 0.05), high=value + 0.05, n=100)
    for gate, values in SHARES.items()
    for metric, value in zip((gate_plot.REJECTED, gate_plot.ALONE), values, strict=True)
]
LOSSES = [
    Record("t", arm, f"{metric}:held_out", value, "nats/token", low=value - 0.1, high=value + 0.1, n=40)
    for arm, loss in {"all gates": 0.5, "no gates": 0.8}.items()
    for metric, value in (("answer_loss", loss), ("answer_loss_rise", loss - 0.5))
]


def test_each_gate_has_a_bar_and_a_smaller_one_for_what_only_it_rejects(tmp_path):
    picture = gate_plot.rejections(REJECTED, path=tmp_path / "gates.png")
    assert picture.path.read_bytes() == picture.png
    assert "grounded 40 %, alone 25 %; execution 0 %, alone 0 %" in picture.alt
    (axes,) = picture.figure.axes
    assert sorted(round(bar.get_width()) for bar in axes.patches) == [0, 0, 25, 40]
    assert axes.get_xlabel().endswith("[%]")


def test_losses_and_their_rise_stand_side_by_side_with_the_baselines_lines(tmp_path):
    picture = gate_plot.losses(LOSSES, "held_out", baseline="all gates", path=tmp_path / "losses.png")
    assert "no gates 0.30 [0.20, 0.40] nats/token" in picture.alt
    dashed = [[line.get_xdata()[0] for line in a.lines if line.get_linestyle() == "--"] for a in picture.figure.axes]
    assert dashed == [[0.5], [0.0]]
    assert all(axes.get_xlabel().endswith("[nats/token]") for axes in picture.figure.axes)
    assert len(picture.png) <= marks.MAX_BYTES


def test_figures_without_their_records_are_refused():
    with pytest.raises(ValueError, match="rejected_share of nothing"):
        gate_plot.rejections([])
    with pytest.raises(ValueError, match="the baseline 'base' has no answer_loss:held_out"):
        gate_plot.losses(LOSSES, "held_out", baseline="base")
