"""`avalab index`, `ask`, `agent` and `mcp`: what they do on the tiny model, and bad input in one line."""

import json

import pytest
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.lab.run import ROOT

TINY = str(ROOT / "data" / "tiny-llama")


@pytest.fixture
def pages(tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "tea.md").write_text("# Tea\nGreen tea is brewed at 80 degrees.\n")
    (folder / "bad.txt").write_bytes(b"\0\0")
    return folder


@pytest.fixture
def index(avalab, pages, tmp_path):
    out = tmp_path / "i.sqlite"
    code, text, error = avalab("index", pages, "--out", out, "--words-only")
    assert code == 0, error
    assert "1 read, 0 unchanged, 0 gone, 1 left out" in text
    assert "bad.txt is binary" in text
    return out


def test_a_second_index_reads_nothing_again(avalab, pages, index):
    _, text, _ = avalab("index", pages, "--out", index, "--words-only")
    assert "0 read, 1 unchanged" in text


def test_passages_are_shown_and_a_model_answers_or_says_that_they_do_not_know(avalab, index):
    code, text, error = avalab("ask", "How hot is green tea?", "--documents", index, "--search-only")
    assert (code, text.splitlines()[0]) == (0, "[tea.md:0] Tea"), error
    code, text, error = avalab("ask", "How hot is green tea?", "--documents", index, "--model", TINY)
    assert code == 0, error
    assert "not in the documents" in text or "[tea.md:0]" in text
    assert "not in the documents" in avalab("ask", "zebra?", "--documents", index, "--model", TINY)[1]


def test_an_agent_works_until_a_limit_and_writes_its_transcript(avalab, tmp_path):
    page, memory = tmp_path / "t.md", tmp_path / "m.sqlite"
    more = ("--tools", "calculating", "--steps", "2", "--memory", memory, "--transcript", page)
    code, text, error = avalab("agent", "What is 6 * 7?", "--model", TINY, *more)
    assert code == 0, error
    assert text.rstrip().endswith("s)")
    assert page.read_text().startswith("# What is 6 * 7?")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("index", "absent"), "neither a file nor a folder"),
        (("ask", "x", "--documents", "absent.sqlite"), "avalab index FOLDER"),
        (("ask", " "), "question is empty"),
        (("agent", " "), "task is empty"),
        (("agent", "x", "--tools", "magic"), "magic"),
        (("agent", "x", "--steps", "0"), "limit steps has to be positive"),
        (("agent", "x", "--tools", "memory"), "--memory notes.sqlite"),
        (("agent", "x", "--tools", "files", "--workspace", "absent"), "--workspace"),
        (("agent", "x", "--mcp", "absent.json"), "absent.json"),
        (("agent", "x", "--model", "nothing-like-this"), "nothing-like-this"),
        (("mcp", "--folder", "absent"), "absent is no folder"),
    ],
)
def test_bad_input_is_one_line(avalab, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = avalab(*words)
    assert code == 2, error
    assert said in error
    assert error.strip().count("\n") == 0


def test_a_file_of_servers_without_an_allowed_tool_is_one_line(avalab, tmp_path):
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"servers": {"one": {"command": "x"}}}))
    code, _, error = avalab("agent", "x", "--mcp", file, "--model", TINY)
    assert (code, "nothing is allowed" in error) == (2, True)
