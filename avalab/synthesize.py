"""Synthetic examples for an assistant that calls functions: draft, refine, gate, write.

1. Draw a kind by its share and let `drafts` make an example from two seeds, one for the content, one for the wording.
2. With a teacher (`teachers`), have it say the request in other words: its prompts stand in `prompts/`, in turn a
   template, few-shot and role play. The calls stay ours, so that the gates can check what it says against them.
3. Pass the gates. A rejected example goes back with the reason, at most `rounds` times: wording is drawn again (or
   asked for again, the reason in the prompt); where schema, execution or overlap failed, the content is, too.
   `candidates` are the first attempts without any gate: what the gates have to work on.
4. `write` stores one JSONL file a kind and a data card. System messages are left out and rebuilt by `load`.

The same count, seed and kinds give the same bytes (docstrings belong to the running Python; the card names it).

What it does not do: train, or measure how natural the requests are (people review samples in notebook 05).
"""

from __future__ import annotations

import json
import platform
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from avalab import drafts, example_files, gates, packaged_text, variety
from avalab.example_files import load as load  # for whoever reads what this module wrote
from avalab.example_files import with_system
from avalab.experiment import write_atomically
from avalab.gates import EvaluationSet, Gate

PROMPTS = ("template.txt", "few_shot.txt", "role_play.txt")
PATIENCE = 300  # examples of a kind rejected in a row before the generator gives up
AHEAD = 64  # first attempts that a teacher who can answers in one go
REWORDING = {  # the form of a teacher's answer, for teachers that can be held to one
    "type": "object",
    "properties": {"request": {"type": "string", "maxLength": 240}},
    "required": ["request"],
    "additionalProperties": False,
}
Teacher = Callable[[list[dict]], str]


def generate(
    count: int,
    seed: int,
    *,
    kinds: tuple[str, ...] = (),
    teacher: Teacher | None = None,
    row: dict[str, Gate] | None = None,
    counts: Counter | None = None,
) -> Iterator[dict]:
    """`count` accepted examples: `{"kind", "tools", "messages" (system, user, assistant), "calls", "source"}`.

    `kinds` empty means all in their shares; `row` is the row of gates (default: all, against every evaluation set at
    hand). `counts` collects `accepted`, `rejected:<gate>`, `refined` (accepted after a rejection; `refined:<gate>` by
    the last gate that had rejected) and `abandoned`. Raises ValueError for an unknown kind, and where PATIENCE examples
    of a kind in a row fail, naming the gate that rejected most.
    """
    shares = _shares(kinds)
    row = gates.standard(gates.evaluation_sets()) if row is None else row
    counts = Counter() if counts is None else counts
    counts.update({f"rejected:{gate}": 0 for gate in row})  # a gate that rejects nothing is seen, too
    return _accepted(count, _stream(seed, shares, teacher), teacher, row, counts)


def candidates(
    count: int, seed: int, *, kinds: tuple[str, ...] = (), teacher: Teacher | None = None, counts: Counter | None = None
) -> list[dict]:
    """The first `count` examples that `generate` would pass to its gates, ungated; fewer where a teacher's answer
    cannot be read, which `counts` collects as `rejected:teacher_format`. Raises ValueError for an unknown kind.
    """
    counts, found = Counter() if counts is None else counts, []
    for kind, key in islice(_stream(seed, _shares(kinds), teacher, ahead=count), count):
        example, gate, _ = _attempt(kind, key, teacher)
        counts[f"rejected:{gate}"] += bool(gate)
        found += [] if gate else [with_system(example)]
    return found


def _shares(kinds: tuple[str, ...]) -> dict[str, float]:
    if unknown := set(kinds) - set(drafts.KINDS):
        raise ValueError(f"unknown kind {min(unknown)!r}; choose of {', '.join(drafts.KINDS)}")
    return {name: share for name, (_, share) in drafts.KINDS.items() if not kinds or name in kinds}


def _stream(
    seed: int, shares: dict[str, float], teacher: Teacher | None, *, ahead: int = AHEAD
) -> Iterator[tuple[str, str]]:
    """Kind and seed of one example after another, without end; a teacher who can is asked `ahead` of them at once."""
    rng, number = random.Random(f"kinds-{seed}"), 0
    while True:
        drawn = [rng.choices(list(shares), list(shares.values()))[0] for _ in range(ahead)]
        pairs = [(kind, f"{seed}-{number + i}") for i, kind in enumerate(drawn)]
        number += ahead
        if hasattr(teacher, "ahead"):
            drafted = [(_draft(*pair), _prompt(pair[1])) for pair in pairs]
            teacher.ahead([_question(e, prompt) for e, prompt in drafted if e["calls"]], progress=teacher.__name__)
        yield from pairs


