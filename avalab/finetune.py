"""Fine-tune a model on chats: adapters on a bf16 or 4-bit base, trained on the answers, shipped as an artefact.

LoRA when the base artefact is bf16, QLoRA when it holds bitsandbytes' 4-bit weights (Dettmers et al. 2023). On a GPU
that unsloth supports its model is trained, elsewhere PEFT's with the lab's own kernels; the adapter is the same.

    adapter = finetune.write(base, examples, run=run, name="base+calls")
    merged = adapters.merge(adapter)

The same base, examples, recipe and code give the artefact that is there already; a killed run goes on.

What it does not do: train all weights, rewards or preferences.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from avalab import (
    adapters,
    artifacts,
    first_token,
    models,
    packed_rows,
    quantize,
    rehearsal,
    train,
)
from avalab.artifacts import Artifact
from avalab.code import code_of
from avalab.experiment import Run
from avalab.train import Schedule

HISTORY = "history.json"
REHEARSAL_ROW = 512  # tokens


@dataclass(frozen=True)
class Recipe:
    """What is trained and how: the adapter, the rows, the schedule, and the means (which change speed, not results)."""

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("attention", "mlp")
    row_tokens: int = 1024
    rehearsal_tokens: int = 0  # of general text, held to what the base says there (`rehearsal`)
    first_token_weight: float = 0.0  # of answers' first tokens, which decide between call and refusal (`first_token`)
    schedule: Schedule = field(default_factory=Schedule)
    fused: bool = True  # the lab's kernels instead of PEFT's forward pass
    decoded: bool = True  # a 4-bit base is held in bf16 while training


def write(
    base: Artifact,
    examples: Sequence[dict],
    *,
    run: Run,
    name: str,
    recipe: Recipe | None = None,
    held_out: Sequence[dict] = (),
) -> Artifact:
    """The adapter artefact `name`, trained on examples as `synthesize.load` gives them.

    `held_out` examples are scored at every checkpoint. Raises ValueError for examples longer than a row or the model's
    context, for targets that match nothing, and what `train.fit` raises.
    """
    recipe = recipe or Recipe()
    step = {"step": "finetune", **asdict(recipe), "examples": _identity(examples), "held_out": _identity(held_out)}
    step |= {"seed": run.seed, "code": code_of(write)[:12]}
    steps = json.loads(json.dumps([*base.card["recipe"], step]))
    found = artifacts.find(name, run.artifacts_dir, steps, base.sha256)
    if found:
        return found

    def save(folder: Path) -> dict:
        tokenizer, start = models.load_tokenizer(base), time.perf_counter()
        model = prepared(base, recipe, run)
        context = model.config.max_position_embeddings
        how = {"row_tokens": recipe.row_tokens, "context": context, "seed": run.seed}
        rows, kept = (packed_rows.rows(tokenizer, part, **how) for part in (examples, held_out))
        if recipe.rehearsal_tokens:
            about = {"tokens": recipe.rehearsal_tokens, "row_tokens": min(recipe.row_tokens, REHEARSAL_ROW)}
            rows += rehearsal.rows(run, models.base(run), **about)
        how = {"schedule": recipe.schedule, "loss": first_token.weighted(recipe.first_token_weight)}
        checkpoints = run.artifacts_dir / "checkpoints" / name
        history = train.fit(model, rows, folder=checkpoints, held_out=kept, **how)
        adapters.save(model, folder)
        tokenizer.save_pretrained(folder)
        (folder / HISTORY).write_text(json.dumps(history, indent=1) + "\n")
        tokens = sum(len(row["input_ids"]) for row in rows)
        return {"train_seconds": time.perf_counter() - start, "tokens": tokens, "backend": backend(run.device)}

    origin = {"name": base.name, "sha256": base.sha256}
    about = {"base": origin, "recipe": steps, "format": "peft", "licence": base.card["licence"]}
    return artifacts.write(name, run.artifacts_dir, save, **about)


def backend(device: str) -> str:
    """`unsloth` on a GPU where it is installed, else `peft`."""
    return "unsloth" if device.startswith("cuda") and importlib.util.find_spec("unsloth") else "peft"


def prepared(base: Artifact, recipe: Recipe, run: Run) -> PreTrainedModel:
    """The base with trainable adapters, ready for `train.fit`."""
    if backend(run.device) == "unsloth":
        return _unsloth(base, recipe, run.seed)
    model = models.load(base, run.device)
    about = {"dropout": recipe.dropout, "target_modules": recipe.target_modules, "seed": run.seed}
    adapters.attach(model, rank=recipe.rank, alpha=recipe.alpha, **about)
    if recipe.fused:
        adapters.apply_fused(model, decoded=recipe.decoded)
    return model


def predicted_adapter_bytes(base: Artifact, recipe: Recipe) -> int:
    """Bytes of the adapter's numbers: rank x (rows + columns) of every target layer, in float32."""
    model = quantize.skeleton(base.path)
    layers, names = models.linear_layers(model), models.select_linear(model, recipe.target_modules)
    return 4 * recipe.rank * sum(layers[name].in_features + layers[name].out_features for name in names)


def history(adapter: Artifact) -> list[dict]:
    """What `train.fit` returned when the adapter was trained."""
    return json.loads((adapter.path / HISTORY).read_text(encoding="utf-8"))


def record(run: Run, subject: str, adapter: Artifact) -> None:
    """Append training's tokens a second, its seconds and `train_loss`: the curve, its value the last tenth's mean."""
    entries = history(adapter)
    steps = [entry for entry in entries if "loss" in entry]
    at = {entry["step"]: entry["tokens"] for entry in steps}
    held_out = [[at[entry["step"]], entry["held_out_loss"]] for entry in entries if "held_out_loss" in entry]
    losses, last = [entry["loss"] for entry in steps], steps[-1]
    about = {"artifact_sha256": adapter.sha256, "engine": "torch", "n": len(steps)}
    details = {"details": adapter.card["measured"]}
    run.record(subject, "train_tokens_per_s", last["tokens"] / last["seconds"], "tokens/s", **about, **details)
    run.record(subject, "train_seconds", last["seconds"], "s", **about, **details)
    curve = {"samples": losses, "details": {"tokens": list(at.values()), "held_out": held_out}}
    end = statistics.mean(losses[-max(1, len(losses) // 10) :])
    run.record(subject, "train_loss", end, "nats/token", **about, **curve)


def _identity(examples: Sequence[dict]) -> str:
    return artifacts.sha256_of_text(json.dumps([example["messages"] for example in examples]))


def _unsloth(base: Artifact, recipe: Recipe, seed: int) -> PreTrainedModel:
    from unsloth import FastLanguageModel

    four_bits = base.format == "bitsandbytes"
    model, _ = FastLanguageModel.from_pretrained(
        str(base.path), max_seq_length=recipe.row_tokens, load_in_4bit=four_bits, local_files_only=True
    )
    names = models.select_linear(model, recipe.target_modules)
    model = FastLanguageModel.get_peft_model(
        model,
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in names}),
        use_gradient_checkpointing="unsloth" if recipe.schedule.gradient_checkpointing else False,
        random_state=seed,
    )
    return model.get_base_model()  # the causal LM with the adapters inside, as `adapters.attach` leaves it
