"""Training through the rounding: a packed artefact in, one of exactly the same bytes out, closer to the bf16 model.

    better = qat.train_quantized(low, teacher, qat.training_windows(run, tokenizer, tokens=8192), run=run, out=folder)

| kind | what is trained | how |
|---|---|---|
| `scales` | scales (and zero points, if asked), codes as they are | end to end, KL to the teacher |
| `weights` | weights behind the codes, scales, zero points (LSQ) | end to end |
| `blocks` | codes and scales, one block after the other | its own outputs before rounding |
| `torchao` | as `weights`, through torchao's fake quantizers | end to end |

End to end is the loop with the loss of `distill`. `blocks` and then `scales` are the two stages of EfficientQAT (Chen
et al. 2024, arXiv 2407.11062): each writes an artefact, and a killed one goes on where it was. Every layer keeps its
own grid, every tensor its shape and type. Text is calibration text, without the windows that calibrated the rounding:
it fits those already, and learns little.

Block-wise reconstruction, so that each block does what it did before:
1. Two streams of hidden states run through the model: what each block received and gave before rounding, and what
   the blocks trained so far give.
2. A block of fake quantizers reads the second stream and should give what the original gave from the first; the loss is
   `losses.relative_error`.
3. Each step moves weights within and beyond their cells, and scales, by the sign of the gradient and a rate that falls
   linearly to zero (SignRound: Cheng et al. 2023, arXiv 2309.05516, section 3; which way to round each weight is the
   question of AdaRound, Nagel et al. 2020, arXiv 2004.10568). A block that is no better afterwards on the first few
   windows stays as it was.
4. The block's codes are then fixed, and both streams move on.
What a block has become is kept until all are done: a killed run goes on at the first one that is not.
Windows that are each read once teach more than few that are read often: a block has as many codes as weights. Memory
is one block's gradients and two streams.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avalab.data import corpora, packing
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cached_tensors
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import Run
from avalab.models import checkpoint, packed
from avalab.models.walk import Call, first_calls, next_call, own_keywords, with_keywords
from avalab.train import checkpoints, distill, fake_quant, finetune, loop, losses
from avalab.train.recipes import BlockTraining
from avalab.train.recipes import RoundingRecipe as Recipe

JUDGED = 4  # steps' worth of windows that say whether a block got better


def training_windows(run: Run, tokenizer: PreTrainedTokenizerBase, *, tokens: int) -> Int[Tensor, "window time"]:
    """Calibration text in windows of the profile's length, without those that `corpora.calibration_windows` gives.

    Raises ValueError when there is not so much text.
    """
    length, used = run.profile.calibration_tokens, run.profile.calibration_samples
    return corpora.shuffled_windows(run, tokenizer, tokens=length, skip=used, count=max(1, tokens // length))


def train_quantized(
    start: Artifact,
    teacher: Artifact,
    read: Int[Tensor, "window time"],
    *,
    run: Run,
    out: Path,
    recipe: Recipe | None = None,
) -> Artifact:
    """The artefact in the folder `out`: `start` with codes, scales and zero points as the recipe trains them on `read`.

    Raises ValueError for a start without packed layers, a teacher that is not bf16 or has another
    tokenizer, and what `loop.fit` raises.
    """
    recipe = recipe or Recipe()
    if teacher.format != "bf16":
        raise InputError(f"the teacher {teacher.name} is in format {teacher.format!r}; it has to be the bf16 model")
    distill.refuse_other_tokenizer(checkpoint.load_tokenizer(start), checkpoint.load_tokenizer(teacher))
    text = artifacts.sha256_of_text(json.dumps(read.tolist()))
    step = {"step": "qat", **asdict(recipe), "teacher_sha256": teacher.sha256, "seed": run.seed, "text": text}
    step |= {"tokens": read.numel(), "window_tokens": read.shape[1]}

    def train(folder: Path, identity: str) -> dict:
        layers = packed.packed_layers(start)
        model = _prepared(start, teacher, layers, recipe, run)
        if recipe.kind == "blocks":
            whole = checkpoint.load_model(teacher, run.device, packed=False)
            kept = checkpoints.own_folder(run.artifacts_dir / "checkpoints" / out.name, {"identity": identity})
            checkpoints.claim(kept, {"identity": identity})
            errors = reconstruct(model, whole, read, recipe.blocks, seed=run.seed, kept=kept)
            checkpoints.forget(kept)
            measured = {"block_errors": [list(pair) for pair in errors]}
        else:
            rows = packing.window_rows(read, windows_per_row=recipe.windows_per_row)
            listening = distill.Recipe(teacher=recipe.teacher, count=recipe.count)
            rows, stored = distill.with_targets(run, rows, teacher, listening)
            loss = distill.objective_of(model, teacher, listening, rows=rows, device=run.device, identity=identity)
            schedule = recipe.schedule
            loop.fit_kept(model, rows, folder, run=run, name=out.name, schedule=schedule, loss=loss, identity=identity)
            measured = {"target_bytes_per_token": stored, "tokens": read.numel()}
        after = {name: layer.rounded() for name, layer in fake_quant.fake_layers(model).items()}
        packed.replace_layers(start, folder, after)
        shares = [float((part.codes != layers[at].codes).float().mean()) for at, part in after.items()]
        return measured | {"codes_changed": sum(shares) / len(shares)}

    step |= {"code": code_of(train_quantized)[:12]}
    return loop.train_artifact(out, train, base=start, step=step, format=start.format)


def record_recovery(run: Run, subject: str, artifact: Artifact) -> None:
    """Append `train_tokens` read in all stages, `train_seconds`, and the curve of the loss where there is one."""
    stages = [step for step in artifact.card["recipe"] if step["step"] == "qat"]
    about = {"artifact_sha256": artifact.sha256, "details": {"recipe": stages, **artifact.card["measured"]}}
    run.record(subject, "train_tokens", sum(map(tokens_trained, stages)), "tokens", n=len(stages), **about)
    if stages[-1]["kind"] == "blocks":
        run.record(subject, "train_seconds", artifact.card["measured"]["train_seconds"], "s", engine="torch", **about)
    else:
        finetune.record_training(run, subject, artifact)


def loss_change(artifact: Artifact) -> str:
    """What the last stage did to its loss, in words."""
    if not (errors := artifact.card["measured"].get("block_errors")):
        return finetune.loss_change(artifact)
    before, after = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    return f"relative error of blocks {before:.4f} -> {after:.4f} on average"


def tokens_trained(step: dict) -> int:
    """Tokens that a stage's steps read, repeats counted: in `blocks`, of each block."""
    if step["kind"] == "blocks":
        windows, time = step["blocks"]["windows_per_step"], step["window_tokens"]
        return step["blocks"]["steps"] * windows * time
    return int(step["tokens"] * step["schedule"]["epochs"])


