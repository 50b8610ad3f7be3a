"""Synthetic examples for an assistant that calls functions: drafted, refined, gated, written to files, read back.

1. Draw a kind by its share and let `drafts` make an example from two seeds, one for the content, one for the wording.
   With a source (`sources`) the tools are real ones, and the drafts those of its recipes.
2. With a teacher (`teachers`), have it say the request in other words (prompts in turn: a template, few-shot and role
   play; of a source, its title and values as a sentence). The calls stay ours, so that the gates can check what it
   says against them; a teacher that can call is asked the finished request afresh, and has to make the same calls.
3. Pass the gates. A rejected example goes back with the reason, at most `rounds` times: wording is drawn again (or
   asked for again, the reason in the prompt); where schema, execution or overlap failed, the content is, too.
4. `write_examples` stores one JSONL file a kind and a data card. A line is `kind`, `tools`, `messages` (a request and
   an answer), `calls` and `source`; `load_examples` also reads OpenAI's form, and adds the tools to the system message.

The same count, seed and kinds give the same bytes (docstrings belong to the running Python; the card names it).

A model's own answers become examples, too, where they can be verified: `select_answers` keeps those that pass the
gates, without knowing the right answer; `precision` says how far that can be trusted where the right calls are known.
Source: rejection sampling of a model's own answers, Zelikman et al., "STaR" (2022); Yuan et al. (2023).
"""

from __future__ import annotations

import json
import platform
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import jinja2

from avalab.data import calls, chats, drafts, gates, repeats, sources, toolbox
from avalab.data.arguments import read_packaged
from avalab.data.calls import Call, Case
from avalab.data.gates import Gate
from avalab.data.repeats import EvaluationSet
from avalab.data.sources import recipes, teaching
from avalab.lab import artifacts, statistics
from avalab.lab.artifacts import sha256_of
from avalab.lab.errors import InputError, MissingFile
from avalab.lab.run import write_atomically
from avalab.lab.statistics import Estimate

Teacher = Callable[[list[dict]], str]

PATIENCE = 300  # examples of a kind rejected in a row before the generator gives up

SOURCE_AHEAD = 16  # of a source, whose finished requests are asked again

AHEAD = 64  # first attempts that a teacher who can answers in one go

PROMPTS = ("template.txt", "few_shot.txt", "role_play.txt")

SOURCE_PROMPTS = ("title_to_request.txt",)  # of terse titles

REWORDING = {  # the form of a teacher's answer, for teachers that can be held to one
    "type": "object",
    "properties": {"request": {"type": "string", "maxLength": 240}},
    "required": ["request"],
    "additionalProperties": False,
}

ALL_KINDS = tuple(dict.fromkeys([*drafts.KINDS, *recipes.SHARES]))

MAKER = "Made by `avalab.data.synthesize`"  # what the data card says

JSON_PROMPT = "Reply with one JSON object, and nothing else, that satisfies this JSON schema:\n"


def generate(
    count: int,
    seed: int,
    *,
    kinds: tuple[str, ...] = (),
    teacher: Teacher | None = None,
    row: dict[str, Gate] | None = None,
    counts: Counter | None = None,
    source: str = "",
) -> Iterator[dict]:
    """`count` accepted examples: `{"kind", "tools", "messages" (system, user, assistant), "calls", "source"}`.

    `kinds` empty means all in their shares, of the templates or of a `source`; `row` is the row of gates (default: all,
    against every evaluation set at hand). `counts` collects `accepted`, `rejected:<gate>`, `refined` (accepted after a
    rejection; `refined:<gate>` by the last gate that had rejected) and `abandoned`. Raises ValueError for an unknown
    kind, and where PATIENCE examples of a kind in a row fail, naming the gate that rejected most.
    """
    shares = _shares(kinds, source)
    row = gates.standard_gates(repeats.evaluation_sets()) if row is None else row
    if source and hasattr(teacher, "calls_ahead"):
        last = {name: row[name] for name in ("diversity", "near_duplicates") if name in row}  # they remember
        first = {name: gate for name, gate in row.items() if name not in last}
        row = {**first, "agreement": teaching.agreement_gate(teacher), **last}
    counts = Counter() if counts is None else counts
    counts.update({f"rejected:{gate}": 0 for gate in row})  # a gate that rejects nothing is seen, too
    stream = _stream(seed, shares, teacher, ahead=SOURCE_AHEAD if source else AHEAD, source=source)
    return _accepted(count, stream, teacher, row, counts, source)


