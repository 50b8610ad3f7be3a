"""Two forms for JupyterLab: people accept, reject or edit examples of a data set, and people score answers.

Review: `sample_examples` draws at random, so that the share accepted as it stood (Wilson's interval, 1927; an edit
counts as a rejection) is that of the whole set. A click stores a verdict under the example's hash in
`review/verdicts.jsonl` beside the data, which is renamed into place: a crash loses nothing, and who opens the form
again goes on. An edit has to pass the gates before it is stored.

Rating: the rater's name of their own choice keeps their scores and decides their order of requests and answers. All
answers to a request are shown side by side as A, B, C, each with a row of buttons for every criterion; nothing is
scored beforehand, and no artefact is named, not even at the end.

Without a front end a form renders as text and waits for nobody.
"""

from __future__ import annotations

import html
import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import ipywidgets

from avalab.data import gates, synthesize
from avalab.data.gates import Gate
from avalab.lab import statistics
from avalab.lab.artifacts import sha256_of_text
from avalab.lab.errors import InputError
from avalab.lab.run import write_atomically
from avalab.measure import people

VERDICTS = ("accept", "reject", "edit")

FIELDS = ("key", "verdict", "request", "note", "when")

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

COLUMN = {"flex": "1 1 18em", "border": "1px solid silver", "padding": "0.5em", "margin": "0.2em"}

WIDE = {"width": "95%"}

# --- verdicts on examples ---


def verdicts_path(data: Path | str) -> Path:
    """Where the verdicts on a data set (its folder, or one of its files) are kept."""
    data = Path(data)
    return (data if data.is_dir() or not data.suffix else data.parent) / "review" / "verdicts.jsonl"


def example_key(example: dict) -> str:
    """The identity of an example: the hash of its line in a data file."""
    return sha256_of_text(json.dumps(synthesize.without_system(example), sort_keys=True))[:16]


def sample_examples(examples: Sequence[dict], count: int, seed: int) -> list[dict]:
    """`count` of the examples at random (all, in random order, when there are fewer); equal seeds, equal samples."""
    return random.Random(f"review-{seed}").sample(list(examples), min(count, len(examples)))


def load_verdicts(path: Path) -> dict[str, dict]:
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
                raise InputError(f"verdict {row['verdict']!r} with fields {', '.join(row)}")
        except (ValueError, KeyError, TypeError) as error:  # a JSON error is a ValueError
            allowed = f"a verdict is one of {', '.join(VERDICTS)}, with the fields {', '.join(FIELDS)}"
            raise InputError(f"{path}:{number}: {error}; {allowed}") from error
        rows[row["key"]] = row
    return rows


def store_verdict(
    path: Path, example: dict, verdict: str, *, request: str = "", note: str = "", row: dict[str, Gate] | None = None
) -> dict[str, dict]:
    """Add a verdict on an example, atomically; returns all verdicts. `request` is the wording in the form.

    An edit is checked by the gates of `row` (default: those that remember nothing). Raises ValueError for an unknown
    verdict, an edit that changes nothing or that a gate rejects, and a changed request that was not meant as an edit.
    """
    if verdict not in VERDICTS:
        raise InputError(f"unknown verdict {verdict!r}; choose one of {', '.join(VERDICTS)}")
    request = " ".join(request.split())
    changed = request not in ("", " ".join(example["messages"][-2]["content"].split()))
    if changed != (verdict == "edit"):
        found = "the request was changed" if changed else "the edit changes nothing"
        raise InputError(f"{found}; {'edit' if changed else 'accept or reject'} the example, or change its request")
    if changed:
        gate, reason = gates.verdict(edited(example, request), gates.STANDARD if row is None else row)
        if gate:
            raise InputError(f"the edit does not pass the gate {gate}: {reason}")
    key, when = example_key(example), datetime.now(UTC).isoformat(timespec="seconds")
    line = {"key": key, "verdict": verdict, "request": request if changed else "", "note": note, "when": when}
    verdicts = {**load_verdicts(path), key: line}
    write_atomically(path, "".join(json.dumps(each) + "\n" for each in verdicts.values()))
    return verdicts


