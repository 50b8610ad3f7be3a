"""Several artefacts as one: pooled next-token distributions, answers that vote, and when to ask the larger model.

With p_m the distribution of member m and w_m >= 0 weights that sum to one, per token:

    mean, weighted   p = sum_m w_m p_m                      (linear pool; `mean` has equal weights)
    logits           p = prod_m p_m^w_m / normaliser        (logarithmic pool: the mean of the logits)
    cascade          p = p_2 where max p_1 < threshold, else p_1   (the second is asked where the first is unsure)

1. `fit_weights` minimises the mixture's mean negative log-likelihood on held-out tokens. That is convex on the simplex;
   the multiplicative update w_m <- w_m mean(p_m / p) never raises it, and max_m mean(p_m / p) - 1 bounds how far it is
   from the least (Cover 1984, "An algorithm for maximizing expected log investment return"; Stone 1961 for the pools).
2. `Mixture` is called as transformers' models are and returns the pooled log-probabilities as its logits, so that
   whatever decodes a model, with a grammar or without, decodes an ensemble. A key-value cache made for it has the
   layers of all members, each of which is handed its own part.
3. With a temperature T, Gumbel noise is added to log p / T: the largest entry is then a draw from the distribution that
   is proportional to p^(1/T), also after a grammar has excluded tokens (Gumbel 1954; Maddison et al. 2014,
   arXiv 1411.0030). A greedy decoder becomes a sampler. The noise depends on what is in a batch: the same draw of a run
   that was stopped in between can differ.
4. `plurality` lets answers vote: the same answers have the same key, and of equally many votes the one that came first
   in the order of the voters wins (Wang et al. 2023, arXiv 2203.11171, for samples of one model).
5. `choose_threshold` sends held-out items (tokens, questions) to the large model in order of rising confidence, the
   fewest that win back a given part of what the small model loses against it. Source: Viola and Jones (2001) for
   cascades, Jitkrittum et al. (2023, arXiv 2307.02764) for when confidence is enough to defer by.

Distributions need one vocabulary: their members must have the same tokenizer. Answers can always be combined.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isclose

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from avalab import engines
from avalab.data import calls
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.measure.answers import Respondent
from avalab.models import checkpoint

POOLS = ("mean", "logits", "weighted", "cascade")  # of distributions

VOTES = ("vote", "self-consistency", "answer-cascade")  # of answers

GAP_NATS = 1e-6  # fitted weights are this close to the best ones' loss, or better

MAX_UPDATES = 20_000

Key = Callable[[str], str | None]  # of an answer; None abstains


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
        parts += [("code", code_of("avalab.serve.ensemble:Mixture"))]
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
        raise InputError(f"unknown method {method!r}; distributions: {', '.join(POOLS)}; answers: {', '.join(VOTES)}")
    if not members:
        raise InputError("an ensemble needs at least one member, got none")
    if method == "cascade" and len(members) != 2:
        raise InputError(f"a cascade has a small and a large member, got {len(members)}")
    if method != "weighted" and weights:
        raise InputError(f"method {method!r} has no weights; use 'weighted'")
    first, *others = members
    vocabulary = checkpoint.load_tokenizer(first).get_vocab()
    for other in others:
        if other.sha256 != first.sha256 and checkpoint.load_tokenizer(other).get_vocab() != vocabulary:
            raise InputError(
                f"{first.name} and {other.name} have different tokenizers: {method!r} mixes distributions over one "
                f"vocabulary; choose one of {', '.join(VOTES)}"
            )
    weights = tuple(map(float, weights)) or (1 / len(members),) * len(members)
    if len(weights) != len(members) or min(weights) < 0 or not isclose(sum(weights), 1, abs_tol=1e-6):
        raise InputError(f"{len(members)} members need as many weights that are >= 0 and sum to 1, got {weights}")
    return Ensemble(tuple(members), method, weights, threshold, **sampling)


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


def fit_weights(targets: Float[Tensor, "member token"]) -> tuple[float, ...]:
    """Weights on the simplex that minimise the linear pool's mean loss to within `GAP_NATS`, starting from equal ones.

    Raises ValueError for no tokens or log-probabilities that are not finite.
    """
    if not targets.numel() or not torch.isfinite(targets).all():
        raise InputError(f"weights need finite log-probabilities of held-out tokens, got shape {tuple(targets.shape)}")
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


class Mixture(PreTrainedModel):
    """The members of an ensemble behind one `forward`; a PreTrainedModel because decoders ask for one.

    Raises ValueError where the members' numbers of logits differ.
    """

    def __init__(self, members: list[PreTrainedModel], about: Ensemble) -> None:
        sizes = {member.config.vocab_size for member in members}
        if len(sizes) > 1:
            raise InputError(
                f"members have {' and '.join(map(str, sorted(sizes)))} logits; they must have equally many"
            )
        config = copy.deepcopy(members[0].config)
        if getattr(config, "layer_types", None):  # which layers have a sliding window, for the cache
            config.layer_types = [kind for member in members for kind in member.config.layer_types]
        config.num_hidden_layers = sum(member.config.num_hidden_layers for member in members)
        config._attn_implementation = "eager"  # the members attend, this module does not
        super().__init__(config)
        self.generation_config = members[0].generation_config  # names tokens that end an answer
        self.members, self.about = nn.ModuleList(members), about
        self.generator = torch.Generator(members[0].device).manual_seed(about.draw)

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        past_key_values: DynamicCache | None = None,
        **options,
    ) -> CausalLMOutputWithPast:
        """Pooled log-probabilities as logits; `options` go to every member."""
        parts = [None] * len(self.members) if past_key_values is None else self._parts(past_key_values)
        logits = [m(input_ids, past_key_values=p, **options).logits for m, p in zip(self.members, parts, strict=True)]
        members = torch.stack([each.float().log_softmax(-1) for each in logits])
        flat = pooled(self.about, members.flatten(1, -2))
        return CausalLMOutputWithPast(logits=self._drawn(flat).view(logits[0].shape), past_key_values=past_key_values)

    def _parts(self, cache: DynamicCache) -> list[DynamicCache]:
        """Each member's own layers of the common cache; what a member appends is seen in both."""
        parts, start = [], 0
        for member in self.members:
            part, count = DynamicCache(config=member.config), member.config.num_hidden_layers
            part.layers = cache.layers[start : start + count]
            parts.append(part)
            start += count
        return parts

    def _drawn(self, pooled: Float[Tensor, "token vocab"]) -> Float[Tensor, "token vocab"]:
        if not self.about.temperature:
            return pooled
        noise = torch.empty_like(pooled).exponential_(generator=self.generator).log_()
        return pooled / self.about.temperature - noise


