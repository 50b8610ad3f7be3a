"""The sub-commands that make a better model: synthesize examples, finetune on them, distill from a larger one."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli import options
from avalab.cli.options import AsJson, Force, Model, Profile, Seed
from avalab.lab import artifacts, assets
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, MissingFile, Unavailable
from avalab.lab.run import ROOT, Run, slug
from avalab.train.recipes import TEACHERS, AdapterRecipe, DistillRecipe, Schedule, refuse_outside

TeacherModel = Annotated[str, typer.Option(help="The model's name at the base URL.")]

Cost = Annotated[float, typer.Option(min=0, help="Most that a URL's answers may cost in all.")]


def synthesize(
    out: Annotated[Path, typer.Option(help="Folder of the set and its card; an older set there is replaced.")],
    count: Annotated[int, typer.Option(min=1, help="Accepted examples.")] = 400,
    kinds: Annotated[str, typer.Option(help="Kinds with commas, such as single_call,no_function; all without.")] = "",
    source: Annotated[str, typer.Option(help=f"Real tools instead of templates: {', '.join(options.SOURCES)}.")] = "",
    teacher: Annotated[
        str, typer.Option(help="Who rewords: OpenAI-compatible base URL, artefact folder, GGUF asset or file.")
    ] = "",
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
    if source:
        options.one_of("source", source, options.SOURCES)
    if teacher_model and not teacher:
        raise InputError(f"--teacher-model {teacher_model} is of no teacher; give its base URL by --teacher")
    if not force:
        artifacts.refuse_foreign(out, [f"{kind}.jsonl" for kind in options.KINDS], made_by=options.SET_MAKER)
    rewriter = _teacher(teacher, teacher_model, cost=cost, price=price, per_minute=per_minute) if teacher else None
    if source and rewriter is None and source not in options.SAYS_ALL:
        _tell(f"no teacher: requests are the titles and values of {source}, as they stand", as_json)
    from avalab.data import repeats, synthesize

    sets = [] if overlap == "none" else repeats.evaluation_sets(fetch=overlap == "all")
    report = synthesize.write_examples(
        out, count=count, seed=seed, kinds=chosen, teacher=rewriter, sets=sets, replace=force, source=source
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
    if address.endswith(".gguf") or f"{address}-gguf" in assets.known_assets():
        return _gguf_teacher(address, cache / f"{slug(Path(address).stem)}.jsonl")
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


def _gguf_teacher(address: str, answers: Path):
    """A GGUF model as teacher, or None, said in one line, where it is not here and cannot be had."""
    try:
        file = assets.only_gguf(assets.resolve_model(address))
    except Unavailable as error:
        print(f"no teacher: {error}", file=sys.stderr)
        return None
    from avalab.data import synthesize
    from avalab.data.teachers import AnswerCache
    from avalab.engines.calling.teacher import GgufTeacher

    sha256 = next(
        (f.sha256 for asset in assets.known_assets().values() for f in asset.files if f.name == file.name),
        "",
    ) or artifacts.sha256_of(file)
    known = ROOT / "data" / "teacher_answers.jsonl"
    return GgufTeacher(file, sha256, AnswerCache(answers, known), synthesize.REWORDING)


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
        float, typer.Option(help="Tokens of general text a token of examples, against forgetting; 0: none, 1 at most.")
    ] = 0.25,
    limit: Annotated[int, typer.Option(help="Examples to learn from; 0: the profile's number.")] = 0,
    profile: Profile = "laptop",
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Train an adapter on chats and merge it; stopped, it goes on from the last checkpoint when run again."""
    run = Run("avalab_finetune", profile, seed, model)
    if method not in FINETUNED:
        raise InputError(f"unknown method {method!r}; choose lora or qlora")
    refuse_outside("rank", rank, 1)
    refuse_outside("rehearsal", rehearsal, 0, 1)
    refuse_outside("limit", limit, 0)
    recipe = AdapterRecipe(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=tuple(target_modules.split()),
        row_tokens=row_tokens,
        schedule=Schedule(learning_rate=learning_rate, epochs=epochs, rows_per_step=2),
    )
    options.known_model(model)
    merged_from = f"{run.name_of_model}+{method}-{out.name}"
    options.new_folder(out, model, force=force, made_by={"step": "merge"}, base=merged_from)
    refuse_format(model, FINETUNED[method], f"finetune --method {method}")
    if data and not data.exists():
        raise MissingFile(f"no examples at {data}")
    from avalab.data import synthesize
    from avalab.models import adapters
    from avalab.train import finetune

    examples = synthesize.load_examples(data or ROOT / "data" / "synthetic_datasets")
    start = start_of(model, method, run)
    chosen, held_out, tokens = _fitting(start, examples, row_tokens, limit, run, as_json)
    recipe = replace(recipe, rehearsal_tokens=int(rehearsal * tokens))
    tell(f"{tokens:,} tokens of examples, {recipe.rehearsal_tokens:,} of rehearsal", as_json)
    adapter = finetune.train_adapter(start, chosen, run=run, name=merged_from, recipe=recipe, held_out=held_out)
    merged = adapters.merge_adapters(adapter, name=out.name, directory=out.resolve().parent)
    finetune.record_training(run, out.name, adapter)
    options.print_records(run, as_json)
    tell(f"adapter {adapter.path}: {adapter.bytes / 1e6:.1f} MB", as_json)
    tell(made(merged, finetune.loss_change(adapter)), as_json)


