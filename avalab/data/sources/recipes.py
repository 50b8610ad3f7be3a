"""Examples drafted from a catalogue, one function a kind, with the signature of `data.drafts`.

- Tools beside the one that fits are neighbours of its service, which a careless reader would take for it.
- In half of the examples names of functions and parameters are replaced by ones that say nothing (`masked`), so that a
  model has to read descriptions.
- No function fits in a third of the examples: neighbours of the wanted tool are on offer (near) or tools of another
  service (far).
- A task that the source does not say in a sentence is written as its title and its values, which a teacher turns into
  a request (`synthesize`); without one it stays as it is.
- Dialogues show what a tool returned, cut down to the values that later calls pass on and a few beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from random import Random

from avalab.data import sources
from avalab.data.arguments import lines_of, say_value
from avalab.data.sources.catalogue import Catalogue, Step, Task, leaves, sayable, slim, snake_case
from avalab.data.toolbox import call_text
from avalab.lab.errors import InputError

MASKED = 0.5  # share of the examples

MOST_STEPS = 3  # calls of a dialogue

SHOWN = 6  # values of a result

LINKS = (" Also: ", " And then: ", " Besides, ", " One more thing: ")

Draft = Callable[[Random, Random], dict]


def single_call(name: str, content: Random, wording: Random) -> dict:
    """One function on offer, one call."""
    return _called(name, "single_call", content, wording, others=0)


def several_candidates(name: str, content: Random, wording: Random) -> dict:
    """Two to four functions of a service on offer, one of them called."""
    return _called(name, "several_candidates", content, wording, others=content.choice((1, 2, 2, 3)))


def parallel_calls(name: str, content: Random, wording: Random) -> dict:
    """Two tasks of a service in one request."""
    catalogue = _catalogue(name)
    service = content.choice(sorted(s for s, tasks in _by_service(name).items() if len(tasks) > 1))
    tasks = content.sample(_by_service(name)[service], 2)
    request = wording.choice(LINKS).join(request_of(task, wording) for task in tasks)
    steps = [task.steps[0] for task in tasks]
    tools = _offered(catalogue, service, steps, content, others=content.choice((0, 1)))
    return _example(name, "parallel_calls", tools, request, steps, content)


def no_function(name: str, content: Random, wording: Random) -> dict:
    """Nothing on offer does it: near misses of the same service, or tools of another one."""
    catalogue, task = _catalogue(name), _task(name, content)
    wanted, count = task.steps[0].tool, content.choice((1, 2, 3))
    far = [service for service in sorted(catalogue.tools) if service != task.service]
    near = [t for n, t in sorted(catalogue.tools[task.service].items()) if n != wanted and not alike(n, wanted)]
    if (content.random() < 0.5 and near) or not far:
        listed = content.sample(near, min(count, len(near)))
    else:
        tools = catalogue.tools[content.choice(far)]
        listed = [tools[n] for n in content.sample(sorted(tools), min(count, len(tools)))]
    offered = " ".join(tool["description"] for tool in listed[:2])
    refusal = wording.choice(lines_of("refusals.txt")).replace("{}", offered)
    tools, _ = _perhaps_masked([slim(tool) for tool in listed], [], content)
    return _made(name, "no_function", tools, [_user(task, wording), _assistant(refusal)], [])


def missing_argument(name: str, content: Random, wording: Random) -> dict:
    """A required argument is not said: the answer asks for it. Raises ValueError where no task has one."""
    catalogue = _catalogue(name)
    for _ in range(200):
        task = _task(name, content)
        step = task.steps[0]
        tool = catalogue.tools[task.service][step.tool]
        needed = [key for key in tool["parameters"]["required"] if key in step.arguments]
        if task.says_all or not needed or len(step.arguments) < 2:
            continue
        missing = content.choice(needed)
        said = {key: value for key, value in step.arguments.items() if key != missing}
        request = request_of(Task(task.service, task.title, (Step(step.tool, said),)), wording)
        if any(str(value).lower() in request.lower() for value in leaves(step.arguments[missing])):
            continue
        question = wording.choice(lines_of("ask_back.txt")).replace("{}", spoken(missing))
        messages = [{"role": "user", "content": request}, _assistant(question)]
        return _made(name, "missing_argument", [slim(tool, step.arguments)], messages, [])
    raise InputError(f"source {name}: no task with a required argument that its title does not say")


def multi_turn(name: str, content: Random, wording: Random) -> dict:
    """The next call of a chain: none, one or two were made before, and what they returned is there to be read."""
    catalogue = _catalogue(name)
    task = content.choice(_chains(name))
    steps = task.steps[: content.randint(1, MOST_STEPS)]
    tools = _offered(catalogue, task.service, steps, content, others=1)
    calls = [{"name": step.tool, "arguments": step.arguments} for step in steps]
    tools, calls = _perhaps_masked(tools, calls, content)
    messages = [_user(task, wording)]
    for place, (step, call) in enumerate(zip(steps, calls, strict=True)):
        messages.append(_assistant(call_text([call])))
        if place < len(steps) - 1:
            later = [value for other in steps[place + 1 :] for value in leaves(other.arguments)]
            messages.append({"role": "tool", "content": json.dumps(shown(step.result, later), ensure_ascii=False)})
    return _made(name, "multi_turn", tools, messages, calls[-1:])


# --- parts ------------------------------------------------------------------------------------------------------------


@cache
def _catalogue(name: str) -> Catalogue:
    return sources.read_catalogue(name)


@cache
def _by_service(name: str) -> dict[str, list[Task]]:
    """The tasks of each service whose first call a person could ask for."""
    found: dict[str, list[Task]] = {}
    for task in _catalogue(name).tasks:
        if sayable(task.steps[0].arguments):
            found.setdefault(task.service, []).append(task)
    return found


@cache
def _chains(name: str) -> list[Task]:
    return [t for t in _catalogue(name).tasks if len(t.steps) > 1 and t.steps[0].result is not None]


def _task(name: str, content: Random) -> Task:
    """A task of a service drawn first: a large service does not drown the small ones."""
    by_service = _by_service(name)
    return content.choice(by_service[content.choice(sorted(by_service))])


def _called(name: str, kind: str, content: Random, wording: Random, *, others: int) -> dict:
    task = _task(name, content)
    tools = _offered(_catalogue(name), task.service, task.steps[:1], content, others=others)
    return _example(name, kind, tools, request_of(task, wording), list(task.steps[:1]), content)


def _offered(catalogue: Catalogue, service: str, steps, content: Random, *, others: int) -> list[dict]:
    """The tools of the steps and `others` neighbours, shuffled, with the parameters that matter."""
    used: dict[str, set[str]] = {}
    for step in steps:
        used.setdefault(step.tool, set()).update(step.arguments)
    tools = catalogue.tools[service]
    near = [n for n in sorted(tools) if n not in used and tools[n]["description"]]
    chosen = [*used, *content.sample(near, min(others, len(near)))]
    listed = [slim(tools[n], used.get(n, ())) for n in chosen]
    content.shuffle(listed)
    return listed


def alike(one: str, other: str) -> bool:
    """Whether two names may be of one job: the same verb, and half of the other words in common."""
    a, b = (re.sub(r"s(?=_|$)", "", name).split("_") for name in (one, other))
    shared, words = set(a[1:]) & set(b[1:]), set(a[1:]) | set(b[1:])
    return a[0] == b[0] and (not words or len(shared) / len(words) >= 0.5)


def request_of(task: Task, wording: Random) -> str:
    """The task's sentence, or its title and values: `Attach a volume to an instance: device /dev/sdf, ...`."""
    if task.says_all:
        return task.title if task.title[-1] in ".?!" else f"{task.title}."
    title = re.sub(r"^To ", "", task.title).rstrip(" .:")
    values = "; ".join(f"{spoken(key)} {said(value, wording)}" for key, value in task.steps[0].arguments.items())
    return f"{title[0].upper()}{title[1:]}: {values}."