def edited(example: dict, request: str) -> dict:
    """The example with another request; tools, calls and answer stay."""
    *before, asked, answer = example["messages"]
    return {**example, "messages": [*before, {**asked, "content": request}, answer], "source": "edited"}


def pending_examples(examples: Sequence[dict], verdicts: dict[str, dict]) -> list[dict]:
    """The examples that have no verdict yet, in their order."""
    return [example for example in examples if example_key(example) not in verdicts]


def apply_verdicts(examples: Sequence[dict], verdicts: dict[str, dict]) -> list[dict]:
    """The examples without the rejected ones and with edited requests; those without a verdict stay as they are."""
    kept = []
    for example in examples:
        row = verdicts.get(example_key(example), {"verdict": "accept"})
        if row["verdict"] != "reject":
            kept.append(edited(example, row["request"]) if row["verdict"] == "edit" else example)
    return kept


def verdicts_summary(examples: Sequence[dict], verdicts: dict[str, dict]) -> str:
    """`12 of 30 judged: 10 accepted, 1 rejected, 1 edited; accepted as it stood 83 [55, 95] %`."""
    judged = [verdicts[key]["verdict"] for key in map(example_key, examples) if key in verdicts]
    text = f"{len(judged)} of {len(examples)} judged"
    if not judged:
        return text
    counts = ", ".join(f"{judged.count(v)} {v.rstrip('e')}ed" for v in VERDICTS)
    share = statistics.wilson(judged.count("accept"), len(judged))
    return f"{text}: {counts}; accepted as it stood {share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"


# --- the form of a review ---


def tools_html(tools: Sequence[dict]) -> str:
    """Tools with their parameters as list items; everything is escaped."""
    return "".join(
        f"<li><code>{html.escape(tool['name'])}({html.escape(', '.join(tool['parameters'].get('properties', {})))})"
        f"</code> {html.escape(tool.get('description', ''))}</li>"
        for tool in tools
    )


def review_form(examples: Sequence[dict], path: Path, row: dict[str, Gate] | None = None) -> ipywidgets.VBox:
    """A form that goes through the examples without a verdict; each click stores one in `path`. It never blocks."""
    about, said = ipywidgets.HTML(), ipywidgets.HTML()
    request = ipywidgets.Textarea(description="request", layout={**WIDE, "height": "5em"})
    note = ipywidgets.Text(description="note", placeholder="why", layout=WIDE)
    buttons = {ipywidgets.Button(description=verdict.capitalize()): verdict for verdict in VERDICTS}
    current: list[dict] = []  # what is shown; none at the end

    def show() -> None:
        verdicts = load_verdicts(path)
        current[:] = pending_examples(examples, verdicts)[:1]
        about.value, request.value, note.value = "<i>Every example has a verdict.</i>", "", ""
        for example in current:
            answer = html.escape(example["messages"][-1]["content"])
            offered = f"<b>{html.escape(example['kind'])}</b><ul>{tools_html(example['tools'])}</ul>"
            about.value = f"{offered}<pre style='white-space:pre-wrap'>{answer}</pre>"
            request.value = example["messages"][-2]["content"]
        said.value = verdicts_summary(examples, verdicts)
        for button in buttons:
            button.disabled = not current

    def clicked(button: ipywidgets.Button) -> None:
        try:
            for example in pending_examples(current, load_verdicts(path)):  # none when another form was quicker
                store_verdict(path, example, buttons[button], request=request.value, note=note.value, row=row)
            show()
        except ValueError as error:  # what was typed stays
            said.value = html.escape(str(error))

    for button in buttons:
        button.on_click(clicked)
    show()
    return ipywidgets.VBox([about, request, note, ipywidgets.HBox(list(buttons)), said])


# --- the form of a rating ---


