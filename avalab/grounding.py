"""Whether a request says the values that a call passes: what a model must not invent.

A number is looked for as digits, in words, in per cent, in thousands, millions or billions, and as the pools of numbers
say it (`a week` is 7, `a fair coin` 0.5); a text in any way of saying it; of a list or an object, every leaf. A truth
value is said in too many ways to be found: a word of its parameter's name or description has to be there.

What it does not do: prove that a value that is said belongs to its parameter.
"""

from __future__ import annotations

import math
import re

from avalab import packaged_text
from avalab.arguments import SCALES, WORDS, ways_to_say

STOP_WORDS = {"whether", "the", "are", "and", "not", "too", "default", "true", "false", "only", "for", "with", "also"}


def grounded(example: dict) -> str:
    """Every argument of every call is said in the request."""
    request = " ".join(m["content"] for m in example["messages"] if m["role"] == "user")
    for call in example["calls"]:
        about = _described(example["tools"], call["name"])
        for name, value in call["arguments"].items():
            if (missing := _unsaid(value, f"{name} {about.get(name, '')}", request)) is not None:
                return f"{call['name']}: {name}={missing!r} is not said in the request"
    return ""


def _described(tools: list[dict], name: str) -> dict[str, str]:
    """What the function says of its parameters."""
    tool = next((tool for tool in tools if tool["name"] == name), {"parameters": {}})
    return {p: schema.get("description", "") for p, schema in tool["parameters"].get("properties", {}).items()}


def _unsaid(value: object, name: str, request: str) -> object:
    """The first part of the value that the request does not say, or None.

    A truth value is said in too many ways to be found; a word of its parameter's name or description has to be there.
    """
    if isinstance(value, dict):
        return next((found for k, v in value.items() if (found := _unsaid(v, k, request)) is not None), None)
    if isinstance(value, list):
        return next((found for item in value if (found := _unsaid(item, name, request)) is not None), None)
    if isinstance(value, bool):
        words = re.findall(r"[a-z]+", re.sub(r"([A-Z])", r" \1", name).lower())
        stems = {word[:4] for word in words if len(word) > 2 and word not in STOP_WORDS}
        return None if any(stem in request.lower() for stem in stems) else value
    if isinstance(value, int | float):
        return None if _says_number(value, request) else value
    if re.fullmatch(r"-?\d+(\.\d+)?", str(value)) and _says_number(float(value), request):
        return None  # a number that is passed as text
    plain = _plain(request)
    return None if any(_plain(form) in plain for form in ways_to_say(str(value))) else value


def _says_number(value: float, request: str) -> bool:
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", request)
    number = r"(?<![\d.\w])(-?\d+(?:\.\d+)?)"
    said = {float(n) for n in re.findall(number, plain)}
    said |= {float(n) / 100 for n in re.findall(number + r"\s?(?:%|percent|per cent)", plain)}
    said |= {float(n) * 1000 for n in re.findall(r"\$(\d+)k\b", plain)}
    said |= {float(n) * SCALES[word] for n, word in re.findall(number + r" (thousand|million|billion)\b", plain)}
    said |= {float(WORDS.index(w)) for w in re.findall(r"[a-z]+", request.lower()) if w in WORDS}
    return any(math.isclose(value, n, rel_tol=1e-9, abs_tol=1e-12) for n in said) or _implies(value, _plain(request))


def _implies(value: float, plain: str) -> bool:
    """Whether the request says the number in words that stand in a pool of numbers: a week, a fair coin."""
    forms = packaged_text.said_numbers().get(float(value), ())
    return any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", plain) for form in forms)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
