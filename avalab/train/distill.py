"""Distillation of a teacher into a smaller student: the training loop with a loss that listens to the teacher.

    adapter = distill.train_student(pruned, teacher, rows, run=run, name="pruned+kl", recipe=Recipe())
    student = adapters.merge_adapters(adapter)

The loss of a row is a sum, each part with a weight of the recipe; a part with weight 0 is not computed:

| part | what is compared | source |
|---|---|---|
| `kl` | KL(teacher || student) at a temperature T, times T^2 | Hinton et al. 2015, arXiv 1503.02531 |
| `reverse` | the share of `kl` that is KL(student || teacher) instead | Gu et al. 2024, arXiv 2306.08543 |
| `cross_entropy` | the row's own labels | |
| `hidden`, `attention` | mapped blocks: residual stream, attention (`losses`) | TinyBERT, MiniLM |

The teacher is `online` (it reads each row before the student does, without gradients; its logits exist a chunk at a
time), or was asked before: `sampled` and `topk` targets (`targets`) are kept in a file and cost the step next to
nothing. On-policy training is the same call with the student's own answers as rows (`packing.own_answers`), teaching
by text alone with a teacher's answers (`packing.with_answers_of`) and `kl` = 0. Both models have one tokenizer.

The student is trained through adapters (`finetune.Recipe`), also on a 4-bit base, or with rank 0 as a whole
(`adapters.apply_wide_weights`).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avalab import kernels
from avalab.data.packing import IGNORED, Rows, one_row_batch
from avalab.lab.artifacts import Artifact
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import Run
from avalab.models import adapters, checkpoint, predict
from avalab.models.attention import apply_packed_attention
from avalab.models.predict import PLAIN
from avalab.train import finetune, loop, losses, targets
from avalab.train.recipes import ONLINE, Map
from avalab.train.recipes import DistillRecipe as Recipe
from avalab.train.targets import TargetForm

FITTED_ROWS = 4  # of the rows: what a projection between widths is fitted on


@dataclass(frozen=True)
class Objective:
    """The loss `loop.fit` calls. `teacher` is None where stored targets, or the labels alone, are all there is."""

    recipe: Recipe
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    layer_map: Map
    projections: tuple[Tensor | None, ...]  # of each pair of the map
    identity: str
    words: int | None = None  # entries that are compared, where one vocabulary is padded further than the other

    @property
    def needs_layers(self) -> bool:
        """Whether the loop has to hand over the residual stream."""
        return bool(self.recipe.hidden or self.recipe.attention)

    def __call__(
        self, hidden: Float[Tensor, "1 token channel"], head: Float[Tensor, "vocab channel"], batch: dict
    ) -> Float[Tensor, ""]:
        recipe, keep = self.recipe, batch["labels"] != IGNORED
        loss = hidden.new_zeros((), dtype=torch.float32)
        if recipe.cross_entropy:
            loss = loss + recipe.cross_entropy * losses.next_token(hidden, head, batch)
        if recipe.kl and recipe.teacher != ONLINE:
            loss = loss + recipe.kl * _from_targets(hidden, head[: self.words], batch, keep, recipe)
        if self.teacher is not None:
            heard = teacher_outputs(self.teacher, batch, layers=self.needs_layers)
            states = heard.last_hidden_state
            heard_by = hidden, head[: self.words]
            loss = loss + recipe.kl * _divergence(*heard_by, batch, states, self.teacher, recipe)
            loss = loss + self._inside(batch, heard.hidden_states, keep[0])
        return loss

    def _inside(self, batch: dict, theirs: tuple[Tensor, ...] | None, keep: Tensor) -> Tensor | float:
        """Mean over the map of what blocks are compared by; the stream behind block b stands at b + 1."""
        total = 0.0
        for (mine, other), projection in zip(self.layer_map, self.projections, strict=True):
            if self.recipe.hidden:
                ours, aim = batch["layers"][mine + 1][0][keep], theirs[other + 1][0][keep]
                total = total + self.recipe.hidden * losses.relative_error(ours, aim, projection)
            if self.recipe.attention:
                seen = losses.attention_maps(self.student, mine, batch["layers"][mine], batch)
                with torch.no_grad():
                    aims = losses.attention_maps(self.teacher, other, theirs[other], batch)
                parts = [losses.attention_divergence(a, b) for a, b in zip(seen, aims, strict=True)]
                total = total + self.recipe.attention * torch.stack(parts).mean()
        return total / len(self.layer_map) if self.layer_map else total


def train_student(
    student: Artifact, teacher: Artifact | None, rows: Rows, *, run: Run, name: str, recipe: Recipe | None = None
) -> Artifact:
    """The artefact `name`: adapters beside the student they belong to, or, with rank 0, the trained student in bf16.

    Rows are tokens of the student's tokenizer (`packing`). Raises ValueError for a recipe that listens to nobody or
    in no known way, a teacher with another tokenizer, and what `loop.fit` raises.
    """
    recipe = recipe or Recipe()
    _refuse(recipe, student, teacher)
    step = {"step": "distill", **asdict(recipe), "teacher_name": teacher.name if teacher else ""}
    step |= {"teacher_sha256": teacher.sha256 if teacher else "", "rows": targets.rows_sha256(rows), "seed": run.seed}

    def train(folder: Path, identity: str) -> dict:
        start = time.perf_counter()
        taught, stored = with_targets(run, rows, teacher, recipe)
        target_seconds = time.perf_counter() - start
        model = prepare_student(student, recipe, run)
        loss = objective_of(model, teacher, recipe, rows=rows, device=run.device, identity=identity)
        schedule = recipe.training.schedule
        loop.fit_kept(model, taught, folder, run=run, name=name, schedule=schedule, loss=loss, identity=identity)
        tokenizer = checkpoint.load_tokenizer(student)
        if recipe.training.rank:
            adapters.save_adapters(model, folder)
            tokenizer.save_pretrained(folder)
        else:
            adapters.restore_narrow_weights(model)
            checkpoint.save_model(model, tokenizer, folder)
        return {
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "scored_tokens": sum(int((row["labels"] != IGNORED).sum()) for row in rows),
            "target_seconds": target_seconds,
            "target_bytes_per_token": stored,
        }

    out, format = student.path.parent / name, "peft" if recipe.training.rank else "bf16"
    step |= {"code": code_of(train_student)[:12]}
    return loop.train_artifact(out, train, base=student, step=step, format=format)


def with_targets(run: Run, rows: Rows, teacher: Artifact | None, recipe: Recipe) -> tuple[Rows, float]:
    """The rows with what the teacher said where it was asked before, and the bytes a token that takes."""
    if not recipe.kl or recipe.teacher == ONLINE:
        return rows, 0.0
    form = TargetForm(recipe.teacher, recipe.count, recipe.temperature, run.seed)
    return targets.attach_targets(run, rows, teacher, form)


def prepare_student(student: Artifact, recipe: Recipe, run: Run) -> PreTrainedModel:
    """The student with what is trained made trainable: adapters, or all linear layers' weights at rank 0."""
    if recipe.training.rank:
        return finetune.prepare_model(student, recipe.training, run)
    model = checkpoint.load_model(student, run.device, packed=False)
    adapters.apply_wide_weights(model, recipe.training.target_modules)
    return model


