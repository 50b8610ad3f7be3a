"""Racing: which of many candidates is best, without measuring all of them on everything.

Successive halving over paired items (Jamieson and Talwalkar 2016): all candidates are measured on a few items, the
worse half leaves, the rest are measured on as many items again, and so on to the last one or the last item. With k
candidates and k/2^r of them on 2^r shares of the items, each rung costs the same and all of them log2(k)/k of measuring
everything.

All candidates of a rung have seen the same items, so differences are paired. Two rules soften the halving: a candidate
is only dismissed for another one that takes no more memory, since what is best depends on the budget; and among those
that would leave, one whose paired difference from the last that stays is within `FORGIVEN` of its standard errors is
kept as long as the race stays within its share of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np

from avalab.lab.errors import InputError

FORGIVEN = 1.0  # standard errors

Score = Callable[[str, Sequence[int]], Sequence[float]]  # a candidate's losses on items of these numbers


@dataclass
class Race:
    """What a race found: losses by candidate on the items it saw, who left in which rung and why, and what it cost."""

    losses: dict[str, list[float]]
    left: dict[str, str] = field(default_factory=dict)
    measured: int = 0
    everything: int = 1

    @property
    def spent_share(self) -> float:
        """Of measuring every candidate on every item."""
        return self.measured / self.everything

    @property
    def standing(self) -> list[str]:
        """Those that were not dismissed, the best first."""
        return sorted((n for n in self.losses if n not in self.left), key=lambda n: float(np.mean(self.losses[n])))


def hold_race(
    candidates: Sequence[str],
    score: Score,
    *,
    items: int,
    memory: Mapping[str, float] | None = None,
    share: float = 0.25,
    first_items: int = 0,
) -> Race:
    """Race candidates over `items` items; lower losses are better.

    `share` is the most that may be spent of the cost of measuring everything; one rung is always run. `memory` by
    candidate: only one that takes no more dismisses another; without it, all are alike. Raises InputError for no
    candidates, no items or a share outside (0, 1].
    """
    if not candidates or items < 1 or not 0 < share <= 1:
        raise InputError(f"a race of {len(candidates)} candidates over {items} items at a share of {share:g} is none")
    memory = memory or dict.fromkeys(candidates, 0.0)
    race = Race({name: [] for name in candidates}, everything=len(candidates) * items)
    most = max(share * race.everything, len(candidates))
    seen = min(items, first_items or max(1, items // len(candidates)))
    alive, start = list(candidates), 0
    while True:
        for name in alive:
            found = [float(loss) for loss in score(name, range(start, seen))]
            assert len(found) == seen - start, f"{name} has {len(found)} losses for {seen - start} items"
            race.losses[name] += found
            race.measured += len(found)
        if seen >= items or len(alive) == 1:
            return race
        start, seen = seen, min(items, 2 * seen)
        room = int((most - race.measured) // (seen - start))
        keep = min(ceil(len(alive) / 2), room)
        if keep < 1:
            return race
        alive = _halved(race, alive, memory, keep=keep, most=max(keep, min(len(alive) - 1, room)))


def _halved(race: Race, alive: list[str], memory: Mapping[str, float], *, keep: int, most: int) -> list[str]:
    """The candidates of the next rung, `most` at most; who leaves is told by whom."""
    ranked = sorted(alive, key=lambda name: (_dominators(race, name, alive, memory), float(np.mean(race.losses[name]))))
    staying, last = ranked[:keep], ranked[keep - 1]
    for name in ranked[keep:]:
        gap, error = paired_gap(race.losses[name], race.losses[last])
        if len(staying) < most and gap <= FORGIVEN * error:
            staying.append(name)
            continue
        best = min(staying, key=lambda other: float(np.mean(race.losses[other])))
        race.left[name] = f"worse than {best} by {paired_gap(race.losses[name], race.losses[best])[0]:.4f}"
        race.left[name] += f" on {len(race.losses[name])} items"
    return staying


def _dominators(race: Race, name: str, alive: list[str], memory: Mapping[str, float]) -> int:
    """How many take no more memory and lose less."""
    mine = float(np.mean(race.losses[name]))
    return sum(memory[o] <= memory[name] and float(np.mean(race.losses[o])) < mine for o in alive if o != name)


def paired_gap(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of `ours - theirs` on the items that both saw, and its standard error (0 for one item)."""
    count = min(len(ours), len(theirs))
    gap = np.asarray(ours[:count]) - np.asarray(theirs[:count])
    error = float(gap.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0
    return float(gap.mean()), error
