"""Sheets that say nobody's name, ratings that survive, and results only when everybody has finished."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel  # noqa: F401  (before what reaches torchao)

from avalab.data import toolbox
from avalab.lab.run import Run
from avalab.measure import people
from avalab.measure.people import Prompt

ASKED = [Prompt("question", (), "Why?"), Prompt("call", ("math.comb",), "Choose 2 of 5.")]
ANSWERED = {"bf16": ["because", "10"], "small": ["so", "10"], "tiny": ["?", "11"]}


@pytest.fixture
def sheet(tmp_path):
    return people.make_sheet(tmp_path, ASKED, ANSWERED, {"tiny": {"artifact_sha256": "abc", "engine": "torch"}})


def ids(sheet: dict, index: int) -> list[str]:
    """The ids of the answers to a request, in the order of `ANSWERED`."""
    return [people.answer_id(ASKED[index], texts[index]) for texts in ANSWERED.values()]


def rate(folder, sheet: dict, rater: str, given: list[list[int]]) -> list[dict]:
    """Store one score an artefact and request, the same on every criterion."""
    for index, prompt in enumerate(sheet["prompts"]):
        wanted = people.criteria_of(prompt)
        scores = {i: dict.fromkeys(wanted, s) for i, s in zip(ids(sheet, index), given[index], strict=True)}
        rows = people.store_preference(folder, prompt, rater, scores)
    return rows


# --- storage -----------------------------------------------------------------------------------------------------


def test_tool_use_is_scored_only_where_tools_are_on_offer(sheet):
    assert [people.criteria_of(p) for p in sheet["prompts"]] == [
        ("coherence", "helpfulness"),
        ("coherence", "helpfulness", "tool_use"),
    ]


def test_scores_are_read_back_and_a_second_time_replaces_the_first(sheet, tmp_path):
    rate(tmp_path, sheet, "r1", [[5, 3, 1], [4, 4, 2]])
    rows = rate(tmp_path, sheet, "r1", [[5, 3, 2], [4, 4, 2]])
    assert rows == people.load_preferences(tmp_path)
    assert len(rows) == 3 + 2  # two artefacts gave the same answer to the second request
    changed = next(row for row in rows if row["answer"] == ids(sheet, 0)[2])
    assert (changed["helpfulness"], changed["tool_use"]) == (2, None)
    assert len((tmp_path / "ratings" / "r1.jsonl").read_text().splitlines()) == 5


def test_raters_write_files_of_their_own_and_go_on_where_they_were(sheet, tmp_path):
    rate(tmp_path, sheet, "r1", [[5, 3, 1], [4, 4, 2]])
    first = sheet["prompts"][0]
    rows = people.store_preference(
        tmp_path, first, "r2", {i: {"coherence": 3, "helpfulness": 3} for i in first["answers"]}
    )
    assert sorted(path.name for path in (tmp_path / "ratings").iterdir()) == ["r1.jsonl", "r2.jsonl"]
    assert people.requests_left(sheet, rows) == {"r1": 0, "r2": 1}
    assert [p["key"] for p in people.pending_requests(sheet, rows, "r2")] == [ASKED[1].key]
    assert len(people.pending_requests(sheet, rows, "r3")) == 2


@pytest.mark.parametrize(
    ("rater", "scores", "says"),
    [
        ("../r1", None, "is no name for a rater; use 1 to 32 letters"),
        ("", None, "is no name for a rater"),
        ("r1", {"coherence": 3}, "give each of coherence, helpfulness one of 1, 2, 3, 4, 5"),
        ("r1", {"coherence": 3, "helpfulness": 6}, "one of 1, 2, 3, 4, 5"),
        ("r1", {"coherence": 3, "helpfulness": 3, "tool_use": 3}, "give each of coherence, helpfulness"),
    ],
)
def test_a_rating_that_makes_no_sense_is_refused_and_nothing_is_stored(sheet, tmp_path, rater, scores, says):
    prompt = sheet["prompts"][0]
    given = {answer: scores or {"coherence": 3, "helpfulness": 3} for answer in prompt["answers"]}
    with pytest.raises(ValueError, match=says):
        people.store_preference(tmp_path, prompt, rater, given)
    assert not (tmp_path / "ratings").exists()


def test_an_answer_that_was_left_out_is_refused(sheet, tmp_path):
    prompt = sheet["prompts"][0]
    with pytest.raises(ValueError, match="1 answers are scored; the request has 3"):
        people.store_preference(
            tmp_path, prompt, "r1", {next(iter(prompt["answers"])): {"coherence": 3, "helpfulness": 3}}
        )


@pytest.mark.parametrize("line", ["{broken", "[]", '{"prompt": "a"}'])
def test_a_damaged_line_is_named_by_file_and_line(sheet, tmp_path, line):
    rate(tmp_path, sheet, "r1", [[5, 3, 1], [4, 4, 2]])
    path = tmp_path / "ratings" / "r1.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"r1\.jsonl:6: .*a rating has the fields prompt, answer, rater"):
        people.load_preferences(tmp_path)


def test_a_score_out_of_range_in_a_file_is_refused(sheet, tmp_path):
    row = dict.fromkeys(people.FIELDS, None) | {"rater": "r1", "coherence": 9}
    (tmp_path / "ratings").mkdir()
    (tmp_path / "ratings" / "r1.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"r1\.jsonl:1"):
        people.load_preferences(tmp_path)


# --- results -----------------------------------------------------------------------------------------------------


def test_without_a_rater_there_is_no_result_and_the_record_says_why(sheet, tmp_path):
    run = Run("t", "smoke")
    assert people.record_preferences(run, sheet, people.load_key(tmp_path), [], baseline="bf16") == people.NOBODY
    assert [(r.value, r.note) for r in run.records] == [(None, "not measured: nobody has rated yet")]


def test_while_somebody_is_still_rating_no_name_gets_a_score(sheet, tmp_path):
    rate(tmp_path, sheet, "r1", [[5, 3, 1], [4, 4, 2]])
    first = sheet["prompts"][0]
    rows = people.store_preference(
        tmp_path, first, "r2", {i: {"coherence": 3, "helpfulness": 3} for i in first["answers"]}
    )
    run, key = Run("t", "smoke"), people.load_key(tmp_path)
    assert people.record_preferences(run, sheet, key, rows, baseline="bf16").startswith(
        "not measured: r2 has 1 of 2 left"
    )
    assert [r.value for r in run.records] == [None]
    with pytest.raises(ValueError, match="r2 has 1 of 2 left"):
        people.preference_scores(sheet, key, rows, "coherence")


def test_answers_that_changed_since_are_left_to_score(sheet, tmp_path):
    rows = rate(tmp_path, sheet, "r1", [[5, 3, 1], [4, 4, 2]])
    again = people.make_sheet(tmp_path, ASKED, ANSWERED | {"tiny": ["?", "12"]}, {})
    assert [p["key"] for p in people.pending_requests(again, rows, "r1")] == [ASKED[1].key]


def test_equal_answers_get_the_score_once_and_both_artefacts_have_it(sheet, tmp_path):
    rows = rate(tmp_path, sheet, "r1", [[5, 3, 1], [4, 4, 2]])
    found = people.preference_scores(sheet, people.load_key(tmp_path), rows, "helpfulness")
    assert {name: each.tolist() for name, each in found.items()} == {
        "bf16": [[5], [4]],
        "small": [[3], [4]],
        "tiny": [[1], [2]],
    }


def test_a_preference_counts_ties_half_by_pencil():
    """Higher, tied, lower, higher on four requests: (1 + 0.5 + 0 + 1) / 4 = 0.625."""
    import torch

    ours, theirs = torch.tensor([[5.0], [3], [2], [4]]), torch.tensor([[4.0], [3], [3], [1]])
    found = people.prefer(ours, theirs, resamples=200, seed=0)
    assert (found.preferred, found.tied, found.other, found.share.value) == (2, 1, 1, 0.625)
    assert found.verdict == "not distinguishable"
    back = people.prefer(theirs, ours, resamples=200, seed=0)
    assert back.share.value == 1 - 0.625
    assert str(found).startswith("not distinguishable: preferred 2, tied 1, the other preferred 1 times; 62% [")


def test_a_preference_on_every_request_is_a_verdict_and_the_other_way_round_too():
    import torch

    high, low = torch.full((6, 2), 4.0), torch.full((6, 2), 2.0)
    assert people.prefer(high, low, resamples=200, seed=0).verdict == "better"
    assert people.prefer(low, high, resamples=200, seed=0).verdict == "worse"
    assert people.prefer(high, high, resamples=200, seed=0).verdict == "not distinguishable"


def test_scores_preferences_and_agreement_are_recorded_with_their_artefact(sheet, tmp_path):
    rate(tmp_path, sheet, "r1", [[5, 3, 1], [4, 4, 2]])
    rows = rate(tmp_path, sheet, "r2", [[5, 4, 2], [5, 5, 2]])
    run = Run("t", "smoke")
    assert people.record_preferences(run, sheet, people.load_key(tmp_path), rows, baseline="bf16") == ""
    found = {(r.subject, r.metric): r for r in run.records}
    assert found["bf16", "rating:coherence"].value == pytest.approx((5 + 4 + 5 + 5) / 4)
    assert (found["tiny", "rating:tool_use"].value, found["tiny", "rating:tool_use"].n) == (2, 1)
    assert found["small", "preferred_share:coherence"].value == pytest.approx((0 + 0.5 + 0 + 0.5) / 4)
    assert found["tiny", "preferred_share:coherence"].details["verdict"] == "worse"
    assert found["tiny", "rating:coherence"].artifact_sha256 == "abc"
    assert 0 < found["raters", "krippendorff_alpha:coherence"].value < 1
    assert ("bf16", "preferred_share:coherence") not in found


def test_one_rater_has_scores_but_no_agreement(sheet, tmp_path):
    rows = rate(tmp_path, sheet, "r1", [[5, 3, 1], [4, 4, 2]])
    run = Run("t", "smoke")
    people.record_preferences(run, sheet, people.load_key(tmp_path), rows, baseline="bf16")
    notes = {r.note for r in run.records if r.metric.startswith("krippendorff_alpha")}
    assert notes == {"agreement needs two raters; there is one"}


def test_raters_who_gave_everything_the_same_score_have_no_agreement_and_the_note_says_so(sheet, tmp_path):
    rate(tmp_path, sheet, "r1", [[3, 3, 3], [3, 3, 3]])
    rows = rate(tmp_path, sheet, "r2", [[3, 3, 3], [3, 3, 3]])
    run = Run("t", "smoke")
    people.record_preferences(run, sheet, people.load_key(tmp_path), rows, baseline="bf16")
    (note, *_) = [r.note for r in run.records if r.metric.startswith("krippendorff_alpha")]
    assert "alpha is not defined for scores of 2 raters" in note


# --- the sheet ---------------------------------------------------------------------------------------------------

GIVEN = {"bf16": ["Because.", "10"], "nf4-dq": ["because", "10 "], "tiny": ["", "11"]}


def lines(tmp_path, *rows: str) -> Path:
    path = tmp_path / "requests.txt"
    path.write_text("# a comment\n" + "\n".join(rows) + "\n")
    return path


# --- requests ----------------------------------------------------------------------------------------------------


def test_every_kind_of_request_is_among_the_first_seven_and_no_two_are_equal():
    asked = people.load_prompts()
    assert {p.kind for p in asked[:7]} == {*people.PLAIN_KINDS, *people.TOOL_KINDS}
    assert len({p.key for p in asked}) == len(asked) >= 20
    assert asked[:4] == people.load_prompts(4)


def test_tools_on_offer_are_ones_that_training_never_sees():
    offered = {name for prompt in people.load_prompts() for name in prompt.tools}
    assert {toolbox.split_of(name) for name in offered} == {"heldout"}


def test_the_tools_stand_in_a_system_message_before_the_request():
    plain, call = (prompt.chat for prompt in ASKED)
    assert [message["role"] for message in plain] == ["user"]
    assert [message["role"] for message in call] == ["system", "user"]
    assert "math.comb" in call[0]["content"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("question | Why?", "is not `kind"),
        ("question | - |  ", "is not `kind"),
        ("call | - | Why?", "kind 'call' without tools; choose one of question"),
        ("question | math.comb | Why?", "kind 'question' with tools; choose one of call"),
        ("call | fly_home | Go.", "no tool 'fly_home' in the toolbox"),
    ],
)
def test_a_line_that_is_no_request_is_named_by_file_and_line(tmp_path, row, says):
    path = lines(tmp_path, "question | - | Fine?", row)
    with pytest.raises(ValueError, match=rf"requests\.txt:3: .*{says}"):
        people.load_prompts(path=path)


# --- answers -----------------------------------------------------------------------------------------------------


def test_answers_are_asked_once_and_a_longer_sheet_begins_with_what_is_known(artifact, tmp_path):
    first = people.answer_prompts(artifact, ASKED[:1], tmp_path, new_tokens=4)
    both = people.answer_prompts(artifact, ASKED, tmp_path, new_tokens=4)
    assert both[0] == first[0]
    (cache,) = tmp_path.iterdir()
    assert len(cache.read_text().splitlines()) == 2


def test_an_unknown_engine_is_refused(artifact, tmp_path):
    with pytest.raises(ValueError, match="unknown engine 'abacus'; choose one of torch"):
        people.answer_prompts(artifact, ASKED, tmp_path, engine="abacus")


# --- the sheet ---------------------------------------------------------------------------------------------------


def test_the_sheet_names_nobody_and_the_key_finds_every_answer(tmp_path):
    sheet = people.make_sheet(tmp_path, ASKED, GIVEN, {"nf4-dq": {"engine": "openvino"}})
    text = (tmp_path / "sheet.json").read_text()
    assert json.loads(text) == sheet
    assert not [name for name in (*GIVEN, "openvino") if name in text]
    key = people.load_key(tmp_path)
    assert key["nf4-dq"]["engine"] == "openvino"
    for name, texts in GIVEN.items():
        found = [p["answers"][key[name]["answers"][p["key"]]] for p in sheet["prompts"]]
        assert found == [text.strip() for text in texts]


def test_equal_answers_stand_on_the_sheet_once(tmp_path):
    sheet = people.make_sheet(tmp_path, ASKED, GIVEN, {})
    assert [len(p["answers"]) for p in sheet["prompts"]] == [3, 2]


def test_each_rater_has_an_order_of_their_own_that_a_break_does_not_change(tmp_path):
    asked = people.load_prompts()
    many = {name: [f"{name} {i}" for i in range(len(asked))] for name in "abcd"}
    sheet = people.make_sheet(tmp_path, asked, many, {})
    one, two = (people.order_for_rater(sheet, rater) for rater in ("r1", "r2"))
    assert one == people.order_for_rater(json.loads(json.dumps(sheet)), "r1") != two
    assert sorted(p["key"] for p, _ in one) == sorted(p.key for p in asked)
    places = [ids.index(people.answer_id(asked[0], "a 0")) for p, ids in one + two if p["key"] == asked[0].key]
    assert len({tuple(ids) for _, ids in one}) == len(asked)
    assert len(places) == 2
    firsts = [p["answers"][ids[0]][0] for p, ids in one + two]
    assert {firsts.count(name) >= 4 for name in "abcd"} == {True}, "no artefact is always in the same place"


def test_a_sheet_needs_two_artefacts_and_an_answer_to_every_request(tmp_path):
    with pytest.raises(ValueError, match="nothing to compare: 1 artefact"):
        people.make_sheet(tmp_path, ASKED, {"bf16": ["a", "b"]}, {})
    with pytest.raises(ValueError, match="small has 1 answers to 2 requests"):
        people.make_sheet(tmp_path, ASKED, {"bf16": ["a", "b"], "small": ["a"]}, {})
    assert not list(tmp_path.iterdir())
