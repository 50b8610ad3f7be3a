"""What a causal language model predicts: hidden states, next-token log-probabilities, and their scores token by token.

1. `make_reference` runs the base once on fixed windows and caches its *final hidden states* (after the last norm,
   bf16, one vector a token), not log-probabilities: those are recomputed, chunk by chunk, from the hidden states and
   the base's own head, which takes 1/85 of the space at a vocabulary of 49,152.
2. `score_model` (through the model's own head) and `score_logits` (from whatever gives logits) keep, for every token
   that has a successor, its negative log-likelihood, the KL divergence KL(reference || candidate) of the next-token
   distributions, and whether both rank the same token first.

Embeddings are padded to round numbers of rows, not always to the same one: where the rows of two models differ, both
distributions are taken over the tokenizer's words, which they share. Models of different words are never compared.

What a family does behind its head, scaling logits (Granite, Cohere) or capping them (Gemma 2), is its `Finish`. Logits
are never taken for the head's product unseen: `output_head` compares both on a few tokens, once a model, and refuses.

An unquantised head is applied in float32 to the model's hidden states, for reference and candidate alike: logits
rounded to bf16 would add a KL divergence of about 0.001 that no method is to blame for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cache_path, cached_tensors
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.models import checkpoint, stored
from avalab.models.inference.layers import PackedLinear

CHUNK_TOKENS = 256  # rows of float32 logits held at once

BATCH_WINDOWS = 4

INPUTS = ("input_ids", "position_ids", "boundaries", "forks", "group")  # of a packed row: what the model is given of it

Candidate = Callable[[slice], Float[Tensor, "token vocab"]]  # rows of a window -> log-probabilities


LOGIT_ERROR = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest logit; 16-bit types round as they like

COARSE_ERROR = 0.05

_known_heads: WeakSet[PreTrainedModel] = WeakSet()


@dataclass(frozen=True)
class Finish:
    """What stands between the product of hidden states and head, and the logits: softcap tanh(scale x / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, product: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The logits of a product."""
        scaled = self.scaled(product)
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def scaled(self, hidden: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Hidden states, or their product with the head, times the scale."""
        return hidden if self.scale == 1 else hidden * self.scale


PLAIN = Finish()


@dataclass(frozen=True)
class Reference:
    """What every candidate is compared with: the base's hidden states and head on fixed windows."""

    base: Artifact
    windows: Int[Tensor, "window time"]
    hidden: Float[Tensor, "window time channel"]
    head: nn.Module
    finish: Finish
    identity: str  # of base and windows together
    words: int  # of the tokenizer: rows of the head beyond them are padding


@dataclass(frozen=True)
class TokenScores:
    """Per predicted token: negative log-likelihood and KL divergence in nats, and top-1 agreement (0 or 1)."""

    nll: Float[Tensor, "window token"]
    kl: Float[Tensor, "window token"]
    agrees: Float[Tensor, "window token"]


def make_reference(base: Artifact, windows: Int[Tensor, "window time"], cache: Path, device: str = "cpu") -> Reference:
    """The base's hidden states on these windows, computed once and kept in `cache`."""
    hidden, head, finish = cached_hidden_states(base, windows, cache, device)
    identity = artifacts.combined_sha256([("base", base.sha256), ("windows", windows_sha256(windows))])
    words = max(checkpoint.load_tokenizer(base).get_vocab().values()) + 1
    return Reference(base, windows, hidden, head, finish, identity, words)


def refuse_other_words(base: Artifact, candidate: Artifact | Path) -> None:
    """Raise InputError where two models do not share a tokenizer's words: their predictions cannot be compared."""
    if isinstance(candidate, Artifact) and _tokenizer_sha256(base) == _tokenizer_sha256(candidate) != "":
        return
    name = candidate.name
    ours, theirs = (checkpoint.load_tokenizer(model).get_vocab() for model in (candidate, base))
    if ours == theirs:
        return
    shown = min(ours.items() ^ theirs.items(), key=lambda word: (word[1], word[0]))
    raise InputError(
        f"{name} ({len(ours):,} words) and {base.name} ({len(theirs):,}) have different tokenizers, from "
        f"{shown[0]!r} (id {shown[1]}) on: their predictions cannot be compared; compare models of one family"
    )


def _tokenizer_sha256(artifact: Artifact) -> str:
    return next((file["sha256"] for file in artifact.card["files"] if file["name"] == "tokenizer.json"), "")


def cached_hidden_states(
    artifact: Artifact, windows: Int[Tensor, "window time"], cache: Path, device: str = "cpu"
) -> tuple[Float[Tensor, "window time channel"], nn.Module, Finish]:
    """An artefact's final hidden states, computed once and kept in `cache`, with its head and what follows that."""
    model = checkpoint.load_model(artifact, device)
    code = code_of(cached_hidden_states)
    path = cache_path(cache, "hidden", artifact.sha256, windows_sha256(windows), code[:8], torch.device(device).type)

    def compute() -> dict[str, Tensor]:
        return {"hidden": torch.cat([hidden_states(model, batch).cpu() for batch in windows.split(BATCH_WINDOWS)])}

    return cached_tensors(path, compute)["hidden"], *output_head(model)


def score_model(model: PreTrainedModel, against: Reference, *, progress: str = "") -> TokenScores:
    """Score a model on the reference's windows; `progress` labels the bar, none is shown without it."""
    batches = tqdm(against.windows.split(BATCH_WINDOWS), desc=progress, disable=not progress, leave=False)
    return score_hidden_states(model, (state for batch in batches for state in hidden_states(model, batch)), against)


def score_hidden_states(
    model: PreTrainedModel, hidden: Iterable[Float[Tensor, "time channel"]], against: Reference
) -> TokenScores:
    """Score each window's final hidden states through the model's own head."""
    head, finish = in_float32(*output_head(model))

    def candidate(state: Tensor) -> Candidate:
        return lambda rows: log_probabilities(state[rows], head, finish)

    return _score_windows(map(candidate, hidden), against)


def score_logits(logits: Callable[[list[int]], Float[Tensor, "time vocab"]], against: Reference) -> TokenScores:
    """Score what gives logits after each token of a window, as `Engine.logits` does."""

    def candidate(window: Tensor) -> Candidate:
        found = logits(window.tolist())
        return lambda rows: found[rows].float().log_softmax(-1)

    return _score_windows(map(candidate, against.windows), against)


@torch.inference_mode()
def _score_windows(candidates: Iterable[Candidate], against: Reference) -> TokenScores:
    """Scores of one candidate a window."""
    head, finish = in_float32(against.head, against.finish)
    scored = []
    for window, expected, candidate in zip(against.windows, against.hidden, candidates, strict=True):
        parts = []
        for rows in chunks(len(window) - 1):
            ours = candidate(rows)
            theirs = log_probabilities(expected[rows], head, finish).to(ours.device)
            ours, theirs = _over_shared_words(ours, theirs, against)
            parts.append([c.cpu() for c in token_scores(ours, theirs, window[1:][rows].to(ours.device))])
        scored.append([torch.cat(column) for column in zip(*parts, strict=True)])
    return TokenScores(*(torch.stack(column) for column in zip(*scored, strict=True)))


def _over_shared_words(ours: Tensor, theirs: Tensor, against: Reference) -> tuple[Tensor, Tensor]:
    """Both distributions as they are where they have equal many rows, else of the tokenizer's words alone."""
    rows = min(ours.shape[-1], theirs.shape[-1])
    if ours.shape[-1] == theirs.shape[-1]:
        return ours, theirs
    if rows < against.words:
        raise InputError(
            f"a head of {rows:,} rows cannot be compared with {against.base.name}, whose tokenizer has "
            f"{against.words:,} words"
        )
    return tuple(part[..., : against.words].log_softmax(-1) for part in (ours, theirs))


def chunks(tokens: int) -> Iterator[slice]:
    """Consecutive rows, as many as logits are held at once."""
    for start in range(0, tokens, CHUNK_TOKENS):
        yield slice(start, min(start + CHUNK_TOKENS, tokens))


def windows_sha256(windows: Int[Tensor, "window time"]) -> str:
    """Identity of a set of windows: the hash of their shape and token ids."""
    return artifacts.sha256_of_text(f"{tuple(windows.shape)}:{windows.flatten().tolist()}")


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
    return _final(model, windows)


def _final(model: PreTrainedModel, windows: Tensor) -> Tensor:
    return model.base_model(input_ids=windows.to(model.device), use_cache=False).last_hidden_state


def output_head(model: PreTrainedModel) -> tuple[nn.Module, Finish]:
    """The model's LM head and what it does with that head's product.

    Raises ValueError, naming the family, for a model whose own logits are not these: nothing is scored on a guess.
    """
    head, finish = model.get_output_embeddings(), finish_of(model.config)
    if model not in _known_heads:
        _refuse_other_logits(model, head, finish)
        _known_heads.add(model)
    return head, finish


def finish_of(config: PreTrainedConfig) -> Finish:
    """What a family's configuration says of its logits."""
    config, scale = config.get_text_config(), 1.0
    if divisor := getattr(config, "logits_scaling", None):  # HyperCLOVA X multiplies by what others divide by
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    for factor in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, factor, None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return Finish(float(scale), softcap and float(softcap))


def _refuse_other_logits(model: PreTrainedModel, head: nn.Module | None, finish: Finish) -> None:
    """Raise ValueError where the model's own logits of a few tokens are not those of its head and finish."""
    with stored.tried_out(model):
        tokens = (torch.arange(8)[None] * 97 + 3) % model.config.get_text_config().vocab_size
        said = model(input_ids=tokens.to(model.device), use_cache=False).logits.float()
        ours = None if head is None else finish(head(_final(model, tokens)).float())
    limit = LOGIT_ERROR.get(model.dtype, COARSE_ERROR) * float(said.abs().max())
    if ours is None or ours.shape != said.shape or float((ours - said).abs().max()) > limit:
        raise InputError(
            f"{model.config.model_type} models make logits of their hidden states in a way that is not known here; "
            "families whose logits are the head's product, scaled or capped, are (Llama, Qwen, Gemma, Granite, ...)"
        )


def log_probabilities(
    hidden: Float[Tensor, "token channel"], head: nn.Module, finish: Finish = PLAIN
) -> Float[Tensor, "token vocab"]:
    """Next-token log-probabilities in float32; a plain linear head is applied in float32 too."""
    head, finish = in_float32(head, finish)
    # A quantised head decides its own arithmetic.
    wide = hidden.float() if isinstance(head, PackedLinear) else hidden  # in which a packed head computes anyway
    product = _exact_product(hidden, head) if _is_plain(head) else head(wide).float()
    return finish(product).log_softmax(-1)


def in_float32(head: nn.Module, finish: Finish) -> tuple[nn.Module, Finish]:
    """A float32 copy of a plain linear head that is not in float32 yet; any other head as it is."""
    if not _is_plain(head) or head.weight.dtype == torch.float32:
        return head, finish
    wide = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    wide.weight = nn.Parameter(head.weight.detach().float(), requires_grad=False)
    wide.bias = None if head.bias is None else nn.Parameter(head.bias.detach().float(), requires_grad=False)
    wide.from_bf16 = head.weight.dtype == torch.bfloat16
    return wide, finish


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
