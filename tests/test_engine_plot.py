"""The figures of the race: what is drawn, what is named, and what is refused."""

import pytest

from avalab import engine_plot
from avalab.experiment import Run

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
    picture = engine_plot.front(records, "kl_divergence:docs", path=tmp_path / "f.png")
    assert picture.alt.endswith("On the Pareto front: gguf-q8_0 in llamacpp, bf16 in torch.")
    texts = {text.get_text() for text in picture.figure.axes[0].texts}
    assert {"nf4", "gguf-q8_0, openvino", "gguf-q8_0, llamacpp"} <= texts
    assert picture.figure.axes[0].get_xlabel() == "peak memory above the runtime [MB]"
    assert (tmp_path / "f.png").read_bytes() == picture.png


def test_every_percentile_of_every_subject_is_drawn_in_every_panel(records):
    metrics = ["time_to_first_token_ms:prompt512", "token_latency_ms:prompt512"]
    picture = engine_plot.latencies(records, metrics)
    for axes, words in zip(picture.figure.axes, ("time to first token", "time of a further token"), strict=True):
        assert axes.get_xlabel() == f"{words}, prompt of 512 [ms]"
        points = [line for line in axes.lines if line.get_marker() in ("o", "^", "D")]
        assert len(points) == 3 * len(FIELD)


def test_batches_are_a_line_for_each_subject_and_what_has_none_is_named(records):
    picture = engine_plot.batches(records)
    for axes in picture.figure.axes:
        assert [line.get_xdata().tolist() for line in axes.lines] == [[1, 4, 16]] * len(FIELD)
    assert "not measured: gguf-q4_0 in llamacpp" in picture.figure.get_supxlabel()


def test_nothing_to_draw_is_refused(records):
    with pytest.raises(ValueError, match="nothing was measured in batches"):
        engine_plot.batches([])
    with pytest.raises(ValueError, match="the baseline 'bf16 in torch' has no kl_divergence:wiki"):
        engine_plot.front(records, "kl_divergence:wiki")
