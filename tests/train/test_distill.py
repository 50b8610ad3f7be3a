"""Distillation end to end on the tiny model: it recovers, it resumes, it refuses; every loss and kind of student."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from avalab import kernels
from avalab.compress import prune, quantize
from avalab.data import corpora, packing
from avalab.data.packing import one_row_batch
from avalab.lab import artifacts
from avalab.models import adapters, checkpoint, predict
from avalab.models.attention import apply_packed_attention
from avalab.train import distill, finetune, loop
from avalab.train.distill import Recipe
from avalab.train.loop import Schedule

TRAINING = finetune.Recipe(rank=8, schedule=Schedule(learning_rate=2e-3, rows_per_step=2, checkpoint_every=2))
RECIPE = Recipe(training=TRAINING)
KINDS = {
    "labels": replace(RECIPE, kl=0.0, cross_entropy=1.0),
    "mixed": replace(RECIPE, temperature=2.0, reverse=0.5, cross_entropy=0.5),
    "inside": replace(RECIPE, hidden=1.0, attention=1.0, pairs=2),
    "sampled": replace(RECIPE, teacher="sampled"),
    "topk": replace(RECIPE, teacher="topk", count=24),
    "whole": replace(RECIPE, training=replace(TRAINING, rank=0)),
}


pytestmark = pytest.mark.usefixtures("few_docstrings")


@pytest.fixture(scope="module")
def pruned(run, base):
    return prune.prune_artifact(base, "magnitude", "mlp_channels", run=run, sparsity=0.5)


@pytest.fixture(scope="module")
def rows(run, base):
    return packing.text_rows(run, checkpoint.load_tokenizer(base), tokens=800, row_tokens=100)


@pytest.fixture(scope="module")
def against(run, base):
    windows = corpora.calibration_windows(run, checkpoint.load_tokenizer(base))
    return predict.make_reference(base, windows[:4], run.artifacts_dir / "cache")


def divergence(artifact, against):
    return predict.score_model(checkpoint.load_model(artifact), against).kl.mean().item()


def batch_of(row):
    return one_row_batch([row])


def objective(student, teacher, recipe, rows):
    return distill.objective_of(student, teacher, recipe, rows=rows, device="cpu", identity="t")


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_brings_some_of_the_teacher_back(kind, run, base, pruned, rows, against):
    taught = distill.train_student(pruned, base, rows, run=run, name=f"taught-{kind}", recipe=KINDS[kind])
    assert taught.format == ("bf16" if kind == "whole" else "peft")
    assert divergence(taught, against) < divergence(pruned, against)
    merged = taught if kind == "whole" else adapters.merge_adapters(taught)
    assert divergence(merged, against) < divergence(pruned, against)
    assert quantize.compress_artifact(merged, "torchao-int8", run=run).card["base"]["sha256"] == merged.sha256
    stored = taught.card["measured"]["target_bytes_per_token"]
    assert 0 < stored <= 120 if kind in ("sampled", "topk") else stored == 0


def test_the_same_recipe_is_not_trained_twice_and_is_recorded(run, base, pruned, rows, monkeypatch):
    first = distill.train_student(pruned, base, rows, run=run, name="taught-sampled", recipe=KINDS["sampled"])
    monkeypatch.setattr(loop, "fit", lambda *_, **__: pytest.fail("trained again"))
    again = distill.train_student(pruned, base, rows, run=run, name="taught-sampled", recipe=KINDS["sampled"])
    assert again.sha256 == first.sha256
    assert json.loads(json.dumps(again.card["recipe"]))[-1]["teacher_sha256"] == base.sha256
    distill.record_distillation(run, "sampled", again)
    found = {record.metric: record for record in run.records if record.subject == "sampled"}
    assert {"train_tokens_per_s", "train_loss", "target_bytes_per_token"} <= found.keys()


class Stop(loop.Progress):
    """Ends the run as a kill does, after the checkpoint of step 2."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            raise KeyboardInterrupt


