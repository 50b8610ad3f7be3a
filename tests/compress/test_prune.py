"""Pruning writes artefacts: exact shares, smaller models, resumed runs, the libraries as oracles, and refusals."""

import contextlib
import io
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from avalab.compress import patterns, prune, quantize, saliency
from avalab.data import corpora
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.run import Run
from avalab.models import checkpoint, predict, stored, walk

UNSTRUCTURED = [score for score in saliency.SCORES if score != "influence"]
STRUCTURED = [name for name, pattern in patterns.PATTERNS.items() if pattern.structured]


@pytest.fixture(scope="module")
def run(run):
    """A run that calibrates on more text than the profile's: updates need data."""
    tokenizer = checkpoint.load_tokenizer(checkpoint.base_artifact(run))
    text = corpora.calibration_text(tokenizer, evaluation=corpora.evaluation_texts(run, tokenizer))
    samples = corpora.windows(text, tokenizer, count=96, tokens=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "calibration_windows", lambda *arguments: samples)
        yield run


@pytest.fixture(scope="module")
def against(run, base):
    tokenizer = checkpoint.load_tokenizer(base)
    windows = corpora.windows(corpora.evaluation_text("python_docs", tokenizer), tokenizer, count=8, tokens=64)
    return predict.make_reference(base, windows, run.artifacts_dir / "cache")


@pytest.fixture(scope="module")
def made(run, base) -> dict[str, Artifact]:
    """Every score at one half, anywhere."""
    return {score: prune.prune_artifact(base, score, run=run, sparsity=0.5) for score in UNSTRUCTURED}


def linear_weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    tensors = load_file(artifact.path / "model.safetensors")
    return {n: tensors[f"{n}.weight"] for n in walk.linear_layers(checkpoint.skeleton(artifact.path))}


def kl(model_or_artifact, against) -> float:
    model = checkpoint.load_model(model_or_artifact) if isinstance(model_or_artifact, Artifact) else model_or_artifact
    return float(predict.score_model(model, against).kl.mean())


def refused(message: str):
    return pytest.raises(ValueError, match=message)


# Zeros


@pytest.mark.parametrize("score", UNSTRUCTURED)
def test_every_score_removes_exactly_half_of_each_layer_and_touches_nothing_else(score, made, base):
    artifact = artifacts.load_artifact(made[score].path)
    for name, weight in linear_weights(artifact).items():
        assert int((weight == 0).sum()) == weight.numel() // 2, name
    source, stored = (load_file(a.path / "model.safetensors") for a in (base, artifact))
    linear = {f"{name}.weight" for name in linear_weights(base)}
    assert all(torch.equal(stored[name], source[name]) for name in source.keys() - linear)
    assert artifact.card["measured"]["sparsity"] == 0.5
    assert (artifact.format, artifact.bytes) == ("bf16", base.bytes)
    assert artifact.card["recipe"][-1]["score"] == score


@pytest.mark.parametrize("score", ["magnitude", "wanda", "gradient", "random"])
def test_a_score_without_update_keeps_the_other_weights_as_they_were(score, made, base):
    for name, weight in linear_weights(made[score]).items():
        assert torch.equal(weight[weight != 0], linear_weights(base)[name][weight != 0])


def test_calibrated_scores_beat_magnitude_and_everything_beats_chance(made, against):
    found = {score: kl(artifact, against) for score, artifact in made.items()}
    assert found["sparsegpt"] < found["wanda"] < found["magnitude"] < found["random"]
    assert found["gradient"] < found["random"]


@pytest.mark.parametrize(("score", "pattern"), [("wanda", "2:4"), ("sparsegpt", "2:4"), ("sparsegpt", "4:8")])
def test_every_group_of_every_layer_is_legal(score, pattern, run, base):
    artifact = prune.prune_artifact(base, score, pattern, run=run, sparsity=0.5)
    row = patterns.PATTERNS[pattern]
    for name, weight in linear_weights(artifact).items():
        zeros = (weight.unflatten(1, (-1, row.group)) == 0).sum(2)
        assert (zeros >= row.zeros).all(), name
        assert int((weight == 0).sum()) == weight.numel() // 2, name


