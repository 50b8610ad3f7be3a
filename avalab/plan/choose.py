"""What to use for each memory budget, computed from the records of a race, or of a shortlist of several models.

1. A candidate is a subject (`nf4 in torch`) with a peak of memory, a decode rate and a KL divergence. Memory is the
   peak above the process's runtime (`peak_rss_bytes:engine`), or GPU memory where it was measured.
2. Of those that fit into a budget, the ones whose divergence is at most `kl_limit`, a judgement of whoever asks, are
   good enough; of these the one that decodes fastest is chosen. Where none is good enough, the least divergence is.
3. The default is the choice of the smallest budget in which something is good enough.
4. `judge` compares the default with its peers, as ratios of medians of one run. A peer counts where the default's
   divergence is not above the upper end of the peer's interval; of several, the fastest counts.

Several models have no common base, so that calls decide between them and not a divergence (`choose_for`): at a stated
context a candidate has to fit and, where the wish says so, to be quick enough; then the share of right calls counts,
with its interval, then speed. Whether two shares differ at all is McNemar's test on the same cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from avalab.lab import statistics
from avalab.lab.run import Record

GIB = 2**30

BUDGETS = (GIB // 2, GIB, 2 * GIB, 4 * GIB)


@dataclass(frozen=True)
class Candidate:
    """One subject of the race with what decides; `calls` is None where no calls were asked for."""

    subject: str
    engine: str
    memory: Record
    decode: Record
    prefill: Record
    kl: Record
    calls: Record | None = None


@dataclass(frozen=True)
class Target:
    """A claim about the default: at least `wanted` times a peer's speed at a number of threads."""

    claim: str
    peers: str  # beginning or end of the peers' subjects, such as " in llamacpp"
    metric: str  # a field of Candidate
    threads: int  # 0: the most
    wanted: float


# NF4 in torch: bitsandbytes' weights, computed by the lab's kernels, no slower than bitsandbytes' own (notebook 10).
TARGETS = (
    Target("decode, llama.cpp at one thread", " in llamacpp", "decode", 1, 1.0),
    Target("decode, llama.cpp at all threads", " in llamacpp", "decode", 0, 1.5),
    Target("prefill, llama.cpp at all threads", " in llamacpp", "prefill", 0, 3.0),
    Target("prefill, NF4 of the torch engine", "nf4 in torch", "prefill", 0, 5.0),
    Target("decode, NF4 of the torch engine", "nf4 in torch", "decode", 0, 2.0),
)


def read_candidates(records: Sequence[Record], *, kl: str, threads: int, calls: str = "") -> list[Candidate]:
    """Every subject that has memory, the metric `kl` and, at this number of threads, speeds.

    Decoding is that after the shortest prompt and prefill that of the longest.
    """
    timed = [r for r in records if r.threads == threads and r.value is not None]

    def at_prompt(metric: str, which: Callable) -> dict[str, Record]:
        tokens = {int(r.metric.removeprefix(f"{metric}:prompt")) for r in timed if r.metric.startswith(f"{metric}:p")}
        name = f"{metric}:prompt{which(tokens, default='')}"
        return {r.subject: r for r in timed if r.metric == name}

    decode, prefill = at_prompt("decode_tokens_per_s", min), at_prompt("prefill_tokens_per_s", max)
    memory = {r.subject: r for r in timed if r.metric == "peak_rss_bytes:engine"}
    memory |= {r.subject: r for r in timed if r.metric == "peak_vram_bytes"}
    scored, answered = ({r.subject: r for r in records if r.metric == m and r.value is not None} for m in (kl, calls))
    return [
        Candidate(s, r.engine, memory[s], r, prefill[s], scored[s], answered.get(s))
        for s, r in decode.items()
        if s in memory and s in prefill and s in scored
    ]


def choose_candidate(found: Sequence[Candidate], budget_bytes: int, *, kl_limit: float) -> tuple[Candidate | None, str]:
    """The candidate for a budget and the reason; None where nothing fits."""
    fitting = [c for c in found if c.memory.value <= budget_bytes]
    if not fitting:
        least = min((c.memory.value for c in found), default=None)
        return None, "nothing was measured" if least is None else f"the least that was measured is {least / 1e6:.0f} MB"
    good = [c for c in fitting if c.kl.value <= kl_limit]
    if good:
        return max(good, key=lambda c: c.decode.value), "fastest decode that is good enough"
    return min(fitting, key=lambda c: c.kl.value), "nothing that fits is good enough: the least divergence"


def choices(
    found: Sequence[Candidate], *, kl_limit: float, budgets: Sequence[int] = BUDGETS
) -> list[tuple[int, Candidate | None, str]]:
    """(bytes, what to use, why) of each budget, the smallest first."""
    return [(budget, *choose_candidate(found, budget, kl_limit=kl_limit)) for budget in sorted(budgets)]


def default_candidate(
    found: Sequence[Candidate], *, kl_limit: float, budgets: Sequence[int] = BUDGETS
) -> Candidate | None:
    """The choice of the smallest budget in which something is good enough; None where nothing is."""
    chosen = [c for _, c, _ in choices(found, kl_limit=kl_limit, budgets=budgets)]
    return next((c for c in chosen if c and c.kl.value <= kl_limit), None)


# --- several models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wish:
    """What somebody wants most; `slowest_ms` a token at the stated context, `speed_first` among equally good ones."""

    name: str
    slowest_ms: float = float("inf")
    speed_first: bool = False


