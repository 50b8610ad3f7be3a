"""What compressing is often said to do, beside what it did: a model before and after, judged claim by claim.

A claim compares the same metric of two subjects of one run. A loss is the rise of the perplexity on the evaluation text
where it rose most, exp(increase of the loss) - 1, whose interval is that of the paired increase: what is lost counts on
the worst text, not on the kindest. A claim is reached when the value is, and its interval says whether that is sure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import expm1

from avalab.lab.run import Record


@dataclass(frozen=True)
class Claim:
    """A claim in words; `gain` reads value and interval from the records of after and before, None where one lacks."""

    words: str
    unit: str
    gain: Callable[[Found, Found, int], Gain | None]
    wanted: float
    at_most: bool = False


@dataclass(frozen=True)
class Gain:
    """A value with its interval, and what it was read from."""

    value: float
    low: float
    high: float
    of: str = ""


Found = dict[str, Record]  # of one subject, by metric


def _smaller(after: Found, before: Found, context: int) -> Gain | None:
    sizes = [found.get("artifact_bytes") for found in (after, before)]
    if None in sizes:
        return None
    share = 100 * (1 - sizes[0].value / sizes[1].value)
    return Gain(share, share, share)


def _faster(after: Found, before: Found, context: int) -> Gain | None:
    ours, theirs = (found.get(f"decode_tokens_per_s:context{context}") for found in (after, before))
    if ours is None or theirs is None:
        return None
    ends = [[r.value if end is None else end for end in (r.low, r.high)] for r in (ours, theirs)]
    return Gain(ours.value / theirs.value, ends[0][0] / ends[1][1], ends[0][1] / ends[1][0])


def _lost(after: Found, before: Found, context: int) -> Gain | None:
    risen = [r for metric, r in after.items() if metric.startswith("loss_rise:")]
    if not risen:
        return None
    worst = max(risen, key=lambda r: r.value)
    low, high = (worst.value if end is None else end for end in (worst.low, worst.high))
    text = worst.metric.partition(":")[2].replace("_", " ")
    return Gain(*(100 * expm1(each) for each in (worst.value, low, high)), text)


CLAIMS = (
    Claim("75 % smaller", "%", _smaller, 75.0),
    Claim("less than 2 % lost", "%", _lost, 2.0, at_most=True),
    Claim("2 to 4 times faster", "x", _faster, 2.0),
)


@dataclass(frozen=True)
class Judgement:
    """A claim about a subject, what was measured of it (None: nothing) and the sentence that says so."""

    claim: Claim
    subject: str
    gain: Gain | None
    verdict: str


def of_subject(records: Sequence[Record], subject: str) -> Found:
    """The newest record of each metric of a subject that has a value."""
    return {r.metric: r for r in records if r.subject == subject and r.value is not None}


def judge_claims(
    records: Sequence[Record], subject: str, before: str, *, context: int, claims: Sequence[Claim] = CLAIMS
) -> list[Judgement]:
    """Every claim about `subject`, `before` being the model that it was made from; speeds are those at a context."""
    after, base = of_subject(records, subject), of_subject(records, before)
    return [_judged(claim, subject, claim.gain(after, base, context)) for claim in claims]


def _judged(claim: Claim, subject: str, gain: Gain | None) -> Judgement:
    if gain is None:
        return Judgement(claim, subject, None, "not measured")
    reached = gain.value <= claim.wanted if claim.at_most else gain.value >= claim.wanted
    sure = gain.low > claim.wanted or gain.high < claim.wanted or gain.low == gain.high
    span = "" if gain.low == gain.high else f" [{gain.low:.2f}, {gain.high:.2f}]"
    where = f" on {gain.of}" if gain.of else ""
    word = ("reached" if reached else "not reached") + ("" if sure else ", within chance")
    return Judgement(claim, subject, gain, f"{word}: {gain.value:.2f}{span} {claim.unit}{where}")
