"""An ensemble that decodes like one model: the members read the same tokens, their next-token distributions are pooled.

1. `Mixture` is called as transformers' models are and returns the pooled log-probabilities as its logits, so that
   whatever decodes a model, with a grammar or without, decodes an ensemble. Its configuration has as many layers as
   all members together: a key-value cache made for it holds those of all, each member is handed its own part.
2. With a temperature T, Gumbel noise is added to log p / T: the largest entry is then a draw from the distribution that
   is proportional to p^(1/T), also after a grammar has excluded tokens (Gumbel 1954; Maddison et al. 2014,
   arXiv 1411.0030). A greedy decoder becomes a sampler, and self-consistency needs no decoder of its own.

The noise depends on what is in a batch: the same draw of a run that was stopped in between can differ.
What it does not do: train, prompt members differently, or save a step: each token costs a step of every member.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from avalab import ensemble, models
from avalab.answers import Respondent
from avalab.ensemble import Ensemble


class Mixture(PreTrainedModel):
    """The members of an ensemble behind one `forward`; a PreTrainedModel because decoders ask for one."""

    def __init__(self, members: list[PreTrainedModel], about: Ensemble) -> None:
        super().__init__(_common_config(members))
        self.members, self.about = nn.ModuleList(members), about
        self.generator = torch.Generator(members[0].device).manual_seed(about.draw)

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        past_key_values: DynamicCache | None = None,
        **how,
    ) -> CausalLMOutputWithPast:
        """Pooled log-probabilities as logits; `how` is handed to every member."""
        parts = [None] * len(self.members) if past_key_values is None else self._parts(past_key_values)
        logits = [m(input_ids, past_key_values=p, **how).logits for m, p in zip(self.members, parts, strict=True)]
        members = torch.stack([each.float().log_softmax(-1) for each in logits])
        flat = ensemble.pooled(self.about, members.flatten(1, -2))
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
        return models.load_tokenizer(self.about.members[0])

    @cached_property
    def model(self) -> Mixture:
        """All members, loaded back from their folders; an artefact that stands twice is loaded once."""
        if self.shared is not None:
            return Mixture([self.shared.model], self.about)
        loaded = {m.sha256: models.load(m, self.device) for m in self.about.members}
        return Mixture([loaded[member.sha256] for member in self.about.members], self.about)


def respondent(about: Ensemble, device: str = "cpu") -> Choir:
    """Something to ask: `answers.record_calls(run, subject, respondent(ensemble), ...)`."""
    return Choir(about.as_artifact(), device, about)


def _common_config(members: list[PreTrainedModel]) -> PreTrainedConfig:
    """The first member's configuration with the layers of all; ValueError where the numbers of logits differ."""
    sizes = {member.config.vocab_size for member in members}
    if len(sizes) > 1:
        raise ValueError(f"members have {' and '.join(map(str, sorted(sizes)))} logits; they must have equally many")
    config = copy.deepcopy(members[0].config)
    if getattr(config, "layer_types", None):  # which layers have a sliding window, for the cache
        config.layer_types = [kind for member in members for kind in member.config.layer_types]
    config.num_hidden_layers = sum(member.config.num_hidden_layers for member in members)
    config._attn_implementation = "eager"  # the members attend, this module does not
    return config