def said(value: object, wording: Random) -> str:
    """A value as a person may say it; a text as it stands, since what it names is spelt so."""
    return value if isinstance(value, str) else say_value(value, wording)


def spoken(name: str) -> str:
    """A parameter's name in words: `DBInstanceId` as `db instance id`."""
    return snake_case(name).replace("_", " ")


def masked(tools: list[dict], calls: list[dict], rng: Random) -> tuple[list[dict], list[dict]]:
    """Tools and calls under names that say nothing; what has no description keeps its name."""
    numbers = rng.sample(range(100, 1000), len(tools))
    named = zip(tools, numbers, strict=True)
    names = {tool["name"]: f"function_{n}" if tool["description"] else tool["name"] for tool, n in named}
    renamed = {tool["name"]: _masked_parameters(tool) for tool in tools}
    made = []
    for tool in tools:
        schema, new = tool["parameters"], renamed[tool["name"]]
        properties = {new[key]: value for key, value in schema["properties"].items()}
        required = [new[key] for key in schema.get("required", ())]
        parameters = {**schema, "properties": properties, "required": required}
        made.append({**tool, "name": names[tool["name"]], "parameters": parameters})
    passed = [
        {"name": names[c["name"]], "arguments": {renamed[c["name"]][k]: v for k, v in c["arguments"].items()}}
        for c in calls
    ]
    return made, passed


