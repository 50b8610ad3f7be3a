"""The figures of mixed precision: what they say, and what is refused."""

import pytest

from avalab import mixed_plot
from avalab.experiment import Record


def record(subject: str, metric: str, value: float) -> Record:
    unit = "bytes" if metric == "artifact_bytes" else "nats/token"
    return Record("t", subject, metric, value, unit)


RECORDS = [
    record("bf16", "artifact_bytes", 200e6),
    record("bf16", "kl_divergence:text", 0.0),
    *(record(s, "artifact_bytes", b) for s, b in (("q4_0", 90e6), ("ava-90MB", 90e6))),
    *(record(s, "kl_divergence:text", v) for s, v in (("q4_0", 0.5), ("ava-90MB", 0.1))),
    *(record("single a q4_0", m, v) for m, v in (("predicted_kl_divergence", 0.01), ("kl_divergence:text", 0.02))),
    record("ava-90MB", "predicted_kl_divergence", 0.04),
]


def test_the_forecast_names_the_least_divergence(tmp_path):
    curve = [(80e6, 0.2), (100e6, 0.05)]
    picture = mixed_plot.forecast(RECORDS, "kl_divergence:text", curve, path=tmp_path / "f.png")
    assert picture.alt.endswith("of 3 artefacts. Lowest: ava-90MB.")
    assert (tmp_path / "f.png").read_bytes() == picture.png


def test_single_choices_and_whole_allocations_are_told_apart(tmp_path):
    picture = mixed_plot.predicted_and_measured(RECORDS, "kl_divergence:text", path=tmp_path / "p.png")
    assert picture.alt.endswith("1 single choices, 1 allocations.")


def test_predictions_that_nothing_measured_are_refused():
    with pytest.raises(ValueError, match="no subject has both predicted_kl_divergence and kl_divergence:other"):
        mixed_plot.predicted_and_measured([*RECORDS, record("bf16", "kl_divergence:other", 0.0)], "kl_divergence:other")
