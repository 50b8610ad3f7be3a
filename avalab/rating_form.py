"""A form for JupyterLab in which a person scores the answers of a sheet, without being told whose they are.

1. The rater gives a name of their choice, which their scores are kept under and which decides their order of requests
   and answers. Nothing else is asked of them, and nothing is scored beforehand.
2. A request is shown with the tools on offer and all its answers side by side, called A, B, C. Each has a row of
   buttons for every criterion that applies; what a criterion means stands above them.
3. `Save` keeps the scores when all are given, and shows the next request; who opens the form again under the same name
   goes on there. Names of artefacts appear nowhere, not even at the end: the notebook's next cells show the result.

Without a front end the form renders as text and waits for nobody. What it does not do: change a score that was saved
(remove its line from the rater's file), or limit the time.
"""

from __future__ import annotations

import html
from pathlib import Path

import ipywidgets

from avalab import rating, side_by_side

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLUMN = {"flex": "1 1 18em", "border": "1px solid silver", "padding": "0.5em", "margin": "0.2em"}


def shown(prompt: dict) -> str:
    """A request as HTML: the tools on offer, what is asked, and what each criterion means. Everything is escaped."""
    tools = "".join(
        f"<li><code>{html.escape(tool['name'])}({html.escape(', '.join(tool['parameters'].get('properties', {})))})"
        f"</code> {html.escape(tool.get('description', ''))}</li>"
        for tool in prompt["tools"]
    )
    offered = f"<p>Tools on offer:</p><ul>{tools}</ul>" if tools else ""
    meanings = "".join(
        f"<li><b>{_words(name)}</b>: {html.escape(rating.CRITERIA[name])}</li>" for name in rating.criteria_of(prompt)
    )
    asked = f"<p><b>Request</b></p><blockquote>{html.escape(prompt['request'])}</blockquote>"
    return f"{offered}{asked}<p>Score every answer, 1 (not at all) to 5 (entirely):</p><ul>{meanings}</ul>"


def column(letter: str, text: str, criteria: tuple[str, ...]) -> ipywidgets.VBox:
    """One answer under its letter, and a row of buttons, none chosen, for each criterion."""
    body = html.escape(text) or "<i>(no answer)</i>"
    answer = ipywidgets.HTML(f"<b>Answer {letter}</b><pre style='white-space:pre-wrap'>{body}</pre>")
    rows = [
        ipywidgets.ToggleButtons(
            options=[(str(score), score) for score in rating.SCORES],
            value=None,
            description=_words(name),
            style={"button_width": "3.2em", "description_width": "6em"},
        )
        for name in criteria
    ]
    return ipywidgets.VBox([answer, *rows], layout=ipywidgets.Layout(**COLUMN))


def form(sheet: dict, folder: Path) -> ipywidgets.VBox:
    """A form for the sheet whose ratings stand in `folder`; it never blocks."""
    name = ipywidgets.Text(description="rater", placeholder="a name of your choice, such as r1")
    begin, save = ipywidgets.Button(description="Begin"), ipywidgets.Button(description="Save", disabled=True)
    about, said = ipywidgets.HTML(), ipywidgets.HTML()
    columns = ipywidgets.HBox([], layout=ipywidgets.Layout(flex_flow="row wrap"))
    note = ipywidgets.Text(description="note", layout=ipywidgets.Layout(width="95%"))
    current: dict = {}  # rater, prompt and the order of its answers; empty before the beginning and at the end

    def show() -> None:
        rater, ratings = name.value.strip(), rating.load(folder)
        left = {prompt["key"] for prompt in rating.pending(sheet, ratings, rater)}
        following = [each for each in side_by_side.order(sheet, rater) if each[0]["key"] in left]
        current.clear()
        note.value, columns.children, about.value = "", (), ""
        said.value = f"{len(sheet['prompts']) - len(left)} of {len(sheet['prompts'])} requests scored"
        save.disabled = not following
        if not following:
            about.value = "<i>Every request is scored. Thank you: run the next cells for the result.</i>"
            return
        prompt, order = following[0]
        current.update(rater=rater, prompt=prompt, order=order)
        about.value, columns.children = shown(prompt), _columns(prompt, order)

    def begun(_: ipywidgets.Button) -> None:
        try:
            rating.checked_name(name.value.strip())
            show()
            name.disabled = begin.disabled = True
        except ValueError as error:
            said.value = html.escape(str(error))

    def saved(_: ipywidgets.Button) -> None:
        try:
            prompt, given = current["prompt"], _chosen(current, columns)
            rating.store(folder, prompt, current["rater"], given, note.value)
            show()
        except ValueError as error:  # what was chosen stays
            said.value = html.escape(str(error))

    begin.on_click(begun)
    save.on_click(saved)
    return ipywidgets.VBox([ipywidgets.HBox([name, begin]), about, columns, note, save, said])


def _columns(prompt: dict, order: list[str]) -> list[ipywidgets.VBox]:
    criteria = rating.criteria_of(prompt)
    return [column(LETTERS[i % 26], prompt["answers"][answer], criteria) for i, answer in enumerate(order)]


def _chosen(current: dict, columns: ipywidgets.HBox) -> dict[str, dict[str, int]]:
    """Answer id -> criterion -> score. Raises ValueError naming the first score that is not given yet."""
    criteria, given = rating.criteria_of(current["prompt"]), {}
    for index, (answer, shown_answer) in enumerate(zip(current["order"], columns.children, strict=True)):
        given[answer] = {name: row.value for name, row in zip(criteria, shown_answer.children[1:], strict=True)}
        for name, score in given[answer].items():
            if score is None:
                raise ValueError(f"answer {LETTERS[index % 26]} has no score for {_words(name)} yet")
    return given


def _words(name: str) -> str:
    return name.replace("_", " ")