def test_more_sparsity_diverges_more_and_none_changes_nothing(run, base, against):
    none, some = (prune.prune_artifact(base, "wanda", run=run, sparsity=share) for share in (0.0, 0.3))
    assert all(torch.equal(w, linear_weights(base)[n]) for n, w in linear_weights(none).items())
    assert 0 < kl(some, against) < kl(prune.prune_artifact(base, "wanda", run=run, sparsity=0.5), against)


def test_the_compressed_file_holds_the_very_weights_in_the_bytes_that_the_card_says(run, base, made):
    for artifact in (made["wanda"], prune.prune_artifact(base, "wanda", "2:4", run=run, sparsity=0.5)):
        path = artifact.path / stored.SPARSE_FILE
        dense = load_file(artifact.path / "model.safetensors")
        back = stored.read_sparse(path)
        assert back.keys() == dense.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in dense.items())
        assert artifact.card["measured"]["sparse_bytes"] == path.stat().st_size < 0.7 * artifact.bytes


def test_targets_are_kinds_names_or_globs_and_no_other_layer_loses_anything(run, base):
    wanted = ("mlp", "layers.0.self_attn.q_proj", "*.3.self_attn.*")
    artifact = prune.prune_artifact(base, "magnitude", run=run, sparsity=0.25, target_modules=wanted)
    pruned = {name for name, weight in linear_weights(artifact).items() if (weight == 0).any()}
    expected = {
        n for n in linear_weights(base) if ".mlp." in n or n == f"model.{wanted[1]}" or n.startswith("model.layers.3.")
    }
    assert pruned == expected
    assert artifact.name.startswith("tiny-llama+magnitude-s25-only17.")


def test_sensitivity_keeps_the_total_and_diverges_no_more_than_equal_shares(run, base, against, made):
    artifact = prune.prune_artifact(base, "wanda", run=run, sparsity=0.5, allocation="sensitivity")
    zeros = {name: int((weight == 0).sum()) / weight.numel() for name, weight in linear_weights(artifact).items()}
    assert artifact.card["measured"]["sparsity"] == pytest.approx(0.5, abs=1e-5)
    assert max(zeros.values()) > 0.6
    assert kl(artifact, against) < 1.05 * kl(made["wanda"], against)


# Smaller models


