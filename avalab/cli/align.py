"""The sub-command that trains on pairs of answers: `avalab align`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avalab.cli import options
from avalab.cli.options import AsJson, Force, Model, Profile, Seed
from avalab.cli.train import FINETUNED, made, refuse_format, split, start_of, tell
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, MissingFile
from avalab.lab.run import ROOT, Run
from avalab.train.recipes import PREFERENCES, AdapterRecipe, PreferenceRecipe, Schedule, refuse_outside

CRITERIA = ("coherence", "helpfulness", "tool_use")  # of avalab.measure.people


def align(
    out: Annotated[Path, typer.Option(help="Folder of the trained model: the adapter merged into bf16.")],
    data: Annotated[Path | None, typer.Option(help="JSONL file or folder of pairs: prompt, chosen, rejected.")] = None,
    ratings: Annotated[Path | None, typer.Option(help="Folder of the review form: its scores become pairs.")] = None,
    criterion: Annotated[str, typer.Option(help="Of --ratings: coherence, helpfulness or tool_use.")] = "helpfulness",
    model: Model = "",
    loss: Annotated[str, typer.Option(help="dpo, ipo, or cdpo (some pairs may be the wrong way round).")] = "dpo",
    beta: Annotated[float, typer.Option(help="The larger, the closer to where the model began.")] = 0.1,
    smoothing: Annotated[float, typer.Option(help="Of cdpo: share of pairs that are the wrong way round.")] = 0.1,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="At the end of the warm-up.")] = 1e-4,
    epochs: Annotated[float, typer.Option(help="Passes over the pairs.")] = 1.0,
    row_tokens: Annotated[int, typer.Option(help="Tokens of a packed row; longer pairs are left out.")] = 1024,
    draws: Annotated[int, typer.Option(min=1, help="Answers a request while it looks for own mistakes.")] = 1,
    limit: Annotated[int, typer.Option(help="Pairs to learn from (own mistakes: requests); 0: the profile's.")] = 0,
    profile: Profile = "laptop",
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Train a model to prefer one answer to another; without pairs, the right calls to its own wrong ones."""
    run = Run("avalab_align", profile, seed, model)
    options.one_of("loss", loss, PREFERENCES)
    options.one_of("criterion", criterion, CRITERIA)
    if data and ratings:
        raise InputError("--data and --ratings are two sources of pairs; give one of them")
    refuse_outside("limit", limit, 0)
    schedule = Schedule(learning_rate=learning_rate, epochs=epochs, rows_per_step=2)
    training = AdapterRecipe(rank=rank, alpha=2 * max(1, rank), row_tokens=row_tokens, schedule=schedule)
    recipe = PreferenceRecipe(loss=loss, beta=beta, smoothing=smoothing, training=training)
    for source in filter(None, (data, ratings)):
        if not source.exists():
            raise MissingFile(f"no pairs at {source}; give a JSONL file, or a folder of them")
    options.known_model(model)
    adapter_name = f"{run.name_of_model}+{loss}-{out.name}"
    options.new_folder(out, model, force=force, made_by={"step": "merge"}, base=adapter_name)
    refuse_format(model, FINETUNED["lora"], "align")
    from avalab.models import adapters, checkpoint
    from avalab.train import finetune
    from avalab.train.preferences import pairs
    from avalab.train.preferences.align import UNIT, pair_margins, record_alignment, train_aligned

    start = start_of(model, "lora", run)
    found = _pairs(start, data, ratings, criterion, draws, limit, run)
    most = min(row_tokens, checkpoint.context_tokens(start))
    fitting = pairs.fitting(checkpoint.load_tokenizer(start), found, most)
    if not fitting:
        raise InputError(f"none of {len(found)} pairs fits into a row of {most} tokens; raise --row-tokens")
    if len(fitting) < len(found):
        tell(f"{len(found) - len(fitting)} of {len(found)} pairs exceed {most} tokens (--row-tokens)", as_json)
    chosen, unseen = split(fitting, limit or run.profile.train_examples, run.profile.held_out_examples, seed)
    tell(f"{len(chosen)} pairs to learn from, {len(unseen)} held out", as_json)
    adapter = train_aligned(start, chosen, run=run, name=adapter_name, recipe=recipe, held_out=unseen)
    merged = adapters.merge_adapters(adapter, name=out.name, directory=out.resolve().parent)
    record_alignment(run, out.name, adapter, pair_margins(adapter, start, unseen, recipe, run) if unseen else None)
    options.print_records(run, as_json)
    tell(made(merged, finetune.loss_change(adapter, unit=UNIT)), as_json)


def _pairs(
    start: Artifact, data: Path | None, ratings: Path | None, criterion: str, draws: int, limit: int, run: Run
) -> list[dict]:
    """Pairs from a file, from the review form's folder, or from the model's own wrong calls on the lab's examples."""
    from avalab.data import synthesize
    from avalab.train.preferences import pairs

    if data:
        return pairs.load_pairs(data)
    if ratings:
        return _rated(ratings, criterion)
    examples = synthesize.load_examples(ROOT / "data" / "synthetic_datasets")
    judged = [example for example in examples if example["kind"] in pairs.JUDGED]
    asked, _ = split(judged, limit or run.profile.train_examples, 0, run.seed)
    found = pairs.own_mistakes(start, asked, run=run, draws=draws)
    if not found:
        raise InputError(f"{start.name} made no mistake in {len(asked)} requests; give --data, or more by --draws")
    return found


def _rated(folder: Path, criterion: str) -> list[dict]:
    from avalab.measure import people
    from avalab.train.preferences import pairs

    found = pairs.rated_pairs(people.load_sheet(folder), people.load_preferences(folder), by=criterion)
    if not found:
        raise InputError(f"{folder} has no two answers that people scored differently on {criterion}; rate more first")
    return found
