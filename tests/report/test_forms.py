"""The forms: verdicts and scores that survive, a rate that a pencil finds, and clicks without a browser.

In a rating no artefact's name appears anywhere, and nothing is stored until all is scored.
"""

import json
from math import sqrt

import pytest
from transformers import PreTrainedModel  # noqa: F401  (before what reaches torchao)

from avalab.data import drafts, gates, synthesize
from avalab.measure import people
from avalab.measure.people import Prompt
from avalab.report import forms

ASKED = [Prompt("question", (), "Why <b>not</b>?"), Prompt("call", ("math.comb",), "Choose 2 of 5.")]
ANSWERED = {"bf16": ["because", "10"], "small": ["<script>x</script>", "10"], "tiny": ["", "11"]}


@pytest.fixture(scope="module")
def examples():
    return list(synthesize.generate(12, 4, kinds=("single_call",), row=gates.standard_gates([])))


@pytest.fixture
def path(tmp_path):
    return forms.verdicts_path(tmp_path)


def review_parts(form):
    """The form's shown example, request, note, buttons by name, and message."""
    about, request, note, row, said = form.children
    return about, request, note, {button.description: button for button in row.children}, said


# --- samples, verdicts, rates ------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_sample_and_no_example_twice(examples):
    drawn = forms.sample_examples(examples, 6, seed=1)
    assert drawn == forms.sample_examples(examples, 6, seed=1) != forms.sample_examples(examples, 6, seed=2)
    assert len({forms.example_key(e) for e in drawn}) == 6
    assert len(forms.sample_examples(examples, 99, seed=1)) == len(examples)


def test_an_example_has_the_same_key_with_and_without_its_system_message(examples, tmp_path):
    stored = {**examples[0], "messages": examples[0]["messages"][1:]}
    assert forms.example_key(stored) == forms.example_key(examples[0]) != forms.example_key(examples[1])


def test_verdicts_stand_beside_the_data_where_loading_the_data_does_not_find_them(examples, tmp_path):
    synthesize.store_examples(tmp_path, examples)
    path = forms.verdicts_path(tmp_path)
    assert path == forms.verdicts_path(tmp_path / "single_call.jsonl") == tmp_path / "review" / "verdicts.jsonl"
    forms.store_verdict(path, examples[0], "accept")
    assert synthesize.load_examples(tmp_path) == examples


def test_a_verdict_is_read_back_and_a_second_one_replaces_it(examples, path):
    forms.store_verdict(path, examples[0], "accept", note="good")
    forms.store_verdict(path, examples[1], "reject")
    verdicts = forms.store_verdict(path, examples[0], "reject", note="no longer")
    assert verdicts == forms.load_verdicts(path)
    assert [row["verdict"] for row in verdicts.values()] == ["reject", "reject"]
    assert verdicts[forms.example_key(examples[0])]["note"] == "no longer"
    assert len(path.read_text().splitlines()) == 2


def test_three_accepted_of_four_judged_is_the_wilson_interval_of_three_quarters(examples, path):
    """z = 1.959964, p = 3/4, n = 4: (p + z^2/8 +- z sqrt(p(1-p)/4 + z^2/64)) / (1 + z^2/4) = 0.301 to 0.954."""
    for example, verdict in zip(examples, ("accept", "accept", "accept", "reject"), strict=False):
        verdicts = forms.store_verdict(path, example, verdict)
    z, p, n = 1.959964, 0.75, 4
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert (middle - half, middle + half) == pytest.approx((0.301, 0.954), abs=1e-3)
    assert forms.verdicts_summary(examples, verdicts) == (
        "4 of 12 judged: 3 accepted, 1 rejected, 0 edited; accepted as it stood 75% [30%, 95%]"
    )


def test_without_a_verdict_there_is_no_rate(examples, path):
    assert forms.load_verdicts(path) == {}
    assert forms.verdicts_summary(examples, {}) == "0 of 12 judged"


def test_rejected_examples_go_edited_ones_change_and_the_rest_stays(examples, path):
    asked = examples[1]["messages"][-2]["content"]
    forms.store_verdict(path, examples[0], "reject")
    forms.store_verdict(path, examples[1], "edit", request=f"Kindly: {asked}")
    left = forms.apply_verdicts(examples, forms.load_verdicts(path))
    assert left[1:] == examples[2:]
    assert left[0]["messages"][-2]["content"] == f"Kindly: {asked}"
    assert left[0]["calls"] == examples[1]["calls"]
    assert left[0]["messages"][0] == examples[1]["messages"][0]
    assert "accepted as it stood 0%" in forms.verdicts_summary(examples, forms.load_verdicts(path))


