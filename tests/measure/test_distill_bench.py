"""The step's time with each loss: the same student in turn, unchanged, with the first recipe as the measure."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.data import packing
from avalab.lab import assets
from avalab.lab import run as lab_run
from avalab.lab.run import Run
from avalab.measure import training
from avalab.models import checkpoint
from avalab.train import finetune
from avalab.train.distill import Recipe


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(lab_run, "ROOT", tmp_path)
    return Run("03_distillation", "smoke", 0, str(assets.resolve("data/tiny-llama")))


def test_every_recipe_has_a_time_and_a_ratio_to_the_first(run):
    base = checkpoint.base_artifact(run)
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
