"""What an index is worth: recall, right answers against none, and calls over MCP, recorded as they are."""

import pytest

from avalab.agent import mcp_client
from avalab.agent.retrieval import evaluate
from avalab.agent.retrieval.index import Index
from avalab.agent.retrieval.questions import Question
from avalab.lab.run import Run

PAGES = {
    "tea.md": "## tea.brew\n\nbrew(leaves)\n\nPour water.\n",
    "cat.md": "## cat.feed\n\nfeed(cat)\n\nFill the bowl.\n",
}


@pytest.fixture
def index(tmp_path, words):
    for name, text in PAGES.items():
        (tmp_path / name).write_text(text)
    made = Index(tmp_path / "i.sqlite", words)
    made.build(tmp_path)
    yield made
    made.close()


def asked(text: str, document: str, name: str) -> Question:
    return Question(text, "purpose", document, name, text, name)


BREW, FEED = asked("How is water poured?", "tea.md", "tea.brew"), asked("Which fills the bowl?", "cat.md", "cat.feed")


def test_recall_counts_the_section_that_was_asked_about(index):
    """Of the two questions one names a section that is not there: half is found, whatever the way."""
    run = Run("t", "smoke")
    hits = evaluate.record_recall(run, index, [BREW, asked("How is water poured?", "tea.md", "tea.cool")])
    assert hits == {way: [True, False] for way in ("words", "meaning", "fused")}
    recall = {r.subject: r.value for r in run.records if r.metric == "recall_at_5"}
    assert recall == {"words": 0.5, "meaning": 0.5, "fused": 0.5}
    assert all(r.value > 0 for r in run.records if r.metric == "query_ms")


def test_an_index_without_vectors_says_what_is_missing(tmp_path):
    (tmp_path / "tea.md").write_text(PAGES["tea.md"])
    plain, run = Index(tmp_path / "p.sqlite"), Run("t", "smoke")
    plain.build(tmp_path / "tea.md")
    evaluate.record_recall(run, plain, [BREW])
    missing = {r.subject: r.note for r in run.records if r.value is None}
    assert missing.keys() == {"meaning", "fused"}
    assert "no vectors" in missing["fused"]
    plain.close()


def test_answers_with_and_without_documents_are_paired(index, scripted):
    run = Run("t", "smoke")
    lines = ["tea.pour", "brew pours water [1].", "cat.feed", "I made this up [1]."]
    test = evaluate.record_answers(run, scripted(*lines), index, [BREW, FEED])
    assert (test.gained, test.lost, test.n) == (1, 1, 2)
    shares = {r.subject: r.value for r in run.records}
    assert shares == {"alone": 0.5, "with documents": 0.5}


def test_a_call_over_mcp_gives_what_the_index_gives(index):
    pytest.importorskip("mcp", reason="MCP needs the extra `agent`")
    record = mcp_client.record_calls(Run("t", "smoke"), index.path, ["water", "bowl", "nothing like this"])
    assert (record.value, record.n, len(record.samples)) == (1.0, 3, 3), record.note
