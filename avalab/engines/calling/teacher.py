"""A GGUF file as teacher: it says requests, and makes calls, many at once through the decoder of this folder.

Answers are kept in an `AnswerCache` under the file's SHA-256, each as soon as it is there; those that the lab's data
holds already are not asked for again, and the file is opened at the first question that is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from avalab.data import chats, toolbox
from avalab.data.sources.teaching import case_of
from avalab.data.teachers import AnswerCache, question_key
from avalab.engines.calling.decoder import Ask, Decoder
from avalab.engines.calling.grammar import Language, languages_for
from avalab.engines.calling.readers import LlamaCppReader, tokenizer_beside
from avalab.engines.engine import model_facts

SLOTS, CONTEXT = 4, 2048  # requests at once, and tokens of each

SAID_TOKENS, CALL_TOKENS = 120, 160  # of an answer


@dataclass(frozen=True)
class GgufTeacher:
    """A model in a GGUF file; `schema` is the form of what it says."""

    file: Path
    sha256: str
    answers: AnswerCache
    schema: dict
    threads: int = 0
    held: dict[str, Any] = field(default_factory=dict)

    @property
    def __name__(self) -> str:
        return f"{self.file.stem} (llama.cpp)"

    def __call__(self, messages: list[dict]) -> str:
        self.ahead([messages])
        return self.answers.texts[self._said_key(messages)]

    def ahead(self, questions: Sequence[list[dict]], *, progress: str = "") -> None:
        """Answer what is not known yet, each in the form of the schema."""
        wanted = {self._said_key(question): question for question in questions}
        language = None if wanted.keys() <= self.answers.texts.keys() else self._languages.of_schema(self.schema)
        self._answer({key: (question, language) for key, question in wanted.items()}, SAID_TOKENS, progress)

    def calls(self, example: dict) -> str:
        """What it calls for an example's request, under the grammar."""
        self.calls_ahead([example])
        return self.answers.texts[self._call_key(example)]

    def calls_ahead(self, examples: Sequence[dict], *, progress: str = "") -> None:
        """Answer the requests of examples with calls."""
        wanted = {}
        for example in examples:
            if (key := self._call_key(example)) not in self.answers.texts:
                language = self._languages.of_calls(example["tools"], max_calls=max(1, len(example["calls"])))
                case = case_of(example)
                wanted[key] = (chats.prefaced(case.messages, toolbox.system_prompt(case.functions)), language)
        self._answer(wanted, CALL_TOKENS, progress)

    def _answer(self, wanted: dict[str, tuple[list[dict], Language | None]], tokens: int, progress: str) -> None:
        new = {key: asked for key, asked in wanted.items() if key not in self.answers.texts}
        if not new:
            return
        keys, tokenizer = list(new), self._tokenizer
        asks = []
        for messages, language in new.values():
            prompt = tokenizer(chats.prompt_text(tokenizer, messages), add_special_tokens=False).input_ids
            asks.append(Ask(prompt[-(CONTEXT - tokens) :], tokens, self._languages.matcher(language)))
        found = self._decoder.answers(asks)
        for index, ids in tqdm(found, total=len(new), desc=progress, disable=not progress, leave=False):
            self.answers.add(keys[index], tokenizer.decode(ids, skip_special_tokens=False), 0.0, 0.0)

    def _said_key(self, messages: list[dict]) -> str:
        return question_key(self.sha256, {"messages": messages, "schema": self.schema, "max_tokens": SAID_TOKENS})

    def _call_key(self, example: dict) -> str:
        case = case_of(example)
        asked = {"messages": case.messages, "tools": case.functions, "most": len(example["calls"])}
        return question_key(self.sha256, asked | {"max_tokens": CALL_TOKENS})

    @cached_property
    def _tokenizer(self):
        return tokenizer_beside(self.file)

    @cached_property
    def _languages(self):
        reader = self._decoder.reader
        return languages_for(self._tokenizer, reader.vocabulary, self._decoder.stops)

    @cached_property
    def _decoder(self) -> Decoder:
        reader = LlamaCppReader(self.file, slots=SLOTS, context=CONTEXT, threads=self.threads)
        return Decoder(reader, model_facts(self.file.parent).stops)
