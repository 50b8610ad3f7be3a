"""Train the trainable parameters of a model on packed rows, with any loss: one thin entry over transformers' Trainer.

1. Rows are packed chats (`packing`); one row is a micro-batch, `rows_per_step` of them are a step.
2. `Student` hides the frozen model from the Trainer, which sees, saves and (with several processes) synchronises the
   trainable parameters only. It computes final hidden states; the loss takes those and the head, so that logits exist
   only where there is loss, a chunk at a time (`kernels.linear_cross_entropy`).
3. The loss of a step is the mean over all its answer tokens, whatever the rows, micro-batches or processes.
4. AdamW (8-bit and paged on a GPU), linear warm-up, cosine decay, gradient clipping, checkpoints, exact resume and
   early stopping are the Trainer's; whose a checkpoint is, and whether it is whole, `checkpoints` says.

A loss is a function `(hidden ["1 token channel"], head ["vocab channel"], batch) -> mean over the tokens that count`.
One with a true `needs_layers` finds the residual stream before, between and after the blocks in `batch["layers"]`; what
the `take_measures` of one returns after a step goes into the history beside the loss.
Under `accelerate launch` every process calls the same function; process 0 writes.

`train_artifact` and `fit_kept` are what every kind of training shares: the artefact that is there is not trained again,
a killed run goes on from its last checkpoint, and the history lies beside the weights.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from avalab.data.packing import IGNORED, Rows, one_row_batch
from avalab.lab import artifacts, process
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.lab.run import Run
from avalab.models import predict
from avalab.models.attention import apply_packed_attention
from avalab.train import checkpoints
from avalab.train.losses import Loss, next_token
from avalab.train.recipes import Schedule

HISTORY = "history.json"

LOGGED = ("step", "tokens", "loss", "seconds", "learning_rate", "grad_norm")

BLOCKS = "▁▂▃▄▅▆▇█"


class Student(nn.Module):
    """A model and a loss as the Trainer wants them: batch in, loss out, trainable parameters the only ones."""

    accepts_loss_kwargs = True  # the Trainer then says how many tokens the whole step has
    main_input_name = "input_ids"  # what the Trainer counts tokens in

    def __init__(self, model: PreTrainedModel, loss: Loss) -> None:
        super().__init__()
        head, finish = predict.output_head(model)
        if getattr(head, "bias", None) is not None:
            raise InputError(f"{model.config.model_type} models have a bias in their head, which no loss here knows")
        self.hidden_model = (model, loss, finish)  # a tuple is no submodule
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise InputError("no parameter of the model is trainable; attach adapters or set requires_grad first")
        self.trainable = nn.ParameterDict({name.replace(".", "/"): p for name, p in trainable.items()})
        self.take_measures = getattr(loss, "take_measures", dict)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.hidden_model[0].device

    def forward(self, num_items_in_batch: Tensor | int | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """`{"loss"}`: this row's share of the step's mean, or its own mean when nobody says what the step has."""
        model, loss, finish = self.hidden_model
        inputs = {name: batch[name] for name in predict.INPUTS if name in batch}
        needs_layers = getattr(loss, "needs_layers", False)
        outputs = model.base_model(**inputs, use_cache=False, output_hidden_states=needs_layers)
        hidden, more = finish.scaled(outputs.last_hidden_state), {"finish": finish}
        more |= {"layers": outputs.hidden_states} if needs_layers else {}
        mean = loss(hidden, model.get_output_embeddings().weight.to(hidden.dtype), batch | more)
        if num_items_in_batch is None:
            return {"loss": mean}
        return {"loss": mean * (batch["labels"] != IGNORED).sum() / num_items_in_batch}

    def train(self, mode: bool = True) -> Student:
        """Switch the hidden model, too: it decides whether dropout is active."""
        self.hidden_model[0].train(mode)
        return super().train(mode)


def train_artifact(
    out: Path, train: Callable[[Path, str], dict], *, base: Artifact, step: dict, format: str
) -> Artifact:
    """The artefact in the folder `out`: `base` and one more step, filled and measured by `train(folder, identity)`.

    The identity of base and step tells its checkpoints from others'. What the same step made from the same base before
    is verified and returned instead.
    """
    identity = artifacts.sha256_of_text(json.dumps([base.sha256, step], sort_keys=True))

    def fill(folder: Path) -> dict:
        start = time.perf_counter()
        measured = train(folder, identity)
        return measured | {"train_seconds": time.perf_counter() - start}

    return artifacts.make_artifact(out, fill, base=base, step=step, format=format)


def fit_kept(
    model: PreTrainedModel,
    rows: Rows,
    folder: Path,
    *,
    run: Run,
    name: str,
    schedule: Schedule,
    loss: Loss,
    identity: str,
    held_out: Rows | None = None,
) -> None:
    """`fit` with checkpoints under the run's by `name`; the history is kept in `folder`, beside the weights to come."""
    kept = run.artifacts_dir / "checkpoints" / name
    history = fit(model, rows, schedule=schedule, folder=kept, held_out=held_out, loss=loss, identity=identity)
    (folder / HISTORY).write_text(json.dumps(history, indent=1) + "\n")


