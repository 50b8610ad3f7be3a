"""Answers from documents: pieces are found, a model answers from them, and what it cites is checked in the text.

1. The best pieces go into the request as numbered passages; nothing found is "not in the documents" without asking.
2. The model answers in one or two sentences, each with the number of its passage in brackets.
3. Every sentence is checked against the passage it cites, and where that does not say so, against the others: all its
   numbers and `SUPPORT` of its words that tell something have to stand there. A sentence that no passage supports is
   left out and counted; an answer of which nothing is left is "not in the documents".

Words that agree are no proof that the sense does: the check catches what is made up, not what is misunderstood.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from avalab.agent.retrieval.index import COMMON, Found, Index
from avalab.agent.speaker import Speaker

UNKNOWN = "not in the documents"

PASSAGES, ANSWER_TOKENS = 4, 96

SUPPORT = 0.6  # of a sentence's words

INSTRUCTION = (
    "Answer the question in one short sentence, from these passages only. Name exactly what is asked for. End the "
    f"sentence with the number of its passage, as in [2]. If no passage says it, answer: {UNKNOWN}."
)

_CITED = re.compile(r"\[(\d+)\]")

_SENTENCE = re.compile(r"(?<=[.!?\]])\s+(?=[A-Z`\"'])")

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Statement:
    """A sentence of an answer and the piece that supports it."""

    text: str
    source: Found


@dataclass(frozen=True)
class Reply:
    """What the documents say: statements with their sources, how many sentences no passage supports, what was read."""

    question: str
    statements: list[Statement]
    unsupported: int
    passages: list[Found]
    said: str = ""

    @property
    def is_known(self) -> bool:
        """Whether anything of the answer stands in the documents."""
        return bool(self.statements)

    @property
    def text(self) -> str:
        """The answer with the names of its sources, or UNKNOWN."""
        return " ".join(f"{s.text} [{s.source.name}]" for s in self.statements) or UNKNOWN


def ask(speaker: Speaker, index: Index, question: str, *, passages: int = PASSAGES, way: str = "fused") -> Reply:
    """Answer a question from an index of documents."""
    found = index.search(question, passages, way=way)
    if not found:
        return Reply(question, [], 0, [])
    while len(found) > 1 and speaker.room(request(question, found), ANSWER_TOKENS) < 0:
        found = found[:-1]  # a small context holds fewer passages
    said = speaker.say(request(question, found), most=ANSWER_TOKENS).text
    statements, unsupported = supported(said, found)
    return Reply(question, statements, unsupported, found, said)


def request(question: str, found: Sequence[Found]) -> list[dict]:
    """The chat that asks a question about passages."""
    shown = "\n\n".join(f"[{n}] {piece.heading}\n{piece.text}" for n, piece in enumerate(found, start=1))
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": f"{shown}\n\nQuestion: {question}"},
    ]


def supported(said: str, found: Sequence[Found]) -> tuple[list[Statement], int]:
    """The sentences of an answer that a passage supports, and how many others there are."""
    if UNKNOWN in said.lower():
        return [], 0
    statements, unsupported = [], 0
    for sentence in _SENTENCE.split(said.strip()):
        cited = [int(number) for number in _CITED.findall(sentence)]
        text = " ".join(_CITED.sub("", sentence).split()).replace(" .", ".")
        if not _telling(text):
            continue
        own = [found[number - 1] for number in cited if 0 < number <= len(found)]
        source = next((piece for piece in [*own, *found] if stands_in(text, f"{piece.heading}\n{piece.text}")), None)
        if source is None:
            unsupported += 1
        else:
            statements.append(Statement(text, source))
    return statements, unsupported


def stands_in(sentence: str, text: str) -> bool:
    """Whether a text holds all numbers of a sentence and `SUPPORT` of its telling words."""
    if not set(_NUMBER.findall(sentence)) <= set(_NUMBER.findall(text)):
        return False
    words = _telling(sentence)
    return bool(words) and len(words & _telling(text)) >= SUPPORT * len(words)


def _telling(text: str) -> set[str]:
    """The stems of words that tell something apart: five letters of each, which joins `returns` and `returned`."""
    return {word[:5] for word in re.findall(r"[^\W\d_]{2,}", text.lower()) if word not in COMMON}
