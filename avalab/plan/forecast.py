"""What a recipe will make of a model: bytes, memory, speed, divergence and agreement, each predicted or measured.

1. `Evidence` holds the lab's records: those of the model itself, and those of the model that the lab measures most
   (`REFERENCE`). A figure that a record of the very model and recipe holds is `measured`; any other is `predicted`.
2. Bytes come from the formulas of `avalab.plan.recipes`.
3. Memory is the formula of `avalab.measure.cost` for weights, context and one step, plus what the engine keeps beside
   that for the reference: as a share of the weights, which engines unpack or repack; or, where they are mapped from
   the file (`MAPPED`), in the ratio of vocabularies. Four files of 92 to 145 MB in llama.cpp had 131 to 193 MB beside
   them, and no more the larger they were: it is mostly room for logits.
4. Decoding reads the whole file for every token: tokens a second are as the inverse of bytes. Prefill computes: as the
   inverse of parameters.
5. Divergences of steps one after another are taken to add up (0.39 and 0.31 nats came to 0.68 in notebook 03), and
   distillation to win back the share that it won back there. What they mean for agreement is the curve

       agreement = exp(-a KL^b)

   fitted to all the lab's records by least squares in log(-log(agreement)).
6. Of another model than the reference, divergence and agreement are the reference's: larger models mostly lose less.

`quality` is the share of next tokens on which the shrunk model agrees with the whole one, on the lab's text `TEXT`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from avalab.lab import assets
from avalab.lab.run import ROOT, Record, Run, load_records, places_of
from avalab.measure import cost
from avalab.measure.cell import Workload
from avalab.models import sizes
from avalab.models.sizes import Shape
from avalab.plan.recipes import Recipe, parameters_of

REFERENCE = "smollm2-135m-instruct"

SHAPES = {  # of models that are planned for before they are fetched
    REFERENCE: Shape(49152, 576, 1536, 30, 9, 3, 64, tied=True),
    "qwen2.5-coder-0.5b-instruct": Shape(151936, 896, 4864, 24, 14, 2, 64, tied=False),
    "qwen2.5-coder-1.5b-instruct": Shape(151936, 1536, 8960, 28, 12, 2, 128, tied=False),
}

REFERENCE_SHAPE = SHAPES[REFERENCE]

REFERENCE_RESULTS = ("01_quantization", "03_distillation", "04_pruning", "06_benchmarking", "08_mixed_precision")

MORE_RESULTS = ("09_quantization_aware_training", "peers")

TEXT = "python_docs"

KL, QUALITY = f"kl_divergence:{TEXT}", f"top1_agreement:{TEXT}"

MEMORY, DECODE, PREFILL = "peak_rss_bytes:engine", "decode_tokens_per_s:prompt16", "prefill_tokens_per_s:prompt512"

RACE_TOKENS, RACE_NEW_TOKENS = 512, 16  # of the race of notebook 06, whose memory is the evidence

MAPPED = ("llamacpp",)  # engines that read weights where the file is mapped

RECOVERED = f"recovered:divergence {TEXT}"  # of the student that listens to its teacher, `kl`

PLAN_RECORDS = ("14_planning", "plan")  # of the notebook and of the command


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval (None where there is none), and where it comes from."""

    value: float
    low: float | None = None
    high: float | None = None
    how: str = "predicted"  # or measured
    source: str = ""


@dataclass(frozen=True)
class Forecast:
    """What a recipe makes of a model."""

    recipe: Recipe
    model: str
    weights: Figure  # bytes of the file
    memory: Figure  # bytes of weights and engine, above the process
    decode: Figure  # tokens a second
    prefill: Figure
    kl: Figure
    quality: Figure

    @property
    def name(self) -> str:
        return self.recipe.name

    def latency_ms(self, prompt_tokens: int, new_tokens: int) -> float:
        """Milliseconds of a call."""
        return 1e3 * (prompt_tokens / self.prefill.value + new_tokens / self.decode.value)


