"""Whether a new model is worse than the old one, asked again after every request without paying for it.

Old and new answer the same request; x = 1 where only the new one is right, -1 where only the old one is, else 0. Two
gamblers bet on it, each against a claim that is to be refuted, each with wealth 1 at the beginning:

    harm    against "the new one is not worse", E x >= 0:             wealth times  1 - lambda x
    safety  against "it is worse by `margin` or more", E x <= -margin: wealth times  1 + lambda (x + margin)

If its claim is true, a gambler's wealth is a supermartingale whatever he bets, as long as it never falls below zero,
and the chance that it ever reaches 1 / alpha is at most alpha (Ville 1939). So both may be looked at after every
request. How much to bet depends on a difference that nobody knows: the wealth is the mean over gamblers with every
lambda of a grid, which is one again, and grows nearly as fast as that of the best of them. Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting" (JRSS B, 2024); Ramdas, Gruenwald, Vovk and Shafer,
"Game-theoretic statistics and safe anytime-valid inference" (2023).

Pure policy: no model, no clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from avalab.lab.errors import InputError

BETS = tuple(step / 20 for step in range(1, 20))  # shares of the largest bet that cannot lose more than all

FAILED, PASSED, OPEN, UNDECIDED = "failed", "passed", "open", "undecided"


@dataclass
class Gamblers:
    """Wealth of bets that `value` is below (`sign` -1) or above (1) a mean; values lie in [low, high]."""

    mean: float
    low: float
    high: float
    sign: int
    log_wealth: list[float] = field(default_factory=lambda: [0.0] * len(BETS))

    def __post_init__(self) -> None:
        if not self.low < self.mean < self.high and not (self.low <= self.mean <= self.high):
            raise InputError(f"a mean of {self.mean:g} does not lie between {self.low:g} and {self.high:g}")

    def see(self, value: float) -> None:
        """Settle all bets on a value."""
        worst = self.mean - self.low if self.sign > 0 else self.high - self.mean  # the most that can be lost
        for i, share in enumerate(BETS):
            bet = share / worst if worst > 0 else share
            self.log_wealth[i] += math.log1p(self.sign * bet * (value - self.mean))

    @property
    def wealth(self) -> float:
        """Mean over all of them."""
        return sum(map(math.exp, self.log_wealth)) / len(BETS)


@dataclass
class Trial:
    """A trial of a new model on paired requests: `failed`, `passed`, `open`, or at its end `undecided`.

    `alpha` bounds the chance that a model that is not worse ever fails, and that one that is worse by `margin` passes.
    Raises InputError for an alpha or margin outside (0, 1), or no requests.
    """

    alpha: float = 0.05
    margin: float = 0.1
    most: int = 200
    pairs: int = 0
    gained: int = 0
    lost: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "margin"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name):g}; it has to lie between 0 and 1")
        if self.most < 1:
            raise InputError(f"a trial of {self.most} requests is none")
        self.harm = Gamblers(0.0, -1.0, 1.0, -1)
        self.safety = Gamblers(-self.margin, -1.0, 1.0, 1)

    def see(self, old_right: bool, new_right: bool) -> str:
        """The verdict after one more request; one that is there stays."""
        if self.verdict == OPEN:
            difference = int(new_right) - int(old_right)
            self.pairs += 1
            self.gained, self.lost = self.gained + (difference > 0), self.lost + (difference < 0)
            self.harm.see(difference)
            self.safety.see(difference)
        return self.verdict

    @property
    def verdict(self) -> str:
        """What is known now."""
        if self.harm.wealth >= 1 / self.alpha:
            return FAILED
        if self.safety.wealth >= 1 / self.alpha:
            return PASSED
        return OPEN if self.pairs < self.most else UNDECIDED

    def __str__(self) -> str:
        return (
            f"{self.verdict} after {self.pairs} paired requests: {self.gained} gained, {self.lost} lost "
            f"(evidence of harm {self.harm.wealth:.1f}, of safety {self.safety.wealth:.1f}; {1 / self.alpha:g} decides)"
        )
