"""Training through the rounding: a packed artefact in, one of exactly the same bytes out, closer to the bf16 model.

    better = qat.write(low, teacher, qat.windows(run, tokenizer, tokens=8192), run=run, out=folder)

| kind | what is trained | how |
|---|---|---|
| `scales` | scales (and zero points, if asked), codes as they are | end to end, KL to the teacher |
| `weights` | weights behind the codes, scales, zero points (LSQ) | end to end |
| `blocks` | codes and scales, one block after the other (`block_training`) | its own outputs before rounding |
| `torchao` | as `weights`, through torchao's fake quantizers (`torchao_qat`) | end to end |

End to end is `train.fit` with the distillation loss of `distill_objective`: the teacher's targets are drawn once and
cached (`targets`), checkpoints and exact resume are the loop's. `blocks` and then `scales` are the two stages of
EfficientQAT (Chen et al. 2024, arXiv 2407.11062): each writes an artefact, so that a killed run repeats one at most.

Text is calibration text, without the windows that calibrated the rounding: it fits those already, and learns little.
Every layer keeps its own grid, every tensor its shape and type: the file has the bytes it had.

What it does not do: choose grids, train embeddings, head or norms.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avalab import (
    artifacts,
    block_training,
    corpora,
    distill,
    distill_objective,
    distill_rows,
    fake_quant,
    finetune,
    models,
    packed_file,
    targets,
    torchao_qat,
    train,
)
from avalab.artifacts import Artifact
from avalab.block_training import Blocks
from avalab.code import code_of
from avalab.experiment import Run
from avalab.rounding import Rounded
from avalab.targets import Form
from avalab.train import Schedule

KINDS = ("scales", "weights", "blocks", "torchao")
Rows = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """What is trained, how the teacher is heard, and for how long."""

    kind: str = "scales"
    zeros: bool = False  # zero points too
    teacher: str = "sampled"  # cached targets; `online`: it reads along
    count: int = 50  # draws a token
    windows_per_row: int = 2  # read at once; a step costs a rounding of all weights, however many they are
    schedule: Schedule = field(default_factory=lambda: Schedule(learning_rate=3e-3))
    blocks: Blocks = field(default_factory=Blocks)  # of `blocks` only, which has no schedule


def windows(run: Run, tokenizer: PreTrainedTokenizerBase, *, tokens: int) -> Int[Tensor, "window time"]:
    """Calibration text in windows of the profile's length, without those that `corpora.calibration_windows` gives.

    Raises ValueError when there is not so much text.
    """
    text = corpora.calibration_text(tokenizer, evaluation=corpora.evaluation_texts(run, tokenizer))
    length, used = run.profile.calibration_tokens, run.profile.calibration_samples
    everything = corpora.windows(text, tokenizer, count=10**6, tokens=length)
    count = max(1, tokens // length)
    if count > len(everything) - used:
        raise ValueError(
            f"{tokens} tokens asked for, there are {(len(everything) - used) * length} besides calibration"
        )
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(run.seed))
    return everything[order[used : used + count]]


def rows(read: Int[Tensor, "window time"], *, windows_per_row: int = 1) -> Rows:
    """Rows of one or several windows, none of which sees another; every token scored that has a successor."""
    found = []
    for part in read.split(windows_per_row):
        ends = torch.arange(len(part) + 1) * part.shape[1]
        positions = torch.arange(part.shape[1]).repeat(len(part))
        found.append(
            distill_rows.whole_row({"input_ids": part.flatten(), "position_ids": positions, "boundaries": ends})
        )
    return found


def write(
    start: Artifact,
    teacher: Artifact,
    read: Int[Tensor, "window time"],
    *,
    run: Run,
    out: Path,
    recipe: Recipe | None = None,
) -> Artifact:
    """The artefact in the folder `out`: `start` with codes, scales and zero points as the recipe trains them on `read`.

    The same start, teacher, text, recipe and code give the artefact that is there; a killed run goes on from its last
    checkpoint. Raises ValueError for an unknown kind, a start without packed layers, a teacher that is not bf16 or has
    another tokenizer, and what `train.fit` raises.
    """
    recipe = recipe or Recipe()
    _refuse(recipe, start, teacher)
    step = {"step": "qat", **asdict(recipe), "teacher_sha256": teacher.sha256, "seed": run.seed}
    step |= {"text": artifacts.sha256_of_text(json.dumps(read.tolist())), "tokens": read.numel()}
    step |= {"window_tokens": read.shape[1]}
    identity = artifacts.sha256_of_text(json.dumps([start.sha256, step], sort_keys=True))
    steps = [*start.card["recipe"], step | {"code": code_of(write)[:12]}]
    steps = json.loads(json.dumps(steps))
    found = artifacts.find(out.name, out.parent, steps, start.sha256)
    if found:
        return found

    def save(folder: Path) -> dict:
        began, layers = time.perf_counter(), packed_file.read(start)
        model = _prepared(start, teacher, layers, recipe, run)
        if recipe.kind == "blocks":
            about = _by_blocks(model, teacher, read, recipe, run)
        else:
            about = _end_to_end(model, teacher, read, recipe, run, (out.name, identity, folder))
        after = rounded(model)
        packed_file.write(start, folder, after)
        shares = [float((part.codes != layers[at].codes).float().mean()) for at, part in after.items()]
        seconds = {"train_seconds": time.perf_counter() - began, "codes_changed": sum(shares) / len(shares)}
        return about | seconds

    about = {"base": {"name": start.name, "sha256": start.sha256}, "recipe": steps, "format": start.format}
    return artifacts.write(out.name, out.parent, save, licence=start.card["licence"], **about)


def rounded(model: PreTrainedModel) -> dict[str, Rounded]:
    """What the fake quantizers of a model would store, by the layers' names."""
    kinds = (fake_quant.FakeQuantized, torchao_qat.Torchao)
    return {name: module.rounded() for name, module in model.named_modules() if isinstance(module, kinds)}


