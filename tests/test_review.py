"""Review: verdicts that survive, an acceptance rate that a pencil finds, and a form that works without a browser."""

import json
from math import sqrt

import pytest

from avalab import drafts, gates, review, synthesize


@pytest.fixture(scope="module")
def examples():
    return list(synthesize.generate(12, 4, kinds=("single_call",), row=gates.standard([])))


@pytest.fixture
def path(tmp_path):
    return review.verdicts_path(tmp_path)


def parts(form):
    """The form's shown example, request, note, buttons by name, and message."""
    about, request, note, row, said = form.children
    return about, request, note, {button.description: button for button in row.children}, said


# --- samples, verdicts, rates ------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_sample_and_no_example_twice(examples):
    drawn = review.sample(examples, 6, seed=1)
    assert drawn == review.sample(examples, 6, seed=1) != review.sample(examples, 6, seed=2)
    assert len({review.key(e) for e in drawn}) == 6
    assert len(review.sample(examples, 99, seed=1)) == len(examples)


def test_an_example_has_the_same_key_with_and_without_its_system_message(examples, tmp_path):
    stored = {**examples[0], "messages": examples[0]["messages"][1:]}
    assert review.key(stored) == review.key(examples[0]) != review.key(examples[1])


def test_verdicts_stand_beside_the_data_where_loading_the_data_does_not_find_them(examples, tmp_path):
    synthesize.store_examples(tmp_path, examples)
    path = review.verdicts_path(tmp_path)
    assert path == review.verdicts_path(tmp_path / "single_call.jsonl") == tmp_path / "review" / "verdicts.jsonl"
    review.store(path, examples[0], "accept")
    assert synthesize.load_examples(tmp_path) == examples


def test_a_verdict_is_read_back_and_a_second_one_replaces_it(examples, path):
    review.store(path, examples[0], "accept", note="good")
    review.store(path, examples[1], "reject")
    verdicts = review.store(path, examples[0], "reject", note="no longer")
    assert verdicts == review.load(path)
    assert [row["verdict"] for row in verdicts.values()] == ["reject", "reject"]
    assert verdicts[review.key(examples[0])]["note"] == "no longer"
    assert len(path.read_text().splitlines()) == 2


def test_three_accepted_of_four_judged_is_the_wilson_interval_of_three_quarters(examples, path):
    """z = 1.959964, p = 3/4, n = 4: (p + z^2/8 +- z sqrt(p(1-p)/4 + z^2/64)) / (1 + z^2/4) = 0.301 to 0.954."""
    for example, verdict in zip(examples, ("accept", "accept", "accept", "reject"), strict=False):
        verdicts = review.store(path, example, verdict)
    z, p, n = 1.959964, 0.75, 4
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    found = review.acceptance(examples, verdicts)
    assert (found.value, found.n) == (0.75, 4)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert (found.low, found.high) == pytest.approx((0.301, 0.954), abs=1e-3)
    assert review.summary(examples, verdicts) == (
        "4 of 12 judged: 3 accepted, 1 rejected, 0 edited; accepted as it stood 75% [30%, 95%]"
    )


def test_without_a_verdict_there_is_no_rate(examples, path):
    assert review.load(path) == {}
    assert review.acceptance(examples, {}) is None
    assert review.summary(examples, {}) == "0 of 12 judged"


def test_rejected_examples_go_edited_ones_change_and_the_rest_stays(examples, path):
    asked = examples[1]["messages"][-2]["content"]
    review.store(path, examples[0], "reject")
    review.store(path, examples[1], "edit", request=f"Kindly: {asked}")
    left = review.apply(examples, review.load(path))
    assert left[1:] == examples[2:]
    assert left[0]["messages"][-2]["content"] == f"Kindly: {asked}"
    assert left[0]["calls"] == examples[1]["calls"]
    assert left[0]["messages"][0] == examples[1]["messages"][0]
    assert review.acceptance(examples, review.load(path)).value == 0


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
        review.store(path, example, verdict, request=request_text)
    assert not path.exists()


