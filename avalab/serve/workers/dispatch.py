"""The server's one loop: which waiting request goes to which worker, and which model has to leave for which.

`submit` gives a flight, whose events are kept until everybody who listens has heard them: a request that comes while
the same one is computed hears it from its beginning. A worker that dies has its greedy requests computed again by
another one (what was told before is not told twice); others end with an error. Nobody listening any more cancels.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from avalab.lab.errors import InputError, LabError, Unavailable
from avalab.serve.policy.batching import BatchSize, share_processors
from avalab.serve.policy.models import ModelCache, NoRoom, Order, next_model
from avalab.serve.policy.pressure import is_under_pressure
from avalab.serve.policy.queue import Queue, Ticket
from avalab.serve.policy.settings import Settings
from avalab.serve.workers.pool import Served, Worker, WorkerDied

log = logging.getLogger("avalab.serve")

TRIES = 3  # of a request whose worker dies

FIRST_GUESS = 1.1  # memory of a process over the bytes of its weights, until it is measured

PRESSURE_SECONDS = 1.0

REMEMBERED = 16  # prompts of a worker that are likely in its key-value cache


def now_ms() -> float:
    """Milliseconds of a clock that is never set."""
    return time.monotonic() * 1000


@dataclass(eq=False)
class Flight:
    """A request from its arrival to its last listener: what was told so far, and how it ended."""

    key: str
    job: dict
    ticket: Ticket
    agent: str = ""
    events: list[dict] = field(default_factory=list)
    error: Exception | None = None
    is_over: bool = False
    tries: int = 0
    listeners: int = 0
    started_ms: float = 0.0
    first_ms: float = 0.0
    task: asyncio.Task | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, event: dict) -> None:
        """One more event for whoever listens."""
        self.first_ms = self.first_ms or now_ms()
        self.events.append(event)
        self._wake()

    def end(self, error: Exception | None = None) -> None:
        """Nothing more will be told."""
        self.is_over, self.error = True, error
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Dispatcher:
    """Models, workers and the queue between them."""

    def __init__(self, models: dict[str, Served], settings: Settings) -> None:
        self.models, self.settings = models, settings
        self.queue = Queue(
            settings.ageing_ms, settings.max_wait_time_ms, settings.priority_threshold, settings.queue_limit
        )
        self.cache, self.order = ModelCache(settings.max_bytes), Order()
        self.workers: dict[str, list[Worker]] = {}
        self.flights: dict[str, Flight] = {}
        self.batches: dict[str, BatchSize] = {}
        self.recent: dict[str, deque[str]] = {}
        self.refused: dict[str, Exception] = {}
        self.sizes: dict[str, int] = {}
        self.load_ms: dict[str, float] = {}
        self.loading: dict[str, asyncio.Task] = {}
        self.counts = {"computed": 0, "joined": 0, "restarts": 0, "cancelled": 0, "retried": 0, "pressure": 0}
        self.batch_sizes: deque[int] = deque(maxlen=1000)
        self.waits_ms: deque[float] = deque(maxlen=1000)
        self.is_draining = False
        self._ids, self._wake, self._tasks = itertools.count(), asyncio.Event(), set()
        self._main: list[asyncio.Task] = []

    # --- from outside ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to serve; pinned models are loaded now."""
        for name in self.settings.pinned:
            if name not in self.models:
                raise InputError(f"pinned model {name!r} is not served; there are {', '.join(self.models)}")
            await self._load(name)
            if name in self.refused:
                raise self.refused.pop(name)
        self._main = [asyncio.create_task(self._loop()), asyncio.create_task(self._watch_memory())]

    async def stop(self, drain_s: float = 30.0) -> None:
        """Take no more requests, finish those that are there within `drain_s`, end the workers."""
        self.is_draining = True
        end = time.monotonic() + drain_s
        while self.flights and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for task in (*self._main, *self.loading.values(), *self._tasks):
            task.cancel()
        await asyncio.gather(*self._main, *self.loading.values(), *self._tasks, return_exceptions=True)
        for flight in list(self.flights.values()):
            flight.end(Unavailable("the server ends; ask again"))
        await asyncio.gather(*(worker.close() for group in self.workers.values() for worker in group))
        self.workers.clear()

    def submit(
        self, model: str, job: dict, *, key: str = "", priority: float = 5.0, agent: str = "", said: str = ""
    ) -> Flight:
        """A flight for a job; the one that is there already where its key is known. Raises QueueFull, Unavailable."""
        if self.is_draining:
            raise Unavailable("the server ends; ask again")
        if model not in self.models:
            raise InputError(f"no model {model!r}; there are {', '.join(self.models)}")
        self.order.asked(agent, model)
        key = key or f"unique-{next(self._ids)}"
        if (flight := self.flights.get(key)) and not flight.error:
            self.counts["joined"] += 1
            return flight
        ticket = Ticket(key, model, priority, now_ms(), said)
        flight = Flight(key, {**job, "urgent": self.queue.is_urgent(ticket)}, ticket, agent)
        self.queue.push(ticket)
        self.flights[key] = flight
        self._wake.set()
        return flight

    async def listen(self, flight: Flight) -> AsyncIterator[dict]:
        """Everything that is told in a flight, from its beginning. The last one to leave cancels it."""
        flight.listeners += 1
        heard = 0
        try:
            while True:
                changed = flight.changed
                while heard < len(flight.events):
                    heard += 1
                    yield flight.events[heard - 1]
                if flight.is_over:
                    break
                await changed.wait()
            if flight.error:
                raise flight.error
        finally:
            flight.listeners -= 1
            if not flight.listeners and not flight.is_over:
                self._cancel(flight)

    async def embed(self, model: str, texts: list[str]) -> list[list[float]]:
        """Embeddings of texts; the model is loaded for it where it is not."""
        if model not in self.models:
            raise InputError(f"no model {model!r}; there are {', '.join(self.models)}")
        if not self.workers.get(model):
            try:
                if model not in self.loading:
                    self._spawn_load(model)
            except NoRoom as error:
                raise Unavailable(f"{model} has no room beside models that are busy ({error}); ask again") from None
            await asyncio.shield(self.loading[model])
            if model in self.refused:
                raise self.refused.pop(model)
        worker = min(self.workers[model], key=lambda worker: worker.running)
        self.cache.use(model, now_ms())
        return (await worker.ask("embed", texts=texts))["vectors"]

    async def reduce_memory(self, target_bytes: int) -> int:
        """Let models leave until those in memory take `target_bytes`, as far as nobody needs them; what they take."""
        await self._evict(self.cache.shrink(target_bytes, now_ms()))
        return self.cache.bytes

    async def share_model(self, model: str, workers: int) -> int:
        """Have `workers` processes serve one model, its weights mapped once; how many there are."""
        while len(self.workers.get(model, ())) < workers:
            await self._load(model)
            if model in self.refused:
                raise self.refused.pop(model)
        return len(self.workers[model])

    # --- the loop ----------------------------------------------------------------------------------------------------

    async def _loop(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), 0.05 if self.queue.waiting else 1.0)
            self._wake.clear()
            try:
                self._bury()
                held = self._load_next()
                for name in list(self.workers):
                    if name not in held:
                        self._feed(name)
            except Exception:  # whatever it is, the next turn serves the others
                log.exception("the dispatcher goes on")

    def _load_next(self) -> set[str]:
        """Begin to load the model that is wanted most; the models that get no work until there is room for it."""
        if self.loading:
            return set()
        ready = [name for name, group in self.workers.items() if group]
        wanted = next_model(
            self.queue.waiting, ready, now_ms(), max_swap_wait_ms=self.settings.max_swap_wait_ms,
            urgent=self.queue.priority_threshold,
        )  # fmt: skip
        if wanted is None:
            return set()
        try:
            self._spawn_load(wanted)
        except NoRoom:
            return {name for name, model in self.cache.resident.items() if not model.pinned}
        except InputError as error:
            self._refuse(wanted, error)
        return set()

    def _spawn_load(self, name: str) -> None:
        """Make room and load. Raises NoRoom, InputError."""
        size = self._size(name)
        for model in self.cache.resident.values():
            model.busy = sum(worker.running for worker in self.workers.get(model.name, ()))
        leaving = self.cache.room_for(name, size, now_ms()) if name not in self.cache.resident else []
        self.loading[name] = asyncio.create_task(self._evict_and_load(leaving, name))

    async def _evict_and_load(self, leaving: list[str], name: str) -> None:
        try:
            await self._evict(leaving)
            await self._load(name)
        finally:
            self.loading.pop(name, None)
            self._wake.set()

    def _size(self, name: str) -> int:
        return self.sizes.get(name) or int(self.models[name].bytes * FIRST_GUESS)

    async def _load(self, name: str) -> None:
        """One more worker for a model; where it cannot be opened, its requests end with the reason."""
        group = self.workers.setdefault(name, [])
        available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        shares = share_processors(list(available), self.settings.workers)
        began = now_ms()
        try:
            worker = await Worker.start(self.models[name], self.settings, shares[len(group) % len(shares)])
        except (LabError, OSError) as error:
            self._refuse(name, error)
            return
        self.load_ms[name] = now_ms() - began
        held = await asyncio.gather(*(asyncio.to_thread(lambda w=w: w.pss_bytes) for w in (*group, worker)))
        # From here on without a pause: the loop gives work to whatever stands in the group.
        self.sizes[name] = sum(held)
        if name in self.cache.resident:
            self.cache.resident[name].bytes = self.sizes[name]
        else:
            pinned = name in self.settings.pinned
            self.cache.add(name, self.sizes[name], self.load_ms[name], now_ms(), pinned=pinned)
        self.batches.setdefault(
            name,
            BatchSize(self.settings.max_batch_size, self.settings.target_latency_ms, self.settings.dynamic_batching),
        )
        self.recent.setdefault(name, deque(maxlen=REMEMBERED))
        self.workers.setdefault(name, group).append(worker)
        self._wake.set()

    def _refuse(self, name: str, error: Exception) -> None:
        self.refused[name] = error
        log.warning("%s", error)
        for flight in [flight for flight in self.flights.values() if flight.ticket.model == name and not flight.task]:
            self.queue.remove(flight.key)
            self._over(flight, error)

    async def _evict(self, names: list[str]) -> None:
        for name in names:
            self.order.evicted(name)
            for worker in self.workers.pop(name, []):
                await worker.close()

    def _bury(self) -> None:
        """Forget workers that died; a model without any is loaded again when it is asked for."""
        for name, group in list(self.workers.items()):
            dead = [worker for worker in group if worker.is_dead]
            for worker in dead:
                group.remove(worker)
                self.counts["restarts"] += 1
                self._keep(asyncio.create_task(worker.close()))
                log.warning("the worker of %s (process %d) has ended; another one is started", name, worker.process.pid)
            if dead and not group:
                del self.workers[name]
                self.cache.resident.pop(name, None)

    def _feed(self, name: str) -> None:
        """Give waiting requests of a model to its workers, as many as their batches have places."""
        batch, now = self.batches.get(name), now_ms()
        if batch is None or not self.workers[name]:
            return
        for worker in sorted(self.workers[name], key=lambda worker: worker.running):
            free = batch.size - worker.running
            mine = [ticket for ticket in self.queue.waiting if ticket.model == name]
            if not mine:
                return
            if free <= 0 and worker.running <= batch.size and any(map(self.queue.is_urgent, mine)):
                free = 1  # the place that is kept for urgent requests
                mine = [ticket for ticket in mine if self.queue.is_urgent(ticket)]
            if free <= 0 or not (worker.running or self.queue.is_due(now, batch.size)):
                continue
            only = Queue(self.queue.ageing_ms, limit=len(mine), waiting=mine)
            for ticket in only.take(now, free, loaded=[name], cached=list(self.recent[name])):
                self.queue.remove(ticket.key)
                if flight := self.flights.get(ticket.key):
                    self._fly(flight, worker)
            self.batch_sizes.append(worker.running)
        full = all(worker.running >= batch.size for worker in self.workers[name])
        if full and len(self.workers[name]) < self.settings.workers and name not in self.loading:
            with contextlib.suppress(NoRoom, InputError):
                self._spawn_load(name)

    # --- a flight ----------------------------------------------------------------------------------------------------

    def _fly(self, flight: Flight, worker: Worker) -> None:
        flight.started_ms = now_ms()
        self.waits_ms.append(flight.started_ms - flight.ticket.arrived_ms)
        self.recent[worker.model.name].append(flight.ticket.prompt)
        if worker.model.name in self.cache.resident:
            self.cache.use(worker.model.name, flight.started_ms)
        flight.task = asyncio.create_task(self._compute(flight, worker))
        self._keep(flight.task)
        worker.running += 1  # until the job itself counts
        flight.task.add_done_callback(lambda _: self._wake.set())

    async def _compute(self, flight: Flight, worker: Worker) -> None:
        told = sum(len(event.get("text", "")) for event in flight.events)
        skipped = 0
        worker.running -= 1
        try:
            async for event in worker.run({"op": "generate", **flight.job}):
                text = event.get("text", "")
                if skipped < told and text:  # the beginning was told before the first worker died
                    part = text[max(0, told - skipped) :]
                    skipped += len(text)
                    if not part:
                        continue
                    event = {**event, "text": part}
                flight.tell(event)
            self.counts["computed"] += 1
            self._observe(flight, worker.model.name)
            self._over(flight)
            self._preload(flight.agent)
        except WorkerDied as error:
            flight.tries += 1
            if flight.tries < TRIES and not (told and flight.job.get("temperature")) and flight.listeners:
                self.counts["retried"] += 1
                flight.task = None
                self.queue.waiting.append(flight.ticket)  # it has waited already: no limit
                self._wake.set()
            else:
                self._over(flight, error)
        except asyncio.CancelledError:
            self._over(flight, Unavailable("the request was cancelled"))
            raise
        except Exception as error:
            self._over(flight, error)

    def _observe(self, flight: Flight, name: str) -> None:
        tokens = sum(1 for event in flight.events if event.get("text"))
        if tokens > 1 and name in self.batches:
            self.batches[name].observe((now_ms() - flight.first_ms) / (tokens - 1), waiting=len(self.queue))

    def _over(self, flight: Flight, error: Exception | None = None) -> None:
        if self.flights.get(flight.key) is flight:
            del self.flights[flight.key]
        flight.end(error)

    def _cancel(self, flight: Flight) -> None:
        self.counts["cancelled"] += 1
        self.queue.remove(flight.key)
        if flight.task:
            flight.task.cancel()
        self._over(flight, Unavailable("the request was cancelled"))

    def _preload(self, agent: str) -> None:
        """Load what this agent is likely to ask for next, where memory is free for it and nobody waits."""
        if not self.settings.preload or not agent or self.queue.waiting or self.loading or self.is_draining:
            return
        name = self.order.propose(agent, self.cache.resident, self.load_ms)
        if name and self.cache.bytes + self._size(name) <= self.cache.max_bytes:
            self.loading[name] = asyncio.create_task(self._evict_and_load([], name))

    async def _watch_memory(self) -> None:
        while True:
            await asyncio.sleep(PRESSURE_SECONDS)
            if is_under_pressure():
                self.counts["pressure"] += 1
                for model in self.cache.resident.values():
                    model.busy = sum(worker.running for worker in self.workers.get(model.name, ()))
                await self.reduce_memory(self.cache.bytes // 2)

    def _keep(self, task: asyncio.Task) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- figures -----------------------------------------------------------------------------------------------------

    def stats(self) -> dict:
        """What the queue, the batches, the workers and the models in memory are like now."""
        sizes, waits = list(self.batch_sizes), sorted(self.waits_ms)
        return {
            "queue": len(self.queue),
            "running": sum(worker.running for group in self.workers.values() for worker in group),
            "workers": sum(map(len, self.workers.values())),
            "batch_size_mean": sum(sizes) / len(sizes) if sizes else 0.0,
            "batch_size_now": {name: batch.size for name, batch in self.batches.items()},
            "wait_ms_p50": waits[len(waits) // 2] if waits else 0.0,
            "wait_ms_p95": waits[int(0.95 * (len(waits) - 1))] if waits else 0.0,
            "models": {
                name: {"bytes": model.bytes, "load_ms": round(model.load_ms), "uses": round(model.uses, 2)}
                for name, model in self.cache.resident.items()
            },
            "memory_bytes": self.cache.bytes,
            "max_memory_bytes": self.cache.max_bytes,
            "loads": self.cache.loads,
            "evictions": self.cache.evictions,
            **self.counts,
        }

    async def worker_stats(self) -> dict:
        """Sums over the workers: tokens read, beginnings kept."""
        alive = [worker for group in self.workers.values() for worker in group if not worker.is_dead]
        found = await asyncio.gather(*(worker.ask("stats") for worker in alive), return_exceptions=True)
        rows = [row for row in found if isinstance(row, dict)]
        names = ("prefilled_tokens", "kept_prefixes", "kept_prefix_bytes")
        return {name: sum(row.get(name, 0) for row in rows) for name in names}
