"""Figures made from records nobody measured: 16 methods with plausible numbers."""

import io
import random
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from avalab.lab.run import Record, Run
from avalab.report import plots, style
from avalab.report.page import picture_size_and_alt

METHODS = {  # megabytes, KL divergence, prefill, decode
    "bf16": (269.1, 0.0, 160, 22),
    "bnb-int8": (162.6, 0.0040, 503, 11),
    "bnb-int8-skip-head": (164.0, 0.0035, 490, 11),
    "bnb-nf4": (116.9, 0.231, 470, 34),
    "bnb-nf4-dq": (112.4, 0.236, 465, 33),
    "bnb-fp4": (116.9, 0.350, 455, 34),
    "torchao-int8wo": (162.5, 0.0038, 300, 28),
    "torchao-int8dyn": (162.5, 0.0090, 600, None),
    "torchao-int4-g32": (122.4, 0.240, 210, 30),
    "torchao-int4-g64": (117.0, 0.330, 215, 31),
    "gptq-w4g64-asym": (117.3, 0.118, 150, 21),
    "gptq-w4g64-sym": (116.0, 0.150, 150, 21),
    "gptq-w4g32-asym": (123.3, 0.100, 150, 20),
    "awq-w4g64-asym": (117.3, 0.160, 150, 21),
    "smoothquant-w8a8": (162.0, 0.020, 148, 20),
    "rtn-w4g64-asym": (117.3, 0.335, 150, 21),
}
KINDS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def rec(subject: str, metric: str, value: float | None, unit: str = "", **more) -> Record:
    return Record("01_quantization", subject, metric, value, unit, **more)


def records_of(subject: str, megabytes: float, kl: float, prefill: float, decode: float | None) -> list[Record]:
    size, noise = int(megabytes * 1e6), random.Random(subject)
    waits = [256e3 / prefill * noise.lognormvariate(0, 0.06) for _ in range(9)]
    return [
        rec(subject, "artifact_bytes", size, "bytes"),
        rec(subject, "artifact_bytes:embedding", 56.6e6, "bytes"),
        rec(subject, "artifact_bytes:mlp", 0.7 * (size - 56.6e6), "bytes"),
        rec(subject, "predicted_bytes:artifact", size * noise.uniform(0.995, 1.02), "bytes"),
        rec(subject, "peak_rss_bytes", 8e8 + size, "bytes"),
        rec(subject, "predicted_bytes:peak_rss", (8e8 + size) * noise.uniform(0.8, 1.1), "bytes"),
        rec(subject, "kl_divergence", kl, "nats", low=0.93 * kl, high=1.08 * kl, n=32),
        rec(subject, "prefill_tokens_per_s", prefill, "tokens/s", low=0.95 * prefill, high=1.04 * prefill, n=9),
        rec(subject, "decode_tokens_per_s", decode, "tokens/s", note="" if decode else "no kernel for one row", n=9),
        rec(subject, "time_to_first_token_ms:p50", sorted(waits)[4], "ms", samples=waits, n=9),
    ]


RECORDS = [record for subject, numbers in METHODS.items() for record in records_of(subject, *numbers)]
LAYERS = [
    rec(f"layer {layer:02d}/{kind}", "kl_divergence", 0.001 * (1 + row) * (1 + abs(layer - 14)), low=1e-4, high=0.2)
    for layer in range(30)
    for row, kind in enumerate(KINDS)
]
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")
FIGURES = {
    "pareto": lambda path: plots.pareto(RECORDS, path=path),
    "heat_map": lambda path: plots.heat_map(LAYERS, "kl_divergence", path),
    "bytes_by_component": lambda path: plots.bytes_by_component(RECORDS, path),
    "predicted_against_measured": lambda path: plots.predicted_against_measured(RECORDS, path),
    "points": lambda path: plots.points(
        RECORDS,
        RATES,
        limits=(0, None),
        alt=f"Speed of {len(METHODS)} methods with intervals; dashed: bf16.",
        path=path,
    ),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, style.Picture]:
    folder = tmp_path_factory.mktemp("results") / "figures"
    return {name: draw(folder / f"01_{name}.png") for name, draw in FIGURES.items()}


