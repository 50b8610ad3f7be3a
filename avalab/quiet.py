"""Silence chatter that libraries print while they are being imported; import this before them.

torchao warns about each GPU library it cannot load and registers enums that torch then warns about; a reader can act
on neither. Setting two log levels at import is a deliberate exception to "importing does nothing": later is too late.

What it does not do: hide errors, or change the level of any logger that a user has configured.
"""

import logging

for _name in ("torchao", "torch.utils._pytree"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.ERROR)
