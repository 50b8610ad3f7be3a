"""How good a model still is: perplexity, KL divergence and top-1 agreement, each with its interval.

Every candidate is scored on the same windows as the reference (the saved bf16 base), token by token:

1. `reference` runs the base once and caches its *final hidden states* (after the last norm, bf16, one vector a
   token) as safetensors, not log-probabilities: those are recomputed, chunk by chunk, from the hidden states and
   the base's own head, which takes 1/85 of the space at a vocabulary of 49,152.
2. `score` runs a candidate and keeps, for every token that has a successor, its negative log-likelihood, the KL
   divergence KL(reference || candidate) of the next-token distributions, and whether both rank the same token first.
3. An interval resamples windows, not tokens: neighbouring tokens are not independent.

An unquantised head is applied in float32 to the model's hidden states, for reference and candidate alike: logits
rounded to bf16 would add a KL divergence of about 0.001 that no method is to blame for.

Perplexity is exp of the mean negative log-likelihood over all tokens, never a mean of perplexities. Differences
are paired by window. What it does not do: generate text, or decide what to do with the numbers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from avalab import artifacts, models, statistics
from avalab.artifacts import Artifact
from avalab.code import code_of
from avalab.corpora import Text
from avalab.experiment import Run

CHUNK_TOKENS = 256  # rows of float32 logits held at once
BATCH_WINDOWS = 4


@dataclass(frozen=True)
class Reference:
    """What every candidate is compared with: the base's hidden states and head on fixed windows."""

    base: Artifact
    windows: Int[Tensor, "window time"]
    hidden: Float[Tensor, "window time channel"]
    head: nn.Module
    softcap: float | None
    identity: str  # of base and windows together


@dataclass(frozen=True)
class TokenScores:
    """Per predicted token: negative log-likelihood and KL divergence in nats, and top-1 agreement (0 or 1)."""

    nll: Float[Tensor, "window token"]
    kl: Float[Tensor, "window token"]
    agrees: Float[Tensor, "window token"]


def reference(base: Artifact, windows: Int[Tensor, "window time"], cache: Path, device: str = "cpu") -> Reference:
    """The base's hidden states on these windows, computed once and kept in `cache`; a damaged file is made again."""
    identity = artifacts.combined_sha256([("base", base.sha256), ("windows", windows_sha256(windows))])
    path = cache / f"reference-{identity[:16]}-{torch.device(device).type}.safetensors"
    model = models.load(base, device)
    head, softcap = output_head(model)
    hidden = _cached(path, "hidden")
    if hidden is None:
        hidden = torch.cat([hidden_states(model, batch).cpu() for batch in windows.split(BATCH_WINDOWS)])
        save_atomically({"hidden": hidden}, path)
    return Reference(base, windows, hidden, head, softcap, identity)


def score(model: PreTrainedModel, against: Reference, *, progress: str = "") -> TokenScores:
    """Score a model on the reference's windows; `progress` labels the bar, none is shown without it."""
    starts = range(0, len(against.windows), BATCH_WINDOWS)
    parts = []
    for start in tqdm(starts, desc=progress, disable=not progress, leave=False):
        rows = slice(start, start + BATCH_WINDOWS)
        parts.append(vars(score_hidden(model, hidden_states(model, against.windows[rows]), against, rows)))
    return TokenScores(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def score_hidden(
    model: PreTrainedModel,
    hidden: Float[Tensor, "window time channel"],
    against: Reference,
    rows: slice = slice(None),
) -> TokenScores:
    """Score final hidden states of the reference's windows `rows` through the model's own head."""
    ours, theirs = _in_float32(*output_head(model)), _in_float32(against.head, against.softcap)
    triples = zip(against.windows[rows], hidden, against.hidden[rows], strict=True)
    scored = [_score_window(window, (mine, *ours), (expected, *theirs)) for window, mine, expected in triples]
    return TokenScores(*(torch.stack(column) for column in zip(*scored, strict=True)))


def cached_score(artifact: Artifact, against: Reference, cache: Path, device: str = "cpu") -> TokenScores:
    """Scores of an artefact loaded back from its folder; read from `cache` when the same bytes were scored before."""
    code = code_of(cached_score)  # scores that older code computed are not trusted
    parts = ("scores", artifact.sha256[:16], against.identity[:16], code[:8], torch.device(device).type)
    path = cache / f"{'-'.join(parts)}.safetensors"
    columns = {name: _cached(path, name) for name in ("nll", "kl", "agrees")}
    if None not in columns.values():
        return TokenScores(**columns)
    scores = score(models.load(artifact, device), against, progress=artifact.name)
    save_atomically(vars(scores), path)
    return scores


def record(run: Run, subject: str, artifact: Artifact, against: Reference, text: Text) -> TokenScores:
    """Append perplexity, KL divergence, top-1 agreement and the paired rise in loss over the base, `:<text>` each."""
    scores = cached_score(artifact, against, run.artifacts_dir / "cache", run.device)
    how = {"resamples": run.profile.resamples, "seed": run.seed}
    base = cached_score(against.base, against, run.artifacts_dir / "cache", run.device)
    rise = statistics.paired_difference(scores.nll, base.nll, **how)
    details = {"text_sha256": text.sha256, "windows_sha256": windows_sha256(against.windows)}
    for metric, unit, estimate in (
        ("perplexity", "1", statistics.perplexity(scores.nll, **how)),
        ("kl_divergence", "nats/token", statistics.mean(scores.kl, **how)),
        ("top1_agreement", "1", statistics.mean(scores.agrees, **how)),
        ("loss_rise", "nats/token", rise),
    ):
        more = {"verdict": statistics.verdict(rise)} if metric == "loss_rise" else {}
        about = {"artifact_sha256": artifact.sha256, "engine": "torch", "details": details | more}
        run.record(subject, f"{metric}:{text.name}", unit=unit, **vars(estimate), **about)
    return scores


def token_scores(
    log_probabilities: Float[Tensor, "token vocab"],
    reference_log_probabilities: Float[Tensor, "token vocab"],
    targets: Int[Tensor, "token"],
) -> tuple[Float[Tensor, "token"], Float[Tensor, "token"], Float[Tensor, "token"]]:
    """Negative log-likelihood of the targets, KL(reference || candidate), and top-1 agreement, per token."""
    nll = -log_probabilities.gather(-1, targets[:, None]).squeeze(-1)
    agrees = log_probabilities.argmax(-1) == reference_log_probabilities.argmax(-1)
    return nll, kl_divergence(reference_log_probabilities, log_probabilities), agrees.float()


def kl_divergence(
    reference: Float[Tensor, "token vocab"], candidate: Float[Tensor, "token vocab"]
) -> Float[Tensor, "token"]:
    """KL(reference || candidate) of next-token distributions, in nats, one value a token.

    Both arguments are finite log-probabilities; the sum runs in float32 whatever their dtype.
    Source: Kullback and Leibler (1951), eq. 2.4.
    """
    return F.kl_div(candidate.float(), reference.float(), reduction="none", log_target=True).sum(-1)


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, windows: Int[Tensor, "window time"]) -> Float[Tensor, "window time channel"]:
    """What the model hands to its head: the final norm's output."""
    return model.base_model(input_ids=windows.to(model.device), use_cache=False).last_hidden_state


