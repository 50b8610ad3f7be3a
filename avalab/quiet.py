"""Silence chatter that libraries print while they are being imported, or below Python's own streams.

torchao warns about each GPU library it cannot load and registers enums that torch then warns about; bitsandbytes names
a CPU kernel that a hub would have to send; a reader can act on none of it. The package imports this first. Setting log
levels at import is a deliberate exception to "importing does nothing": later is too late.

`quietly` is for a call of a library that talks, `native_output` for what compiled code prints to the process's standard
output whatever its options say.

What it does not do: hide errors, or change the level of any logger that a user has configured.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

for _name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Silence progress bars and per-call chatter of the libraries; errors still come through."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("bitsandbytes", "torchao", "compressed_tensors", "llmcompressor", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the libraries' progress bars, logs and deprecation warnings to themselves; errors still come through."""
    quiet_libraries()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def native_output() -> Iterator[None]:
    """Drop what is written to file descriptor 1 in the block: output of compiled code, of every thread.

    Python's own `print` is not affected where `sys.stdout` is buffered or, as in a notebook, not that descriptor; what
    is in C's buffers is written out before and dropped after.
    """
    import ctypes

    flush = ctypes.CDLL(None).fflush
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
