"""The sub-commands that make a smaller artefact or another form of one: quantize, prune, recover, export, compile.

A row of `EXPORTERS` is a format and the function that writes it: artefact, new folder, how weights are stored ("" is
the format's own way) and windows of calibration text (None: none asked for) in, the lines to print out. It imports what
it needs itself, raises ValueError for what it cannot export and EngineUnavailable for a missing package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli import options
from avalab.cli.options import AsJson, Force, Model, NewFolder, Profile, Seed
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.lab.run import ROOT, Run, byte_count, load_records
from avalab.train import recipes

PRECISIONS = ("fp16", "bf16", "fp32")  # of avalab.engines.tensorrt

Benchmark = Annotated[bool, typer.Option(help="Score and time the artefact, beside its base.")]


def quantize(
    method: Annotated[str, typer.Option(help=f"One of {', '.join(options.METHODS)}.")],
    out: NewFolder,
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
    calibration: Annotated[
        str, typer.Option(help="Text to calibrate on: docs, or mix (docs, own prose and chats, calls).")
    ] = "docs",
    partial: Annotated[
        bool, typer.Option("--partial", help="Also where less than half of the blocks' weights can be reached.")
    ] = False,
    benchmark: Benchmark = False,
    force: Force = False,
) -> None:
    """Compress a model by one method into an artefact folder."""
    run = Run("avalab_quantize", profile, seed, model)
    options.one_of("method", method, options.METHODS)
    options.one_of("calibration", calibration, ("docs", "mix"))
    options.within("bits", bits, 2, 8)
    options.within("group_size", group_size, 0)
    options.within("block_size", block_size, 1)
    options.within("bits_per_weight", bits_per_weight, 1)
    options.within("iterations", iterations, 1)
    offered = {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "double_quantization": double_quantization,
        "block_size": block_size,
        "compute_dtype": compute_dtype,
        "static": static,
        "iterations": iterations,
        "bytes": byte_count(size, least=1) if size else None,
        "bits_per_weight": bits_per_weight,
        "format": format,
        "embedding": embedding,
        "engine": engine,
        "transform": transform,
    }
    parameters = {name: value for name, value in offered.items() if value is not None}
    options.known_parameters(method, parameters)
    options.known_model(model)
    options.possible_skips(run, skip or [])
    if parameters.get("bytes"):
        options.possible_budget(run, parameters["bytes"], parameters.get("format", ""))
    if group_size and method not in ("ava", "hqq"):  # which take any
        options.possible_groups(run, method, group_size, skip or [])
    options.new_folder(out, model, force=force, made_by={"step": method, **parameters}, base=run.name_of_model)
    from avalab.compress import reach
    from avalab.compress.quantize import checked_calibration, checked_method, compress_artifact
    from avalab.models import checkpoint

    checked_calibration(checked_method(method, parameters)[0], method, calibration)
    base = checkpoint.base_artifact(run)
    how = {"skip": tuple(skip or ()), "out": out, "partial": partial, "calibration": calibration}
    artifact = compress_artifact(base, method, run=run, **how, **parameters)
    times = base.bytes / artifact.bytes
    print(f"{artifact.path}: {artifact.bytes / 1e6:.1f} MB, {times:.2f}x smaller than {base.name}")
    if reached := reach.in_words(artifact.card["measured"]):
        print(reached)
    if "predicted_kl_divergence" in artifact.card["measured"]:
        _predicted_and_measured(run, base, artifact)
    if benchmark and options.engine_of(artifact) != "torch":
        print(f"its speed: avalab bench {artifact.path} --engine {options.engine_of(artifact)}")
    elif benchmark:
        _quality_and_cost(run, base, artifact)


def _predicted_and_measured(run: Run, base: Artifact, artifact: Artifact) -> None:
    """What the allocation expected to lose, what the artefact loses in its engine on a text, and its notes."""
    from avalab.data import corpora
    from avalab.lab import statistics
    from avalab.measure import quality
    from avalab.models import checkpoint, predict

    tokenizer, cache = checkpoint.load_tokenizer(base), run.artifacts_dir / "cache"
    text = corpora.evaluation_text(run.profile.eval_texts[0], tokenizer)
    against = predict.make_reference(base, corpora.profile_windows(run, text, tokenizer), cache, run.device)
    kl = quality.score_artifact(artifact, against, cache, run.device, engine=options.engine_of(artifact)).kl
    found = statistics.mean(kl, resamples=run.profile.resamples, seed=run.seed)
    print(f"predicted KL divergence {artifact.card['measured']['predicted_kl_divergence']:.4f} nats/token")
    print(f"measured KL divergence {found.value:.4f} [{found.low:.4f}, {found.high:.4f}] nats/token on {text.name}")
    if predicted := artifact.card["measured"]["predicted_kl_divergence"]:
        print(f"measured is {found.value / predicted:.2f} times the prediction; {_usual_ratios(ROOT / 'results')}")
    if artifact.card["measured"]["note"]:
        print(artifact.card["measured"]["note"])


def _usual_ratios(results: Path) -> str:
    """What measured over predicted was in the study of mixed precision, over all models whose records are here."""
    ratios = []
    for path in sorted(results.glob("*/08_mixed_precision.json")):
        records = [record for record in load_records(path) if record.value and not record.subject.startswith("single ")]
        predicted = {r.subject: r.value for r in records if r.metric == "predicted_kl_divergence"}
        measured = [r for r in records if r.metric.startswith("kl_divergence:") and r.subject in predicted]
        ratios += [record.value / predicted[record.subject] for record in measured]
    if not ratios:
        return "no records of how far such predictions are off are here"
    return f"in the lab's records it was {min(ratios):.2f} to {max(ratios):.2f} times ({len(ratios)} whole files)"


def _quality_and_cost(run: Run, base: Artifact, artifact: Artifact) -> None:
    """Measure and print both, of the artefact and of its base, on the profile's evaluation texts."""
    from avalab.data import corpora
    from avalab.measure import cost, quality
    from avalab.models import checkpoint, predict

    subjects = {"bf16": base, artifact.name: artifact}
    tokenizer, cache = checkpoint.load_tokenizer(base), run.artifacts_dir / "cache"
    for text in corpora.evaluation_texts(run, tokenizer):
        against = predict.make_reference(base, corpora.profile_windows(run, text, tokenizer), cache, run.device)
        for subject, measured in subjects.items():
            quality.record_quality(run, subject, measured, against, text)
    for subject, measured in subjects.items():
        cost.record_cost(run, subject, measured)
    options.print_records(run, as_json=False)