def candidates(
    count: int, seed: int, *, kinds: tuple[str, ...] = (), teacher: Teacher | None = None, counts: Counter | None = None
) -> list[dict]:
    """The first `count` drafts that `generate` passes to its gates; fewer where a teacher's answer cannot be read.

    `counts` collects those as `rejected:teacher_format`. Raises ValueError for an unknown kind.
    """
    counts, found = Counter() if counts is None else counts, []
    for kind, key in islice(_stream(seed, _shares(kinds, ""), teacher, ahead=count), count):
        example, gate, _ = _attempt(kind, key, teacher)
        counts[f"rejected:{gate}"] += bool(gate)
        found += [] if gate else [with_system(example)]
    return found


def _drafts(source: str) -> dict[str, tuple[Callable, float]]:
    """The drafts of a source, or without one of the templates."""
    return recipes.kinds_of(source) if source else drafts.KINDS


def _shares(kinds: tuple[str, ...], source: str) -> dict[str, float]:
    table = _drafts(source)
    if unknown := set(kinds) - set(table):
        raise InputError(f"unknown kind {min(unknown)!r}{source and f' of {source}'}; choose of {', '.join(table)}")
    return {name: share for name, (_, share) in table.items() if not kinds or name in kinds}


def _stream(
    seed: int, shares: dict[str, float], teacher: Teacher | None, *, ahead: int = AHEAD, source: str = ""
) -> Iterator[tuple[str, str]]:
    """Kind and seed of one example after another, without end; a teacher who can is asked `ahead` of them at once."""
    rng, number = random.Random(f"kinds-{seed}"), 0
    while True:
        drawn = [rng.choices(list(shares), list(shares.values()))[0] for _ in range(ahead)]
        pairs = [(kind, f"{seed}-{number + i}") for i, kind in enumerate(drawn)]
        number += ahead
        if hasattr(teacher, "ahead"):
            drafted = [(key, _draft(kind, key, source=source)) for kind, key in pairs]
            asked = [_question(example, key)[1] for key, example in drafted if _reworded(example)]
            teacher.ahead(asked, progress=teacher.__name__)
        if source and hasattr(teacher, "calls_ahead"):
            tried = [_attempt(kind, key, teacher, source=source) for kind, key in pairs]
            sound = [e for e, gate, _ in tried if not gate and gates.verdict(e, gates.STANDARD) == ("", "")]
            teacher.calls_ahead(
                [e for e in sound if teaching.asked(e)], progress=f"{getattr(teacher, '__name__', 'teacher')} agrees"
            )
        yield from pairs


def _accepted(
    count: int,
    stream: Iterator[tuple[str, str]],
    teacher: Teacher | None,
    row: dict[str, Gate],
    counts: Counter,
    source: str,
) -> Iterator[dict]:
    failed: dict[str, Counter] = {kind: Counter() for kind in _drafts(source)}
    accepted = 0
    while accepted < count:
        kind, key = next(stream)
        example = refine(kind, key, teacher=teacher, row=row, counts=counts, source=source)
        if not isinstance(example, str):
            failed[kind].clear()
            accepted += 1
            counts["accepted"] += 1
            yield with_system(example)
            continue
        failed[kind][example] += 1
        if failed[kind].total() >= PATIENCE:
            raise InputError(
                f"no example survives: {failed[kind].total()} of {kind} in a row were rejected, most by the gate "
                f"{failed[kind].most_common(1)[0][0]!r}; accepted so far {accepted} of {count}"
            )


def refine(
    kind: str,
    seed: str,
    *,
    row: dict[str, Gate],
    counts: Counter,
    teacher: Teacher | None = None,
    rounds: int = 2,
    source: str = "",
) -> dict | str:
    """One accepted example, or the name of the gate that rejected the last of 1 + `rounds` attempts."""
    content, last, reason = 0, "", ""
    for wording in range(1 + rounds):
        example, gate, why = _attempt(kind, seed, teacher, draws=(content, wording), reason=reason, source=source)
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
    kind: str,
    seed: str,
    teacher: Teacher | None,
    *,
    draws: tuple[int, int] = (0, 0),
    reason: str = "",
    source: str = "",
) -> tuple[dict, str, str]:
    """An ungated example, and ("teacher_format", reason) when the teacher's answer cannot be read, else two ""."""
    example = _draft(kind, seed, *draws, source=source)
    if teacher is None or not _reworded(example):
        return example, "", ""
    prompt, question = _question(example, seed, draws[1], reason)
    answer = teacher(question)
    found = re.search(r"\{.*?\}", answer, re.DOTALL)
    try:
        told = json.loads(found.group())["request"]
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError):
        return example, "teacher_format", f"it was not a JSON object with a request: {answer[:80]!r}"
    if not isinstance(told, str):
        return example, "teacher_format", "the request was not a text"
    example["messages"][0]["content"] = " ".join(told.split())
    example["source"] = f"{source or 'teacher'}:{prompt.removesuffix('.txt')}"
    return example, "", ""


