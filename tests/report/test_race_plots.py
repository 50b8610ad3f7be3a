"""The figures of the race and of long contexts: what is drawn, what is named, and what is refused."""

import pytest

from avalab.lab.run import Record, Run
from avalab.report import race_plots, style

FIELD = {
    "bf16 in torch": (900e6, 0.0005, 20),
    "gguf-q8_0 in openvino": (300e6, 0.01, 60),
    "gguf-q8_0 in llamacpp": (250e6, 0.01, 50),
    "nf4 in torch": (400e6, 0.2, 25),
    "onnx-int4 in onnx": (500e6, 0.3, 70),
}


@pytest.fixture
def records():
    run = Run("t", "smoke")
    for subject, (memory, kl, rate) in FIELD.items():
        run.record(subject, "peak_rss_bytes:engine", memory, "byte", threads=2)
        run.record(subject, "kl_divergence:docs", kl, "nats/token", low=0.9 * kl, high=1.1 * kl)
        for metric in ("time_to_first_token_ms:prompt512", "token_latency_ms:prompt512"):
            for percentile, factor in (("p50", 1), ("p95", 1.3), ("p99", 2)):
                run.record(subject, f"{metric}:{percentile}", 1000 / rate * factor, "ms", threads=2)
        for size in (1, 4, 16):
            for name in ("prefill", "decode"):
                run.record(subject, f"{name}_tokens_per_s:batch{size}", rate * size**0.5, "token/s", threads=2)
    run.record("gguf-q4_0 in llamacpp", "decode_tokens_per_s:batch", None, "token/s", note="offers no batches")
    return run.records


def test_the_front_names_those_that_nothing_beats_in_both(records, tmp_path):
    """nf4 and onnx-int4 need more memory than q8 in llama.cpp, at a higher divergence; so does q8 in OpenVINO."""
    picture = race_plots.front(records, "kl_divergence:docs", path=tmp_path / "f.png")
    assert picture.alt.endswith("On the Pareto front: gguf-q8_0 in llamacpp, bf16 in torch.")
    texts = {text.get_text() for text in picture.figure.axes[0].texts}
    assert {"nf4", "gguf-q8_0, openvino", "gguf-q8_0, llamacpp"} <= texts
    assert picture.figure.axes[0].get_xlabel() == "peak memory above the runtime [MB]"
    assert (tmp_path / "f.png").read_bytes() == picture.png


def test_every_percentile_of_every_subject_is_drawn_in_every_panel(records):
    metrics = ["time_to_first_token_ms:prompt512", "token_latency_ms:prompt512"]
    picture = race_plots.latencies(records, metrics)
    for axes, words in zip(picture.figure.axes, ("time to first token", "time of a further token"), strict=True):
        assert axes.get_xlabel() == f"{words}, prompt of 512 [ms]"
        points = [line for line in axes.lines if line.get_marker() in ("o", "^", "D")]
        assert len(points) == 3 * len(FIELD)


def test_batches_are_a_line_for_each_subject_and_what_has_none_is_named(records):
    picture = race_plots.batches(records)
    for axes in picture.figure.axes:
        assert [line.get_xdata().tolist() for line in axes.lines] == [[1, 4, 16]] * len(FIELD)
    assert "not measured: gguf-q4_0 in llamacpp" in picture.figure.get_supxlabel()


def test_nothing_to_draw_is_refused(records):
    with pytest.raises(ValueError, match="nothing was measured in batches"):
        race_plots.batches([])
    with pytest.raises(ValueError, match="the baseline 'bf16 in torch' has no kl_divergence:wiki"):
        race_plots.front(records, "kl_divergence:wiki")


# --- long contexts -----------------------------------------------------------------------------------------------


def at_lengths(subject: str, bits: int) -> list[Record]:
    """20 ms and 5 MB a token more at each length, bounds of a tenth and memory of a half predicted."""
    return [
        Record("t", subject, f"{metric}:context{length}:cache{bits}", value, unit, engine="torch")
        for length in (32, 100)
        for metric, value, unit in (
            ("token_latency_ms", 0.2 * length, "ms"),
            ("predicted_token_latency_ms", 0.02 * length, "ms"),
            ("peak_rss_bytes", 5e6 * length, "byte"),
            ("predicted_bytes:peak_rss", 2.5e6 * length, "byte"),
        )
    ]


def test_time_and_memory_are_drawn_against_the_length_with_their_predictions_dashed(tmp_path):
    picture = race_plots.contexts(at_lengths("tiny", 16), path=tmp_path / "long.png")
    assert picture.path.read_bytes() == picture.png
    assert len(picture.png) <= style.MAX_BYTES
    left, right = picture.figure.axes
    assert left.get_ylabel().endswith("[ms]")
    assert right.get_ylabel().endswith("[MB]")
    for axes, measured in ((left, [6.4, 20]), (right, [160, 500])):
        solid, dashed = axes.lines
        assert (solid.get_xdata().tolist(), solid.get_ydata().tolist()) == ([32, 100], pytest.approx(measured))
        assert (dashed.get_linestyle(), dashed.get_xdata().tolist()) == ("--", [32, 100])
    told = "tiny in torch, 16-bit cache, 100 tokens: 20 ms a token (bound 2), 500 MB (predicted 250)."
    assert picture.alt.endswith(told)


def test_each_cache_and_engine_is_a_series_of_its_own():
    picture = race_plots.contexts(at_lengths("tiny", 16) + at_lengths("tiny", 8))
    names = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert names[:2] == ["tiny in torch, 16-bit cache", "tiny in torch, 8-bit cache"]
    assert len(names) == 3


def test_a_length_that_was_not_measured_is_named_below_the_figure():
    missing = Record("t", "tiny", "token_latency_ms:context300:cache16", None, "ms", engine="torch", note="killed")
    picture = race_plots.contexts([*at_lengths("tiny", 16), missing])
    assert "not measured: tiny" in picture.figure.get_supxlabel()


def test_a_figure_of_no_length_is_refused():
    with pytest.raises(ValueError, match="no token_latency_ms at a context length"):
        race_plots.contexts([])


# --- speed against size --------------------------------------------------------------------------------------------

SIZES = {"bf16": (100, 20.0), "wanda-mlp_channels-s25": (80, 23.0), "influence-layers-s20": (80, 25.0)}
SPEEDS = [
    Record("t", s, m, v, u, low=0.9 * v, high=1.1 * v)
    for s, (size, rate) in SIZES.items()
    for m, v, u in (("parameters", size, "1"), ("decode_tokens_per_s", rate, "token/s"))
]


def test_speed_is_drawn_against_size_with_the_line_on_which_they_are_equal():
    picture = race_plots.speed_up(SPEEDS, ["decode_tokens_per_s"])
    (axes,) = picture.figure.axes
    assert any(list(line.get_xdata()) == list(line.get_ydata()) and len(line.get_xdata()) == 2 for line in axes.lines)
    assert "Fastest decode: influence-layers-s20" in picture.alt