def _prepared(start: Artifact, teacher: Artifact, layers: dict, recipe: Recipe, run: Run) -> PreTrainedModel:
    model = checkpoint.load_model(start, run.device, packed=False)
    weights = None
    if recipe.kind != "scales":
        original = checkpoint.load_model(teacher, packed=False)
        weights = {name: original.get_submodule(name).weight.detach().to(run.device) for name in layers}
    fake_quant.replace_layers(model, layers, weights=weights, zeros=recipe.zeros, torchao=recipe.kind == "torchao")
    return model


# --- block by block ----------------------------------------------------------------------------------------------


def reconstruct(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: Int[Tensor, "window time"],
    how: BlockTraining,
    *,
    seed: int,
    kept: Path | None = None,
) -> list[tuple[float, float]]:
    """Train the student's fake quantizers block by block, in place; each block's relative error before and after.

    What a file of the folder `kept` holds of a block is taken from there; others are written. Raises ValueError for a
    student without fake quantizers, or other sizes than positive ones.
    """
    if not fake_quant.fake_layers(student):
        raise InputError("nothing to reconstruct: no layer of the student is a fake quantizer")
    if not len(windows):
        raise InputError("there is nothing to reconstruct from: no windows")
    generator = torch.Generator().manual_seed(seed)
    blocks = list(zip(student.base_model.layers, teacher.base_model.layers, strict=True))
    parts = windows.split(how.windows_per_step)
    with torch.no_grad():
        mine, theirs = (
            [call for part in parts for call in first_calls(model, model.base_model.layers[0], part)]
            for model in (student, teacher)
        )
        # Of a model whose blocks differ in them (Gemma 3): each block's own rotary embedding and mask.
        own = list(zip(*(own_keywords(teacher, part) for part in parts), strict=True))
    errors = []
    for index, (block, original) in enumerate(tqdm(blocks, desc="blocks", leave=False)):
        if own:
            keywords = list(chain.from_iterable(own[index]))
            mine, theirs = with_keywords(mine, keywords), with_keywords(theirs, keywords)
        with torch.no_grad():
            theirs = [next_call(original, call) for call in theirs]
        aims, order = [args[0] for args, _ in theirs], _order(len(mine), how.steps, generator)
        settled = partial(_settled, block, mine, aims, how, order)
        found = settled() if kept is None else cached_tensors(kept / f"block-{index}.safetensors", settled)
        errors.append(tuple(found["errors"].tolist()))
        for name, layer in fake_quant.fake_layers(block).items():
            layer.restore(**{part: found[f"{name}.{part}"] for part in fake_quant.PARTS})
        with torch.no_grad():
            mine = [next_call(block, call) for call in mine]
    return errors