@pytest.mark.parametrize(
    ("verdict", "request_text", "says"),
    [
        ("maybe", "", r"unknown verdict 'maybe'; choose one of accept, reject, edit"),
        ("edit", "", "the edit changes nothing"),
        ("edit", "Do what I have in mind, please.", "does not pass the gate grounded"),
        ("accept", "Do what I have in mind, please.", "the request was changed; edit the example"),
    ],
)
def test_a_verdict_that_makes_no_sense_is_refused_and_nothing_is_stored(examples, path, verdict, request_text, says):
    example = next(e for e in examples if e["calls"][0]["arguments"])
    with pytest.raises(ValueError, match=says):
        forms.store_verdict(path, example, verdict, request=request_text)
    assert not path.exists()


def test_an_edit_is_checked_by_the_gates_that_are_given(examples, path):
    row = {"polite": lambda e: "" if "please" in e["messages"][-2]["content"] else "no please"}
    with pytest.raises(ValueError, match="does not pass the gate polite: no please"):
        forms.store_verdict(path, examples[0], "edit", request="Now!", row=row)
    assert len(forms.store_verdict(path, examples[0], "edit", request="Now, please!", row=row)) == 1


@pytest.mark.parametrize("line", ["{broken", "[]", '{"key": "a"}', '{"key": "a", "verdict": "maybe"}'])
def test_a_damaged_verdict_is_named_by_file_and_line(examples, path, line):
    forms.store_verdict(path, examples[0], "accept")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"verdicts\.jsonl:2: .*a verdict is one of accept, reject, edit"):
        forms.load_verdicts(path)


def test_a_failed_write_leaves_the_old_verdicts(examples, path, monkeypatch):
    forms.store_verdict(path, examples[0], "accept")
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        forms.store_verdict(path, examples[1], "accept")
    assert [file.name for file in path.parent.iterdir()] == ["verdicts.jsonl"]
    assert path.read_bytes() == before


# --- the form of a review -----------------------------------------------------------------------------------------


def test_clicks_go_through_the_examples_and_a_new_form_goes_on_where_the_old_one_stopped(examples, path):
    about, request, note, buttons, said = review_parts(forms.review_form(examples[:3], path))
    assert request.value == examples[0]["messages"][-2]["content"]
    assert said.value == "0 of 3 judged"
    note.value = "fine"
    buttons["Accept"].click()
    assert forms.load_verdicts(path)[forms.example_key(examples[0])]["note"] == "fine"
    assert (request.value, note.value) == (examples[1]["messages"][-2]["content"], "")
    assert said.value.startswith("1 of 3 judged: 1 accepted")

    about, request, _, buttons, said = review_parts(forms.review_form(examples[:3], path))
    assert request.value == examples[1]["messages"][-2]["content"]
    buttons["Reject"].click()
    request.value = "Kindly: " + request.value
    buttons["Edit"].click()
    assert "Every example has a verdict" in about.value
    assert all(button.disabled for button in buttons.values())
    assert "1 accepted, 1 rejected, 1 edited" in said.value


def test_an_edit_that_a_gate_rejects_says_why_and_keeps_what_was_typed(examples, path):
    example = next(e for e in examples if e["calls"][0]["arguments"])
    _, request, _, buttons, said = review_parts(forms.review_form([example], path))
    request.value = "Do what I have in <mind>, please."
    buttons["Edit"].click()
    assert "does not pass the gate grounded" in said.value
    assert request.value == "Do what I have in <mind>, please."
    assert not path.exists()


def test_a_click_on_a_form_that_another_form_has_finished_stores_nothing_new(examples, path):
    old, new = (review_parts(forms.review_form(examples[:1], path)) for _ in range(2))
    new[3]["Reject"].click()
    old[3]["Accept"].click()
    assert [row["verdict"] for row in forms.load_verdicts(path).values()] == ["reject"]
    assert "Every example has a verdict" in old[0].value