each_figure = pytest.mark.parametrize("name", FIGURES)


# --- figures -----------------------------------------------------------------------------------------------------


@each_figure
def test_a_figure_is_a_png_of_900_pixels_and_at_most_100_kb_and_nothing_else_is_left(pictures, name):
    picture = pictures[name]
    assert picture.path.read_bytes() == picture.png, "what a notebook shows is what lies in the folder"
    assert len(picture.png) <= 100_000
    assert Image.open(io.BytesIO(picture.png)).size[0] == 900
    assert {p.name for p in picture.path.parent.iterdir()} == {f"01_{n}.png" for n in FIGURES}


@each_figure
def test_every_axis_label_ends_in_a_unit(pictures, name):
    axes = pictures[name].figure.axes
    labels = [label for a in axes for label in (a.get_xlabel(), a.get_ylabel()) if label]
    labels += [c.get_xlabel() for a in axes for c in a.child_axes]
    assert labels
    assert all(re.search(r"\[[^\]]+\]$", label) for label in labels), labels


@each_figure
def test_a_figure_says_in_words_what_it_shows(pictures, name):
    assert picture_size_and_alt(pictures[name].path)[1] == pictures[name].alt == repr(pictures[name])
    assert len(pictures[name].alt) > 40


@pytest.mark.parametrize("name", sorted(FIGURES.keys() - {"heat_map"}))
def test_the_baseline_is_drawn_in_its_own_colour_in_every_figure_of_methods(pictures, name):
    lines = [line for axes in pictures[name].figure.axes for line in axes.lines]
    assert style.BASELINE_COLOUR in [line.get_color() for line in lines]


def test_a_figure_is_the_same_for_the_same_records(pictures):
    assert FIGURES["pareto"](None).png == pictures["pareto"].png


def test_a_method_without_a_value_is_named_in_the_figure(pictures):
    assert pictures["points"].figure.get_supxlabel() == "not measured: torchao-int8dyn"


def test_the_zero_of_the_baseline_is_drawn_on_a_logarithmic_axis_that_says_where_it_is_linear(pictures):
    axes = pictures["pareto"].figure.axes[0]
    assert axes.get_yscale() == "symlog"
    assert axes.get_ylim()[0] < 0
    assert "linear below 0.001" in [text.get_text() for text in axes.texts]


def test_no_label_of_sixteen_methods_covers_another_or_leaves_the_axes(pictures):
    figure = pictures["pareto"].figure
    frame = figure.axes[0].bbox.padded(2)
    texts = [t for t in figure.axes[0].texts if t.get_text() in METHODS]
    boxes = [text.get_window_extent() for text in texts]
    assert len(texts) == 16
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        assert not [texts[j].get_text() for j in range(i) if box.overlaps(boxes[j])]


def test_what_the_components_leave_of_the_total_is_shown_as_other(pictures):
    legend = [text.get_text() for text in pictures["bytes_by_component"].figure.legends[0].get_texts()]
    assert legend == ["predicted", "embedding", "MLP", "other"]


def test_predictions_outside_the_band_are_named_with_their_ratio():
    pair = [rec("bf16", "artifact_bytes", 103.0), rec("bf16", "predicted_bytes:artifact", 100.0)]
    assert plots.predicted_against_measured(pair).alt.endswith("bf16 artefact 1.030.")


@pytest.mark.parametrize(
    "draw", [plots.pareto, plots.bytes_by_component, lambda records: plots.points(records, RATES, alt="")]
)
def test_a_figure_without_its_baseline_is_refused_by_name(draw):
    without = [r for r in RECORDS if r.subject != "bf16"]
    with pytest.raises(ValueError, match=r"baseline 'bf16' has no .*bnb-int8"):
        draw(without)


