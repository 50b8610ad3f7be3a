"""Grammars of calls whose forced tokens are known: llguidance, over the tokenizer of a model.

A schema dictates half of a call: names, brackets, the keys of required arguments. llguidance gives such a stretch as
the tokens that its text is canonically cut into, without the last one where what follows could join it
(`compute_ff_tokens`). A mask of one step allows nothing else there, so that slow decoding, which asks for a mask at
every token, comes to the same answer. The language is that of `data.grammars`: calls in the lab's form, or with
`refusal` a text without one.

Source: Microsoft, "llguidance" (2025); Beurer-Kellner et al., "Guiding LLMs the right way" (2024) on forced text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from avalab.data.grammars import BEGIN, END, MAX_CALLS, REFUSAL_TOKENS
from avalab.lab.errors import InputError, Unavailable
from avalab.lab.schemas import to_json_schema

SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes

TEXT = rf"text[max_tokens={REFUSAL_TOKENS}]: FREE" + "\nFREE: /(?s:.+)/ & ~/(?s:.*<tool_call>.*)/\n"


@dataclass(frozen=True)
class Language:
    """A grammar's text, and the functions whose schema it could not hold: those take any object."""

    text: str
    loosened: tuple[str, ...] = ()


@dataclass(frozen=True)
class Languages:
    """Makes languages and matchers for one tokenizer; what was made is kept."""

    tokenizer: Any  # llguidance's
    stops: tuple[int, ...]
    made: dict[str, Language] = field(default_factory=dict)
    begun: dict[str, Any] = field(default_factory=dict)

    def of_calls(self, functions: list[dict], *, refusal: bool = False, max_calls: int = MAX_CALLS) -> Language:
        """1 to `max_calls` calls to `functions`, or with `refusal` a text without one. Raises ValueError for none."""
        if not functions:
            raise InputError("no functions: a grammar of calls needs at least one")
        key = json.dumps([functions, refusal, max_calls], sort_keys=True)
        if key not in self.made:
            self.made[key] = self._language(functions, refusal=refusal, max_calls=max_calls)
        return self.made[key]

    def of_schema(self, schema: dict) -> Language:
        """JSON that satisfies a schema."""
        return Language(f"start: %json {_spaced(schema)}\n")

    def matcher(self, language: Language) -> Matcher:
        """A matcher at the beginning of an answer; compiled once a language. Raises ValueError for one it refuses."""
        from llguidance import LLMatcher

        if language.text not in self.begun:
            made = LLMatcher(self.tokenizer, LLMatcher.grammar_from_lark(language.text))
            if made.is_error():
                raise InputError(f"the grammar is refused: {made.get_error().splitlines()[0]}")
            self.begun[language.text] = made
        return Matcher(self.begun[language.text].deep_copy(), self.tokenizer.vocab_size, self.stops)

    def _language(self, functions: list[dict], *, refusal: bool, max_calls: int) -> Language:
        schemas, loosened = {}, []
        for function in functions:
            schema = to_json_schema(function)
            if self._refused(schema):
                schema = {"type": "object"}
                loosened.append(function["name"])
            schemas[function["name"]] = schema
        one_of = []
        for name, schema in schemas.items():
            arguments = {"type": "object"} if "$defs" in schema or "definitions" in schema else schema
            loosened += [name] if arguments is not schema else []
            one_of.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": name}, "arguments": arguments},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
        listed = {"type": "array", "items": {"anyOf": one_of}, "minItems": 1, "maxItems": max_calls}
        calls = f"calls: {json.dumps(BEGIN)} list {json.dumps(END)}\nlist: %json {_spaced(listed)}\n"
        start = f"start: calls | text\n{TEXT}" if refusal else "start: calls\n"
        return Language(start + calls, tuple(sorted(set(loosened))))

    def _refused(self, schema: dict) -> bool:
        from llguidance import LLMatcher

        return bool(LLMatcher.validate_grammar(f"start: %json {_spaced(schema)}\n", self.tokenizer))


def languages_for(tokenizer: PreTrainedTokenizerBase, vocabulary: int, stops: Sequence[int]) -> Languages:
    """Languages for models with this tokenizer and `vocabulary` logits. Raises Unavailable without llguidance."""
    try:
        from llguidance.hf import from_tokenizer
    except ImportError:
        raise Unavailable("forced tokens need llguidance; install it: pip install 'avalab[calls]'") from None
    return Languages(from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(stops)), tuple(stops))


def _spaced(schema: dict) -> str:
    return json.dumps({**schema, "x-guidance": SEPARATORS}, ensure_ascii=False)


class Matcher:
    """The state of one answer: what may come next, what has to."""

    def __init__(self, inner: Any, vocabulary: int, stops: tuple[int, ...]) -> None:
        self.inner, self.stops = inner, stops
        self._bits = np.zeros((1, (vocabulary + 31) // 32), np.int32)

    def choose(self, logits: np.ndarray) -> int:
        """The most likely token that is allowed. Raises ValueError where the grammar has come to an error."""
        from llguidance.numpy import apply_token_bitmask_inplace, fill_next_token_bitmask

        if self.inner.is_stopped():
            return self.stops[0]
        fill_next_token_bitmask(self.inner, self._bits)
        row = logits[None].copy()
        apply_token_bitmask_inplace(row, self._bits)
        return int(row.argmax())

    def accept(self, token: int) -> None:
        """Go on by a token. Raises ValueError for one that is not allowed."""
        if token not in self.stops and not self.inner.consume_token(token):
            raise InputError(f"token {token} is not allowed: {self.inner.get_error() or 'the grammar has ended'}")

    def forced(self) -> list[int]:
        """The tokens that have to come next, perhaps none; they are accepted."""
        tokens = [] if self.inner.is_stopped() else list(self.inner.compute_ff_tokens())
        if any(token in self.stops for token in tokens):
            tokens = tokens[: next(i for i, token in enumerate(tokens) if token in self.stops)]
        if tokens and not self.inner.consume_tokens(tokens):
            raise InputError(f"forced tokens are not allowed: {self.inner.get_error()}")
        return tokens

    def allowed(self, tokens: list[int]) -> int:
        """How many of these tokens may come next, one after another."""
        return 0 if self.inner.is_stopped() or not tokens else self.inner.validate_tokens(tokens)


class Free:
    """No grammar: anything may come next, nothing has to."""

    def choose(self, logits: np.ndarray) -> int:
        """The most likely token."""
        return int(logits.argmax())

    def accept(self, token: int) -> None:
        """Nothing changes."""

    def forced(self) -> list[int]:
        """None."""
        return []

    def allowed(self, tokens: list[int]) -> int:
        """All of them."""
        return len(tokens)
