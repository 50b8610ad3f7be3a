"""The loss of distillation as the training loop calls it: a recipe's weights, and the teacher that reads along.

`of` makes an `Objective` from a recipe; `distill` says what its parts are and where they come from. With a teacher
online each row is read by the teacher first, without gradients; its logits exist a chunk at a time, as the student's.
A part with weight 0 is not computed.

What it does not do: decide anything about rows, students or files.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from avalab import distill_losses, finetune, kernels, models, predict
from avalab.artifacts import Artifact
from avalab.packed_attention import apply_packed_attention
from avalab.packed_rows import IGNORED, collate
from avalab.targets import FORMS

ONLINE = "online"
TEACHERS = (ONLINE, *FORMS)
FITTED_ROWS = 4  # of the rows: what a projection between widths is fitted on
Rows = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """How the student listens, and how it is trained. Weights of 0 leave a part out."""

    kl: float = 1.0
    temperature: float = 1.0
    reverse: float = 0.0  # share of `kl`
    cross_entropy: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    pairs: int = 4  # of blocks that are compared, evenly spaced
    layer_map: distill_losses.Map = ()  # (student's block, teacher's block); empty: `pairs` of them
    teacher: str = ONLINE
    count: int = 50  # draws or words a token of stored targets
    training: finetune.Recipe = field(default_factory=finetune.Recipe)

    @property
    def listens(self) -> bool:
        """Whether the teacher's model is needed at all."""
        return any((self.kl, self.hidden, self.attention))


@dataclass(frozen=True)
class Objective:
    """The loss `train.fit` calls. `teacher` is None where stored targets, or the labels alone, are all there is."""

    recipe: Recipe
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    layer_map: distill_losses.Map
    projections: tuple[Tensor | None, ...]  # of each pair of the map
    identity: str

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
            labels = kernels.linear_cross_entropy(hidden, head, batch["labels"], ignore_index=IGNORED)
            loss = loss + recipe.cross_entropy * labels
        if recipe.kl and recipe.teacher != ONLINE:
            loss = loss + recipe.kl * _from_targets(hidden, head, batch, recipe)
        if self.teacher is not None:
            heard = listened(self.teacher, batch, layers=self.needs_layers)
            loss = loss + recipe.kl * _divergence(hidden, head, (heard.last_hidden_state, self.teacher), keep, recipe)
            loss = loss + self._inside(batch, heard.hidden_states, keep[0])
        return loss

    def _inside(self, batch: dict, theirs: tuple[Tensor, ...] | None, keep: Tensor) -> Tensor | float:
        """Mean over the map of what blocks are compared by; the stream behind block b stands at b + 1."""
        total = 0.0
        for (mine, other), projection in zip(self.layer_map, self.projections, strict=True):
            if self.recipe.hidden:
                ours, aim = batch["layers"][mine + 1][0][keep], theirs[other + 1][0][keep]
                total = total + self.recipe.hidden * distill_losses.relative_error(ours, aim, projection)
            if self.recipe.attention:
                seen = distill_losses.attention_maps(self.student, mine, batch["layers"][mine], batch)
                with torch.no_grad():
                    aims = distill_losses.attention_maps(self.teacher, other, theirs[other], batch)
                parts = [distill_losses.attention_divergence(a, b) for a, b in zip(seen, aims, strict=True)]
                total = total + self.recipe.attention * torch.stack(parts).mean()
        return total / len(self.layer_map) if self.layer_map else total


@torch.no_grad()
def listened(teacher: PreTrainedModel, batch: dict, *, layers: bool):
    """The teacher's outputs on a row, without gradients."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "boundaries")}
    return teacher.base_model(**inputs, use_cache=False, output_hidden_states=layers)


def _divergence(hidden: Tensor, head: Tensor, teacher: tuple, keep: Tensor, recipe: Recipe) -> Tensor | float:
    states, model = teacher
    aim = (states.to(hidden.dtype), model.get_output_embeddings().weight.to(hidden.dtype))
    total = 0.0
    for share, reverse in ((1 - recipe.reverse, False), (recipe.reverse, True)):
        if recipe.kl * share:
            how = {"keep": keep, "reverse": reverse, "temperature": recipe.temperature}
            total = total + share * kernels.linear_kl(hidden, head, aim, **how)
    return total


def _from_targets(hidden: Tensor, head: Tensor, batch: dict, recipe: Recipe) -> Tensor:
    """Divergence from stored targets: their cross-entropy less the teacher's own entropy."""
    keep, ids = batch["labels"] != IGNORED, batch["target_ids"].long()
    how = {"keep": keep, "tail": recipe.teacher == "topk", "temperature": recipe.temperature}
    crossed = kernels.linear_sparse(hidden, head, ids, batch["target_weights"], **how)
    return crossed - recipe.temperature**2 * batch["target_entropy"][keep].sum() / keep.sum().clamp(min=1)


def of(
    model: PreTrainedModel, teacher: Artifact | None, recipe: Recipe, *, rows: Rows, device: str, identity: str
) -> Objective:
    """The loss of a recipe; the teacher is loaded only where it has to read along.

    Raises ValueError for a map with blocks that there are not, and models that cap their logits.
    """
    inside = recipe.hidden or recipe.attention
    if not inside and (recipe.teacher != ONLINE or not recipe.kl):
        return Objective(recipe, model, None, (), (), identity)
    asked = models.load(teacher, device)
    apply_packed_attention(asked)
    if any(predict.output_head(each)[1] for each in (model, asked)):
        raise ValueError("a model with a soft cap on its logits cannot be distilled here")
    if not inside:
        return Objective(recipe, model, asked, (), (), identity)
    blocks = [each.config.num_hidden_layers for each in (model, asked)]
    pairs = recipe.layer_map or distill_losses.layer_map(*blocks, min(recipe.pairs, blocks[0]))
    pairs = distill_losses.checked_map(pairs, *blocks)
    return Objective(recipe, model, asked, pairs, _projections(model, asked, pairs, rows), identity)


def _projections(model: PreTrainedModel, teacher: PreTrainedModel, pairs: tuple, rows: Rows) -> tuple:
    """One matrix for each pair where the widths differ, fitted on the student as it is before training."""
    if model.config.hidden_size == teacher.config.hidden_size:
        return (None,) * len(pairs)
    apply_packed_attention(model)
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in pairs]
    for row in rows[:FITTED_ROWS]:
        batch = {name: value.to(model.device) for name, value in collate([row]).items()}
        ours, theirs = (listened(each, batch, layers=True).hidden_states for each in (model, teacher))
        for place, (mine, other) in zip(seen, pairs, strict=True):
            place.append((ours[mine + 1][0], theirs[other + 1][0]))
    stacked = (tuple(map(torch.cat, zip(*place, strict=True))) for place in seen)
    return tuple(distill_losses.projection(*states) for states in stacked)
