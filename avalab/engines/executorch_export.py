"""A dense artefact as an ExecuTorch program for phones (.pte, XNNPACK kernels): every size fixed, weights in 32 bits.

1. `torch.export` traces `CachedStep` twice over the same weights: `one` reads a single token, `many` reads `CHUNK` of
   them, both after a cache of `context` tokens of which the mask hides what is not filled.
2. Matrix products and what else XNNPACK knows are handed to it; the rest stays in ExecuTorch's portable kernels.
3. Sizes are stored in the file as methods without arguments, so that a runner needs nothing beside it but a tokenizer.

What it does not do: quantise, lower to a phone's GPU or neural processor, or take a batch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch

from avalab import exported, gguf_export, models
from avalab.artifacts import Artifact
from avalab.engines import cached_step, dense, kinds
from avalab.engines.executorch import CHUNK, INSTALL, METHODS

WEIGHTS = ("fp32",)
CONTEXT = 512  # tokens of the fixed cache, which attention reads whole at each step


def write(artifact: Artifact, weights: str = "fp32", *, context: int = CONTEXT, out: Path | None = None) -> Artifact:
    """Export a dense artefact into `<name>+executorch-<weights>` beside it or `out`; one made before is reused."""
    step = {"step": "executorch", "weights": weights, "context": context}
    about = exported.Export(step, f"executorch-{weights}", ("executorch",))
    return exported.write(
        artifact, about, lambda folder: export(artifact.path, folder, weights, context=context), out=out
    )


def export(folder: Path, out: Path, weights: str = "fp32", *, context: int = CONTEXT) -> None:
    """Fill `out` with the program, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for unknown weights or a model that is not dense, EngineUnavailable without executorch.
    """
    dense.check(folder, weights, known=WEIGHTS, form="ExecuTorch")
    kinds.require("executorch", "executorch", INSTALL)
    model = models.load(folder, dtype=torch.float32).eval()
    out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # deprecations of its own, progress
        warnings.simplefilter("ignore")
        logging.getLogger("executorch").setLevel(logging.ERROR)
        program = _lowered(model, min(context, cached_step.sizes(model)["context"]))
    with (out / kinds.OWN_FILES["executorch"]).open("wb") as file:
        program.write_to_file(file)
    gguf_export.copy_beside(folder, out)


@torch.no_grad()
def _lowered(model, context: int):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    shape = cached_step.sizes(model) | {"context": context}
    step = cached_step.CachedStep(model)
    traced = {}
    for method, time in zip(METHODS, (1, CHUNK), strict=True):
        arguments = cached_step.example(shape, batch=1, time=time, past=context, dtype=torch.float32)
        traced[method] = torch.export.export(step, arguments, strict=False)
    kernels = {method: [XnnpackPartitioner()] for method in traced}
    return to_edge_transform_and_lower(traced, partitioner=kernels, constant_methods=shape).to_executorch()
