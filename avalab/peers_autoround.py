"""AutoRound: rounding learnt by signed gradient steps, block by block, kept as a compressed-tensors checkpoint.

1. The library minimises each block's output error over rounding offsets and clipping ranges (Cheng et al. 2024, arXiv
   2309.05516) on the calibration windows that every method gets.
2. Its own scales (asked for in bf16, as the file keeps them) and zero points give every weight's integer back: they are
   read off the rounded model, not rounded again, and packed as the lab's own checkpoints are. So one loader and one
   count of bytes serve both, and any number of bits has a dense file.

Embedding, head and norms stay in bf16. What it does not do: the library's export formats, activations, mixed bits.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avalab import models, packing
from avalab.compressors import Job
from avalab.numerics import Grid, Rounded
from avalab.packing import Packed
from avalab.quantize import quietly

BATCH_WINDOWS = 8  # the library's own


def compress(job: Job, *, seed: int = 0) -> Packed:
    """The job's model rounded with `bits`, `group_size` and `iterations` of the job's parameters, asymmetric."""
    model, tokenizer = models.load(job.folder, job.device), models.load_tokenizer(job.folder)
    grid = Grid(job.parameters["bits"], job.parameters["group_size"])
    with _silent(), torch.random.fork_rng():
        rounded_model = _tuned(model, tokenizer, job, seed)
    layers = {name: rounded(layer, grid) for name, layer in models.linear_layers(rounded_model).items()}
    return packing.pack(rounded_model, layers, measured={"iterations": job.parameters["iterations"]})


def rounded(layer: nn.Linear, grid: Grid) -> Rounded:
    """The integers of a layer that AutoRound has rounded, from its own scales and zero points.

    Raises ValueError when scales and zero points do not give the layer's weights back.
    """
    scales, zeros = (_per_group(part, layer.out_features) for part in (layer.scale, layer.zp))
    codes = layer.weight.detach().float().unflatten(1, (scales.shape[1], -1)) / scales[..., None] + zeros[..., None]
    steps = codes.round().clamp(0, 2**grid.bits - 1)
    distance = float((codes - steps).abs().max())
    if distance > 0.25:  # bf16 weights stand at most 2^-9 of their size, a sixteenth of a step at 4 bits, off the grid
        raise ValueError(f"a weight is {distance:.2f} steps off AutoRound's own grid of {grid.bits} bits")
    offset = 2 ** (grid.bits - 1)
    integers = ((steps - offset).flatten(1).to(torch.int8), (zeros - offset).to(torch.int8))
    return Rounded(grid, integers[0], scales, integers[1])


def _tuned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job, seed: int) -> PreTrainedModel:
    from auto_round import AutoRound

    windows = job.calibration
    samples = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in windows]
    sizes = {"nsamples": len(windows), "seqlen": windows.shape[1], "batch_size": min(BATCH_WINDOWS, len(windows))}
    grid = {"bits": job.parameters["bits"], "group_size": job.parameters["group_size"], "sym": False}
    how = {"iters": job.parameters["iterations"], "scale_dtype": "bf16", "seed": seed, "device_map": job.device}
    return AutoRound(model, tokenizer, dataset=samples, **sizes, **grid, **how).quantize()[0]


def _per_group(part: Tensor, rows: int) -> Tensor:
    return part.detach().float().reshape(rows, -1)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The library logs to a handler of its own and prints bars."""
    logging.getLogger("autoround").setLevel(logging.CRITICAL)
    with quietly(), contextlib.redirect_stdout(io.StringIO()):
        yield
