"""Synthetic examples for an assistant that calls functions: draft, refine, gate, write.

1. Draw a kind by its share and let `drafts` make an example from two seeds, one for the content, one for the wording.
2. With a teacher (`teachers`), have it say the request in other words: its prompts stand in `prompts/`, in turn a
   template, few-shot and role play. The calls stay ours, so that the gates can check what it says against them.
3. Pass the gates. A rejected example goes back with the reason, at most `rounds` times: wording is drawn again (or
   asked for again, the reason in the prompt); where schema, execution or overlap failed, the content is, too.
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
from pathlib import Path

from avalab import drafts, gates, phrasing, toolbox
from avalab.artifacts import sha256_of
from avalab.experiment import write_atomically
from avalab.gates import EvaluationSet, Gate

FIELDS = ("kind", "tools", "messages", "calls")
PROMPTS = ("template.txt", "few_shot.txt", "role_play.txt")
PATIENCE = 300  # examples rejected in a row before the generator gives up
JSON_PROMPT = "Reply with one JSON object, and nothing else, that satisfies this JSON schema:\n"
CARD = """# Synthetic function-calling examples

Made by `avalab.synthesize`, without a model unless a teacher is named: tools from the standard library's callables and
hand-designed everyday domains (`avalab/domains`), arguments drawn by type, requests phrased by templates, and every
example checked by the gates of `avalab.gates`. Names, addresses and figures are invented.

A line is `kind`, `tools`, `messages` (user, assistant), `calls`, `source`; `avalab.synthesize.load` adds the system
message. Licence: that of this project. Limits: English only; template wording is more regular than people's; a grounded
value is said in the request, but not proven to belong to its parameter."""
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
    hand). `counts` collects `accepted`, `refined` and `rejected:<gate>`. Raises ValueError for an unknown kind, and
    where PATIENCE examples in a row fail, naming the gate that rejected most.
    """
    if unknown := set(kinds) - set(drafts.KINDS):
        raise ValueError(f"unknown kind {min(unknown)!r}; choose of {', '.join(drafts.KINDS)}")
    chosen = {name: share for name, (_, share) in drafts.KINDS.items() if not kinds or name in kinds}
    row = gates.standard(gates.evaluation_sets()) if row is None else row
    return _accepted(count, seed, chosen, teacher, row, Counter() if counts is None else counts)


def _accepted(
    count: int, seed: int, shares: dict[str, float], teacher: Teacher | None, row: dict[str, Gate], counts: Counter
) -> Iterator[dict]:
    rng, failed, accepted, number = random.Random(f"kinds-{seed}"), Counter(), 0, 0
    while accepted < count:
        (kind,) = rng.choices(list(shares), list(shares.values()))
        example, number = refine(kind, f"{seed}-{number}", teacher=teacher, row=row, counts=counts), number + 1
        if isinstance(example, str):
            failed[example] += 1
            if failed.total() >= PATIENCE:
                raise ValueError(
                    f"no example survives: {failed.total()} in a row were rejected, most by the gate "
                    f"{failed.most_common(1)[0][0]!r}; accepted so far {accepted} of {count}"
                )
            continue
        failed.clear()
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
    content, gate, reason = 0, "", ""
    for attempt in range(1 + rounds):
        draw = [random.Random(f"{seed}-content-{content}"), random.Random(f"{seed}-wording-{attempt}")]
        example = drafts.KINDS[kind][0](*draw) | {"source": "templates"}
        if teacher is not None and example["calls"]:
            gate, reason = _retell(example, teacher, PROMPTS[draw[1].randrange(len(PROMPTS))], reason)
        else:
            gate = ""
        if not gate:
            gate, reason = gates.verdict(example, row)
        if not gate:
            counts["refined"] += attempt > 0
            return example
        counts[f"rejected:{gate}"] += 1
        content += gate in ("schema_validity", "execution", "overlap")  # other words cannot mend these
    return gate


