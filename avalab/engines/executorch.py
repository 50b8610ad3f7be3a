"""ExecuTorch: a dense artefact as a program for phones (.pte, XNNPACK kernels), and the engine that runs it here.

1. `torch.export` traces `aot.CachedStep` twice over the same weights: `one` reads a single token, `many` reads `CHUNK`
   of them, both after a cache of `context` tokens. Every size is fixed, weights have 32 bits.
2. Matrix products and what else XNNPACK knows are handed to it; the rest stays in ExecuTorch's portable kernels. Sizes
   are stored in the file as methods without arguments, so that a runner needs nothing beside it but a tokenizer.
3. `load` opens a program by the same runtime's Python binding. A prompt is read in chunks of `CHUNK` tokens, the last
   one filled up with tokens whose results are dropped, and each answer token alone. The cache is a buffer of the
   program's context; what of it is filled, the mask says. The runtime takes the processor's cores.

What it does not do: quantise, lower to a phone's GPU or neural processor, take a batch, or run longer than its context.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from avalab.engines import aot, engine
from avalab.engines import gguf as gguf_file
from avalab.engines.engine import Engine, Request
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.models import checkpoint

INSTALL = 'pip install -e ".[executorch]"'

METHODS, CHUNK = ("one", "many"), 32

SIZES = ("layers", "heads", "dim", "context")


def load(artifact: Artifact | Path, *, threads: int = 0) -> Engine:
    """Open an ExecuTorch program; the longest sequence is the program's context. `threads` cannot be chosen here.

    Raises ValueError for a program that the runtime cannot load.
    """
    folder = engine.checked("executorch", artifact)
    engine.require("executorch", "executorch", INSTALL)
    with warnings.catch_warnings():  # "this API is experimental", and deprecations of its own
        warnings.simplefilter("ignore")
        from executorch.runtime import Runtime
    file = folder / engine.OWN_FILES["executorch"]
    try:
        program = Runtime.get().load_program(file)
        sizes = {name: program.load_method(name).execute([])[0] for name in SIZES}
        methods = {name: program.load_method(name) for name in METHODS}
    except (RuntimeError, AttributeError) as error:  # a method that is not there is None
        raise ValueError(f"ExecuTorch cannot load {file}: {error}") from error
    facts = engine.facts(folder)
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


# --- export ----------------------------------------------------------------------------------------------------------

WEIGHTS = ("fp32",)

CONTEXT = 512  # tokens of the fixed cache, which attention reads whole at each step


def write(artifact: Artifact, weights: str = "fp32", *, context: int = CONTEXT, out: Path | None = None) -> Artifact:
    """Export a dense artefact into `<name>+executorch-<weights>` beside it or `out`; one made before is reused."""
    step = {"step": "executorch", "weights": weights, "context": context}
    about = artifacts.Export(step, f"executorch-{weights}", ("executorch",))
    return artifacts.write_export(
        artifact, about, lambda folder: export(artifact.path, folder, weights, context=context), out=out
    )


def export(folder: Path, out: Path, weights: str = "fp32", *, context: int = CONTEXT) -> None:
    """Fill `out` with the program, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for unknown weights or a model that is not dense, EngineUnavailable without executorch.
    """
    engine.check_dense(folder, weights, known=WEIGHTS, form="ExecuTorch")
    engine.require("executorch", "executorch", INSTALL)
    model = checkpoint.load_model(folder, dtype=torch.float32).eval()
    out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # deprecations of its own, progress
        warnings.simplefilter("ignore")
        logging.getLogger("executorch").setLevel(logging.ERROR)
        program = _lowered(model, min(context, aot.sizes(model)["context"]))
    with (out / engine.OWN_FILES["executorch"]).open("wb") as file:
        program.write_to_file(file)
    gguf_file.copy_beside(folder, out)


@torch.no_grad()
def _lowered(model, context: int):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    shape = aot.sizes(model) | {"context": context}
    step = aot.CachedStep(model)
    traced = {}
    for method, time in zip(METHODS, (1, CHUNK), strict=True):
        arguments = aot.example(shape, batch=1, time=time, past=context, dtype=torch.float32)
        traced[method] = torch.export.export(step, arguments, strict=False)
    kernels = {method: [XnnpackPartitioner()] for method in traced}
    return to_edge_transform_and_lower(traced, partitioner=kernels, constant_methods=shape).to_executorch()
