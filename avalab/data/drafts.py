"""Drafts of examples, one function a kind, and dialogues joined from examples.

A draft takes two generators: `content` draws the tools and arguments, `wording` the sentences. The same content with
another wording is the same task said differently, which is how a rejected example is refined without a teacher. An
example is `{"kind", "tools", "messages" (user, assistant), "calls"}`; `made_for` is the tool that a call is to,
`domain.name` however it is dressed; `checks` are computed results that the text states. Nothing here has passed a gate.

A single example spends three hundred tokens, most of them on its tools, and asks once whether a function fits.
`dialogues` list tools once and ask several times, at forty tokens a refusal and seventy a call, about tools that have
nothing to do with each other (`_unlike`) or that a careless reader would confuse (`_family`). No turn refers to an
earlier one, and the first, which is what a caller meets, is a refusal as often as any.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from random import Random

from avalab.data import phrasing
from avalab.data.arguments import kind_of, lines_of, say_value
from avalab.data.phrasing import Dress
from avalab.data.toolbox import Tool, call_text, system_prompt
from avalab.lab.errors import InputError

VAGUE = {  # stems that say nothing about what a tool does
    *("find", "retur", "compu", "list", "searc", "with", "from", "whole", "numbe", "somet", "somew", "into", "that"),
    *("what", "some", "many", "much", "long"),
}

DRESS = frozenset(  # stems that only dress a tool (`phrasing.Dress`)
    word[:5].lower() for verbs, openings in phrasing.VERBS.values() for word in " ".join((*verbs, *openings)).split()
)


def single_call(content: Random, wording: Random) -> dict:
    """One function on offer, one call."""
    return _called("single_call", content, wording, others=0)


def several_candidates(content: Random, wording: Random) -> dict:
    """Two to four functions on offer, one of them called."""
    return _called("several_candidates", content, wording, others=content.choice((1, 1, 2, 2, 3)))


def parallel_calls(content: Random, wording: Random) -> dict:
    """Two or three calls in one request: of one function with other arguments, or of different functions."""
    first = content.choice(phrasing.tools())
    count = content.choice((2, 2, 2, 3))
    chosen = [first] * count if content.random() < 0.6 else [first, *_others(first, 1, content)]
    dresses = {tool.name: phrasing.dressed(tool, content) for tool in dict.fromkeys(chosen)}
    drawn = [(tool, phrasing.sample(tool, content)) for tool in chosen]
    listed = list(dict.fromkeys([*chosen, *(_others(first, 1, content) if content.random() < 0.3 else [])]))
    parts = [phrasing.core(tool, arguments, wording) for tool, arguments in drawn]
    calls = [_call(tool, arguments, dresses[tool.name]) for tool, arguments in drawn]
    tools = [phrasing.describe(t, dresses.get(t.name) or phrasing.dressed(t, content)) for t in listed]
    content.shuffle(tools)
    frames = {frame for frame, _ in parts}
    if len(frames) == 1 and frames != {"whole"} and wording.random() < 0.6:
        link = wording.choice((", and ", "; also ", ", and then ", ", plus "))
        request = phrasing.phrase(frames.pop(), link.join(text for _, text in parts), wording)
    else:
        sentences = [phrasing.phrase(frame, text, wording) for frame, text in parts]
        request = wording.choice((" ", " Also: ", " And one more: ", " Besides, ")).join(sentences)
    return _example("parallel_calls", tools, request, call_text(calls), calls)


def no_function(content: Random, wording: Random) -> dict:
    """The functions on offer do something else: the answer is a refusal in plain text."""
    wanted = content.choice(phrasing.tools())
    listed = [t for t in _others(wanted, content.choice((1, 1, 2, 3)), content) if not _alike(t, wanted)]
    listed = listed or [t for t in phrasing.tools() if not _alike(t, wanted)][:1]
    request = _request(wanted, phrasing.sample(wanted, content), wording)
    if wording.random() < 0.2:
        request = wording.choice(lines_of("unrelated.txt"))
    tools = [phrasing.describe(tool, phrasing.dressed(tool, content)) for tool in listed]
    offered = " ".join(tool["description"] for tool in tools)
    refusal = wording.choice(lines_of("refusals.txt")).replace("{}", offered)
    return _example("no_function", tools, request, refusal, [])


def missing_argument(content: Random, wording: Random) -> dict:
    """A required argument is not said: the answer asks for it."""
    tool = content.choice([tool for tool in phrasing.tools() if phrasing.droppable(tool)])
    sentence, missing = content.choice(phrasing.droppable(tool))
    arguments = {k: v for k, v in phrasing.sample(tool, content).items() if k != missing}
    request = _request(tool, arguments, wording, sentence)
    question = wording.choice(lines_of("ask_back.txt")).replace("{}", missing.replace("_", " "))
    offered = phrasing.describe(tool, phrasing.dressed(tool, content))
    return _example("missing_argument", [offered], request, question, [])


def structured_output(content: Random, wording: Random) -> dict:
    """A message becomes a JSON object that satisfies a schema."""
    tool = content.choice([tool for tool in phrasing.tools() if len(tool.parameters) > 1])
    arguments, dress = phrasing.sample(tool, content), phrasing.dressed(tool, content)
    message = _request(tool, arguments, wording)
    request = wording.choice(lines_of("extract.txt")).replace("{}", message)
    call = _call(tool, arguments, dress)
    answer = json.dumps(call["arguments"], ensure_ascii=False)
    return _example("structured_output", [phrasing.describe(tool, dress)], request, answer, [call])


def reasoning(content: Random, wording: Random) -> dict:
    """Steps, then the answer: a call whose arguments are derived one by one, or an arithmetic result."""
    style = wording.choice(lines_of("think.txt"))
    if content.random() < 0.4:
        question, steps, answer, check = content.choice((_euclid, _mean, _multiple))(content)
        reply = f"{' '.join(steps)} Answer: {answer}"
        return _example("reasoning", [], f"{question} {style}", reply, []) | {"checks": [check]}
    example = _called("reasoning", content, wording, others=content.choice((1, 2)))
    request, answer = (message["content"] for message in example["messages"])
    (call,) = example["calls"]
    described = next(tool for tool in example["tools"] if tool["name"] == call["name"])
    said = [f"{name} is {json.dumps(value, ensure_ascii=False)}" for name, value in call["arguments"].items()]
    steps = f"{call['name']} fits: {described['description']} From the request, {', '.join(said)}."
    if left_out := [p for p in described["parameters"]["properties"] if p not in call["arguments"]]:
        steps += f" Nothing is said about {', '.join(left_out)}, so the default holds."
    return _example("reasoning", example["tools"], f"{request} {style}", f"{steps}\n{answer}", [call])


def instruction(content: Random, wording: Random) -> dict:
    """An instruction and its answer, both computed: about the standard library, or on a list of words or numbers."""
    question, answer = content.choice((_about, _which, _sort_words, _statistic, _select, _as_json))(content, wording)
    return _example("instruction", [], question, answer, [])


def _called(kind: str, content: Random, wording: Random, *, others: int) -> dict:
    tool = content.choice(phrasing.tools())
    arguments, dress = phrasing.sample(tool, content), phrasing.dressed(tool, content)
    tools = [phrasing.describe(t, phrasing.dressed(t, content)) for t in _others(tool, others, content)]
    tools.insert(content.randint(0, len(tools)), phrasing.describe(tool, dress))
    call = _call(tool, arguments, dress)
    example = _example(kind, tools, _request(tool, arguments, wording), call_text([call]), [call])
    return example | {"made_for": f"{tool.domain}.{tool.name}"}


def _request(tool: Tool, arguments: dict, wording: Random, sentence: str = "") -> str:
    return phrasing.phrase(*phrasing.core(tool, arguments, wording, sentence), wording)


def _others(tool: Tool, count: int, rng: Random) -> list[Tool]:
    """Distractors, three of four from the same domain, where a careless reader would take them for the tool."""
    everything = [t for t in phrasing.tools() if t is not tool and (t.domain == tool.domain or not _alike(t, tool))]
    near = [other for other in everything if other.domain == tool.domain] or everything
    return list(dict.fromkeys(rng.choice(near if rng.random() < 0.75 else everything) for _ in range(count)))


@cache
def stems(name: str, description: str) -> frozenset[str]:
    """What a tool is about: the first five letters of its words, without those that say nothing."""
    words = re.findall(r"[a-z]{4,}", f"{name} {description}".replace("_", " ").lower())
    return frozenset(word[:5] for word in words) - VAGUE


def _alike(one: Tool, other: Tool) -> bool:
    """Whether two tools may do the same: a word of name or description is shared, by its first five letters."""
    return bool(stems(one.name, one.description) & stems(other.name, other.description))


def _call(tool: Tool, arguments: dict, dress: Dress) -> dict:
    return {"name": phrasing.name_of(tool, dress), "arguments": phrasing.passed(tool, arguments, dress)}


def _example(kind: str, tools: list[dict], request: str, answer: str, calls: list[dict]) -> dict:
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return {"kind": kind, "tools": tools, "messages": messages, "calls": calls}


def _euclid(rng: Random) -> tuple[str, list[str], str, dict]:
    a, b = rng.randint(20, 400), rng.randint(20, 400)
    x, y, steps = max(a, b), min(a, b), []
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}.")
        x, y = y, x % y
    check = {"name": "math.gcd", "arguments": {"a": a, "b": b}, "result": repr(x)}
    return f"What is the greatest common divisor of {a} and {b}?", [*steps, "The remainder is 0."], str(x), check


def _mean(rng: Random) -> tuple[str, list[str], str, dict]:
    data = [rng.randint(2, 90) for _ in range(rng.choice((4, 5, 8)))]
    shown, total, result = ", ".join(map(str, data)), sum(data), statistics.mean(data)
    steps = [f"The sum of {shown} is {total}.", f"There are {len(data)} numbers.", f"{total} / {len(data)} = {result}."]
    check = {"name": "statistics.mean", "arguments": {"data": data}, "result": repr(result)}
    return f"What is the average of {shown}?", steps, str(result), check


def _multiple(rng: Random) -> tuple[str, list[str], str, dict]:
    a, b = rng.randint(4, 90), rng.randint(4, 90)
    divisor, result = math.gcd(a, b), math.lcm(a, b)
    steps = [f"The greatest common divisor of {a} and {b} is {divisor}.", f"{a} * {b} = {a * b}."]
    check = {"name": "math.lcm", "arguments": {"a": a, "b": b}, "result": repr(result)}
    question = f"Two lamps blink every {a} and every {b} seconds. When do they blink together again?"
    return question, [*steps, f"{a * b} / {divisor} = {result}."], f"after {result} seconds", check


def _asked(question: str, wording: Random) -> str:
    """One way to ask a question, with slots for what it is about."""
    lines = [line.partition(": ") for line in lines_of("questions.txt")]
    return wording.choice([text for name, _, text in lines if name == question])


def _about(content: Random, wording: Random) -> tuple[str, str]:
    tool = content.choice([tool for tool in phrasing.tools() if tool.in_library])
    needs = ", ".join(f"`{p.name}`" for p in tool.parameters)
    return _asked("about", wording).format(tool.name), f"{tool.description} It takes {needs}."


def _which(content: Random, wording: Random) -> tuple[str, str]:
    tool = content.choice([tool for tool in phrasing.tools() if tool.in_library])
    return _asked("which", wording).format(tool.description), f"`{tool.name}` does that."


def _sort_words(content: Random, wording: Random) -> tuple[str, str]:
    words = kind_of("[word]").sample(content)
    return _asked("sort", wording).format(say_value(words, wording)), ", ".join(sorted(words))


def _statistic(content: Random, wording: Random) -> tuple[str, str]:
    data = [content.randint(1, 90) for _ in range(content.choice((3, 5, 7)))]
    name, function = content.choice((("largest", max), ("smallest", min), ("middle", statistics.median)))
    return _asked("statistic", wording).format(
        name, say_value(data, wording)
    ), f"The {name} number is {function(data)}."


def _select(content: Random, wording: Random) -> tuple[str, str]:
    data, limit = [content.randint(1, 90) for _ in range(6)], content.randint(20, 60)
    kept = [str(n) for n in data if n > limit]
    return _asked("select", wording).format(say_value(data, wording), limit), ", ".join(kept) or "None of them."


def _as_json(content: Random, wording: Random) -> tuple[str, str]:
    record = {"name": kind_of("person").sample(content), "city": kind_of("city").sample(content)}
    return _asked("json", wording).format(**record), json.dumps(record)


KINDS: dict[str, tuple[Callable[[Random, Random], dict], float]] = {  # the draft and its share
    "single_call": (single_call, 0.30),
    "several_candidates": (several_candidates, 0.27),
    "parallel_calls": (parallel_calls, 0.12),
    "no_function": (no_function, 0.13),
    "missing_argument": (missing_argument, 0.06),
    "structured_output": (structured_output, 0.05),
    "reasoning": (reasoning, 0.04),
    "instruction": (instruction, 0.03),
}


# --- dialogues -------------------------------------------------------------------------------------------------------


def dialogues(
    examples: Sequence[dict], count: int, seed: int, *, refusals: int = 3, most: int = 3, families: float = 0.5
) -> list[dict]:
    """`count` dialogues of one to `most` calls and `refusals` refusals each; `families` is the share about one domain.

    Raises ValueError where fewer than two of the examples are single calls.
    """
    pool = [example for example in examples if example["kind"] == "single_call"]
    if len(pool) < 2:
        raise InputError(f"{len(pool)} of {len(examples)} examples are single calls; a dialogue needs two or more")
    by_domain: dict[str, dict[str, list[dict]]] = {}
    for example in pool:
        domain, _, tool = example.get("made_for", "").partition(".")
        if tool:
            by_domain.setdefault(domain, {}).setdefault(tool, []).append(example)
    related = [tools for _, tools in sorted(by_domain.items()) if len(tools) > 1]
    rng, made = Random(f"dialogues-{seed}"), []
    for _ in range(count):
        if related and rng.random() < families:
            parts = _family(rng.choice(related), rng, most=most, refusals=refusals)
        else:
            parts = _unlike(pool, rng, calls=rng.randint(1, most), refusals=refusals)
        made.append(_dialogue(*parts, rng))
    return made


def _dialogue(listed: list[dict], called: list[dict], refused: list[dict], rng: Random) -> dict:
    tools = [tool for example in listed for tool in example["tools"]]
    rng.shuffle(tools)
    turns = [example["messages"][-2:] for example in called]
    plain = [line for line in lines_of("refusals.txt") if "{}" not in line]
    turns += [[e["messages"][-2], {"role": "assistant", "content": rng.choice(plain)}] for e in refused]
    rng.shuffle(turns)
    system = {"role": "system", "content": system_prompt(tools)}
    messages = [system, *(message for turn in turns for message in turn)]
    calls = [call for example in called for call in example["calls"]]
    return {"kind": "dialogue", "tools": tools, "messages": messages, "calls": calls, "source": "dialogues"}


def _unlike(pool: list[dict], rng: Random, *, calls: int, refusals: int) -> tuple[list, list, list]:
    """(listed, called, refused) examples whose tools have no word in common: what was made for one fits no other."""
    unlike: list[dict] = []
    for example in rng.sample(pool, min(len(pool), 8 * (calls + refusals))):
        if not any(_stems_of_tools(example) & _stems_of_tools(other) for other in unlike):
            unlike.append(example)
    return unlike[:calls], unlike[:calls], unlike[calls : calls + refusals]


def _stems_of_tools(example: dict) -> frozenset[str]:
    spaced = [(re.sub(r"(?<=[a-z])(?=[A-Z])|[.]", " ", t["name"]), t["description"]) for t in example["tools"]]
    return frozenset().union(*(stems(*named) for named in spaced)) - DRESS


def _family(family: dict[str, list[dict]], rng: Random, *, most: int, refusals: int) -> tuple[list, list, list]:
    """(listed, called, refused) examples of one domain; the refused ones were made for tools that are not listed."""
    names = rng.sample(sorted(family), len(family))
    count = rng.randint(2, min(4, len(names)))
    listed = [rng.choice(family[name]) for name in names[:count]]
    unlisted = [rng.choice(family[name]) for name in names[count : count + refusals]]
    return listed, listed[: rng.randint(1, min(most, count))], unlisted
