"""What the lab says when it cannot go on: one line that names the value it met and the way out.

Everything that a person may cause is one of these; each is also the built-in exception that its readers expect, so that
`except ValueError` holds where the package is used from Python. What is none of them is a defect of the lab.
"""

from __future__ import annotations


class LabError(Exception):
    """A line for a person; the command line prints it and ends with `exit_code`."""

    exit_code = 2


class InputError(LabError, ValueError):
    """A value, a file or a model that cannot be used as it is; the line says what can."""


class MissingFile(LabError, FileNotFoundError):
    """A file or folder that is not where it was looked for; the line says what is there."""


class Unavailable(LabError, RuntimeError):
    """A library, a device or a download that is not to be had here; the line says how to get it."""


class ProcessFailed(LabError, RuntimeError):
    """A process, a library or a native part ended badly; the line says why."""

    exit_code = 1