def test_what_an_example_says_is_text_and_never_markup(path):
    hostile = drafts._example("no_function", [], "<script>x</script>", "<img src=x onerror=y>", [])
    hostile["tools"] = [{"name": "<b>", "description": "<i>", "parameters": {"properties": {"<u>": {}}}}]
    about = forms.review_form([hostile], path).children[0].value
    assert not {"<script", "<img", "<i>", "<u>"} & set(about.split("<b>no_function</b>")[1].split())
    assert "&lt;img src=x onerror=y&gt;" in about


def test_without_a_front_end_the_form_is_a_text_and_returns_at_once(examples, path):
    form = forms.review_form(examples, path)
    assert "VBox" in repr(form)
    assert json.dumps(form.get_state(), default=str)


# --- the form of a rating ----------------------------------------------------------------------------------------


@pytest.fixture
def sheet(tmp_path):
    return people.make_sheet(tmp_path, ASKED, ANSWERED, {})


def rating_parts(form):
    """The form's name field, begin button, shown request, columns, note, save button and message."""
    (name, begin), (about, columns, note, save, said) = form.children[0].children, form.children[1:]
    return name, begin, about, columns, note, save, said


def begun(sheet, folder, rater="r1"):
    found = rating_parts(forms.rating_form(sheet, folder))
    found[0].value = rater
    found[1].click()
    return found


def choose(columns, score: int) -> None:
    for column in columns.children:
        for row in column.children[1:]:
            row.value = score


def test_nothing_is_shown_before_the_rater_has_a_name_that_can_be_one(sheet, tmp_path):
    name, begin, about, columns, _, save, said = rating_parts(forms.rating_form(sheet, tmp_path))
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
    assert {row["note"] for row in people.load_preferences(tmp_path)} == {"clear"}

    _, _, about, columns, _, save, said = begun(sheet, tmp_path)
    assert about.value != first
    choose(columns, 2)
    save.click()
    assert "Every request is scored" in about.value
    assert (columns.children, save.disabled) == ((), True)
    assert people.why_no_result(sheet, people.load_preferences(tmp_path)) == ""


def test_scores_go_to_the_answer_they_were_given_to(sheet, tmp_path):
    """The longest answer gets a 5, every other one a 1, in whatever order they are shown."""
    _, _, _, columns, _, save, _ = begun(sheet, tmp_path)
    order, left = people.order_for_rater(sheet, "r1"), len(sheet["prompts"])
    for prompt, shown in order:
        longest = max(prompt["answers"].values(), key=len)
        for answer, column in zip(shown, columns.children, strict=True):
            for row in column.children[1:]:
                row.value = 5 if prompt["answers"][answer] == longest else 1
        save.click()
        left -= 1
    assert left == 0
    texts = {answer: text for p in sheet["prompts"] for answer, text in p["answers"].items()}
    best = {texts[row["answer"]] for row in people.load_preferences(tmp_path) if row["coherence"] == 5}
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
    assert not people.load_preferences(tmp_path)


def test_the_form_never_says_whose_answer_it_is(sheet, tmp_path):
    form = forms.rating_form(sheet, tmp_path)
    name, begin, _, columns, _, save, _ = rating_parts(form)
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
    assert {row["coherence"] for row in people.load_preferences(tmp_path)} == {2, 5}


def test_what_a_model_or_a_request_says_is_text_and_never_markup(sheet, tmp_path):
    page = everything(forms.rating_form(sheet, tmp_path))
    for prompt in sheet["prompts"]:
        page += forms.prompt_html(prompt)
        columns = [forms.answer_column("A", text, ()) for text in prompt["answers"].values()]
        page += "".join(column.children[0].value for column in columns)
    assert "<script" not in page
    assert "Why &lt;b&gt;not&lt;/b&gt;?" in page
    assert "<i>(no answer)</i>" in page


def test_tools_are_shown_with_their_parameters_and_tool_use_only_there(sheet):
    plain, call = sorted(sheet["prompts"], key=lambda prompt: len(prompt["tools"]))
    assert "math.comb(n, k)" in forms.prompt_html(call)
    assert "tool use" in forms.prompt_html(call)
    assert "tool use" not in forms.prompt_html(plain)
    assert "Tools on offer" not in forms.prompt_html(plain)


def test_without_a_front_end_a_rating_form_is_a_text_and_returns_at_once(sheet, tmp_path):
    assert "VBox" in repr(forms.rating_form(sheet, tmp_path))