def record_distillation(run: Run, subject: str, artifact: Artifact) -> None:
    """Append `finetune.record_training`'s metrics, and bytes a token of stored targets (none: an online teacher)."""
    finetune.record_training(run, subject, artifact)
    stored, step = artifact.card["measured"]["target_bytes_per_token"], artifact.card["recipe"][-1]
    note = "" if stored else "nothing is stored: the teacher reads along, or there is none"
    about = {"artifact_sha256": artifact.sha256, "details": {"recipe": step, **artifact.card["measured"]}}
    run.record(subject, "target_bytes_per_token", stored or None, "byte/token", note=note, **about)


def refuse_other_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ValueError naming the first token that the two do not share: their logits are about different entries."""
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (student, teacher))
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            raise InputError(
                f"student and teacher have different tokenizers: token {i} is {ours.get(i)!r} for the student and "
                f"{theirs.get(i)!r} for the teacher; let such a teacher answer in text (kl=0, cross_entropy=1)"
            )


def _refuse(recipe: Recipe, student: Artifact, teacher: Artifact | None) -> None:
    if recipe.listens and teacher is None:
        raise InputError("kl, hidden and attention need a teacher; without one only cross_entropy can be above 0")
    if recipe.listens and teacher.sha256 == student.sha256:
        raise InputError(
            f"teacher and student are the same model ({student.name}, sha256 {student.sha256[:16]}...): there is "
            "nothing to learn; give the model that the student was made from, or a larger one"
        )
    if recipe.listens:
        refuse_other_tokenizer(checkpoint.load_tokenizer(student), checkpoint.load_tokenizer(teacher))


# --- the loss ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def teacher_outputs(teacher: PreTrainedModel, batch: dict, *, layers: bool):
    """The teacher's outputs on a row, without gradients."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "boundaries")}
    return teacher.base_model(**inputs, use_cache=False, output_hidden_states=layers)