def _reworded(example: dict) -> bool:
    """Whether a teacher has to say the request: of templates what is called, of sources what is a title and values."""
    return "terse" in example["source"] or (example["source"] == "templates" and bool(example["calls"]))


def _draft(kind: str, seed: str, content: int = 0, wording: int = 0, source: str = "") -> dict:
    generators = random.Random(f"{seed}-content-{content}"), random.Random(f"{seed}-wording-{wording}")
    made = _drafts(source)[kind][0](*generators)
    terse = "sentence" if made.pop("says_all", True) else "terse"
    return made | {"source": f"{source}:{terse}" if source else "templates"}


def _question(example: dict, seed: str, wording: int = 0, reason: str = "") -> tuple[str, list[dict]]:
    """The prompt's name, and the question to the teacher."""
    prompts = PROMPTS if example["source"] == "templates" else SOURCE_PROMPTS
    prompt = prompts[random.Random(f"{seed}-prompt-{wording}").randrange(len(prompts))]
    why = f"Your last answer was refused because {reason}." if reason else ""
    asked = read_packaged("prompts", prompt).format(request=example["messages"][0]["content"], reason=why)
    return prompt, [{"role": "user", "content": asked}]


def write_examples(
    path: Path | str,
    *,
    count: int,
    seed: int,
    kinds: tuple[str, ...] = (),
    teacher: Teacher | None = None,
    sets: list[EvaluationSet] | None = None,
    replace: bool = False,
    source: str = "",
) -> dict:
    """Generate into the folder `path`: `<kind>.jsonl` files and the data card README.md; returns the report.

    Nothing is replaced before every example is there, and without `replace` nothing that an older set's card does not
    list as it is: that raises ValueError at once. Report: `counts` (gates), `diversity`, `evaluation` (name ->
    sha256 of what the overlap gate compared with), `files` (name -> sha256, bytes, examples).
    """
    if not replace:
        artifacts.refuse_foreign(Path(path), [f"{kind}.jsonl" for kind in ALL_KINDS], made_by=MAKER)
    sets = repeats.evaluation_sets() if sets is None else sets
    counts: Counter = Counter()
    row = gates.standard_gates(sets)
    made = list(generate(count, seed, kinds=kinds, teacher=teacher, row=row, counts=counts, source=source))
    files = store_examples(path, made)
    report = {
        "count": count,
        "seed": seed,
        "kinds": list(kinds),
        "source": source,
        "licence": sources.source(source).licence if source else "",
        "python": platform.python_version(),
        "teacher": "none" if teacher is None else getattr(teacher, "__name__", "teacher"),
        "counts": dict(sorted(counts.items())),
        "diversity": repeats.diversity_report(made),
        "evaluation": {known.name: known.sha256 for known in sets},
        "files": files,
    }
    write_atomically(Path(path) / "README.md", data_card(report))
    return report


# --- files -----------------------------------------------------------------------------------------------------------


def with_system(example: dict) -> dict:
    """The example with its tools in the system message, as its kind has them; unchanged when they stand there."""
    if not example["tools"]:
        return example
    return {**example, "messages": chats.prefaced(example["messages"], _preface(example))}


def _preface(example: dict) -> str:
    if example["kind"] == "structured_output":
        return JSON_PROMPT + json.dumps(gates.checked_schema(example["tools"][0]), ensure_ascii=False)
    return toolbox.system_prompt(example["tools"])


def store_examples(path: Path | str, examples: list[dict]) -> dict[str, dict]:
    """Write `<kind>.jsonl` files into the folder `path`; returns name -> sha256, bytes, examples of each.

    Files of kinds that are not among the examples are of an older set: they are removed at the end.
    """
    folder, files = Path(path), {}
    for kind in sorted({example["kind"] for example in examples}):
        rows = [without_system(example) for example in examples if example["kind"] == kind]
        file = folder / f"{kind}.jsonl"
        write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        files[file.name] = {"sha256": sha256_of(file), "bytes": file.stat().st_size, "examples": len(rows)}
    for kind in ALL_KINDS:
        if f"{kind}.jsonl" not in files:
            (folder / f"{kind}.jsonl").unlink(missing_ok=True)
    return files


