"""A function called in a process of its own: its answer, its exception, its death; and what is kept in a file."""

import json
import os
import signal

import pytest

from avalab import alone


def doubled(request: dict) -> dict:
    return {"twice": 2 * request["number"], "process": os.getpid()}


def refused(request: dict) -> dict:
    raise ValueError("bad\nluck")


def test_an_answer_and_an_exception_are_written_down(tmp_path):
    alone.main("test_alone:doubled", '{"number": 4}', str(tmp_path / "a"))
    assert json.loads((tmp_path / "a").read_text())["answer"]["twice"] == 8
    alone.main("test_alone:refused", "{}", str(tmp_path / "b"))
    assert json.loads((tmp_path / "b").read_text()) == {"error": "ValueError", "message": "bad luck"}


def test_an_exception_is_raised_as_its_class_where_that_is_known(monkeypatch):
    """Both halves, without the process."""
    monkeypatch.setattr(alone, "_run", lambda arguments, limit: alone.main(*arguments[:3]) or 0)
    assert alone.call("test_alone:doubled", {"number": 4}, limit_seconds=1)["twice"] == 8
    with pytest.raises(KeyError, match="bad luck"):
        alone.call("test_alone:refused", {}, limit_seconds=1, errors={"ValueError": KeyError})
    with pytest.raises(RuntimeError, match="cell failed: bad luck"):
        alone.call("test_alone:refused", {}, limit_seconds=1, label="cell")


def test_an_answer_comes_from_another_process_and_a_late_one_is_stopped():
    assert alone.call("copy:copy", {"number": 4}, limit_seconds=120) == {"number": 4}
    with pytest.raises(RuntimeError, match=r"^a nap took longer than 0 s$"):
        alone.call("copy:copy", {}, limit_seconds=0, label="a nap")


@pytest.mark.parametrize(
    ("code", "text", "says"),
    [
        (-signal.SIGKILL, "", "killed, most likely out of memory"),
        (-signal.SIGSEGV, "x", "crashed with SIGSEGV"),
        (1, "first\n\nlast words\n", "last words"),
        (3, "", "exit status 3"),
    ],
)
def test_an_end_is_explained_in_one_line(code, text, says):
    assert alone.why(code, text) == says


def test_what_was_computed_is_read_back_and_a_damaged_file_computed_anew(tmp_path):
    counted = iter(range(9))
    path = tmp_path / "kept.json"

    def count() -> dict:
        return {"n": next(counted)}

    assert [alone.kept(path, count), alone.kept(path, count)] == [{"n": 0}, {"n": 0}]
    path.write_text('{"n": ')
    assert alone.kept(path, count) == {"n": 1}