def output_head(model: PreTrainedModel) -> tuple[nn.Module, float | None]:
    """The model's LM head and the soft cap of its logits, if it has one (Gemma 2).

    Raises ValueError for a model that scales its logits after the head (Granite, Cohere): not implemented.
    """
    for scale in ("logits_scaling", "logit_scale"):
        if getattr(model.config, scale, None) not in (None, 1, 1.0):
            raise ValueError(f"{model.config.model_type} models multiply their logits by {scale}; not supported here")
    return model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)


def log_probabilities(
    hidden: Float[Tensor, "token channel"], head: nn.Module, softcap: float | None = None
) -> Float[Tensor, "token vocab"]:
    """Next-token log-probabilities in float32; a plain linear head is applied in float32 too."""
    head, softcap = _in_float32(head, softcap)
    # A quantised head decides its own arithmetic.
    logits = _exact_product(hidden, head) if _is_plain(head) else head(hidden).float()
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)


def _in_float32(head: nn.Module, softcap: float | None) -> tuple[nn.Module, float | None]:
    """A float32 copy of a plain linear head that is not in float32 yet; any other head as it is."""
    if not _is_plain(head) or head.weight.dtype == torch.float32:
        return head, softcap
    wide = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    wide.weight = nn.Parameter(head.weight.detach().float(), requires_grad=False)
    wide.bias = None if head.bias is None else nn.Parameter(head.bias.detach().float(), requires_grad=False)
    wide.from_bf16 = head.weight.dtype == torch.bfloat16
    return wide, softcap


def _is_plain(head: nn.Module) -> bool:
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter


def _exact_product(hidden: Float[Tensor, "token channel"], head: nn.Linear) -> Float[Tensor, "token vocab"]:
    """The float32 product; where both factors came from bf16, bf16 units form it from the same exact products."""
    hidden = hidden.to(head.weight.device)
    if hidden.device.type != "cpu" or hidden.dtype != torch.bfloat16 or not getattr(head, "from_bf16", False):
        return head(hidden.float())
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # rounds float32 factors to bf16: nothing to round here
    try:
        return head(hidden.float())
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@torch.inference_mode()
def _score_window(window: Tensor, ours: tuple, theirs: tuple) -> tuple[Tensor, ...]:
    """Scores of one window's predicted tokens; each side is (hidden states, head, soft cap)."""
    parts = []
    for start in range(0, len(window) - 1, CHUNK_TOKENS):
        rows = slice(start, min(start + CHUNK_TOKENS, len(window) - 1))
        candidate = log_probabilities(ours[0][rows], *ours[1:])
        expected = log_probabilities(theirs[0][rows], *theirs[1:]).to(candidate.device)
        targets = window[1:][rows].to(candidate.device)
        parts.append([column.cpu() for column in token_scores(candidate, expected, targets)])
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def windows_sha256(windows: Int[Tensor, "window time"]) -> str:
    """Identity of a set of windows: the hash of their shape and token ids."""
    content = f"{tuple(windows.shape)}:{windows.flatten().tolist()}"
    return artifacts.sha256_of_text(content)


def save_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _cached(path: Path, name: str) -> Tensor | None:
    try:
        return load_file(path)[name]
    except (OSError, KeyError, SafetensorError):  # absent or damaged: measured again
        return None
