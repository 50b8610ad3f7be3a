"""The figure of gaps: a row an ensemble, a panel a metric, hollow where nothing was found, nothing drawn is refused."""

import pytest

from avalab import ensemble_plot
from avalab.experiment import Run


@pytest.fixture
def records():
    run = Run("t", "smoke")
    for subject, value in (("mean-2", 0.1), ("logits-2", 0.01), ("cascade", -0.1)):
        ends = {"low": value - 0.05, "high": value + 0.05}
        run.record(subject, "kl_gap:python_docs", value, "nats/token", **ends, details={"against": "int8"})
    run.record("mean-2", "kl_gap:calls", 0.2, "nats/token", details={"against": "int8"})
    return run.records


def test_every_ensemble_has_a_row_that_names_its_opponent_and_every_metric_a_panel(records, tmp_path):
    picture = ensemble_plot.gaps(records, ["kl_gap:python_docs", "kl_gap:calls"], path=tmp_path / "g.png")
    first, second = picture.figure.axes
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == ["mean-2 against int8", "logits-2 against int8", "cascade against int8"]
    assert first.get_xlabel() == "KL above the single's,\npython docs [nats/token]"
    assert [len(axes.containers) for axes in (first, second)] == [3, 1]
    assert "logits-2 0.010" in picture.alt
    assert (tmp_path / "g.png").read_bytes() == picture.png


def test_a_gap_that_may_be_zero_is_drawn_hollow(records):
    (axes,) = ensemble_plot.gaps(records, ["kl_gap:python_docs"]).figure.axes
    faces = [container.lines[0].get_markerfacecolor() for container in axes.containers]
    assert [face == "white" for face in faces] == [False, True, False]


def test_nothing_to_draw_is_refused(records):
    with pytest.raises(ValueError, match="no kl_gap:wikitext2 was recorded"):
        ensemble_plot.gaps(records, ["kl_gap:wikitext2"])
