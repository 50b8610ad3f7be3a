"""Quality gates of synthetic examples: functions that return "" or the reason for a rejection.

In the order of `STANDARD`:

1. `schema_validity`: every tool's schema is valid JSON Schema (after the leaderboard's type names are translated) and
   every call's arguments satisfy it; no call stands twice; the answer's text holds the calls that the example claims.
2. `grounded`: every value that is passed is said in the request, since a model must not invent it. A number is looked
   for as digits, in words, in per cent, in thousands, millions or billions, and as the pools of numbers say it (`a
   week` is 7, `a fair coin` 0.5); a text in any way of saying it (dates, times); of a list or an object, every leaf.
3. `execution`: calls of whitelisted pure standard-library functions run with small arguments; a stated result is equal
   to the computed one.
4. `language_and_length`: request and answer have a sensible length, mostly ASCII letters and words of English.

`perplexity_band` (a request must be about as likely under a model as trusted ones are) and the gates of `repeats` are
made by a call. No gate judges whether a request sounds natural, or that a grounded value belongs to its parameter.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import jsonschema

from avalab.data import calls, phrasing, repeats, toolbox
from avalab.data.arguments import SCALES, WORDS, said_numbers, ways_to_say
from avalab.data.chats import last_request
from avalab.data.repeats import EvaluationSet
from avalab.lab.errors import InputError
from avalab.lab.schemas import refuse_loops, to_json_schema

Gate = Callable[[dict], str]

LARGEST_NUMBER = 10_000  # an argument of an executed function; factorial(10 ** 9) would run for hours

LONGEST_REQUEST = 1200

STOP_WORDS = {"whether", "the", "are", "and", "not", "too", "default", "true", "false", "only", "for", "with", "also"}

COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and are at be by can could do find for from get give have how i in is it like me my need of on or "
        "please tell that the this to want was what when which who with work you your did now we us our will has any",
    )
)

PURE_MODULES = {
    *("math", "statistics", "calendar", "difflib", "heapq", "textwrap", "html", "shlex", "fnmatch", "posixpath"),
    *("ipaddress", "urllib.parse", "string", "bisect", "operator", "colorsys", "unicodedata", "keyword"),
}

PURE = {"re.escape"}


def schema_validity(example: dict) -> str:
    """Tools are valid JSON Schema, calls satisfy them, and the answer's text holds the calls."""
    schemas = {}
    for tool in example["tools"]:
        try:
            schemas[tool["name"]] = checked_schema(tool)
        except ValueError as error:
            return str(error)
    for call in example["calls"]:
        if call["name"] not in schemas:
            return f"calls {call['name']!r}, which is not among the tools {', '.join(schemas) or '(none)'}"
        validator = jsonschema.Draft202012Validator(schemas[call["name"]])
        if error := jsonschema.exceptions.best_match(validator.iter_errors(call["arguments"])):
            return f"{call['name']}: {error.message}"
    if any(call in example["calls"][:i] for i, call in enumerate(example["calls"])):
        return "the same call stands twice"
    if not schemas:
        return ""
    answer = example["messages"][-1]["content"]
    if example["kind"] == "structured_output":
        same = answer == json.dumps(example["calls"][0]["arguments"], ensure_ascii=False)
        return "" if same else "the answer is not the JSON of the example's arguments"
    found = calls.parse_calls(answer)
    if found == "not_json":
        return "the answer's calls cannot be read"
    wanted = [calls.Call(call["name"], call["arguments"]) for call in example["calls"]]
    return "" if found == (wanted or "no_call") else "the answer's text does not hold the example's calls"


def checked_schema(tool: dict) -> dict:
    """The JSON Schema of a tool's arguments. Raises ValueError naming the tool where it is not a valid one."""
    try:
        schema = to_json_schema(tool)
        jsonschema.Draft202012Validator.check_schema(schema)
        refuse_loops(schema)
    except (jsonschema.SchemaError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"tool {tool.get('name')!r} is not valid JSON Schema: {said}") from error
    return schema


