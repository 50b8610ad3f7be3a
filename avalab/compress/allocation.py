"""Which format each tensor gets: the least expected loss under a budget of bytes. Policy only, no tensors.

Expected increases of the KL divergence are taken to add up, so the choice is a multiple-choice knapsack. Options that
another one beats in both size and cost, and those that a bound excludes, are dropped; what is left is solved exactly as
an integer program (HiGHS through scipy). Source: Kellerer, Pferschy and Pisinger (2004), Knapsack Problems, ch. 11.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from avalab.lab import process
from avalab.lab.errors import InputError


@dataclass(frozen=True)
class Option:
    """One way to store a tensor: its format's name, its bytes, and the KL divergence (nats a token) it should cost."""

    format: str
    bytes: int
    cost: float


@dataclass(frozen=True)
class Allocation:
    """One option a tensor, with the sums."""

    chosen: dict[str, Option]

    @property
    def bytes(self) -> int:
        return sum(option.bytes for option in self.chosen.values())

    @property
    def cost(self) -> float:
        return sum(option.cost for option in self.chosen.values())


def allocate_formats(
    options: Mapping[str, list[Option]], budget_bytes: int, *, fixed_bytes: int = 0, file: str = "allocation"
) -> Allocation:
    """The allocation of least summed cost that fits the budget beside the fixed bytes; exact.

    Raises ValueError for no tensors, a tensor without options, costs that are not finite, or a budget below the
    smallest allocation, naming that as what `file` says.
    """
    refuse_budget(options, budget_bytes, fixed_bytes=fixed_bytes, file=file)
    kept = {name: undominated(name, row) for name, row in options.items()}
    budget_bytes -= fixed_bytes
    if budget_bytes >= sum(row[-1].bytes for row in kept.values()):
        return Allocation({name: row[-1] for name, row in kept.items()})
    rows = without_hopeless(list(kept.values()), budget_bytes)
    return Allocation(dict(zip(kept, _solve(rows, budget_bytes), strict=True)))


def refuse_budget(options: Mapping[str, list[Option]], budget_bytes: int, *, fixed_bytes: int, file: str) -> None:
    """Raise ValueError for no tensors, or a budget below the smallest choice of formats, whatever they cost."""
    smallest = fixed_bytes + sum(min((option.bytes for option in row), default=0) for row in options.values())
    if not options or budget_bytes < smallest:
        raise InputError(f"a budget of {budget_bytes:,} bytes is below the smallest {file}, {smallest:,} bytes")


def undominated(name: str, options: list[Option]) -> list[Option]:
    """Options by rising size, each of lower cost than all smaller ones. Raises ValueError naming the tensor."""
    if not options:
        raise InputError(f"tensor {name!r} has no format to choose from")
    if not np.isfinite([option.cost for option in options]).all():
        raise InputError(f"tensor {name!r} has a cost that is not finite: {[option.cost for option in options]}")
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.cost, o.format)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def without_hopeless(rows: list[list[Option]], budget_bytes: int) -> list[list[Option]]:
    """Drop the options that no best allocation can hold, so that little is left to solve.

    With a price on bytes every tensor has a best option, and their sum bounds every allocation from below. The price
    is the one at which these fit the budget. An option that lies further above its tensor's best than a known
    allocation lies above the bound is in no better one (reduced-cost fixing; Kellerer et al., section 11.2).
    """
    low, high = 0.0, max((row[0].cost - o.cost) / (o.bytes - row[0].bytes) for row in rows for o in row[1:])
    for _ in range(60):
        price = (low + high) / 2
        fits = sum(_priced(row, price).bytes for row in rows) <= budget_bytes
        low, high = (low, price) if fits else (price, high)
    known = _filled([_priced(row, high * (1 + 1e-9)) for row in rows], rows, budget_bytes)
    best = [min(option.cost + high * option.bytes for option in row) for row in rows]
    slack = sum(option.cost for option in known) - (sum(best) - high * budget_bytes)
    slack += 1e-9 * max(abs(value) for value in best)
    return [[o for o in row if o.cost + high * o.bytes <= b + slack] for row, b in zip(rows, best, strict=True)]


def _priced(row: list[Option], price: float) -> Option:
    return min(row, key=lambda option: (option.cost + price * option.bytes, option.bytes))


def _filled(chosen: list[Option], rows: list[list[Option]], budget_bytes: int) -> list[Option]:
    """Spend what is left of the budget where one step saves most, again and again: a known allocation, not the best."""
    left = budget_bytes - sum(option.bytes for option in chosen)
    while True:
        steps = [
            (chosen[at].cost - option.cost, at, option)
            for at, row in enumerate(rows)
            for option in row
            if 0 < option.bytes - chosen[at].bytes <= left
        ]
        if not steps:
            return chosen
        _, at, option = max(steps, key=lambda step: step[0])
        left -= option.bytes - chosen[at].bytes
        chosen[at] = option


def _solve(rows: list[list[Option]], budget_bytes: int) -> list[Option]:
    """Binary variables, one an option; each row sums to one; savings over the smallest options fill what is left."""
    flat = [option for row in rows for option in row]
    starts = np.cumsum([0, *(len(row) for row in rows)])
    owner = np.repeat(np.arange(len(rows)), np.diff(starts))
    one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(rows), len(flat)))
    costs = np.array([option.cost for option in flat])
    sizes = np.array([[option.bytes for option in flat]]) / 1024  # the solver's tolerances are absolute
    with process.drop_native_output():  # HiGHS 1.12 prints a line for each solution it repairs, also when told not to
        found = milp(
            costs / max(np.abs(costs).max(), 1e-300) * len(rows),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes, -np.inf, budget_bytes / 1024)],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    assert found.success, found.message
    chosen = [row[int(found.x[a:b].argmax())] for row, a, b in zip(rows, starts[:-1], starts[1:], strict=True)]
    return _within(chosen, rows, budget_bytes)


def _within(chosen: list[Option], rows: list[list[Option]], budget_bytes: int) -> list[Option]:
    """The solver's feasibility tolerance may overrun by some bytes: step down where it costs least."""
    while sum(option.bytes for option in chosen) > budget_bytes:
        steps = [
            (row[row.index(option) - 1].cost - option.cost, at)
            for at, (option, row) in enumerate(zip(chosen, rows, strict=True))
            if row.index(option) > 0
        ]
        _, at = min(steps)
        chosen[at] = rows[at][rows[at].index(chosen[at]) - 1]
    return chosen
