"""Silence chatter that libraries print while they are being imported.

torchao warns about each GPU library it cannot load and registers enums that torch then warns about; bitsandbytes names
a CPU kernel that a hub would have to send; a reader can act on none of it. The package imports this first. Setting log
levels at import is a deliberate exception to "importing does nothing": later is too late.

What it does not do: hide errors, or change the level of any logger that a user has configured.
"""

import logging

for _name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.ERROR)
