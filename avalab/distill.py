"""Distil a teacher into a smaller student: the training loop with a loss that listens to the teacher.

    adapter = distill.write(pruned, teacher, rows, run=run, name="pruned+kl", recipe=Recipe())
    student = adapters.merge(adapter)

The loss of a row is a sum, each part with a weight of the recipe:

| part | what is compared | source |
|---|---|---|
| `kl` | KL(teacher || student) at a temperature T, times T^2 | Hinton et al. 2015, arXiv 1503.02531 |
| `reverse` | the share of `kl` that is KL(student || teacher) instead | Gu et al. 2024, arXiv 2306.08543 |
| `cross_entropy` | the row's own labels | |
| `hidden`, `attention` | mapped blocks: residual stream, attention (`distill_losses`) | TinyBERT, MiniLM |

The teacher is `online` (it reads each row when the student does), or was asked before: `sampled` and `topk` targets
(`targets`) are kept in a file and cost the step next to nothing. On-policy training is the same call with the student's
own answers as rows (`own_answers`), teaching by text alone with a teacher's answers (`answered`) and `kl` = 0.

The student is trained through adapters (`finetune.Recipe`), also on a 4-bit base, or with rank 0 as a whole
(`whole_training`). The same student, teacher, rows, recipe and code give the artefact that is there already; a killed
run goes on from its last checkpoint.

What it does not do: choose the student (`prune`, `quantize`), or translate between tokenizers.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avalab import (
    adapters,
    artifacts,
    distill_objective,
    finetune,
    models,
    targets,
    train,
    whole_training,
)
from avalab.artifacts import Artifact
from avalab.code import code_of
from avalab.distill_objective import ONLINE, TEACHERS, Recipe
from avalab.experiment import Run
from avalab.packed_rows import IGNORED
from avalab.targets import Form

Rows = list[dict[str, Tensor]]


def write(
    student: Artifact,
    teacher: Artifact | None,
    rows: Rows,
    *,
    run: Run,
    name: str,
    recipe: Recipe | None = None,
) -> Artifact:
    """The artefact `name`: adapters beside the student they belong to, or, with rank 0, the trained student in bf16.

    Rows are tokens of the student's tokenizer (`distill_rows`, `packed_rows`). Raises ValueError for a recipe that
    listens to nobody or in no known way, a teacher with another tokenizer, and what `train.fit` raises.
    """
    recipe = recipe or Recipe()
    _refuse(recipe, student, teacher)
    step = {"step": "distill", **asdict(recipe), "teacher_name": teacher.name if teacher else ""}
    step |= {"teacher_sha256": teacher.sha256 if teacher else "", "rows": targets.rows_sha256(rows), "seed": run.seed}
    identity = artifacts.sha256_of_text(json.dumps([student.sha256, step], sort_keys=True))
    steps = json.loads(json.dumps([*student.card["recipe"], step | {"code": code_of(write)[:12]}]))
    found = artifacts.find(name, student.path.parent, steps, student.sha256)
    if found:
        return found

    def save(folder: Path) -> dict:
        start, bytes_per_token, taught = time.perf_counter(), 0.0, rows
        if recipe.kl and recipe.teacher != ONLINE:
            form = Form(recipe.teacher, recipe.count, recipe.temperature, run.seed)
            taught, bytes_per_token = targets.attach(run, rows, teacher, form)
        seconds = {"target_seconds": time.perf_counter() - start}
        model = prepared(student, recipe, run)
        objective = distill_objective.of(model, teacher, recipe, rows=rows, device=run.device, identity=identity)
        checkpoints = run.artifacts_dir / "checkpoints" / name
        history = train.fit(model, taught, schedule=recipe.training.schedule, folder=checkpoints, loss=objective)
        _save(model, models.load_tokenizer(student), folder, whole=not recipe.training.rank)
        (folder / finetune.HISTORY).write_text(json.dumps(history, indent=1) + "\n")
        scored = sum(int((row["labels"] != IGNORED).sum()) for row in rows)
        about = {"tokens": sum(len(row["input_ids"]) for row in rows), "scored_tokens": scored}
        seconds["train_seconds"] = time.perf_counter() - start
        return about | seconds | {"target_bytes_per_token": bytes_per_token}

    about = {"base": {"name": student.name, "sha256": student.sha256}, "recipe": steps}
    about |= {"format": "peft" if recipe.training.rank else "bf16", "licence": student.card["licence"]}
    return artifacts.write(name, student.path.parent, save, **about)


def prepared(student: Artifact, recipe: Recipe, run: Run) -> PreTrainedModel:
    """The student with what is trained made trainable: adapters, or all linear layers' weights at rank 0."""
    if recipe.training.rank:
        return finetune.prepared(student, recipe.training, run)
    model = models.load(student, run.device)
    whole_training.apply_wide_weights(model, recipe.training.target_modules)
    return model


def record(run: Run, subject: str, artifact: Artifact) -> None:
    """Append `finetune.record`'s metrics, and bytes a token of stored targets (none: the teacher was asked online)."""
    finetune.record(run, subject, artifact)
    stored, step = artifact.card["measured"]["target_bytes_per_token"], artifact.card["recipe"][-1]
    note = "" if stored else "nothing is stored: the teacher reads along, or there is none"
    about = {"artifact_sha256": artifact.sha256, "details": {"recipe": step, **artifact.card["measured"]}}
    run.record(subject, "target_bytes_per_token", stored or None, "byte/token", note=note, **about)


def refuse_other_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ValueError naming the first token that the two do not share: their logits are about different words."""
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (student, teacher))
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            raise ValueError(
                f"student and teacher have different tokenizers: token {i} is {ours.get(i)!r} for the student and "
                f"{theirs.get(i)!r} for the teacher; let such a teacher answer in text (kl=0, cross_entropy=1)"
            )


def _refuse(recipe: Recipe, student: Artifact, teacher: Artifact | None) -> None:
    if recipe.teacher not in TEACHERS or not 0 <= recipe.reverse <= 1:
        known = f"choose one of {', '.join(TEACHERS)} and a share in [0, 1]"
        raise ValueError(f"teacher {recipe.teacher!r} with a share of reverse divergence {recipe.reverse}; {known}")
    if min(recipe.kl, recipe.cross_entropy, recipe.hidden, recipe.attention) < 0 or not (
        recipe.listens or recipe.cross_entropy
    ):
        raise ValueError("weights of kl, cross_entropy, hidden and attention have to be 0 or more, one of them above 0")
    if recipe.teacher != ONLINE and (recipe.reverse or recipe.hidden or recipe.attention):
        raise ValueError(f"{recipe.teacher!r} targets know forward divergence only; use the teacher online")
    if recipe.listens and teacher is None:
        raise ValueError("kl, hidden and attention need a teacher; without one only cross_entropy can be above 0")
    if recipe.listens:
        refuse_other_tokenizer(models.load_tokenizer(student), models.load_tokenizer(teacher))


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, whole: bool) -> None:
    if whole:
        whole_training.restore_narrow_weights(model)
        models.save_model(model, tokenizer, folder)
    else:
        adapters.save(model, folder)
        tokenizer.save_pretrained(folder)
