"""The figures of pruning: what they say, and what they refuse."""

import pytest

from avalab import marks, pruning_plot
from avalab.experiment import Record

SHARES = {"bf16": 0.0, "wanda-s30": 0.3, "wanda-s50": 0.5, "magnitude-s50": 0.5, "wanda-2of4": 0.5}
RISES = {"bf16": 0.0, "wanda-s30": 0.05, "wanda-s50": 0.4, "magnitude-s50": 2.0, "wanda-2of4": 0.9}
RECORDS = [Record("t", subject, "sparsity", value, "1") for subject, value in SHARES.items()]
RECORDS += [
    Record("t", subject, "kl_divergence:docs", value, "nats/token", low=0.9 * value, high=1.1 * value)
    for subject, value in RISES.items()
]
SIZES = {"bf16": (100, 20.0), "wanda-mlp_channels-s25": (80, 23.0), "influence-layers-s20": (80, 25.0)}
SPEEDS = [
    Record("t", s, m, v, u, low=0.9 * v, high=1.1 * v)
    for s, (size, rate) in SIZES.items()
    for m, v, u in (("parameters", size, "1"), ("decode_tokens_per_s", rate, "token/s"))
]


def test_a_score_is_one_line_from_the_baseline_on_and_patterns_stand_alone(tmp_path):
    picture = pruning_plot.curves(RECORDS, ["kl_divergence:docs"], path=tmp_path / "curves.png")
    (axes,) = picture.figure.axes
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.lines if not line.get_label().startswith("_")}
    assert lines == {"wanda": [0, 30, 50], "magnitude": [0, 50]}
    assert "wanda-2of4" in [text.get_text() for text in axes.texts]
    assert any(line.get_linestyle() == "--" and line.get_color() == marks.BASELINE_COLOUR for line in axes.lines)
    assert picture.path.read_bytes() == picture.png
    assert "dashed: bf16" in picture.alt


def test_scores_can_stand_beside_each_other_around_their_share():
    (axes,) = pruning_plot.curves(RECORDS, ["kl_divergence:docs"], apart=2).figure.axes
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.lines if not line.get_label().startswith("_")}
    assert lines == {"wanda": [0, 29, 49], "magnitude": [0, 51]}


def test_labels_end_in_a_unit_and_each_metric_has_a_panel():
    more = [Record("t", s, "perplexity:docs", 10 + v, "1") for s, v in RISES.items()]
    picture = pruning_plot.curves(RECORDS + more, ["kl_divergence:docs", "perplexity:docs"])
    assert [axes.get_xlabel()[-3:] for axes in picture.figure.axes] == ["[%]", "[%]"]
    assert picture.figure.axes[0].get_ylabel() == "KL divergence, docs [nats/token]"
    named = [{text.get_text() for text in axes.texts} & SHARES.keys() for axes in picture.figure.axes]
    assert named == [{"wanda-2of4"}, set()]


def test_speed_is_drawn_against_size_with_the_line_on_which_they_are_equal():
    picture = pruning_plot.speed_up(SPEEDS, ["decode_tokens_per_s"])
    (axes,) = picture.figure.axes
    assert any(list(line.get_xdata()) == list(line.get_ydata()) and len(line.get_xdata()) == 2 for line in axes.lines)
    assert "Fastest decode: influence-layers-s20" in picture.alt


def test_a_figure_without_its_baseline_is_refused():
    with pytest.raises(ValueError, match="the baseline 'bf16' has no sparsity"):
        pruning_plot.curves([r for r in RECORDS if r.subject != "bf16"], ["kl_divergence:docs"])
