"""Function-calling cases to ask an artefact, and the chat text it is asked with: BFCL v4, or the lab's own tools.

The leaderboard's categories are fetched when absent. Those of the toolbox need no download: its held-out tools, with
requests that say every argument: one fitting tool on offer (`toolbox_simple`), among others (`toolbox_multiple`), or
only others (`toolbox_irrelevance`).

What it does not do: ask, judge (`calls`), or multi-turn cases.
"""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from avalab import assets, calls, toolbox
from avalab.calls import Case

TOOLBOX = ("toolbox_simple", "toolbox_multiple", "toolbox_irrelevance")  # need no download
CATEGORIES = (*calls.CATEGORIES, *TOOLBOX)
LISTED = 3  # tools on offer in toolbox_multiple and toolbox_irrelevance


def cases(category: str, limit: int | None = None) -> list[Case]:
    """The first `limit` cases of a category of BFCL v4 (fetched when absent) or of the toolbox.

    Raises ValueError for an unknown category, or when the toolbox is asked for without a limit.
    """
    if category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; choose one of {', '.join(CATEGORIES)}")
    if category not in TOOLBOX:
        return calls.load_cases(assets.fetch("bfcl-v4"), category, limit)
    if limit is None:
        raise ValueError(f"{category} has no end; give a limit")
    examples = toolbox.function_calling_examples(limit, seed=2, split="heldout")
    return [_toolbox_case(f"{category}_{i}", category, example) for i, example in enumerate(examples)]


def _toolbox_case(id: str, category: str, example: dict) -> Case:
    (call,), messages = example["calls"], [m for m in example["messages"] if m["role"] == "user"]
    heldout = [t for t in toolbox.tools() if toolbox.split_of(t["name"]) == "heldout"]
    fitting = [t for t in heldout if t["name"] == call["name"]]
    others = random.Random(id).sample([t for t in heldout if t not in fitting], LISTED)
    if category == "toolbox_irrelevance":
        return Case(id, category, messages, others, [])
    listed = fitting if category == "toolbox_simple" else [*others[:1], *fitting, *others[2:]]
    return Case(id, category, messages, listed, [{call["name"]: {k: [v] for k, v in call["arguments"].items()}}])


def prompt(tokenizer: PreTrainedTokenizerBase, case: Case) -> str:
    """The chat text of a case up to the answer: tools in the system message, before what the case says itself."""
    own = [m["content"] for m in case.messages if m["role"] == "system"]
    system = {"role": "system", "content": "\n\n".join([toolbox.system_prompt(case.functions), *own])}
    messages = [system, *(m for m in case.messages if m["role"] != "system")]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
