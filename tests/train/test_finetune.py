"""Fine-tuning end to end on the tiny model: adapter artefact, scored as shipped, merged, refused where it must be."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.compress import quantize
from avalab.data import corpora, packing, toolbox
from avalab.lab import artifacts, assets
from avalab.lab import run as lab_run
from avalab.lab.run import Run
from avalab.models import adapters, checkpoint, predict
from avalab.train import finetune, loop, losses
from avalab.train.finetune import Recipe
from avalab.train.loop import Schedule

RECIPE = Recipe(rank=4, alpha=8, row_tokens=1000, schedule=Schedule(learning_rate=3e-3, steps=3, checkpoint_every=2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(lab_run, "ROOT", tmp_path_factory.mktemp("root"))
    yield Run("02_qlora_finetuning", "smoke", 0, str(assets.resolve_model("data/tiny-llama")))
    patch.undo()


@pytest.fixture(scope="module")
def examples():
    return list(toolbox.function_calling_examples(8, seed=0))


@pytest.fixture(scope="module")
def adapter(run, base, examples):
    return finetune.train_adapter(base, examples, run=run, name="tuned", recipe=RECIPE, held_out=examples[:2])


@pytest.fixture
def logits(examples):
    tokens = torch.arange(5, 45)[None]
    return lambda model: model(tokens).logits.detach().float()


def test_the_adapter_is_in_pefts_format_and_names_no_path(adapter, run):
    from peft import PeftModel

    config = json.loads((adapter.path / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["base_model_name_or_path"] is None
    loaded = PeftModel.from_pretrained(checkpoint.load_model(checkpoint.base_artifact(run)), adapter.path)
    assert any("lora_A" in name for name, _ in loaded.named_parameters())


def test_what_is_loaded_back_differs_from_the_base_and_its_merge_does_not_differ_from_it(adapter, base, logits):
    tuned, merged = (
        logits(checkpoint.load_model(a, dtype=torch.float32)) for a in (adapter, adapters.merge_adapters(adapter))
    )
    plain = logits(checkpoint.load_model(base, dtype=torch.float32))
    assert (tuned - plain).abs().max() > 0.1
    # Merged weights are rounded to bf16, which is coarse beside three steps of training.
    assert (tuned - merged).abs().mean() < 0.25 * (tuned - plain).abs().mean()


def test_the_same_recipe_is_not_trained_twice_and_its_history_is_kept(adapter, run, base, examples, monkeypatch):
    monkeypatch.setattr(loop, "fit", lambda *_, **__: pytest.fail("trained again"))
    again = finetune.train_adapter(base, examples, run=run, name="tuned", recipe=RECIPE, held_out=examples[:2])
    assert again.sha256 == adapter.sha256
    history = finetune.load_history(again)
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]
    assert any("held_out_loss" in entry for entry in history)
    finetune.record_training(run, "tuned", again)
    found = {record.metric: record for record in run.records}
    assert {"train_tokens_per_s", "train_seconds"} <= found.keys()
    assert found["train_loss"].samples == [entry["loss"] for entry in history if "loss" in entry]
    assert len(found["train_loss"].details["held_out"]) == sum("held_out_loss" in entry for entry in history)


def test_the_adapters_bytes_are_predicted(adapter, base):
    header = 20_000  # names and offsets of the tensors
    assert 0 <= adapter.bytes - finetune.predicted_adapter_bytes(base, RECIPE) < header


@pytest.mark.parametrize("decoded", [True, False])
def test_a_four_bit_base_is_trained_and_merged_into_bf16(run, base, examples, logits, decoded):
    nf4 = quantize.compress_artifact(base, "nf4", run=run, double_quantization=True)
    recipe = replace(RECIPE, decoded=decoded)
    tuned = finetune.train_adapter(nf4, examples, run=run, name=f"qlora-{decoded}", recipe=recipe)
    merged = adapters.merge_adapters(tuned)
    assert merged.format == "bf16"
    ours, theirs = (logits(checkpoint.load_model(a)) for a in (merged, tuned))
    assert (ours - theirs).abs().mean() < 0.1 * (theirs - logits(checkpoint.load_model(nf4))).abs().mean() + 0.05
    requantised = quantize.compress_artifact(merged, "int8", run=run)
    assert requantised.card["base"]["sha256"] == merged.sha256


def test_the_kernels_and_pefts_own_layers_train_alike(run, base, examples):
    losses = []
    for fused in (True, False):
        recipe = replace(RECIPE, fused=fused)
        tuned = finetune.train_adapter(base, examples, run=run, name=f"fused-{fused}", recipe=recipe)
        losses.append([entry["loss"] for entry in finetune.load_history(tuned)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-2)


def test_an_adapter_without_its_base_says_where_it_was_looked_for(adapter, tmp_path, monkeypatch):
    artifacts.shutil.copytree(adapter.path, tmp_path / "tuned")
    checkpoint.load_model(artifacts.load_artifact(tmp_path / "tuned"))  # the base lies in a run's folder
    monkeypatch.setenv("AVALAB_ARTIFACTS", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"the base .* of .* was not found; looked in"):
        checkpoint.load_model(artifacts.load_artifact(tmp_path / "tuned"))


def test_targets_that_match_nothing_and_impossible_ranks_are_refused(run, base, examples):
    with pytest.raises(ValueError, match="'experts' matches no linear layer; use attention, mlp"):
        finetune.train_adapter(base, examples, run=run, name="x", recipe=replace(RECIPE, target_modules=("experts",)))
    with pytest.raises(ValueError, match="rank is 0"):
        finetune.train_adapter(base, examples, run=run, name="x", recipe=replace(RECIPE, rank=0))


def test_unsloth_trains_where_it_is_installed_and_a_gpu_is_there_and_peft_everywhere_else(monkeypatch):
    for installed in (None, object()):
        monkeypatch.setattr(finetune.importlib.util, "find_spec", lambda name, found=installed: found)
        expected = "unsloth" if installed else "peft"
        assert [finetune.training_backend(device) for device in ("cpu", "cuda", "cuda:0")] == [
            "peft",
            expected,
            expected,
        ]


def test_only_an_adapter_can_be_merged(base):
    with pytest.raises(ValueError, match="is in format 'bf16'; only an adapter"):
        adapters.merge_adapters(base)


def test_an_adapter_starts_without_any_effect(base, logits):
    model = checkpoint.load_model(base)
    before = logits(model)
    adapters.attach_adapters(model, rank=2, seed=0)
    adapters.apply_fused_adapters(model)
    assert torch.equal(before, logits(model))


def test_equal_seeds_draw_equal_adapters(base):
    drawn = []
    for seed in (0, 0, 1):
        model = checkpoint.load_model(base)
        adapters.attach_adapters(model, rank=2, seed=seed)
        drawn.append(next(p for name, p in model.named_parameters() if "lora_A" in name))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_rehearsal_rows_pull_towards_the_base_and_are_disjoint_from_evaluation(run, base):
    rows = packing.rehearsal_rows(run, base, tokens=256, row_tokens=128)
    assert [len(row["input_ids"]) for row in rows] == [128, 128]
    model = checkpoint.load_model(base)
    hidden = predict.hidden_states(model, rows[0]["input_ids"][None]).clone().requires_grad_()
    batch = packing.one_row_batch(rows[:1])
    same = losses.rehearsed(hidden, model.lm_head.weight, batch)
    assert same.item() == pytest.approx(0, abs=1e-5)
    assert losses.rehearsed(hidden + 0.1, model.lm_head.weight, batch).item() > 0.001
    del batch["teacher"]
    assert losses.rehearsed(hidden, model.lm_head.weight, batch).item() > 1
    texts = corpora.evaluation_texts(run, checkpoint.load_tokenizer(base))
    shown = checkpoint.load_tokenizer(base).batch_decode([row["input_ids"] for row in rows])
    for text in texts:
        assert not corpora.shingles(text.content) & set().union(*map(corpora.shingles, shown))


def test_rehearsal_keeps_general_text_closer_to_the_base(run, base, examples):
    drift = {}
    windows = corpora.calibration_windows(run, checkpoint.load_tokenizer(base))
    reference = predict.make_reference(base, windows[:4], run.artifacts_dir / "cache")
    for tokens in (0, 4000):
        schedule = replace(RECIPE.schedule, steps=8)
        recipe = replace(RECIPE, rehearsal_tokens=tokens, schedule=schedule)
        tuned = finetune.train_adapter(base, examples, run=run, name=f"rehearsal-{tokens}", recipe=recipe)
        drift[tokens] = predict.score_model(checkpoint.load_model(tuned), reference).kl.mean().item()
    assert drift[4000] < drift[0]