class Seen(loop.Progress):
    """Notes which steps are made."""

    steps: ClassVar[list[int]] = []

    def on_step_begin(self, args, state, control, **_):
        self.steps.append(state.global_step)


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_ends_as_one_that_was_not(
    run, base, pruned, rows, monkeypatch
):
    whole = distill.train_student(pruned, base, rows, run=run, name="whole-run", recipe=KINDS["inside"])
    progress = loop.Progress
    monkeypatch.setattr(loop, "Progress", Stop)
    with pytest.raises(KeyboardInterrupt):
        distill.train_student(pruned, base, rows, run=run, name="killed", recipe=KINDS["inside"])
    monkeypatch.setattr(loop, "Progress", progress)
    assert not (run.artifacts_dir / "killed").exists()
    monkeypatch.setattr(loop, "Progress", Seen)
    resumed = distill.train_student(pruned, base, rows, run=run, name="killed", recipe=KINDS["inside"])
    assert Seen.steps == [2, 3]
    losses = [[entry["loss"] for entry in finetune.load_history(a)] for a in (whole, resumed)]
    assert losses[0] == losses[1]
    files = [{f["name"]: f["sha256"] for f in a.card["files"]}["adapter_model.safetensors"] for a in (whole, resumed)]
    assert files[0] == files[1]


def test_the_parts_of_a_loss_add_up(base, pruned, rows):
    student, batch = checkpoint.load_model(pruned, dtype=torch.float32), batch_of(rows[0])
    apply_packed_attention(student)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "boundaries")}
    with torch.no_grad():
        outputs = student.base_model(**inputs, output_hidden_states=True)
        batch["layers"] = outputs.hidden_states
        hidden, head = outputs.last_hidden_state, student.lm_head.weight
        parts = {"kl": 1.0, "cross_entropy": 0.5, "hidden": 2.0, "attention": 3.0}
        none = dict.fromkeys(parts, 0.0)
        whole = objective(student, base, Recipe(**parts, temperature=2.0, reverse=0.3), rows)(hidden, head, batch)
        each = [
            objective(student, base, Recipe(**none | {name: weight}, temperature=2.0, reverse=0.3), rows)(
                hidden, head, batch
            )
            for name, weight in parts.items()
        ]
        torch.testing.assert_close(whole, sum(each))
        labels = kernels.linear_cross_entropy(hidden, head, batch["labels"])
        torch.testing.assert_close(each[1], 0.5 * labels)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(base, rows):
    student, batch = checkpoint.load_model(base), batch_of(rows[0])
    apply_packed_attention(student)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "boundaries")}
    with torch.no_grad():
        outputs = student.base_model(**inputs, output_hidden_states=True)
        batch["layers"] = outputs.hidden_states
        recipe = Recipe(hidden=1.0, attention=1.0, reverse=0.5)
        loss = objective(student, base, recipe, rows)(outputs.last_hidden_state, student.lm_head.weight, batch)
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_a_four_bit_student_gets_back_what_rounding_cost(run, base, rows, against):
    fp4 = quantize.compress_artifact(base, "fp4", run=run)
    schedule = replace(TRAINING.schedule, learning_rate=1e-3, epochs=4)
    recipe = replace(RECIPE, training=replace(TRAINING, schedule=schedule))
    taught = distill.train_student(fp4, base, rows, run=run, name="taught-fp4", recipe=recipe)
    assert divergence(taught, against) < divergence(fp4, against)


def test_a_smaller_model_of_another_width_is_taught_inside_too(run, base, rows, against, tmp_path):
    tokenizer = checkpoint.load_tokenizer(base)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=1024, tie_word_embeddings=True)
    torch.manual_seed(0)
    small = LlamaForCausalLM(config).to(torch.bfloat16)
    student = artifacts.write_artifact(
        "small",
        run.artifacts_dir,
        lambda folder: checkpoint.save_model(small, tokenizer, folder),
        base={"name": "none", "sha256": "0"},
        recipe=[],
        format="bf16",
    )
    recipe = replace(KINDS["inside"], training=replace(TRAINING, rank=0))
    taught = distill.train_student(student, base, rows, run=run, name="taught-small", recipe=recipe)
    assert divergence(taught, against) < divergence(student, against)