def without_system(example: dict) -> dict:
    """The example as a line of a file holds it."""
    if not example["tools"]:
        return example
    return {**example, "messages": chats.without_preface(example["messages"], _preface(example))}


def load_examples(path: Path | str) -> list[dict]:
    """The examples of a JSONL file, or of every one in a folder (by name), with their tools in the system message.

    A line is in the lab's form or in OpenAI's (`chats.normalised`). Raises ValueError naming file and line for one that
    cannot be kept; FileNotFoundError where there is no such file.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise MissingFile(f"{path} holds no .jsonl file")
    found = []
    for file in files:
        for place, line in chats.json_lines(file):
            try:
                found.append(with_system(_checked(chats.normalised(line), stated="calls" in line)))
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
    if not found:
        raise InputError(f"{path} holds no example; a line is a JSON object with messages")
    return found


def _checked(example: dict, *, stated: bool) -> dict:
    """The example, its calls those of its answer. Raises ValueError for schemas or calls that cannot be right."""
    for tool in example["tools"]:
        gates.checked_schema(tool)
    answers = [message["content"] for message in example["messages"] if message["role"] == "assistant"]
    if (last := example["messages"][-1]["role"]) != "assistant":
        raise InputError(f"the last message is of the role {last}; a chat ends with an assistant's answer")
    if not example["tools"] or example["kind"] == "structured_output" or len(answers) > 1:
        return example
    found = calls.parse_calls(answers[0])
    made = [] if isinstance(found, str) else [{"name": call.name, "arguments": call.arguments} for call in found]
    if stated and example["calls"] and made != example["calls"]:
        raise InputError("the answer's text does not hold the example's calls")
    return {**example, "calls": example["calls"] or made}


def data_card(report: dict) -> str:
    """The data card in Markdown, of the report of `write_examples`."""
    text = read_packaged("prompts", "data_card.txt")
    card = jinja2.Template(text, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return card.render({"source": "", "licence": "", **report, "kinds": tuple(report["kinds"])})


# --- a model's own answers -------------------------------------------------------------------------------------------


def answer_cases(requests: Sequence[dict]) -> list[Case]:
    """Requests (examples or chats with `tools` and `messages`) as cases for a model, without their answers."""
    return [
        Case(str(number), "own_answer", [m for m in request["messages"] if m["role"] == "user"], request["tools"], [])
        for number, request in enumerate(requests)
    ]


def select_answers(
    requests: Sequence[dict], texts: Sequence[str], *, source: str, row: dict[str, Gate], counts: Counter | None = None
) -> list[dict]:
    """The answers to `answer_cases(requests)` that pass the gates of `row`, as examples; `request` is the position.

    `counts` collects `answered`, `accepted`, `rejected:no_call`, `rejected:not_json` and `rejected:<gate>`.
    """
    counts = Counter() if counts is None else counts
    accepted = []
    for case, text in zip(answer_cases(requests), texts, strict=True):
        found = calls.parse_calls(text)
        if isinstance(found, str):
            counts.update(["answered", f"rejected:{found}"])
            continue
        made = [{"name": call.name, "arguments": call.arguments} for call in found]
        example = {
            "kind": "single_call" if len(case.functions) == 1 else "several_candidates",
            "tools": case.functions,
            "messages": [*case.messages, {"role": "assistant", "content": toolbox.call_text(made)}],
            "calls": made,
            "source": source,
            "request": int(case.id),
        }
        gate, _ = gates.verdict(with_system(example), row)
        counts.update(["answered", f"rejected:{gate}" if gate else "accepted"])
        accepted += [] if gate else [with_system(example)]
    return accepted


def precision(accepted: Sequence[dict], requests: Sequence[dict]) -> Estimate:
    """The share of accepted answers whose calls are those of their requests. Raises ValueError for no answer."""
    right = 0
    for example in accepted:
        request = requests[example["request"]]
        case = Case("", "own_answer", [], request["tools"], calls.accepted_calls(request["calls"]))
        right += calls.check_calls(case, [Call(c["name"], c["arguments"]) for c in example["calls"]]).correct
    return statistics.wilson(right, len(accepted))
