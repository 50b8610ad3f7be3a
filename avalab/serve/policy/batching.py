"""How many requests run at once, and how a long prompt is cut so that an urgent one gets in between.

1. `BatchSize` adds one place while answers come faster than the target and more are asked for, and takes a third away
   when the 90th percentile of the last steps is above it: additive increase, multiplicative decrease.
2. `pieces` cuts a prompt at multiples of a size, and where another prompt's shared beginning ends, so that the
   key-value cache can be kept there while its first user goes on.
3. `share_processors` gives every worker its own processors where there are enough.

Source of 1: Chiu and Jain, "Analysis of the increase and decrease algorithms for congestion avoidance" (1989).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from avalab.lab.errors import InputError

KEPT_SAMPLES = 20

ROOM = 0.8  # of the target: below that there is room for one more

LESS = 2 / 3


@dataclass
class BatchSize:
    """The number of requests that run at once, between 1 and `most`, by the time between two tokens."""

    most: int
    target_ms: float
    dynamic: bool = True
    size: int = 0
    samples: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_SAMPLES))

    def __post_init__(self) -> None:
        if self.most < 1 or self.target_ms <= 0:
            raise InputError(f"a batch holds 1 or more within more than 0 ms, got {self.most} and {self.target_ms} ms")
        self.size = min(self.size, self.most) or self.most

    def observe(self, step_ms: float, *, waiting: int) -> int:
        """Learn how long a step took while `waiting` requests had no place; the size from now on."""
        self.samples.append(step_ms)
        if not self.dynamic:
            return self.size
        slow = sorted(self.samples)[int(0.9 * (len(self.samples) - 1))]
        if slow > self.target_ms and len(self.samples) >= 3:
            self.size = max(1, int(self.size * LESS))
            self.samples.clear()
        elif slow < ROOM * self.target_ms and waiting and len(self.samples) >= 3:
            self.size = min(self.most, self.size + 1)
        return self.size


def pieces(start: int, end: int, size: int, cuts: Iterable[int] = ()) -> list[int]:
    """Where a prompt of `end` tokens, `start` of which are known, is cut: the ends of its pieces, `end` the last."""
    if size < 1:
        raise InputError(f"a piece of a prompt has 1 token or more, got {size}")
    wanted = sorted({*range(start + size, end, size), *(cut for cut in cuts if start < cut < end)})
    return [*wanted, end] if end > start else []


def longest_match(tokens: Sequence[int], others: Iterable[Sequence[int]]) -> tuple[int, int]:
    """(index, length) of the sequence that shares the longest beginning with `tokens`; (-1, 0) where none does."""
    best = (-1, 0)
    for index, other in enumerate(others):
        shared = 0
        for a, b in zip(tokens, other, strict=False):
            if a != b:
                break
            shared += 1
        if shared > best[1]:
            best = (index, shared)
    return best


def share_processors(processors: Sequence[int], workers: int) -> list[tuple[int, ...]]:
    """The processors of each worker: disjoint where every one gets at least one, else all of them for all."""
    if workers < 1:
        raise InputError(f"there is at least 1 worker, got {workers}")
    if workers > len(processors):
        return [tuple(processors)] * workers
    each, rest = divmod(len(processors), workers)
    shares, at = [], 0
    for index in range(workers):
        count = each + (index < rest)
        shares.append(tuple(processors[at : at + count]))
        at += count
    return shares
