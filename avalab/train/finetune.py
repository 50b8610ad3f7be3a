"""Fine-tune a model on chats: adapters on a bf16 or 4-bit base, trained on the answers, shipped as an artefact.

LoRA when the base artefact is bf16, QLoRA when it holds bitsandbytes' 4-bit weights (Dettmers et al. 2023). On a GPU
that unsloth supports its model is trained, elsewhere PEFT's with the lab's own kernels; the adapter is the same.

    adapter = finetune.train_adapter(base, examples, run=run, name="base+calls")
    merged = adapters.merge(adapter)

The same base, examples, recipe and code give the artefact that is there already; a killed run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel

from avalab.data import packing
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.code import code_of
from avalab.lab.run import Run
from avalab.models import adapters, checkpoint, walk
from avalab.train import loop, losses
from avalab.train.recipes import AdapterRecipe as Recipe

REHEARSAL_ROW = 512  # tokens


def train_adapter(
    base: Artifact,
    examples: Sequence[dict],
    *,
    run: Run,
    name: str,
    recipe: Recipe | None = None,
    held_out: Sequence[dict] = (),
) -> Artifact:
    """The adapter artefact `name`, trained on examples as `synthesize.load_examples` gives them.

    `held_out` examples are scored at every checkpoint. Raises ValueError for examples longer than a row or the model's
    context, for targets that match nothing, and what `loop.fit` raises.
    """
    recipe = recipe or Recipe()
    chats, kept_chats = (
        artifacts.sha256_of_text(json.dumps([example["messages"] for example in part])) for part in (examples, held_out)
    )
    step = {"step": "finetune", **asdict(recipe), "examples": chats, "held_out": kept_chats}
    step |= {"seed": run.seed, "code": code_of(train_adapter)[:12]}

    def train(folder: Path, identity: str) -> dict:
        model, tokenizer = prepare_model(base, recipe, run), checkpoint.load_tokenizer(base)
        context = model.config.max_position_embeddings
        rows, kept = (
            packing.pack_chats(tokenizer, part, row_tokens=recipe.row_tokens, context=context, seed=run.seed)
            for part in (examples, held_out)
        )
        if recipe.rehearsal_tokens:
            length, original = min(recipe.row_tokens, REHEARSAL_ROW), checkpoint.base_artifact(run)
            rows += packing.rehearsal_rows(run, original, tokens=recipe.rehearsal_tokens, row_tokens=length)
        loss = losses.weighted_first_tokens(recipe.first_token_weight)
        loop.fit_kept(
            model,
            rows,
            folder,
            run=run,
            name=name,
            schedule=recipe.schedule,
            loss=loss,
            identity=identity,
            held_out=kept,
        )
        adapters.save_adapters(model, folder)
        tokenizer.save_pretrained(folder)
        return {"tokens": sum(len(row["input_ids"]) for row in rows), "backend": training_backend(run.device)}

    return loop.train_artifact(run.artifacts_dir / name, train, base=base, step=step, format="peft")


def training_backend(device: str) -> str:
    """`unsloth` on a GPU where it is installed, else `peft`."""
    return "unsloth" if device.startswith("cuda") and importlib.util.find_spec("unsloth") else "peft"


def prepare_model(base: Artifact, recipe: Recipe, run: Run) -> PreTrainedModel:
    """The base with trainable adapters, ready for `loop.fit`."""
    if training_backend(run.device) == "unsloth":
        return _unsloth(base, recipe, run.seed)
    model = checkpoint.load_model(base, run.device, packed=None if not recipe.decoded else False)
    apply_adapters(model, recipe, seed=run.seed)
    return model


def apply_adapters(model: PreTrainedModel, recipe: Recipe, *, seed: int) -> None:
    """Put the recipe's adapters on a model, and the lab's kernels under them."""
    adapters.attach_adapters(
        model,
        rank=recipe.rank,
        alpha=recipe.alpha,
        dropout=recipe.dropout,
        target_modules=recipe.target_modules,
        seed=seed,
    )
    if recipe.fused:
        adapters.apply_fused_adapters(model, decoded=recipe.decoded)


def predicted_adapter_bytes(base: Artifact, recipe: Recipe) -> int:
    """Bytes of the adapter's numbers: rank x (rows + columns) of every target layer, in float32."""
    model = checkpoint.skeleton(base.path)
    layers, names = walk.linear_layers(model), walk.select_linear(model, recipe.target_modules)
    return 4 * recipe.rank * sum(layers[name].in_features + layers[name].out_features for name in names)


def load_history(adapter: Artifact) -> list[dict]:
    """What `loop.fit` returned when the adapter was trained."""
    return json.loads((adapter.path / loop.HISTORY).read_text(encoding="utf-8"))


def loss_change(artifact: Artifact, *, unit: str = "nats/token") -> str:
    """What training did to the loss, in words: of held-out examples, or else of the first and last tenth of steps."""
    history = load_history(artifact)
    kept = [entry["held_out_loss"] for entry in history if "held_out_loss" in entry]
    curve = kept or [entry["loss"] for entry in history if "loss" in entry]
    before, after = (kept[0], kept[-1]) if kept else _ends(curve)
    note = "" if after < before else "; it did not fall: a lower learning rate or more examples may help"
    return f"{'held-out' if kept else 'training'} loss {before:.3f} -> {after:.3f} {unit}{note}"


def _ends(curve: list[float]) -> tuple[float, float]:
    tenth = max(1, len(curve) // 10)
    return statistics.mean(curve[:tenth]), statistics.mean(curve[-tenth:])


def record_training(run: Run, subject: str, adapter: Artifact, *, unit: str = "nats/token") -> None:
    """Append training's tokens a second, its seconds and `train_loss`: the curve, its value the last tenth's mean."""
    entries = load_history(adapter)
    steps = [entry for entry in entries if "loss" in entry]
    at = {0: 0} | {entry["step"]: entry["tokens"] for entry in steps}
    held_out = [[at[entry["step"]], entry["held_out_loss"]] for entry in entries if "held_out_loss" in entry]
    curve, last = [entry["loss"] for entry in steps], steps[-1]
    about = {"artifact_sha256": adapter.sha256, "engine": "torch", "n": len(steps)}
    measured = adapter.card["measured"]
    run.record(subject, "train_tokens_per_s", last["tokens"] / last["seconds"], "tokens/s", details=measured, **about)
    run.record(subject, "train_seconds", last["seconds"], "s", details=measured, **about)
    _, end = _ends(curve)
    progress = {"tokens": [entry["tokens"] for entry in steps], "held_out": held_out}
    run.record(subject, "train_loss", end, unit, samples=curve, details=progress, **about)


def _unsloth(base: Artifact, recipe: Recipe, seed: int) -> PreTrainedModel:
    from unsloth import FastLanguageModel

    four_bits = base.format == "bitsandbytes"
    model, _ = FastLanguageModel.from_pretrained(
        str(base.path), max_seq_length=recipe.row_tokens, load_in_4bit=four_bits, local_files_only=True
    )
    names = walk.select_linear(model, recipe.target_modules)
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