def record(run: Run, subject: str, artifact: Artifact) -> None:
    """Append `train_tokens` read in all stages, `train_seconds`, and the curve of the loss where there is one."""
    stages = [step for step in artifact.card["recipe"] if step["step"] == "qat"]
    about = {"artifact_sha256": artifact.sha256, "details": {"recipe": stages, **artifact.card["measured"]}}
    run.record(subject, "train_tokens", sum(map(tokens_trained, stages)), "tokens", n=len(stages), **about)
    if stages[-1]["kind"] == "blocks":
        run.record(subject, "train_seconds", artifact.card["measured"]["train_seconds"], "s", engine="torch", **about)
    else:
        finetune.record(run, subject, artifact)


def tokens_trained(step: dict) -> int:
    """Tokens that a stage's steps read, repeats counted: in `blocks`, of each block."""
    if step["kind"] == "blocks":
        windows, time = step["blocks"]["windows_per_step"], step["window_tokens"]
        return step["blocks"]["steps"] * windows * time
    return int(step["tokens"] * step["schedule"]["epochs"])


def _prepared(start: Artifact, teacher: Artifact, layers: dict, recipe: Recipe, run: Run) -> PreTrainedModel:
    model = models.load(start, run.device)
    weights = None
    if recipe.kind != "scales":
        original = models.load(teacher)
        weights = {name: original.get_submodule(name).weight.detach().to(run.device) for name in layers}
    if recipe.kind == "torchao":
        torchao_qat.replace_layers(model, layers, weights=weights)
    else:
        fake_quant.replace_layers(model, layers, weights=weights, zeros=recipe.zeros)
    return model


def _by_blocks(model: PreTrainedModel, teacher: Artifact, read: Tensor, recipe: Recipe, run: Run) -> dict:
    whole = models.load(teacher, run.device)
    errors = block_training.reconstruct(model, whole, read, recipe.blocks, seed=run.seed)
    return {"block_errors": [list(pair) for pair in errors]}


def _end_to_end(
    model: PreTrainedModel, teacher: Artifact, read: Tensor, recipe: Recipe, run: Run, where: tuple[str, str, Path]
) -> dict:
    name, identity, folder = where
    taught, stored = rows(read, windows_per_row=recipe.windows_per_row), 0.0
    if recipe.teacher != distill_objective.ONLINE:
        taught, stored = targets.attach(run, taught, teacher, Form(recipe.teacher, recipe.count, 1.0, run.seed))
    listening = distill_objective.Recipe(teacher=recipe.teacher, count=recipe.count)
    loss = distill_objective.of(model, teacher, listening, rows=taught, device=run.device, identity=identity)
    checkpoints = run.artifacts_dir / "checkpoints" / name
    history = train.fit(model, taught, schedule=recipe.schedule, folder=checkpoints, loss=loss)
    (folder / finetune.HISTORY).write_text(json.dumps(history, indent=1) + "\n")
    return {"target_bytes_per_token": stored, "tokens": read.numel()}


def _refuse(recipe: Recipe, start: Artifact, teacher: Artifact) -> None:
    if recipe.kind not in KINDS:
        raise ValueError(f"unknown kind {recipe.kind!r}; choose one of {', '.join(KINDS)}")
    if teacher.format != "bf16":
        raise ValueError(f"the teacher {teacher.name} is in format {teacher.format!r}; it has to be the bf16 model")
    distill.refuse_other_tokenizer(models.load_tokenizer(start), models.load_tokenizer(teacher))
