"""The index: found by words, by meaning and by both; incremental, and resumable after a kill."""

import sqlite3
import subprocess
import sys
import time

import pytest

from avalab.agent.retrieval.index import Index, fused
from avalab.lab.errors import InputError, MissingFile

PAGES = {
    "tea.md": "# Tea\nGreen tea is brewed at 80 degrees.\n\n# Coffee\nCoffee is ground before brewing.\n",
    "cats.md": "# Cats\nA cat sleeps for most of the day.\n",
    "dogs.md": "# Dogs\nDogs are walked twice a day.\n",
}


@pytest.fixture
def folder(tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    for name, text in PAGES.items():
        (pages / name).write_text(text)
    return pages


def test_a_question_finds_the_piece_that_says_it_in_each_way(tmp_path, folder, words):
    index = Index(tmp_path / "i.sqlite", words)
    index.build(folder)
    for way in ("words", "meaning", "fused"):
        found = index.search("How hot is green tea brewed?", 3, way=way)
        assert (found[0].document, found[0].heading) == ("tea.md", "Tea"), way
    assert found[0].name == "tea.md:0"


def test_the_fused_score_is_the_sum_of_one_over_sixty_plus_rank():
    """Item 1: 1/61 + 1/63; item 2: 1/62 + 1/61; item 3: 1/62. So 2, 1, 3."""
    ranked = fused([[1, 2], [2, 3, 1]])
    assert [item for item, _ in ranked] == [2, 1, 3]
    assert ranked[0][1] == pytest.approx(1 / 62 + 1 / 61)
    assert ranked[1][1] == pytest.approx(1 / 61 + 1 / 63)


def test_a_second_build_reads_what_changed_and_forgets_what_is_gone(tmp_path, folder):
    index = Index(tmp_path / "i.sqlite")
    assert len(index.build(folder).added) == 3
    (folder / "cats.md").write_text("# Cats\nCats purr.\n")
    (folder / "dogs.md").unlink()
    again = index.build(folder)
    assert (again.added, again.kept, again.removed) == (["cats.md"], ["tea.md"], ["dogs.md"])
    assert not index.search("walked dogs", way="words")
    assert not index.search("sleeps", way="words")
    assert index.search("purr")[0].document == "cats.md"


def test_what_cannot_be_read_is_named_and_does_not_stop_the_others(tmp_path, folder):
    (folder / "bad.txt").write_bytes(b"\0\0\0")
    built = Index(tmp_path / "i.sqlite").build(folder)
    assert len(built.added) == 3
    assert "is binary" in built.refused["bad.txt"]


def test_a_build_that_was_killed_goes_on_with_the_next_document(tmp_path, folder):
    for number in range(300):
        (folder / f"n{number:03}.md").write_text(f"# N{number}\n" + f"word{number} is here. " * 200)
    path = tmp_path / "i.sqlite"
    code = f"from avalab.agent.retrieval.index import Index; Index({str(path)!r}).build({str(folder)!r})"
    child = subprocess.Popen([sys.executable, "-c", code])
    held = 0
    while held < 20 and child.poll() is None:
        time.sleep(0.01)
        if path.is_file():
            try:
                with sqlite3.connect(path) as base:
                    held = base.execute("SELECT count(*) FROM document").fetchone()[0]
                base.close()
            except sqlite3.OperationalError:
                continue
    child.kill()
    child.wait()
    index = Index(path)
    before = index._base.execute("SELECT count(*) FROM document").fetchone()[0]
    assert before >= 20
    built = index.build(folder)
    assert len(built.kept) == before
    assert len(built.added) + before == 303
    assert index.search("word299")[0].document == "n299.md"


def test_a_name_of_code_is_found_by_its_parts(tmp_path):
    page = tmp_path / "api.md"
    page.write_text("# api\nCall str.splitlines with keep_ends.\n")
    index = Index(tmp_path / "i.sqlite")
    index.build(page)
    assert index.search("keep the ends", way="words")


def test_bad_ways_and_files_are_refused_in_one_line(tmp_path, folder):
    index = Index(tmp_path / "i.sqlite")
    index.build(folder)
    with pytest.raises(InputError, match="unknown way 'magic'"):
        index.search("tea", way="magic")
    with pytest.raises(InputError, match="holds no vectors"):
        index.search("tea", way="meaning")
    (tmp_path / "x.sqlite").write_text("this is a text and no database, long enough to be looked at")
    with pytest.raises(InputError, match="is no index"):
        Index(tmp_path / "x.sqlite")
    with pytest.raises(MissingFile, match="avalab index FOLDER"):
        Index.existing(tmp_path / "absent.sqlite")


@pytest.mark.parametrize("question", ["", '"', "NEAR( OR", "*", "a:b -c", "\x00", "日本"])
def test_no_question_breaks_the_language_of_the_search(tmp_path, folder, question):
    index = Index(tmp_path / "i.sqlite")
    index.build(folder)
    assert isinstance(index.search(question), list)
