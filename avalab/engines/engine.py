"""What every engine is: a loaded artefact with three verbs, and the greedy loop that most of them share.

1. An engine's file has one public function, `load(artifact, ...)`. It imports its library, opens the artefact and
   returns an `Engine`: two functions over a `state`, which `close` empties.
2. The verbs refuse alike: a closed engine, unknown tokens, more of them than the model's context.
3. Engines that give the logits of one step share `greedy`: the mask of a grammar, the end tokens, the loop.

Verbs take and give token ids, so that what is compared between engines is never a tokenizer. Decoding is greedy.

What it does not do: sample, batch, convert artefacts, or import any engine's library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from avalab import grammars
from avalab.engines.kinds import Facts, NotSupported
from avalab.grammars import CallGrammar


@dataclass(frozen=True)
class Request:
    """One greedy generation. `stops` empty: exactly `max_new_tokens`; `on_token` is called as each one is known."""

    prompt: list[int]
    max_new_tokens: int
    grammar: CallGrammar | None = None
    stops: tuple[int, ...] = ()
    on_token: Callable[[int], object] = field(default=lambda token: None)


@dataclass(frozen=True)
class Engine:
    """A loaded artefact. `new_tokens(state, request)`, `all_logits(state, tokens)` or None where there are none."""

    name: str
    folder: Path
    facts: Facts
    state: dict
    new_tokens: Callable[[dict, Request], list[int]]
    all_logits: Callable[[dict, list[int]], Tensor] | None

    def logits(self, tokens: Sequence[int]) -> Float[Tensor, "time vocab"]:
        """Next-token logits after each token, in float32. Raises ValueError for a sequence it cannot read."""
        self._check(tokens, 0)
        if self.all_logits is None:
            raise NotSupported(f"{self.name} gives no logits; torch, openvino and llamacpp do")
        return self.all_logits(self.state, list(tokens)).float()[:, : self.facts.vocabulary]

    def generate(
        self,
        prompt_tokens: Sequence[int],
        max_new_tokens: int,
        grammar: CallGrammar | None = None,
        *,
        on_token: Callable[[int], object] = lambda token: None,
        past_end: bool = False,
    ) -> list[int]:
        """Greedy continuation, without the token that ends it; with `past_end`, exactly `max_new_tokens` tokens.

        Raises ValueError for an empty prompt, an unknown token, or more tokens than the model's context holds.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens has to be 1 or more, got {max_new_tokens}")
        self._check(prompt_tokens, max_new_tokens)
        stops = () if past_end else self.facts.stops
        return self.new_tokens(self.state, Request(list(prompt_tokens), max_new_tokens, grammar, stops, on_token))

    def close(self) -> None:
        """Let go of the weights; any further verb raises ValueError."""
        for held in self.state.values():
            if callable(getattr(held, "close", None)):
                held.close()
        self.state.clear()

    def _check(self, tokens: Sequence[int], more: int) -> None:
        if not self.state:
            raise ValueError(f"this {self.name} engine of {self.folder.name} is closed; load it again")
        if not len(tokens) or not 0 <= min(tokens) <= max(tokens) < self.facts.vocabulary:
            shown = f"ids {min(tokens)} to {max(tokens)}" if len(tokens) else "none"
            raise ValueError(f"tokens have to be ids below {self.facts.vocabulary}, at least one; got {shown}")
        if len(tokens) + more > self.facts.context:
            raise ValueError(f"{len(tokens)} + {more} tokens exceed the model's context of {self.facts.context}")


def greedy(step: Callable[[list[int]], Float[Tensor, "vocab"]], request: Request) -> list[int]:
    """The most likely token at each step, within the grammar; `step` reads tokens and gives the last one's logits."""
    mask = grammars.constrain([request.grammar]) if request.grammar else None
    tokens, read = [], request.prompt
    while len(tokens) < request.max_new_tokens:
        logits = step(read)
        if mask:
            logits = mask(torch.tensor([read]), logits[None].float())[0]
        token = int(logits.argmax())
        if token in request.stops:
            break
        tokens.append(token)
        request.on_token(token)
        read = [token]
    return tokens