def other_tokenizer(run, base):
    """An artefact whose tokenizer has two tokens exchanged."""

    def save(folder):
        checkpoint.save_model(AutoModelForCausalLM.from_pretrained(base.path), checkpoint.load_tokenizer(base), folder)
        path = folder / "tokenizer.json"
        about = json.loads(path.read_text())
        words = about["model"]["vocab"]
        first, second = sorted(words, key=words.get)[500:502]
        words[first], words[second] = words[second], words[first]
        path.write_text(json.dumps(about))

    origin = {"name": base.name, "sha256": base.sha256}
    return artifacts.write_artifact("other", run.artifacts_dir, save, base=origin, recipe=[], format="bf16")


def test_another_tokenizer_is_refused_naming_its_first_other_token_unless_only_text_is_learnt(run, base, rows):
    other = other_tokenizer(run, base)
    with pytest.raises(ValueError, match=r"different tokenizers: token 50\d is '.*' for the student and '.*' for the"):
        distill.train_student(base, other, rows, run=run, name="x", recipe=RECIPE)
    told = distill.train_student(base, other, rows[:2], run=run, name="told", recipe=KINDS["labels"])
    assert told.format == "peft"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "oracle"}, "teacher 'oracle'.*choose one of online, sampled, topk"),
        ({"reverse": 1.5}, "share of reverse divergence 1.5"),
        ({"kl": 0.0}, "one of them above 0"),
        ({"hidden": -1.0}, "have to be 0 or more"),
        ({"teacher": "sampled", "reverse": 0.5}, "'sampled' targets know forward divergence only"),
        ({"hidden": 1.0, "layer_map": ((0, 9),)}, r"no pair of blocks \(0, 9\): the student has 4"),
    ],
)
def test_impossible_recipes_are_refused(run, base, pruned, rows, change, message):
    with pytest.raises(ValueError, match=message):
        distill.train_student(pruned, base, rows, run=run, name="x", recipe=replace(RECIPE, **change))


def padded(run, base, rows):
    """The base with rows of zeros behind its vocabulary, as published models have them."""

    def save(folder):
        model = AutoModelForCausalLM.from_pretrained(base.path)
        model.resize_token_embeddings(rows, mean_resizing=False)
        checkpoint.save_model(model, checkpoint.load_tokenizer(base), folder)

    origin = {"name": base.name, "sha256": base.sha256}
    return artifacts.write_artifact(f"padded-{rows}", run.artifacts_dir, save, base=origin, recipe=[], format="bf16")


@pytest.mark.parametrize("kind", ["mixed", "sampled"])
def test_padded_vocabularies_are_compared_on_the_words_they_share(run, base, pruned, rows, kind):
    """The divergence is that from the teacher without its padding, which no tokenizer can write."""
    recipe, teachers = KINDS[kind], (base, padded(run, base, 1088))
    model, found = checkpoint.load_model(pruned, dtype=torch.float32), []
    for teacher in teachers:
        taught, _ = distill.with_targets(run, rows[:1], teacher, recipe)
        student = loop.Student(model, objective(model, teacher, recipe, rows))
        apply_packed_attention(model)
        with torch.no_grad():
            found.append(student(**batch_of(taught[0]))["loss"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert distill.shared_words(model, teachers[0]) is None
    assert distill.shared_words(model, teachers[1]) == 1024


def test_a_model_that_is_its_own_teacher_is_refused(run, base, rows):
    with pytest.raises(ValueError, match=r"teacher and student are the same model .*nothing to learn"):
        distill.train_student(base, base, rows, run=run, name="x", recipe=RECIPE)


def test_listening_to_nobody_is_refused(run, pruned, rows):
    with pytest.raises(ValueError, match="need a teacher"):
        distill.train_student(pruned, None, rows, run=run, name="x", recipe=RECIPE)
