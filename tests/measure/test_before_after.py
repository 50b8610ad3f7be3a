"""Before and after on a whole model: what is recorded, that arms get the same, and the tables."""

import os
from dataclasses import replace

import pytest
import transformers  # noqa: F401  (before what reaches torchao)

from avalab import engines
from avalab.kernels import dispatch
from avalab.lab import process
from avalab.lab.run import PROFILES, Record, Run, save_records
from avalab.measure import before_after
from avalab.measure.before_after import AFTER, BEFORE, PEFT, REFERENCE, Sizes
from avalab.models import checkpoint

SIZES = Sizes(rounds=2, new_tokens=4, reference=(1, 2), train_rounds=1, rank=2, prompts=(8, 32))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has decoded and trained on the tiny model, with its artefacts in a folder of its own."""
    folder = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "artifacts_dir", property(lambda self: folder))
        patch.setattr(process, "call", lambda target, request, **_: {"peak_bytes": len(request)})
        run = Run("10_kernels", "smoke")
        before_after.record_decoding(run, SIZES)
        before_after.record_training(run, SIZES)
        yield run


def values(run, metric):
    return {r.subject.rpartition(":")[2]: r for r in run.records if r.metric == metric}


def test_every_profile_has_sizes():
    assert all(profile.pick(before_after.SIZES) for profile in PROFILES.values())


def test_reading_and_decoding_are_recorded_for_all_three_forms_and_training_for_two(run):
    for metric in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        found = values(run, metric)
        assert list(found) == [BEFORE, AFTER, REFERENCE]
        assert [len(r.samples) for r in found.values()] == [2, 2, 1]
    assert list(values(run, "train_tokens_per_s")) == [PEFT, AFTER]


def test_the_first_form_is_once_itself_and_a_ratio_lies_within_its_rounds(run):
    for metric in before_after.RATES:
        found = values(run, f"{metric}/before")
        assert next(iter(found.values())).value == 1
        assert all(r.low <= r.value <= r.high for r in found.values())


def test_before_and_after_choose_the_same_tokens_and_learn_the_same(run):
    assert values(run, "top1_agreement")[AFTER].value > 0.9
    assert values(run, "loss_gap:last")[AFTER].value < 0.05


def test_peak_memory_is_asked_for_before_and_after(run):
    assert list(values(run, "peak_rss_bytes:engine")) == [BEFORE, AFTER]


def test_a_peak_holds_at_least_the_packed_weights(run):
    """Measured in this process: it is above the libraries, whatever ran before."""
    artifact = before_after.nf4_base(run)
    request = {"folder": str(artifact.path), "device": "cpu", "prompts": [8]}
    for arm in (BEFORE, AFTER):
        assert before_after.measure_peak(request | {"arm": arm})["peak_bytes"] >= 0


def test_transformers_tells_as_many_times_as_tokens_and_they_rise(run):
    told = before_after.generating(checkpoint.load_model(before_after.nf4_base(run)))([1, 2, 3], 5)
    assert len(told) == 5
    assert told == sorted(told)


def test_the_reference_is_forced_in_its_own_arm_and_nowhere_else(run, monkeypatch):
    engine = engines.load("torch", before_after.nf4_base(run))
    seen = []

    def new_tokens(state, request):
        seen.append(os.environ.get(dispatch.SWITCH))
        return engine.new_tokens(state, request)

    watched = replace(engine, new_tokens=new_tokens)
    monkeypatch.setenv(dispatch.SWITCH, "tiles")
    for form in ("", "reference"):
        before_after.telling(watched, form=form)([1], 1)
    assert [*seen, os.environ[dispatch.SWITCH]] == ["tiles", "reference", "tiles"]


# --- tables ------------------------------------------------------------------------------------------------------


def speed(subject, metric, value, ratio, first):
    about = {"commit": "abc1234", "when": "2026-01-02T03:04:05", "threads": 2}
    return [
        Record("n", subject, metric, value, "token/s", **about),
        Record("n", subject, f"{metric}/{first}", ratio, "1", low=ratio - 0.5, high=ratio + 0.5, **about),
    ]


def test_a_row_holds_speed_ratio_range_and_peak():
    records = speed("decode m:avalab", "decode_tokens_per_s", 30.0, 1.5, "before")
    records += [Record("n", "decode m:avalab", "peak_rss_bytes:engine", 2e6, "byte")]
    assert before_after.speed_rows(records) == (("decode m", "avalab", "30", "1.50x [1.00, 2.00]", "2"),)
    assert len(before_after.HEADER) == 5


def test_the_longer_runs_of_training_name_their_file_commit_day_and_threads(monkeypatch, tmp_path):
    monkeypatch.setattr(before_after, "ROOT", tmp_path)
    monkeypatch.setattr(Run, "results_dir", property(lambda self: tmp_path / "results"))
    run = Run("10_kernels", "smoke")
    rows, note = before_after.longer_runs(run)
    assert rows == ()
    assert "make bench-train writes results/bench_train.json; there is none yet" in note
    made = speed("packed", "train_tokens_per_s", 800.0, 2.5, "peft")
    save_records([*made, Record("n", "packed", "peak_rss_bytes", 4e9, "bytes")], tmp_path / "results/bench_train.json")
    rows, note = before_after.longer_runs(run)
    assert rows == (("train, longer run", "packed", "800", "2.50x [2.00, 3.00]", "4000"),)
    assert note == "Longer run: results/bench_train.json, commit abc1234, 2026-01-02, threads 2."
    save_records([], tmp_path / "results/bench_train.json")
    assert before_after.longer_runs(run) == ((), "results/bench_train.json holds no speed of a training step.")
