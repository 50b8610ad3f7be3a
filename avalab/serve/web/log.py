"""One JSON line a request, in a file that rotates or on standard error."""

from __future__ import annotations

import json
import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

from avalab.lab.errors import InputError

FILE_BYTES, FILES = 10 * 2**20, 5

requests = logging.getLogger("avalab.serve.requests")

server = logging.getLogger("avalab.serve")


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {"when": self.formatTime(record), "level": record.levelname.lower()}
        said = record.msg if isinstance(record.msg, dict) else {"message": record.getMessage()}
        if record.exc_info:
            said = {**said, "exception": self.formatException(record.exc_info)}
        return json.dumps(fields | said, ensure_ascii=False, default=str)


def log_to(path: str = "") -> logging.Handler:
    """Begin to log; the handler, which the caller closes. Raises InputError for a file that cannot be written."""
    try:
        handler: logging.Handler = (
            RotatingFileHandler(Path(path), maxBytes=FILE_BYTES, backupCount=FILES, encoding="utf-8")
            if path
            else logging.StreamHandler(sys.stderr)
        )
    except OSError as error:
        raise InputError(f"log_file {path} cannot be written: {error}") from None
    handler.setFormatter(_Line())
    server.addHandler(handler)
    server.setLevel(logging.INFO)
    server.propagate = False
    return handler


def end_log(handler: logging.Handler) -> None:
    """Stop logging there."""
    server.removeHandler(handler)
    server.propagate = True
    handler.close()
