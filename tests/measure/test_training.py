"""Training benchmarks: arms on the same examples, a step within 4 GiB, and the time of each loss."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel  # noqa: F401  before the package, whose modules reach torchao

from avalab.data import packing
from avalab.data.packing import IGNORED, Encoded
from avalab.lab import run as lab_run
from avalab.lab.run import ROOT, Run
from avalab.measure import training
from avalab.measure.training import Sizes
from avalab.models import checkpoint, sizes, walk
from avalab.models.sizes import Shape
from avalab.train import finetune, losses, memory
from avalab.train.distill import Recipe

TINY = ROOT / "data" / "tiny-llama"
SHAPE = Shape(vocab=512, hidden=128, mlp=256, layers=2, heads=4, kv_heads=2, head_dim=32, tied=True)

# --- speed -------------------------------------------------------------------------------------------------------


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
    counts = [
        [count for _, count in training.example_batches(arm, TINY, "cpu", steps=2)] for arm in ("peft", "decoded")
    ]
    assert counts[0] == counts[1]
    batch, count = next(training.example_batches("peft", TINY, "cpu", steps=1))
    assert int(batch["attention_mask"].sum()) == count < batch["input_ids"].numel()


def test_padded_labels_stand_where_their_tokens_stand():
    batch = training.padded([Encoded([5, 6, 7], [IGNORED, 7, IGNORED]), Encoded([8, 9], [9, IGNORED])])
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED, 9, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_the_profiles_examples_suffice():
    for each in training.SIZES.values():
        needed = each.rounds * each.steps * training.EXAMPLES_PER_STEP
        assert needed <= 1200


# --- the limit -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_base(tmp_path_factory):
    return training.random_base("tiny", SHAPE, tmp_path_factory.mktemp("random"))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(training, "TOKENS", 96)
    monkeypatch.setattr(training, "TIMED", 2)


# --- predictions -------------------------------------------------------------------------------------------------


def test_a_prediction_is_never_called_measured(run):
    run.records.clear()
    training.predict_limit(run, rank=16)
    assert len(run.records) == len(memory.KNOWN_SHAPES) * len(training.LIMIT_ARMS)
    for record in run.records:
        assert (record.engine, record.device, record.metric) == ("predicted", "", "predicted_bytes:peak_vram")
        assert "nothing of this size was run" in record.note
        assert record.details["fits"] == (record.value <= 4 * 2**30)
        assert sum(record.details["parts"].values()) == record.value


def test_with_every_technique_all_known_shapes_fit_and_without_any_none_does():
    for shape in memory.KNOWN_SHAPES.values():
        total = {
            arm: sum(memory.predict_memory(shape, training.limit_step(arm, 16)).values()) for arm in training.LIMIT_ARMS
        }
        assert total["all"] <= training.LIMIT_BYTES < total["none"]
        assert min(total, key=total.get) == "all"


def test_each_arm_switches_one_technique_and_none_switches_all_that_cost_time():
    changed = [set(arm) for arm in training.LIMIT_ARMS.values()]
    assert [len(names) for names in changed] == [0, 1, 1, 1, 1, 3]
    assert set().union(*changed) == set(training.FRUGAL)
    assert all(training.FRUGAL[k] != v for arm in training.LIMIT_ARMS.values() for k, v in arm.items())


# --- the weights -------------------------------------------------------------------------------------------------


def test_random_weights_are_what_the_library_reads_and_weigh_what_is_predicted(random_base):
    model = checkpoint.load_model(random_base)
    assert {type(m).__name__ for m in walk.linear_layers(model).values()} == {"Linear4bit"}
    assert all(torch.isfinite(p.float()).all() for p in model.parameters())
    predicted = sizes.predict_artifact_bytes(SHAPE, sizes.storage_of_method("nf4", {"double_quantization": True}))
    measured = (random_base.path / "model.safetensors").stat().st_size
    assert measured == pytest.approx(predicted, rel=0.01)
    assert sizes.shape_of(random_base) == SHAPE


def test_the_weights_are_drawn_once(random_base, monkeypatch):
    monkeypatch.setattr(training, "_random_tensors", lambda *_: pytest.fail("drawn again"))
    assert training.random_base("tiny", SHAPE, random_base.path.parent).sha256 == random_base.sha256


# --- the steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["peft", *training.LIMIT_ARMS])
def test_every_arm_trains(random_base, short, arm):
    outcome = training.time_steps(random_base, arm, "cpu", rank=2)
    assert len(outcome["seconds"]) == 2
    assert outcome["peak_bytes"] > 2**27


def allocated_peak(step) -> int:
    """Most bytes that tensors made during `step` hold at once, as torch's profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held)


