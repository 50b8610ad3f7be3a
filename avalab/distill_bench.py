"""How long a training step takes with each way of listening, in one process, in turn.

The students of a comparison are trained one after another, and a busy moment of the machine meets only one of them.
Here one student with adapters makes a forward and backward pass on the same row with each recipe's loss, in turn, and
a recipe's ratio to the first one is the median over rounds of ratios within a round.

What it does not do: the optimizer's step and the Trainer's work, which are the same for all; change the student.
"""

from __future__ import annotations

import statistics

from torch import Tensor

from avalab import distill, targets, train
from avalab.artifacts import Artifact
from avalab.distill import ONLINE, Recipe
from avalab.experiment import Run, load_average
from avalab.kernels.bench import interleaved
from avalab.packed_attention import apply_packed_attention
from avalab.packed_rows import collate
from avalab.targets import Form


def record_step_times(
    run: Run, student: Artifact, teacher: Artifact, rows: list[dict[str, Tensor]], recipes: dict[str, Recipe]
) -> None:
    """Append `step_ms` of each recipe on the first row, and `step_time/<first>`, its ratio to the first recipe.

    Stored targets are those of all `rows`, read where they are there already. Every recipe trains the same parameters:
    those of the first one.
    """
    model = distill.prepared(student, next(iter(recipes.values())), run)
    apply_packed_attention(model)
    arms = {}
    for name, recipe in recipes.items():
        form = Form(recipe.teacher, recipe.count, recipe.temperature, run.seed) if recipe.teacher != ONLINE else None
        row = targets.attach(run, rows, teacher, form)[0][0] if form else rows[0]
        loss = distill.objective_of(model, teacher, recipe, rows=rows, device=run.device, identity=name)
        arms[name] = _step(train.Student(model, loss), {k: v.to(run.device) for k, v in collate([row]).items()})
    found = interleaved(arms, run.profile.latency_samples, run.device)
    first = next(iter(found))
    about = {"engine": "torch", "n": run.profile.latency_samples, "artifact_sha256": student.sha256}
    about["details"] = {"load_average": load_average(), "tokens": len(rows[0]["input_ids"])}
    for name, samples in found.items():
        ends = {"low": min(samples), "high": max(samples), "samples": samples}
        run.record(name, "step_ms", statistics.median(samples), "ms", **ends, **about)
        ratios = [ours / base for ours, base in zip(samples, found[first], strict=True)]
        ends = {"low": min(ratios), "high": max(ratios), "samples": ratios}
        run.record(name, f"step_time/{first}", statistics.median(ratios), "1", **ends, **about)


def _step(student: train.Student, batch: dict[str, Tensor]):
    student.train()

    def step() -> None:
        student(**batch)["loss"].backward()
        student.zero_grad()

    return step
