"""LongLoRA: a model that reads further than it was trained to, learned at a fraction of long attention's price.

1. `stretched` gives a model's configuration a longer context: rotary positions are scaled `linear` (all frequencies
   alike: Chen et al. 2023, arXiv 2306.15595), `yarn` (fast ones are left alone, attention sharpened: Peng et al. 2023,
   arXiv 2309.00071) or `llama3` (fast ones are left alone, the slow ones scaled, a ramp between).
2. Training reads long rows with shifted sparse attention (`models.attention`, `group`), which is what makes a step cost
   less; adapters are on the linear layers, norms and embedding are trained whole (Chen et al. 2023, arXiv 2309.12307,
   section 3.3: without these two the adapters alone do not reach full fine-tuning).
3. The result is an ordinary bf16 model with full attention and its scaling in config.json: any engine that reads that
   can answer with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from avalab.data import corpora, packing
from avalab.data.packing import Rows
from avalab.lab import artifacts, statistics, trackers
from avalab.lab.artifacts import Artifact
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import Run, load_average
from avalab.models import adapters, checkpoint, predict, walk
from avalab.models.attention import apply_packed_attention
from avalab.train import finetune, loop, losses, targets
from avalab.train.recipes import ContextRecipe as Recipe

SLOW, FAST = 1.0, 4.0  # of `llama3`: turns within the old context below and above which a frequency is slow or fast


def rope_of(config: PreTrainedConfig, *, factor: float, scaling: str) -> dict:
    """The rotary parameters of a configuration, scaled. Raises ValueError for positions that are scaled already."""
    before = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" not in before:
        raise InputError(f"{config.model_type} models have no rotary positions of one kind; nothing here scales others")
    if before.get("rope_type", "default") != "default":
        raise InputError(
            f"the positions of this {config.model_type} model are scaled already ({before['rope_type']}); begin with "
            "the model before that"
        )
    more = {"linear": {}, "yarn": {}, "llama3": {"low_freq_factor": SLOW, "high_freq_factor": FAST}}[scaling]
    if scaling != "linear":
        more = more | {"original_max_position_embeddings": config.max_position_embeddings}
    return before | {"rope_type": scaling, "factor": float(factor)} | more


def apply_stretch(model: PreTrainedModel, *, factor: float, scaling: str) -> None:
    """Scale a model's positions and lengthen its context; a factor of 1 changes nothing."""
    if factor == 1:
        return
    config = model.config
    config.rope_parameters = rope_of(config, factor=factor, scaling=scaling)
    config.max_position_embeddings = int(config.max_position_embeddings * factor)
    rotary = model.base_model.rotary_emb
    model.base_model.rotary_emb = type(rotary)(config).to(rotary.inv_freq.device)


def stretched(base: Artifact, *, factor: float, scaling: str) -> Artifact:
    """The base with scaled positions and not a weight changed: what training is compared with.

    Raises ValueError for positions that cannot be scaled.
    """

    def fill(folder: Path) -> None:
        model = checkpoint.load_model(base)
        apply_stretch(model, factor=factor, scaling=scaling)
        checkpoint.save_model(model, checkpoint.load_tokenizer(base), folder)

    step = {"step": "stretch", "factor": float(factor), "scaling": scaling, "code": code_of(apply_stretch)[:12]}
    out = base.path.parent / f"{base.name}+{scaling}-x{factor:g}"
    return artifacts.make_artifact(out, fill, base=base, step=step, format="bf16")


def context_rows(run: Run, base: Artifact, *, tokens: int, count: int, group_share: float) -> Rows:
    """`count` rows of calibration text, each one window of `tokens` tokens with groups of that share of it.

    Raises ValueError when there is not so much text, or a group would be an odd number of tokens.
    """
    tokenizer = checkpoint.load_tokenizer(base)
    group = int(tokens * group_share)
    if group < 2 or group % 2:
        raise InputError(f"a share of {group_share:g} of {tokens} tokens is a group of {group}; it has to be even")
    rows = packing.window_rows(corpora.shuffled_windows(run, tokenizer, tokens=tokens, count=count))
    return rows if group_share == 1 else [{**row, "group": torch.tensor(group)} for row in rows]


