"""Answers that vote: several texts to one question become the one that most of them mean.

Two answers are the same when their keys are. `call_key` reads function calls: the same functions with the same
arguments, however they are spelt; every refusal is the same answer, a call that cannot be read abstains. `text_key`
compares words without case and white space. The plurality wins; of equally many votes, the answer that came first in
the order of the voters, so the voter to trust most goes first (Wang et al. 2023, arXiv 2203.11171, for samples of one
model). The share of votes that the winner got says how sure the voters are.

What it does not do: generate, or weigh votes; voters may have different tokenizers. It imports no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from avalab import calls

Key = Callable[[str], str | None]  # None abstains


@dataclass(frozen=True)
class Outcome:
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


def elect(answers: Sequence[str], key: Key = call_key) -> Outcome:
    """The plurality among answers to one question; if all abstain, the first voter with agreement 0.

    Raises ValueError when nobody answered.
    """
    if not answers:
        raise ValueError("a vote needs at least one answer, got none")
    keys = [key(answer) for answer in answers]
    counts = Counter(k for k in keys if k is not None)  # in order of first appearance
    if not counts:
        return Outcome(0, 0.0)
    winner = max(counts, key=lambda k: counts[k])
    return Outcome(keys.index(winner), counts[winner] / len(answers))


def vote(columns: Sequence[Sequence[str]], key: Key = call_key) -> tuple[list[str], list[float]]:
    """The winning text of each question and its agreement; `columns` holds one list of answers for each voter.

    Raises ValueError when voters answered different numbers of questions.
    """
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"voters answered {', '.join(str(len(c)) for c in columns)} questions; all must be asked all")
    outcomes = [elect(answers, key) for answers in zip(*columns, strict=True)]
    return [columns[o.voter][i] for i, o in enumerate(outcomes)], [o.agreement for o in outcomes]