def prune(
    method: Annotated[str, typer.Option(help=f"Score: {', '.join(options.SCORES)}.")],
    sparsity: Annotated[float, typer.Option(help="Share of the weights to remove, in [0, 1).")] = 0.5,
    pattern: Annotated[str, typer.Option(help=f"One of {', '.join(options.PATTERNS)}.")] = "unstructured",
    target_modules: Annotated[list[str] | None, typer.Option(help="Kind, glob or name; may be repeated.")] = None,
    allocation: Annotated[str, typer.Option(help="uniform or sensitivity.")] = "uniform",
    out: Annotated[Path | None, typer.Option(help="Folder of the new artefact; named by its recipe without.")] = None,
    model: Model = "",
    profile: Profile = "laptop",
    seed: Seed = 0,
    benchmark: Benchmark = False,
    force: Force = False,
) -> None:
    """Remove weights, heads, channels or layers; stopped, it goes on at the last finished block."""
    run = Run("avalab_prune", profile, seed, model)
    options.one_of("score", method, options.SCORES)
    options.one_of("pattern", pattern, options.PATTERNS)
    options.one_of("allocation", allocation, ("uniform", "sensitivity"))
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity {sparsity} is outside [0, 1): it is the share that goes, 0.5 removes half")
    options.known_model(model)
    made_by = {"step": "prune", "score": method, "pattern": pattern, "sparsity": sparsity, "allocation": allocation}
    options.new_folder(out, model, force=force, made_by=made_by, base=run.name_of_model)
    from avalab.compress import prune
    from avalab.models import checkpoint

    base = checkpoint.base_artifact(run)
    artifact = prune.prune_artifact(
        base,
        method,
        pattern,
        run=run,
        out=out,
        sparsity=sparsity,
        target_modules=tuple(target_modules or ()),
        allocation=allocation,
    )
    measured = artifact.card["measured"]
    print(f"{artifact.path}: {measured['sparsity']:.1%} of the linear weights gone, {artifact.bytes / 1e6:.1f} MB")
    if "reached_share" in measured:
        print(f"layers that were pruned hold {measured['reached_share']:.0%} of all weights")
    if "sparse_bytes" in measured:
        print(f"{measured['sparse_bytes'] / 1e6:.1f} MB in the compressed layout; engines load the dense file")
    if benchmark:
        _quality_and_cost(run, base, artifact)
        if "sparse_bytes" in measured and measured["sparsity"]:
            _time_zeros(run, artifact)