def _retell(example: dict, teacher: Teacher, prompt: str, reason: str) -> tuple[str, str]:
    """Put the teacher's wording into the example; ("teacher_format", reason) when its answer cannot be read."""
    request = example["messages"][0]["content"]
    why = f"Your last answer was refused because {reason}." if reason else ""
    asked = phrasing.read("prompts", prompt).format(request=request, reason=why)
    answer = teacher([{"role": "user", "content": asked}])
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


def with_system(example: dict) -> dict:
    """The example with its system message, which follows from its tools and kind; unchanged when it has one."""
    messages = example["messages"]
    if messages[0]["role"] == "system" or not example["tools"]:
        return example
    content = toolbox.system_prompt(example["tools"])
    if example["kind"] == "structured_output":
        content = JSON_PROMPT + json.dumps(gates.checked_schema(example["tools"][0]), ensure_ascii=False)
    return {**example, "messages": [{"role": "system", "content": content}, *messages]}


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
    files = store(path, made)
    report = {
        "count": count,
        "seed": seed,
        "python": platform.python_version(),
        "teacher": "none" if teacher is None else getattr(teacher, "__name__", "teacher"),
        "counts": dict(sorted(counts.items())),
        "diversity": gates.diversity(made),
        "evaluation": {known.name: known.sha256 for known in sets},
        "files": files,
    }
    write_atomically(Path(path) / "README.md", card(report))
    return report


def store(path: Path | str, examples: list[dict]) -> dict[str, dict]:
    """Write `<kind>.jsonl` files into the folder `path`; returns name -> sha256, bytes, examples of each."""
    folder, files = Path(path), {}
    for kind in sorted({example["kind"] for example in examples}):
        rows = [_stored(example) for example in examples if example["kind"] == kind]
        file = folder / f"{kind}.jsonl"
        write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        files[file.name] = {"sha256": sha256_of(file), "bytes": file.stat().st_size, "examples": len(rows)}
    return files


def _stored(example: dict) -> dict:
    return {**example, "messages": [m for m in example["messages"] if m["role"] != "system"]}


def load(path: Path | str) -> list[dict]:
    """The examples of a JSONL file, or of every one in a folder (by name), with their system messages.

    Raises ValueError naming file and line for a line that is not JSON, misses a field or holds an invalid schema;
    FileNotFoundError where there is no such file.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} holds no .jsonl file")
    return [example for file in files for example in _read(file)]


def _read(file: Path) -> Iterator[dict]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not JSON ({error})") from error
        missing = [field for field in FIELDS if not isinstance(example, dict) or field not in example]
        if missing or not example["messages"]:
            raise ValueError(f"{file}:{number}: no field {', '.join(missing or ['messages'])}")
        try:
            for tool in example["tools"]:
                gates.checked_schema(tool)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from error
        yield with_system(example)


def card(report: dict) -> str:
    """The data card in Markdown."""
    rows = [f"| `{name}` | {f['examples']} | {f['bytes']} | `{f['sha256']}` |" for name, f in report["files"].items()]
    tested = [f"| {name} | `{digest}` |" for name, digest in report["evaluation"].items()]
    gate_rows = [f"| {name} | {number} |" for name, number in report["counts"].items()]
    spread = [
        f"| {name.replace('_', ' ')} | {value} |" for name, value in report["diversity"].items() if name != "kinds"
    ]
    return "\n".join(
        [
            *CARD.splitlines(),
            "",
            f"Made again with `synthesize.write(folder, count={report['count']}, seed={report['seed']})` on Python "
            f"{report['python']}; teacher: {report['teacher']}.",
            "",
            *["| file | examples | bytes | sha256 |", "|---|---|---|---|", *rows, ""],
            *["| gate | examples |", "|---|---|", *gate_rows, ""],
            *["| diversity | |", "|---|---|", *spread, ""],
            "No function name and no run of eight words is in these evaluation sets (SHA-256 of what was compared).",
            "",
            *["| evaluation set | sha256 |", "|---|---|", *tested, ""],
        ]
    )