def _order(calls: int, steps: int, generator: torch.Generator) -> Tensor:
    """Which call each step reads: all of them in a drawn order before one comes again."""
    return torch.cat([torch.randperm(calls, generator=generator) for _ in range(-(-steps // calls))])[:steps]


def _settled(
    block: nn.Module, calls: list[Call], aims: list[Tensor], how: BlockTraining, order: Tensor
) -> dict[str, Tensor]:
    """A block's errors before and after its training, and the codes, scales and zero points it then has."""
    found = {"errors": torch.tensor(_fit(block, calls, aims, how, order), dtype=torch.float64)}
    for name, layer in fake_quant.fake_layers(block).items():
        layer.settle()
        found |= {f"{name}.{part}": getattr(layer, part).cpu() for part in fake_quant.PARTS}
    return found


def _fit(
    block: nn.Module, calls: list[Call], aims: list[Tensor], how: BlockTraining, order: Tensor
) -> tuple[float, float]:
    layers = fake_quant.fake_layers(block).values()
    rates = [(p, rate) for layer in layers for p, rate in layer.trainable(how.position_rate, how.scale_rate)]
    kept = [parameter.detach().clone() for parameter, _ in rates]
    judged = calls[:JUDGED], aims[:JUDGED]
    before = _error(block, *judged)
    for step, at in enumerate(order.tolist()):
        loss = _distance(block, calls[at], aims[at])
        for (parameter, rate), slope in zip(rates, torch.autograd.grad(loss, [p for p, _ in rates]), strict=True):
            parameter.data.sub_(slope.sign_(), alpha=rate * (1 - step / how.steps))
    after = _error(block, *judged)
    if not after < before:
        for (parameter, _), old in zip(rates, kept, strict=True):
            parameter.data.copy_(old)
    return before, min(before, after)


def _distance(block: nn.Module, call: Call, aim: Tensor) -> Tensor:
    (given, *_), _ = next_call(block, call)
    return losses.relative_error(given.flatten(0, -2), aim.flatten(0, -2))


@torch.no_grad()
def _error(block: nn.Module, calls: list[Call], aims: list[Tensor]) -> float:
    parts = [float(_distance(block, call, aim)) * len(aim) for call, aim in zip(calls, aims, strict=True)]
    return sum(parts) / sum(len(aim) for aim in aims)
