"""Several artefacts as one: how next-token distributions are combined, and with which weights.

With p_m the distribution of member m and w_m >= 0 weights that sum to one, per token:

    mean, weighted   p = sum_m w_m p_m                      (linear pool; `mean` has equal weights)
    logits           p = prod_m p_m^w_m / normaliser        (logarithmic pool: the mean of the logits)
    cascade          p = p_2 where max p_1 < threshold, else p_1   (the second is asked where the first is unsure)

`fit_weights` minimises the mixture's mean negative log-likelihood on held-out tokens. That is convex on the simplex;
the multiplicative update w_m <- w_m mean(p_m / p) never raises it, and max_m mean(p_m / p) - 1 bounds how far it is
from the least (Cover 1984, "An algorithm for maximizing expected log investment return"; Stone 1961 for the pools).

Distributions can be combined only over one vocabulary: members must have the same tokenizer. Answers can always be
combined (`answers_vote`, `cascade`). What it does not do: run models (`mixture`, `ensemble_bench`), or choose members.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose

import torch
from jaxtyping import Float
from torch import Tensor

from avalab import artifacts, models
from avalab.artifacts import Artifact
from avalab.code import code_of

POOLS = ("mean", "logits", "weighted", "cascade")  # of distributions
VOTES = ("vote", "self-consistency", "answer-cascade")  # of answers
GAP_NATS = 1e-6  # fitted weights are this close to the best ones' loss, or better
MAX_UPDATES = 20_000


@dataclass(frozen=True)
class Ensemble:
    """Artefacts whose distributions are pooled; made by `assemble`. `temperature` above 0 samples with seed `draw`."""

    members: tuple[Artifact, ...]
    method: str
    weights: tuple[float, ...]
    threshold: float = 0.0
    temperature: float = 0.0
    draw: int = 0

    @property
    def name(self) -> str:
        """`mean(a, b)`."""
        return f"{self.method}({', '.join(member.name for member in self.members)})"

    @property
    def bytes(self) -> int:
        """Sum of the weight files; an artefact that stands twice is stored once."""
        return sum({member.sha256: member.bytes for member in self.members}.values())

    def as_artifact(self) -> Artifact:
        """A stand-in without a folder: name, bytes, and the identity of members, method and the code that pools."""
        settings = [self.method, self.weights, self.threshold, self.temperature, self.draw]
        parts = [(member.name, member.sha256) for member in self.members]
        parts += [("settings", artifacts.sha256_of_text(json.dumps(settings)))]
        parts += [("code", code_of("avalab.mixture:Mixture"))]
        files = [{"name": "members.safetensors", "bytes": self.bytes, "sha256": ""}]
        card = {"name": self.name, "format": "ensemble", "sha256": artifacts.combined_sha256(parts), "files": files}
        return Artifact(self.members[0].path.parent / self.name, card)


def assemble(
    members: Sequence[Artifact], method: str, *, weights: Sequence[float] = (), threshold: float = 0.0, **sampling
) -> Ensemble:
    """An ensemble that pools distributions; without `weights`, members count equally.

    Raises ValueError for an unknown method, no members, members of different tokenizers, weights that are not on the
    simplex, or a cascade of other than two members.
    """
    if method not in POOLS:
        raise ValueError(f"unknown method {method!r}; distributions: {', '.join(POOLS)}; answers: {', '.join(VOTES)}")
    if not members:
        raise ValueError("an ensemble needs at least one member, got none")
    if method == "cascade" and len(members) != 2:
        raise ValueError(f"a cascade has a small and a large member, got {len(members)}")
    if method != "weighted" and weights:
        raise ValueError(f"method {method!r} has no weights; use 'weighted'")
    refuse_different_tokenizers(members, method)
    weights = tuple(map(float, weights)) or (1 / len(members),) * len(members)
    if len(weights) != len(members) or min(weights) < 0 or not isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(f"{len(members)} members need as many weights that are >= 0 and sum to 1, got {weights}")
    return Ensemble(tuple(members), method, weights, threshold, **sampling)


def refuse_different_tokenizers(members: Sequence[Artifact], method: str) -> None:
    """Raise ValueError naming two members whose vocabularies differ: their distributions are over different things."""
    first, *others = members
    vocabulary = models.load_tokenizer(first).get_vocab()
    for other in others:
        if other.sha256 != first.sha256 and models.load_tokenizer(other).get_vocab() != vocabulary:
            raise ValueError(
                f"{first.name} and {other.name} have different tokenizers: {method!r} mixes distributions over one "
                f"vocabulary; choose one of {', '.join(VOTES)}"
            )


def pooled(ensemble: Ensemble, members: Float[Tensor, "member token vocab"]) -> Float[Tensor, "token vocab"]:
    """Log-probabilities of the ensemble from those of its members."""
    if ensemble.method == "cascade":
        return pool_cascade(members, ensemble.threshold)
    pool = pool_logits if ensemble.method == "logits" else pool_probabilities
    return pool(members, torch.tensor(ensemble.weights, device=members.device))


def pool_probabilities(
    members: Float[Tensor, "member token vocab"], weights: Float[Tensor, "member"]
) -> Float[Tensor, "token vocab"]:
    """log sum_m w_m p_m from log-probabilities: the linear pool. Source: Stone (1961)."""
    used = weights > 0
    return torch.logsumexp(members[used] + weights[used].log()[:, None, None], 0)


def pool_logits(
    members: Float[Tensor, "member token vocab"], weights: Float[Tensor, "member"]
) -> Float[Tensor, "token vocab"]:
    """The normalised geometric mean prod_m p_m^w_m, in logs; logits or log-probabilities in, log-probabilities out."""
    return torch.tensordot(weights, members, 1).log_softmax(-1)


def pool_cascade(members: Float[Tensor, "2 token vocab"], threshold: float) -> Float[Tensor, "token vocab"]:
    """The second member's distribution where the first one's largest probability is below the threshold."""
    unsure = members[0].amax(-1, keepdim=True).exp() < threshold
    return torch.where(unsure, members[1], members[0])


def mixture_loss(targets: Float[Tensor, "member token"], weights: Sequence[float]) -> float:
    """Mean negative log-likelihood, in nats, of the linear pool; `targets` holds each member's log p of the token."""
    share = torch.tensor(weights, dtype=torch.float64)
    used = share > 0
    return -float(torch.logsumexp(targets.double()[used] + share[used].log()[:, None], 0).mean())


def fit_weights(targets: Float[Tensor, "member token"]) -> tuple[float, ...]:
    """Weights on the simplex that minimise `mixture_loss` to within `GAP_NATS`, starting from equal ones.

    Raises ValueError for no tokens or log-probabilities that are not finite.
    """
    if not targets.numel() or not torch.isfinite(targets).all():
        raise ValueError(f"weights need finite log-probabilities of held-out tokens, got shape {tuple(targets.shape)}")
    # The best member of each token is set to one: the ratios below are the same, and nothing underflows.
    odds = (targets.double() - targets.double().amax(0)).exp()
    weights = torch.full((len(odds),), 1 / len(odds), dtype=torch.float64)
    for _ in range(MAX_UPDATES):
        ratios = (odds / (weights @ odds)).mean(-1)
        if float(ratios.max()) - 1 < GAP_NATS:
            break
        weights = weights * ratios
    # The update keeps the sum; what is below a millionth only costs time in the pool.
    weights = torch.where(weights < 1e-6, 0, weights)
    return tuple((weights / weights.sum()).tolist())
