"""A ledger of shrinking steps one after another: what each of them cost in bytes, divergence and accuracy.

A step's cost is not its own alone: it is what the step does to the model it was given, so that another order has
another ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from avalab.lab import artifacts, process
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.lab.run import Record, Run
from avalab.models import adapters, checkpoint


def shipped_bytes(artifact: Artifact) -> int:
    """Bytes of the weights that a user needs: an adapter's and its base's."""
    return artifact.bytes + (checkpoint.base_of(artifact).bytes if artifact.format == "peft" else 0)


def ledger(run: Run, subjects: Sequence[str], metrics: Sequence[str]) -> list[Record]:
    """Append `cost:<metric>` of every subject of the chain but the first: its value less that of the one before.

    Raises ValueError for a subject without one of the metrics.
    """
    known = {(r.subject, r.metric): r for r in run.records}
    found = []
    for before, after in pairwise(subjects):
        for metric in metrics:
            if missing := [s for s in (before, after) if (s, metric) not in known]:
                raise InputError(f"no {metric} of {missing[0]!r}; measure every step before its ledger")
            old, new = known[before, metric], known[after, metric]
            more = {"n": new.n, "artifact_sha256": new.artifact_sha256}
            details = {"before": before, "value_before": old.value, "value": new.value}
            cost = new.value - old.value
            found.append(run.record(after, f"cost:{metric}", cost, new.unit, **more, details=details))
    return found


def dequantised(artifact: Artifact) -> Artifact:
    """The bf16 artefact, beside it, of a bitsandbytes 4-bit one's values: so that pruning can come after rounding.

    Raises ValueError for another format.
    """
    if artifact.format != "bitsandbytes":
        raise InputError(f"{artifact.name} is in format {artifact.format!r}; only bitsandbytes 4-bit ones are decoded")

    def save(folder: Path) -> None:
        model = checkpoint.load_model(artifact, packed=False)
        adapters.replace_quantised(model)
        with process.quietly():
            checkpoint.save_model(model, checkpoint.load_tokenizer(artifact), folder)

    out = artifact.path.with_name(f"{artifact.name}+bf16")
    step = {"step": "dequantise", "dtype": "bfloat16"}
    return artifacts.make_artifact(out, save, base=artifact, step=step, format="bf16")