WISHES = (
    Wish("fastest", speed_first=True),
    Wish("best at calls"),
    Wish("best under 20 ms a token", slowest_ms=20.0),
)


@dataclass(frozen=True)
class Choice:
    """What to use for a wish within a budget, and why; no candidate where nothing fits or is quick enough."""

    budget_bytes: int
    wish: Wish
    candidate: Candidate | None
    why: str


def candidates_at(records: Sequence[Record], *, context: int, calls: str, kl: str) -> list[Candidate]:
    """Every subject that has memory and speeds at a context, the metric `kl` and the share of right calls `calls`."""
    names = [f"{n}:context{context}" for n in ("peak_rss_bytes:engine", "decode_tokens_per_s", "prefill_tokens_per_s")]
    memory, decode, prefill, scored, answered = (
        {r.subject: r for r in records if r.metric == name and r.value is not None} for name in (*names, kl, calls)
    )
    return [
        Candidate(s, r.engine, r, decode[s], prefill[s], scored[s], answered[s])
        for s, r in memory.items()
        if all(s in found for found in (decode, prefill, scored, answered))
    ]


def choose_for(found: Sequence[Candidate], budget_bytes: int, wish: Wish) -> Choice:
    """The choice of one wish within one budget."""
    fitting = [c for c in found if c.memory.value <= budget_bytes]
    if not fitting:
        return Choice(budget_bytes, wish, *choose_candidate(found, budget_bytes, kl_limit=0.0))
    quick = [c for c in fitting if 1000 / c.decode.value <= wish.slowest_ms]
    if not quick:
        nearest = max(fitting, key=lambda c: c.decode.value)
        why = f"the quickest that fits, {nearest.subject}, takes {1000 / nearest.decode.value:.0f} ms a token"
        return Choice(budget_bytes, wish, None, why)
    best = max(quick, key=lambda c: (c.calls.value, c.decode.value))
    equal = [c for c in quick if is_as_good(c, best)]
    fastest = max(equal, key=lambda c: c.decode.value)
    if wish.speed_first:
        other = "" if fastest is best else f", {best.subject} ({best.calls.value:.0%} right)"
        return Choice(budget_bytes, wish, fastest, f"fastest of the {len(equal)} that call as well as the best{other}")
    other = "" if fastest is best else f"; {fastest.subject} is faster and not distinguishably worse"
    return Choice(budget_bytes, wish, best, f"most calls right of the {len(quick)} that fit{other}")


def is_as_good(candidate: Candidate, best: Candidate) -> bool:
    """Whether a share of right calls is not distinguishable from the best one: paired, where the verdicts are known."""
    ours, theirs = (c.calls.details.get("right", "") for c in (candidate, best))
    if ours and len(ours) == len(theirs):
        same_cases = [[verdict == "1" for verdict in verdicts] for verdicts in (ours, theirs)]
        return statistics.mcnemar(*same_cases).verdict != "worse"
    high = candidate.calls.value if candidate.calls.high is None else candidate.calls.high
    return high >= best.calls.value


def answer(
    found: Sequence[Candidate], *, budgets: Sequence[int] = BUDGETS, wishes: Sequence[Wish] = WISHES
) -> list[Choice]:
    """The choices of all wishes, the smallest budget first."""
    return [choose_for(found, budget, wish) for budget in sorted(budgets) for wish in wishes]


# --- targets ----------------------------------------------------------------------------------------------------------


def judge_targets(
    found: dict[int, list[Candidate]],
    chosen: str,
    *,
    show: Callable[[Record], str],
    targets: Sequence[Target] = TARGETS,
) -> list[tuple[Target, float | None, str]]:
    """(target, ratio, sentence) of every target; `found` holds the candidates by number of threads.

    The ratio is None where it was not measured, and the sentence says why; `show` writes a record in it.
    """
    results = []
    for target in targets:
        threads = target.threads or max(found)
        here = {c.subject: c for c in found.get(threads, [])}
        peers = [c for s, c in here.items() if s.startswith(target.peers) or s.endswith(target.peers)]
        results.append((target, *_ratio(target, threads, here.get(chosen), peers, show)))
    return results


def _ratio(
    target: Target, threads: int, ours: Candidate | None, peers: list[Candidate], show: Callable[[Record], str]
) -> tuple[float | None, str]:
    if ours is None:
        return None, f"not measured: the default has no speed at {threads} threads"
    if not peers:
        return None, f"not measured: no peer{target.peers} here"
    equal = [c for c in peers if ours.kl.value <= (c.kl.value if c.kl.high is None else c.kl.high)]
    if not equal:
        best = min(peers, key=lambda c: c.kl.value)
        return None, f"not comparable: every peer is closer to the base, such as {best.subject} ({show(best.kl)})"
    peer = max(equal, key=lambda c: getattr(c, target.metric).value)
    mine, theirs = getattr(ours, target.metric), getattr(peer, target.metric)
    ratio = mine.value / theirs.value
    span = closer = ""
    if None not in (mine.low, mine.high, theirs.low, theirs.high):
        span = f" [{mine.low / theirs.high:.2f}, {mine.high / theirs.low:.2f}]"
    if len(equal) < len(peers):
        closer = f"; closer to the base and not counted: {', '.join(c.subject for c in peers if c not in equal)}"
    word = "reached" if ratio >= target.wanted else "not reached"
    return ratio, f"{word}: {ratio:.2f}x{span} of {peer.subject} at {threads} threads{closer}"
