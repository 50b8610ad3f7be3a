"""Figures made from records nobody measured: 16 methods with plausible numbers."""

import io
import random
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from avalab import labels, marks, plots, tables
from avalab.experiment import Record
from avalab.page import picture_size_and_alt

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
FIGURES = {
    "pareto": lambda path: plots.pareto(RECORDS, path=path),
    "heat_map": lambda path: plots.heat_map(LAYERS, "kl_divergence", path),
    "bytes_by_component": lambda path: plots.bytes_by_component(RECORDS, path),
    "predicted_against_measured": lambda path: plots.predicted_against_measured(RECORDS, path),
    "speed": lambda path: plots.speed(RECORDS, path),
    "latency": lambda path: plots.latency(RECORDS, path),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, marks.Picture]:
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
    assert marks.BASELINE_COLOUR in [line.get_color() for line in lines]


def test_a_figure_is_the_same_for_the_same_records(pictures):
    assert plots.speed(RECORDS).png == pictures["speed"].png


def test_a_method_without_a_value_is_named_in_the_figure(pictures):
    assert pictures["speed"].figure.get_supxlabel() == "not measured: torchao-int8dyn"


def test_the_zero_of_the_baseline_is_drawn_on_a_logarithmic_axis_that_says_where_it_is_linear(pictures):
    axes = pictures["pareto"].figure.axes[0]
    assert axes.get_yscale() == "symlog"
    assert axes.get_ylim()[0] < 0
    assert "linear below 0.001" in [text.get_text() for text in axes.texts]


def test_no_label_of_sixteen_methods_covers_another_or_leaves_the_axes(pictures):
    figure = pictures["pareto"].figure
    frame = figure.axes[0].bbox.padded(2)
    texts = [t for t in figure.axes[0].texts if t.get_text() in METHODS]
    boxes = [super(type(t), t).get_window_extent() for t in texts]  # the text alone, without its leading line
    assert len(texts) == 16
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        assert not [texts[j].get_text() for j in range(i) if box.overlaps(boxes[j])]


def test_two_names_at_one_point_are_placed_apart_inside_the_frame_and_off_a_line():
    centres, sizes, line = np.full((2, 2), 100.0), np.full((2, 2), 20.0), np.array([[0.0, 100], [200, 100]])
    first, second = labels.place(centres, sizes, lines=[line], frame=np.array([0.0, 0, 200, 200]))
    assert max(abs(first - second)) >= 20
    for middle in (first, second):
        assert min(middle) >= 10
        assert max(middle) <= 190
        assert abs(middle[1] - 100) >= 10


def test_what_a_notebook_writes_as_text_can_be_had_from_plots():
    for name in ("Table", "show", "show_ratio", "table", "words"):
        assert getattr(plots, name) is getattr(tables, name)


def test_what_the_components_leave_of_the_total_is_shown_as_other(pictures):
    legend = [text.get_text() for text in pictures["bytes_by_component"].figure.legends[0].get_texts()]
    assert legend == ["predicted", "embedding", "MLP", "other"]


def test_predictions_outside_the_band_are_named_with_their_ratio():
    pair = [rec("bf16", "artifact_bytes", 103.0), rec("bf16", "predicted_bytes:artifact", 100.0)]
    assert plots.predicted_against_measured(pair).alt.endswith("bf16 artefact 1.030.")


@pytest.mark.parametrize("draw", [plots.pareto, plots.bytes_by_component, plots.speed, plots.latency])
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
