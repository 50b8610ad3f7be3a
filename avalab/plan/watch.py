"""After deployment: what agents' requests say, whether something drifts, and a new plan where load or limits changed.

Whoever serves calls `note_request` for each request. Nothing is written unless `allow_logging` was called for the site:
the log is opt-in, stays in the site's folder, and holds prompts only where they are asked for.

`drifts` reads the log and says what changed, each check a bet as in `avalab.plan.policy.canary`, so that it can be run
after every request: with no drift, the chance that a check ever cries is at most `ALPHA`.

    validity   calls that the schema accepts fall below what the agent had at first, by more than `TOLERANCE`
    latency    more than `SLOW_SHARE` of its requests take longer than the agent's limit
    memory     the process has more than the plan's memory
    kl         the divergence on logged prompts has an interval above what the plan accepted

`replanned` is the plan again with the calls a minute that the log shows; `changes` is what would be deployed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil

from avalab.lab import statistics
from avalab.lab.errors import InputError
from avalab.lab.run import time_now, write_atomically
from avalab.plan import assign
from avalab.plan.agents import Agent
from avalab.plan.assign import Plan
from avalab.plan.policy.canary import Gamblers

LOG, SETTINGS = "requests.jsonl", "logging.json"

FIRST = 50  # requests of an agent: what it was like at first

TOLERANCE, SLOW_SHARE, ALPHA = 0.05, 0.1, 0.05


@dataclass(frozen=True)
class Request:
    """One answered request."""

    agent: str
    valid: bool
    latency_ms: float
    when: str = ""
    prompt: str = ""


@dataclass(frozen=True)
class Drift:
    """Something that is no longer as it was planned: `kind` is validity, latency, memory or kl."""

    agent: str  # "" for the whole process
    kind: str
    value: float
    limit: float

    def __str__(self) -> str:
        return f"{self.agent or 'the process'}: {self.kind} {self.value:.4g}, planned {self.limit:.4g}"


def allow_logging(site: Path, *, prompts: bool = False) -> None:
    """Let requests of a site be logged in its folder, with their prompts only if asked for."""
    write_atomically(site / SETTINGS, json.dumps({"prompts": prompts}) + "\n")


def note_request(site: Path, request: Request) -> bool:
    """Append a request to the site's log, if that is allowed; whether it was."""
    try:
        prompts = json.loads((site / SETTINGS).read_text(encoding="utf-8"))["prompts"]
    except FileNotFoundError:
        return False
    kept = replace(request, when=request.when or time_now(), prompt=request.prompt if prompts else "")
    with (site / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(kept)) + "\n")
    return True


def logged(site: Path) -> list[Request]:
    """The requests of a site's log, the oldest first; lines that were cut off are left out."""
    found = []
    for line in (site / LOG).read_text(encoding="utf-8").splitlines() if (site / LOG).is_file() else ():
        try:
            found.append(Request(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def drifts(
    requests: Sequence[Request],
    agents: Sequence[Agent],
    *,
    divergences: Mapping[str, Sequence[float]] | None = None,
    accepted_kl: Mapping[str, float] | None = None,
    memory_bytes: int | None = None,
    budget_bytes: int | None = None,
) -> list[Drift]:
    """What drifted. `divergences` are those of logged prompts by agent, `accepted_kl` what the plan accepted."""
    found = []
    for agent in agents:
        mine = [request for request in requests if request.agent == agent.name]
        found += _validity(agent, mine) + _latency(agent, mine)
        measured = (divergences or {}).get(agent.name, ())
        limit = (accepted_kl or {}).get(agent.name)
        if limit is not None and len(measured) > 1:
            estimate = statistics.over_draws(np.asarray(measured))
            found += [Drift(agent.name, "kl", estimate.value, limit)] if estimate.low > limit else []
    if memory_bytes is not None and budget_bytes is not None and memory_bytes > budget_bytes:
        found.append(Drift("", "memory", memory_bytes, budget_bytes))
    return found


def _validity(agent: Agent, requests: Sequence[Request]) -> list[Drift]:
    first, later = requests[:FIRST], requests[FIRST:]
    if len(first) < FIRST:
        return []
    limit = sum(request.valid for request in first) / FIRST - TOLERANCE
    if limit <= 0 or not _below(limit, [float(request.valid) for request in later]):
        return []
    return [Drift(agent.name, "validity", sum(r.valid for r in later) / len(later), limit)]


def _latency(agent: Agent, requests: Sequence[Request]) -> list[Drift]:
    if agent.latency_limit_ms is None:
        return []
    in_time = [float(request.latency_ms <= agent.latency_limit_ms) for request in requests]
    if not _below(1 - SLOW_SHARE, in_time):
        return []
    middle = statistics.quantile([request.latency_ms for request in requests]).value
    return [Drift(agent.name, "latency", middle, agent.latency_limit_ms)]


def _below(mean: float, values: Sequence[float]) -> bool:
    """Whether values in [0, 1] were ever, at some moment, shown to have a mean below this one."""
    gamblers = Gamblers(mean, 0.0, 1.0, -1)
    for value in values:
        gamblers.see(value)
        if gamblers.wealth >= 1 / ALPHA:
            return True
    return False


def process_memory(process_id: int) -> int:
    """Resident bytes of a process. Raises InputError for one that is not there."""
    try:
        return psutil.Process(process_id).memory_info().rss
    except psutil.NoSuchProcess:
        raise InputError(f"there is no process {process_id}") from None


def calls_per_minute(requests: Sequence[Request]) -> dict[str, float]:
    """Requests a minute of each agent between the first and the last request of all; {} for less than a minute."""
    times = [datetime.fromisoformat(request.when) for request in requests if request.when]
    minutes = (max(times) - min(times)).total_seconds() / 60 if times else 0.0
    if minutes < 1:
        return {}
    names = [request.agent for request in requests if request.when]
    return {name: names.count(name) / minutes for name in dict.fromkeys(names)}


def replanned(
    plan: Plan, observed: Mapping[str, float], forecasts: Mapping, shapes: Mapping, *, memory_bytes: int
) -> Plan:
    """The plan for the same agents at the load that was observed, or under another budget; raises as `assign.plan`."""
    agents = [replace(a, calls_per_minute=observed.get(a.name, a.calls_per_minute)) for a in plan.agents]
    return assign.plan(agents, forecasts, shapes, memory_bytes=memory_bytes, process_bytes=plan.process_bytes)


def changes(before: Plan, after: Plan) -> dict[str, tuple[str, str]]:
    """(recipe before, recipe after) of every agent that another plan gives another one."""
    pairs = {a.name: tuple(p.chosen[a.name].forecast.name for p in (before, after)) for a in after.agents}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
