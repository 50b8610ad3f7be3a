"""Examples joined into dialogues: one set of tools, several requests, some of which no tool fits.

A single example spends three hundred tokens, most of them on its tools, and asks once whether a function fits. A
dialogue lists its tools once and asks several times, at forty tokens a refusal and seventy a call. Two sorts:

- `unlike`: one to three tools that have nothing to do with each other, a call to each. The other requests were made for
  tools with no word in common with those: their answers are refusals.
- `family`: two to four tools of one domain that a careless reader would confuse, calls to some of them. The other
  requests were made for tools of that domain that are not listed, as far as there are any.

The turns are shuffled, so that the first one, which is what a caller meets, is a refusal as often as any. Every request
and call has passed the gates as an example of its own. Kinds are `dialogue`.

What it does not do: turns that refer to earlier ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from avalab import drafts, example_files, packaged_text, phrasing

Turn = tuple[dict, dict]  # a request and its answer
DRESS = frozenset(  # words that only dress a tool (`phrasing.Dress`) and say nothing about it
    word[:5].lower() for verbs, openings in phrasing.VERBS.values() for word in " ".join((*verbs, *openings)).split()
)


def join(
    examples: Sequence[dict], count: int, seed: int, *, refusals: int = 3, most: int = 3, families: float = 0.5
) -> list[dict]:
    """`count` dialogues of one to `most` calls and `refusals` refusals each, in the form of `synthesize.load`.

    `families` is the share of those about tools of one domain. Raises ValueError where fewer than two of the examples
    are single calls.
    """
    pool = [example for example in examples if example["kind"] == "single_call"]
    if len(pool) < 2:
        raise ValueError(f"{len(pool)} of {len(examples)} examples are single calls; a dialogue needs two or more")
    related, rng = _families(pool), random.Random(f"dialogues-{seed}")
    made = []
    for _ in range(count):
        near = related and rng.random() < families
        parts = _family(rng.choice(related), rng, most=most, refusals=refusals) if near else None
        made.append(_dialogue(*(parts or _unlike(pool, rng, calls=rng.randint(1, most), refusals=refusals)), rng))
    return made


def _dialogue(listed: list[dict], called: list[dict], refused: list[dict], rng: random.Random) -> dict:
    tools = [tool for example in listed for tool in example["tools"]]
    rng.shuffle(tools)
    turns = [_turn(example) for example in called] + [_refused(example, rng) for example in refused]
    rng.shuffle(turns)
    dialogue = {
        "kind": "dialogue",
        "tools": tools,
        "messages": [message for turn in turns for message in turn],
        "calls": [call for example in called for call in example["calls"]],
        "source": "dialogues",
    }
    return example_files.with_system(dialogue)


def _unlike(pool: list[dict], rng: random.Random, *, calls: int, refusals: int) -> tuple[list, list, list]:
    drawn = rng.sample(pool, min(len(pool), 8 * (calls + refusals)))
    unlike: list[dict] = []
    for example in drawn:
        if all(_apart(example, other) for other in unlike):
            unlike.append(example)
    return unlike[:calls], unlike[:calls], unlike[calls : calls + refusals]


def _families(pool: Sequence[dict]) -> list[dict[str, list[dict]]]:
    """Of each domain with more than one tool the examples by tool."""
    found: dict[str, dict[str, list[dict]]] = {}
    for example in pool:
        domain, _, tool = example.get("made_for", "").partition(".")
        if tool:
            found.setdefault(domain, {}).setdefault(tool, []).append(example)
    return [family for _, family in sorted(found.items()) if len(family) > 1]


def _family(family: dict[str, list[dict]], rng: random.Random, *, most: int, refusals: int) -> tuple[list, list, list]:
    """One example of each listed tool lends its schema, and its call where the tool is called."""
    names = rng.sample(sorted(family), len(family))
    count = rng.randint(2, min(4, len(names)))
    listed = [rng.choice(family[name]) for name in names[:count]]
    unlisted = [rng.choice(family[name]) for name in names[count : count + refusals]]
    return listed, listed[: rng.randint(1, min(most, count))], unlisted


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
    plain = [line for line in packaged_text.lines_of("refusals.txt") if "{}" not in line]
    return example["messages"][-2], {"role": "assistant", "content": rng.choice(plain)}
