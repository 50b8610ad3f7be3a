"""The sub-command `distill`: a student learns from a teacher that is a model here, on the hub, or behind a URL."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli_options import AsJson, Profile, Seed, print_records


def distill(
    teacher: Annotated[str, typer.Option(help="Artefact folder, embedded model, hub id, or base URL (text only).")],
    student: Annotated[str, typer.Option(help="Artefact folder (pruned, 4-bit, ...), model folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the trained student; a 4-bit one gets its adapter there.")],
    data: Annotated[Path | None, typer.Option(help="JSONL file or folder of chats; general text without.")] = None,
    temperature: Annotated[float, typer.Option(help="Of both distributions.")] = 1.0,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 1.0,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to learn from in a pass.")] = 20_000,
    targets: Annotated[
        str, typer.Option(help="online (the teacher reads along), sampled or topk (stored).")
    ] = "online",
    count: Annotated[int, typer.Option(help="Draws or most probable words a token of stored targets.")] = 50,
    reverse: Annotated[float, typer.Option(help="Share of the reverse divergence.")] = 0.0,
    cross_entropy: Annotated[float, typer.Option(help="Weight of the labels beside the teacher.")] = 0.0,
    hidden: Annotated[float, typer.Option(help="Weight of matching hidden states.")] = 0.0,
    attention: Annotated[float, typer.Option(help="Weight of matching attention.")] = 0.0,
    own_answers: Annotated[bool, typer.Option(help="On policy: the student answers the prompts of --data.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the adapters; 0 trains the weights.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="At the end of the warm-up.")] = 1e-3,
    row_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a row; longer chats are left out.")] = 512,
    teacher_model: Annotated[str, typer.Option(help="The model's name at the base URL.")] = "",
    cost: Annotated[float, typer.Option(min=0, help="Most that a URL's answers may cost in all.")] = inf,
    profile: Profile = "laptop",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train a smaller model towards a larger one; stopped, it goes on from its last checkpoint when run again."""
    from avalab import adapters
    from avalab import distill as distill_
    from avalab.distill import Recipe
    from avalab.experiment import Run

    run, by_text = Run("avalab_distill", profile, seed), teacher.startswith(("http://", "https://"))
    learner = _artifact(student, run)
    name = _adapter_name(learner, out, rank)
    training = _training(rank=rank, row_tokens=row_tokens, learning_rate=learning_rate, epochs=epochs)
    weights = {"reverse": reverse, "cross_entropy": cross_entropy, "hidden": hidden, "attention": attention}
    listening = {"kl": 0.0, "cross_entropy": 1.0} if by_text else weights | {"teacher": targets, "count": count}
    recipe = Recipe(temperature=temperature, training=training, **listening)
    told = _asked(teacher, teacher_model, cost) if by_text else None
    rows = _rows(run, learner, data, told=told, own_answers=own_answers, size=(row_tokens, tokens))
    taught = distill_.train_student(
        learner, None if by_text else _artifact(teacher, run), rows, run=run, name=name, recipe=recipe
    )
    distill_.record_distillation(run, out.name, taught)
    if taught.format == "peft" and learner.format == "bf16":
        taught = adapters.merge(taught, name=out.name, directory=out.resolve().parent)
    print_records(run, as_json)
    print(f"student {taught.path}")


def _training(*, rank: int, row_tokens: int, learning_rate: float, epochs: float):
    from avalab import finetune
    from avalab.train import Schedule

    schedule = Schedule(learning_rate=learning_rate, epochs=epochs, rows_per_step=4)
    return finetune.Recipe(rank=rank, alpha=2 * max(1, rank), row_tokens=row_tokens, schedule=schedule)


def _artifact(name: str, run):
    """The artefact in a folder, or the base made of a model folder, an embedded model or a hub id."""
    from avalab import artifacts, models

    folder = Path(name)
    return artifacts.load(folder) if (folder / artifacts.CARD).is_file() else models.base(replace(run, model=name))


def _adapter_name(student, out: Path, rank: int) -> str:
    """Where training writes, beside the student; ValueError where the result could not be `out`."""
    if out.exists() and not (out / "card.json").is_file():
        raise ValueError(f"{out} exists and is not an artefact; name a new folder")
    beside = student.path.resolve().parent == out.resolve().parent
    if student.format == "bf16" and rank:
        return f"{out.name}-adapter"
    if not beside:
        raise ValueError(f"what is trained of {student.name} belongs beside it; use --out {student.path.parent}/NAME")
    return out.name


def _asked(url: str, model: str, cost: float):
    from avalab import teachers
    from avalab.experiment import ROOT, slug

    if not model:
        raise ValueError("a teacher behind a URL needs --teacher-model")
    cache = ROOT / "artifacts" / "teachers" / f"{slug(model)}.jsonl"
    return teachers.endpoint(url, model, cache=cache, limits=teachers.Limits(cost=cost))


def _rows(run, student, data: Path | None, *, told, own_answers: bool, size: tuple[int, int]) -> list:
    """General text, or whole chats; answers of a teacher by text are scored alone, without their prompts."""
    from avalab import models, packed_rows, synthesize

    tokenizer, (row_tokens, tokens) = models.load_tokenizer(student), size
    if data is None:
        if told or own_answers:
            raise ValueError("answers need prompts: give --data with chats")
        return packed_rows.text_rows(run, tokenizer, tokens=tokens, row_tokens=row_tokens)
    fitting = packed_rows.fitting(tokenizer, synthesize.load_examples(data), row_tokens)
    chosen = packed_rows.sample_examples(tokenizer, fitting, tokens=tokens, seed=run.seed)
    if own_answers:
        chosen = packed_rows.own_answers(student, chosen, run=run)
    if told:
        chosen = packed_rows.answered(chosen, told)
        kept = packed_rows.fitting(tokenizer, chosen, row_tokens)
        return packed_rows.rows(tokenizer, kept, row_tokens=row_tokens, context=row_tokens, seed=run.seed)
    return packed_rows.chat_rows(tokenizer, chosen, row_tokens=row_tokens, seed=run.seed)
