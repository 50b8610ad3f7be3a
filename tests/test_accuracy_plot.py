"""The accuracy figure: what it says, and what it refuses."""

import pytest

from avalab import accuracy_plot, marks
from avalab.experiment import Record

METRICS = ("call_accuracy_grammar:multiple", "irrelevance_accuracy")
SHARES = {"bf16": (0.5, 0.4, 0.6), "int8": (0.4, 0.3, 0.5)}
RECORDS = [
    Record("t", subject, metric, value, "1", low=low, high=high, n=100)
    for subject, (value, low, high) in SHARES.items()
    for metric in METRICS
]


def test_the_figure_is_saved_and_names_baseline_and_shares(tmp_path):
    picture = accuracy_plot.accuracy(RECORDS, METRICS, path=tmp_path / "accuracy.png")
    assert picture.path.read_bytes() == picture.png
    assert len(picture.png) <= marks.MAX_BYTES
    assert "dashed: bf16" in picture.alt
    assert "int8 40 [30, 50] %" in picture.alt


def test_each_panel_shows_one_metric_in_per_cent_with_the_baselines_line():
    panels = accuracy_plot.accuracy(RECORDS, METRICS).figure.axes
    assert len(panels) == len(METRICS)
    for axes in panels:
        assert axes.get_xlabel().endswith("[%]")
        assert any(line.get_linestyle() == "--" and line.get_xdata()[0] == 50 for line in axes.lines)


def test_a_figure_without_its_baseline_is_refused():
    with pytest.raises(ValueError, match="the baseline 'bf16' has no irrelevance_accuracy"):
        accuracy_plot.accuracy([r for r in RECORDS if r.subject != "bf16"], METRICS[1:])
