"""The `avalab` command: the notebooks' functions for a shell.

    avalab assets                                   what can be downloaded, and what is here
    avalab quantize --method nf4 --out small        compress a model into an artefact
    avalab prune --method sparsegpt --out sparse    remove weights
    avalab export sparse --to onnx --out there      write it for another engine
    avalab compile --model sparse --out there       compile it into machine code
    avalab show small                               what an artefact is made of
    avalab bench small --json                       what it costs to run
    avalab eval small --tasks bfcl,humaneval        whether it calls functions and writes code
    avalab synthesize --count 400 --out mine        make function-calling examples and check them
    avalab finetune --data mine --out tuned         train an adapter on them and merge it
    avalab distill --teacher T --student S --out O  win back what a smaller model lost
    avalab ensemble --models A B --prompt hello     several models answer together
    avalab recover small --out better               train codes and scales of a low-bit model, at the same bytes
    avalab chat tuned                               talk to it; it really calls tools
    avalab compare small base --task bfcl           whether it does so better or worse than another one

Wrong input ends with one line on stderr and exit code 2. What it does not do: anything that Python code cannot.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from avalab import cli_compare, cli_compress, cli_distill, cli_ensemble, cli_export, cli_learn, cli_recover
from avalab.cli_options import ArtifactFolder, AsJson, Limit, Mode, Profile, Seed, print_records

app = typer.Typer(
    help="How small and fast can a language model get before it stops being good?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (
    *(cli_compress.quantize, cli_compress.prune),
    *(cli_export.export, cli_learn.synthesize, cli_learn.finetune, cli_distill.distill),
    *(cli_ensemble.ensemble, cli_learn.chat, cli_recover.recover),
):
    app.command()(command)
app.command("compile")(cli_export.compile_)
app.command()(cli_export.tensorrt)
app.command()(cli_compare.compare)


def main() -> None:
    """Run the command; what a user did wrong becomes one line and exit code 2."""
    from avalab.assets import AssetUnavailable

    try:
        app()
    except (ValueError, AssetUnavailable, OSError) as error:
        print("avalab: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:  # a measuring process that failed
        print("avalab: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


@app.command()
def assets(name: Annotated[str, typer.Argument(help="Asset to fetch; without it, list them all.")] = "") -> None:
    """List the assets of data/assets.toml, or fetch one and print where it is."""
    from avalab import assets as assets_

    if name:
        print(assets_.fetch(name))
        return
    for asset in assets_.manifest().values():
        here = "here" if (assets_.CACHE / asset.name).exists() else "not fetched"
        print(f"{asset.name:32} {asset.bytes / 1e6:10.1f} MB  {here:12} {asset.licence}")


@app.command()
def show(artifact: ArtifactFolder) -> None:
    """Verify an artefact and print its card in short: base, recipe, format, bytes by component."""
    from avalab import artifacts, storage

    found = artifacts.load(artifact)
    card = found.card
    print(f"name      {found.name}\nformat    {found.format} (engines: {', '.join(card['engines'])})")
    print(f"base      {card['base']['name']}  sha256 {card['base']['sha256'][:16]}...")
    print(f"sha256    {found.sha256}")
    for step in card["recipe"]:
        print(f"recipe    {json.dumps(step, sort_keys=True)}")
    files = {file["name"]: file["bytes"] for file in card["files"]}
    parts = storage.bytes_by_component(found) if list(found.path.glob("*.safetensors")) else files
    total = sum(parts.values())
    for part, count in parts.items():
        print(f"bytes     {part:10} {count:>14,}  {count / total:6.1%}")
    print(f"bytes     {'total':10} {total:>14,}")


@app.command()
def bench(
    artifact: ArtifactFolder,
    engine: Annotated[str, typer.Option(help="An engine of avalab.engines; without, torch and the roofline.")] = "",
    threads: Annotated[int, typer.Option(help="Threads of that engine; 0 leaves its own choice.")] = 0,
    profile: Profile = "laptop",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Load and run an artefact in a process of its own: bytes, memory, load time, prefill, decode, latency."""
    from avalab import artifacts, cost
    from avalab.experiment import Run

    run = Run("avalab_bench", profile, seed)
    found = artifacts.load(artifact)
    if engine:
        _bench_in(run, found, engine, threads)
    else:
        cost.record_cost(run, found.name, found)
    print_records(run, as_json)


def _bench_in(run, artifact, engine: str, threads: int) -> None:
    """One cell of the benchmark; what the engine refuses is the caller's error."""
    from avalab import cell

    work = cell.Workload(samples=run.profile.latency_samples, threads=threads, seed=run.seed)
    found = cell.measure_cell(artifact, engine, work=work)
    cell.record_cell(run, artifact, engine=engine, work=work, cell=found)


@app.command("eval")
def evaluate_(
    artifact: ArtifactFolder,
    tasks: Annotated[str, typer.Option(help="bfcl, humaneval, tasks of lm-evaluation-harness; with commas.")] = "bfcl",
    mode: Mode = "grammar",
    limit: Limit = None,
    skip: Annotated[int, typer.Option(min=0, help="Cases of each BFCL category to leave out at its beginning.")] = 0,
    profile: Profile = "laptop",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Score an artefact on function calls and on code; what was answered before is read, not asked again."""
    from avalab import answers, artifacts, harness
    from avalab.experiment import Run

    wanted = tasks.split(",")
    others = [task for task in wanted if task not in ("bfcl", "humaneval")]
    if others:
        harness.require()
    run = Run("avalab_eval", profile, seed)
    respondent = answers.Respondent(artifacts.load(artifact), run.device)
    for category in answers.answerable(run.profile.call_categories, mode) if "bfcl" in wanted else ():
        name = respondent.artifact.name
        answers.record_calls(run, name, respondent, category=category, mode=mode, limit=limit, skip=skip)
    if "humaneval" in wanted:
        problems = answers.code_problems(run, limit)
        answers.record_pass_at_1(run, respondent.artifact.name, respondent, problems)
    if others:
        harness.record(respondent.artifact, others, run=run, limit=limit)
    print_records(run, as_json)
