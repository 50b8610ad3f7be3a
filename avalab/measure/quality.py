"""The quality of an artefact in the engine that runs it: perplexity, KL divergence, top-1 agreement, with intervals.

1. `score_artifact` scores an artefact, loaded back from its folder, on the windows of a `predict.Reference`, token by
   token. What transformers loads (engine `torch`) is scored here, through float32 heads. Any other engine gives its own
   logits, in a process of its own with a time limit, against the same hidden states and head of the base.
2. `record_quality` appends the four numbers of a text. Intervals resample windows (`statistics`).

Why two engines differ on the same artefact, and by how much: engines other than torch round as they like inside their
layers and their head. The base's own logits in bf16 are about 0.001 nats from what its float32 head says. Beyond that,
a difference is one of weights or of arithmetic that a user of the engine gets, too: so it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from avalab import engines
from avalab.data.corpora import Text
from avalab.lab import artifacts, statistics
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cache_path, cached_tensors
from avalab.lab.code import code_of
from avalab.lab.run import Run
from avalab.lab.statistics import Estimate
from avalab.measure import cell
from avalab.models import checkpoint, predict
from avalab.models.predict import Reference, TokenScores

TORCH = "torch"

LIMIT_SECONDS = 600.0


def score_artifact(
    artifact: Artifact, against: Reference, cache: Path, device: str = "cpu", *, engine: str = TORCH
) -> TokenScores:
    """Token scores of an artefact in an engine; read from `cache` when the same bytes were scored before.

    `device` is torch's; other engines choose theirs. Raises ValueError for an artefact that cannot be loaded; from
    other engines EngineUnavailable, NotSupported, or RuntimeError in one line for any other failure.
    """

    def compute() -> dict[str, torch.Tensor]:
        predict.refuse_other_words(against.base, artifact)
        if engine == TORCH:
            return vars(_score_in_torch(artifact, against, device))
        request = {"device": device, "cache": str(cache), "windows": against.windows.tolist()}
        request["base"] = str(against.base.path.resolve())
        target = "avalab.measure.quality:answer_scores"
        found = cell.ask_engine(target, artifact, engine, request, LIMIT_SECONDS)
        return {name: torch.tensor(rows) for name, rows in found.items()}

    chosen = (_score_in_torch,) if engine == TORCH else (answer_scores, engine_code(engine))
    parts = (artifact.sha256, against.identity, engine, torch.device(device).type, code_of(*chosen)[:8])
    return TokenScores(**cached_tensors(cache_path(cache, "scores", *parts), compute))


def _score_in_torch(artifact: Artifact, against: Reference, device: str) -> TokenScores:
    return predict.score_model(checkpoint.load_model(artifact, device), against, progress=artifact.name)


def engine_code(engine: str) -> Callable:
    """What a cache key of an engine depends on; an engine that is not known is refused when it is opened."""
    return engines.ENGINES.get(engine, engines.load)


def answer_scores(request: dict) -> dict[str, list]:
    """In a process of its own: the columns of the scores of an engine's own logits."""
    base, windows = artifacts.load_artifact(request["base"], verify=False), torch.tensor(request["windows"])
    against = predict.make_reference(base, windows, Path(request["cache"]), request["device"])
    opened = engines.load(request["engine"], Path(request["folder"]))
    try:
        return {name: column.tolist() for name, column in vars(predict.score_logits(opened.logits, against)).items()}
    finally:
        opened.close()


def record_quality(
    run: Run, subject: str, artifact: Artifact, against: Reference, text: Text, *, engine: str = TORCH
) -> TokenScores | None:
    """Append perplexity, KL divergence, top-1 agreement and the paired increase in loss over the base, `:<text>` each.

    A failure of an engine other than torch is a record without value that says why, and None is returned.
    """
    cache = run.artifacts_dir / "cache"
    record = partial(run.record, subject, artifact_sha256=artifact.sha256, engine=engine)
    try:
        scores = score_artifact(artifact, against, cache, run.device, engine=engine)
    except (RuntimeError, ValueError) as error:  # EngineUnavailable is the one, NotSupported the other
        if engine == TORCH:
            raise
        record(f"kl_divergence:{text.name}", None, "nats/token", note=str(error))
        return None
    base = score_artifact(against.base, against, cache, run.device)
    for metric, unit, estimate in quality_estimates(run, scores, base):
        details = {"text_sha256": text.sha256, "windows_sha256": predict.windows_sha256(against.windows)}
        if metric == "loss_rise":
            details["verdict"] = statistics.verdict(estimate)
        record(f"{metric}:{text.name}", unit=unit, details=details, **vars(estimate))
    return scores


def quality_estimates(
    run: Run, scores: TokenScores, base: TokenScores | None = None
) -> list[tuple[str, str, Estimate]]:
    """Metric, unit and estimate of what token scores say; the increase in loss only where the base's are given."""
    resamples, seed = run.profile.resamples, run.seed
    found = [
        ("perplexity", "1", statistics.perplexity(scores.nll, resamples=resamples, seed=seed)),
        ("kl_divergence", "nats/token", statistics.mean(scores.kl, resamples=resamples, seed=seed)),
        ("top1_agreement", "1", statistics.mean(scores.agrees, resamples=resamples, seed=seed)),
    ]
    if base is not None:
        increase = statistics.paired_difference(scores.nll, base.nll, resamples=resamples, seed=seed)
        found.append(("loss_rise", "nats/token", increase))
    return found
