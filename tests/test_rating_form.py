"""The form: clicks that go through a sheet, no artefact's name anywhere, and nothing stored until all is scored."""

import json

import pytest
from transformers import PreTrainedModel  # noqa: F401  (before what reaches torchao)

from avalab import rating, rating_form, side_by_side
from avalab.side_by_side import Prompt

ASKED = [Prompt("question", (), "Why <b>not</b>?"), Prompt("call", ("math.comb",), "Choose 2 of 5.")]
ANSWERED = {"bf16": ["because", "10"], "small": ["<script>x</script>", "10"], "tiny": ["", "11"]}


@pytest.fixture
def sheet(tmp_path):
    return side_by_side.make(tmp_path, ASKED, ANSWERED, {})


def parts(form):
    """The form's name field, begin button, shown request, columns, note, save button and message."""
    (name, begin), (about, columns, note, save, said) = form.children[0].children, form.children[1:]
    return name, begin, about, columns, note, save, said


def begun(sheet, folder, rater="r1"):
    found = parts(rating_form.form(sheet, folder))
    found[0].value = rater
    found[1].click()
    return found


def choose(columns, score: int) -> None:
    for column in columns.children:
        for row in column.children[1:]:
            row.value = score


def test_nothing_is_shown_before_the_rater_has_a_name_that_can_be_one(sheet, tmp_path):
    name, begin, about, columns, _, save, said = parts(rating_form.form(sheet, tmp_path))
    assert (about.value, columns.children, save.disabled) == ("", (), True)
    name.value = "a/b"
    begin.click()
    assert "is no name for a rater" in said.value
    assert about.value == ""
    name.value = "r1"
    begin.click()
    assert "Request" in about.value
    assert (name.disabled, begin.disabled, save.disabled) == (True, True, False)


def test_clicks_go_through_the_sheet_and_a_new_form_goes_on_where_the_old_one_stopped(sheet, tmp_path):
    _, _, about, columns, note, save, said = begun(sheet, tmp_path)
    first = about.value
    choose(columns, 4)
    note.value = "clear"
    save.click()
    assert said.value == "1 of 2 requests scored"
    assert about.value != first
    assert note.value == ""
    assert {row["note"] for row in rating.load(tmp_path)} == {"clear"}

    _, _, about, columns, _, save, said = begun(sheet, tmp_path)
    assert about.value != first
    choose(columns, 2)
    save.click()
    assert "Every request is scored" in about.value
    assert (columns.children, save.disabled) == ((), True)
    assert rating.missing(sheet, rating.load(tmp_path)) == ""


def test_scores_go_to_the_answer_they_were_given_to(sheet, tmp_path):
    """The longest answer gets a 5, every other one a 1, in whatever order they are shown."""
    _, _, _, columns, _, save, _ = begun(sheet, tmp_path)
    order, left = side_by_side.order(sheet, "r1"), len(sheet["prompts"])
    for prompt, shown in order:
        longest = max(prompt["answers"].values(), key=len)
        for answer, column in zip(shown, columns.children, strict=True):
            for row in column.children[1:]:
                row.value = 5 if prompt["answers"][answer] == longest else 1
        save.click()
        left -= 1
    assert left == 0
    texts = {answer: text for p in sheet["prompts"] for answer, text in p["answers"].items()}
    best = {texts[row["answer"]] for row in rating.load(tmp_path) if row["coherence"] == 5}
    assert best == {max(p["answers"].values(), key=len) for p in sheet["prompts"]}


def test_no_score_is_chosen_beforehand_and_one_that_is_missing_is_named_and_nothing_stored(sheet, tmp_path):
    _, _, about, columns, _, save, said = begun(sheet, tmp_path)
    assert all(row.value is None for column in columns.children for row in column.children[1:])
    first = about.value
    choose(columns, 3)
    columns.children[1].children[2].value = None
    save.click()
    assert said.value == "answer B has no score for helpfulness yet"
    assert about.value == first
    assert columns.children[0].children[1].value == 3
    assert not rating.load(tmp_path)


def test_the_form_never_says_whose_answer_it_is(sheet, tmp_path):
    form = rating_form.form(sheet, tmp_path)
    name, begin, _, columns, _, save, _ = parts(form)
    name.value, seen = "r1", []
    begin.click()
    while columns.children:
        seen.append(everything(form))
        choose(columns, 3)
        save.click()
    seen.append(everything(form))
    assert len(seen) == 3
    assert not [name for name in ANSWERED if any(name in text for text in seen)]


def everything(widget) -> str:
    """All that a widget and those in it tell a browser, as text."""
    inside = "".join(everything(child) for child in getattr(widget, "children", ()))
    return json.dumps(widget.get_state(), default=str) + inside


def test_a_form_that_another_one_overtook_only_scores_again_what_it_shows(sheet, tmp_path):
    old, new = begun(sheet, tmp_path), begun(sheet, tmp_path)
    for columns, save, score in ((new[3], new[5], 2), (new[3], new[5], 2), (old[3], old[5], 5)):
        choose(columns, score)
        save.click()
    assert "Every request is scored" in old[2].value
    assert {row["coherence"] for row in rating.load(tmp_path)} == {2, 5}


def test_what_a_model_or_a_request_says_is_text_and_never_markup(sheet, tmp_path):
    page = everything(rating_form.form(sheet, tmp_path))
    for prompt in sheet["prompts"]:
        page += rating_form.shown(prompt)
        page += "".join(column.children[0].value for column in rating_form._columns(prompt, list(prompt["answers"])))
    assert "<script" not in page
    assert "Why &lt;b&gt;not&lt;/b&gt;?" in page
    assert "<i>(no answer)</i>" in page


def test_tools_are_shown_with_their_parameters_and_tool_use_only_there(sheet):
    plain, call = sorted(sheet["prompts"], key=lambda prompt: len(prompt["tools"]))
    assert "math.comb(n, k)" in rating_form.shown(call)
    assert "tool use" in rating_form.shown(call)
    assert "tool use" not in rating_form.shown(plain)
    assert "Tools on offer" not in rating_form.shown(plain)


def test_without_a_front_end_the_form_is_a_text_and_returns_at_once(sheet, tmp_path):
    assert "VBox" in repr(rating_form.form(sheet, tmp_path))
