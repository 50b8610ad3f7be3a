"""The order in which requests are computed.

1. A request's level is its priority plus one for every `ageing_ms` that it has waited: whoever waits long enough passes
   whatever arrives later, so nothing starves. The bound is `starvation_ms`.
2. Within a level (its whole part), models that are loaded come first, then prompts that share the longest beginning
   with a prompt that is cached or was taken just before, then arrival. Collation and prefixes never pass a level.
3. A batch is due when it is full, when its oldest request has waited `max_wait_ms`, or when one is urgent.

Source of the ageing: Silberschatz, Galvin and Gagne, "Operating System Concepts", section on priority scheduling.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import floor

from avalab.lab.errors import InputError, Unavailable

PRIORITIES = (0, 10)  # the least and the most urgent

COUNTED = 64  # characters of a shared beginning that make a difference: less is chance, such as a template's opening


class QueueFull(Unavailable):
    """More requests wait than the limit allows."""


@dataclass(frozen=True)
class Ticket:
    """A request that waits: what it asks for, how urgent it is, and when it came (milliseconds of any clock)."""

    key: Hashable
    model: str
    priority: float
    arrived_ms: float
    prompt: str = ""


def shared_prefix(a: str, b: str) -> int:
    """Length of the common beginning of two texts, in characters."""
    if a == b:
        return len(a)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@dataclass
class Queue:
    """Waiting requests of all models."""

    ageing_ms: float = 2000.0
    max_wait_ms: float = 10.0
    priority_threshold: float = 7.0
    limit: int = 256
    waiting: list[Ticket] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.waiting)

    @property
    def starvation_ms(self) -> float:
        """The longest that a request can be passed by later ones, however urgent those are."""
        return (PRIORITIES[1] - PRIORITIES[0] + 1) * self.ageing_ms

    def push(self, ticket: Ticket) -> None:
        """Let a request wait. Raises QueueFull at the limit, InputError for a priority that is none."""
        low, high = PRIORITIES
        if not low <= ticket.priority <= high:
            raise InputError(f"priority is {ticket.priority}; it is a number from {low} to {high}, the most urgent")
        if len(self.waiting) >= self.limit:
            raise QueueFull(f"{len(self.waiting)} requests wait already, the limit; try again later")
        self.waiting.append(ticket)

    def remove(self, key: Hashable) -> bool:
        """Forget a request that waits; whether there was one."""
        before = len(self.waiting)
        self.waiting = [ticket for ticket in self.waiting if ticket.key != key]
        return len(self.waiting) < before

    def level(self, ticket: Ticket, now_ms: float) -> float:
        """Priority and age in one number; a clock that was set back makes nobody younger than new."""
        return ticket.priority + max(0.0, now_ms - ticket.arrived_ms) / self.ageing_ms

    def is_urgent(self, ticket: Ticket) -> bool:
        """Whether the request came as an urgent one."""
        return ticket.priority >= self.priority_threshold

    def is_due(self, now_ms: float, batch_size: int) -> bool:
        """Whether a batch should begin now rather than wait for company."""
        if not self.waiting:
            return False
        oldest = min(ticket.arrived_ms for ticket in self.waiting)
        full = len(self.waiting) >= batch_size
        return full or now_ms - oldest >= self.max_wait_ms or any(map(self.is_urgent, self.waiting))

    def take(
        self,
        now_ms: float,
        count: int,
        *,
        models: Collection[str] | None = None,
        loaded: Collection[str] = (),
        cached: Sequence[str] = (),
    ) -> list[Ticket]:
        """The next `count` requests, which then no longer wait; `models`: only of these.

        `loaded` are models whose weights are in memory, `cached` prompts whose key-value cache is.
        """
        known, taken = list(cached), []
        open_ = [ticket for ticket in self.waiting if models is None or ticket.model in models]
        while open_ and len(taken) < count:
            best = min(open_, key=lambda ticket: self._rank(ticket, now_ms, loaded, known))
            open_.remove(best)
            taken.append(best)
            known.append(best.prompt)
        keys = {id(ticket) for ticket in taken}
        self.waiting = [ticket for ticket in self.waiting if id(ticket) not in keys]
        return taken

    def _rank(self, ticket: Ticket, now_ms: float, loaded: Collection[str], known: Sequence[str]) -> tuple:
        shared = max((shared_prefix(ticket.prompt, other) for other in known), default=0)
        return (
            -floor(self.level(ticket, now_ms)),
            ticket.model not in loaded,
            -(shared if shared >= COUNTED else 0),
            ticket.arrived_ms,
        )
