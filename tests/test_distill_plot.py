"""The recovery figure: a row a student, what was not measured is named, nothing drawn is refused."""

import pytest

from avalab import distill_plot
from avalab.experiment import Run


@pytest.fixture
def records():
    run = Run("t", "smoke")
    for subject, value in (("labels", 0.2), ("kl", 0.5), ("kl-hidden", 1.1)):
        run.record(subject, "recovered:python_docs", value, "1", low=value - 0.1, high=value + 0.1)
    run.record("kl", "recovered:calls", 0.4, "1", low=-0.2, high=0.9)
    run.record("labels", "recovered:calls", None, "1", note="nothing was lost")
    return run.records


def test_every_student_has_a_row_and_every_part_a_panel(records, tmp_path):
    picture = distill_plot.recovery(records, ["python_docs", "calls"], path=tmp_path / "r.png")
    first, second = picture.figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["labels", "kl", "kl-hidden"]
    assert first.get_xlabel() == "recovered, python docs [%]"
    assert len(first.containers) == 3
    assert len(second.containers) == 1
    assert "kl 50 %" in picture.alt
    assert "not measured: labels" in picture.figure.get_supxlabel()
    assert (tmp_path / "r.png").read_bytes() == picture.png


def test_nothing_to_draw_is_refused(records):
    with pytest.raises(ValueError, match="nothing recovered was recorded of wikitext2"):
        distill_plot.recovery(records, ["wikitext2"])
