"""Making what a plan needs: chains of steps, each an artefact and a row of the ledger, in processes or on a cluster.

A chain is a model and a recipe. `make_chain` walks its steps; a step that the ledger knows and whose artefact is what
it was is not made again, and artefacts are folders that appear whole (`avalab.lab.artifacts`), so a killed run goes on
at the step it was in. After each step the artefact is loaded back and scored: divergence window by window, in the
engine that will run it.

`make_chains` runs independent chains side by side: each in a process of its own whose memory ends with it, so that
whoever plans never holds a model; or as tasks of Ray, over as many nodes as are joined, where Ray is installed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from avalab.lab import artifacts, process
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, LabError, Unavailable
from avalab.lab.run import Run, artifacts_root
from avalab.plan.ledger import Entry, Ledger
from avalab.plan.recipes import RECIPES

LIMIT_SECONDS = 6 * 3600.0  # of one chain

BACKENDS = ("processes", "ray")

DISTIL_TOKENS = 4  # of distillation, in calibration sets of the profile

# --- steps ------------------------------------------------------------------------------------------------------------


def _prune(start: Artifact, base: Artifact, run: Run, parameters: dict) -> Artifact:
    from avalab.compress import prune

    return prune.prune_artifact(start, run=run, **parameters)


def _distil(start: Artifact, base: Artifact, run: Run, parameters: dict) -> Artifact:
    from avalab.data import packing
    from avalab.models import adapters, checkpoint
    from avalab.train import distill, finetune

    row_tokens = run.profile.calibration_tokens
    tokens = DISTIL_TOKENS * run.profile.calibration_samples * row_tokens
    rows = packing.text_rows(run, checkpoint.load_tokenizer(base), tokens=tokens, row_tokens=row_tokens)
    recipe = distill.Recipe(training=finetune.Recipe(row_tokens=row_tokens))
    name = f"{start.name}+kl"
    return adapters.merge_adapters(distill.train_student(start, base, rows, run=run, name=name, recipe=recipe))


def _quantize(start: Artifact, base: Artifact, run: Run, parameters: dict) -> Artifact:
    from avalab.compress import quantize

    return quantize.compress_artifact(start, run=run, **parameters)


def _recover(start: Artifact, base: Artifact, run: Run, parameters: dict) -> Artifact:
    from avalab.models import checkpoint
    from avalab.train import qat
    from avalab.train.recipes import RoundingRecipe

    tokens = run.profile.calibration_samples * run.profile.calibration_tokens
    read = qat.training_windows(run, checkpoint.load_tokenizer(start), tokens=tokens)
    out = run.artifacts_dir / f"{start.name}+{parameters['kind']}"
    return qat.train_quantized(start, base, read, run=run, out=out, recipe=RoundingRecipe(**parameters))


def _gguf(start: Artifact, base: Artifact, run: Run, parameters: dict) -> Artifact:
    from avalab.engines import gguf

    return gguf.write(start, parameters["block"])


def _openvino(start: Artifact, base: Artifact, run: Run, parameters: dict) -> Artifact:
    from avalab.engines import openvino

    return openvino.write(start, parameters["weights"])


def _onnx(start: Artifact, base: Artifact, run: Run, parameters: dict) -> Artifact:
    from avalab.engines import onnx

    return onnx.write(start, parameters["weights"])


VERBS: dict[str, Callable[[Artifact, Artifact, Run, dict], Artifact]] = {
    "prune": _prune,
    "distill": _distil,
    "quantize": _quantize,
    "recover": _recover,
    "gguf": _gguf,
    "openvino": _openvino,
    "onnx": _onnx,
}


@dataclass(frozen=True)
class Chain:
    """A recipe for a model; `windows` is how many windows each of its steps is scored on."""

    model: str
    recipe: str
    windows: int = 0  # 0: the profile's number

    @property
    def name(self) -> str:
        return f"{self.model}/{self.recipe}"


def make_chain(chain: Chain, run: Run, ledger: Ledger) -> list[Entry]:
    """Make and score a chain's steps, as far as the ledger does not have them; the first entry is the model itself.

    Raises InputError for an unknown recipe, and what its steps raise.
    """
    from avalab.models import checkpoint

    if chain.recipe not in RECIPES:
        raise InputError(f"unknown recipe {chain.recipe!r}; choose of {', '.join(RECIPES)}")
    recipe = RECIPES[chain.recipe]
    base = checkpoint.base_artifact(run)
    entries = [_step(chain, run, ledger, base, 0, "base", {}, lambda: base, engine="torch")]
    made = base
    for position, (verb, parameters) in enumerate(recipe.steps, 1):
        last = position == len(recipe.steps)
        before = made
        entry = _step(
            chain,
            run,
            ledger,
            base,
            position,
            verb,
            parameters,
            lambda verb=verb, before=before, parameters=parameters: VERBS[verb](before, base, run, parameters),
            engine=recipe.engine if last else "torch",
        )
        made = artifacts.load_artifact(entry.artifact, verify=False)
        entries.append(entry)
    return entries


def _step(
    chain: Chain,
    run: Run,
    ledger: Ledger,
    base: Artifact,
    position: int,
    verb: str,
    parameters: dict,
    make: Callable,
    *,
    engine: str,
) -> Entry:
    """One step from the ledger, or made and scored now."""
    steps = [list(step) for step in RECIPES[chain.recipe].steps[:position]]
    key = artifacts.sha256_of_text(str([chain.name, base.sha256, run.profile_name, run.seed, chain.windows, steps]))

    def compute() -> Entry:
        made = make()
        losses = window_losses(made, base, run, engine=engine, windows=chain.windows)
        return Entry(
            key,
            chain.name,
            position,
            verb,
            str(made.path),
            made.sha256,
            made.bytes,
            parameters=parameters,
            losses=losses,
        )

    return ledger.once(key, compute)


def window_losses(artifact: Artifact, base: Artifact, run: Run, *, engine: str, windows: int = 0) -> list[float]:
    """Mean KL divergence to the base of each window of the lab's first text, in the engine that runs the artefact."""
    found = token_scores(artifact, base, run, engine=engine, items=range(windows or run.profile.eval_windows))
    return found.kl.mean(-1).tolist()


