"""Sub-commands that teach a model and talk to it: `synthesize`, `finetune`, `chat`. `cli` registers them."""

from __future__ import annotations

import json
import random
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli_options import ArtifactFolder, AsJson, Model, Profile, Seed, print_records


def synthesize(
    out: Annotated[Path, typer.Option(help="Folder of the set and its card; what is there is replaced.")],
    count: Annotated[int, typer.Option(min=1, help="Accepted examples.")] = 400,
    kinds: Annotated[str, typer.Option(help="Kinds with commas, such as single_call,no_function; all without.")] = "",
    teacher: Annotated[str, typer.Option(help="Who rewords: OpenAI-compatible base URL or artefact folder.")] = "",
    teacher_model: Annotated[str, typer.Option(help="The model's name at the base URL.")] = "",
    cost: Annotated[float, typer.Option(min=0, help="Most that a URL's answers may cost in all.")] = inf,
    price: Annotated[str, typer.Option(help="Its prices a million tokens: in,out.")] = "0,0",
    per_minute: Annotated[float, typer.Option(min=0.1, help="Most requests a minute to a URL.")] = 60,
    overlap: Annotated[str, typer.Option(help="Compare with evaluation sets: here, all (fetched) or none.")] = "here",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Make examples for fine-tuning; the key of a URL is read from OPENAI_API_KEY. Stopped, it resumes its answers."""
    from avalab import overlap as overlap_
    from avalab import synthesize as synthesize_

    if overlap not in ("here", "all", "none"):
        raise ValueError(f"unknown overlap {overlap!r}; choose here, all or none")
    asked = _teacher(teacher, teacher_model, cost=cost, price=price, per_minute=per_minute) if teacher else None
    sets = [] if overlap == "none" else overlap_.evaluation_sets(fetch=overlap == "all")
    chosen = tuple(kind for kind in kinds.split(",") if kind)
    report = synthesize_.write_examples(out, count=count, seed=seed, kinds=chosen, teacher=asked, sets=sets)
    if as_json:
        print(json.dumps(report, indent=1))
        return
    for name, number in report["counts"].items():
        print(f"{name:32} {number:6}")
    for name, file in report["files"].items():
        print(f"{out / name}: {file['examples']} examples, {file['bytes']:,} bytes")
    print(f"compared with {', '.join(report['evaluation']) or 'no evaluation set'}")


def _teacher(address: str, model: str, *, cost: float, price: str, per_minute: float):
    """The teacher at a base URL or in an artefact folder; its answers are kept below artifacts/teachers."""
    from avalab import synthesize, teachers
    from avalab.experiment import ROOT, slug

    cache = ROOT / "artifacts" / "teachers"
    if not address.startswith(("http://", "https://")):
        return teachers.local(Path(address), cache=cache / "local.jsonl", schema=synthesize.REWORDING)
    if not model:
        raise ValueError("a teacher behind a URL needs --teacher-model")
    try:
        price_in, price_out = map(float, price.split(","))
    except ValueError:
        raise ValueError(f"{price!r} is no pair of prices; write it like 0.15,0.6") from None
    limits = teachers.Limits(requests_per_minute=per_minute, cost=cost, price_in=price_in, price_out=price_out)
    return teachers.endpoint(address, model, cache=cache / f"{slug(model)}.jsonl", limits=limits)


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
    from avalab import adapters, models, packed_rows, quantize, synthesize
    from avalab import finetune as finetune_
    from avalab.experiment import ROOT, Run
    from avalab.train import Schedule

    if method not in ("lora", "qlora"):
        raise ValueError(f"unknown method {method!r}; choose lora or qlora")
    if out.exists() and not (out / "card.json").is_file():
        raise ValueError(f"{out} exists and is not an artefact; name a new folder")
    examples = synthesize.load_examples(data or ROOT / "data" / "synthetic_datasets")
    run = Run("avalab_finetune", profile, seed, model)
    base = models.base(run)
    tokenizer = models.load_tokenizer(base)
    fitting = packed_rows.fitting(tokenizer, examples, row_tokens)
    chosen, held_out = split(fitting, limit or run.profile.train_examples, run.profile.held_out_examples, seed)
    print(f"{len(examples) - len(fitting)} of {len(examples)} examples exceed {row_tokens} tokens and are left out")
    start = base if method == "lora" else quantize.compress_artifact(base, "nf4", run=run, double_quantization=True)
    schedule = Schedule(learning_rate=learning_rate, epochs=epochs, rows_per_step=2)
    about = {"rank": rank, "alpha": alpha, "dropout": dropout, "target_modules": tuple(target_modules.split())}
    tokens = sum(len(packed_rows.encode(tokenizer, example["messages"]).ids) for example in chosen)
    rehearsed = int(rehearsal * tokens)
    recipe = finetune_.Recipe(**about, row_tokens=row_tokens, rehearsal_tokens=rehearsed, schedule=schedule)
    print(f"{tokens:,} tokens of examples, {rehearsed:,} of rehearsal")
    name = f"{base.name}+{method}-{out.name}"
    adapter = finetune_.train_adapter(start, chosen, run=run, name=name, recipe=recipe, held_out=held_out)
    merged = adapters.merge(adapter, name=out.name, directory=out.resolve().parent)
    finetune_.record_training(run, out.name, adapter)
    print_records(run, as_json)
    print(f"adapter {adapter.path}\nmerged  {merged.path}")


def split(examples: list[dict], count: int, held_out: int, seed: int) -> tuple[list[dict], list[dict]]:
    """At most `count` examples to learn from and others to score, in a seeded order.

    Raises ValueError when nothing is left.
    """
    order = random.Random(seed).sample(examples, len(examples))
    scored = min(held_out, len(order) // 10)
    if not order:
        raise ValueError("no example fits into a row; raise --row-tokens or give other --data")
    return order[scored : scored + count], order[:scored]


def chat(
    artifact: ArtifactFolder,
    tools: Annotated[
        Path | None,
        typer.Option(help="JSON list of tools: name, description, parameters, callable (module:function, pure)."),
    ] = None,
    mode: Annotated[str, typer.Option(help="free (any text) or grammar (a readable call, or a text).")] = "grammar",
) -> None:
    """Chat with an artefact that really calls its tools: each call is executed in a sandbox and shown."""
    from avalab import answers, artifacts, chat_tools, conversation
    from avalab.experiment import Run

    offered = chat_tools.read_tools(tools) if tools else chat_tools.built_in()
    respondent = answers.Respondent(artifacts.load(artifact), Run("avalab_chat").device)
    conversation.converse(respondent, offered, mode=mode)
