"""Function-calling cases, the chat text they are asked with, and the rules that decide whether an answer is right.

The cases are those of the Berkeley Function Calling Leaderboard v4 (single turn, Python; fetched when absent), and
those of the toolbox, which need no download: its held-out tools, with requests that say every argument, one fitting
tool on offer (`toolbox_simple`), among others (`toolbox_multiple`), or only others (`toolbox_irrelevance`).

An answer is judged on what it calls, not on how it is spelt.

1. `parse_calls` reads the calls from the model's text, in whichever of the published forms they are written.
2. `check_calls` compares them with the case. The number of calls must match; parallel calls may come in any order. Each
   call needs the right function, every argument that is required or has no "" among its possible answers, no other
   argument, the declared type (an integer passes for a float; an argument whose possible answers have another type may
   have that type too) and one of the possible values (strings compare without case, spaces and `,./-_*^`).

Rules: Patil et al., "The Berkeley Function Calling Leaderboard" (2025), abstract-syntax evaluation. The agreement of
this implementation with the leaderboard's own checker is a test. Where the rules are coarse they are kept, because the
numbers should mean the same: nested types are checked one level deep, parallel calls are matched greedily, and an
unreadable attempt at a call counts as "no call" in the irrelevance categories (its verdict carries `not_json`). A type
that the leaderboard's dialect cannot name (`anyOf`, `$ref`) is checked as JSON Schema says.
"""

from __future__ import annotations

import ast
import json
import random
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema
from transformers import PreTrainedTokenizerBase

from avalab.data import chats, toolbox
from avalab.lab import assets
from avalab.lab.errors import InputError, MissingFile
from avalab.lab.schemas import to_json_schema

LIVE_CATEGORIES = ("live_simple", "live_multiple", "live_irrelevance")

BFCL_CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance", *LIVE_CATEGORIES)

TOOLBOX = ("toolbox_simple", "toolbox_multiple", "toolbox_irrelevance")  # need no download

CATEGORIES = (*BFCL_CATEGORIES, *TOOLBOX)

LISTED = 3  # tools on offer in toolbox_multiple and toolbox_irrelevance

CALL_ERRORS = ("wrong_function", "missing_argument", "extra_argument", "wrong_type", "wrong_value")

ERRORS = ("no_call", "not_json", "unwanted_call", "wrong_count", *CALL_ERRORS)

# The declared type's name (BFCL's or JSON Schema's) -> the Python type of a value. "any" is text in the reference.
PYTHON_TYPES: dict[str, type] = {
    **{"string": str, "any": str, "integer": int, "float": float, "number": float, "boolean": bool},
    **{"array": list, "tuple": list, "dict": dict, "object": dict},
}

COMPOSED = {  # words of JSON Schema by which a value's type is not the one that `type` names
    *("$ref", "anyOf", "oneOf", "allOf", "not", "if", "const", "prefixItems", "nullable"),
}

_IGNORED_IN_STRINGS = str.maketrans({**dict.fromkeys(" ,./-_*^"), "'": '"'})

_BLOCK = re.compile(
    r"<tool_call>(?P<tag>.*?)(?P<closed></tool_call>|$)|(?P<function><function=[\w.\-]+>.*?(?:</function>|$))",
    re.DOTALL,
)

_REASONING = re.compile(  # and what is kept, so that a block of calls may mention these words
    r"(?P<kept><tool_call>.*?(?:</tool_call>|$))|<(?P<word>think|thinking|reasoning|scratch_pad)>.*?(?:</(?P=word)>|$)"
    r"|\[THINK\].*?(?:\[/THINK\]|$)",
    re.DOTALL,
)

_MARK = re.compile(r"\[TOOL_CALLS\]|<\|python_tag\|>|<\|tool_calls?\|>|<\|tool_call_start\|>")

_FENCE = re.compile(r"```(?P<kind>\w*)\s*(?P<code>.*?)\s*(?:```|$)", re.DOTALL)

_OBJECT = re.compile(r'(?:\[\s*)?(?P<object>\{\s*"(?:name|type|function|arguments|parameters|id)"\s*:)')

_JSON_BEGINS = re.compile(r"\{|\[\s*[{\]]")

_BETWEEN = re.compile(r"[\s,;]*")

_ENDS = re.compile(r"</?\w+>|<\|\w+\|>")

_NAMED = re.compile(r"(?P<name>[A-Za-z_][\w.\-]*)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?(?=\{)")