def _masked_parameters(tool: dict) -> dict[str, str]:
    properties = tool["parameters"]["properties"]
    return {key: f"arg_{i + 1}" if told.get("description") else key for i, (key, told) in enumerate(properties.items())}


def _perhaps_masked(tools: list[dict], calls: list[dict], content: Random) -> tuple[list[dict], list[dict]]:
    return masked(tools, calls, content) if content.random() < MASKED else (tools, calls)


def shown(result: object, later: list) -> object:
    """A result cut down to the scalars that later calls pass on, and the first few, in their order."""
    found = list(_scalars(result))
    wanted = {json.dumps(value) for value in later}
    passed = [pair for pair in found if json.dumps(pair[1]) in wanted]
    kept = dict((passed + [pair for pair in found if pair not in passed])[: max(SHOWN, len(dict(passed)))])
    return {key: value for key, value in found if key in kept and kept[key] == value}


def _scalars(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of every short scalar; those of a list's items are numbered."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _scalars(item, f"{key}.{name}".strip("."))
    elif isinstance(value, list):
        for place, item in enumerate(value[:8]):
            yield from _scalars(item, f"{key}[{place}]")
    elif value is not None and len(str(value)) <= 64:
        yield key, value


def _user(task: Task, wording: Random) -> dict:
    return {"role": "user", "content": request_of(task, wording)}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _example(name: str, kind: str, tools: list[dict], request: str, steps: list[Step], content: Random) -> dict:
    calls = [{"name": step.tool, "arguments": step.arguments} for step in steps]
    tools, calls = _perhaps_masked(tools, calls, content)
    messages = [{"role": "user", "content": request}, _assistant(call_text(calls))]
    return _made(name, kind, tools, messages, calls)


def _made(name: str, kind: str, tools: list[dict], messages: list[dict], calls: list[dict]) -> dict:
    licence = sources.source(name).licence
    says_all = all(task.says_all for task in _catalogue(name).tasks[:1])
    about = {"licence": licence, "says_all": says_all}
    return {"kind": kind, "tools": tools, "messages": messages, "calls": calls, **about}


SHARES: dict[str, tuple[Callable[..., dict], float]] = {
    "single_call": (single_call, 0.14),
    "several_candidates": (several_candidates, 0.26),
    "parallel_calls": (parallel_calls, 0.10),
    "no_function": (no_function, 0.33),
    "missing_argument": (missing_argument, 0.07),
    "multi_turn": (multi_turn, 0.10),
}


@cache
def kinds_of(name: str) -> dict[str, tuple[Draft, float]]:
    """The drafts that a source has material for, and their shares.

    A request that takes several calls gives the next call of a chain only: a neighbour could serve a later one of its
    steps, so that it says nothing of which tool does not fit.
    """
    says_all = all(task.says_all for task in _catalogue(name).tasks)
    lacking = {"multi_turn"} | ({"missing_argument"} if says_all else set())
    kept = {"multi_turn"} if _chains(name) else SHARES.keys() - lacking
    return {kind: (partial(draft, name), share) for kind, (draft, share) in SHARES.items() if kind in kept}
