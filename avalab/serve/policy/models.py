"""Which models stay in memory, which one is loaded next, and what is loaded before anybody asks.

1. A model is worth `load_ms x uses / bytes`, `uses` being its requests, each of which counts half after `half_life_ms`:
   load cost times frequency times recency over bytes. The least worth leaves first; pinned and busy ones stay.
   Source: Cao and Irani, "Cost-aware WWW proxy caching algorithms" (1997), whose cost and size this takes over.
2. `next_model` serves those in memory while anybody asks for them, and turns to another one when nobody does or when
   its oldest request has waited `max_swap_wait_ms`: an order A B A C A B is served as A A A, B B, C.
3. `Order` counts which model an agent asks for after which. It proposes to load one where the time saved, by its own
   record, is more than the time wasted, and what it loads never displaces another model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from avalab.lab.errors import InputError
from avalab.serve.policy.queue import Ticket


class NoRoom(Exception):
    """Everything in memory is pinned or busy: the model has to wait."""


@dataclass
class Resident:
    """A model in memory."""

    name: str
    bytes: int
    load_ms: float
    uses: float = 0.0
    used_ms: float = 0.0
    pinned: bool = False
    busy: int = 0


@dataclass
class ModelCache:
    """The models in memory, within `max_bytes`."""

    max_bytes: int
    half_life_ms: float = 60_000.0
    resident: dict[str, Resident] = field(default_factory=dict)
    loads: int = 0
    evictions: int = 0

    @property
    def bytes(self) -> int:
        """What the models in memory take."""
        return sum(model.bytes for model in self.resident.values())

    def worth(self, model: Resident, now_ms: float) -> float:
        """Milliseconds of loading that a byte of this model saves; 0 for one that was never used."""
        return model.load_ms * self._uses(model, now_ms) / max(1, model.bytes)

    def _uses(self, model: Resident, now_ms: float) -> float:
        return model.uses * 0.5 ** (max(0.0, now_ms - model.used_ms) / self.half_life_ms)

    def use(self, name: str, now_ms: float) -> None:
        """Count a request to a model in memory."""
        model = self.resident[name]
        model.uses, model.used_ms = self._uses(model, now_ms) + 1, now_ms

    def add(self, name: str, size_bytes: int, load_ms: float, now_ms: float, *, pinned: bool = False) -> None:
        """A model has been loaded; room was made before."""
        self.loads += 1
        self.resident[name] = Resident(name, size_bytes, load_ms, used_ms=now_ms, pinned=pinned)

    def room_for(self, name: str, size_bytes: int, now_ms: float) -> list[str]:
        """The models that have to leave for one of `size_bytes`, which then count as gone.

        Raises InputError for a model larger than the memory, NoRoom where too much is pinned or busy.
        """
        fixed = sum(model.bytes for model in self.resident.values() if model.pinned)
        if size_bytes + fixed > self.max_bytes:
            raise InputError(
                f"{name} takes {size_bytes / 2**20:,.0f} MiB beside {fixed / 2**20:,.0f} MiB of pinned models, and "
                f"max_memory_mb allows {self.max_bytes / 2**20:,.0f}; raise it, or take a smaller model"
            )
        return self._drop_until(self.max_bytes - size_bytes, now_ms)

    def shrink(self, target_bytes: int, now_ms: float) -> list[str]:
        """The models that have to leave to reach the target, as far as they can: busy and pinned ones stay."""
        try:
            return self._drop_until(target_bytes, now_ms)
        except NoRoom:
            return self._drop(self._leaving(now_ms))

    def _leaving(self, now_ms: float) -> list[Resident]:
        free = [model for model in self.resident.values() if not model.pinned and not model.busy]
        return sorted(free, key=lambda model: (self.worth(model, now_ms), model.used_ms))

    def _drop_until(self, limit_bytes: int, now_ms: float) -> list[str]:
        held, leaving = self.bytes, []
        for model in self._leaving(now_ms):
            if held <= limit_bytes:
                break
            leaving.append(model)
            held -= model.bytes
        if held > limit_bytes:
            raise NoRoom(f"{held - limit_bytes:,} bytes too many are pinned or busy")
        return self._drop(leaving)

    def _drop(self, models: Iterable[Resident]) -> list[str]:
        names = [model.name for model in models]
        for name in names:
            del self.resident[name]
        self.evictions += len(names)
        return names


def next_model(
    waiting: Sequence[Ticket], loaded: Collection[str], now_ms: float, *, max_swap_wait_ms: float, urgent: float = 11.0
) -> str | None:
    """The model to load next, or None while those in memory have enough to do.

    A model that is not loaded is chosen when no request waits for a loaded one, when its oldest request has waited
    `max_swap_wait_ms`, or when one of its requests is at least as `urgent`.
    """
    away = [ticket for ticket in waiting if ticket.model not in loaded]
    if not away:
        return None
    late = [ticket for ticket in away if now_ms - ticket.arrived_ms >= max_swap_wait_ms or ticket.priority >= urgent]
    if len(away) < len(waiting) and not late:
        return None
    if late:
        return min(late, key=lambda ticket: (-ticket.priority, ticket.arrived_ms)).model
    asked = Counter(ticket.model for ticket in away)
    oldest = {model: min(ticket.arrived_ms for ticket in away if ticket.model == model) for model in asked}
    return min(asked, key=lambda model: (-asked[model], oldest[model]))


@dataclass
class Order:
    """Which model an agent asks for after which, and whether loading ahead has paid."""

    least_seen: int = 3
    least_share: float = 0.6
    after: dict[tuple[str, str], Counter] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    saved_ms: float = 0.0
    wasted_ms: float = 0.0
    proposed: dict[str, float] = field(default_factory=dict)

    def asked(self, agent: str, model: str) -> None:
        """An agent asks for a model; what had been loaded for that has saved its time."""
        if model in self.proposed:
            self.saved_ms += self.proposed.pop(model)
        if agent in self.last:
            self.after.setdefault((agent, self.last[agent]), Counter())[model] += 1
        self.last[agent] = model

    def propose(self, agent: str, loaded: Collection[str], load_ms: Mapping[str, float]) -> str | None:
        """The model that this agent is likely to ask for next, if it is not loaded and loading ahead pays."""
        seen = self.after.get((agent, self.last.get(agent, "")), Counter())
        total = seen.total()
        if total < self.least_seen or self.wasted_ms > self.saved_ms:
            return None
        model, count = seen.most_common(1)[0]
        if model in loaded or count / total < self.least_share:
            return None
        self.proposed[model] = load_ms.get(model, 0.0)
        return model

    def evicted(self, model: str) -> None:
        """A model left memory; where it was loaded ahead and never asked for, its time was wasted."""
        self.wasted_ms += self.proposed.pop(model, 0.0)


@dataclass(frozen=True)
class Replayed:
    """What a trace cost: loads of models, and how long each request waited."""

    loads: int
    waits_ms: tuple[float, ...]
    end_ms: float


def replay(
    trace: Sequence[tuple[float, str]],
    sizes: Mapping[str, int],
    *,
    max_bytes: int,
    load_ms: float,
    serve_ms: float,
    max_swap_wait_ms: float | None,
) -> Replayed:
    """A trace of (milliseconds, model) computed one by one on a clock that only counts.

    With `max_swap_wait_ms` None requests are served as they come and the model used longest ago leaves: plain LRU.
    """
    cache, now, waits = ModelCache(max_bytes), 0.0, []
    coming = [Ticket(index, model, 5, arrived) for index, (arrived, model) in enumerate(sorted(trace))]
    waiting: list[Ticket] = []
    recency: list[str] = []
    while coming or waiting:
        if not waiting:
            now = max(now, coming[0].arrived_ms)
        while coming and coming[0].arrived_ms <= now:
            waiting.append(coming.pop(0))
        if max_swap_wait_ms is None:
            model = waiting[0].model
        else:
            model = next_model(waiting, cache.resident, now, max_swap_wait_ms=max_swap_wait_ms)
            model = model or next(ticket.model for ticket in waiting if ticket.model in cache.resident)
        ticket = next(ticket for ticket in waiting if ticket.model == model)
        if model not in cache.resident:
            if max_swap_wait_ms is None:
                while cache.bytes + sizes[model] > max_bytes:
                    del cache.resident[recency.pop(0)]
            else:
                cache.room_for(model, sizes[model], now)
            now += load_ms
            cache.add(model, sizes[model], load_ms, now)
        waiting.remove(ticket)
        waits.append(now - ticket.arrived_ms)
        cache.use(model, now)
        recency = [other for other in recency if other != model] + [model]
        now += serve_ms
    return Replayed(cache.loads, tuple(waits), now)
