"""Which recipe each agent gets under a budget of memory: an exact program over everything they share.

For every agent a, the options are the recipes c of its model that keep its own limits: quality floor, memory limit,
latency. Binary x[a, c] says what it gets, y[u] whether the weights u are in memory, and

    maximise    sum_a weight_a quality[a, c] x[a, c]  -  a little of the memory
    such that   sum_c x[a, c] = 1                                            each agent gets one
                x[a, c] <= y[u(c)]                                           weights are there, once for all who share
                runtime + sum_u bytes_u y[u] + sum_a context_a <= memory     the budget
                sum_a calls_a seconds[a, c] x[a, c] <= 60 x LOAD             seconds of work in a minute

Agents of the same limits and sizes are one integer variable: counts instead of names, which changes no optimum. An
agent with an adapter uses the shared weights of an engine that reads adapters and pays for the adapter once, or its own
merged copy of any recipe. Solved by HiGHS through `scipy.optimize.milp`; the bytes of the answer are then summed as
integers, and a budget that the solver's tolerance overran is made that much smaller.

An impossible budget is `InfeasiblePlan`: it names the limit that binds and the smallest budget that would do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from avalab.lab import process
from avalab.lab.errors import InputError
from avalab.models import sizes
from avalab.models.sizes import Shape
from avalab.plan.agents import Agent
from avalab.plan.forecast import Forecast

LOAD = 0.8  # of the time: what is busier lets requests wait

MEMORY_PRICE = 1e-4  # of quality for the whole budget: between equals, the smaller one

MIB = 2.0**20

ADAPTER_ENGINES = ("torch",)  # that read an adapter beside its base


class InfeasiblePlan(InputError):
    """No assignment keeps all limits; `binding` says which one, and `smallest_bytes` is the least memory that would do.

    `smallest_bytes` is None where no memory would do.
    """

    def __init__(self, message: str, binding: str, smallest_bytes: int | None = None) -> None:
        super().__init__(message)
        self.binding, self.smallest_bytes = binding, smallest_bytes


@dataclass(frozen=True)
class Option:
    """What an agent can get: a forecast, the weights it needs in memory, and the seconds of one of its calls."""

    forecast: Forecast
    units: tuple[tuple[str, int], ...]  # (name, bytes)
    seconds: float

    @property
    def unit_bytes(self) -> int:
        return sum(size for _, size in self.units)


@dataclass(frozen=True)
class Plan:
    """An option for each agent, what that takes, and why."""

    agents: tuple[Agent, ...]
    chosen: dict[str, Option]
    memory_bytes: int
    budget_bytes: int
    busy_share: float
    reasons: dict[str, str] = field(default_factory=dict)
    context_bytes: int = 0
    process_bytes: int = 0

    @property
    def quality(self) -> float:
        """Mean quality, each agent at its weight."""
        total = sum(agent.weight for agent in self.agents)
        return sum(a.weight * self.chosen[a.name].forecast.quality.value for a in self.agents) / total

    @property
    def units(self) -> dict[str, int]:
        """Bytes of all that is in memory, each thing once."""
        return dict(unit for option in self.chosen.values() for unit in option.units)

    @property
    def needed(self) -> list[tuple[str, str]]:
        """The different (model, recipe) that have to be made, those with most agents first."""
        count = Counter((a.model, self.chosen[a.name].forecast.name) for a in self.agents)
        return [pair for pair, _ in count.most_common()]


@dataclass(frozen=True)
class _Class:
    """Agents that are alike to the program."""

    agents: tuple[Agent, ...]
    options: tuple[Option, ...]

    @property
    def weight(self) -> float:
        return sum(agent.weight for agent in self.agents)


def context_bytes(agent: Agent, shape: Shape) -> int:
    """Bytes of an agent's keys and values."""
    return sizes.kv_cache_bytes(shape, context=agent.context)


def options_of(agent: Agent, forecasts: Sequence[Forecast], shape: Shape) -> list[Option]:
    """What an agent can get before its limits are looked at: shared weights, or with an adapter, copies too."""
    found = []
    for each in forecasts:
        unit = f"{each.model}/{each.name}"
        seconds = each.latency_ms(agent.prompt_tokens, agent.new_tokens) / 1e3
        size = ceil(each.memory.value)
        if not agent.adapter:
            found.append(Option(each, ((unit, size),), seconds))
            continue
        if each.recipe.engine in ADAPTER_ENGINES:
            own = (f"{agent.model}+{agent.adapter}", adapter_bytes(shape, agent.adapter_rank))
            found.append(Option(each, ((unit, size), own), seconds))
        found.append(Option(each, ((f"{unit}+{agent.adapter}", size),), seconds))
    return found


def adapter_bytes(shape: Shape, rank: int) -> int:
    """Bytes of a bf16 adapter of this rank on every linear layer."""
    return 2 * rank * shape.layers * sum(rows + columns for rows, columns in shape.linears().values())


