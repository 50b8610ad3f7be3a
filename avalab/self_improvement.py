"""A round of self-improvement: the model's own answers, where they can be verified, become training examples.

1. The model answers requests; it is decoded as in `evaluate`, free, or held to calls by a grammar.
2. An answer becomes an example with the model's calls in the form that training uses.
3. The gates verify it without knowing the right answer: the calls satisfy the schemas, every value is said in the
   request, pure functions run. What passes may join the training set.
4. `precision` says how far that verification can be trusted where the right calls are known.

Sources: rejection sampling of a model's own answers, Zelikman et al., "STaR" (2022); Yuan et al., "Scaling Relationship
on Learning Mathematical Reasoning" (2023). Here one greedy answer a request, and gates in place of known answers.

What it does not do: train (hand the examples to `train.finetune`), or sample several answers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from avalab import calls, evaluate, example_files, gates, statistics
from avalab.calls import Case
from avalab.evaluate import Respondent
from avalab.gates import Gate
from avalab.statistics import Estimate


def self_improve(
    respondent: Respondent,
    requests: Sequence[dict],
    cache: Path,
    *,
    row: dict[str, Gate],
    mode: str = "grammar",
    counts: Counter | None = None,
) -> list[dict]:
    """The model's answers to requests that pass the gates of `row`, as examples like those of `synthesize`.

    `requests` are examples or chats with `tools` and `messages`; calls and answers in them are not looked at. `counts`
    collects `answered`, `accepted`, `rejected:no_call`, `rejected:not_json` and `rejected:<gate>`. Each example carries
    the position of its request as `request`. Raises ValueError for an unknown mode.
    """
    counts = Counter() if counts is None else counts
    asked = [_case(number, request) for number, request in enumerate(requests)]
    texts = evaluate.answer_calls(respondent, asked, mode, cache, progress="self-improvement") if asked else []
    accepted = []
    for case, text in zip(asked, texts, strict=True):
        example, gate = _example(case, text, f"self:{respondent.artifact.name}")
        gate = gate or gates.verdict(example, row)[0]
        counts.update(["answered", f"rejected:{gate}" if gate else "accepted"])
        accepted += [] if gate else [example]
    return accepted


def precision(accepted: Sequence[dict], requests: Sequence[dict]) -> Estimate:
    """The share of accepted answers that are right, with its interval, where the requests' own `calls` are right.

    Raises ValueError when nothing was accepted.
    """
    right = 0
    for example in accepted:
        request = requests[example["request"]]
        expected = [{c["name"]: {k: [v] for k, v in c["arguments"].items()}} for c in request["calls"]]
        case = Case("", "self_improvement", [], request["tools"], expected)
        right += calls.check(case, [calls.Call(c["name"], c["arguments"]) for c in example["calls"]]).correct
    return statistics.wilson(right, len(accepted))


def _case(number: int, request: dict) -> Case:
    """A request without its answer; one call is wanted, or, with the grammar of that mode, a refusal."""
    user = [m for m in request["messages"] if m["role"] == "user"]
    return Case(str(number), "self_improvement", user, request["tools"], [])


def _example(case: Case, text: str, source: str) -> tuple[dict, str]:
    """The example that an answer makes, and "" or why it makes none."""
    found = calls.parse_calls(text)
    if isinstance(found, str):
        return {}, found
    made = [{"name": call.name, "arguments": call.arguments} for call in found]
    answer = f"<tool_call>{json.dumps(made, ensure_ascii=False)}</tool_call>"
    example = {
        "kind": "single_call" if len(case.functions) == 1 else "several_candidates",
        "tools": case.functions,
        "messages": [*case.messages, {"role": "assistant", "content": answer}],
        "calls": made,
        "source": source,
        "request": int(case.id),
    }
    return example_files.with_system(example), ""
