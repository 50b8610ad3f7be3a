"""Silence below Python's streams: what compiled code prints inside the block is dropped, before and after it stays."""

import ctypes

import pytest

from avalab import quiet

C = ctypes.CDLL(None)


def test_what_compiled_code_prints_is_dropped_inside_the_block_only(capfd):
    C.puts(b"before")
    with quiet.native_output():
        C.puts(b"inside")
    C.puts(b"after")
    C.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


def test_an_error_inside_the_block_gives_the_output_back(capfd):
    with pytest.raises(ZeroDivisionError), quiet.native_output():
        C.puts(b"inside"[: 1 // 0])
    C.puts(b"after")
    C.fflush(None)
    assert capfd.readouterr().out == "after\n"
