"""Training on pairs of answers: adapters on a student that is its own reference, through the one loop.

    pairs = pairs.own_mistakes(student, examples, run=run)
    adapter = align.train_aligned(student, pairs, run=run, name="student+dpo", recipe=PreferenceRecipe())
    better = adapters.merge_adapters(adapter)

1. The reference's log-probabilities of all answers are computed once, by the student before it has adapters, and kept
   on disk under the hash of rows, model and code: one model is in memory, and no step runs it twice.
2. Adapters begin as nothing, so that every margin begins at zero and the loss at log 2 (`dpo`).
3. Log-probabilities come from `kernels.linear_log_probabilities`: logits exist a chunk at a time.
4. The history has, beside the loss, the mean `margin` of a step's pairs in nats and the share of them that are ranked
   right (`accuracy`; a tie counts half).
"""

from __future__ import annotations

import statistics as numbers
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from avalab import kernels
from avalab.data.packing import Rows, one_row_batch
from avalab.lab import artifacts, statistics
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cache_path, cached_tensors
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import Run
from avalab.models import adapters, checkpoint, predict
from avalab.models.attention import apply_packed_attention
from avalab.models.predict import PLAIN
from avalab.train import finetune, loop
from avalab.train.preferences import losses
from avalab.train.preferences.pairs import pack_pairs
from avalab.train.recipes import PreferenceRecipe as Recipe

UNIT = "nats/pair"  # of a loss of pairs


@dataclass(frozen=True)
class Objective:
    """The loss `loop.fit` calls on rows with `reference`; it remembers the pairs it saw since `take_measures`."""

    recipe: Recipe
    identity: str
    seen: list[Tensor] = field(default_factory=list)  # margins of pairs

    def __call__(
        self, hidden: Float[Tensor, "1 token channel"], head: Float[Tensor, "vocab channel"], batch: dict
    ) -> Float[Tensor, ""]:
        ratios, lengths = log_ratios(hidden, head, batch)
        if torch.is_grad_enabled():
            self.seen.append(losses.margins(ratios.detach()))
        chosen = losses.LOSSES[self.recipe.loss]
        return chosen(ratios, lengths, beta=self.recipe.beta, smoothing=self.recipe.smoothing).mean()

    def take_measures(self) -> dict[str, float]:
        """Mean `margin` and `accuracy` of the pairs since the last time."""
        margins = torch.cat(self.seen) if self.seen else torch.zeros(1)
        self.seen.clear()
        return {"margin": margins.mean().item(), "accuracy": ranked_right(margins).mean().item()}


def ranked_right(margins: Float[Tensor, "pair"]) -> Float[Tensor, "pair"]:
    """1 where the chosen answer gained more than the rejected one, 0.5 where both gained the same, else 0."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def log_ratios(hidden: Tensor, head: Tensor, batch: dict) -> tuple[losses.Ratios, Tensor]:
    """Log-ratios to the reference of each pair's answers, and their lengths in tokens."""
    found, lengths = answer_log_probabilities(hidden, head, batch)
    ratios = found - batch["reference"][0].to(found.dtype)
    return ratios.view(-1, 2), lengths.view(-1, 2)


def answer_log_probabilities(hidden: Tensor, head: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
    """log pi(answer | prompt) in nats of every answer of a row, chosen and rejected in turn, and their lengths."""
    softcap = batch.get("finish", PLAIN).softcap
    sources, aims, owners = (batch[name][0] for name in ("sources", "targets", "owners"))
    by_token = kernels.linear_log_probabilities(hidden[0][sources], head, aims, softcap=softcap)
    answers = 2 * len(batch["forks"])
    return losses.summed(by_token, owners, answers), torch.bincount(owners, minlength=answers)


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, rows: Rows, *, progress: str = "") -> list[Float[Tensor, "answer"]]:
    """What a model gives the answers of each row."""
    apply_packed_attention(model)
    head, finish = predict.output_head(model)
    found = []
    for row in tqdm(rows, desc=progress, unit="row", leave=False, disable=not progress):
        batch = {name: value.to(model.device) for name, value in one_row_batch([row]).items()} | {"finish": finish}
        inputs = {name: batch[name] for name in predict.INPUTS if name in batch}
        hidden = finish.scaled(model.base_model(**inputs, use_cache=False).last_hidden_state)
        found.append(answer_log_probabilities(hidden, head.weight.to(hidden.dtype), batch)[0].cpu())
    return found


def rows_sha256(rows: Rows) -> str:
    """Identity of rows of pairs: tokens, and which of them are whose answers."""
    parts = [[row[name].tolist() for name in ("input_ids", "boundaries", "forks")] for row in rows]
    return artifacts.sha256_of_text(repr(parts))


