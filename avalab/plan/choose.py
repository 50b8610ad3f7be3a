"""What to use for each memory budget, computed from the records of a race.

1. A candidate is a subject (`nf4 in torch`) with a peak of memory, a decode rate and a KL divergence. Memory is the
   peak above the process's runtime (`peak_rss_bytes:engine`), or GPU memory where it was measured.
2. Of those that fit into a budget, the ones whose divergence is at most `kl_limit`, a judgement of whoever asks, are
   good enough; of these the one that decodes fastest is chosen. Where none is good enough, the least divergence is.
3. The default is the choice of the smallest budget in which something is good enough.
4. `judge` compares the default with its peers, as ratios of medians of one run. A peer counts where the default's
   divergence is not above the upper end of the peer's interval; of several, the fastest counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
