"""The ahead-of-time engine: a package of machine code that `aot_export` compiled, run by torch without model code.

The loop is `aot_program`'s, which also runs alone: that file, torch and the package are all that a machine needs. The
shared greedy loop chooses, so that grammars and end tokens are the same as everywhere.

What it does not do: compile (see `aot_export`), or run a package on a processor without the instructions of the one
that it was compiled on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from avalab.artifacts import Artifact
from avalab.engines import aot_program, engine, kinds
from avalab.engines.engine import Engine, Request


def load(artifact: Artifact | Path, *, threads: int = 0) -> Engine:
    """Open a compiled package; `threads` 0 leaves torch's own choice.

    Raises ValueError for a package that torch cannot load.
    """
    folder = kinds.checked("aot", artifact)
    if threads:
        torch.set_num_threads(threads)
    file = folder / kinds.OWN_FILES["aot"]
    try:
        package, sizes = aot_program.opened(str(file))
    except RuntimeError as error:
        raise ValueError(f"torch cannot load the package {file}: {str(error).strip().splitlines()[0]}") from error
    return Engine("aot", folder, kinds.facts(folder), {"package": package, "sizes": sizes}, _new_tokens, _logits)


def _logits(state: dict, tokens: list[int]) -> Tensor:
    step = aot_program.reader(state["package"], state["sizes"], len(tokens))
    return step(torch.tensor([tokens]), every=True)[0]


def _new_tokens(state: dict, request: Request) -> list[int]:
    capacity = len(request.prompt) + request.max_new_tokens
    step = aot_program.reader(state["package"], state["sizes"], capacity)
    return engine.greedy(lambda tokens: step(torch.tensor([tokens]))[0, -1], request)
