"""What of a long chat a model reads: windows with overlap, and compression to a number of tokens.

1. `sliding_windows` cuts a sequence into windows of `size` that overlap: every pair of neighbours within the overlap
   stands in one window together.
2. `fitted` brings messages to a target, by the first of these steps that reaches it: sentences that are repeated are
   said once (the last time); the oldest turns go, while `overlap` tokens of the newest of those stay; of what is still
   too long the sentences that are nearest to the last request are kept, in their order.
3. The system message, the tools (which stand in it or beside it) and the last request are never changed.

`count` gives the tokens of a text, by the model's tokenizer or an estimate; `nearness` of a sentence to a request is
embedding similarity where a model embeds, else the share of the request's rare words that the sentence holds (idf).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import log

from avalab.lab.errors import InputError
from avalab.serve.policy.answers import normalised

MODES = ("none", "sliding_window", "compress")

OF_MESSAGE = 4  # tokens that a template spends on a message

_SENTENCE = re.compile(r"(?<=[.!?…])\s+|\n+")

_WORD = re.compile(r"\w+")

Count = Callable[[str], int]


class TooLong(InputError):
    """What may not be left out is longer than the model's context."""


def estimate(text: str) -> int:
    """Tokens of a text at one for every three bytes: more than tokenizers of 49,000 or more tokens make of English."""
    return -(-len(text.encode()) // 3)


def sliding_windows(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of windows that cover a sequence, each `overlap` into the one before."""
    if not 0 <= overlap < size:
        raise InputError(f"windows of {size} tokens overlap by 0 to {size - 1}, got {overlap}")
    if length <= size:
        return [(0, length)] if length else []
    step = size - overlap
    starts = list(range(0, length - size, step))
    return [*((start, start + size) for start in starts), (length - size, length)]


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text."""
    return [part.strip() for part in _SENTENCE.split(text) if part.strip()]


def total(messages: Sequence[dict], count: Count) -> int:
    """Tokens of messages, as far as they can be told without their template."""
    return sum(count(_text(message)) + OF_MESSAGE for message in messages)


def fitted(
    messages: Sequence[dict],
    target: int,
    *,
    count: Count = estimate,
    overlap: int = 0,
    mode: str = "compress",
    nearness: Callable[[str, Sequence[str]], Sequence[float]] | None = None,
) -> list[dict]:
    """The messages in at most `target` tokens. Raises TooLong where system message and last request alone are more.

    In the mode `sliding_window` old turns go and nothing is rewritten; `none` raises TooLong for whatever is too long.
    """
    if mode not in MODES:
        raise InputError(f"unknown window {mode!r}; choose one of {', '.join(MODES)}")
    if total(messages, count) <= target:
        return list(messages)
    kept = [m for m in messages[:-1] if m["role"] in ("system", "developer")]
    fixed = total([*kept, messages[-1]], count)
    if mode == "none" or fixed > target:
        needs = total(messages, count) if mode == "none" else fixed
        raise TooLong(f"the messages take {needs:,} tokens and {target:,} fit; shorten them, or ask for a window")
    turns = [m for m in messages[:-1] if m not in kept]
    if mode == "compress":
        turns = said_once(turns)
    chosen, dropped = _newest(turns, target - fixed, count)
    room = target - fixed - total(chosen, count)
    if dropped and mode == "sliding_window" and overlap:
        chosen = [*_tail(dropped[-1], min(overlap, room), count), *chosen]
    elif dropped and mode == "compress":
        chosen = [*_extract(dropped, _text(messages[-1]), room, count=count, nearness=nearness), *chosen]
    return [*kept, *chosen, messages[-1]]


def said_once(messages: Sequence[dict]) -> list[dict]:
    """Messages without sentences that a later one says again, by letters and digits; empty ones go."""
    seen: set[str] = set()
    kept: list[dict] = []
    for message in reversed(messages):
        if message.get("tool_calls") or not isinstance(message.get("content"), str):
            kept.append(message)
            continue
        new: list[str] = []
        for sentence in reversed(sentences(message["content"])):
            form = " ".join(_WORD.findall(normalised(sentence).casefold()))
            if form not in seen or not form:
                new.append(sentence)
            seen.add(form)
        if new:
            kept.append({**message, "content": "\n".join(reversed(new))})
    return kept[::-1]


def word_nearness(request: str, candidates: Sequence[str]) -> list[float]:
    """The share of the request's words that each candidate holds, words that few candidates hold counting more."""
    sets = [set(map(str.casefold, _WORD.findall(candidate))) for candidate in candidates]
    held = Counter(word for words in sets for word in words)
    weights = {w: log((1 + len(sets)) / (1 + held[w])) + 1e-9 for w in map(str.casefold, _WORD.findall(request))}
    whole = sum(weights.values()) or 1.0
    return [sum(weight for word, weight in weights.items() if word in words) / whole for words in sets]


def _text(message: dict) -> str:
    content = message.get("content") or ""
    called = " ".join(str(call) for call in message.get("tool_calls") or ())
    return (content if isinstance(content, str) else str(content)) + called


def _newest(turns: Sequence[dict], room: int, count: Count) -> tuple[list[dict], list[dict]]:
    """The newest messages that fit, and the others; a tool's result never stands without the call before it."""
    start = len(turns)
    while start and total(turns[start - 1 :], count) <= room:
        start -= 1
    while start < len(turns) and turns[start]["role"] == "tool":
        start += 1
    return list(turns[start:]), list(turns[:start])


def _tail(message: dict, room: int, count: Count) -> list[dict]:
    """The end of a message, cut between words, in at most `room` tokens."""
    words = _text(message).split() if message["role"] in ("user", "assistant") else []
    start = len(words)
    while start and count(" ".join(words[start - 1 :])) + OF_MESSAGE <= room:
        start -= 1
    return [{"role": message["role"], "content": " ".join(words[start:])}] if start < len(words) else []


def _extract(
    dropped: Sequence[dict], request: str, room: int, *, count: Count, nearness: Callable | None
) -> list[dict]:
    """Sentences of dropped messages that are nearest to the request, as one message, in at most `room` tokens."""
    listed = [sentence for message in dropped if message["role"] != "tool" for sentence in sentences(_text(message))]
    scores = (nearness or word_nearness)(request, listed) if listed else []
    begin, used, chosen = "Said before:", 0, []
    used = count(begin) + OF_MESSAGE
    for index in sorted(range(len(listed)), key=lambda index: (-scores[index], -index)):
        if used + (cost := count(listed[index]) + 1) <= room:
            chosen.append(index)
            used += cost
    content = "\n".join([begin, *(listed[index] for index in sorted(chosen))])
    return [{"role": "user", "content": content}] if chosen else []
