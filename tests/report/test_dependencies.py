"""Which results are older than their code, in a small repository of git's; and what counts as code."""

import json
import subprocess
from pathlib import Path

import pytest

from avalab.lab.run import Record, save_records
from avalab.report import dependencies


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(root), *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write_notebook(path: Path, *sources: str, **metadata) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"cell_type": "code", "metadata": {}, "source": source, "outputs": []} for source in sources]
    path.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}))


@pytest.fixture
def root(tmp_path) -> Path:
    """01_a uses a module that uses another; 02_b uses one that stands alone; both have a result of the commit."""
    modules = {"__init__": "", "a": "from avalab import deep\n", "deep": "x = 1\n", "b": "y = 1\n"}
    for name, source in modules.items():
        (tmp_path / "avalab").mkdir(exist_ok=True)
        (tmp_path / "avalab" / f"{name}.py").write_text(source)
    write_notebook(tmp_path / "notebooks" / "01_a.ipynb", "from avalab import a")
    write_notebook(tmp_path / "notebooks" / "02_b.ipynb", "from avalab import b")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "--short", "HEAD")
    for name in ("01_a", "02_b"):
        write_result(tmp_path, name, commit)
    return tmp_path


def write_result(root: Path, name: str, commit: str, **metadata) -> None:
    results = root / "results" / "laptop"
    write_notebook(results / f"{name}.ipynb", "1", **metadata)
    save_records([Record(name, "s", "perplexity", 1.0, "1", commit=commit)], results / f"{name}.json")


def states(root: Path) -> dict[str, str]:
    return {name: state.partition(" (")[0] for name, state in _states(root).items()}


def _states(root: Path) -> dict[str, str]:
    return dependencies.code_states(root / "results" / "laptop", root)


def test_a_result_is_stale_when_a_module_its_notebook_reaches_has_changed_since_its_commit(root):
    assert states(root) == {"01_a": "current", "02_b": "current"}
    (root / "avalab" / "deep.py").write_text("x = 2\n")
    assert states(root) == {"01_a": "stale", "02_b": "current"}
    git(root, "commit", "-qam", "second")
    write_result(root, "01_a", git(root, "rev-parse", "--short", "HEAD"))
    assert states(root) == {"01_a": "current", "02_b": "current"}


def test_a_comment_a_docstring_and_a_module_out_of_reach_make_nothing_stale_and_a_cell_does(root):
    (root / "avalab" / "deep.py").write_text('"""Why\n\nso."""\n\n# a comment\nx = 1\n')
    (root / "avalab" / "new.py").write_text("z = 1\n")
    assert states(root) == {"01_a": "current", "02_b": "current"}
    write_notebook(root / "notebooks" / "02_b.ipynb", "from avalab import b", "b.y")
    assert states(root) == {"01_a": "current", "02_b": "stale"}


def test_the_stored_hash_decides_where_there_is_one_and_needs_no_git(root):
    code = dependencies.code_hashes(root)
    assert code["01_a"] != code["02_b"]
    write_result(root, "01_a", "", avalab={"code": code["01_a"]})
    write_result(root, "02_b", "", avalab={"code": code["01_a"]})
    assert states(root) == {"01_a": "current", "02_b": "stale"}


@pytest.mark.parametrize(
    ("commit", "reason"),
    [
        ("", "no commit was recorded"),
        ("abc1234", "git does not know abc1234 here"),
        ("abc1234+", "made from changes to abc1234 that were not committed"),
    ],
)
def test_without_a_hash_or_a_commit_to_compare_with_it_cannot_be_told(root, commit, reason):
    write_result(root, "01_a", commit)
    assert _states(root)["01_a"] == f"cannot tell ({reason})"


def test_without_git_it_cannot_be_told(root, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert states(root) == {"01_a": "cannot tell", "02_b": "cannot tell"}


def test_a_result_whose_notebook_is_gone_is_stale(root):
    (root / "notebooks" / "02_b.ipynb").unlink()
    assert states(root)["02_b"] == "stale"


def test_code_is_what_is_left_without_docstrings_comments_and_blank_lines():
    source = 'def f():\n    """Say.\n\n    More.\n    """\n    # why\n\n    return "# no comment"  # stays\n'
    assert dependencies.code_lines(source) == 'def f():\n    return "# no comment"  # stays'
    assert dependencies.code_lines("def (") == "def (", "what cannot be parsed is compared as it stands"
