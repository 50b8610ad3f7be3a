"""ExecuTorch: a dense artefact as a program for phones (.pte, XNNPACK kernels), and the engine that runs it here.

1. `torch.export` traces `aot.CachedStep` twice over the same weights: `one` reads a single token, `many` reads `CHUNK`
   of them, both after a cache of `context` tokens. Every size is fixed, weights have 32 bits.
2. Matrix products and what else XNNPACK knows are handed to it; the rest stays in ExecuTorch's portable kernels. Sizes
   are stored in the file as methods without arguments, so that a runner needs nothing beside it but a tokenizer.
3. `load` opens a program by the same runtime's Python binding. A prompt is read in chunks, the last one filled up with
   tokens whose results are dropped, and each answer token alone. What of the cache is filled, the mask says.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from avalab.engines import aot, checks, engine
from avalab.engines import gguf as gguf_file
from avalab.engines.checks import Check
from avalab.engines.engine import Engine
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.models import checkpoint

INSTALL = 'pip install -e ".[executorch]"'

METHODS, CHUNK = ("one", "many"), 32

SIZES = ("layers", "heads", "dim", "context")


def load(artifact: Artifact | Path, *, threads: int = 0) -> Engine:
    """Open an ExecuTorch program; the longest sequence is the program's context. `threads` cannot be chosen here.

    Raises ValueError for a program that the runtime cannot load.
    """
    folder = engine.folder_for("executorch", artifact)
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
        raise InputError(f"ExecuTorch cannot load {file}: {error}") from error
    state = {"program": program, "methods": methods, "sizes": sizes}
    return engine.from_reader(
        "executorch", folder, engine.model_facts(folder, context=sizes["context"]), state, _reader
    )


def _reader(state: dict, capacity: int, every: bool) -> Callable[[list[int]], Tensor]:
    sizes = state["sizes"]
    keys, values = (torch.zeros(sizes["context"], sizes["layers"], 1, sizes["heads"], sizes["dim"]) for _ in range(2))
    read = 0

    def chunk(tokens: list[int]) -> Tensor:
        nonlocal read
        count, size = len(tokens), 1 if len(tokens) == 1 else CHUNK
        ids, places = torch.tensor([tokens + [0] * (size - count)]), torch.arange(size)
        past = torch.where(torch.arange(sizes["context"]) < read, 0.0, -torch.inf).expand(size, -1)
        mask = torch.cat([past, torch.full((size, size), -torch.inf).triu(1)], dim=1)
        logits, *new = state["methods"][METHODS[size > 1]].execute([ids, places + read, mask, places, keys, values])
        for buffer, part in zip((keys, values), new, strict=True):
            buffer[read : read + count] = part[:count]
        read += count
        return logits[0, :count].clone()  # the runtime's own memory, overwritten by the next step

    return lambda tokens: torch.cat([chunk(tokens[at : at + CHUNK]) for at in range(0, len(tokens), CHUNK)])


# --- export ----------------------------------------------------------------------------------------------------------

WEIGHTS = ("fp32",)

CONTEXT = 512  # tokens of the fixed cache, which attention reads whole at each step


def write(artifact: Artifact, weights: str = "fp32", *, context: int = CONTEXT, out: Path | None = None) -> Artifact:
    """Export a dense artefact into `<name>+executorch-<weights>` beside it or `out`; one made before is reused."""
    step = {"step": "executorch", "weights": weights, "context": context}
    about = artifacts.Export(step, f"executorch-{weights}", ("executorch",))
    check = checks.against(artifact, Check({"executorch": ""}))
    return artifacts.write_export(
        artifact, about, lambda folder: export(artifact.path, folder, weights, context=context), check, out=out
    )


def export(folder: Path, out: Path, weights: str = "fp32", *, context: int = CONTEXT) -> None:
    """Fill `out` with the program, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for unknown weights or a model that is not dense, EngineUnavailable without executorch.
    """
    engine.check_source(folder, weights, known=WEIGHTS, form="ExecuTorch", packed="any")
    engine.require("executorch", "executorch", INSTALL)
    model = checkpoint.load_dense(folder, dtype=torch.float32)
    shape = aot.sizes(model)
    shape["context"] = min(context, shape["context"])
    traced = {}
    out.mkdir(parents=True, exist_ok=True)
    # Deprecations of its own, progress.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("executorch").setLevel(logging.ERROR)
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        for method, time in zip(METHODS, (1, CHUNK), strict=True):
            arguments = aot.example(shape, batch=1, time=time, past=shape["context"], dtype=torch.float32)
            traced[method] = torch.export.export(aot.CachedStep(model), arguments, strict=False)
        kernels = {method: [XnnpackPartitioner()] for method in traced}
        lowered = to_edge_transform_and_lower(traced, partitioner=kernels, constant_methods=shape).to_executorch()
    with (out / engine.OWN_FILES["executorch"]).open("wb") as file:
        lowered.write_to_file(file)
    gguf_file.copy_beside(folder, out)