def test_an_edit_is_checked_by_the_gates_that_are_given(examples, path):
    row = {"polite": lambda e: "" if "please" in e["messages"][-2]["content"] else "no please"}
    with pytest.raises(ValueError, match="does not pass the gate polite: no please"):
        review.store(path, examples[0], "edit", request="Now!", row=row)
    assert len(review.store(path, examples[0], "edit", request="Now, please!", row=row)) == 1


@pytest.mark.parametrize("line", ["{broken", "[]", '{"key": "a"}', '{"key": "a", "verdict": "maybe"}'])
def test_a_damaged_verdict_is_named_by_file_and_line(examples, path, line):
    review.store(path, examples[0], "accept")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"verdicts\.jsonl:2: .*a verdict is one of accept, reject, edit"):
        review.load(path)


def test_a_failed_write_leaves_the_old_verdicts(examples, path, monkeypatch):
    review.store(path, examples[0], "accept")
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        review.store(path, examples[1], "accept")
    assert [file.name for file in path.parent.iterdir()] == ["verdicts.jsonl"]
    assert path.read_bytes() == before


# --- the form ----------------------------------------------------------------------------------------------------


def test_clicks_go_through_the_examples_and_a_new_form_goes_on_where_the_old_one_stopped(examples, path):
    about, request, note, buttons, said = parts(review.form(examples[:3], path))
    assert request.value == examples[0]["messages"][-2]["content"]
    assert said.value == "0 of 3 judged"
    note.value = "fine"
    buttons["Accept"].click()
    assert review.load(path)[review.key(examples[0])]["note"] == "fine"
    assert (request.value, note.value) == (examples[1]["messages"][-2]["content"], "")
    assert said.value.startswith("1 of 3 judged: 1 accepted")

    about, request, _, buttons, said = parts(review.form(examples[:3], path))
    assert request.value == examples[1]["messages"][-2]["content"]
    buttons["Reject"].click()
    request.value = "Kindly: " + request.value
    buttons["Edit"].click()
    assert "Every example has a verdict" in about.value
    assert all(button.disabled for button in buttons.values())
    assert "1 accepted, 1 rejected, 1 edited" in said.value


def test_an_edit_that_a_gate_rejects_says_why_and_keeps_what_was_typed(examples, path):
    example = next(e for e in examples if e["calls"][0]["arguments"])
    _, request, _, buttons, said = parts(review.form([example], path))
    request.value = "Do what I have in <mind>, please."
    buttons["Edit"].click()
    assert "does not pass the gate grounded" in said.value
    assert request.value == "Do what I have in <mind>, please."
    assert not path.exists()


def test_a_click_on_a_form_that_another_form_has_finished_stores_nothing_new(examples, path):
    old, new = (parts(review.form(examples[:1], path)) for _ in range(2))
    new[3]["Reject"].click()
    old[3]["Accept"].click()
    assert [row["verdict"] for row in review.load(path).values()] == ["reject"]
    assert "Every example has a verdict" in old[0].value


def test_what_an_example_says_is_text_and_never_markup(path):
    hostile = drafts._example("no_function", [], "<script>x</script>", "<img src=x onerror=y>", [])
    hostile["tools"] = [{"name": "<b>", "description": "<i>", "parameters": {"properties": {"<u>": {}}}}]
    about = review.form([hostile], path).children[0].value
    assert not {"<script", "<img", "<i>", "<u>"} & set(about.split("<b>no_function</b>")[1].split())
    assert "&lt;img src=x onerror=y&gt;" in about


def test_without_a_front_end_the_form_is_a_text_and_returns_at_once(examples, path):
    form = review.form(examples, path)
    assert "VBox" in repr(form)
    assert json.dumps(form.get_state(), default=str)
