"""Run a compiled package: greedy tokens after a prompt of token ids. It needs torch, and no model's Python code.

    python generate.py model.pt2 16 504 338 28      # 16 tokens after the prompt 504 338 28

The program keeps the key-value cache, one buffer of prompt plus answer with time first, and hands the package the part
that is filled. A package holds machine code for the kind of processor that it was compiled on: run only your own.

What it does not do: import anything of the lab; it is copied into every compiled artefact.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def opened(file: str) -> tuple[Callable, dict[str, str]]:
    """A package's function and the sizes that were stored in it."""
    package = torch._inductor.aoti_load_package(file)
    return package, package.get_metadata()


def reader(package: Callable, sizes: dict[str, str], capacity: int, *, batch: int = 1) -> Callable:
    """A function that reads tokens (batch, time) after those read before: logits of the last one, or of `every` one.

    `capacity` is the number of tokens that can be read in all.
    """
    dtype = DTYPES[sizes["weights"]]
    layers, heads, dim = (int(sizes[name]) for name in ("layers", "heads", "dim"))
    keys, values = (torch.empty(capacity, layers, batch, heads, dim, dtype=dtype) for _ in range(2))
    read = 0

    def step(ids: torch.Tensor, *, every: bool = False) -> torch.Tensor:
        nonlocal read
        time = ids.shape[1]
        mask = torch.full((time, read + time), -torch.inf).triu(read + 1).to(dtype)
        places = torch.arange(time)
        kept = places if every else places[-1:]
        # What is compiled takes tensors as they lay in the example: without gaps.
        logits, *new = package(ids.contiguous(), places + read, mask, kept, keys[:read], values[:read])
        for buffer, part in zip((keys, values), new, strict=True):
            buffer[read : read + time] = part
        read += time
        return logits

    return step


def main(file: str, count: str, *prompt: str) -> None:
    """Print `count` greedy tokens after `prompt`."""
    package, sizes = opened(file)
    step, ids, tokens = reader(package, sizes, len(prompt) + int(count)), torch.tensor([list(map(int, prompt))]), []
    while len(tokens) < int(count):
        ids = step(ids)[:, -1:].argmax(-1)
        tokens.append(int(ids))
    print(*tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
