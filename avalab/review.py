"""People look at samples of a data set: accept, reject or edit, and how much of the set they would accept.

1. `sample` draws examples at random, so that their acceptance rate estimates that of the whole set.
2. `form` shows one after another, in JupyterLab; a click stores a verdict under the example's hash and shows the next.
   Without a front end it renders as text and waits for nobody.
3. Verdicts stand beside the data in `review/verdicts.jsonl`. The file is rewritten whole and renamed at every click: a
   crash loses nothing, and who opens the form again goes on with what has no verdict. A second verdict on the same
   example replaces the first.
4. `acceptance` is the share accepted as it stood, with Wilson's score interval (1927): an edit counts as a rejection.
   `apply` drops what was rejected and puts edits in; an edit has to pass the gates before it is stored.

What it does not do: measure whether two people agree, or change the data files.
"""

from __future__ import annotations

import html
import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import ipywidgets

from avalab import example_files, gates, statistics
from avalab.artifacts import sha256_of_text
from avalab.experiment import write_atomically
from avalab.gates import Gate
from avalab.statistics import Estimate

VERDICTS = ("accept", "reject", "edit")
FIELDS = ("key", "verdict", "request", "note", "when")


def verdicts_path(data: Path | str) -> Path:
    """Where the verdicts on a data set (its folder, or one of its files) are kept."""
    data = Path(data)
    return (data if data.is_dir() or not data.suffix else data.parent) / "review" / "verdicts.jsonl"


def key(example: dict) -> str:
    """The identity of an example: the hash of its line in a data file."""
    return sha256_of_text(json.dumps(example_files.without_system(example), sort_keys=True))[:16]


def sample(examples: Sequence[dict], count: int, seed: int) -> list[dict]:
    """`count` of the examples at random (all, in random order, when there are fewer); equal seeds, equal samples."""
    return random.Random(f"review-{seed}").sample(list(examples), min(count, len(examples)))


def load(path: Path) -> dict[str, dict]:
    """Verdicts by example key, as `{"key", "verdict", "request", "note", "when"}`; none where there is no file.

    Raises ValueError naming file and line for a line that is no verdict.
    """
    rows = {}
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if row["verdict"] not in VERDICTS or set(row) != set(FIELDS):
                raise ValueError(f"verdict {row['verdict']!r} with fields {', '.join(row)}")
        except (ValueError, KeyError, TypeError) as error:  # a JSON error is a ValueError
            allowed = f"a verdict is one of {', '.join(VERDICTS)}, with the fields {', '.join(FIELDS)}"
            raise ValueError(f"{path}:{number}: {error}; {allowed}") from error
        rows[row["key"]] = row
    return rows


def store(
    path: Path, example: dict, verdict: str, *, request: str = "", note: str = "", row: dict[str, Gate] | None = None
) -> dict[str, dict]:
    """Add a verdict on an example, atomically; returns all verdicts. `request` is the wording in the form.

    An edit is checked by the gates of `row` (default: those that remember nothing). Raises ValueError for an unknown
    verdict, an edit that changes nothing or that a gate rejects, and a changed request that was not meant as an edit.
    """
    if verdict not in VERDICTS:
        raise ValueError(f"unknown verdict {verdict!r}; choose one of {', '.join(VERDICTS)}")
    request = " ".join(request.split())
    changed = request not in ("", " ".join(example["messages"][-2]["content"].split()))
    if changed != (verdict == "edit"):
        found = "the request was changed" if changed else "the edit changes nothing"
        raise ValueError(f"{found}; {'edit' if changed else 'accept or reject'} the example, or change its request")
    if changed:
        _refuse_rejected(edited(example, request), gates.STANDARD if row is None else row)
    line = dict(zip(FIELDS, (key(example), verdict, request if changed else "", note, _now()), strict=True))
    verdicts = {**load(path), line["key"]: line}
    write_atomically(path, "".join(json.dumps(each) + "\n" for each in verdicts.values()))
    return verdicts


