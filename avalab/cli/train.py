"""The sub-commands that make a better model: synthesize examples, finetune on them, distill from a larger one."""

from __future__ import annotations

import json
import random
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli import options
from avalab.cli.options import AsJson, Model, Profile, Seed
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, MissingFile
from avalab.lab.run import ROOT, Run, slug

TeacherModel = Annotated[str, typer.Option(help="The model's name at the base URL.")]

Cost = Annotated[float, typer.Option(min=0, help="Most that a URL's answers may cost in all.")]


def synthesize(
    out: Annotated[Path, typer.Option(help="Folder of the set and its card; an older set there is replaced.")],
    count: Annotated[int, typer.Option(min=1, help="Accepted examples.")] = 400,
    kinds: Annotated[str, typer.Option(help="Kinds with commas, such as single_call,no_function; all without.")] = "",
    teacher: Annotated[str, typer.Option(help="Who rewords: OpenAI-compatible base URL or artefact folder.")] = "",
    teacher_model: TeacherModel = "",
    cost: Cost = inf,
    price: Annotated[str, typer.Option(help="Its prices a million tokens: in,out.")] = "0,0",
    per_minute: Annotated[float, typer.Option(min=0.1, help="Most requests a minute to a URL.")] = 60,
    overlap: Annotated[str, typer.Option(help="Compare with evaluation sets: here, all (fetched) or none.")] = "here",
    force: Annotated[bool, typer.Option("--force", help="Replace files there that this command did not make.")] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Make examples for fine-tuning; the key of a URL is read from OPENAI_API_KEY. Stopped, it resumes its answers."""
    if overlap not in ("here", "all", "none"):
        raise InputError(f"unknown overlap {overlap!r}; choose here, all or none")
    chosen = tuple(kind.strip() for kind in kinds.split(",") if kind.strip())
    for kind in chosen:
        options.one_of("kind", kind, options.KINDS)
    if teacher_model and not teacher:
        raise InputError(f"--teacher-model {teacher_model} is of no teacher; give its base URL by --teacher")
    if not force:
        artifacts.refuse_foreign(out, [f"{kind}.jsonl" for kind in options.KINDS], made_by=options.SET_MAKER)
    rewriter = _teacher(teacher, teacher_model, cost=cost, price=price, per_minute=per_minute) if teacher else None
    from avalab.data import repeats, synthesize

    sets = [] if overlap == "none" else repeats.evaluation_sets(fetch=overlap == "all")
    report = synthesize.write_examples(
        out, count=count, seed=seed, kinds=chosen, teacher=rewriter, sets=sets, replace=force
    )
    if as_json:
        print(json.dumps(report, indent=1))
        return
    for name, number in report["counts"].items():
        print(f"{name:32} {number:6}")
    for name, file in report["files"].items():
        print(f"{out / name}: {file['examples']} examples, {file['bytes']:,} bytes")
    print(f"compared with {', '.join(report['evaluation']) or 'no evaluation set'}")


def _is_url(teacher: str) -> bool:
    return teacher.startswith(("http://", "https://"))


def _teacher(address: str, model: str, *, cost: float, price: str = "0,0", per_minute: float = 60):
    """The teacher at a base URL or in an artefact folder; its answers are kept below artifacts/teachers."""
    cache = ROOT / "artifacts" / "teachers"
    if not _is_url(address):
        artifacts.load_artifact(Path(address), verify=False)  # refuses a folder without one
        from avalab.data import synthesize
        from avalab.data.teachers import local_teacher

        return local_teacher(Path(address), cache=cache / "local.jsonl", schema=synthesize.REWORDING)
    if not model:
        raise InputError("a teacher behind a URL needs --teacher-model")
    try:
        price_in, price_out = map(float, price.split(","))
    except ValueError:
        raise InputError(f"{price!r} is no pair of prices; write it like 0.15,0.6") from None
    if not (0 <= price_in < inf and 0 <= price_out < inf) or cost != cost:
        raise InputError(f"prices {price!r} and cost {cost}; they are sums of 0 or more")
    from avalab.data import teachers

    limits = teachers.Limits(requests_per_minute=per_minute, cost=cost, price_in=price_in, price_out=price_out)
    return teachers.endpoint_teacher(address, model, cache=cache / f"{slug(model)}.jsonl", limits=limits)


def finetune(
    out: Annotated[Path, typer.Option(help="Folder of the trained model: the adapter merged into bf16.")],
    data: Annotated[Path | None, typer.Option(help="JSONL file or folder of chats; the lab's own set without.")] = None,
    model: Model = "",
    method: Annotated[str, typer.Option(help="lora (bf16 base) or qlora (NF4 base).")] = "lora",
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    alpha: Annotated[float, typer.Option(help="The adapter's product is scaled by alpha / rank.")] = 32,
    dropout: Annotated[float, typer.Option(help="On the adapter's input; above 0 is slower.")] = 0.0,
    target_modules: Annotated[str, typer.Option(help="Kinds, globs or names of layers.")] = "attention mlp",
    learning_rate: Annotated[float, typer.Option(help="At the end of the warm-up.")] = 5e-4,
    epochs: Annotated[float, typer.Option(help="Passes over the examples.")] = 1.0,
    row_tokens: Annotated[int, typer.Option(help="Tokens of a packed row; longer examples are left out.")] = 1024,
    rehearsal: Annotated[
        float,
        typer.Option(min=0, max=1, help="Tokens of general text a token of examples, against forgetting; 0: none."),
    ] = 0.25,
    limit: Annotated[int, typer.Option(min=0, help="Examples to learn from; 0: the profile's number.")] = 0,
    profile: Profile = "laptop",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train an adapter on chats and merge it; stopped, it goes on from the last checkpoint when run again."""
    run = Run("avalab_finetune", profile, seed, model)
    if method not in ("lora", "qlora"):
        raise InputError(f"unknown method {method!r}; choose lora or qlora")
    if rank < 1:
        raise InputError(f"rank is {rank}; an adapter needs 1 or more")
    options.new_folder(out)
    options.known_model(model)
    if data and not data.exists():
        raise MissingFile(f"no examples at {data}")
    from avalab.compress import quantize
    from avalab.data import packing, synthesize
    from avalab.models import adapters, checkpoint
    from avalab.train import finetune
    from avalab.train.loop import Schedule

    examples = synthesize.load_examples(data or ROOT / "data" / "synthetic_datasets")
    base = checkpoint.base_artifact(run)
    tokenizer = checkpoint.load_tokenizer(base)
    fitting = packing.fitting(tokenizer, examples, row_tokens)
    chosen, held_out = split(fitting, limit or run.profile.train_examples, run.profile.held_out_examples, seed)
    print(f"{len(examples) - len(fitting)} of {len(examples)} examples exceed {row_tokens} tokens and are left out")
    start = base if method == "lora" else quantize.compress_artifact(base, "nf4", run=run, double_quantization=True)
    tokens = sum(len(packing.encode_chat(tokenizer, example["messages"]).ids) for example in chosen)
    recipe = finetune.Recipe(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=tuple(target_modules.split()),
        row_tokens=row_tokens,
        rehearsal_tokens=int(rehearsal * tokens),
        schedule=Schedule(learning_rate=learning_rate, epochs=epochs, rows_per_step=2),
    )
    print(f"{tokens:,} tokens of examples, {recipe.rehearsal_tokens:,} of rehearsal")
    name = f"{base.name}+{method}-{out.name}"
    adapter = finetune.train_adapter(start, chosen, run=run, name=name, recipe=recipe, held_out=held_out)
    merged = adapters.merge_adapters(adapter, name=out.name, directory=out.resolve().parent)
    finetune.record_training(run, out.name, adapter)
    options.print_records(run, as_json)
    print(f"adapter {adapter.path}\nmerged  {merged.path}")


def split(examples: list[dict], count: int, held_out: int, seed: int) -> tuple[list[dict], list[dict]]:
    """At most `count` examples to learn from and others to score, in a seeded order.

    Raises ValueError when nothing is left.
    """
    order = random.Random(seed).sample(examples, len(examples))
    scored = min(held_out, len(order) // 10)
    if not order:
        raise InputError("no example fits into a row; raise --row-tokens or give other --data")
    return order[scored : scored + count], order[:scored]


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
    teacher_model: TeacherModel = "",
    cost: Cost = inf,
    profile: Profile = "laptop",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train a smaller model towards a larger one; stopped, it goes on from its last checkpoint when run again."""
    run, by_text = Run("avalab_distill", profile, seed), _is_url(teacher)
    options.one_of("targets", targets, options.TARGETS)
    if by_text and not teacher_model:
        raise InputError("a teacher behind a URL needs --teacher-model")
    if data is None and (by_text or own_answers):
        raise InputError("answers need prompts: give --data with chats")
    options.known_model(student)
    if not by_text:
        options.known_model(teacher)
    from avalab.models import adapters
    from avalab.train import distill, finetune
    from avalab.train.loop import Schedule

    learner = options.source_artifact(student, run)
    name = _adapter_name(learner, out, rank)
    schedule = Schedule(learning_rate=learning_rate, epochs=epochs, rows_per_step=4)
    training = finetune.Recipe(rank=rank, alpha=2 * max(1, rank), row_tokens=row_tokens, schedule=schedule)
    if by_text:  # its words are labels
        text_teacher = _teacher(teacher, teacher_model, cost=cost)
        recipe = distill.Recipe(temperature=temperature, training=training, kl=0.0, cross_entropy=1.0)
    else:
        text_teacher = None
        recipe = distill.Recipe(
            temperature=temperature,
            training=training,
            teacher=targets,
            count=count,
            reverse=reverse,
            cross_entropy=cross_entropy,
            hidden=hidden,
            attention=attention,
        )
    rows = _rows(
        run, learner, data, text_teacher=text_teacher, own_answers=own_answers, row_tokens=row_tokens, tokens=tokens
    )
    reader = None if by_text else options.source_artifact(teacher, run)
    taught = distill.train_student(learner, reader, rows, run=run, name=name, recipe=recipe)
    distill.record_distillation(run, out.name, taught)
    if taught.format == "peft" and learner.format == "bf16":
        taught = adapters.merge_adapters(taught, name=out.name, directory=out.resolve().parent)
    options.print_records(run, as_json)
    print(f"student {taught.path}")


def _adapter_name(student: Artifact, out: Path, rank: int) -> str:
    """Where training writes, beside the student; ValueError where the result could not be `out`."""
    options.new_folder(out)
    if student.format == "bf16" and rank:
        return f"{out.name}-adapter"
    if student.path.resolve().parent != out.resolve().parent:
        raise InputError(f"what is trained of {student.name} belongs beside it; use --out {student.path.parent}/NAME")
    return out.name


def _rows(
    run: Run, student: Artifact, data: Path | None, *, text_teacher, own_answers: bool, row_tokens: int, tokens: int
) -> list:
    """General text, or whole chats; answers of a teacher by text are scored alone, without their prompts."""
    from avalab.data import packing, synthesize
    from avalab.models import checkpoint

    tokenizer = checkpoint.load_tokenizer(student)
    if data is None:
        return packing.text_rows(run, tokenizer, tokens=tokens, row_tokens=row_tokens)
    fitting = packing.fitting(tokenizer, synthesize.load_examples(data), row_tokens)
    chosen = packing.sample_examples(tokenizer, fitting, tokens=tokens, seed=run.seed)
    if own_answers:
        chosen = packing.own_answers(student, chosen, run=run)
    if text_teacher:
        kept = packing.fitting(tokenizer, packing.with_answers_of(chosen, text_teacher), row_tokens)
        return packing.pack_chats(tokenizer, kept, row_tokens=row_tokens, context=row_tokens, seed=run.seed)
    return packing.chat_rows(tokenizer, chosen, row_tokens=row_tokens, seed=run.seed)