@dataclass(frozen=True)
class Evidence:
    """Records by (model, subject, metric), the newest at the highest number of threads."""

    known: Mapping[tuple[str, str, str], Record]

    @staticmethod
    def of(records: Iterable[Record]) -> Evidence:
        """The evidence in some records."""
        found: dict[tuple[str, str, str], Record] = {}
        for record in records:
            key = (record.model, record.subject, record.metric)
            if record.value is None:
                continue
            old = found.get(key)
            if old is None or (record.threads, record.when) >= (old.threads, old.when):
                found[key] = record
        return Evidence(found)

    def get(self, model: str, subject: str, metric: str) -> Record | None:
        """A record, or None."""
        return self.known.get((model, subject, metric))

    @cached_property
    def curve(self) -> tuple[float, float, float]:
        """`a`, `b` of agreement = exp(-a KL^b), and the standard deviation of log(-log(agreement)) around it."""
        pairs = [
            (record.value, self.known[model, subject, QUALITY].value)
            for (model, subject, metric), record in self.known.items()
            if metric == KL and (model, subject, QUALITY) in self.known
        ]
        fitting = np.array([(kl, share) for kl, share in pairs if 1e-3 < kl < 4 and 0.02 < share < 0.999])
        if len(fitting) < 3:  # too few to fit: what the laptop's records gave on 2026-11-29
            return 1.08, 0.68, 0.1
        x, y = np.log(fitting[:, 0]), np.log(-np.log(fitting[:, 1]))
        slope, intercept = np.polyfit(x, y, 1)
        spread = float(np.std(y - slope * x - intercept, ddof=2))
        return float(np.exp(intercept)), float(slope), spread

    def agreement(self, kl: float) -> Figure:
        """The share of next tokens that a divergence leaves equal."""
        if kl <= 0:
            return Figure(1.0, 1.0, 1.0, source="no divergence")
        a, b, spread = self.curve
        middle = a * kl**b
        ends = (float(np.exp(-middle * np.exp(sign * 1.96 * spread))) for sign in (1, -1))
        return Figure(float(np.exp(-middle)), *ends, source="from the divergence")


def read_evidence(run: Run) -> Evidence:
    """The reference's committed results, and those of the run's own model."""
    names = [*(REFERENCE_RESULTS + MORE_RESULTS + PLAN_RECORDS)]
    folders = dict.fromkeys([ROOT / "results" / "laptop", run.results_dir])
    files = [folder / f"{name}.json" for folder in folders for name in names]
    return Evidence.of(record for file in files if file.is_file() for record in load_records(file))


def forecast(recipe: Recipe, model: str, shape: Shape, evidence: Evidence) -> Forecast:
    """What a recipe will make of a model of these sizes."""
    stored = recipe.shape(shape)
    weights = _figure(evidence.get(model, recipe.subject, "artifact_bytes")) or Figure(
        recipe.weights(stored), source="formula"
    )
    kl, quality = _quality(recipe, model, evidence)
    return Forecast(
        recipe,
        model,
        weights,
        _memory(recipe, model, stored, weights.value, evidence),
        *_speeds(recipe, model, stored, weights.value, evidence),
        kl,
        quality,
    )


def _figure(record: Record | None, factor: float = 1.0, *, source: str = "", how: str = "measured") -> Figure | None:
    if record is None:
        return None
    ends = (None if end is None else end * factor for end in (record.low, record.high))
    return Figure(record.value * factor, *ends, how=how, source=source or f"{record.notebook}: {record.subject}")


def _race(recipe: Recipe) -> str:
    return f"{recipe.race} in {recipe.engine}"


def _own_subjects(recipe: Recipe) -> list[str]:
    """Subjects whose records are of the very recipe: its own, and one of the lab's that has no other step."""
    return [recipe.subject, *(recipe.costs if len(recipe.costs) == 1 and not recipe.distilled else ())]


def _first(evidence: Evidence, model: str, subjects: Iterable[str], metric: str) -> Record | None:
    return next(filter(None, (evidence.get(model, subject, metric) for subject in subjects)), None)


