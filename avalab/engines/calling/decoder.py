"""Greedy answers of many requests at once, in as few readings of the model as their grammars and prompts allow.

1. A request takes a slot of the reader. Its prompt's beginning is taken over from the slot that has read most of it
   already (all of an agent's requests begin with the same tools), and only the rest is read.
2. Each turn reads, for every request at work: the token chosen last, the tokens that the grammar forces after it, and a
   guess of those to come, the words that followed the same last words in the prompt (Saxena, "Prompt Lookup Decoding",
   2023). All requests are read in one batch.
3. The guess is verified: it stands as far as it is what would have been chosen. The rest is forgotten.
4. With `forced` off and no guesses a turn reads one token, which is slow decoding: the same answers, since a mask
   leaves only the forced token where there is one. Arithmetic that depends on a batch's size may turn a near-tie of
   two tokens; whether it does is a matter of the reader, and measured.

This file knows neither torch nor llama.cpp: a `Reader` holds sequences and gives logits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from avalab.engines.calling.grammar import Free
from avalab.lab.errors import InputError
from avalab.lab.llamacpp_library import Row

NGRAM = 3  # last tokens that are looked up; two where three are not found

GUESS = 8  # tokens of a guess


@runtime_checkable
class Reader(Protocol):
    """A model that holds `slots` sequences of `context` tokens each."""

    slots: int
    context: int

    def read(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Read tokens; the logits each row wants, `(wanted, vocabulary)` in float32."""

    def share(self, source: int, target: int, place: int) -> None:
        """Let the slot `target` begin with the first `place` tokens of `source`."""

    def forget(self, slot: int, place: int) -> None:
        """Forget a slot's tokens from this place on."""


@runtime_checkable
class Chooser(Protocol):
    """What may come next in one answer, and what has to: `grammar.Matcher`, or `grammar.Free`."""

    def choose(self, logits: np.ndarray) -> int:
        """The next token, of those that are allowed."""

    def accept(self, token: int) -> None:
        """Go on by a token."""

    def forced(self) -> list[int]:
        """The tokens that have to come next; they are accepted."""

    def allowed(self, tokens: list[int]) -> int:
        """How many of these tokens may come next, one after another."""


@dataclass(frozen=True)
class Ask:
    """One request: a prompt's tokens, how many may follow, and a matcher (`Free` where anything may)."""

    prompt: list[int]
    max_new_tokens: int
    matcher: Chooser = field(default_factory=Free)


@dataclass
class Tally:
    """What answering cost: readings of the model, tokens by how they came, seconds by what they were spent on."""

    readings: int = 0
    emitted: int = 0
    chosen: int = 0  # by logits, one at a time
    forced: int = 0
    guessed: int = 0  # and verified
    refused: int = 0  # guesses that did not stand
    prompt_tokens: int = 0
    shared_tokens: int = 0  # of prompts, taken over from another request
    reading_s: float = 0.0
    grammar_s: float = 0.0


@dataclass
class _Work:
    """A request in its slot: `held` tokens are read, `pending` are chosen and not yet read."""

    index: int
    ask: Ask
    slot: int
    held: list[int]
    pending: list[int]
    answer: list[int] = field(default_factory=list)
    guess: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass
