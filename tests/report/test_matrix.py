"""The matrix of scenarios and metrics."""

import pytest

from avalab.lab.errors import InputError
from avalab.lab.run import Record
from avalab.report import matrix

RECORDS = [
    Record("n", "model", "right_share:sums", 0.5, "1"),
    Record("n", "model", "answer_seconds:sums", 2.0, "s"),
    Record("n", "model", "right_share:reading", 1.0, "1"),
    Record("n", "model", "right_share:gsm8k", None, "1", note="not to be had"),
]


def test_every_scenario_has_a_row_and_a_missing_one_is_named(tmp_path):
    picture = matrix.scenarios(RECORDS, ("right_share", "answer_seconds"), path=tmp_path / "m.png")
    (axes,) = picture.figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sums", "reading", "gsm8k"]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["50", "2", "100", matrix.MISSING, matrix.MISSING, matrix.MISSING]
    assert "not to be had here: gsm8k" in picture.alt
    assert "not measured: gsm8k" in picture.figure.get_supxlabel()
    assert (tmp_path / "m.png").stat().st_size < 100_000


def test_records_without_a_scenario_are_refused():
    with pytest.raises(InputError, match="no right_share of a scenario"):
        matrix.scenarios([Record("n", "m", "perplexity", 1.0, "1")], ("right_share",))
