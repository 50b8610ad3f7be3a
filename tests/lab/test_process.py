"""A function called in a process of its own: its answer, its exception, its death; silence."""

import ctypes
import json
import os
import signal
import subprocess
import sys

import pytest

from avalab.lab import process

C = ctypes.CDLL(None)


def doubled(request: dict) -> dict:
    return {"twice": 2 * request["number"], "process": os.getpid()}


def refused(request: dict) -> dict:
    raise ValueError("bad\nluck")


def ended(request: dict) -> dict:
    os.kill(os.getpid(), request["signal"])
    return {}


def test_an_answer_and_an_exception_are_written_down(tmp_path):
    process.main(f"{__name__}:doubled", '{"number": 4}', str(tmp_path / "a"))
    assert json.loads((tmp_path / "a").read_text())["answer"]["twice"] == 8
    process.main(f"{__name__}:refused", "{}", str(tmp_path / "b"))
    assert json.loads((tmp_path / "b").read_text()) == {
        "error": ["ValueError", "Exception", "BaseException", "object"],
        "message": "bad luck",
    }


def test_an_exception_is_raised_as_its_class_where_that_is_known(monkeypatch):
    """Both halves, without the process."""
    monkeypatch.setattr(process, "_run", lambda arguments, limit: process.main(*arguments[:3]) or 0)
    assert process.call(f"{__name__}:doubled", {"number": 4}, limit_seconds=1)["twice"] == 8
    with pytest.raises(KeyError, match="bad luck"):
        process.call(f"{__name__}:refused", {}, limit_seconds=1, errors={"ValueError": KeyError})
    with pytest.raises(RuntimeError, match="cell failed: bad luck"):
        process.call(f"{__name__}:refused", {}, limit_seconds=1, label="cell")


def test_an_answer_comes_from_another_process_and_a_late_one_is_stopped():
    assert process.call("copy:copy", {"number": 4}, limit_seconds=120) == {"number": 4}
    with pytest.raises(RuntimeError, match=r"^a nap took longer than 0 s$"):
        process.call("copy:copy", {}, limit_seconds=0, label="a nap")


@pytest.mark.parametrize(
    ("number", "says"), [(signal.SIGKILL, "killed by SIGKILL"), (signal.SIGFPE, "crashed with SIGFPE")]
)
def test_a_process_that_a_signal_ends_is_an_error_that_names_the_signal(number, says):
    with pytest.raises(RuntimeError, match=f"^an engine failed: {says}"):
        process.call(f"{__name__}:ended", {"signal": int(number)}, limit_seconds=60, label="an engine")


@pytest.mark.parametrize(
    ("code", "text", "says"),
    [
        (-signal.SIGKILL, "", "killed by SIGKILL, most likely out of memory"),
        (-signal.SIGSEGV, "", "crashed with SIGSEGV"),
        (-signal.SIGABRT, "first\nfree(): invalid pointer\n", "crashed with SIGABRT: free(): invalid pointer"),
        (1, "first\n\nlast words\n", "last words"),
        (3, "", f"exit status 3 without a word; {process.SILENT_END}"),
    ],
)
def test_an_end_is_explained_in_one_line(code, text, says):
    assert process.explain_end(code, text) == says


def giving_up(request: dict) -> dict:
    sys.exit(3)


def test_a_library_that_ends_the_process_is_an_error_that_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"^an engine failed: a library ended the process with 3; mostly too little"):
        process.call(f"{__name__}:giving_up", {}, limit_seconds=60, label="an engine")


# --- silence --------------------------------------------------------------------------------------------------------


def test_what_compiled_code_prints_is_dropped_inside_the_block_only(capfd):
    C.puts(b"before")
    with process.drop_native_output():
        C.puts(b"inside")
    C.puts(b"after")
    C.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


def test_an_error_inside_the_block_gives_the_output_back(capfd):
    with pytest.raises(ZeroDivisionError), process.drop_native_output():
        C.puts(b"inside"[: 1 // 0])
    C.puts(b"after")
    C.fflush(None)
    assert capfd.readouterr().out == "after\n"


def test_a_bar_of_the_labs_own_is_seen_where_the_libraries_are_kept_quiet(capsys):
    with process.quietly(), process.quietly():
        print("noise", file=sys.stderr)
        assert list(process.progress(range(2), desc="stage")) == [0, 1]
    said = capsys.readouterr().err
    assert "stage" in said
    assert "noise" not in said


def test_a_process_takes_no_more_of_its_own_memory_than_it_may():
    """16 MiB fit into 64; 256 do not. In a process apart, which keeps the limit."""
    program = (
        "from avalab.lab import trackers\n"
        "trackers.limit_memory_growth(2**26)\n"
        "bytearray(2**24)\n"
        "try: bytearray(2**28)\n"
        "except MemoryError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr


def test_the_limit_reaches_the_process(monkeypatch):
    seen = []

    def ran(arguments: tuple, limit: float) -> int:
        seen.append(arguments)
        return process.main(*arguments[:3]) or 0

    monkeypatch.setattr(process, "_run", ran)
    process.call("copy:copy", {}, limit_seconds=1, growth_bytes=7)
    process.call("copy:copy", {}, limit_seconds=1)
    assert [arguments[4] for arguments in seen] == [7, 0]