def token_scores(artifact: Artifact, base: Artifact, run: Run, *, engine: str, items: range):
    """Scores of every token of these windows (`predict.TokenScores`); read from the run's cache where known."""
    from avalab.data import corpora
    from avalab.measure import quality
    from avalab.models import checkpoint, predict

    tokenizer, cache = checkpoint.load_tokenizer(base), run.artifacts_dir / "cache"
    text = corpora.evaluation_text("python_docs", tokenizer)
    chosen = corpora.windows(text, tokenizer, count=items.stop, tokens=run.profile.window_tokens)[items.start :]
    against = predict.make_reference(base, chosen, cache, run.device)
    return quality.score_artifact(artifact, against, cache, run.device, engine=engine)


def prompt_divergences(
    artifact: Artifact, base: Artifact, prompts: Sequence[str], run: Run, engine: str
) -> list[float]:
    """Mean KL divergence to the base on each prompt, cut to the profile's window; nothing of them is kept."""
    import torch

    from avalab.measure import quality
    from avalab.models import checkpoint, predict

    tokenizer, found = checkpoint.load_tokenizer(base), []
    with tempfile.TemporaryDirectory() as cache:
        for prompt in prompts:
            tokens = tokenizer(prompt)["input_ids"][: run.profile.window_tokens]
            if len(tokens) < 2:  # nothing is predicted
                continue
            against = predict.make_reference(base, torch.tensor([tokens]), Path(cache), run.device)
            scores = quality.score_artifact(artifact, against, Path(cache), run.device, engine=engine)
            found.append(float(scores.kl.mean()))
    return found


# --- side by side -----------------------------------------------------------------------------------------------------


def make_chains(
    chains: Sequence[Chain], run: Run, ledger: Path, *, workers: int = 1, backend: str = "processes"
) -> dict[str, list[Entry] | str]:
    """The entries of each chain by name, or the reason in one line why it could not be made.

    Raises InputError for an unknown backend or no workers, Unavailable for Ray where it is not installed.
    """
    if backend not in BACKENDS or workers < 1:
        raise InputError(f"{workers} workers of {backend!r}; give 1 or more of {' or '.join(BACKENDS)}")
    Ledger(ledger)  # refused here, and not once in every process
    requests = [
        {
            "chain": asdict(chain),
            "profile": run.profile_name,
            "seed": run.seed,
            "ledger": str(ledger.resolve()),
            "artifacts": str(artifacts_root().resolve()),
            "device": run.device,
        }
        for chain in chains
    ]
    answers = _by_ray(requests) if backend == "ray" else _by_processes(requests, workers)
    book = Ledger(ledger)
    return {
        chain.name: book.chain(chain.name) if said == "" else said for chain, said in zip(chains, answers, strict=True)
    }


def answer_chain(request: dict) -> dict:
    """In a process of its own: make a chain; `failed` says in one line why it could not be."""
    os.environ.update(AVALAB_ARTIFACTS=request["artifacts"], AVALAB_DEVICE=request["device"])
    chain = Chain(**request["chain"])
    run = Run("plan", request["profile"], request["seed"], chain.model)
    try:
        make_chain(chain, run, Ledger(Path(request["ledger"])))
    except LabError as error:
        return {"failed": str(error)}
    return {"failed": ""}


