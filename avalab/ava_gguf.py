"""The lab's compressor over GGUF's own block types: one mixed .gguf file that the format's readers load as it is.

1. Options: every type whose blocks divide a tensor's columns, for linear layers, embedding and head; K types need
   columns that 256 divides. Rises of linear layers are expected (`expected_rise`); of embedding and head one is
   measured, in the coarsest type, and the others follow from it by their quadratic errors on a sample of rows.
2. Choice: `allocation`, under a budget for the whole file, header and tokenizer included.
3. Rounding: embedding and head first, then the blocks (`rounded_walk`), which make up for what came before.
4. The last calibration windows are kept out of all this: on them the divergence of the finished model is measured.

An engine that does not read a type as written can have it left out: see `TYPES_OF`.
What it does not do: I types but IQ4_NL, model families that `engines.gguf` does not name.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from avalab import (
    allocation,
    block_rounding,
    equivalence,
    expected_rise,
    gguf_blocks,
    gguf_mixed,
    models,
    quality,
    rounded_walk,
)
from avalab.allocation import Allocation, Option
from avalab.block_rounding import BlockRounded
from avalab.compressors import Job
from avalab.expected_rise import BF16, Candidate
from avalab.numerics import NumberFormat
from avalab.rounding import Problem

TYPES = ("q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
TYPES_OF = {  # read as they are written, by engine
    "any": TYPES,
    "llamacpp": TYPES,
    "torch": TYPES,
    "openvino": ("q4_0", "q8_0"),  # it rounds the minima of q4_1 to whole steps; others were not tried
}
HELD_OUT = 2  # calibration windows
TABLE_WINDOWS = 2
TABLE_ROWS = 2048  # of embedding and head, for their errors


@dataclass(frozen=True)
class Sensitivities:
    """Options of every tensor, the problems of embedding and head, and what it took."""

    options: dict[str, list[Option]]
    tables: dict[str, Problem]
    seconds: float


def compress(job: Job, model: PreTrainedModel, budget: int) -> gguf_mixed.GgufModel:
    """Compress `model`, which is that of the `Job`, into a file of at most `budget` bytes; `engine` limits the types.

    Raises ValueError for an engine without a row of types, a model family without names in GGUF (it says which exports
    remain), or a budget below the smallest file.
    """
    config = gguf_mixed.checked_config(job.folder)
    windows, held_out = split_windows(job.calibration)
    reference = _predictions(model, held_out)
    how = {name: job.parameters[name] for name in ("engine", "transform")}
    measured = sensitivities(job.folder, windows, device=job.device, skipped=job.skipped, **how)
    options, posed = measured.options, measured.tables
    fixed = gguf_mixed.fixed_bytes(job.folder, config, model, options)
    chosen = choose(options, budget, fixed)
    formats = {name: option.format for name, option in chosen.chosen.items() if option.format != BF16}
    if formats:
        equivalence.apply_transform(model, windows, how["transform"])
    rounded = {name: _round_table(model, name, posed[name], formats[name]) for name in posed if name in formats}
    layers, damped = rounded_walk.apply(model, windows, formats, round_rows)
    rows = gguf_mixed.rows(model, config, rounded | layers)
    about = {
        "budget_bytes": budget,
        "predicted_bytes": chosen.bytes + fixed,
        "predicted_kl_divergence": chosen.cost,
        "measured_kl_divergence": float(quality.kl_divergence(reference, _predictions(model, held_out)).mean()),
        "measured_on": f"{held_out.numel()} held-out calibration tokens",
        "sensitivity_seconds": measured.seconds,
        "damped_moments": damped,
        "formats": dict(sorted(Counter(option.format for option in chosen.chosen.values()).items())),
        "types": {name: option.format for name, option in chosen.chosen.items()},
        "note": "; ".join(_notes(chosen, options, damped)),
    }
    return gguf_mixed.GgufModel(job.folder, rows, config, about)


def types_of(engine: str) -> tuple[str, ...]:
    """The block types that an engine reads as they are written. Raises ValueError for an unknown engine."""
    if engine not in TYPES_OF:
        raise ValueError(f"no list of GGUF types for engine {engine!r}; choose one of {', '.join(TYPES_OF)}")
    return TYPES_OF[engine]


def split_windows(windows: Int[Tensor, "window time"]) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on, and the last ones to measure on; a single one serves for both."""
    kept = min(HELD_OUT, len(windows) // 2)
    return (windows[:-kept], windows[-kept:]) if kept else (windows, windows)


def sensitivities(
    folder: Path,
    windows: Int[Tensor, "window time"],
    *,
    engine: str = "any",
    transform: str = equivalence.NONE,
    device: str = "cpu",
    skipped: Sequence[str] = (),
) -> Sensitivities:
    """Options of every tensor of a model folder; the last result is kept, so that many budgets need one pass."""
    rows = tuple(map(tuple, windows.tolist()))
    return _sensitivities(folder, rows, types_of(engine), (transform, device), tuple(skipped))


@lru_cache(maxsize=1)
def _sensitivities(
    folder: Path, rows: tuple, types: tuple[str, ...], how: tuple[str, str], skipped: tuple
) -> Sensitivities:
    start, windows, (transform, device) = time.perf_counter(), torch.tensor(rows), how
    model = models.load(folder, device)
    equivalence.apply_transform(model, windows, transform)

    def candidates(rows: int, columns: int) -> list[Candidate]:
        return [_candidate(gguf_blocks.FORMATS[name], rows, columns) for name in _fitting(types, columns)]

    found = expected_rise.measure(model, windows, candidates, skipped=skipped, damped_by_tokens=True)
    tables = {name: _table_options(model, windows, name, posed, types) for name, posed in found.tables.items()}
    return Sensitivities(tables | found.layers, found.tables, time.perf_counter() - start)


def curve(folder: Path, found: Sensitivities, *, steps: int = 30) -> list[tuple[int, Allocation]]:
    """The best allocation for budgets from the smallest file's to bf16's in equal steps, each with its file's bytes."""
    fixed = gguf_mixed.fixed_bytes(folder, gguf_mixed.checked_config(folder), models.load(folder), found.options)
    least, most = (fixed + sum(end(o.bytes for o in row) for row in found.options.values()) for end in (min, max))
    budgets = [round(least + (most - least) * step / steps) for step in range(steps + 1)]
    return [(one.bytes + fixed, one) for one in (choose(found.options, budget, fixed) for budget in budgets)]


def choose(options: Mapping[str, list[Option]], budget: int, fixed: int) -> Allocation:
    """The best allocation within the budget; raises ValueError naming the smallest file."""
    smallest = fixed + sum(min(option.bytes for option in row) for row in options.values())
    if budget < smallest:
        raise ValueError(f"a budget of {budget:,} bytes is below the smallest GGUF file, {smallest:,} bytes")
    return allocation.allocate(options, budget - fixed)


def round_rows(weight: Tensor, posed: Problem, format: str, rows: list[int]) -> list[BlockRounded]:
    """What `rounded_walk` calls: layers that share inputs and type."""
    return block_rounding.split(block_rounding.round_weight(weight, posed, gguf_blocks.FORMATS[format]), rows)


def _fitting(types: tuple[str, ...], columns: int) -> list[str]:
    return [name for name in types if block_rounding.fits(gguf_blocks.FORMATS[name], columns)]


def _candidate(format: NumberFormat, rows: int, columns: int) -> Candidate:
    def approximate(sample: Tensor, cost: Tensor) -> Tensor:
        scales, offsets, _ = block_rounding.stored(*block_rounding.search(sample, cost, format), format)
        return block_rounding.nearest(sample, format, scales, offsets)

    return Candidate(format.name, block_rounding.stored_bytes(rows, columns, format), approximate)


def _table_options(
    model: PreTrainedModel, windows: Tensor, name: str, posed: Problem, types: tuple[str, ...]
) -> list[Option]:
    """bf16 and the types that fit; the divergence of the worst is measured, the others' go by their errors."""
    table = model.get_submodule(name).weight
    rows, columns = table.shape
    sample = table.detach()[:: max(1, rows // TABLE_ROWS)].float()
    errors = {}
    for type in _fitting(types, columns):
        difference = (
            block_rounding.round_weight(sample, posed, gguf_blocks.FORMATS[type]).decode(torch.float32) - sample
        )
        errors[type] = float(((difference @ posed.moment) * difference).sum())
    found = [Option(BF16, 2 * table.numel(), 0.0)]
    if errors:
        worst = max(errors, key=errors.get)
        rounded = block_rounding.round_weight(table.detach(), posed, gguf_blocks.FORMATS[worst])
        rise = expected_rise.of_replacement(model, windows[:TABLE_WINDOWS], table, rounded.decode(table.dtype))
    for type, error in errors.items():
        size = block_rounding.stored_bytes(rows, columns, gguf_blocks.FORMATS[type])
        found.append(Option(type, size, rise * error / errors[worst]))
    return found


@torch.no_grad()
def _round_table(model: PreTrainedModel, name: str, posed: Problem, type: str) -> BlockRounded:
    """Replace embedding or head, in place, by its rounded values."""
    table = model.get_submodule(name).weight
    rounded = block_rounding.round_weight(table.detach(), posed, gguf_blocks.FORMATS[type])
    table.data = rounded.decode(table.dtype)
    return rounded


@torch.no_grad()
def _predictions(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Log-probabilities of every token of the windows: 100 MB for 512 tokens."""
    head, softcap = quality.output_head(model)
    return quality.log_probabilities(quality.hidden_states(model, windows).flatten(0, 1), head, softcap)


def _notes(chosen: Allocation, options: Mapping[str, list[Option]], damped: int) -> list[str]:
    """What a reader of the card should know about tensors without types, damping and a budget that asks for nothing."""
    ragged = [name for name, row in options.items() if len(row) == 1]
    found = [f"no block of 32 divides the columns of {', '.join(ragged)}: left in bf16"] if ragged else []
    found += [f"{damped} second moments were singular and got more damping"] if damped else []
    if all(option.format == BF16 for option in chosen.chosen.values()):
        found.append("the budget holds the whole bf16 model: copied, nothing was rounded")
    return found