def fit(
    model: PreTrainedModel,
    rows: Rows,
    *,
    schedule: Schedule,
    folder: Path,
    held_out: Rows | None = None,
    loss: Loss = next_token,
    identity: str = "",
) -> list[dict]:
    """Train the model in place; returns its history: `step, tokens, loss, seconds` and `held_out_loss` where measured.

    `folder` keeps checkpoints while training and loses them when it is done. What was stopped or killed goes on from
    the last one, where schedule, rows, loss (its `identity` or name) and `identity`, which stands for model and recipe,
    are the same; else it begins anew. `held_out` rows are scored before, after, and every `checkpoint_every` steps;
    with `patience` the best checkpoint's parameters are the result. Raises ValueError when no parameter is trainable,
    or a loss or gradient is not finite; KeyboardInterrupt, when it was stopped.
    """
    if not rows:
        raise InputError("there is nothing to train on: no rows")
    set_seed(schedule.seed)
    student = Student(model, loss)
    apply_packed_attention(model)
    if schedule.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = {"rows": _identity(rows), "held_out": _identity(held_out or [])}
    settings |= {"loss": getattr(loss, "identity", getattr(loss, "__name__", "")), "identity": identity}
    return fit_module(student, rows, schedule=schedule, folder=folder, settings=settings, held_out=held_out)


def fit_module(
    student: nn.Module,
    rows: Sequence[dict] | Dataset,
    *,
    schedule: Schedule,
    folder: Path,
    settings: dict,
    held_out: Sequence[dict] | None = None,
    collate: Callable[[list[dict]], dict] = one_row_batch,
) -> list[dict]:
    """`fit` of any module that takes a batch and gives `{"loss"}`, as `Student` does; batches are made by `collate`.

    It names its `device`, its `main_input_name`, of which the history counts the numbers as tokens, and may have
    `take_measures`. `settings` tell its checkpoints from others'.
    """
    settings = asdict(schedule) | settings
    own = checkpoints.own_folder(folder, settings)
    steps = schedule.steps or math.ceil(len(rows) / schedule.rows_per_step) * schedule.epochs
    arguments = _arguments(schedule, own, student.device.type, evaluate=bool(held_out))
    if steps * schedule.warmup < 1:  # rounded up, the only step of a short run would have a learning rate of 0
        arguments.warmup_steps = 0
    if first := arguments.process_index == 0:
        checkpoints.claim(own, settings)
    progress, keeper = Progress(own, student), checkpoints.Keeper(schedule.checkpoint_seconds)
    trainer = Trainer(
        student,
        arguments,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=held_out or None,
        callbacks=[progress, keeper, *([EarlyStoppingCallback(schedule.patience)] if schedule.patience else [])],
    )
    trainer.remove_callback(PrinterCallback)
    process.quiet_libraries()
    before = held_out_loss(student, held_out, collate) if held_out else None
    with trainer.accelerator.main_process_first():
        last = checkpoints.last_whole(own, writes=first)
    try:
        with keeper.interruptible():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        progress.close()
    history = _history(trainer.state.log_history, before)
    if held_out and "held_out_loss" not in history[-1]:
        history.append({"step": trainer.state.global_step, "held_out_loss": held_out_loss(student, held_out, collate)})
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        checkpoints.forget(own)
    return history


def _history(logged: list[dict], before: float | None) -> list[dict]:
    """What is kept of the Trainer's log."""
    history = [] if before is None else [{"step": 0, "held_out_loss": before}]
    for entry in logged:
        if "loss" in entry:
            history.append({name: entry[name] for name in LOGGED} | entry.get("measures", {}))
        elif "eval_loss" in entry:
            history.append({"step": entry["step"], "held_out_loss": entry["eval_loss"]})
    return history


