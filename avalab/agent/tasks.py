"""Forty written tasks for an agent, five kinds of eight, and how an answer to one is checked.

`data/agent_tasks/tasks.jsonl` holds a task a line: the request, the files of its workspace, the check and the calls of
a solution. The documents are the four pages of `data/agent_tasks/handbook`. A check is a number that has to stand in
the answer (within a tolerance), one of some texts, or one of them in a file that the agent has to write.

A solution is no part of what the model sees: a test runs it and finds that its results answer the task.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from avalab.agent import toolkit
from avalab.agent.loop import Limits, Outcome, work_on
from avalab.agent.retrieval.index import Index
from avalab.agent.speaker import Speaker
from avalab.data.chats import json_lines
from avalab.lab import statistics
from avalab.lab.errors import InputError
from avalab.lab.run import ROOT, Run, load_average

FOLDER = ROOT / "data" / "agent_tasks"

KINDS = ("sums", "dates", "units", "files", "documents")

NEEDED = {  # tools of each kind; all of them are on offer with `distractors`
    "sums": ("calculate",),
    "dates": ("days_between", "add_days", "weekday", "calculate"),
    "units": ("convert_units", "calculate"),
    "files": ("list_files", "read_file", "write_file", "calculate"),
    "documents": ("search_documents", "calculate"),
}

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Task:
    """A request, the files it is about, its check, and the calls of one solution."""

    id: str
    kind: str
    task: str
    files: dict[str, str]
    check: dict
    solution: list[dict]


@dataclass(frozen=True)
class Judged:
    """A task, how the agent ended, and whether that is right."""

    task: Task
    outcome: Outcome
    right: bool


def tasks(path: Path = FOLDER / "tasks.jsonl", *, limit: int | None = None) -> list[Task]:
    """The tasks of a file, kinds in turn, so that the first ones are of every kind. Raises InputError for damage."""
    found = []
    for place, row in json_lines(path):
        try:
            found.append(Task(**row))
        except TypeError as error:
            raise InputError(f"{place}: no task ({error})") from error
    order = {kind: [task for task in found if task.kind == kind] for kind in dict.fromkeys(t.kind for t in found)}
    most = max(map(len, order.values()))
    return [of_kind[at] for at in range(most) for of_kind in order.values() if at < len(of_kind)][:limit]


def is_right(task: Task, answer: str, workspace: Path) -> bool:
    """Whether an answer, or the file that was to be written, passes the task's check."""
    check = task.check
    if "file" in check:
        file = workspace / check["file"]
        if not file.is_file():
            return False
        answer = file.read_text(encoding="utf-8", errors="replace")
    if "number" in check:
        said = [float(text.replace(",", "")) for text in _NUMBER.findall(answer)]
        return any(abs(value - check["number"]) <= check["tolerance"] for value in said)
    return any(re.search(rf"(?<!\w){re.escape(text.lower())}(?!\w)", answer.lower()) for text in check["any"])


def tools_for(task: Task, workspace: Path, index: Index, *, distractors: bool = False) -> list[toolkit.Tool]:
    """The tools of the task's kind, or with `distractors` all."""
    every = [
        *toolkit.calculating_tools(),
        *toolkit.file_tools(workspace),
        toolkit.document_tool(index),
    ]
    return [tool for tool in every if distractors or tool.name in NEEDED[task.kind]]


def allow(tool: toolkit.Tool, call: object) -> bool:
    """The confirmation of a task whose workspace is thrown away afterwards."""
    return True


def work(
    chosen: Sequence[Task],
    speaker: Speaker,
    folder: Path,
    *,
    limits: Limits = Limits(),  # noqa: B008  frozen
    distractors: bool = False,
    plan: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> list[Judged]:
    """Let an agent work on tasks, each in a workspace of its own; `folder` keeps the index of the handbook."""
    index, judged = handbook(folder), []
    for task in sorted(
        chosen, key=lambda task: KINDS.index(task.kind)
    ):  # of one kind together: their prompts begin alike
        with tempfile.TemporaryDirectory() as temporary:
            workspace = Path(temporary)
            for name, text in task.files.items():
                (workspace / name).write_text(text, encoding="utf-8")
            tools = tools_for(task, workspace, index, distractors=distractors)
            outcome = work_on(task.task, tools, speaker, limits=limits, plan=plan, confirm=allow, say=say)
            judged.append(Judged(task, outcome, is_right(task, outcome.answer, workspace)))
    index.close()
    return judged


def handbook(folder: Path) -> Index:
    """The index of the handbook, by words: four pages need no vectors."""
    index = Index(folder / "handbook.sqlite")
    index.build(FOLDER / "handbook")
    return index


def direct(chosen: Sequence[Task], speaker: Speaker) -> list[Judged]:
    """The same tasks without any tool: what the model knows by itself. Files and documents are not shown."""
    return [
        replace(judged, right=is_right(judged.task, judged.outcome.answer, Path("/nonexistent")))
        for judged in (Judged(task, work_on(task.task, [], speaker), False) for task in chosen)
    ]


def record(run: Run, subject: str, judged: Sequence[Judged], *, engine: str) -> statistics.Estimate:
    """Append success with its interval, and the steps, tokens and seconds of a task."""
    share = statistics.wilson(sum(each.right for each in judged), len(judged))
    ends = {each.task.id: f"{each.outcome.status}{'' if each.right else ', wrong'}" for each in judged}
    run.record(subject, "task_success", unit="1", engine=engine, details={"ends": ends}, **vars(share))
    means = {
        "steps_per_task": (len(each.outcome.steps) for each in judged),
        "tokens_per_task": (each.outcome.cost.new_tokens for each in judged),
        "seconds_per_task": (each.outcome.seconds for each in judged),
    }
    for metric, values in means.items():
        rows = list(values)
        value = sum(rows) / len(rows)
        run.record(
            subject, metric, value, {"steps": "steps", "tokens": "tokens", "seconds": "s"}[metric.split("_")[0]],
            n=len(rows), engine=engine, details={"load": load_average()}, samples=[float(each) for each in rows],
        )  # fmt: skip
    return share


def text_of(judged: Sequence[Judged]) -> str:
    """One line a task: right or wrong, its calls, its answer."""
    lines = []
    for each in judged:
        calls = json.dumps([step.call.name if step.call else "?" for step in each.outcome.steps])
        lines.append(f"{'right' if each.right else 'wrong'} {each.task.id:12} {calls} {each.outcome.answer[:80]}")
    return "\n".join(lines)