@dataclass(frozen=True)
class Choir(Respondent):
    """An ensemble that answers; it is asked, cached and judged as a single artefact is."""

    about: Ensemble | None = None
    shared: Respondent | None = None  # whose loaded model serves, when the only member is its artefact

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the first member, which is that of all."""
        return checkpoint.load_tokenizer(self.about.members[0])

    @cached_property
    def context(self) -> int:
        """The shortest of the members' contexts."""
        return min(engines.facts(member.path).context for member in self.about.members)

    @cached_property
    def model(self) -> Mixture:
        """All members, loaded back from their folders; an artefact that stands twice is loaded once."""
        if self.shared is not None:
            return Mixture([self.shared.model], self.about)
        loaded = {m.sha256: checkpoint.load_model(m, self.device) for m in self.about.members}
        return Mixture([loaded[member.sha256] for member in self.about.members], self.about)


def respondent(about: Ensemble, device: str = "cpu") -> Choir:
    """Something to ask: `answers.record_calls(run, subject, respondent(ensemble), ...)`."""
    return Choir(about.as_artifact(), device, about)


@dataclass(frozen=True)
class Vote:
    """Who gave the winning answer first, and the winner's share of all voters."""

    voter: int
    agreement: float


def call_key(text: str) -> str | None:
    """Functions and arguments in one spelling; "" for any text without a call, None for a call that is damaged."""
    found = calls.parse_calls(text)
    if isinstance(found, str):
        return "" if found == "no_call" else None
    return json.dumps(sorted(json.dumps([c.name, c.arguments], sort_keys=True, default=repr) for c in found))