_FUNCTION = re.compile(r"<function=([\w.\-]+)>(.*?)(?:</function>|$)", re.DOTALL)

_PARAMETER = re.compile(r"<parameter=([\w.\-]+)>\n?(.*?)\n?(?:</parameter>|$)", re.DOTALL)

_JSON = json.JSONDecoder()

_PYTHON_CALL = re.compile(r"\[?\s*[A-Za-z_][\w.]*\s*\(")


@dataclass(frozen=True)
class Call:
    """One function call: the name and its arguments as plain Python values."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One question: chat messages, the functions on offer (BFCL's or JSON Schema's types) and the accepted calls.

    `expected` is a list of `{function: {argument: [accepted values]}}`; "" among the values means the argument may be
    left out. It is empty in the irrelevance categories.
    """

    id: str
    category: str
    messages: list[dict[str, str]]
    functions: list[dict[str, Any]]
    expected: list[dict[str, dict[str, list]]]


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right; `detail` names the argument or function.

    `error` is one of ERRORS, "too_long" where the question was not asked, or "".
    """

    correct: bool
    error: str = ""
    detail: str = ""


def cases(category: str, limit: int | None = None) -> list[Case]:
    """The first `limit` cases of a category of BFCL v4 (fetched when absent) or of the toolbox.

    Raises ValueError for an unknown category, or when the toolbox is asked for without a limit.
    """
    if category not in CATEGORIES:
        raise InputError(f"unknown category {category!r}; choose one of {', '.join(CATEGORIES)}")
    if category not in TOOLBOX:
        return load_cases(assets.fetch_asset("bfcl-v4"), category, limit)
    if limit is None:
        raise InputError(f"{category} has no end; give a limit")
    heldout, found = [t for t in toolbox.tools() if toolbox.split_of(t["name"]) == "heldout"], []
    for number, example in enumerate(toolbox.function_calling_examples(limit, seed=2, split="heldout")):
        (call,), messages = example["calls"], [m for m in example["messages"] if m["role"] == "user"]
        fitting = [t for t in heldout if t["name"] == call["name"]]
        others = random.Random(f"{category}_{number}").sample([t for t in heldout if t not in fitting], LISTED)
        listed = {
            "toolbox_simple": fitting,
            "toolbox_multiple": [*others[:1], *fitting, *others[2:]],
            "toolbox_irrelevance": others,
        }[category]
        expected = [] if category == "toolbox_irrelevance" else accepted_calls([call])
        found.append(Case(f"{category}_{number}", category, messages, listed, expected))
    return found


def accepted_calls(calls: list[dict]) -> list[dict[str, dict[str, list]]]:
    """What `Case.expected` holds where only these calls are right."""
    return [{call["name"]: {name: [_as_answer(value)] for name, value in call["arguments"].items()}} for call in calls]


def _as_answer(value: Any) -> Any:
    """A value as the leaderboard writes it: each key of an object with a list of accepted values."""
    if isinstance(value, dict):
        return {key: [item] for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [_as_answer(item) for item in value]
    return value


def case_prompt(tokenizer: PreTrainedTokenizerBase, case: Case) -> str:
    """The chat text of a case up to the answer: tools in the system message, before what the case says itself."""
    return chats.prompt_text(tokenizer, chats.prefaced(case.messages, toolbox.system_prompt(case.functions)))


def load_cases(folder: Path | str, category: str, limit: int | None = None) -> list[Case]:
    """The first `limit` cases of a category, in the file's order.

    `folder` holds `BFCL_v4_<category>.json`, directly or below `data/` or `bfcl_eval/data/` (the wheel's layout).
    Raises ValueError for an unknown category or a damaged line (file and line number), FileNotFoundError for a missing
    file.
    """
    if category not in BFCL_CATEGORIES:
        raise InputError(f"unknown BFCL category {category!r}; choose one of {', '.join(BFCL_CATEGORIES)}")
    places = [Path(folder, below) for below in ("", "data", "bfcl_eval/data")]
    paths = [place / f"BFCL_v4_{category}.json" for place in places]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise MissingFile(f"no {paths[0].name} in {', '.join(map(str, places))}")
    rows = list(islice(_rows(path, ("id", "question", "function")), limit))
    expected = {row["id"]: [] for row in rows}
    if not category.endswith("irrelevance"):
        answers = path.parent / "possible_answer" / path.name
        expected = {row["id"]: row["ground_truth"] for row in _rows(answers, ("id", "ground_truth"))}
    if unanswered := [row["id"] for row in rows if row["id"] not in expected]:
        raise InputError(f"{path} asks what possible_answer/{path.name} does not answer: {', '.join(unanswered)}")
    return [Case(row["id"], category, row["question"][0], row["function"], expected[row["id"]]) for row in rows]


def _rows(path: Path, fields: tuple[str, ...]) -> Iterator[dict]:
    for place, row in chats.json_lines(path):
        if missing := [field for field in fields if field not in row]:
            raise InputError(f"{place}: no field {', '.join(missing)}")
        yield row


def parse_calls(text: str) -> list[Call] | str:
    """The calls in a model's answer, or the error class `no_call` or `not_json`.

    1. Reasoning (`<think>` and its like) is no answer: what it mentions is not called.
    2. `<tool_call>` blocks (Qwen, Hermes, the lab), or what stands behind `[TOOL_CALLS]` (Mistral), `<|python_tag|>`
       (Llama 3) or `<function=...>`; text around is ignored, an unclosed last block is read to the end.
    3. Without such marks fenced code (`tool_code` of Gemma: all of it; else the first fence that holds calls), else the
       text as it stands, or from the first JSON object with a name and arguments in it; what follows is text.

    Inside: JSON objects or lists of them, one or several, with `name` and `arguments` (or `parameters`); Python calls
    with keyword arguments, in a list or on several lines; `name{...}`, or parameters as tags.
    """
    answer = _without_reasoning(text)
    if blocks := [(m["tag"] or m["function"] or "", bool(m["closed"])) for m in _BLOCK.finditer(answer)]:
        found = [_read(block, whole=closed) for block, closed in blocks]
    elif len(marked := _MARK.split(answer)) > 1:
        found = [_read(block, whole=False) for block in marked[1:]]
    elif fenced := [(m["kind"], m["code"]) for m in _FENCE.finditer(answer)]:
        code = [block for kind, block in fenced if kind == "tool_code"]
        held = [read for block in code or [block for _, block in fenced] if (read := _read(block, whole=True))]
        found = (held if code else held[:1]) or [_read(fenced[0][1], whole=True)]
        if found == [None] and not _attempted(fenced[0][1]):
            return "no_call"
    else:
        found = [_read(answer, whole=False)]
        if found == [None]:
            begin = next(_calls_in_text(answer), None)
            if begin is None:
                return "not_json" if _attempted(answer) else "no_call"
            found = [_read(answer[begin:], whole=False)]
    if None in found:
        return "not_json"
    return [call for calls in found for call in calls] or "no_call"


def _without_reasoning(text: str) -> str:
    """The text without parts of reasoning, also where the prompt has opened the first one; blocks of calls stay."""
    head, closed, rest = text.partition("</think>")
    if closed and "<think>" not in head and not head.lstrip().startswith(("<tool_call>", "{", "[")):
        text = rest
    return _REASONING.sub(lambda found: found["kept"] or "", text)


def _attempted(text: str) -> bool:
    """Whether a text that cannot be read looks like an attempt at a call."""
    return text.lstrip().startswith(("[", "{")) or bool(_PYTHON_CALL.match(text.lstrip()))


def _calls_in_text(text: str) -> Iterator[int]:
    """Where a JSON object with a name and arguments begins in a text, or the list that holds it."""
    for match in _OBJECT.finditer(text):
        try:
            value = _JSON.raw_decode(text, match.start("object"))[0]
        except (ValueError, RecursionError):
            continue
        inner = value.get("function") if isinstance(value.get("function"), dict) else value
        if isinstance(inner.get("name"), str) and ("arguments" in inner or "parameters" in inner):
            yield match.start()


def _read(block: str, *, whole: bool) -> list[Call] | None:
    """The calls at the beginning of a block, or None; with `whole`, nothing else may stand in it."""
    block = block.strip()
    if whole and (fenced := _FENCE.fullmatch(block)):
        block = fenced["code"]
    try:
        if _JSON_BEGINS.match(block):
            return _json_calls(block, whole=whole)
        if found := _tagged_calls(block):
            return found
        if named := _NAMED.match(block):
            return _named_calls(block, named)
        if _PYTHON_CALL.match(block):
            return _python_calls(block, whole=whole)
    except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, RecursionError, MemoryError):
        pass
    return None


def _json_calls(block: str, *, whole: bool) -> list[Call]:
    """JSON values one after another, with spaces, commas or semicolons between."""
    calls: list[Call] = []
    place = 0
    while place < len(block) and block[place] in ("{" if place and not whole else "{["):
        value, end = _JSON.raw_decode(block, place)
        calls += [Call(**chats.plain_call(item)) for item in (value if isinstance(value, list) else [value])]
        place = _BETWEEN.match(block, end).end()
    if place < len(block) and (whole or block[place] in "}]"):
        raise InputError("more than calls")
    return calls


def _tagged_calls(block: str) -> list[Call]:
    """Calls as Qwen 3 Coder writes them: a function's tag around one for each parameter, or around JSON."""
    calls = []
    for name, inner in _FUNCTION.findall(block):
        parameters = {key: _value(text) for key, text in _PARAMETER.findall(inner)}
        calls.append(Call(name, parameters or (json.loads(inner) if inner.strip() else {})))
    return calls


def _value(text: str) -> Any:
    """A parameter's value between tags, where a text has no quotation marks."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value


def _named_calls(block: str, named: re.Match) -> list[Call]:
    """`name{...}` or `name[ARGS]{...}`, as Mistral writes it."""
    arguments, end = _JSON.raw_decode(block, named.end())
    if _ENDS.sub("", block[end:]).strip() or not isinstance(arguments, dict):
        raise InputError("more than a call")
    return [Call(named["name"], arguments)]


def _python_calls(block: str, *, whole: bool) -> list[Call]:
    """Calls in a list, on several lines, or in `print(...)`; without `whole`, text may follow them."""
    for part in [block] if whole else dict.fromkeys([block, block.split("\n\n")[0], block.split("\n")[0]]):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a stray backslash in a model's string is not this program's warning
                statements = ast.parse(part).body
        except SyntaxError:
            continue
        values = [statement.value for statement in statements if isinstance(statement, ast.Expr)]
        if len(values) < len(statements):
            raise InputError("statements beside calls")
        several = (ast.List, ast.Tuple)
        nodes = [node for value in values for node in (value.elts if isinstance(value, several) else [value])]
        return [_python_call(node) for node in nodes]
    raise InputError("no Python calls")


def _python_call(node: ast.expr) -> Call:
    match node:
        case ast.Call(func=ast.Name(id="print"), args=[ast.Call() as inner], keywords=[]):
            node = inner  # Gemma prints what it calls
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise InputError("not a call with keyword arguments only")
    arguments = {}
    for keyword in node.keywords:
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:  # a variable or an expression: its source text, as the reference does
            arguments[keyword.arg] = ast.unparse(keyword.value)
    return Call(ast.unparse(node.func), arguments)


def check_calls(case: Case, calls: list[Call] | str) -> Verdict:
    """Judge the result of `parse_calls`; in the irrelevance categories an answer is right when it calls nothing."""
    if case.category.endswith("irrelevance"):
        if isinstance(calls, str):
            return Verdict(True, "not_json" if calls == "not_json" else "")
        return Verdict(False, "unwanted_call", calls[0].name) if calls else Verdict(True)
    if isinstance(calls, str):
        return Verdict(False, calls)
    if len(calls) != len(case.expected):
        return Verdict(False, "wrong_count", f"{len(calls)} for {len(case.expected)}")
    remaining = list(calls)
    for expected in case.expected:  # it takes the first remaining call that satisfies it
        verdicts = [_check_call(case.functions, expected, call) for call in remaining]
        hit = next((i for i, verdict in enumerate(verdicts) if verdict.correct), None)
        if hit is None:  # the error of a call to the right function says more than "another function"
            return next((v for v in verdicts if v.error != "wrong_function"), verdicts[0])
        del remaining[hit]
    return Verdict(True)


def _check_call(functions: list[dict], expected: dict[str, dict], call: Call) -> Verdict:
    (name, accepted), *_ = expected.items()
    if call.name != name:
        return Verdict(False, "wrong_function", f"{call.name} for {name}")
    function = next(f for f in functions if f["name"] == name)
    declared = function.get("parameters", {"properties": {}})
    if COMPOSED & declared.keys() or not isinstance(declared.get("properties", {}), dict):
        if error := _schema_error(function, call.arguments):
            return error
        declared = {"additionalProperties": True}
    open_ended = declared.get("additionalProperties", "properties" not in declared)
    for argument in declared.get("required", []):
        if argument not in call.arguments:
            return Verdict(False, "missing_argument", argument)
    for argument, value in call.arguments.items():
        if argument not in accepted or (argument not in declared.get("properties", {}) and open_ended is False):
            return Verdict(False, "extra_argument", argument)
        if error := _argument_error(function, argument, value, accepted[argument]):
            return Verdict(False, error, f"{argument}={value!r}")
    for argument, values in accepted.items():
        if argument not in call.arguments and "" not in values:
            return Verdict(False, "missing_argument", argument)
    return Verdict(True)


def _schema_error(function: dict, arguments: dict) -> Verdict | None:
    """What is wrong with arguments whose schema is composed of others, by JSON Schema's rules."""
    found = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(to_json_schema(function)).iter_errors(arguments)
    )
    kinds = {"required": "missing_argument", "additionalProperties": "extra_argument"}
    return found and Verdict(False, kinds.get(found.validator, "wrong_type"), found.message)