def prompt_html(prompt: dict) -> str:
    """A request as HTML: the tools on offer, what is asked, and what each criterion means. Everything is escaped."""
    tools = tools_html(prompt["tools"])
    offered = f"<p>Tools on offer:</p><ul>{tools}</ul>" if tools else ""
    meanings = "".join(
        f"<li><b>{_words(name)}</b>: {html.escape(people.CRITERIA[name])}</li>" for name in people.criteria_of(prompt)
    )
    asked = f"<p><b>Request</b></p><blockquote>{html.escape(prompt['request'])}</blockquote>"
    return f"{offered}{asked}<p>Score every answer, 1 (not at all) to 5 (entirely):</p><ul>{meanings}</ul>"


def answer_column(letter: str, text: str, criteria: tuple[str, ...]) -> ipywidgets.VBox:
    """One answer under its letter, and a row of buttons, none chosen, for each criterion."""
    body = html.escape(text) or "<i>(no answer)</i>"
    answer = ipywidgets.HTML(f"<b>Answer {letter}</b><pre style='white-space:pre-wrap'>{body}</pre>")
    rows = [
        ipywidgets.ToggleButtons(
            options=[(str(score), score) for score in people.SCORES],
            value=None,
            description=_words(name),
            style={"button_width": "3.2em", "description_width": "6em"},
        )
        for name in criteria
    ]
    return ipywidgets.VBox([answer, *rows], layout=COLUMN)


def rating_form(sheet: dict, folder: Path) -> ipywidgets.VBox:
    """A form for the sheet whose ratings stand in `folder`; it never blocks."""
    name = ipywidgets.Text(description="rater", placeholder="a name of your choice, such as r1")
    begin, save = ipywidgets.Button(description="Begin"), ipywidgets.Button(description="Save", disabled=True)
    about, said = ipywidgets.HTML(), ipywidgets.HTML()
    columns = ipywidgets.HBox([], layout={"flex_flow": "row wrap"})
    note = ipywidgets.Text(description="note", layout=WIDE)
    current: dict = {}  # rater, prompt and the order of its answers; empty before the beginning and at the end

    def show() -> None:
        rater, ratings = name.value.strip(), people.load_preferences(folder)
        left = {prompt["key"] for prompt in people.pending_requests(sheet, ratings, rater)}
        following = [each for each in people.order_for_rater(sheet, rater) if each[0]["key"] in left]
        current.clear()
        note.value, columns.children, about.value = "", (), ""
        said.value = f"{len(sheet['prompts']) - len(left)} of {len(sheet['prompts'])} requests scored"
        save.disabled = not following
        if not following:
            about.value = "<i>Every request is scored. Thank you: run the next cells for the result.</i>"
            return
        prompt, order = following[0]
        current.update(rater=rater, prompt=prompt, order=order)
        about.value, criteria = prompt_html(prompt), people.criteria_of(prompt)
        columns.children = [
            answer_column(LETTERS[i % 26], prompt["answers"][answer], criteria) for i, answer in enumerate(order)
        ]

    def begun(_: ipywidgets.Button) -> None:
        try:
            people.checked_name(name.value.strip())
            show()
            name.disabled = begin.disabled = True
        except ValueError as error:
            said.value = html.escape(str(error))

    def saved(_: ipywidgets.Button) -> None:
        try:
            prompt, given = current["prompt"], _chosen(current, columns)
            people.store_preference(folder, prompt, current["rater"], given, note.value)
            show()
        except ValueError as error:  # what was chosen stays
            said.value = html.escape(str(error))

    begin.on_click(begun)
    save.on_click(saved)
    return ipywidgets.VBox([ipywidgets.HBox([name, begin]), about, columns, note, save, said])


def _chosen(current: dict, columns: ipywidgets.HBox) -> dict[str, dict[str, int]]:
    """Answer id -> criterion -> score. Raises ValueError naming the first score that is not given yet."""
    criteria, given = people.criteria_of(current["prompt"]), {}
    for index, (answer, shown_answer) in enumerate(zip(current["order"], columns.children, strict=True)):
        given[answer] = {name: row.value for name, row in zip(criteria, shown_answer.children[1:], strict=True)}
        for name, score in given[answer].items():
            if score is None:
                raise InputError(f"answer {LETTERS[index % 26]} has no score for {_words(name)} yet")
    return given


def _words(name: str) -> str:
    return name.replace("_", " ")
