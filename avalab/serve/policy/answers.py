"""When an answer that is known may be given again.

1. Only greedy answers are kept: they are a function of model, template, parameters, tools and messages, all of which
   stand in `exact_key`. Texts are compared in Unicode's composed form, with one kind of line end and without space at
   their ends; everything else counts.
2. A near match is given only when a request asks for it (`"cache": "near"`). All but the last request of the user has
   to be equal; of that, `signature` has to be equal: its words in their order, numbers with their sign and what stands
   right behind them as it is written (5 mW is not 5 MW), what stands in quotes or code to the letter. Left out are
   articles and phrases of politeness only: prepositions, negations and pronouns are what minimal pairs differ by.
3. Equality of signatures is necessary; where the server can embed texts, their cosine has to reach `LEAST_COSINE`, too.

What it does not do: find paraphrases. "Cheapest" and "least expensive" are different words; a false hit costs a wrong
answer, a miss only time.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

LEAST_COSINE = 0.9

SETTINGS = (  # of a request, by which an answer may differ
    *("max_tokens", "stop", "tools", "tool_choice", "response_format", "logprobs", "top_logprobs"),
    *("frequency_penalty", "presence_penalty", "logit_bias", "echo", "suffix", "n", "grammar"),
)

# Behind a number: units that mean another thing in another case (mW and MW, Mb and MB, m and M).
_CASE_COUNTS = re.compile(r"[^\W\d_]|[mp]\w{1,3}|\w{1,3}b|\w{1,2}bps", re.IGNORECASE)

LEFT_OUT = ("a", "an", "the", "please", "kindly", "hello", "hi", "hey", "thanks")

OPENINGS = (("can", "you"), ("could", "you"), ("would", "you"), ("will", "you"))  # before an order

_TOKEN = re.compile(
    r"(?P<code>```.*?```|`[^`]*`|\"[^\"]*\"|“[^”]*”)"
    r"|(?P<number>[-+\u2212]?\s?[€$£¥]?\s?\d+(?:[.,:/]\d+)*)(?P<unit>\s?(?:[^\W\d_]+(?:[/^][\w]+)*|[%°µ‰]\w*))?"
    r"|(?P<word>[^\W\d_]+(?:['\u2019][^\W\d_]+)*)"
    r"|(?P<sign>[^\s.,;:!?()\[\]…-]|(?<=\s)-(?=\s))",
    re.DOTALL,
)


def normalised(text: str) -> str:
    """A text in composed form, with line feeds, without space at its ends."""
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").strip()


def _normalised(value: Any) -> Any:
    if isinstance(value, str):
        return normalised(value)
    if isinstance(value, Mapping):
        return {key: _normalised(item) for key, item in value.items()}
    return [_normalised(item) for item in value] if isinstance(value, list | tuple) else value


def is_greedy(request: Mapping[str, Any]) -> bool:
    """Whether a request leaves nothing to chance: temperature 0 or none given, and one answer."""
    return not request.get("temperature") and (request.get("n") or 1) == 1


def exact_key(model_sha256: str, template: str, request: Mapping[str, Any]) -> str:
    """The identity of a greedy request, 64 hexadecimal digits."""
    said = {name: request[name] for name in (*SETTINGS, "messages", "prompt") if request.get(name) is not None}
    content = json.dumps([model_sha256, template, _normalised(said)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def near_key(model_sha256: str, template: str, request: Mapping[str, Any]) -> str | None:
    """As `exact_key`, with the signature of the last thing that the user says; None where nothing of it is left."""
    text = last_said(request)
    signed = signature(text) if text else ()
    if not signed:
        return None
    if request.get("messages"):
        *before, last = request["messages"]
        changed = {**request, "messages": [*before, {**last, "content": list(signed)}]}
    else:
        changed = {**request, "prompt": list(signed)}
    return "near" + exact_key(model_sha256, template, changed)[4:]


def last_said(request: Mapping[str, Any]) -> str:
    """The text of the last message, where it is a user's, or the prompt."""
    if request.get("messages"):
        last = request["messages"][-1]
        return last["content"] if last.get("role") == "user" and isinstance(last.get("content"), str) else ""
    return request["prompt"] if isinstance(request.get("prompt"), str) else ""


def signature(text: str) -> tuple[str, ...]:
    """What of a text must not differ, in its order."""
    found = [(kind, match) for match in _TOKEN.finditer(normalised(text)) if (kind := match.lastgroup)]
    words: list[str] = []
    for _, match in found:
        if match["code"]:
            words.append(match["code"])
        elif match["number"]:
            words.append("".join(match["number"].split()).replace("\u2212", "-"))
            if unit := (match["unit"] or "").strip():
                words.append(unit if _CASE_COUNTS.fullmatch(unit) or not unit.isalpha() else unit.casefold())
        elif match["word"]:
            words.append(unicodedata.normalize("NFKC", match["word"]).casefold().replace("\u2019", "'"))
        else:
            words.append(match["sign"])
    kept = [word for word in words if word not in LEFT_OUT]
    if tuple(kept[:2]) in OPENINGS:
        kept = kept[2:]
    asked = normalised(text).endswith("?")
    return (*kept, "?") if asked and kept else tuple(kept)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """The cosine of the angle between two vectors; 0 where one of them has no length."""
    length = sqrt(sum(x * x for x in a)) * sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def is_near(a: Sequence[float] | None, b: Sequence[float] | None) -> bool:
    """Whether embeddings allow a near match; without them the signature alone decides."""
    return a is None or b is None or cosine(a, b) >= LEAST_COSINE
