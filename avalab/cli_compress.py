"""The sub-commands `quantize` and `prune`: a smaller artefact of a model, with what it costs."""

from __future__ import annotations

from pathlib import Path
from string import ascii_letters
from typing import Annotated

import typer

from avalab.cli_options import Model, Profile, Seed, print_records


def quantize(
    method: Annotated[str, typer.Option(help="One of the methods of avalab.quantize; a wrong name lists them.")],
    out: Annotated[Path, typer.Option(help="Folder of the new artefact.")],
    model: Model = "",
    profile: Profile = "laptop",
    seed: Seed = 0,
    bits: Annotated[int | None, typer.Option(help="Bits a weight (rtn, gptq, awq, autoround, hqq).")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale; 0: one scale a row.")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")
    ] = None,
    double_quantization: Annotated[bool | None, typer.Option(help="Quantise the scales too (nf4, fp4).")] = None,
    block_size: Annotated[int | None, typer.Option(help="Weights that share a scale (nf4, fp4).")] = None,
    compute_dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32 (nf4, fp4).")] = None,
    static: Annotated[bool | None, typer.Option("--static/--dynamic", help="Activation scales (smoothquant).")] = None,
    iterations: Annotated[int | None, typer.Option(help="Steps of the learnt rounding (autoround).")] = None,
    size: Annotated[str, typer.Option("--bytes", help="Budget of the weight file, such as 80MB (ava).")] = "",
    bits_per_weight: Annotated[float | None, typer.Option(help="The same in bits a parameter (ava).")] = None,
    format: Annotated[
        str | None, typer.Option(help="transformers; gguf: one file; onnx: a folder for ONNX Runtime GenAI (ava).")
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            help="any, bf16, or packed: fewer than 8 bits, loaded by avalab only (ava); "
            "bf16 or int8 (rtn, gptq, awq, autoround, hqq)."
        ),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Only GGUF types that this engine reads as written (ava).")] = None,
    transform: Annotated[
        str | None, typer.Option(help="Before rounding: none, scale, rotate or scale+rotate (ava).")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layer name or glob to keep in bf16; may be repeated.")] = None,
    benchmark: Annotated[bool, typer.Option(help="Score and time the artefact, beside its base.")] = False,
) -> None:
    """Compress a model by one method into an artefact folder."""
    from avalab import models
    from avalab.experiment import Run
    from avalab.quantize import checked_method, compress_artifact

    offered = {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "double_quantization": double_quantization,
        "block_size": block_size,
        "compute_dtype": compute_dtype,
        "static": static,
        "iterations": iterations,
        "bytes": byte_count(size) if size else None,
        "bits_per_weight": bits_per_weight,
        "format": format,
        "embedding": embedding,
        "engine": engine,
        "transform": transform,
    }
    parameters = {name: value for name, value in offered.items() if value is not None}
    run = Run("avalab_quantize", profile, seed, model)
    checked_method(method, parameters)
    base = models.base(run)
    artifact = compress_artifact(base, method, run=run, skip=tuple(skip or ()), out=out, **parameters)
    _say_size(artifact, base)
    if "predicted_kl_divergence" in artifact.card["measured"]:
        _predicted_and_measured(run, base, artifact)
    if benchmark and _engine(artifact) != "torch":
        print(f"its speed: avalab bench {artifact.path} --engine {_engine(artifact)}")
    elif benchmark:
        _score(run, {"bf16": base, artifact.name: artifact})


def _say_size(artifact, base) -> None:
    times = base.bytes / artifact.bytes
    print(f"{artifact.path}: {artifact.bytes / 1e6:.1f} MB, {times:.2f}x smaller than {base.name}")


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
    """What the allocation expected to lose, what the artefact loses in its engine on a text, and its notes."""
    from avalab import corpora, models, predict, quality, statistics

    tokenizer, cache = models.load_tokenizer(base), run.artifacts_dir / "cache"
    text = corpora.text(run.profile.eval_texts[0], tokenizer)
    against = predict.reference(base, corpora.profile_windows(run, text, tokenizer), cache, run.device)
    kl = quality.score_artifact(artifact, against, cache, run.device, engine=_engine(artifact)).kl
    found = statistics.mean(kl, resamples=run.profile.resamples, seed=run.seed)
    print(f"predicted KL divergence {artifact.card['measured']['predicted_kl_divergence']:.4f} nats/token")
    print(f"measured KL divergence {found.value:.4f} [{found.low:.4f}, {found.high:.4f}] nats/token on {text.name}")
    if artifact.card["measured"]["note"]:
        print(artifact.card["measured"]["note"])


def _engine(artifact) -> str:
    """The engine that scores an artefact: torch where it can."""
    engines = artifact.card["engines"]
    return "torch" if "torch" in engines else engines[0]


def byte_count(size: str) -> int:
    """`80MB` -> 80,000,000; `64MiB` -> 67,108,864; a bare number is bytes. ValueError for anything else."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = size.rstrip(ascii_letters)
    try:
        return int(float(number) * units[size[len(number) :].upper()])
    except (ValueError, KeyError):
        raise ValueError(f"{size!r} is not a size; write it like 80MB, 64MiB or 80000000") from None


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
    from avalab import corpora, cost, models, predict, quality

    base = next(iter(subjects.values()))
    tokenizer = models.load_tokenizer(base)
    for text in corpora.evaluation_texts(run, tokenizer):
        against = predict.reference(
            base, corpora.profile_windows(run, text, tokenizer), run.artifacts_dir / "cache", run.device
        )
        for subject, artifact in subjects.items():
            quality.record_quality(run, subject, artifact, against, text)
    for subject, artifact in subjects.items():
        cost.record_cost(run, subject, artifact)
    print_records(run, as_json=False)
