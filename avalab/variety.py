"""How different the examples of a set are: two gates that remember what they let through, and a report.

- `near_duplicates`: MinHash over word 3-grams with locality-sensitive hashing (Broder 1997).
- `spread`: no function called, no first word of a request and no length of a request may take more than its share of
  what was accepted. A teacher that falls into one phrase, or a sampler that loves one tool, is stopped here.
- `report`: distinct functions, verbs, first words, words and request lengths.

Both gates count what passes them, so they stand at the end of a row of gates, `near_duplicates` last: it then holds
only what was really accepted, and `spread` counts a few of its rejections too.

What it does not do: judge one example by itself (that is `gates`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from datasketch import MinHash, MinHashLSH

SHARES = {"function": 0.05, "first word": 0.4, "length": 0.75}  # of the accepted examples, at most
FLOOR = 20  # as many may share a property whatever their share: the first examples of a set are few
LENGTH_CLASS = 5  # words; requests of 10 to 14 words have the same length


def near_duplicates(threshold: float = 0.8, permutations: int = 64) -> Callable[[dict], str]:
    """A gate that rejects a request whose estimated Jaccard similarity to an accepted one reaches the threshold.

    Numbers count as words. The gate remembers what it let through, so it belongs at the end of the row.
    """
    index = MinHashLSH(threshold=threshold, num_perm=permutations)
    signature = MinHash(num_perm=permutations, seed=1)

    def gate(example: dict) -> str:
        words = re.findall(r"[\w.:-]+", example["messages"][-2]["content"].lower())
        ours = signature.copy()
        ours.update_batch([" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))])
        if index.query(ours):
            return "nearly the same request exists"
        index.insert(str(len(index.keys)), ours, check_duplication=False)
        return ""

    return gate


def spread(shares: dict[str, float] | None = None, floor: int = FLOOR) -> Callable[[dict], str]:
    """A gate that rejects an example whose function, first word or length has had its share of the accepted ones.

    `shares` gives the largest share of each property (default `SHARES`); `floor` examples may have it anyway.
    """
    shares, seen, accepted = SHARES if shares is None else shares, Counter(), Counter()

    def gate(example: dict) -> str:
        found = [(kind, value) for kind, value in _properties(example) if kind in shares]
        total = accepted["examples"]
        for kind, value in found:
            if seen[kind, value] + 1 > max(floor, shares[kind] * (total + 1)):
                return f"{seen[kind, value]} of {total} accepted examples have the {kind} {value!r} already"
        seen.update(found)
        accepted["examples"] += 1
        return ""

    return gate


def _properties(example: dict) -> Iterator[tuple[str, str]]:
    words = example["messages"][-2]["content"].split()
    yield from (("function", name) for name in sorted({call["name"] for call in example["calls"]}))
    yield "first word", words[0].lower() if words else ""
    least = len(words) // LENGTH_CLASS * LENGTH_CLASS
    yield "length", f"{least} to {least + LENGTH_CLASS - 1} words"


def report(examples: Iterable[dict]) -> dict:
    """Distinct functions, verbs, first words, kinds and request lengths in words of a set of examples.

    A verb is the first word of a called function's description: what the user wants to have done.
    """
    examples = list(examples)
    requests = [e["messages"][-2]["content"] for e in examples]
    lengths = sorted(len(request.split()) for request in requests)
    return {
        "examples": len(examples),
        "kinds": dict(sorted(Counter(e["kind"] for e in examples).items())),
        "functions_offered": len({tool["name"] for e in examples for tool in e["tools"]}),
        "functions_called": len({call["name"] for e in examples for call in e["calls"]}),
        "verbs": len({verb for e in examples for verb in _verbs(e)}),
        "first_words": len({request.split()[0].lower() for request in requests if request.strip()}),
        "words_in_requests": len({word for request in requests for word in re.findall(r"[a-z']+", request.lower())}),
        "request_words_5_50_95": [lengths[int(q * (len(lengths) - 1))] for q in (0.05, 0.5, 0.95)] if lengths else [],
    }


def _verbs(example: dict) -> Iterator[str]:
    called = {call["name"] for call in example["calls"]}
    for tool in example["tools"]:
        if tool["name"] in called and (words := re.findall(r"\w+", tool.get("description", ""))):
            yield words[0].lower()