def grounded(example: dict) -> str:
    """Every argument of every call is said in the request, or in what a tool returned."""
    request = " ".join(m["content"] for m in example["messages"] if m["role"] in ("user", "tool"))
    for call in example["calls"]:
        tool = next((tool for tool in example["tools"] if tool["name"] == call["name"]), {})
        described = (tool.get("parameters") or {}).get("properties", {})
        for name, value in call["arguments"].items():
            said = described.get(name)
            about = f"{name} {said.get('description', '') if isinstance(said, dict) else ''}"
            if (missing := first_unsaid(value, about, request)) is not None:
                return f"{call['name']}: {name}={missing!r} is not said in the request"
    return ""


def first_unsaid(value: object, about: str, request: str) -> object:
    """The first part of the value that the request does not say, or None.

    A truth value is said in too many ways to be found; a word of `about`, its parameter's name and description, has to
    be there.
    """
    if isinstance(value, dict):
        return next((found for k, v in value.items() if (found := first_unsaid(v, k, request)) is not None), None)
    if isinstance(value, list):
        return next((found for item in value if (found := first_unsaid(item, about, request)) is not None), None)
    if isinstance(value, bool):
        named = re.findall(r"[a-z]+", re.sub(r"([A-Z])", r" \1", about).lower())
        stems = {word[:4] for word in named if len(word) > 2 and word not in STOP_WORDS}
        return None if any(stem in request.lower() for stem in stems) else value
    if isinstance(value, int | float):
        return None if says_number(value, request) else value
    if re.fullmatch(r"-?\d+(\.\d+)?", str(value)) and says_number(float(value), request):
        return None  # a number that is passed as text
    plain = _plain(request)
    return None if any(_plain(form) in plain for form in ways_to_say(str(value))) else value


def says_number(value: float, request: str) -> bool:
    """Whether the request says the number: in digits, words, per cent, or as a pool says it (a week, a fair coin)."""
    digits = re.sub(r"(?<=\d),(?=\d{3}\b)", "", request)
    number = r"(?<![\d.\w])(-?\d+(?:\.\d+)?)"
    said = {float(n) for n in re.findall(number, digits)}
    said |= {float(n) / 100 for n in re.findall(number + r"\s?(?:%|percent|per cent)", digits)}
    said |= {float(n) * 1000 for n in re.findall(r"\$(\d+)k\b", digits)}
    said |= {float(n) * SCALES[word] for n, word in re.findall(number + r" (thousand|million|billion)\b", digits)}
    said |= {float(WORDS.index(w)) for w in re.findall(r"[a-z]+", request.lower()) if w in WORDS}
    if any(math.isclose(value, n, rel_tol=1e-9, abs_tol=1e-12) for n in said):
        return True
    forms, plain = said_numbers().get(float(value), ()), _plain(request)
    return any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", plain) for form in forms)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def execution(example: dict) -> str:
    """Whitelisted pure functions run; where the example states a `result`, it is the computed one."""
    for call in example["calls"] or example.get("checks", []):
        if not is_pure(call["name"]):
            continue
        try:
            result = execute(call["name"], call["arguments"])
        except Exception as error:  # any failure of the function itself is the finding
            return f"{call['name']} fails: {type(error).__name__}: {error}"
        if "result" in call and repr(result) != call["result"]:
            return f"{call['name']} gives {result!r}, the example says {call['result']}"
    return ""


@cache
def is_pure(name: str) -> bool:
    """Whether a tool is a pure standard-library callable that the lab offers: only those are ever executed."""
    offered = {tool.name for tool in (*phrasing.tools(), *toolbox.rows())}
    return name in offered and (name.rpartition(".")[0] in PURE_MODULES or name in PURE)


def execute(name: str, arguments: dict) -> object:
    """Call a whitelisted function. Raises ValueError for another one or for arguments too large to be safe."""
    if not is_pure(name):
        raise InputError(f"{name!r} is not executed; allowed are functions of {', '.join(sorted(PURE_MODULES))}")
    if large := [n for n in _sizes(list(arguments.values())) if abs(n) > LARGEST_NUMBER]:
        raise InputError(f"{large[0]} is larger than {LARGEST_NUMBER}")
    function = toolbox.resolve(name)
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a built-in without a signature takes its arguments by place
        parameters = ()
    named = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    by_name = set(arguments) <= named and len(named) == len(parameters)
    result = function(**arguments) if by_name else function(*arguments.values())
    return result if isinstance(result, str | int | float | bool | list | tuple) else str(result)


