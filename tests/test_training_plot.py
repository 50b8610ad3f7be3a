"""The figure of a training run shows every curve that was recorded, and refuses to show nothing."""

import pytest

from avalab import training_plot
from avalab.experiment import Record


def curve(subject, losses, held_out=()):
    details = {"tokens": [100 * (i + 1) for i in range(len(losses))], "held_out": list(held_out)}
    return Record("02", subject, "train_loss", losses[-1], "nats/token", samples=losses, details=details)


def test_every_curve_and_its_ends_are_in_the_description(tmp_path):
    records = [curve("lora", [2.0, 1.0, 0.5], [[200, 0.9]]), curve("qlora", [2.0, 1.5, 0.75])]
    picture = training_plot.loss_curves(records, path=tmp_path / "loss.png")
    assert "lora: 2.00 to 0.500; qlora: 2.00 to 0.750" in picture.alt
    assert (tmp_path / "loss.png").read_bytes() == picture.png
    (axes,) = picture.figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "lora, training",
        "lora, held out",
        "qlora, training",
    ]


def test_the_running_median_looks_back_only():
    assert training_plot.running_median([5.0, 1.0, 3.0, 100.0], window=3) == [5.0, 3.0, 3.0, 3.0]


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="no train_loss record with samples"):
        training_plot.loss_curves([])