def _quality(recipe: Recipe, model: str, evidence: Evidence) -> tuple[Figure, Figure]:
    own = _own_subjects(recipe)
    measured = _figure(_first(evidence, model, own, KL)), _figure(_first(evidence, model, own, QUALITY))
    if all(measured):
        return measured
    if not recipe.steps:
        nothing = Figure(0.0, 0.0, 0.0, source="the model itself")
        return nothing, Figure(1.0, 1.0, 1.0, source="the model itself")
    parts = [evidence.get(REFERENCE, subject, KL) for subject in recipe.costs]
    if len(recipe.costs) == 1 and parts[0] and not recipe.distilled:
        quality = _figure(evidence.get(REFERENCE, recipe.costs[0], QUALITY), how="predicted")
        source = f"as of {REFERENCE}"
        return _figure(parts[0], how="predicted", source=source), quality or evidence.agreement(parts[0].value)
    known = [part.value for part in parts if part]
    if len(known) < len(parts):
        missing = next(s for s, part in zip(recipe.costs, parts, strict=True) if not part)
        return Figure(float("inf"), source=f"no record of {missing}"), Figure(0.0, source=f"no record of {missing}")
    if recipe.distilled:
        back = evidence.get(REFERENCE, "kl", RECOVERED)
        known[0] *= 1 - (back.value if back else 0.0)
    total = sum(known)
    return Figure(total, source=f"sum of {' and '.join(recipe.costs)}"), evidence.agreement(total)


def _formula(shape: Shape, weight_bytes: float) -> int:
    """Weights, context and one step, by the formula, without what an engine keeps besides."""
    plain = sizes.Storage("any", (), decodes=False)
    work = Workload(prompts=(RACE_TOKENS,), new_tokens=RACE_NEW_TOKENS, device="cpu")
    return cost.predict_memory(shape, plain, weight_bytes=int(weight_bytes), work=work)["total"]


def _memory(recipe: Recipe, model: str, shape: Shape, weight_bytes: float, evidence: Evidence) -> Figure:
    if own := _figure(evidence.get(model, recipe.subject, MEMORY)):
        return own
    formula = _formula(shape, weight_bytes)
    known = evidence.get(REFERENCE, _race(recipe), MEMORY)
    size = evidence.get(REFERENCE, _race(recipe), "artifact_bytes")
    if not known or not size:
        return Figure(2.0 * formula, source="formula, twice: nothing like it was measured")
    factor = shape.vocab / REFERENCE_SHAPE.vocab if recipe.engine in MAPPED else weight_bytes / size.value
    beside = max(0.0, known.value - _formula(REFERENCE_SHAPE, size.value)) * factor
    return Figure(formula + beside, source=f"formula, and what {recipe.engine} keeps beside weights")


def _speeds(recipe: Recipe, model: str, shape: Shape, weight_bytes: float, evidence: Evidence) -> tuple[Figure, Figure]:
    found = []
    for metric in (DECODE, PREFILL):
        if own := _figure(evidence.get(model, recipe.subject, metric)):
            found.append(own)
            continue
        known = evidence.get(REFERENCE, _race(recipe), metric)
        size = evidence.get(REFERENCE, _race(recipe), "artifact_bytes")
        if metric == DECODE:
            factor, way = (size.value if size else weight_bytes) / weight_bytes, "as the inverse of bytes"
        else:
            factor, way = parameters_of(REFERENCE_SHAPE) / parameters_of(shape), "as the inverse of parameters"
        source = f"{_race(recipe)}, {way}"
        found.append(_figure(known, factor, source=source, how="predicted") or Figure(1.0, source="nothing like it"))
    return tuple(found)


def runtime_bytes(evidence: Evidence) -> int:
    """Bytes of the serving process before any weights: the median of the reference's race, else 400 MB."""
    known = [
        record.details["runtime_bytes"]
        for (_, _, metric), record in evidence.known.items()
        if metric == "peak_rss_bytes:idle" and "runtime_bytes" in record.details
    ]
    return int(np.median(known)) if known else 400_000_000


def shape_of_model(model: str, run: Run) -> Shape:
    """Sizes of a model: of one that the lab knows without having it, else from its configuration or its GGUF header.

    Raises InputError for a model that is unknown or not Llama-like, Unavailable for one that cannot be fetched.
    """
    if model in SHAPES:
        return SHAPES[model]
    base = run.artifacts_dir / run.name_of_model
    folder = next((path for path in places_of(model) if path.is_dir()), base)
    if (folder / "config.json").is_file():
        return sizes.shape_of(folder)
    source = assets.resolve_model(model)
    if source.is_dir():
        return sizes.shape_of(source)
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as temporary:
        AutoConfig.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(temporary)
        return sizes.shape_of(Path(temporary))