def shortfalls(agent: Agent, option: Option, shape: Shape) -> dict[str, float]:
    """The agent's own limits that an option breaks, each with how far (a share of the limit)."""
    found, own = {}, option.unit_bytes + context_bytes(agent, shape)
    if option.forecast.quality.value < agent.quality_floor:
        found["quality_floor"] = 1 - option.forecast.quality.value / agent.quality_floor
    if agent.memory_limit is not None and own > agent.memory_limit:
        found["memory_limit"] = own / agent.memory_limit - 1
    if agent.latency_limit_ms is not None and 1e3 * option.seconds > agent.latency_limit_ms:
        found["latency_limit_ms"] = 1e3 * option.seconds / agent.latency_limit_ms - 1
    return found


def within_limits(
    agents: Sequence[Agent], forecasts: Mapping[str, Sequence[Forecast]], shapes: Mapping[str, Shape]
) -> dict[str, list[Option]]:
    """The options of each agent that keep its own limits; `forecasts` and `shapes` by model.

    Raises InfeasiblePlan naming the first agent that has none, the limit, and the option that comes nearest.
    """
    found = {}
    for agent in agents:
        shape = shapes[agent.model]
        broken = [
            (option, shortfalls(agent, option, shape)) for option in options_of(agent, forecasts[agent.model], shape)
        ]
        found[agent.name] = [option for option, limits in broken if not limits]
        if found[agent.name]:
            continue
        if not broken:
            raise InfeasiblePlan(f"agent {agent.name!r} has no recipe for {agent.model} to choose from", "recipes")
        near, limits = min(broken, key=lambda pair: (len(pair[1]), sum(pair[1].values())))
        limit = max(limits, key=limits.get)
        own = near.unit_bytes + context_bytes(agent, shape)
        raise InfeasiblePlan(
            f"agent {agent.name!r}: no recipe keeps its {limit} of {getattr(agent, limit)}; the nearest is "
            f"{near.forecast.name} (agreement {near.forecast.quality.value:.3f}, {own / MIB:,.0f} MiB, "
            f"{1e3 * near.seconds:,.0f} ms)",
            limit,
        )
    return found


def plan(
    agents: Sequence[Agent],
    forecasts: Mapping[str, Sequence[Forecast]],
    shapes: Mapping[str, Shape],
    *,
    memory_bytes: int,
    process_bytes: int = 0,
) -> Plan:
    """The best assignment under `memory_bytes`; `process_bytes` are in memory whatever is chosen.

    Raises InputError for a budget that is not positive or no agents, InfeasiblePlan where no assignment keeps all.
    """
    if memory_bytes <= 0 or not agents:
        raise InputError(f"a memory of {memory_bytes:,} bytes for {len(agents)} agents; both have to be positive")
    allowed = within_limits(agents, forecasts, shapes)
    contexts = sum(context_bytes(agent, shapes[agent.model]) for agent in agents)
    classes, fixed = _classes(agents, allowed), contexts + process_bytes
    chosen = solve(classes, memory_bytes - fixed)
    if chosen is None:
        raise _impossible(classes, memory_bytes, fixed)
    found = Plan(
        tuple(agents),
        chosen,
        memory_bytes=fixed + _unit_bytes(chosen),
        budget_bytes=memory_bytes,
        busy_share=sum(a.calls_per_minute * chosen[a.name].seconds for a in agents) / 60,
        context_bytes=contexts,
        process_bytes=process_bytes,
    )
    found.reasons.update({a.name: _reason(a, allowed[a.name], found) for a in agents})
    return found


def _classes(agents: Sequence[Agent], allowed: Mapping[str, list[Option]]) -> list[_Class]:
    """Agents whose options and load are the same, together; an own adapter is an option of its own."""
    found: dict[tuple, list[Agent]] = {}
    for agent in agents:
        key = (agent.model, agent.calls_per_minute, agent.weight, agent.adapter)
        key += tuple((o.units, round(o.seconds, 9)) for o in allowed[agent.name])
        found.setdefault(key, []).append(agent)
    return [_Class(tuple(members), tuple(allowed[members[0].name])) for members in found.values()]


def _unit_bytes(chosen: Mapping[str, Option]) -> int:
    return sum(dict(unit for option in chosen.values() for unit in option.units).values())


