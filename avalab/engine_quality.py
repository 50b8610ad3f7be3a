"""How good an artefact is in the engine that runs it: that engine's own logits and its own answers.

1. Text: the engine's logits on the windows of a `quality.Reference`, token by token; perplexity, KL divergence from the
   base's next-token distributions and top-1 agreement are then those of `quality`. Logits are taken as the engine gives
   them: torch's are rounded to bf16, which costs it a divergence of about 0.001 that `quality` itself does not count.
2. Function calls, `free` and `forced` by a grammar: prompts, grammars and judgement are `evaluate`'s; the answers come
   from the engine's `generate`, one after another. The torch engine answers in `evaluate`'s batches, which is the same
   model and the same greedy choice, and shares its cache.
3. Both run in a process of their own, with a time limit; a failure is a record without value. What was scored is kept
   under artefact, engine, windows or cases, and code, and read back.

What it does not do: time anything, or compare two artefacts (see `statistics`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from avalab import (
    answer_cache,
    artifacts,
    calls,
    cell,
    engines,
    evaluate,
    grammars,
    models,
    process,
    quality,
    statistics,
)
from avalab.artifacts import Artifact
from avalab.call_cases import cases, prompt
from avalab.code import code_of
from avalab.corpora import Text
from avalab.experiment import Run
from avalab.quality import Reference, TokenScores

MODES = ("free", "forced")
LIMIT_SECONDS = 600.0


def record_text(
    run: Run, subject: str, artifact: Artifact, *, engine: str, against: Reference, text: Text
) -> TokenScores | None:
    """Append perplexity, KL divergence and top-1 agreement of the engine's logits, `:<text>`; None if it failed."""
    about = {"artifact_sha256": artifact.sha256, "engine": engine}
    try:
        scores = text_scores(artifact, engine, against, run.artifacts_dir / "cache", device=_device(run))
    except (RuntimeError, ValueError) as error:
        run.record(subject, f"kl_divergence:{text.name}", None, "nats/token", note=str(error), **about)
        return None
    how = {"resamples": run.profile.resamples, "seed": run.seed}
    about["details"] = {"text_sha256": text.sha256, "windows_sha256": quality.windows_sha256(against.windows)}
    for metric, unit, estimate in (
        ("perplexity", "1", statistics.perplexity(scores.nll, **how)),
        ("kl_divergence", "nats/token", statistics.mean(scores.kl, **how)),
        ("top1_agreement", "1", statistics.mean(scores.agrees, **how)),
    ):
        run.record(subject, f"{metric}:{text.name}", unit=unit, **vars(estimate), **about)
    return scores


def text_scores(
    artifact: Artifact,
    engine: str,
    against: Reference,
    cache: Path,
    *,
    device: str = "cpu",
    limit: float = LIMIT_SECONDS,
) -> TokenScores:
    """Scores of the engine's own logits on the reference's windows, one a predicted token; cached.

    Raises EngineUnavailable, NotSupported, or RuntimeError in one line for any other failure.
    """
    parts = ("engine-scores", artifact.sha256[:16], against.identity[:16], engine, _code(scored_windows, engine))
    path = cache / f"{'-'.join(parts)}.json"
    request = {"folder": str(artifact.path.resolve()), "engine": engine, "device": device, "threads": 0}
    request |= {"base": str(against.base.path.resolve()), "windows": against.windows.tolist(), "cache": str(cache)}
    how = _how(artifact, engine, limit)
    found = process.kept(path, lambda: process.call(f"{__name__}:scored_windows", request, **how))
    return TokenScores(**{name: torch.tensor(rows) for name, rows in found.items()})


def scored_windows(request: dict) -> dict[str, list]:
    """`nll`, `kl` and `agrees` of every window, in this process."""
    base = artifacts.load(request["base"], verify=False)
    against = quality.reference(base, torch.tensor(request["windows"]), Path(request["cache"]))
    loaded, _ = cell.load_engine(request)
    rows = [_scored(loaded.logits(w.tolist()), w, against, i) for i, w in enumerate(against.windows)]
    return {name: [row[i] for row in rows] for i, name in enumerate(("nll", "kl", "agrees"))}


@torch.inference_mode()
def _scored(logits: Float[Tensor, "time vocab"], window: Tensor, against: Reference, index: int) -> list[list[float]]:
    """Three lists of a window's predicted tokens, in chunks of `quality`'s size."""
    parts: list[list[float]] = [[], [], []]
    for start in range(0, len(window) - 1, quality.CHUNK_TOKENS):
        rows = slice(start, min(start + quality.CHUNK_TOKENS, len(window) - 1))
        expected = quality.log_probabilities(against.hidden[index][rows], against.head, against.softcap)
        found = quality.token_scores(logits[rows].float().log_softmax(-1), expected, window[1:][rows])
        for part, column in zip(parts, found, strict=True):
            part += column.tolist()
    return parts