def apply_trained_norms_and_embedding(model: PreTrainedModel) -> None:
    """Make norms and the input embedding trainable in float32, rounded on their way out, besides what is trainable."""
    predict.output_head(model)  # tried out once, while a head that is tied to the embedding still has the model's dtype
    for module in norms_and_embedding(model).values():
        narrow = module.weight.dtype
        module.weight.data = module.weight.data.float()
        module.weight.requires_grad_(True)
        module.forward = partial(_narrowed, module.forward, narrow)


def _narrowed(forward, dtype: torch.dtype, x: Tensor) -> Tensor:
    return forward(x).to(dtype)


def norms_and_embedding(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The input embedding and every norm that has a weight, by qualified name."""
    found = {name: m for name, m in model.named_modules() if type(m).__name__.endswith(("RMSNorm", "LayerNorm"))}
    inputs = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is inputs)
    return {name: inputs} | {name: m for name, m in found.items() if getattr(m, "weight", None) is not None}


def train_longer(base: Artifact, rows: Rows, *, run: Run, name: str, recipe: Recipe | None = None) -> Artifact:
    """The bf16 artefact `name` with a longer context, trained on `context_rows`.

    Raises ValueError for positions that cannot be scaled, and what `loop.fit` raises.
    """
    recipe = recipe or Recipe()
    step = {"step": "longlora", **asdict(recipe), "rows": targets.rows_sha256(rows), "seed": run.seed}
    step |= {"code": code_of(train_longer)[:12]}

    def train(folder: Path, identity: str) -> dict:
        model, tokenizer = checkpoint.load_model(base, run.device), checkpoint.load_tokenizer(base)
        apply_stretch(model, factor=recipe.factor, scaling=recipe.scaling)
        finetune.apply_adapters(model, recipe.training, seed=run.seed)
        apply_trained_norms_and_embedding(model)
        schedule = recipe.training.schedule
        loss = losses.next_token
        loop.fit_kept(model, rows, folder, run=run, name=name, schedule=schedule, loss=loss, identity=identity)
        finished = checkpoint.load_model(base)
        apply_stretch(finished, factor=recipe.factor, scaling=recipe.scaling)
        copy_trained(model, finished)
        checkpoint.save_model(finished, tokenizer, folder)
        return {"tokens": sum(len(row["input_ids"]) for row in rows)}

    return loop.train_artifact(base.path.parent / name, train, base=base, step=step, format="bf16")


@torch.no_grad()
def copy_trained(model: PreTrainedModel, into: PreTrainedModel) -> None:
    """Round what was trained into another model of the same shape: adapters merged, norms and embedding."""
    layers = walk.linear_layers(into)
    for name, weight in adapters.merged_weights(model).items():
        layers[name].weight.copy_(weight)
    others = norms_and_embedding(into)
    for name, module in norms_and_embedding(model).items():
        others[name].weight.copy_(module.weight)


def record_steps(
    run: Run, base: Artifact, row: dict[str, Tensor], recipe: Recipe, *, samples: int
) -> dict[str, list[float]]:
    """Append `step_ms` and `activation_bytes` of a row's forward and backward pass, `sparse` as it is and `full`.

    The two run in turn in one process; bytes are what autograd keeps of the forward pass, each storage once.
    """
    model = checkpoint.load_model(base, run.device)
    finetune.apply_adapters(model, recipe.training, seed=run.seed)
    apply_packed_attention(model)
    student = loop.Student(model, losses.next_token).train()
    whole = {name: value for name, value in row.items() if name != "group"}
    batches = {"sparse": packing.one_row_batch([row]), "full": packing.one_row_batch([whole])}

    def pass_of(batch: dict[str, Tensor]) -> Callable[[], None]:
        moved = {name: value.to(run.device) for name, value in batch.items()}

        def forward_and_backward() -> None:
            student(**moved)["loss"].backward()
            student.zero_grad()

        return forward_and_backward

    found = trackers.interleaved({name: pass_of(batch) for name, batch in batches.items()}, samples, run.device)
    details = {"load_average": load_average(), "tokens": len(row["input_ids"])}
    for name, samples in found.items():
        about = {"artifact_sha256": base.sha256, "engine": "torch", "details": details}
        run.record(name, "step_ms", unit="ms", samples=samples, **about, **vars(statistics.median_and_range(samples)))
        kept = loop.kept_for_backward(
            lambda name=name: student(**{k: v.to(run.device) for k, v in batches[name].items()})
        )
        run.record(name, "activation_bytes", kept, "bytes", **about)
    return found