@pytest.mark.parametrize("arm", training.LIMIT_ARMS)
def test_the_predicted_peak_is_what_a_step_allocates(arm, tmp_path):
    shape = Shape(vocab=8000, hidden=256, mlp=768, layers=4, heads=4, kv_heads=2, head_dim=64, tied=True)
    base, tokens, rank = training.random_base("wide", shape, tmp_path), 384, 4
    model, loss = training.limit_model(base, arm, "cpu", rank)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.arange(3, 3 + tokens)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids - 3, "boundaries": torch.tensor([0, tokens])}

    def step() -> None:
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimizer's states are made
    parts = memory.predict_memory(shape, replace(training.limit_step(arm, rank, tokens), on_gpu=False))
    gradients = 6 * rank * sum(rows + columns for rows, columns in shape.linears().values()) * shape.layers
    predicted = parts["activations"] + parts["backward"] + parts["loss"] + gradients
    assert predicted == pytest.approx(allocated_peak(step), rel=0.2)


def test_all_arms_and_the_usual_recipe_have_the_same_loss(random_base, short):
    ids = torch.randint(3, 512, (1, 97), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": torch.arange(96)[None]}
    batch["boundaries"] = torch.tensor([0, 96])
    found = [training.limit_model(random_base, arm, "cpu", 2)[1](batch).item() for arm in training.LIMIT_ARMS]
    assert found == pytest.approx([found[0]] * len(found), abs=0.02)
    batch["labels"] = torch.cat([batch["input_ids"][:, 1:], torch.tensor([[-100]])], dim=1)  # as the model shifts them
    ours = training.limit_model(random_base, "all", "cpu", 2)[1](batch).item()
    assert training.limit_model(random_base, "peft", "cpu", 2)[1](batch).item() == pytest.approx(ours, abs=0.02)


def test_the_dense_loss_is_the_chunked_one():
    hidden, head = torch.randn(1, 7, 8), torch.randn(11, 8)
    batch = {"labels": torch.tensor([[1, 2, -100, 3, 4, 5, 6]])}
    dense, chunked = (loss(hidden, head, batch).item() for loss in (training.dense_loss, losses.next_token))
    assert dense == pytest.approx(chunked, abs=1e-5)


def test_what_does_not_fit_has_no_value_and_says_so_and_speed_is_compared_with_peft(run, random_base, monkeypatch):
    outcomes = {arm: {"peak_bytes": 3 * 2**30, "seconds": [2.0, 2.0, 4.0]} for arm in ("peft", *training.LIMIT_ARMS)}
    outcomes["all"] = {"peak_bytes": 2**30, "seconds": [1.0, 1.0, 1.0]}
    outcomes["none"] = {"why_not": "does not fit into 4 GiB"}
    outcomes["unsloth"] = {"why_not": "unsloth is not installed, or there is no GPU"}
    monkeypatch.setattr(training, "run_alone", lambda folder, arm, device, rank: outcomes[arm])
    monkeypatch.setattr(training, "random_base", lambda *_: random_base)
    run.records.clear()
    training.measure_limit(run, 2, {"tiny": SHAPE})
    found = {(record.subject, record.metric): record for record in run.records}
    assert found["tiny, all", "train_tokens_per_s"].value == 1024
    assert found["tiny, all", "train_tokens_per_s/peft"].value == 2
    assert found["tiny, none", "peak_rss_bytes"].value is None
    assert found["tiny, none", "peak_rss_bytes"].note == "does not fit into 4 GiB"
    assert found["tiny, unsloth", "peak_rss_bytes"].engine == "unsloth"
    assert ("tiny, unsloth", "train_tokens_per_s") not in found


def test_an_arm_runs_in_a_process_of_its_own(random_base):
    outcome = training.run_alone(random_base.path, "all", "cpu", 2)
    assert len(outcome["seconds"]) == training.TIMED
    assert outcome["peak_bytes"] > 2**27


def test_a_peer_that_is_not_there_is_not_started(random_base):
    outcome = training.run_alone(random_base.path, "unsloth", "cpu", 2)
    assert outcome == {"why_not": "unsloth is not installed, or there is no GPU"}


# --- losses ------------------------------------------------------------------------------------------------------


def test_every_recipe_has_a_time_and_a_ratio_to_the_first(run, base, monkeypatch, tmp_path):
    monkeypatch.setattr(lab_run, "ROOT", tmp_path)
    run.records.clear()
    rows = packing.window_rows(torch.stack([torch.arange(5, 37), torch.arange(40, 72)]))
    listen = Recipe(training=finetune.Recipe(rank=2))
    recipes = {
        "labels": replace(listen, kl=0.0, cross_entropy=1.0),
        "kl": listen,
        "inside": replace(listen, hidden=1.0),
        "sampled": replace(listen, teacher="sampled"),
    }
    training.record_step_times(run, base, base, rows, recipes)
    found = {(r.subject, r.metric): r for r in run.records}
    assert {subject for subject, _ in found} == set(recipes)
    assert found["labels", "step_time/labels"].value == 1
    assert all(found[name, "step_ms"].value > 0 for name in recipes)
    assert len(found["sampled", "step_time/labels"].samples) == run.profile.latency_samples