def _by_processes(requests: Sequence[dict], workers: int) -> list[str]:
    def ask(request: dict) -> str:
        label = f"{request['chain']['recipe']} of {request['chain']['model']}"
        try:
            return process.call(f"{__name__}:answer_chain", request, limit_seconds=LIMIT_SECONDS, label=label)["failed"]
        except LabError as error:  # killed, out of memory, or a library's own end
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(ask, requests))


def _by_ray(requests: Sequence[dict], target: Callable[[dict], dict] = answer_chain) -> list[str]:
    """One task a request, over all nodes that are joined; a cluster that is running is used, else one is started."""
    if find_spec("ray") is None:
        raise Unavailable("Ray is not installed: pip install ray, or leave out --backend ray")
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        task = ray.remote(num_cpus=1)(target)
        return [answer["failed"] for answer in ray.get([task.remote(request) for request in requests])]
    finally:
        if started:
            ray.shutdown()


def answer_scores(request: dict) -> dict:
    """In a process of its own: mean divergence and agreement of each of some windows."""
    from avalab.models import checkpoint

    os.environ.update(AVALAB_ARTIFACTS=request["artifacts"], AVALAB_DEVICE=request["device"])
    run = Run("plan", request["profile"], request["seed"], request["model"])
    base, made = checkpoint.base_artifact(run), artifacts.load_artifact(request["folder"], verify=False)
    found = token_scores(made, base, run, engine=request["engine"], items=range(*request["items"]))
    return {"kl": found.kl.mean(-1).tolist(), "agrees": found.agrees.mean(-1).tolist()}


# --- thin calls -------------------------------------------------------------------------------------------------------

QUANTIZED = {"int8": (8,), "nf4": (4,), "int": tuple(range(2, 9))}  # bits of each type

STRATEGIES = {
    "small": "pruned30-int8",
    "medium": "pruned50-distilled-ava",
    "large": "pruned70-distilled-q4_0",
}


@dataclass(frozen=True)
class QuantizationConfig:
    """How to quantise, in five words; `method` is the row of `avalab.compress.quantize` that they mean.

    `type` is int8, nf4, or int (rounding to `bits`). Raises InputError for an unknown type, or bits that it lacks.
    """

    type: str = "int8"
    bits: int = 8
    calibration_samples: int = 0  # of `int`: without any, to the nearest
    per_channel: bool = True  # of `int`: one scale a row, else one for 64 weights
    symmetric: bool = True  # of `int`

    def __post_init__(self) -> None:
        if self.type not in QUANTIZED:
            raise InputError(f"unknown type {self.type!r}; choose one of {', '.join(QUANTIZED)}")
        if self.bits not in QUANTIZED[self.type]:
            has = ", ".join(map(str, QUANTIZED[self.type]))
            raise InputError(f"type {self.type!r} has no {self.bits} bits; it has {has}")
        if self.calibration_samples < 0:
            raise InputError(f"calibration_samples is {self.calibration_samples}; it has to be 0 or more")

    @property
    def method(self) -> tuple[str, dict]:
        """The method's name and its parameters."""
        if self.type == "int8":
            return "torchao-int8", {}
        if self.type == "nf4":
            return "nf4", {"double_quantization": True}
        group = 0 if self.per_channel else 64
        rounding = {"bits": self.bits, "group_size": group, "symmetric": self.symmetric}
        return ("gptq" if self.calibration_samples else "rtn"), rounding


def optimize_for_cpu(model: str, strategy: str | QuantizationConfig = "small", *, profile: str = "laptop") -> Artifact:
    """A smaller artefact of a model for a CPU: by a size class's strategy, a recipe's name, or a quantisation.

    Raises InputError for a strategy that is none of these, or more calibration samples than the profile has.
    """
    run = Run("optimize_for_cpu", profile, model=model)
    if isinstance(strategy, QuantizationConfig):
        from avalab.models import checkpoint

        most, asked = run.profile.calibration_samples, strategy.calibration_samples
        if asked > most:
            raise InputError(f"calibration_samples is {asked}; profile {profile} has {most}")
        method, parameters = strategy.method
        base = checkpoint.base_artifact(run)
        return _quantize(base, base, run, {"method": method, **parameters})
    name = STRATEGIES.get(strategy, strategy)
    if name not in RECIPES:
        raise InputError(f"unknown strategy {strategy!r}; choose of {', '.join((*STRATEGIES, *RECIPES))}")
    entries = make_chain(Chain(run.model, name), run, Ledger(run.artifacts_dir / "plan.sqlite"))
    return artifacts.load_artifact(entries[-1].artifact, verify=False)