def _argument_error(function: dict, argument: str, value: Any, accepted: list) -> str:
    """`wrong_type`, `wrong_value` or "" for one argument."""
    declared = function.get("parameters", {}).get("properties", {}).get(argument)
    if not _is_plain(declared):
        return _composed_error(function, argument, value, accepted)
    kind = declared["type"]
    if kind == "tuple" and isinstance(value, tuple):
        value = list(value)
    if kind in ("float", "number") and type(value) is int:  # not bool
        value = float(value)
    wanted, shown = PYTHON_TYPES[kind], _type_of_first(accepted)
    inner = PYTHON_TYPES[declared["items"].get("type", "any")] if wanted is list and "items" in declared else None
    if type(value) is not wanted:
        return ("" if value in accepted else "wrong_value") if type(value) is shown else "wrong_type"
    if inner and not any(  # one accepted list vouches for the elements' type; what is no list does not restrict it
        not isinstance(answer, list) or all(type(item) in (inner, _type_of_first(answer)) for item in value)
        for answer in accepted
    ):
        return "wrong_type"
    if shown not in (None, wanted):  # the accepted values are of another type: compare as they are
        return "" if value in accepted else "wrong_value"
    return "" if _value_fits(value, accepted, inner) else "wrong_value"


def _is_plain(declared: Any) -> bool:
    """Whether the leaderboard's rules say what a value's type is: one name of a type, and one of its items'."""
    if not isinstance(declared, dict) or COMPOSED & declared.keys():
        return False
    named = isinstance(declared.get("type"), str) and declared["type"] in PYTHON_TYPES
    return named and ("items" not in declared or _is_plain(declared["items"]))