class Decoder:
    """Answers requests with a reader. `forced` and `guess` choose what is skipped; `tally` grows with every request."""

    reader: Reader
    stops: tuple[int, ...]
    forced: bool = True
    guess: int = GUESS
    tally: Tally = field(default_factory=Tally)
    kept: dict[int, list[int]] = field(
        default_factory=dict
    )  # slot -> tokens it has read, the least recently used first

    def answers(self, asks: Sequence[Ask], *, at_once: int = 0) -> Iterator[tuple[int, list[int]]]:
        """(index, tokens without an end token) as each is known; `at_once` requests at work at a time, 0: all slots.

        Raises ValueError for a prompt that leaves no room for its answer.
        """
        waiting, working = list(enumerate(asks)), []
        most = min(at_once or self.reader.slots, self.reader.slots)
        for _, ask in waiting:
            if len(ask.prompt) + ask.max_new_tokens > self.reader.context or not ask.prompt or ask.max_new_tokens < 1:
                raise InputError(
                    f"a prompt of {len(ask.prompt)} tokens and {ask.max_new_tokens} to come; both are 1 or more, and "
                    f"{self.reader.context} together at most"
                )
        waiting.reverse()
        while waiting or working:
            while waiting and len(working) < most:
                working.append(self._begun(*waiting.pop(), {work.slot for work in working}))
            self._turn(working)
            for work in [work for work in working if work.ended]:
                working.remove(work)
                self.kept[work.slot] = self.kept.pop(work.slot)  # used last
                yield work.index, work.answer

    def _begun(self, index: int, ask: Ask, busy: set[int]) -> _Work:
        """The request in a slot that is not busy, with as much of its prompt as another slot has read."""
        shared = {slot: _common(tokens, ask.prompt[:-1]) for slot, tokens in self.kept.items()}
        best = max(shared, key=shared.get, default=None)
        unused = [slot for slot in range(self.reader.slots) if slot not in self.kept]
        free = [slot for slot in self.kept if slot not in busy]
        slot = unused[0] if unused else min(free, key=lambda one: (shared[one] > 0 and one == best, 0))
        length = shared[best] if best is not None else 0
        if best is not None and best != slot and length:
            self.reader.forget(slot, 0)
            self.reader.share(best, slot, length)
        else:
            length = shared.get(slot, 0)
            self.reader.forget(slot, length)
        self.kept.pop(slot, None)
        self.kept[slot] = ask.prompt[:length]
        self.tally.prompt_tokens += len(ask.prompt)
        self.tally.shared_tokens += length
        work = _Work(index, ask, slot, ask.prompt[:length], ask.prompt[length:])
        self._push(work, self._forced(work))
        return work

    def _turn(self, working: list[_Work]) -> None:
        """One reading: everything pending and guessed; then what was guessed is verified and the next tokens chosen."""
        rows = []
        for work in working:
            work.guess = self._guessed(work)
            rows.append(Row(work.slot, len(work.held), [*work.pending, *work.guess], 1 + len(work.guess)))
        began = time.perf_counter()
        logits = self.reader.read(rows)
        self.tally.reading_s += time.perf_counter() - began
        self.tally.readings += 1
        for work, found in zip(working, logits, strict=True):
            self._verify(work, found)
            self.kept[work.slot] = work.held

    def _verify(self, work: _Work, logits: np.ndarray) -> None:
        work.held = [*work.held, *work.pending]
        work.pending, guess, stood = [], work.guess, 0
        while not work.ended:
            began = time.perf_counter()
            token = work.ask.matcher.choose(logits[stood])
            self.tally.grammar_s += time.perf_counter() - began
            if token in self.stops:
                work.ended = True
                break
            work.ask.matcher.accept(token)
            self._push(work, [token])
            self.tally.guessed += stood < len(guess) and guess[stood] == token
            self.tally.chosen += not (stood < len(guess) and guess[stood] == token)
            self._push(work, self._forced(work))
            common = _common(work.pending, guess[stood:])
            if common < len(work.pending):  # the rest of the guess is another text
                self.tally.refused += len(guess) - stood - common
                work.held += work.pending[:common]
                work.pending = work.pending[common:]
                break
            work.held += work.pending
            work.pending, stood = [], stood + common
        if work.guess:
            self.reader.forget(work.slot, len(work.held))

    def _forced(self, work: _Work) -> list[int]:
        if not self.forced or work.ended:
            return []
        began = time.perf_counter()
        tokens = work.ask.matcher.forced()
        self.tally.grammar_s += time.perf_counter() - began
        self.tally.forced += len(tokens)
        return tokens

    def _push(self, work: _Work, tokens: list[int]) -> None:
        """Append tokens to the answer, up to its longest, and to what is read next."""
        room = work.ask.max_new_tokens - len(work.answer)
        work.answer += tokens[:room]
        work.pending += tokens[:room]
        self.tally.emitted += len(tokens[:room])
        work.ended = work.ended or len(work.answer) >= work.ask.max_new_tokens

    def _guessed(self, work: _Work) -> list[int]:
        """What followed the same last tokens in the prompt, as far as the grammar allows it."""
        room = min(self.guess, work.ask.max_new_tokens - len(work.answer) - 1)
        if room < 1 or not work.answer:
            return []
        found = looked_up(work.ask.prompt, [*work.ask.prompt, *work.answer][-NGRAM:], room)
        began = time.perf_counter()
        allowed = work.ask.matcher.allowed(found)
        self.tally.grammar_s += time.perf_counter() - began
        return found[:allowed]


def looked_up(prompt: list[int], last: list[int], count: int) -> list[int]:
    """The `count` tokens that followed the last ones where they stand in the prompt, at the latest such place."""
    for size in range(len(last), 1, -1):
        wanted = last[-size:]
        for at in range(len(prompt) - size - 1, -1, -1):
            if prompt[at] == wanted[0] and prompt[at : at + size] == wanted:
                return prompt[at + size : at + size + count]
    return []


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other)
