"""The ExecuTorch engine: a program for phones, run here by the same runtime's Python binding (see `executorch_export`).

Sizes are fixed: a prompt is read in chunks of `CHUNK` tokens, the last one filled up with tokens whose results are
dropped, and each answer token alone. The cache is a buffer of the program's context; what of it is filled, the mask
says. The shared greedy loop chooses.

What it does not do: choose its threads (the runtime takes the processor's cores), or run longer than the program's
context.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from avalab.artifacts import Artifact
from avalab.engines import engine, kinds
from avalab.engines.engine import Engine, Request

INSTALL = 'pip install -e ".[executorch]"'
METHODS, CHUNK = ("one", "many"), 32
SIZES = ("layers", "heads", "dim", "context")


def load(artifact: Artifact | Path, *, threads: int = 0) -> Engine:
    """Open an ExecuTorch program; the longest sequence is the program's context. `threads` cannot be chosen here.

    Raises ValueError for a program that the runtime cannot load.
    """
    folder = kinds.checked("executorch", artifact)
    kinds.require("executorch", "executorch", INSTALL)
    with warnings.catch_warnings():  # "this API is experimental", and deprecations of its own
        warnings.simplefilter("ignore")
        from executorch.runtime import Runtime
    file = folder / kinds.OWN_FILES["executorch"]
    try:
        program = Runtime.get().load_program(file)
        sizes = {name: program.load_method(name).execute([])[0] for name in SIZES}
        methods = {name: program.load_method(name) for name in METHODS}
    except (RuntimeError, AttributeError) as error:  # a method that is not there is None
        raise ValueError(f"ExecuTorch cannot load {file}: {error}") from error
    facts = kinds.facts(folder)
    facts = replace(facts, context=min(sizes["context"], facts.context))
    state = {"program": program, "methods": methods, "sizes": sizes}
    return Engine("executorch", folder, facts, state, _new_tokens, _logits)


def _logits(state: dict, tokens: list[int]) -> Tensor:
    return _reader(state)(tokens)


def _new_tokens(state: dict, request: Request) -> list[int]:
    step = _reader(state)
    return engine.greedy(lambda tokens: step(tokens)[-1], request)


def _reader(state: dict) -> Callable[[list[int]], Tensor]:
    """A function that reads tokens after those read before, and gives the logits after each of them."""
    sizes = state["sizes"]
    keys, values = (torch.zeros(sizes["context"], sizes["layers"], 1, sizes["heads"], sizes["dim"]) for _ in range(2))
    read = 0

    def chunk(tokens: list[int]) -> Tensor:
        nonlocal read
        count, size = len(tokens), 1 if len(tokens) == 1 else CHUNK
        ids, places = torch.tensor([tokens + [0] * (size - count)]), torch.arange(size)
        arguments = (ids, places + read, _mask(read, size, sizes["context"]), places, keys, values)
        logits, *new = state["methods"][METHODS[size > 1]].execute(list(arguments))
        for buffer, part in zip((keys, values), new, strict=True):
            buffer[read : read + count] = part[:count]
        read += count
        return logits[0, :count].clone()  # the runtime's own memory, overwritten by the next step

    return lambda tokens: torch.cat([chunk(tokens[at : at + CHUNK]) for at in range(0, len(tokens), CHUNK)])


def _mask(read: int, size: int, context: int) -> Tensor:
    """What is added to the scores of `size` tokens: -inf for the part of the cache not filled, and for later tokens."""
    past = torch.where(torch.arange(context) < read, 0.0, -torch.inf).expand(size, context)
    return torch.cat([past, torch.full((size, size), -torch.inf).triu(1)], dim=1)