def test_a_heat_map_of_methods_is_refused_with_an_example_of_what_it_takes():
    with pytest.raises(ValueError, match=r"layer 07/mlp\.down_proj"):
        plots.heat_map(RECORDS)


def test_a_figure_of_the_baseline_alone_can_be_drawn():
    alone = records_of("bf16", *METHODS["bf16"])
    assert plots.pareto(alone).alt.endswith("On the Pareto front: bf16.")


# --- the front ---------------------------------------------------------------------------------------------------


def test_of_four_points_the_one_beaten_on_both_axes_is_not_on_the_front():
    """(2, 2) loses to (1, 2) on x at the same y; the other three each win somewhere."""
    assert plots.pareto_front([(4, 0), (2, 2), (1, 2), (3, 1)]) == [(1, 2), (3, 1), (4, 0)]


points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(points, st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_front_does_not_depend_on_the_order_of_the_points(some, chance):
    shuffled = list(some)
    chance.shuffle(shuffled)
    assert plots.pareto_front(shuffled) == plots.pareto_front(some)


@given(points)
@settings(max_examples=60, deadline=None)
def test_every_point_is_on_the_front_or_beaten_by_a_point_of_it(some):
    front = plots.pareto_front(some)
    assert all(any(a <= x and b <= y for a, b in front) for x, y in some)
    assert all(x1 < x2 and y1 > y2 for (x1, y1), (x2, y2) in pairwise(front))


def test_where_more_is_better_the_front_takes_the_larger_value():
    made = [rec(s, m, v) for s, *vs in (("bf16", 1, 0.9), ("slow", 0.5, 0.5), ("quick", 2, 0.6)) for m, v in
            zip(("decode_tokens_per_s", "top1_agreement"), vs, strict=True)]  # fmt: skip
    assert plots.pareto(made, "decode_tokens_per_s", "top1_agreement").alt.endswith("front: bf16, quick.")


# --- accuracy --------------------------------------------------------------------------------------------------------


CALLS = ("call_accuracy_grammar:multiple", "irrelevance_accuracy")
RIGHT = {"bf16": (0.5, 0.4, 0.6), "int8": (0.4, 0.3, 0.5)}
ANSWERED = [
    Record("t", subject, metric, value, "1", low=low, high=high, n=100)
    for subject, (value, low, high) in RIGHT.items()
    for metric in CALLS
]


def test_the_figure_is_saved_and_names_baseline_and_shares(tmp_path):
    picture = plots.accuracy(ANSWERED, CALLS, path=tmp_path / "accuracy.png")
    assert picture.path.read_bytes() == picture.png
    assert len(picture.png) <= style.MAX_BYTES
    assert "dashed: bf16" in picture.alt
    assert "int8 40 [30, 50] %" in picture.alt


def test_each_panel_shows_one_metric_in_per_cent_with_the_baselines_line():
    panels = plots.accuracy(ANSWERED, CALLS).figure.axes
    assert len(panels) == len(CALLS)
    for axes in panels:
        assert axes.get_xlabel().endswith("[%]")
        assert any(line.get_linestyle() == "--" and line.get_xdata()[0] == 50 for line in axes.lines)


def test_accuracy_without_its_baseline_is_refused():
    with pytest.raises(ValueError, match="the baseline 'bf16' has no irrelevance_accuracy"):
        plots.accuracy([r for r in ANSWERED if r.subject != "bf16"], CALLS[1:])


# --- recovery --------------------------------------------------------------------------------------------------------


@pytest.fixture
def recovered():
    run = Run("t", "smoke")
    for subject, value in (("labels", 0.2), ("kl", 0.5), ("kl-hidden", 1.1)):
        run.record(subject, "recovered:python_docs", value, "1", low=value - 0.1, high=value + 0.1)
    run.record("kl", "recovered:calls", 0.4, "1", low=-0.2, high=0.9)
    run.record("labels", "recovered:calls", None, "1", note="nothing was lost")
    return run.records


def test_every_student_has_a_row_and_every_part_a_panel(recovered, tmp_path):
    picture = plots.recovery(recovered, ["python_docs", "calls"], path=tmp_path / "r.png")
    first, second = picture.figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["labels", "kl", "kl-hidden"]
    assert first.get_xlabel() == "recovered, python docs [%]"
    assert len(first.containers) == 3
    assert len(second.containers) == 1
    assert "kl 50 %" in picture.alt
    assert "not measured: labels" in picture.figure.get_supxlabel()
    assert (tmp_path / "r.png").read_bytes() == picture.png


def test_nothing_recovered_is_refused(recovered):
    with pytest.raises(ValueError, match="no recovered:wikitext2 was recorded"):
        plots.recovery(recovered, ["wikitext2"])


# --- gaps ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def to_singles():
    run = Run("t", "smoke")
    for subject, value in (("mean-2", 0.1), ("logits-2", 0.01), ("cascade", -0.1)):
        ends = {"low": value - 0.05, "high": value + 0.05}
        run.record(subject, "kl_gap:python_docs", value, "nats/token", **ends, details={"against": "int8"})
    run.record("mean-2", "kl_gap:calls", 0.2, "nats/token", details={"against": "int8"})
    return run.records


def test_every_ensemble_has_a_row_that_names_its_opponent_and_every_metric_a_panel(to_singles, tmp_path):
    picture = plots.gaps(to_singles, ["kl_gap:python_docs", "kl_gap:calls"], path=tmp_path / "g.png")
    first, second = picture.figure.axes
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == ["mean-2 against int8", "logits-2 against int8", "cascade against int8"]
    assert first.get_xlabel() == "KL above the single's,\npython docs [nats/token]"
    assert [len(axes.containers) for axes in (first, second)] == [3, 1]
    assert "logits-2 0.010" in picture.alt
    assert (tmp_path / "g.png").read_bytes() == picture.png


def test_a_gap_that_may_be_zero_is_drawn_hollow(to_singles):
    (axes,) = plots.gaps(to_singles, ["kl_gap:python_docs"]).figure.axes
    faces = [container.lines[0].get_markerfacecolor() for container in axes.containers]
    assert [face == "white" for face in faces] == [False, True, False]


def test_gaps_of_nothing_are_refused(to_singles):
    with pytest.raises(ValueError, match="no kl_gap:wikitext2 was recorded"):
        plots.gaps(to_singles, ["kl_gap:wikitext2"])


# --- gates -----------------------------------------------------------------------------------------------------------


GATES = {"grounded": (0.4, 0.25), "execution": (0.0, 0.0)}
REJECTED = [
    Record("t", gate, metric, value, "1", low=max(0.0, value - 0.05), high=value + 0.05, n=100)
    for gate, values in GATES.items()
    for metric, value in zip((plots.REJECTED, plots.ALONE), values, strict=True)
]
LOSSES = [
    Record("t", arm, f"{metric}:held_out", value, "nats/token", low=value - 0.1, high=value + 0.1, n=40)
    for arm, loss in {"all gates": 0.5, "no gates": 0.8}.items()
    for metric, value in (("answer_loss", loss), ("answer_loss_rise", loss - 0.5))
]


def test_each_gate_has_a_bar_and_a_smaller_one_for_what_only_it_rejects(tmp_path):
    picture = plots.rejections(REJECTED, path=tmp_path / "gates.png")
    assert picture.path.read_bytes() == picture.png
    assert "grounded 40 %, alone 25 %; execution 0 %, alone 0 %" in picture.alt
    (axes,) = picture.figure.axes
    assert sorted(round(bar.get_width()) for bar in axes.patches) == [0, 0, 15, 25]
    assert axes.get_xlabel().endswith("[%]")


def test_losses_and_their_rise_stand_side_by_side_with_the_baselines_lines(tmp_path):
    picture = plots.losses(LOSSES, "held_out", baseline="all gates", path=tmp_path / "losses.png")
    assert "no gates 0.30 [0.20, 0.40] nats/token" in picture.alt
    dashed = [[line.get_xdata()[0] for line in a.lines if line.get_linestyle() == "--"] for a in picture.figure.axes]
    assert dashed == [[0.5], [0.0]]
    assert all(axes.get_xlabel().endswith("[nats/token]") for axes in picture.figure.axes)
    assert len(picture.png) <= style.MAX_BYTES


def test_figures_without_their_records_are_refused():
    with pytest.raises(ValueError, match="rejected_share of nothing"):
        plots.rejections([])
    with pytest.raises(ValueError, match="the baseline 'base' has no answer_loss:held_out"):
        plots.losses(LOSSES, "held_out", baseline="base")


# --- mixed precision -------------------------------------------------------------------------------------------------


def mixed(subject: str, metric: str, value: float) -> Record:
    unit = "bytes" if metric == "artifact_bytes" else "nats/token"
    return Record("t", subject, metric, value, unit)


MIXED = [
    mixed("bf16", "artifact_bytes", 200e6),
    mixed("bf16", "kl_divergence:text", 0.0),
    *(mixed(s, "artifact_bytes", b) for s, b in (("q4_0", 90e6), ("ava-90MB", 90e6))),
    *(mixed(s, "kl_divergence:text", v) for s, v in (("q4_0", 0.5), ("ava-90MB", 0.1))),
    *(mixed("single a q4_0", m, v) for m, v in (("predicted_kl_divergence", 0.01), ("kl_divergence:text", 0.02))),
    mixed("ava-90MB", "predicted_kl_divergence", 0.04),
]


def test_a_forecast_is_drawn_beside_the_front():
    picture = plots.pareto(MIXED, y="kl_divergence:text", forecast=[(80, 0.2), (100, 0.05)])
    assert picture.alt.endswith("On the Pareto front: bf16, ava-90MB.")
    assert any(line.get_xdata().tolist() == [80, 100] for line in picture.figure.axes[0].lines)


def test_single_choices_and_whole_allocations_are_told_apart(tmp_path):
    picture = plots.predicted_and_measured(MIXED, "kl_divergence:text", path=tmp_path / "p.png")
    assert picture.alt.endswith("1 single choices, 1 allocations.")


def test_predictions_that_nothing_measured_are_refused():
    with pytest.raises(ValueError, match="no subject has both predicted_kl_divergence and kl_divergence:other"):
        plots.predicted_and_measured([*MIXED, mixed("bf16", "kl_divergence:other", 0.0)], "kl_divergence:other")


# --- pruning ---------------------------------------------------------------------------------------------------------


SPARSITIES = {"bf16": 0.0, "wanda-s30": 0.3, "wanda-s50": 0.5, "magnitude-s50": 0.5, "wanda-2of4": 0.5}
RISES = {"bf16": 0.0, "wanda-s30": 0.05, "wanda-s50": 0.4, "magnitude-s50": 2.0, "wanda-2of4": 0.9}
PRUNED = [Record("t", subject, "sparsity", value, "1") for subject, value in SPARSITIES.items()]
PRUNED += [
    Record("t", subject, "kl_divergence:docs", value, "nats/token", low=0.9 * value, high=1.1 * value)
    for subject, value in RISES.items()
]


def test_a_score_is_one_line_from_the_baseline_on_and_patterns_stand_alone(tmp_path):
    picture = plots.curves(PRUNED, ["kl_divergence:docs"], path=tmp_path / "curves.png")
    (axes,) = picture.figure.axes
    lines = {c.get_label(): list(c.lines[0].get_xdata()) for c in axes.containers if c.get_label()[0] != "_"}
    assert lines == {"wanda": [0, 30, 50], "magnitude": [0, 50]}
    assert "wanda-2of4" in [text.get_text() for text in axes.texts]
    assert any(line.get_linestyle() == "--" and line.get_color() == style.BASELINE_COLOUR for line in axes.lines)
    assert picture.path.read_bytes() == picture.png
    assert "dashed: bf16" in picture.alt


def test_scores_can_stand_beside_each_other_around_their_share():
    (axes,) = plots.curves(PRUNED, ["kl_divergence:docs"], apart=2).figure.axes
    lines = {c.get_label(): list(c.lines[0].get_xdata()) for c in axes.containers if c.get_label()[0] != "_"}
    assert lines == {"wanda": [0, 29, 49], "magnitude": [0, 51]}


def test_labels_end_in_a_unit_and_each_metric_has_a_panel():
    more = [Record("t", s, "perplexity:docs", 10 + v, "1") for s, v in RISES.items()]
    picture = plots.curves(PRUNED + more, ["kl_divergence:docs", "perplexity:docs"])
    assert [axes.get_xlabel()[-3:] for axes in picture.figure.axes] == ["[%]", "[%]"]
    assert picture.figure.axes[0].get_ylabel() == "KL divergence, docs [nats/token]"
    named = [{text.get_text() for text in axes.texts} & SPARSITIES.keys() for axes in picture.figure.axes]
    assert named == [{"wanda-2of4"}, set()]


def test_curves_without_their_baseline_are_refused():
    with pytest.raises(ValueError, match="the baseline 'bf16' has no sparsity"):
        plots.curves([r for r in PRUNED if r.subject != "bf16"], ["kl_divergence:docs"])


# --- recovery by tokens ----------------------------------------------------------------------------------------------


def share(subject, metric, value, low=None, high=None):
    return Record("t", subject, metric, value, "1", low=low, high=high, n=8)


def test_each_subject_stands_at_its_tokens_and_its_share(tmp_path):
    made = [
        share("scales-1024", "train_tokens", 1024.0),
        share("scales-1024", "recovered:x", 0.1, 0.05, 0.15),
        share("scales", "train_tokens", 4096.0),
        share("scales", "recovered:x", 0.3, 0.2, 0.4),
        share("blocks", "train_tokens", 8192.0),
        share("blocks", "recovered:x", None),
    ]
    picture = plots.by_tokens(made, "x", path=tmp_path / "a.png")
    assert "scales-1024 10 %; scales 30 %" in picture.alt
    assert picture.path.is_file()
    (axes,) = picture.figure.axes
    assert axes.get_xscale() == "log"
    assert {t.get_text() for t in axes.texts} == {"scales-1024", "scales"}


def test_without_a_subject_that_has_both_there_is_no_figure():
    with pytest.raises(ValueError, match="no subject has both recovered:x and train_tokens"):
        plots.by_tokens([share("scales", "recovered:x", 0.1, 0.0, 0.2)], "x")


# --- training --------------------------------------------------------------------------------------------------------


def curve(subject, losses, held_out=()):
    details = {"tokens": [100 * (i + 1) for i in range(len(losses))], "held_out": list(held_out)}
    return Record("02", subject, "train_loss", losses[-1], "nats/token", samples=losses, details=details)


def test_every_curve_and_its_ends_are_in_the_description(tmp_path):
    records = [curve("lora", [2.0, 1.0, 0.5], [[200, 0.9]]), curve("qlora", [2.0, 1.5, 0.75])]
    picture = plots.loss_curves(records, path=tmp_path / "loss.png")
    assert "lora: 2.00 to 0.500; qlora: 2.00 to 0.750" in picture.alt
    assert (tmp_path / "loss.png").read_bytes() == picture.png
    assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == [
        "lora, training",
        "lora, held out",
        "qlora, training",
    ]


def test_the_running_median_looks_back_only():
    assert plots.running_median([5.0, 1.0, 3.0, 100.0], window=3) == [5.0, 3.0, 3.0, 3.0]


def test_no_curve_is_refused():
    with pytest.raises(ValueError, match="no train_loss record with samples"):
        plots.loss_curves([])
