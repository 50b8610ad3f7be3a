"""Block-wise reconstruction: codes and scales of one block after the other, so that each does what it did before.

1. Two streams of hidden states run through the model: what each block received and gave before rounding, and what
   the blocks trained so far give.
2. A block of fake quantizers reads the second stream and should give what the original gave from the first; the loss is
   the squared distance relative to the original's length, token by token, as in `losses.relative_error`.
3. Each step moves weights within and beyond their cells, and scales, by the sign of the gradient and a rate that falls
   linearly to zero (SignRound: Cheng et al. 2023, arXiv 2309.05516, section 3; which way to round each weight is the
   question of AdaRound, Nagel et al. 2020, arXiv 2004.10568). A block that is no better afterwards on the first few
   windows stays as it was.
4. The block's codes are then fixed, and both streams move on.

Windows that are each read once teach more than few that are read often: a block has as many codes as weights. Memory
is one block's gradients and two streams. Deterministic for a seed.
What it does not do: look at the model's output (`qat` does that afterwards), write files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from avalab import fake_quant, losses
from avalab.walk import Call, first_calls, next_call, own_keywords, with_keywords

JUDGED = 4  # steps' worth of windows that say whether a block got better


@dataclass(frozen=True)
class Blocks:
    """How long each block is trained, on how many windows a step, and how far a step moves at first."""

    steps: int = 40
    windows_per_step: int = 4
    position_rate: float = 0.02  # in quantization steps
    scale_rate: float = 0.002  # relative


def reconstruct(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Int[Tensor, "window time"], how: Blocks, *, seed: int
) -> list[tuple[float, float]]:
    """Train the student's fake quantizers block by block, in place; each block's relative error before and after.

    Raises ValueError for a student without fake quantizers, or other sizes than positive ones.
    """
    if not fake_quant.fake_layers(student):
        raise ValueError("nothing to reconstruct: no layer of the student is a fake quantizer")
    if min(how.steps, how.windows_per_step, len(windows)) < 1:
        raise ValueError(
            f"{how.steps} steps of {how.windows_per_step} of {len(windows)} windows: each has to be above 0"
        )
    generator = torch.Generator().manual_seed(seed)
    blocks = list(zip(student.base_model.layers, teacher.base_model.layers, strict=True))
    mine, theirs = (_streams(model, windows, how.windows_per_step) for model in (student, teacher))
    own = _own_keywords(teacher, windows, how.windows_per_step)
    errors = []
    for index, (block, original) in enumerate(tqdm(blocks, desc="blocks", leave=False)):
        if own:  # the block's own rotary embedding and mask
            mine, theirs = (with_keywords(calls, own[index]) for calls in (mine, theirs))
        with torch.no_grad():
            theirs = [next_call(original, call) for call in theirs]
        aims = [args[0] for args, _ in theirs]
        errors.append(_fit(block, mine, aims, how, generator))
        for layer in fake_quant.fake_layers(block).values():
            layer.settle()
        with torch.no_grad():
            mine = [next_call(block, call) for call in mine]
    return errors


@torch.no_grad()
def _streams(model: PreTrainedModel, windows: Tensor, size: int) -> list[Call]:
    """What enters the first block, a call for every step's windows."""
    first = model.base_model.layers[0]
    return [call for part in windows.split(size) for call in first_calls(model, first, part)]


@torch.no_grad()
def _own_keywords(model: PreTrainedModel, windows: Tensor, size: int) -> list[list[dict]]:
    """Keyword arguments by block and call of a model whose blocks differ in them (Gemma 3), else nothing."""
    parts = [own_keywords(model, part) for part in windows.split(size)]
    return [[one for calls in block for one in calls] for block in zip(*parts, strict=True)]


def _fit(
    block: nn.Module, calls: list[Call], aims: list[Tensor], how: Blocks, generator: torch.Generator
) -> tuple[float, float]:
    layers = fake_quant.fake_layers(block).values()
    rates = [(p, rate) for layer in layers for p, rate in layer.trainable(how.position_rate, how.scale_rate)]
    kept = [parameter.detach().clone() for parameter, _ in rates]
    judged = calls[:JUDGED], aims[:JUDGED]
    before = _error(block, *judged)
    order = torch.cat([torch.randperm(len(calls), generator=generator) for _ in range(-(-how.steps // len(calls)))])
    for step, at in enumerate(order[: how.steps].tolist()):
        loss = _distance(block, calls[at], aims[at])
        for (parameter, rate), slope in zip(rates, torch.autograd.grad(loss, [p for p, _ in rates]), strict=True):
            parameter.data.sub_(slope.sign_(), alpha=rate * (1 - step / how.steps))
    after = _error(block, *judged)
    if not after < before:
        for (parameter, _), old in zip(rates, kept, strict=True):
            parameter.data.copy_(old)
    return before, min(before, after)


def _distance(block: nn.Module, call: Call, aim: Tensor) -> Tensor:
    (given, *_), _kwargs = next_call(block, call)
    return losses.relative_error(given.flatten(0, -2), aim.flatten(0, -2))


@torch.no_grad()
def _error(block: nn.Module, calls: list[Call], aims: list[Tensor]) -> float:
    parts = [float(_distance(block, call, aim)) * len(aim) for call, aim in zip(calls, aims, strict=True)]
    return sum(parts) / sum(len(aim) for aim in aims)
