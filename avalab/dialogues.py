"""Examples joined into dialogues: one set of tools, several requests, some of which no tool fits.

A single example spends three hundred tokens, most of them on its tools, and asks once whether a function fits. A
dialogue lists its tools once and asks several times, at forty tokens a refusal and seventy a call:

1. Draw one to three examples of a single call whose tools have nothing to do with each other; all tools are listed.
2. Their requests and calls are turns. Between them stand requests of other examples, for which no listed tool is
   made (no word in common with the tool that they were made for): their answers are refusals.
3. The turns are shuffled, so that the first one, which is what a caller meets, is a refusal as often as any.

Every request and call has passed the gates as an example of its own. Kinds are `dialogue`.

What it does not do: turns that refer to earlier ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from avalab import drafts, example_files, phrasing

Turn = tuple[dict, dict]  # a request and its answer
DRESS = frozenset(  # words that only dress a tool (`phrasing.Dress`) and say nothing about it
    word[:5].lower() for verbs, openings in phrasing.VERBS.values() for word in " ".join((*verbs, *openings)).split()
)


def join(examples: Sequence[dict], count: int, seed: int, *, refusals: int = 3, most: int = 3) -> list[dict]:
    """`count` dialogues of one to `most` calls and `refusals` refusals each, in the form of `synthesize.load`.

    Raises ValueError where fewer than two of the examples are single calls.
    """
    pool = [example for example in examples if example["kind"] == "single_call"]
    if len(pool) < 2:
        raise ValueError(f"{len(pool)} of {len(examples)} examples are single calls; a dialogue needs two or more")
    rng = random.Random(f"dialogues-{seed}")
    return [_dialogue(pool, rng, calls=rng.randint(1, most), refusals=refusals) for _ in range(count)]


def _dialogue(pool: list[dict], rng: random.Random, *, calls: int, refusals: int) -> dict:
    drawn = rng.sample(pool, min(len(pool), 8 * (calls + refusals)))
    unlike: list[dict] = []
    for example in drawn:
        if all(_apart(example, other) for other in unlike):
            unlike.append(example)
    called, others = unlike[:calls], unlike[calls : calls + refusals]
    tools = [tool for example in called for tool in example["tools"]]
    rng.shuffle(tools)
    turns = [_turn(example) for example in called] + [_refused(example, rng) for example in others]
    rng.shuffle(turns)
    dialogue = {
        "kind": "dialogue",
        "tools": tools,
        "messages": [message for turn in turns for message in turn],
        "calls": [call for example in called for call in example["calls"]],
        "source": "dialogues",
    }
    return example_files.with_system(dialogue)


def _apart(one: dict, other: dict) -> bool:
    """Whether no tool of the one may do what a tool of the other does."""
    return not _words(one) & _words(other)


def _words(example: dict) -> frozenset[str]:
    spaced = [(re.sub(r"(?<=[a-z])(?=[A-Z])|[.]", " ", t["name"]), t["description"]) for t in example["tools"]]
    return frozenset().union(*(drafts.stems(*named) for named in spaced)) - DRESS


def _turn(example: dict) -> Turn:
    request, answer = example["messages"][-2:]
    return request, answer


def _refused(example: dict, rng: random.Random) -> Turn:
    plain = [line for line in phrasing.lines_of("refusals.txt") if "{}" not in line]
    return example["messages"][-2], {"role": "assistant", "content": rng.choice(plain)}