def _sizes(values: list) -> Iterable[float]:
    """The numbers among the values, at every depth, and the lengths of long texts."""
    for value in values:
        if isinstance(value, list):
            yield from _sizes(value)
        elif isinstance(value, int | float):
            yield value
        elif isinstance(value, str) and len(value) > LARGEST_NUMBER:
            yield len(value)


def language_and_length(example: dict) -> str:
    """3 words to LONGEST_REQUEST characters, English by its common words, printable, an answer that is not empty."""
    request, answer = last_request(example["messages"]), example["messages"][-1]["content"]
    words = re.findall(r"[a-z']+", request.lower())
    if len(words) < 3 or len(request) > LONGEST_REQUEST:
        return f"a request of {len(words)} words and {len(request)} characters"
    if not answer.strip():
        return "the answer is empty"
    if not all(c.isprintable() or c in "\n\t" for c in request):
        return "the request has unprintable characters"
    if sum(c.isascii() for c in request) < 0.9 * len(request) or not COMMON & set(words):
        return "the request does not look like English"
    return "" if not re.search(r"[{}\[\]]\w*=|\{\w+\}", request) else "the request holds an unfilled slot"


def perplexity_band(score: Callable[[str], float], low: float, high: float) -> Gate:
    """A gate that rejects a request whose perplexity under a model lies outside [low, high]."""

    def gate(example: dict) -> str:
        value = score(last_request(example["messages"]))
        return "" if low <= value <= high else f"perplexity {value:.1f} is outside {low:g} to {high:g}"

    return gate


def perplexity_interval(trusted: Sequence[float], share: float = 0.98) -> tuple[float, float]:
    """The interval that holds the central `share` of trusted perplexities. Raises ValueError for no values."""
    if not trusted or not 0 < share <= 1:
        raise InputError(f"a share of {share} of {len(trusted)} values; it needs values, and a share in (0, 1]")
    ordered, cut = sorted(trusted), (1 - share) / 2
    return ordered[math.floor(cut * (len(ordered) - 1))], ordered[math.ceil((1 - cut) * (len(ordered) - 1))]


def model_perplexity(folder: Path, device: str = "cpu") -> Callable[[str], float]:
    """A score for `perplexity_band`: a text's perplexity under the model of an artefact folder."""
    import torch  # only this score needs a model

    from avalab.models import checkpoint

    model, tokenizer = checkpoint.load_model(folder, device), checkpoint.load_tokenizer(folder)

    def score(text: str) -> float:
        ids = tokenizer(f"{tokenizer.bos_token or tokenizer.eos_token or ''}{text}", return_tensors="pt").input_ids
        with torch.inference_mode():
            return math.exp(model(ids.to(device), labels=ids.to(device)).loss.float().item())

    return score


STANDARD: dict[str, Gate] = {
    "schema_validity": schema_validity,
    "grounded": grounded,
    "execution": execution,
    "language_and_length": language_and_length,
}


def standard_gates(sets: Iterable[EvaluationSet] = (), more: dict[str, Gate] | None = None) -> dict[str, Gate]:
    """All gates in order, with the stateful ones made anew; `more` gates stand before those that remember."""
    last = {"diversity": repeats.spread_gate(), "near_duplicates": repeats.near_duplicate_gate()}
    return {**STANDARD, "overlap": repeats.overlap_gate(sets), **(more or {}), **last}


def verdict(example: dict, gates: dict[str, Gate]) -> tuple[str, str]:
    """(gate, reason) of the first gate that rejects, or ("", "")."""
    for name, gate in gates.items():
        if reason := gate(example):
            return name, reason
    return "", ""


def survivors(examples: Iterable[dict], row: dict[str, Gate], *, without: str = "") -> list[dict]:
    """The examples that pass every gate of the row, in order; `without` leaves one gate out.

    Gates that remember must be new: give each call a row of its own. Raises ValueError for a gate that is not there.
    """
    if without and without not in row:
        raise InputError(f"no gate {without!r} in the row; it has {', '.join(row)}")
    left = {name: gate for name, gate in row.items() if name != without}
    return [example for example in examples if verdict(example, left) == ("", "")]