FINETUNED = {"lora": ("bf16", "peft"), "qlora": ("bf16", "peft", "bitsandbytes")}  # formats of artefacts to begin with

DISTILLED = ("bf16", "bitsandbytes")  # of students with adapters; with rank 0, bf16 alone


def refuse_format(model: str, formats: tuple[str, ...], command: str) -> None:
    """Raise ValueError for an artefact in a format that cannot be trained, naming what can."""
    if not options.is_artifact(model):
        return
    found = artifacts.load_artifact(model, verify=False)
    if found.format in formats:
        return
    base = found.card["base"]["name"]
    way = "or --method qlora for NF4 ones" if found.format == "bitsandbytes" and "finetune" in command else ""
    way = way or f"train its base {base} and compress that again, or avalab recover"
    raise InputError(f"{found.name} is in format {found.format!r}; {command} trains {', '.join(formats)}: {way}")


def start_of(model: str, method: str, run: Run) -> Artifact:
    """What an adapter is trained on: the model's bf16 form, an adapter merged into its base, or 4 bits for QLoRA."""
    from avalab.compress import quantize
    from avalab.models import adapters

    found = options.source_artifact(model, run)
    if found.format == "peft":
        found = adapters.merge_adapters(found, directory=run.artifacts_dir)
    if method == "qlora" and found.format == "bf16":
        return quantize.compress_artifact(found, "nf4", run=run, double_quantization=True)
    return found


def _fitting(
    start: Artifact, examples: list[dict], row_tokens: int, limit: int, run: Run, as_json: bool
) -> tuple[list[dict], list[dict], int]:
    """Examples to learn from and to score that fit a row and the model's context, and the tokens of the former."""
    from avalab.data import packing
    from avalab.models import checkpoint

    tokenizer, most = checkpoint.load_tokenizer(start), min(row_tokens, checkpoint.context_tokens(start))
    sizes = [len(packing.encode_chat(tokenizer, example["messages"]).ids) for example in examples]
    fitting = [(example, size) for example, size in zip(examples, sizes, strict=True) if size <= most]
    if not fitting:
        shortest = f"the shortest of {len(examples)} has {min(sizes)} tokens" if sizes else "there is none"
        raise InputError(
            f"no example fits into a row of {most} tokens: {shortest}; raise --row-tokens (the model's context is "
            f"{checkpoint.context_tokens(start)}) or give other --data"
        )
    chosen, held_out = split(fitting, limit or run.profile.train_examples, run.profile.held_out_examples, run.seed)
    if len(fitting) < len(examples):
        tell(f"{len(examples) - len(fitting)} of {len(examples)} examples exceed {most} tokens (--row-tokens)", as_json)
    if len(chosen) < limit:
        tell(f"asked for {limit} examples to learn from; {len(chosen)} are there", as_json)
    tokens = sum(size for _, size in chosen)
    return [example for example, _ in chosen], [example for example, _ in held_out], tokens