def _refuse_rejected(example: dict, row: dict[str, Gate]) -> None:
    gate, reason = gates.verdict(example, row)
    if gate:
        raise ValueError(f"the edit does not pass the gate {gate}: {reason}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def edited(example: dict, request: str) -> dict:
    """The example with another request; tools, calls and answer stay."""
    *before, asked, answer = example["messages"]
    return {**example, "messages": [*before, {**asked, "content": request}, answer], "source": "edited"}


def pending(examples: Sequence[dict], verdicts: dict[str, dict]) -> list[dict]:
    """The examples that have no verdict yet, in their order."""
    return [example for example in examples if key(example) not in verdicts]


def acceptance(examples: Sequence[dict], verdicts: dict[str, dict]) -> Estimate | None:
    """The share of the judged examples that was accepted as it stood, with its interval; None before any verdict."""
    judged = [verdicts[k]["verdict"] for k in map(key, examples) if k in verdicts]
    return statistics.wilson(judged.count("accept"), len(judged)) if judged else None


def apply(examples: Sequence[dict], verdicts: dict[str, dict]) -> list[dict]:
    """The examples without the rejected ones and with edited requests; those without a verdict stay as they are."""
    kept = []
    for example in examples:
        row = verdicts.get(key(example), {"verdict": "accept"})
        if row["verdict"] != "reject":
            kept.append(edited(example, row["request"]) if row["verdict"] == "edit" else example)
    return kept


def summary(examples: Sequence[dict], verdicts: dict[str, dict]) -> str:
    """`12 of 30 judged: 10 accepted, 1 rejected, 1 edited; accepted as it stood 83 [55, 95] %`."""
    judged = [verdicts[k]["verdict"] for k in map(key, examples) if k in verdicts]
    text = f"{len(judged)} of {len(examples)} judged"
    share = acceptance(examples, verdicts)
    if share is None:
        return text
    counts = ", ".join(f"{judged.count(v)} {v.rstrip('e')}ed" for v in VERDICTS)
    return f"{text}: {counts}; accepted as it stood {share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"


def shown(example: dict) -> str:
    """An example as HTML: kind, tools with their parameters, and the answer. The request has a field of its own."""
    tools = "".join(
        f"<li><code>{html.escape(tool['name'])}({html.escape(', '.join(tool['parameters'].get('properties', {})))})"
        f"</code> {html.escape(tool.get('description', ''))}</li>"
        for tool in example["tools"]
    )
    answer = html.escape(example["messages"][-1]["content"])
    return f"<b>{html.escape(example['kind'])}</b><ul>{tools}</ul><pre style='white-space:pre-wrap'>{answer}</pre>"


def form(examples: Sequence[dict], path: Path, row: dict[str, Gate] | None = None) -> ipywidgets.VBox:
    """A form that goes through the examples without a verdict; each click stores one in `path`. It never blocks."""
    about, said = ipywidgets.HTML(), ipywidgets.HTML()
    request = ipywidgets.Textarea(description="request", layout=ipywidgets.Layout(width="95%", height="5em"))
    note = ipywidgets.Text(description="note", placeholder="why", layout=ipywidgets.Layout(width="95%"))
    buttons = {ipywidgets.Button(description=verdict.capitalize()): verdict for verdict in VERDICTS}
    current: list[dict] = []  # what is shown; none at the end

    def show() -> None:
        verdicts = load(path)
        current[:] = pending(examples, verdicts)[:1]
        about.value = shown(current[0]) if current else "<i>Every example has a verdict.</i>"
        request.value, note.value = current[0]["messages"][-2]["content"] if current else "", ""
        said.value = summary(examples, verdicts)
        for button in buttons:
            button.disabled = not current

    def clicked(button: ipywidgets.Button) -> None:
        try:
            for example in pending(current, load(path)):  # none when another form was quicker
                store(path, example, buttons[button], request=request.value, note=note.value, row=row)
            show()
        except ValueError as error:  # what was typed stays
            said.value = html.escape(str(error))

    for button in buttons:
        button.on_click(clicked)
    show()
    return ipywidgets.VBox([about, request, note, ipywidgets.HBox(list(buttons)), said])