def _divergence(
    hidden: Tensor, head: Tensor, batch: dict, states: Tensor, teacher: PreTrainedModel, recipe: Recipe
) -> Tensor | float:
    """Divergence from a teacher that reads along, forward and reverse in the recipe's shares."""
    spoken, finish = predict.output_head(teacher)
    aim = (finish.scaled(states.to(hidden.dtype)), spoken.weight[: len(head)].to(hidden.dtype))
    keep, softcap, total = batch["labels"] != IGNORED, batch.get("finish", PLAIN).softcap, 0.0
    for share, reverse in ((1 - recipe.reverse, False), (recipe.reverse, True)):
        if recipe.kl * share:
            total = total + share * kernels.linear_kl(
                hidden,
                head,
                aim,
                keep=keep,
                reverse=reverse,
                temperature=recipe.temperature,
                softcap=softcap,
                teacher_softcap=finish.softcap,
            )
    return total


def _from_targets(hidden: Tensor, head: Tensor, batch: dict, keep: Tensor, recipe: Recipe) -> Tensor:
    """Divergence from stored targets: their cross-entropy less the teacher's own entropy."""
    crossed = kernels.linear_sparse(
        hidden,
        head,
        batch["target_ids"].long(),
        batch["target_weights"],
        keep=keep,
        tail=recipe.teacher == "topk",
        temperature=recipe.temperature,
        softcap=batch.get("finish", PLAIN).softcap,
    )
    return crossed - recipe.temperature**2 * batch["target_entropy"][keep].sum() / keep.sum().clamp(min=1)


def objective_of(
    model: PreTrainedModel, teacher: Artifact | None, recipe: Recipe, *, rows: Rows, device: str, identity: str
) -> Objective:
    """The loss of a recipe; the teacher is loaded only where it has to read along.

    Raises ValueError for a map with blocks that there are not.
    """
    inside, words = recipe.hidden or recipe.attention, shared_words(model, teacher) if recipe.kl else None
    if not inside and (recipe.teacher != ONLINE or not recipe.kl):
        return Objective(recipe, model, None, (), (), identity, words)
    asked = checkpoint.load_model(teacher, device, packed=False)
    apply_packed_attention(asked)
    if not inside:
        return Objective(recipe, model, asked, (), (), identity, words)
    blocks = [each.config.num_hidden_layers for each in (model, asked)]
    pairs = recipe.layer_map or losses.layer_map(*blocks, min(recipe.pairs, blocks[0]))
    pairs = losses.checked_map(pairs, *blocks)
    if recipe.attention:
        losses.refuse_other_attention(model, asked)
    return Objective(recipe, model, asked, pairs, _projections(model, asked, pairs, rows), identity, words)


def shared_words(model: PreTrainedModel, teacher: Artifact) -> int | None:
    """How many entries of both vocabularies are compared: all (None), or the words where their paddings differ."""
    rows = [len(model.get_output_embeddings().weight), checkpoint.vocabulary_rows(teacher)]
    return None if rows[0] == rows[1] else min(*rows, checkpoint.tokenizer_words(teacher))


def _projections(model: PreTrainedModel, teacher: PreTrainedModel, pairs: tuple, rows: Rows) -> tuple:
    """One matrix for each pair where the widths differ, fitted on the student as it is before training."""
    if model.config.hidden_size == teacher.config.hidden_size:
        return (None,) * len(pairs)
    apply_packed_attention(model)
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in pairs]
    for row in rows[:FITTED_ROWS]:
        batch = {name: value.to(model.device) for name, value in one_row_batch([row]).items()}
        ours, theirs = (teacher_outputs(each, batch, layers=True).hidden_states for each in (model, teacher))
        for place, (mine, other) in zip(seen, pairs, strict=True):
            place.append((ours[mine + 1][0], theirs[other + 1][0]))
    stacked = (tuple(map(torch.cat, zip(*place, strict=True))) for place in seen)
    return tuple(losses.projection(*states) for states in stacked)