def cached_log_probabilities(model: PreTrainedModel, artifact: Artifact, rows: Rows, run: Run) -> list[Tensor]:
    """`log_probabilities` of an artefact's model, read where they are known."""
    code = code_of(log_probabilities)
    path = cache_path(run.artifacts_dir / "cache", "answers", artifact.sha256, rows_sha256(rows), code[:8])

    def compute() -> dict[str, Tensor]:
        return {"log_probabilities": torch.cat(log_probabilities(model, rows, progress=artifact.name))}

    flat = cached_tensors(path, compute)["log_probabilities"]
    return list(flat.split([2 * len(row["forks"]) for row in rows]))


def train_aligned(
    student: Artifact,
    pairs: list[dict],
    *,
    run: Run,
    name: str,
    recipe: Recipe | None = None,
    held_out: list[dict] | None = None,
) -> Artifact:
    """The adapter artefact `name`, beside the student, which is where it begins and what it is held to.

    Raises ValueError for pairs that are equal, too long or of another tokenizer, and what `loop.fit` raises.
    """
    recipe, held_out = recipe or Recipe(), held_out or []
    hashes = [artifacts.sha256_of_text(repr(part)) for part in (pairs, held_out)]
    step = {"step": "align", **asdict(recipe), "pairs": hashes[0], "held_out": hashes[1], "seed": run.seed}
    step |= {"code": code_of(train_aligned)[:12]}

    def train(folder: Path, identity: str) -> dict:
        tokenizer, model = checkpoint.load_tokenizer(student), checkpoint.load_model(student, run.device)
        rows = packed(student, pairs, recipe, run)
        scored = packed(student, held_out, recipe, run) if held_out else []
        known = cached_log_probabilities(model, student, [*rows, *scored], run)
        both = [{**row, "reference": values} for row, values in zip([*rows, *scored], known, strict=True)]
        finetune.apply_adapters(model, recipe.training, seed=run.seed)
        loss = Objective(recipe, identity)
        kept = both[len(rows) :]
        loop.fit_kept(
            model,
            both[: len(rows)],
            folder,
            run=run,
            name=name,
            schedule=recipe.training.schedule,
            loss=loss,
            identity=identity,
            held_out=kept,
        )
        adapters.save_adapters(model, folder)
        tokenizer.save_pretrained(folder)
        return {"tokens": sum(len(row["input_ids"]) for row in rows), "pairs": len(pairs)}

    return loop.train_artifact(student.path.parent / name, train, base=student, step=step, format="peft")


def packed(student: Artifact, pairs: list[dict], recipe: Recipe, run: Run) -> Rows:
    """The pairs as rows of the student's tokens."""
    context = checkpoint.context_tokens(student)
    tokenizer = checkpoint.load_tokenizer(student)
    return pack_pairs(tokenizer, pairs, row_tokens=recipe.training.row_tokens, context=context, seed=run.seed)


def pair_margins(artifact: Artifact, student: Artifact, pairs: list[dict], recipe: Recipe, run: Run) -> Tensor:
    """By how many nats an artefact tells the answers of each pair further apart than the student it began as."""
    if artifact.sha256 == student.sha256:
        raise InputError(f"{artifact.name} is the student itself; its margins are zero")
    rows = packed(student, pairs, recipe, run)
    found = [
        torch.cat(cached_log_probabilities(checkpoint.load_model(each, run.device), each, rows, run)).view(-1, 2)
        for each in (artifact, student)
    ]
    return losses.margins(found[0] - found[1])


def record_alignment(run: Run, subject: str, adapter: Artifact, margins: Tensor | None = None) -> None:
    """Append `finetune.record_training`'s metrics, and `pair_margin` and `pair_accuracy` of unseen pairs."""
    finetune.record_training(run, subject, adapter, unit=UNIT)
    history = [entry for entry in finetune.load_history(adapter) if "margin" in entry]
    record = partial(run.record, subject, artifact_sha256=adapter.sha256, engine="torch")
    curve = [entry["margin"] for entry in history]
    details = {"tokens": [entry["tokens"] for entry in history]}
    last = max(1, len(curve) // 10)
    record("pair_margin:trained", numbers.mean(curve[-last:]), "nats", n=len(curve), samples=curve, details=details)
    if margins is None:
        return
    found = statistics.mean(margins[:, None].double().numpy(), resamples=run.profile.resamples, seed=run.seed)
    record("pair_margin", unit="nats", **vars(found))
    right = statistics.wilson(int((margins > 0).sum()), len(margins))
    record("pair_accuracy", unit="1", **vars(right))
