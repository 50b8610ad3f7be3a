"""Answers with sources: what a passage does not say is left out."""

import pytest

from avalab.agent.retrieval import citations, questions
from avalab.agent.retrieval.index import Found, Index

PASSAGES = [
    Found(1, "tea.md", 0, "Tea", "Green tea is brewed at 80 degrees for three minutes.", 1.0),
    Found(2, "cats.md", 0, "Cats", "A cat sleeps for most of the day.", 0.5),
]


def test_a_sentence_is_kept_with_the_passage_that_says_it():
    (statement,), left_out = citations.supported("Green tea is brewed at 80 degrees [1].", PASSAGES)
    assert (statement.source.name, left_out) == ("tea.md:0", 0)


def test_a_wrong_number_of_passage_is_put_right_and_an_invented_fact_is_left_out():
    said = "Cats sleep most of the day [1]. Green tea is brewed at 95 degrees [1]. Tea was invented in China [7]."
    statements, left_out = citations.supported(said, PASSAGES)
    assert [s.source.name for s in statements] == ["cats.md:0"]
    assert left_out == 2


def test_nothing_is_said_where_the_documents_are_silent(tmp_path, scripted):
    page = tmp_path / "tea.md"
    page.write_text("# Tea\nGreen tea is brewed at 80 degrees.\n")
    index = Index(tmp_path / "i.sqlite")
    index.build(page)
    silent = scripted()
    assert citations.ask(silent, index, "zebra quagga").text == citations.UNKNOWN
    assert not silent.asked, "nothing was found, so nothing was asked"
    made_up = citations.ask(scripted("Tea was invented by Marco Polo in 1271 [1]."), index, "Who invented tea?")
    assert (made_up.text, made_up.unsupported) == (citations.UNKNOWN, 1)
    right = citations.ask(scripted("Green tea is brewed at 80 degrees [1]."), index, "How hot is green tea?")
    assert right.text == "Green tea is brewed at 80 degrees. [tea.md:0]"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    questions.write_documents(folder / "docs", most=60)
    index = Index(folder / "i.sqlite")
    index.build(folder / "docs")
    return index


def test_questions_are_the_same_for_a_seed_and_apart_by_document(library):
    pieces = library.pieces()
    test, again, tune = (questions.questions(pieces, 12, 0, split) for split in ("test", "test", "tune"))
    assert test == again
    assert not {q.document for q in test} & {q.document for q in tune}
    assert {q.kind for q in test} == set(questions.KINDS)


def test_a_question_is_no_quotation_and_does_not_name_what_it_asks_for(library):
    for question in questions.questions(library.pieces(), 30, 0):
        if question.kind == "purpose":
            assert question.sentence.rstrip(".") not in question.text
            assert question.answer.rpartition(".")[2].lower() not in question.text.lower().split()
            assert question.is_right(f"It is {question.answer}.")
            assert not question.is_right("It is something else.")


def test_most_questions_are_found_by_words_among_the_first_five(library):
    asked = questions.questions(library.pieces(), 60, 0)
    hits = [any(map(q.is_answered_by, library.search(q.text, 5))) for q in asked]
    assert sum(hits) >= 48
