"""Which form of an operation runs: the first that serves the call and has passed its own check in this process.

Every operation is a tuple of `Form`s, best first; the last one is the reference, the definition in plain torch.
Method of `choose`:
1. AVALAB_KERNELS=reference (or another form's name) in the environment leaves only that form and the reference;
2. a form is asked whether it `serves` the arguments: device, dtype, shape;
3. the first time a form is about to be used on a device, its `check` runs there: the form against the reference on
   small cases. One that fails, or raises, is not used again in this process, and a warning says so once.

Thresholds of size between forms are constants beside the forms; nothing is timed here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from avalab.lab.errors import InputError

SWITCH = "AVALAB_KERNELS"

_verdicts: dict[tuple[str, str, str], bool] = {}


@dataclass(frozen=True)
class Form:
    """One way to compute an operation."""

    name: str
    run: Callable
    serves: Callable[..., bool] = lambda *arguments, **options: True  # whether it can compute these arguments
    check: Callable[[str], None] | None = None  # device -> raises when the form disagrees; None: the reference


def choose_form(operation: str, forms: tuple[Form, ...], device: torch.device, *arguments, **options) -> Form:
    """The first form of `forms` that serves these arguments and has passed its check on `device`.

    Raises ValueError when the environment switch names a form that no operation has.
    """
    only = os.environ.get(SWITCH, "")
    if only and only not in FORM_NAMES:
        raise InputError(f"{SWITCH}={only!r} names no form; choose one of {', '.join(sorted(FORM_NAMES))}, or unset it")
    for form in forms[:-1]:
        if only in ("", form.name) and form.serves(*arguments, **options) and passes(operation, form, device.type):
            return form
    return forms[-1]


def passes(operation: str, form: Form, device: str) -> bool:
    """Whether `form` agrees with the reference on `device`: computed once, with a warning when it does not."""
    key = (operation, form.name, device)
    if form.check is not None and key not in _verdicts:
        _verdicts[key] = False  # a check that calls the operation itself must not recurse
        try:
            # Recomputation watches what autograd saves; it must not see the check's own tensors.
            with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                form.check(device)
            _verdicts[key] = True
        except Exception as error:  # whatever a broken kernel raises, the next form still computes
            warnings.warn(f"{operation}: {form.name!r} failed its check on {device}, not used: {error}", stacklevel=3)
    return form.check is None or _verdicts[key]


def verdicts() -> dict[tuple[str, str, str], bool]:
    """(operation, form, device) -> passed, of every check that has run in this process."""
    return dict(_verdicts)


FORM_NAMES = frozenset({"reference", "tiles", "library", "native", "triton"})
