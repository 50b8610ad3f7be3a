"""Who takes part in the race: one base model in the forms that its engines read, in every engine that reads them.

`make` returns the artefacts by name, each made by the module whose format it is and kept below the run's artefacts:
made once, found again. A form whose library is missing here is a record without value that says so. `entries` pairs
them with engines and numbers of threads: a cell each.

What it does not do: choose a format, or time anything.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from tqdm.auto import tqdm

from avalab import artifacts, corpora, engine_bench, engines, models, quantize
from avalab.artifacts import Artifact
from avalab.engines import gguf, llamacpp, onnx, openvino
from avalab.experiment import Run

# The torch engine decodes a GGUF file to the dense model: its speed would be that of bf16 once more.
SAME_AS_DENSE = (("gguf", "torch"),)
AVA_BITS = 6  # a weight of the whole model: what GGUF's 4-bit files of a small one come to, embedding included


def _ava(base: Artifact, run: Run) -> Artifact:
    """The mixed grid in the size that the run has made already, so that it is found again, else of `AVA_BITS`."""
    steps = [a.card["recipe"][-1] for a in artifacts.list_artifacts(run.artifacts_dir) if _is_ava_of(base, a)]
    size = steps[0].get("bytes") if steps else None
    return quantize.write(base, "ava", run=run, **({"bytes": size} if size else {"bits_per_weight": AVA_BITS}))


def _gguf_ava(base: Artifact, run: Run) -> Artifact:
    """The allocation over GGUF's own block types, at the bytes of Q4_0."""
    return quantize.write(base, "ava", run=run, bytes=gguf.write(base, "q4_0").bytes, format="gguf")


def _calibration(base: Artifact, run: Run) -> Tensor:
    return corpora.calibration_windows(run, models.load_tokenizer(base))


def _is_ava_of(base: Artifact, artifact: Artifact) -> bool:
    recipe = artifact.card["recipe"]
    return artifact.card["base"]["sha256"] == base.sha256 and bool(recipe) and recipe[-1].get("step") == "ava"


FORMS: dict[str, Callable[[Artifact, Run], Artifact]] = {
    "bf16": lambda base, run: base,
    "nf4": lambda base, run: quantize.write(base, "nf4", run=run, double_quantization=True),
    "torchao-int8": lambda base, run: quantize.write(base, "torchao-int8", run=run),
    "ava": _ava,
    "gguf-q8_0": lambda base, run: gguf.write(base, "q8_0"),
    "gguf-q4_0": lambda base, run: gguf.write(base, "q4_0"),
    "gguf-q4_k_m": lambda base, run: llamacpp.write(base, "q4_k_m", windows=_calibration(base, run)),
    "gguf-ava": lambda base, run: _gguf_ava(base, run),
    "openvino-int8": lambda base, run: openvino.write(base, "int8"),
    "openvino-int4": lambda base, run: openvino.write(base, "int4"),
    "onnx-int4": lambda base, run: onnx.write(base, "int4"),
}

SOME = {"smoke": ("bf16", "nf4", "openvino-int4", "onnx-int4")}  # profiles that race a few forms only


@dataclass(frozen=True, eq=False)  # one of its kind: an artefact's card has no hash
class Entry:
    """A cell that takes part: what it is called, the artefact, the engine, threads."""

    subject: str
    artifact: Artifact
    engine: str
    threads: int


def make(run: Run, names: Sequence[str] = ()) -> dict[str, Artifact]:
    """The run's base model in the forms of these names (the profile's without), as far as their libraries are here.

    Raises ValueError for an unknown name.
    """
    if unknown := [name for name in names if name not in FORMS]:
        raise ValueError(f"no form {', '.join(unknown)}; choose from {', '.join(FORMS)}")
    base, made = models.base(run), {}
    for name in tqdm(names or SOME.get(run.profile_name, tuple(FORMS)), desc="make", leave=False):
        try:
            made[name] = FORMS[name](base, run)
        except (engines.EngineUnavailable, ValueError) as error:  # not here, or not of this model's shape
            engine_bench.add_failure(run, name, f"not measured: {error}")
    return made


def thread_counts(profile: str = "") -> tuple[int, ...]:
    """One thread, and all processors that this process may use; one alone where the profile is `smoke`."""
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (1,) if profile == "smoke" else tuple(sorted({1, every}))


def entries(
    contestants: dict[str, Artifact],
    *,
    threads: Sequence[int] = (),
    only: Sequence[str] = (),
    skip: Iterable[tuple[str, str]] = (),
) -> list[Entry]:
    """Every artefact in every engine that loads it, with each number of threads; a subject is `nf4 in torch`.

    `only` names engines (empty: all), `skip` pairs of an artefact's kind and an engine.
    """
    left_out = set(skip)
    found = []
    for (name, artifact), count in itertools.product(contestants.items(), threads or thread_counts()):
        kind = engines.kind(artifact.path)
        readers = engines.READERS[kind]
        if kind == "gguf":  # not every engine reads every block type
            readers = tuple(engine for engine in readers if engine in artifact.card["engines"])
        for engine in readers:
            if engine in engines.ENGINES and (not only or engine in only) and (kind, engine) not in left_out:
                found.append(Entry(f"{name} in {engine}", artifact, engine, count))
    return found