@pytest.mark.parametrize("score", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("pattern", STRUCTURED)
def test_every_structure_goes_by_half_and_the_artefact_is_smaller_and_runs(score, pattern, run, base, against):
    artifact = prune.prune_artifact(base, score, pattern, run=run, sparsity=0.5)
    model = checkpoint.load_model(artifacts.load_artifact(artifact.path))
    assert artifact.bytes < 0.95 * base.bytes
    assert checkpoint.parameter_count(model) < 0.95 * checkpoint.parameter_count(checkpoint.load_model(base))
    assert 0 < kl(model, against) < 20
    assert 0.05 < artifact.card["measured"]["sparsity"] < 0.8
    assert not (artifact.path / stored.SPARSE_FILE).exists()


@pytest.mark.parametrize("pattern", ["kv_groups", "mlp_channels"])
def test_solving_readers_anew_diverges_less_than_cutting_by_size(pattern, run, base, against):
    cut, solved = (
        prune.prune_artifact(base, score, pattern, run=run, sparsity=0.5) for score in ("magnitude", "sparsegpt")
    )
    assert kl(solved, against) < kl(cut, against)


def test_the_block_of_least_influence_goes(run, base):
    artifact = prune.prune_artifact(base, "influence", "layers", run=run, sparsity=0.25)
    folder = next((run.artifacts_dir / "cache").glob("moments-*"))
    influence = [walk.stored_influence(folder, block) for block in range(4)]
    kept = [block for block in range(4) if block != influence.index(min(influence))]
    source, left = linear_weights(base), linear_weights(artifact)
    for new, old in enumerate(kept):
        name = "self_attn.q_proj"
        assert torch.equal(left[f"model.layers.{new}.{name}"], source[f"model.layers.{old}.{name}"])


def test_a_protected_block_stays(run, base):
    wanted = tuple(f"model.layers.{block}.*" for block in (1, 2))
    artifact = prune.prune_artifact(base, "random", "layers", run=run, sparsity=0.5, target_modules=wanted)
    source, left = linear_weights(base), linear_weights(artifact)
    for new, old in ((0, 0), (1, 3)):
        assert torch.equal(left[f"model.layers.{new}.mlp.up_proj"], source[f"model.layers.{old}.mlp.up_proj"])


def test_a_pruned_artefact_can_be_quantised_next(run, made):
    artifact = quantize.compress_artifact(made["sparsegpt"], "nf4", run=run)
    assert [step["step"] for step in artifact.card["recipe"]][-2:] == ["prune", "nf4"]


# Resuming and reusing


def test_an_equal_recipe_is_reused_and_the_walk_is_shared(run, base, made, monkeypatch):
    monkeypatch.setattr(walk, "_of_block", lambda *arguments: pytest.fail("calibrated a second time"))
    prune.prune_artifact(base, "wanda", run=run, sparsity=0.4)
    monkeypatch.setattr(artifacts, "write_artifact", lambda *arguments, **more: pytest.fail("made a second time"))
    assert prune.prune_artifact(base, "wanda", run=run, sparsity=0.5).sha256 == made["wanda"].sha256


def test_a_score_is_charged_for_calibration_alone_and_together_they_pay_it_once(made):
    alone = {score: artifact.card["measured"] for score, artifact in made.items()}
    shared = alone["wanda"]["calibration_seconds"]
    assert alone["sparsegpt"]["calibration_seconds"] == shared > 0  # whichever of the two came first
    assert alone["magnitude"]["calibration_seconds"] == 0
    assert all(m["compress_seconds"] > m["calibration_seconds"] for m in alone.values())
    pair = [made["wanda"], made["sparsegpt"]]
    both = sum(artifact.card["measured"]["compress_seconds"] for artifact in pair)
    assert prune.total_pruning_seconds(pair) == pytest.approx(both - shared)


def test_a_killed_run_goes_on_at_the_first_unfinished_block_and_ends_the_same(run, base, monkeypatch, tmp_path):
    done, real = [], saliency.remove_weights

    def killed_once(*arguments, **more):
        if len(done) == 10:  # in the second block
            done.append("killed")
            raise KeyboardInterrupt
        done.append("layer")
        return real(*arguments, **more)

    how = {"run": run, "sparsity": 0.6}
    whole = prune.prune_artifact(base, "sparsegpt", **how, out=tmp_path / "whole")
    monkeypatch.setattr(saliency, "remove_weights", killed_once)
    with pytest.raises(KeyboardInterrupt):
        prune.prune_artifact(base, "sparsegpt", **how, out=tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    resumed = prune.prune_artifact(base, "sparsegpt", **how, out=tmp_path / "resumed")
    assert done.count("layer") == 10 + 28 - 7  # the first block's seven layers were not done again
    assert resumed.sha256 == whole.sha256
    assert not list((run.artifacts_dir / "cache").glob("pruning-*"))


# The libraries as oracles


@pytest.mark.parametrize(("score", "modifier"), [("wanda", "WandaPruningModifier"), ("sparsegpt", "SparseGPTModifier")])
def test_a_score_is_no_worse_than_llmcompressors_on_the_same_calibration(score, modifier, run, base, made, against):
    theirs = kl(library_pruned(modifier, run, base), against)
    ours = kl(made[score], against)
    assert ours < 1.05 * theirs
    if score == "wanda":
        assert ours > 0.9 * theirs


def library_pruned(modifier: str, run: Run, base: Artifact):
    """The base pruned to one half by one of llmcompressor's modifiers."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import llmcompressor.modifiers.pruning as library
        from datasets import Dataset
        from llmcompressor import oneshot
        from loguru import logger

        for chatty in ("llmcompressor", "compressed_tensors"):
            logger.disable(chatty)
        samples = corpora.calibration_windows(run, None)
        rows = {"input_ids": samples.tolist(), "attention_mask": torch.ones_like(samples).tolist()}
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
        recipe = getattr(library, modifier)(sparsity=0.5, mask_structure="0:0", targets=["re:.*layers.*_proj$"])
        sizes = {"num_calibration_samples": len(samples), "max_seq_length": samples.shape[1]}
        oneshot(model=model, recipe=[recipe], dataset=Dataset.from_dict(rows), **sizes)
        return model.eval()


# Refusals


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_the_range_is_refused(sparsity, run, base):
    with refused(rf"sparsity {sparsity} is outside \[0, 1\)"):
        prune.prune_artifact(base, "magnitude", run=run, sparsity=sparsity)


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (("magnitute",), {}, "unknown score 'magnitute'; choose one of random, magnitude, wanda, sparsegpt"),
        (("wanda", "3:4"), {}, "unknown pattern '3:4'; choose one of unstructured, 2:4, 4:8, heads"),
        (("wanda",), {"allocation": "owl"}, "unknown allocation 'owl'; choose one of uniform, sensitivity"),
        (("wanda", "2:4"), {"sparsity": 0.4}, "pattern '2:4' removes exactly 0.5; got sparsity 0.4"),
        (("wanda", "2:4"), {"allocation": "sensitivity"}, "'2:4' takes the same share of every layer"),
        (("influence",), {}, "'influence' belongs to whole blocks; use it with pattern 'layers', not 'unstructured'"),
        (("wanda",), {"target_modules": "conv"}, "'conv' matches no linear layer; use attention, mlp"),
        (("wanda", "kv_groups"), {"sparsity": 0.9}, "removes every one of 2 KV groups of each block; possible: 0.5"),
        (("wanda", "heads"), {"sparsity": 0.95}, "removes every one of 2 query heads of each KV group"),
        (("influence", "layers"), {"sparsity": 0.95}, "removes every one of 4 blocks; possible: 0.25, 0.5, 0.75"),
        (("wanda", "hidden"), {"sparsity": 0.99}, "removes every one of 128 hidden channels"),
        (
            ("wanda", "heads"),
            {"target_modules": "mlp"},
            "pattern 'heads' cuts all blocks alike, but the targets leave out model.layers.0.self_attn.o_proj",
        ),
        (
            ("random", "layers"),
            {"target_modules": "*.0.*", "sparsity": 0.75},
            "removes 3 blocks; the targets are in 1",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(arguments, more, message, run, base):
    before = sorted(run.artifacts_dir.iterdir())
    with refused(message):
        prune.prune_artifact(base, *arguments, run=run, **({"sparsity": 0.5} | more))
    assert sorted(run.artifacts_dir.iterdir()) == before


def test_a_pattern_that_does_not_divide_a_layer_is_refused_by_name(run, base, tmp_path):
    model = checkpoint.load_model(base)
    model.config.intermediate_size = 390
    model.config.save_pretrained(tmp_path)
    with refused("groups of 4 do not divide the 390 columns of model.layers.0.mlp.down_proj"):
        prune.plan_pruning(tmp_path, "wanda", "2:4", sparsity=0.5)


def test_an_artefact_that_is_quantised_is_not_pruned(run, base):
    with refused("format 'bitsandbytes'; only bf16 artefacts can be pruned"):
        prune.prune_artifact(quantize.compress_artifact(base, "nf4", run=run), "magnitude", run=run, sparsity=0.5)


def test_records_say_what_went_and_what_it_saves(run, base, made):
    mine = Run("t", "smoke")
    for subject, artifact in (("bf16", base), ("wanda-s50", made["wanda"])):
        prune.record_pruning(mine, subject, artifact)
    values = {(r.subject, r.metric): r for r in mine.records}
    assert values["bf16", "sparsity"].value == 0
    assert values["wanda-s50", "sparsity"].value == 0.5
    assert values["bf16", "sparse_bytes"].value is None
    assert values["wanda-s50", "sparse_bytes"].value < values["wanda-s50", "artifact_bytes"].value
    assert values["wanda-s50", "parameters"].value == values["bf16", "parameters"].value
    assert values["wanda-s50", "compress_seconds"].value > 0
