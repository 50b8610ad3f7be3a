"""A process of its own for a function, whose memory is its own and whose end is not ours; and silence for libraries.

1. `call` names a function of the package that takes one dict and returns one, both as JSON. The process is forked from
   a server that has imported the package's engines and nothing else: a start costs a tenth of a second, not five.
2. What the process prints goes to a file, whose last line explains a crash. An exception comes back as its name and
   message; a process that is killed, crashes in native code or takes too long becomes a RuntimeError in one line.
3. The package imports this module first, and it sets the log levels of libraries that warn of what no reader can act
   on (GPU libraries that torchao cannot load, a CPU kernel that bitsandbytes would fetch, advice of torch.fx to the
   libraries that call it): a deliberate exception to "importing does nothing", since later is too late. The level of a
   logger that a user has configured stays.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from avalab.lab.errors import ProcessFailed

for _name in ("torchao", "torch.utils._pytree", "torch.fx._symbolic_trace", "bitsandbytes.backends"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.ERROR)


_starting = threading.Lock()  # several threads may each call a function elsewhere


class Killed(ProcessFailed):
    """A process was ended by a signal, whose name is `signal`."""

    def __init__(self, message: str, signal: str) -> None:
        super().__init__(message)
        self.signal = signal


def call(
    target: str,
    request: dict,
    *,
    limit_seconds: float,
    errors: Mapping[str, type[Exception]] | None = None,
    label: str = "",
    growth_bytes: int = 0,
) -> dict:
    """What `target` (`module:function`) answers to `request`, computed elsewhere; `label` names it in messages.

    The process may take `growth_bytes` more of its own memory than it starts with (0: as much as there is).

    An exception named in `errors`, or derived from one that is, is raised as that class. Raises
    ProcessFailed in one line for any other failure: killed (out of memory, mostly) or crashed (`Killed`), stopped
    after `limit_seconds`, or an exception.
    """
    label = label or target
    with tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder) / "answer.json", Path(folder) / "output"
        code = _run((target, json.dumps(request), str(result), str(output), growth_bytes), limit_seconds)
        if code is None:
            raise ProcessFailed(f"{label} took longer than {limit_seconds:g} s")
        if code or not result.is_file():
            text = output.read_text(errors="replace") if output.is_file() else ""
            message = f"{label} failed: {explain_end(code, text)}"
            raise Killed(message, signal.Signals(-code).name) if code < 0 else ProcessFailed(message)
        answer = json.loads(result.read_text())
    if "error" in answer:
        known = next((errors[name] for name in answer["error"] if name in (errors or {})), None)
        raise known(answer["message"]) if known else ProcessFailed(f"{label} failed: {answer['message']}")
    return answer["answer"]


def main(target: str, request: str, result: str, output: str = "", growth_bytes: int = 0) -> None:
    """Answer in this process: the JSON `request` in, the JSON answer or error into the file `result`."""
    if output:
        sink = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
    if growth_bytes:
        from avalab.lab import trackers  # needs psutil, which who plans a run may not have

        trackers.limit_memory_growth(growth_bytes)
    module, _, name = target.partition(":")
    try:
        answer = {"answer": getattr(importlib.import_module(module), name)(json.loads(request))}
    except MemoryError as error:
        answer = {"error": ["MemoryError"], "message": f"out of memory {error}".strip()}
    except SystemExit as error:  # of a library that ends the process it is in
        answer = {"error": ["SystemExit"], "message": f"a library ended the process with {error}; {SILENT_END}"}
    except Exception as error:  # told to the caller, who raises it
        lines = str(error).strip().splitlines()
        names = [kind.__name__ for kind in type(error).__mro__]
        answer = {"error": names, "message": " ".join(lines[:3]) or names[0]}
    Path(result).write_text(json.dumps(answer))


SILENT_END = "mostly too little memory: close other programs, or take a smaller model or another engine"


def explain_end(code: int, text: str) -> str:
    """What an exit status and the text that a process left say about its end, in one line."""
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, most likely out of memory"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}" + (f": {lines[-1]}" if lines else "")
    return lines[-1] if lines else f"exit status {code} without a word; {SILENT_END}"


def _run(arguments: tuple, limit_seconds: float) -> int | None:
    """Exit status of the process, None when it took too long."""
    import multiprocessing  # not at the top: the package imports this module before everything else

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["avalab.engines"])
    process = context.Process(target=main, args=arguments)  # no daemon: some engines start processes themselves
    # The program that calls is not to be run again in the process, where it is a script without a guard.
    with _starting:
        program = vars(sys.modules["__main__"])
        kept = {name: program[name] for name in ("__file__", "__spec__") if name in program}
        program.pop("__file__", None)
        program["__spec__"] = None
        try:
            process.start()
        finally:
            program.update(kept)
    try:
        process.join(limit_seconds)
        late = process.is_alive()
    finally:
        process.kill()
        process.join()
    return None if late else process.exitcode


def quiet_libraries() -> None:
    """Silence progress bars and per-call chatter of the libraries; errors still come through."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("bitsandbytes", "torchao", "compressed_tensors", "llmcompressor", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


_seen: list[TextIO] = []  # standard error as it was when the outermost `quietly` began


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the libraries' progress bars, logs and deprecation warnings to themselves; errors still come through.

    Bars of the lab's own (`progress`) are seen none the less.
    """
    quiet_libraries()
    _seen.append(_seen[0] if _seen else sys.stderr)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        _seen.pop()


def progress(items: Iterable | None = None, *, desc: str, total: int | None = None) -> Any:
    """A bar of tqdm's with the time to go, on the standard error that people see; it is wiped when done."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=desc, total=total, leave=False, file=_seen[0] if _seen else sys.stderr)


@contextlib.contextmanager
def drop_native_output() -> Iterator[None]:
    """Drop what is written to file descriptor 1 in the block: output of compiled code, of every thread.

    Python's own `print` is not affected where `sys.stdout` is buffered or, as in a notebook, not that descriptor; what
    is in C's buffers is written out before and dropped after.
    """
    import ctypes

    flush = ctypes.CDLL(None).fflush
    flush(None)
    standard, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(standard, 1)
        os.close(standard)
        os.close(nowhere)
