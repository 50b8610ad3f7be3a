"""The figure of recovery by tokens: what it shows, and what it refuses."""

import pytest

from avalab import qat_plot
from avalab.experiment import Record


def record(subject, metric, value, low=None, high=None):
    return Record("t", subject, metric, value, "1", low=low, high=high, n=8)


def test_each_subject_stands_at_its_tokens_and_its_share(tmp_path):
    records = [
        record("scales-1024", "train_tokens", 1024.0),
        record("scales-1024", "recovered:x", 0.1, 0.05, 0.15),
        record("scales", "train_tokens", 4096.0),
        record("scales", "recovered:x", 0.3, 0.2, 0.4),
        record("blocks", "train_tokens", 8192.0),
        record("blocks", "recovered:x", None),
    ]
    picture = qat_plot.by_tokens(records, "x", path=tmp_path / "a.png")
    assert "scales-1024 10 %; scales 30 %" in picture.alt
    assert picture.path.is_file()
    (axes,) = picture.figure.axes
    assert axes.get_xscale() == "log"
    assert {t.get_text() for t in axes.texts} == {"scales-1024", "scales"}


def test_without_a_subject_that_has_both_there_is_no_figure():
    with pytest.raises(ValueError, match="no subject has both recovered:x and train_tokens"):
        qat_plot.by_tokens([record("scales", "recovered:x", 0.1, 0.0, 0.2)], "x")