def text_key(text: str) -> str | None:
    """The words without case and white space; an empty text abstains."""
    return " ".join(text.casefold().split()) or None


def elect(answers: Sequence[str], key: Key = call_key) -> Vote:
    """The plurality among answers to one question; if all abstain, the first voter with agreement 0.

    Raises ValueError when nobody answered.
    """
    if not answers:
        raise InputError("a vote needs at least one answer, got none")
    keys = [key(answer) for answer in answers]
    counts = Counter(k for k in keys if k is not None)  # in order of first appearance
    if not counts:
        return Vote(0, 0.0)
    winner = max(counts, key=lambda k: counts[k])
    return Vote(keys.index(winner), counts[winner] / len(answers))


def plurality(columns: Sequence[Sequence[str]], key: Key = call_key) -> tuple[list[str], list[float]]:
    """The winning text of each question and its agreement; `columns` holds one list of answers for each voter.

    Raises ValueError when voters answered different numbers of questions.
    """
    if len({len(column) for column in columns}) > 1:
        raise InputError(f"voters answered {', '.join(str(len(c)) for c in columns)} questions; all must be asked all")
    found = [elect(answers, key) for answers in zip(*columns, strict=True)]
    return [columns[vote.voter][i] for i, vote in enumerate(found)], [vote.agreement for vote in found]


@dataclass(frozen=True)
class Rule:
    """Ask the large model where confidence is below `threshold`; `share` and `loss` are those of the held-out items."""

    threshold: float
    share: float
    loss: float

    def deferred(self, confidence: Sequence[float]) -> list[bool]:
        """Which items go to the large model."""
        return [value < self.threshold for value in confidence]


def choose_threshold(
    confidence: Sequence[float], small: Sequence[float], large: Sequence[float], *, recovered: float = 0.9
) -> Rule:
    """The rule that asks the large model least often and wins back the part `recovered` of the gap, in [0, 1].

    Where the large model is no better, it is never asked. `small` and `large` are losses, lower is better. Raises
    ValueError for no items, different numbers of them, values that are not finite, or a part outside [0, 1].
    """
    sure, ours, theirs = (np.asarray(values, float) for values in (confidence, small, large))
    if not len(sure) or not len(sure) == len(ours) == len(theirs):
        raise InputError(f"{len(sure)} confidences for {len(ours)} and {len(theirs)} losses; need as many, at least 1")
    if not np.isfinite([sure, ours, theirs]).all():
        raise InputError("confidences and losses must be finite")
    if not 0 <= recovered <= 1:
        raise InputError(f"a part of {recovered} cannot be recovered; allowed are 0 to 1")
    gap = float((ours - theirs).sum())
    if gap <= 0:
        return Rule(-inf, 0.0, float(ours.mean()))
    order = np.argsort(sure, kind="stable")
    gain = np.concatenate([[0.0], np.cumsum((ours - theirs)[order])])
    # Without a cut that does, all are sent: the gap is closed, but for the rounding of the sum.
    cuts = [0, *(np.flatnonzero(np.diff(sure[order]) > 0) + 1).tolist()]  # none between equal confidences
    cut = next((k for k in cuts if gain[k] >= recovered * gap), len(sure))
    threshold = float(sure[order[cut]]) if cut < len(sure) else inf
    return Rule(threshold if cut else -inf, cut / len(sure), float((ours.sum() - gain[cut]) / len(sure)))