def _composed_error(function: dict, argument: str, value: Any, accepted: list) -> str:
    """As `_argument_error`, for a schema beyond the leaderboard's dialect: its type is checked as JSON Schema says."""
    schema = to_json_schema(function)
    own = schema.get("properties", {}).get(argument, schema.get("additionalProperties", True))
    if not jsonschema.Draft202012Validator(schema).evolve(schema=own).is_valid(value):
        return "wrong_type"
    inner = dict if isinstance(value, list) and value and all(isinstance(item, dict) for item in value) else None
    alike = [answer for answer in accepted if isinstance(answer, bool) == isinstance(value, bool)]
    return "" if _value_fits(value, alike, inner) else "wrong_value"


def _type_of_first(accepted: list) -> type | None:
    return next((type(answer) for answer in accepted if answer != ""), None)


def _value_fits(value: Any, accepted: list, inner: type | None) -> bool:
    if isinstance(value, dict):
        return any(_dict_fits(value, answer) for answer in accepted)
    if inner is dict:  # in this order; "" stands for the empty list
        lists = [answer for answer in accepted if isinstance(answer, list | str) and len(answer) == len(value)]
        return any(all(map(_dict_fits, value, answer)) for answer in lists)
    if isinstance(value, list):
        return _normal_items(value) in [_normal_items(answer) for answer in accepted if isinstance(answer, list | str)]
    if isinstance(value, str):
        return _normal(value) in [_normal(answer) for answer in accepted if isinstance(answer, str)]
    return value in accepted


def _dict_fits(value: Any, answer: Any) -> bool:
    """Every key is accepted with its value, and no key that must be there is missing."""
    if not isinstance(value, dict) or not isinstance(answer, dict):
        return False
    keys_fit = all(key in answer and _normal(item) in _normal_items(answer[key]) for key, item in value.items())
    return keys_fit and all(key in value or "" in options for key, options in answer.items())


def _normal(value: Any) -> Any:
    return value.translate(_IGNORED_IN_STRINGS).lower() if isinstance(value, str) else value


def _normal_items(values: Iterable) -> list:
    return [_normal(value) for value in values]