def record_calls(
    run: Run, subject: str, artifact: Artifact, *, engine: str, category: str, limit: int
) -> dict[str, list[bool]]:
    """Append the share of right calls of a category, free and forced, and return which were right, by mode."""
    about = {"artifact_sha256": artifact.sha256, "engine": engine}
    asked, right = cases(category, limit), {}
    try:
        texts = answer_calls(artifact, engine, category=category, limit=limit, run=run)
    except (RuntimeError, ValueError) as error:
        for mode in MODES:
            run.record(subject, evaluate.metric(category, mode), None, "1", note=str(error), **about)
        return {}
    for mode in MODES:
        verdicts = evaluate.judge(asked, texts[mode])
        right[mode] = [verdict.correct for verdict in verdicts]
        share = statistics.wilson(sum(right[mode]), len(verdicts))
        details = {"mode": mode, "errors": evaluate.errors(verdicts)}
        run.record(subject, evaluate.metric(category, mode), unit="1", details=details, **vars(share), **about)
    return right


def answer_calls(artifact: Artifact, engine: str, *, category: str, limit: int, run: Run) -> dict[str, list[str]]:
    """By mode, the answers to the first `limit` cases of a category, from the run's cache where it has them."""
    cache = run.artifacts_dir / "cache"
    request = {"folder": str(artifact.path.resolve()), "engine": engine, "device": _device(run), "threads": 0}
    request |= {"category": category, "limit": limit, "cache": str(cache)}
    asked = [(mode, case) for mode in MODES for case in cases(category, limit)]
    keys = [artifacts.sha256_of_text(json.dumps([mode, case.messages, case.functions]))[:16] for mode, case in asked]

    def generate(wanted: list[int]) -> list[tuple[int, str]]:
        answer = process.call(f"{__name__}:answered", request | {"wanted": wanted}, **_how(artifact, engine))
        return list(enumerate(answer["texts"]))

    name = f"answers-{artifact.sha256[:16]}-{engine}-{category}-{_code(answered, engine)}.jsonl"
    texts = answer_cache.resumed(cache / name, keys, generate)
    each = len(texts) // len(MODES)
    return {mode: texts[i * each : (i + 1) * each] for i, mode in enumerate(MODES)}


def answered(request: dict) -> dict[str, list[str]]:
    """The answers to the wanted ones of all cases in all modes, in this process."""
    every = [(mode, case) for mode in MODES for case in cases(request["category"], request["limit"])]
    wanted = [every[i] for i in request["wanted"]]
    if request["engine"] == "torch":
        return {"texts": _answered_in_batches(request, wanted)}
    loaded, _ = cell.load_engine(request)
    tokenizer = models.load_tokenizer(loaded.folder)
    compiler = grammars.compiler(tokenizer, loaded.facts.vocabulary)
    texts = []
    for mode, case in wanted:
        grammar = None if mode == "free" else _grammar(compiler, case)
        tokens = tokenizer(prompt(tokenizer, case), add_special_tokens=False).input_ids
        new = loaded.generate(tokens, evaluate.CALL_TOKENS, grammar)
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return {"texts": texts}


def _answered_in_batches(request: dict, wanted: list[tuple[str, calls.Case]]) -> list[str]:
    respondent = evaluate.Respondent(artifacts.load(request["folder"], verify=False), request["device"])
    texts = []
    for mode in MODES:
        asked = [case for chosen, case in wanted if chosen == mode]
        texts += evaluate.answer_calls(respondent, asked, mode, Path(request["cache"])) if asked else []
    return texts


def _grammar(compiler: grammars.Compiler, case: calls.Case) -> grammars.CallGrammar:
    most = grammars.MAX_CALLS if "parallel" in case.category else 1
    return grammars.call_grammar(compiler, case.functions, refusal=False, max_calls=most)


def _how(artifact: Artifact, engine: str, limit: float = LIMIT_SECONDS) -> dict:
    return {"limit_seconds": limit, "errors": cell.FAILURES, "label": f"{artifact.name} in {engine}"}


def _device(run: Run) -> str:
    return "cuda" if run.device.startswith("cuda") else "cpu"


def _code(function: Callable, engine: str) -> str:
    """What an engine's scores or answers depend on; an engine that is not known is refused when it is opened."""
    return code_of(function, engines.ENGINES.get(engine, engines.load))[:8]
