"""Agreement: a teacher that is asked an accepted request afresh has to make the calls that the example claims.

The teacher sees the tools and the request alone and answers under the grammar of calls; a value that the request says
badly, or a tool beside which another fits as well, comes to light as another call. Where nothing is called the
teacher, a small model itself, is not asked: it calls too easily.

Source: answers kept where independent attempts agree, as in Li et al., "Self-Alignment with Instruction
Backtranslation" (2024) and the consistency checks of Liu et al., "APIGen" (2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from avalab.data import calls
from avalab.data.calls import Case
from avalab.data.gates import Gate


@runtime_checkable
class CallTeacher(Protocol):
    """A teacher that can call functions: its answer to an example's tools and request, in the lab's form."""

    def calls(self, example: dict) -> str:
        """The answer's text."""

    def calls_ahead(self, examples: Sequence[dict], *, progress: str = "") -> None:
        """Answer many at once; later ones cost nothing."""


def asked(example: dict) -> bool:
    """Whether the teacher is asked: the example answers one request with calls."""
    return bool(example["calls"]) and example["kind"] not in ("multi_turn", "structured_output", "reasoning")


def case_of(example: dict) -> Case:
    """The example as a case, without its answer."""
    messages = [message for message in example["messages"] if message["role"] == "user"]
    return Case("", "agreement", messages, example["tools"], calls.accepted_calls(example["calls"]))


def agreement_gate(teacher: CallTeacher) -> Gate:
    """A gate that rejects an example whose calls the teacher, asked afresh, does not make."""

    def gate(example: dict) -> str:
        if not asked(example):
            return ""
        verdict = calls.check_calls(case_of(example), calls.parse_calls(teacher.calls(example)))
        return "" if verdict.correct else f"the teacher answers otherwise: {verdict.error} {verdict.detail}".strip()

    return gate