def solve(
    classes: Sequence[_Class], room_bytes: int, *, least_memory: bool = False, least_load: bool = False
) -> dict[str, Option] | None:
    """An option by agent, the best within `room_bytes` of weights; None where nothing fits.

    `least_memory` and `least_load` look for that alone instead, whatever room there is.
    """
    units = dict(sorted({unit for each in classes for option in each.options for unit in option.units}))
    names, flat = list(units), [(i, option) for i, each in enumerate(classes) for option in each.options]
    counts = np.array([len(each.agents) for each in classes])
    width, room = len(flat) + len(names), room_bytes
    pairs = [(j, names.index(unit)) for j, (_, option) in enumerate(flat) for unit, _ in option.units]
    matrix = lil_array((len(classes) + len(pairs) + 2, width))
    for j, (i, option) in enumerate(flat):
        matrix[i, j] = 1
        matrix[-1, j] = classes[i].agents[0].calls_per_minute * option.seconds / 60
    for k, (j, u) in enumerate(pairs, len(classes)):
        matrix[k, j], matrix[k, len(flat) + u] = 1, -int(counts[flat[j][0]])
    memory = np.concatenate([np.zeros(len(flat)), np.array(list(units.values())) / MIB])
    matrix[-2, :] = memory
    load = matrix.tocsr()[[-1], :].toarray()[0]
    cost = memory if least_memory else load if least_load else _value(classes, flat, memory, room_bytes)
    for _ in range(4):
        upper = np.concatenate(
            [
                counts,
                np.zeros(len(pairs)),
                [np.inf if least_memory or least_load else room / MIB],
                [np.inf if least_load else LOAD],
            ]
        )
        lower = np.concatenate([counts, np.full(len(pairs) + 2, -np.inf)])
        with process.drop_native_output():  # HiGHS prints a line for each solution that it repairs
            found = milp(
                cost,
                constraints=LinearConstraint(matrix.tocsr(), lower, upper),
                integrality=np.ones(width),
                bounds=Bounds(0, np.concatenate([[counts[i] for i, _ in flat], np.ones(len(names))])),
                options={"mip_rel_gap": 0.0},
            )
        if not found.success:
            return None
        chosen = _handed_out(classes, flat, np.rint(found.x[: len(flat)]).astype(int))
        over = _unit_bytes(chosen) - room_bytes
        if least_memory or least_load or over <= 0:
            return chosen
        room -= over  # the solver's tolerance overran the budget by some bytes
    return None


def _value(classes: Sequence[_Class], flat: list, memory: np.ndarray, room_bytes: int) -> np.ndarray:
    """What is minimised: lost quality of every choice, and a little of the memory."""
    total = sum(each.weight for each in classes)
    quality = [classes[i].agents[0].weight * option.forecast.quality.value / total for i, option in flat]
    cost = memory * (MEMORY_PRICE / max(room_bytes / MIB, 1.0))
    cost[: len(flat)] = -np.array(quality)
    return cost


def _handed_out(classes: Sequence[_Class], flat: list, counts: np.ndarray) -> dict[str, Option]:
    """The options by name: those of a class go to its agents in their order."""
    waiting = [list(each.agents) for each in classes]
    chosen = {}
    for (i, option), count in zip(flat, counts, strict=True):
        for _ in range(count):
            chosen[waiting[i].pop(0).name] = option
    return chosen


def _impossible(classes: Sequence[_Class], memory_bytes: int, fixed: int) -> InfeasiblePlan:
    """Why there is no assignment: too little time whatever the memory, or too little memory, and how much would do."""
    least = solve(classes, 0, least_memory=True)
    if least is None:
        idle = solve(classes, 0, least_load=True)
        share = sum(a.calls_per_minute * idle[a.name].seconds for each in classes for a in each.agents) / 60
        return InfeasiblePlan(
            f"the agents' calls keep this machine busy {share:.0%} of the time with the fastest recipes, above the "
            f"{LOAD:.0%} that are allowed; lower calls_per_minute or new_tokens, no memory would do",
            "calls_per_minute",
        )
    smallest = fixed + _unit_bytes(least)
    return InfeasiblePlan(
        f"a memory of {memory_bytes / MIB:,.0f} MiB is too little: the smallest that would do is "
        f"{ceil(smallest / MIB):,} MiB ({fixed / MIB:,.0f} MiB of it for the process and the agents' contexts)",
        "memory",
        smallest,
    )


def _reason(agent: Agent, allowed: list[Option], found: Plan) -> str:
    """Why an agent has what it has, in words."""
    mine = found.chosen[agent.name]
    better = [o for o in allowed if o.forecast.quality.value > mine.forecast.quality.value + 1e-12]
    if not better:
        equal = [o for o in allowed if o.forecast.quality.value == mine.forecast.quality.value]
        return "the best that keeps its limits" if len(equal) == 1 else "the smallest of the best"
    best = max(better, key=lambda option: option.forecast.quality.value)
    there = found.units
    more = sum(size for name, size in best.units if name not in there)
    left = found.budget_bytes - found.memory_bytes
    said = f"{best.forecast.name} agrees more ({best.forecast.quality.value:.3f})"
    if more > left:
        return f"{said} but needs {more / MIB:,.0f} MiB where {left / MIB:,.0f} are left"
    return f"{said} but takes {best.seconds / mine.seconds:.1f} times as long, and others need the time or the memory"