def _accepted(
    count: int, stream: Iterator[tuple[str, str]], teacher: Teacher | None, row: dict[str, Gate], counts: Counter
) -> Iterator[dict]:
    failed: dict[str, Counter] = {kind: Counter() for kind in drafts.KINDS}
    accepted = 0
    while accepted < count:
        kind, key = next(stream)
        example = refine(kind, key, teacher=teacher, row=row, counts=counts)
        if isinstance(example, str):
            failed[kind][example] += 1
            if failed[kind].total() >= PATIENCE:
                raise ValueError(
                    f"no example survives: {failed[kind].total()} of {kind} in a row were rejected, most by the gate "
                    f"{failed[kind].most_common(1)[0][0]!r}; accepted so far {accepted} of {count}"
                )
            continue
        failed[kind].clear()
        accepted += 1
        counts["accepted"] += 1
        yield with_system(example)


def refine(
    kind: str,
    seed: str,
    *,
    row: dict[str, Gate],
    counts: Counter,
    teacher: Teacher | None = None,
    rounds: int = 2,
) -> dict | str:
    """One accepted example, or the name of the gate that rejected the last of 1 + `rounds` attempts."""
    content, last, reason = 0, "", ""
    for wording in range(1 + rounds):
        example, gate, why = _attempt(kind, seed, teacher, draws=(content, wording), reason=reason)
        if not gate:
            gate, why = gates.verdict(example, row)
        if not gate:
            counts.update({"refined": 1, f"refined:{last}": 1} if last else {})
            return example
        last, reason = gate, why
        counts[f"rejected:{gate}"] += 1
        content += gate in ("schema_validity", "execution", "overlap")  # other words cannot mend these
    counts["abandoned"] += 1
    return last


def _attempt(
    kind: str, seed: str, teacher: Teacher | None, *, draws: tuple[int, int] = (0, 0), reason: str = ""
) -> tuple[dict, str, str]:
    """An ungated example, and ("teacher_format", reason) when the teacher's answer cannot be read, else two ""."""
    example = _draft(kind, seed, *draws)
    if teacher is None or not example["calls"]:
        return example, "", ""
    return example, *_retell(example, teacher, _prompt(seed, draws[1]), reason)


def _draft(kind: str, seed: str, content: int = 0, wording: int = 0) -> dict:
    generators = random.Random(f"{seed}-content-{content}"), random.Random(f"{seed}-wording-{wording}")
    return drafts.KINDS[kind][0](*generators) | {"source": "templates"}


def _prompt(seed: str, wording: int = 0) -> str:
    return PROMPTS[random.Random(f"{seed}-prompt-{wording}").randrange(len(PROMPTS))]


def _question(example: dict, prompt: str, reason: str = "") -> list[dict]:
    why = f"Your last answer was refused because {reason}." if reason else ""
    asked = packaged_text.read("prompts", prompt).format(request=example["messages"][0]["content"], reason=why)
    return [{"role": "user", "content": asked}]


def _retell(example: dict, teacher: Teacher, prompt: str, reason: str) -> tuple[str, str]:
    """Put the teacher's wording into the example; ("teacher_format", reason) when its answer cannot be read."""
    answer = teacher(_question(example, prompt, reason))
    found = re.search(r"\{.*?\}", answer, re.DOTALL)
    try:
        told = json.loads(found.group())["request"]
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError):
        return "teacher_format", f"it was not a JSON object with a request: {answer[:80]!r}"
    if not isinstance(told, str):
        return "teacher_format", "the request was not a text"
    example["messages"][0]["content"] = " ".join(told.split())
    example["source"] = f"teacher:{prompt.removesuffix('.txt')}"
    return "", ""


def write(
    path: Path | str,
    *,
    count: int,
    seed: int,
    kinds: tuple[str, ...] = (),
    teacher: Teacher | None = None,
    sets: list[EvaluationSet] | None = None,
) -> dict:
    """Generate into the folder `path`: `<kind>.jsonl` files and the data card README.md; returns the report.

    Nothing is replaced before every example is there. Report: `counts` (gates), `diversity`, `evaluation` (name ->
    sha256 of what the overlap gate compared with), `files` (name -> sha256, bytes, examples).
    """
    sets = gates.evaluation_sets() if sets is None else sets
    counts: Counter = Counter()
    made = list(generate(count, seed, kinds=kinds, teacher=teacher, row=gates.standard(sets), counts=counts))
    files = example_files.store(path, made)
    report = {
        "count": count,
        "seed": seed,
        "kinds": list(kinds),
        "python": platform.python_version(),
        "teacher": "none" if teacher is None else getattr(teacher, "__name__", "teacher"),
        "counts": dict(sorted(counts.items())),
        "diversity": variety.report(made),
        "evaluation": {known.name: known.sha256 for known in sets},
        "files": files,
    }
    write_atomically(Path(path) / "README.md", example_files.card(report))
    return report