def _time_zeros(run: Run, artifact: Artifact) -> None:
    """Whether any kernel here gains from an artefact's zeros, on the last layer that has some."""
    from avalab.measure import cost
    from avalab.models import checkpoint, walk

    layers = walk.linear_layers(checkpoint.load_model(artifact, run.device, packed=False)).values()
    weight = [layer.weight.detach() for layer in layers if (layer.weight == 0).any()][-1]
    for tokens in (1, run.profile.prompt_tokens):
        timings = cost.record_sparse_speed(run, f"{artifact.name}, {tokens} tokens", artifact, weight, tokens=tokens)
        ratio = cost.best_ratio(timings)
        print(
            f"{tokens} tokens: {'faster' if ratio < 1 else 'no faster'}, the best sparse kernel takes {ratio:.2f} "
            "times the best dense one's time"
        )


def recover(
    artifact: Annotated[Path, typer.Argument(help="Folder of an rtn, gptq, awq or ava artefact.")],
    out: Annotated[Path, typer.Option(help="Folder of the new artefact, of the same bytes.")],
    teacher: Annotated[
        Path | None,
        typer.Option(help="Folder of the bf16 original; without, the base that its card names."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of calibration text to learn from.")] = 8192,
    kind: Annotated[str, typer.Option(help="scales, weights, blocks, torchao, or both: blocks, then scales.")] = "both",
    steps: Annotated[int, typer.Option(min=1, help="Of each block.")] = 40,
    learning_rate: Annotated[float, typer.Option(help="End to end, at the end of the warm-up.")] = 3e-3,
    profile: Profile = "laptop",
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Train codes and scales of a low-bit model towards its bf16 original; stopped, it goes on when run again."""
    run = Run("avalab_recover", profile, seed)
    options.one_of("kind", kind, (*recipes.KINDS, "both"))
    schedule, blocks = recipes.Schedule(learning_rate=learning_rate), recipes.BlockTraining(steps=steps)
    options.new_folder(out, artifact, teacher, force=force)
    start = artifacts.load_artifact(artifact)
    if start.format != "compressed-tensors":
        raise InputError(
            f"{start.name} is in format {start.format!r}; trained are packed codes and scales, as rtn, gptq, "
            "awq and ava write them for torch (without --format)"
        )
    from avalab.models import checkpoint

    whole = artifacts.load_artifact(teacher) if teacher else checkpoint.base_of(start)
    from avalab.train import qat

    read = qat.training_windows(run, checkpoint.load_tokenizer(start), tokens=tokens)
    if kind == "both":
        recipe = recipes.RoundingRecipe(kind="blocks", schedule=schedule, blocks=blocks)
        between = run.artifacts_dir / f"{start.name}+blocks"
        start = qat.train_quantized(start, whole, read, run=run, out=between, recipe=recipe)
    recipe = recipes.RoundingRecipe(kind="scales" if kind == "both" else kind, schedule=schedule, blocks=blocks)
    found = qat.train_quantized(start, whole, read, run=run, out=out.resolve(), recipe=recipe)
    qat.record_recovery(run, out.name, found)
    options.print_records(run, as_json)
    if not as_json:
        print(f"{found.path}: {found.bytes / 1e6:.1f} MB, as before; {qat.loss_change(found)}")


def _written(made: Artifact, engines: str) -> str:
    return f"{made.path}: {made.bytes / 1e6:.1f} MB, {made.format}\nload it with the engine {engines}"


def _onnx(artifact: Artifact, out: Path, weights: str, windows) -> str:
    """An ONNX file, executed once by ONNX Runtime; with weights int8, one of 8-bit products; GenAI's if packed."""
    from avalab.engines import onnxruntime as onnxruntime_engine

    if weights == KEPT:
        return _onnx_genai(artifact, out, "kept", windows)
    if weights == "int8" or windows is not None:
        mode = "dynamic" if windows is None else "static"
        return _written(onnxruntime_engine.write_int8(artifact, mode, windows=windows, out=out), "onnxruntime")
    made = onnxruntime_engine.write(artifact, out, weights=weights or "dense")
    found = made.card["measured"]
    return (
        f"{made.path}: {found['onnx_bytes'] / 1e6:.1f} MB, weights {weights or 'dense'}\n"
        f"ONNX Runtime: logits differ by {found['logit_difference']:.1g} of their spread, "
        f"best token the same at {found['top1_agreement']:.1%} of positions"
    )


def _onnx_genai(artifact: Artifact, out: Path, weights: str, windows) -> str:
    """A folder for ONNX Runtime GenAI, by its own model builder; a packed artefact's layers as they are."""
    from avalab.engines import onnx as genai_folder

    if windows is not None:
        raise InputError(f"weights {weights or 'int4'} for ONNX Runtime GenAI take no calibration text")
    made = genai_folder.write(artifact, weights or "int4", out=out)
    note = made.card["measured"].get("note", "")
    return _written(made, "onnx") + (f"\n{note}" if note else "")


def _gguf(artifact: Artifact, out: Path, weights: str, windows) -> str:
    """A GGUF file with tokenizer and chat template, and Ollama's Modelfile; K types by llama.cpp's quantiser."""
    from avalab.engines import gguf as gguf_file
    from avalab.engines import llamacpp

    if weights in llamacpp.MIXTURES:
        return _written(llamacpp.write(artifact, weights, windows=windows, out=out), "llamacpp or torch")
    if windows is not None:
        raise InputError(f"only {', '.join(llamacpp.MIXTURES)} are calibrated; got {weights or 'q8_0'}")
    made = gguf_file.write(artifact, weights or "q8_0", out=out)
    return _written(made, " or ".join(made.card["engines"]))


def _by_engine(engine: str, default: str) -> Callable[..., str]:
    """The export of an engine that needs no calibration text and has one format."""

    def write(artifact: Artifact, out: Path, weights: str, _windows) -> str:
        module = importlib.import_module(f"avalab.engines.{engine}")
        return _written(module.write(artifact, weights or default, out=out), engine)

    return write


@dataclass(frozen=True)
class Exporter:
    """A format: the function that writes it, the weights that it knows, and whether some need calibration text."""

    write: Callable[..., str]
    weights: tuple[str, ...]
    calibrated: bool = False


KEPT = "kept"  # the integers of a packed artefact, not rounded again

BLOCKS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", KEPT)

MIXTURES = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")

EXPORTERS: dict[str, Exporter] = {
    "onnx": Exporter(_onnx, ("dense", "sparse", "bitmask", "int8", KEPT), calibrated=True),
    "onnx-genai": Exporter(_onnx_genai, ("fp32", "int8", "int4", KEPT)),
    "gguf": Exporter(_gguf, (*BLOCKS, *MIXTURES), calibrated=True),
    "openvino": Exporter(_by_engine("openvino", "int8"), ("f16", "int8", "int4", KEPT)),
    "executorch": Exporter(_by_engine("executorch", "fp32"), ("fp32",)),
    "aot": Exporter(_by_engine("aot", "bf16"), ("bf16", "fp32")),
}

WEIGHTS_HELP = "How weights are stored. " + "; ".join(f"{n}: {', '.join(row.weights)}" for n, row in EXPORTERS.items())

CALIBRATE_HELP = "Use calibration text: static scales (onnx), an importance matrix (gguf's K types)."


def export(
    artifact: options.ModelPath,
    to: Annotated[str, typer.Option(help="Format: " + ", ".join(EXPORTERS) + ".")],
    out: NewFolder,
    weights: Annotated[str, typer.Option(help=WEIGHTS_HELP)] = "",
    calibrate: Annotated[bool, typer.Option("--calibrate", help=CALIBRATE_HELP)] = False,
    profile: Profile = "laptop",
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Write an artefact in the format of another engine and check it there."""
    options.one_of("format", to, EXPORTERS)
    row, run = EXPORTERS[to], Run("avalab_export", profile, seed)
    if weights and weights not in row.weights:
        raise InputError(f"no weights {weights!r} for {to}; choose one of {', '.join(row.weights)}")
    if calibrate and not row.calibrated:
        able = " and ".join(name for name, other in EXPORTERS.items() if other.calibrated)
        raise InputError(f"{to} takes no calibration text; {able} do")
    options.new_folder(out, artifact, force=force)
    found, windows = options.source_artifact(options.readable(artifact), run), None
    if calibrate:
        from avalab.data import corpora
        from avalab.models import checkpoint

        windows = corpora.calibration_windows(run, checkpoint.load_tokenizer(found))
    if found.format.startswith("compressed-tensors") and KEPT in row.weights:
        weights = weights or KEPT
    print(row.write(found, out, weights, windows))


def compile_(
    out: NewFolder,
    model: Model = "",
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Any batch; without it, one sequence.")] = False,
    weights: Annotated[str, typer.Option(help="bf16 or fp32: how weights are stored and computed with.")] = "bf16",
    profile: Profile = "laptop",
    force: Force = False,
) -> None:
    """Compile a model ahead of time into machine code that runs without its Python; any prompt length."""
    options.one_of("weights", weights, EXPORTERS["aot"].weights)
    run = Run("avalab_compile", profile, 0, model)
    options.known_model(model)
    options.new_folder(out, model, force=force)
    from avalab.engines import aot

    made = aot.write(options.source_artifact(model, run), weights, dynamic=dynamic, out=out)
    print(_written(made, "aot"))
    print(f"without the lab: python {made.path / aot.PROGRAM} {made.path / 'model.pt2'} 16 TOKEN_IDS")


def tensorrt(
    model: Model = "",
    precision: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The capital of France is",
    profile: Profile = "laptop",
) -> None:
    """Build a model for TensorRT-LLM, continue a prompt with it, and say how fast; needs an NVIDIA GPU."""
    if precision not in PRECISIONS:
        raise InputError(f"no precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    run = Run("avalab_compile", profile, 0, model)
    options.known_model(model)
    from avalab.engines import tensorrt
    from avalab.measure import cell
    from avalab.models import checkpoint

    tensorrt.require(precision)
    artifact = options.source_artifact(model, run)
    loaded, tokenizer = tensorrt.load(artifact, precision=precision), checkpoint.load_tokenizer(artifact)
    ids = tokenizer(prompt).input_ids
    print(tokenizer.decode(loaded.generate(ids, 32)))
    seconds = cell.time_tokens(loaded, ids, 32)
    print(f"{precision}: {31 / (seconds[-1] - seconds[0]):.1f} token/s after {seconds[0] * 1000:.0f} ms")
    loaded.close()
