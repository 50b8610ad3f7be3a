"""The training benchmark: every arm trains on the same examples, is timed in turn and compared with the baseline."""

import pytest

from avalab.data.packing import IGNORED, Encoded
from avalab.lab import run as lab_run
from avalab.lab.run import ROOT, Run
from avalab.measure import training
from avalab.measure.training import Sizes

TINY = ROOT / "data" / "tiny-llama"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(lab_run, "ROOT", tmp_path_factory.mktemp("root"))
    run = Run("bench_train", "smoke", 0, str(TINY))
    training.measure_training(run, Sizes(rounds=3, steps=1, rank=4))
    patch.undo()
    return {(record.subject, record.metric): record for record in run.records}


def test_every_arm_has_speed_memory_and_its_distance_from_the_baselines_curve(records):
    for arm in training.ARMS:
        assert records[arm, "train_tokens_per_s"].value > 0
        assert records[arm, "peak_rss_bytes"].value > 2**27
        assert len(records[arm, "loss_gap"].samples) == 3


def test_the_baseline_is_compared_with_itself_at_one_and_no_distance(records):
    assert records["peft", "train_tokens_per_s/peft"].value == 1
    assert records["peft", "peak_rss_bytes/peft"].value == 1
    assert records["peft", "loss_gap"].value == 0


def test_all_arms_follow_the_same_curve(records):
    assert all(records[arm, "loss_gap"].value < 0.05 for arm in training.ARMS)


def test_without_a_gpu_what_is_within_4_gib_is_predicted_and_nothing_of_it_measured(records):
    within = {key: record for key, record in records.items() if key[0] not in training.ARMS}
    assert {metric for _, metric in within} == {"predicted_bytes:peak_vram"}
    assert {record.engine for record in within.values()} == {"predicted"}


def test_the_table_says_what_is_predicted_and_what_fits(monkeypatch, tmp_path, capsys):
    def measure(run):
        run.record("a, all", "predicted_bytes:peak_vram", 2e9, "bytes", engine="predicted", details={"fits": True})
        run.record("a, none", "peak_vram_bytes", None, "bytes", note="does not fit into 4 GiB")

    monkeypatch.setattr(training, "measure_training", measure)
    monkeypatch.setattr(lab_run, "ROOT", tmp_path)
    monkeypatch.setattr(training, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["train_bench", "--profile", "smoke"])
    training.main()
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.split() == ["a,", "all", "predicted_bytes:peak_vram", "2e+09", "bytes", "predicted,", "fits"]
    assert second.endswith("does not fit into 4 GiB")


def test_arms_get_the_same_examples_and_padding_is_not_counted():
    counts = [[count for _, count in training.batches(arm, TINY, "cpu", steps=2)] for arm in ("peft", "decoded")]
    assert counts[0] == counts[1]
    batch, count = next(training.batches("peft", TINY, "cpu", steps=1))
    assert int(batch["attention_mask"].sum()) == count < batch["input_ids"].numel()


def test_padded_labels_stand_where_their_tokens_stand():
    batch = training.padded([Encoded([5, 6, 7], [IGNORED, 7, IGNORED]), Encoded([8, 9], [9, IGNORED])])
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED, 9, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_the_profiles_examples_suffice():
    for sizes in training.SIZES.values():
        needed = sizes.rounds * sizes.steps * training.EXAMPLES_PER_STEP
        assert needed <= 1200