def split(examples: list, count: int, held_out: int, seed: int) -> tuple[list, list]:
    """At most `count` examples to learn from and others to score, a tenth at most, in a seeded order."""
    order = random.Random(seed).sample(examples, len(examples))
    scored = min(held_out, len(order) // 10)
    return order[scored : scored + count], order[:scored]


def tell(line: str, as_json: bool) -> None:
    """A line beside the records, which have standard output to themselves where they are JSON."""
    print(line, file=sys.stderr if as_json else sys.stdout)


def made(artifact: Artifact, change: str) -> str:
    """Where the result is, how large, and what training did to the loss."""
    return f"{artifact.path}: {artifact.bytes / 1e6:.1f} MB, {change}"


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
    force: Force = False,
) -> None:
    """Train a smaller model towards a larger one; stopped, it goes on from its last checkpoint when run again."""
    run, by_text = Run("avalab_distill", profile, seed), _is_url(teacher)
    options.one_of("targets", targets, TEACHERS)
    if by_text and not teacher_model:
        raise InputError("a teacher behind a URL needs --teacher-model")
    if data is None and (by_text or own_answers):
        raise InputError("answers need prompts: give --data with chats")
    schedule = Schedule(learning_rate=learning_rate, epochs=epochs, rows_per_step=4)
    training = AdapterRecipe(rank=rank, alpha=2 * max(1, rank), row_tokens=row_tokens, schedule=schedule)
    recipe = DistillRecipe(
        kl=0.0 if by_text else 1.0,  # whose words are labels
        temperature=temperature,
        training=training,
        teacher=targets,
        count=count,
        reverse=reverse,
        cross_entropy=1.0 if by_text else cross_entropy,
        hidden=hidden,
        attention=attention,
    )
    if data and not data.exists():
        raise MissingFile(f"no examples at {data}")
    options.known_model(student)
    refuse_format(student, DISTILLED if rank else DISTILLED[:1], f"distill --rank {rank}")
    if not by_text:
        options.known_model(teacher)
    options.new_folder(out, student, None if by_text else teacher, force=force)
    from avalab.models import adapters
    from avalab.train import distill, finetune

    learner = options.source_artifact(student, run)
    name = _adapter_name(learner, out, rank)
    text_teacher = _teacher(teacher, teacher_model, cost=cost) if by_text else None
    rows = _rows(
        run, learner, data, text_teacher=text_teacher, own_answers=own_answers, row_tokens=row_tokens, tokens=tokens
    )
    reader = None if by_text else options.source_artifact(teacher, run)
    taught = distill.train_student(learner, reader, rows, run=run, name=name, recipe=recipe)
    distill.record_distillation(run, out.name, taught)
    change = finetune.loss_change(taught)
    if taught.format == "peft" and learner.format == "bf16":
        taught = adapters.merge_adapters(taught, name=out.name, directory=out.resolve().parent)
    options.print_records(run, as_json)
    tell(f"student {made(taught, change)}", as_json)


def _adapter_name(student: Artifact, out: Path, rank: int) -> str:
    """Where training writes, beside the student; ValueError where the result could not be `out`."""
    if student.format == "bf16" and rank:
        options.new_folder(out, made_by={"step": "merge"}, base=f"{out.name}-adapter")
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