@torch.no_grad()
def held_out_loss(
    student: nn.Module, rows: Sequence[dict], collate: Callable[[list[dict]], dict] = one_row_batch
) -> float:
    """Mean loss of rows, each counted alike, as the Trainer's evaluation has it."""
    student.eval()
    losses = [student(**{name: value.to(student.device) for name, value in collate([row]).items()}) for row in rows]
    student.train()
    return statistics.mean(float(found["loss"]) for found in losses)


def kept_for_backward(forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps of a call for its backward pass, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outcome = forward()  # held until all is counted: storage that is given back may be given out again
    del outcome
    return sum(kept.values())


class Progress(TrainerCallback):
    """A bar with the loss's curve, tokens a second and time left; a loss that is not finite ends the run.

    The base class is what the Trainer's interface asks for.
    """

    def __init__(self, folder: Path, student: nn.Module) -> None:
        self.folder, self.bar = folder, None  # of the checkpoints
        self.take_measures = getattr(student, "take_measures", dict)

    def on_train_begin(self, args, state, control, **_) -> None:
        seen = [e["seconds"] for e in state.log_history if "seconds" in e]
        self.started = time.perf_counter() - (seen[-1] if seen else 0.0)
        first = bool(state.is_world_process_zero)
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", disable=not first)

    def on_log(self, args, state, control, logs, **_) -> None:
        if "loss" not in logs:
            return
        for what, value in (("loss", logs["loss"]), ("gradient", logs.get("grad_norm", 0.0))):
            if not math.isfinite(value):
                raise InputError(f"the {what} is {value} at step {state.global_step}; {self._way_out(args)}")
        seconds = time.perf_counter() - self.started
        entry = state.log_history[-1]
        entry |= {"seconds": seconds, "tokens": int(state.num_input_tokens_seen), "measures": self.take_measures()}
        curve = sparkline([e["loss"] for e in state.log_history if "loss" in e])
        rate = entry["tokens"] / seconds
        self.bar.set_postfix_str(f"loss {curve} {logs['loss']:.3f}, {rate:.0f} tokens/s", refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def _way_out(self, args) -> str:
        kept = checkpoints.last_whole(self.folder, writes=False)
        where = f"step {checkpoints.step_of(kept)} is kept in {self.folder}" if kept else "nothing is left behind"
        return f"lower the learning rate, which is {args.learning_rate:g} ({where})"

    def close(self) -> None:
        """Let the bar be, however training ended."""
        if self.bar is not None:
            self.bar.close()


def sparkline(values: list[float], width: int = 16) -> str:
    """Values in order as at most `width` blocks of eighths between their least and greatest mean: 2, 1, 0 is `█▅▁`."""
    per_block = -(-len(values) // width)
    means = [statistics.mean(values[i : i + per_block]) for i in range(0, len(values), per_block)]
    least, span = min(means), max(means) - min(means)
    return "".join(BLOCKS[round((mean - least) / span * 7)] if span else BLOCKS[0] for mean in means)


def _arguments(schedule: Schedule, folder: Path, device: str, *, evaluate: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=schedule.rows_per_step,
        learning_rate=schedule.learning_rate,
        num_train_epochs=schedule.epochs,
        max_steps=schedule.steps or -1,
        warmup_steps=schedule.warmup,
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.clip,
        lr_scheduler_type="cosine",
        optim="paged_adamw_8bit" if device == "cuda" else "adamw_torch",
        use_cpu=device == "cpu",
        seed=schedule.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device == "cuda",
        disable_tqdm=True,
        report_to="none",
        save_strategy="steps",
        save_steps=schedule.checkpoint_every,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,  # of early stopping: how patient it still is
        eval_strategy="steps" if evaluate else "no",
        eval_steps=schedule.checkpoint_every,
        prediction_loss_only=True,
        load_best_model_at_end=evaluate and bool(schedule.patience),
        metric_for_best_model="eval_loss" if evaluate else None,
    )


def _identity(rows: Rows) -> str:
    return artifacts.sha256_of_text(json.dumps([[row["input_ids"].tolist(), row["labels"].tolist()] for row in rows]))
