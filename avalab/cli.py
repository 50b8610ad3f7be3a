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
from pathlib import Path
from string import ascii_letters
from typing import Annotated

import typer

from avalab import cli_compare, cli_distill, cli_ensemble, cli_export, cli_learn, cli_recover
from avalab.cli_options import ArtifactFolder, AsJson, Limit, Mode, Model, Profile, Seed, print_records

app = typer.Typer(
    help="How small and fast can a language model get before it stops being good?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (
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
def quantize(
    method: Annotated[str, typer.Option(help="One of the methods of avalab.quantize; a wrong name lists them.")],
    out: Annotated[Path, typer.Option(help="Folder of the new artefact.")],
    model: Model = "",
    profile: Profile = "laptop",
    seed: Seed = 0,
    bits: Annotated[int | None, typer.Option(help="Bits a weight (rtn, gptq, awq).")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale; 0: one scale a row.")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")
    ] = None,
    double_quantization: Annotated[bool | None, typer.Option(help="Quantise the scales too (nf4, fp4).")] = None,
    block_size: Annotated[int | None, typer.Option(help="Weights that share a scale (nf4, fp4).")] = None,
    compute_dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32 (nf4, fp4).")] = None,
    static: Annotated[bool | None, typer.Option("--static/--dynamic", help="Activation scales (smoothquant).")] = None,
    size: Annotated[str, typer.Option("--bytes", help="Budget of the weight file, such as 80MB (ava).")] = "",
    bits_per_weight: Annotated[float | None, typer.Option(help="The same in bits a parameter (ava).")] = None,
    format: Annotated[str | None, typer.Option(help="transformers, or gguf: one mixed .gguf file (ava).")] = None,
    engine: Annotated[str | None, typer.Option(help="Only GGUF types that this engine reads as written (ava).")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layer name or glob to keep in bf16; may be repeated.")] = None,
    benchmark: Annotated[bool, typer.Option(help="Score and time the artefact, beside its base.")] = False,
) -> None:
    """Compress a model by one method into an artefact folder."""
    given = {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "double_quantization": double_quantization,
        "block_size": block_size,
        "compute_dtype": compute_dtype,
        "static": static,
        "bytes": byte_count(size) if size else None,
        "bits_per_weight": bits_per_weight,
        "format": format,
        "engine": engine,
    }
    from avalab import models
    from avalab import quantize as quantize_
    from avalab.experiment import Run

    parameters = {name: value for name, value in given.items() if value is not None}
    run = Run("avalab_quantize", profile, seed, model)
    quantize_.checked(method, parameters)
    base = models.base(run)
    artifact = quantize_.write(base, method, run=run, skip=tuple(skip or ()), out=out, **parameters)
    _say_size(artifact, base)
    if "predicted_kl_divergence" in artifact.card["measured"]:
        _predicted_and_measured(run, base, artifact)
    if benchmark:
        _score(run, {"bf16": base, artifact.name: artifact})


def _say_size(artifact, base) -> None:
    times = base.bytes / artifact.bytes
    print(f"{artifact.path}: {artifact.bytes / 1e6:.1f} MB, {times:.2f}x smaller than {base.name}")


@app.command()
def prune(
    method: Annotated[str, typer.Option(help="Score: random, magnitude, wanda, sparsegpt, gradient or influence.")],
    sparsity: Annotated[float, typer.Option(help="Share of the weights to remove, in [0, 1).")] = 0.5,
    pattern: Annotated[str, typer.Option(help="A pattern of avalab.prune, such as 2:4; a wrong one lists them.")] = "",
    target_modules: Annotated[list[str] | None, typer.Option(help="Kind, glob or name; may be repeated.")] = None,
    allocation: Annotated[str, typer.Option(help="uniform or sensitivity.")] = "uniform",
    out: Annotated[Path | None, typer.Option(help="Folder of the new artefact; named by its recipe without.")] = None,
    model: Model = "",
    profile: Profile = "laptop",
    seed: Seed = 0,
    benchmark: Annotated[bool, typer.Option(help="Score and time the artefact, beside its base.")] = False,
) -> None:
    """Remove weights, heads, channels or layers; stopped, it goes on at the last finished block."""
    from avalab import models
    from avalab import prune as prune_
    from avalab.experiment import Run

    run = Run("avalab_prune", profile, seed, model)
    base = models.base(run)
    how = {"sparsity": sparsity, "target_modules": tuple(target_modules or ()), "allocation": allocation}
    artifact = prune_.write(base, method, pattern or "unstructured", run=run, out=out, **how)
    measured = artifact.card["measured"]
    print(f"{artifact.path}: {measured['sparsity']:.1%} of the linear weights gone, {artifact.bytes / 1e6:.1f} MB")
    if "sparse_bytes" in measured:
        print(f"{measured['sparse_bytes'] / 1e6:.1f} MB in the compressed layout; engines load the dense file")
    if benchmark:
        _score(run, {"bf16": base, artifact.name: artifact})
        if "sparse_bytes" in measured and measured["sparsity"]:
            _time_zeros(run, artifact)


def _predicted_and_measured(run, base, artifact) -> None:
    """What the allocation expected to lose, what the artefact loses on the profile's first text, and its notes."""
    from avalab import corpora, models, quality

    tokenizer, cache = models.load_tokenizer(base), run.artifacts_dir / "cache"
    text = corpora.text(run.profile.eval_texts[0], tokenizer)
    against = quality.reference(base, corpora.profile_windows(run, text, tokenizer), cache, run.device)
    kl = quality.cached_score(artifact, against, cache, run.device).kl
    found = quality.mean(kl, resamples=run.profile.resamples, seed=run.seed)
    print(f"predicted KL divergence {artifact.card['measured']['predicted_kl_divergence']:.4f} nats/token")
    print(f"measured KL divergence {found.value:.4f} [{found.low:.4f}, {found.high:.4f}] nats/token on {text.name}")
    if artifact.card["measured"]["note"]:
        print(artifact.card["measured"]["note"])


def byte_count(size: str) -> int:
    """`80MB` -> 80,000,000; `64MiB` -> 67,108,864; a bare number is bytes. ValueError for anything else."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = size.rstrip(ascii_letters)
    try:
        return int(float(number) * units[size[len(number) :].upper()])
    except (ValueError, KeyError):
        raise ValueError(f"{size!r} is not a size; write it like 80MB, 64MiB or 80000000") from None


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
        _race(run, found, engine, threads)
    else:
        cost.record(run, found.name, found)
    print_records(run, as_json)


def _race(run, artifact, engine: str, threads: int) -> None:
    """One cell of the benchmark; what the engine refuses is the caller's error."""
    from avalab import engine_bench

    race = engine_bench.Race(samples=run.profile.latency_samples, threads=threads, seed=run.seed)
    cell = engine_bench.measure(artifact, engine, race=race)
    engine_bench.add_records(run, artifact, engine=engine, race=race, cell=cell)


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
    from avalab import artifacts, evaluate, harness
    from avalab.experiment import Run

    wanted = tasks.split(",")
    others = [task for task in wanted if task not in ("bfcl", "humaneval")]
    if others:
        harness.require()
    run = Run("avalab_eval", profile, seed)
    respondent = evaluate.Respondent(artifacts.load(artifact), run.device)
    for category in evaluate.answerable(run.profile.call_categories, mode) if "bfcl" in wanted else ():
        how = {"category": category, "mode": mode, "limit": limit, "skip": skip}
        evaluate.record(run, respondent.artifact.name, respondent, **how)
    if "humaneval" in wanted:
        problems = evaluate.problems(run, limit)
        evaluate.record_pass_at_1(run, respondent.artifact.name, respondent, problems)
    if others:
        harness.record(respondent.artifact, others, run=run, limit=limit)
    print_records(run, as_json)


def _time_zeros(run, artifact) -> None:
    """Whether any kernel here gains from an artefact's zeros, on the last layer that has some."""
    from avalab import models, sparse_speed

    layers = models.linear_layers(models.load(artifact, run.device)).values()
    weight = [layer.weight.detach() for layer in layers if (layer.weight == 0).any()][-1]
    for tokens in (1, run.profile.prompt_tokens):
        timings = sparse_speed.record(run, f"{artifact.name}, {tokens} tokens", artifact, weight, tokens=tokens)
        ratio = sparse_speed.best_ratio(timings)
        print(
            f"{tokens} tokens: {'faster' if ratio < 1 else 'no faster'}, the best sparse kernel takes {ratio:.2f} "
            "times the best dense one's time"
        )


def _score(run, subjects: dict) -> None:
    """Quality and cost of each artefact on the profile's evaluation texts."""
    from avalab import corpora, cost, models, quality

    base = next(iter(subjects.values()))
    tokenizer = models.load_tokenizer(base)
    for text in corpora.evaluation_texts(run, tokenizer):
        against = quality.reference(
            base, corpora.profile_windows(run, text, tokenizer), run.artifacts_dir / "cache", run.device
        )
        for subject, artifact in subjects.items():
            quality.record(run, subject, artifact, against, text)
    for subject, artifact in subjects.items():
        cost.record(run, subject, artifact)
    print_records(run, as_json=False)
