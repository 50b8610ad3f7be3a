"""The loop of an agent: plan, call, read, correct, stop.

1. The system message holds the tools, the rules and what memory knows about the task. With `plan` the model first says
   in a few words what it will do, which stays in the chat.
2. Each step is one answer within the grammar of the tools: a call that can be read, or a text, which is the answer. A
   call is checked and run (`toolkit.perform`); its result, or why there is none, is what the model reads next. The
   tool `answer` ends the task: a small model that was told to reply in calls only finds no other way to stop.
3. A call that was made before is not run again: the model is told its result, and after `repeats` of them, or when
   steps or seconds are used up, it is asked for its answer from the results alone. The outcome says which limit it was.
4. Nothing that a tool returns is an instruction: results stand in messages of the role `tool`, and which tools there
   are, and whether one may write, is decided by the caller, never by a text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from avalab.agent.memory import Memory, Session
from avalab.agent.speaker import Cost, Speaker
from avalab.agent.toolkit import Confirm, Tool, never, perform, schema
from avalab.data import toolbox
from avalab.data.calls import Call
from avalab.lab.errors import InputError
from avalab.lab.run import time_now
from avalab.serve.tools import shown_call

RULES = (
    "Work on the user's task with the functions, one call at a time. Read each result before the next call. As soon as "
    "you know the answer, call the function answer."
)

ALONE = "Answer the user's request in one short sentence."

PLAN = "Before you begin: in at most 30 words, which functions will you call, and in which order?"

NEXT = "If these results answer the task, call the function answer. If something is missing, make the next call."

LAST = "Answer the user's request in one short sentence, from the results of the functions that were called for it."

FINISH = Tool("answer", "Give the user the final answer.", schema(text=("string", "one sentence")), str)

PLAN_TOKENS, CALL_TOKENS, LAST_TOKENS = 48, 200, 64

ENDS = ("answered", "steps", "repeats", "time", "tokens", "context")


@dataclass(frozen=True)
class Limits:
    """When an agent stops, whatever it has."""

    steps: int = 8
    repeats: int = 1
    seconds: float = 300.0
    tokens: int = 1500  # decoded

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise InputError(f"the limit {name} has to be positive, got {value}")


@dataclass(frozen=True)
class Step:
    """A call and what came of it; a call that cannot be read has none, and its text."""

    said: str
    call: Call | None
    result: str
    failed: bool
    seconds: float


@dataclass
class Outcome:
    """How a task ended: one of ENDS, the answer, the steps, what they cost."""

    task: str
    status: str = ""
    answer: str = ""
    plan: str = ""
    steps: list[Step] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0


def work_on(
    task: str,
    tools: Sequence[Tool],
    speaker: Speaker,
    *,
    limits: Limits = Limits(),
    memory: Memory | None = None,
    plan: bool = False,
    confirm: Confirm = never,
    say: Callable[[str], object] = lambda line: None,
) -> Outcome:
    """Work on a task until it is answered or a limit is reached; each step is shown through `say`.

    Raises InputError for an empty task, tools of one name, or a task that has no room in the model's context.
    """
    if not task.strip():
        raise InputError("the task is empty; say what is to be done, as in 'How many days until 2027-01-01?'")
    tools = [*tools, FINISH] if tools else []
    if twice := {tool.name for tool in tools if [t.name for t in tools].count(tool.name) > 1}:
        raise InputError(f"two tools are called {', '.join(sorted(twice))}; leave one out")
    began, before = time.perf_counter(), speaker.cost.copy()
    done = Outcome(task)
    chat = opening(task, tools, memory)
    if plan:
        done.plan = speaker.say([*chat, {"role": "user", "content": PLAN}], most=PLAN_TOKENS).text.strip()
        say(f"plan: {done.plan}")
        chat[-1] = {"role": "user", "content": f"{task}\n\nPlan: {done.plan}"}
    results: dict[str, str] = {}
    repeated = 0
    while not done.status:
        done.status = _reached(limits, done, repeated, time.perf_counter() - began, speaker.cost.since(before))
        asked = _fitting(chat, speaker) if done.steps else chat
        if done.steps and not done.status and speaker.room(asked, CALL_TOKENS) < 0:
            done.status = "context"  # the last step alone fills it
        if done.status:
            done.answer = speaker.say(closing(done), most=LAST_TOKENS).text.strip()
            break
        found = speaker.say(asked, most=CALL_TOKENS, functions=[tool.described for tool in tools] or None)
        chat.append({"role": "assistant", "content": found.text})
        calls = speaker.calls(found.text)
        if calls == "no_call" or not tools:
            done.status, done.answer = "answered", found.text.strip()
            break
        if not isinstance(calls, str) and calls[0].name == FINISH.name:
            done.status, done.answer = "answered", str(calls[0].arguments.get("text", ""))
            break
        step = _step(found.text, calls, tools, results, confirm)
        repeated += step.result.startswith(KNOWN)
        done.steps.append(step)
        say(shown(step))
        name = step.call.name if step.call else "unreadable"
        content = json.dumps({"error": step.result}, ensure_ascii=False) if step.failed else step.result
        chat.append({"role": "tool", "name": name, "content": content})
    say(f"{done.status}: {done.answer}")
    done.cost, done.seconds = speaker.cost.since(before), time.perf_counter() - began
    if memory:
        memory.write_session(
            Session(time_now(), speaker.name, task, done.status, done.answer, transcript(done, speaker.name))
        )
    return done


def closing(done: Outcome) -> list[dict]:
    """The request for an answer from what is there; the functions are not described again, so that none is called."""
    told = [s for s in done.steps if s.call and not s.failed and not s.result.startswith(KNOWN)]
    results = "\n".join(f"{shown_call(s.call)} gave {s.result}" for s in told) or "nothing"
    asked = f"{done.task}\n\nResults of the functions:\n{results}"
    return [{"role": "system", "content": LAST}, {"role": "user", "content": asked}]


def _fitting(chat: list[dict], speaker: Speaker) -> list[dict]:
    """The chat and what is asked after each step, without its oldest steps where the context is full."""
    task, steps, asked = chat[:2], chat[2:], [{"role": "user", "content": NEXT}]
    while len(steps) > 2 and speaker.room([*task, *steps, *asked], CALL_TOKENS) < 0:
        steps = steps[2:]
    return [*task, *steps, *asked]


KNOWN = "This call was made before. Its result: "


def opening(task: str, tools: Sequence[Tool], memory: Memory | None) -> list[dict]:
    """The system message and the task."""
    system = f"{toolbox.system_prompt([tool.described for tool in tools])}\n\n{RULES}" if tools else ALONE
    if memory and (facts := memory.facts(task)):
        system += "\n\nKnown from earlier sessions:\n" + "\n".join(f"- {fact}" for fact in facts)
    return [{"role": "system", "content": system}, {"role": "user", "content": task}]


def _step(said: str, calls: list[Call] | str, tools: Sequence[Tool], results: dict[str, str], confirm: Confirm) -> Step:
    """Run the first call of an answer, unless it was run before."""
    began = time.perf_counter()
    if isinstance(calls, str):
        return Step(said, None, "this call cannot be read; write one call in the form above", True, 0.0)
    call = calls[0]
    key = shown_call(call)
    if key in results:
        return Step(said, call, f"{KNOWN}{results[key]} Use it, or make another call.", False, 0.0)
    result = perform(tools, call, confirm=confirm)
    results[key] = result.text
    return Step(said, call, result.text, result.failed, time.perf_counter() - began)


def _reached(limits: Limits, done: Outcome, repeated: int, seconds: float, cost: Cost) -> str:
    """The limit that is used up, or ""."""
    used = {
        "steps": len(done.steps) >= limits.steps,
        "repeats": repeated >= limits.repeats,
        "time": seconds >= limits.seconds,
        "tokens": cost.new_tokens >= limits.tokens,
    }
    return next((name for name, is_used in used.items() if is_used), "")


def shown(step: Step) -> str:
    """A step in two lines."""
    call = shown_call(step.call) if step.call else f"(unreadable) {step.said}"
    return f"  -> {call}\n  <- {'failed: ' if step.failed else ''}{step.result}"


def transcript(done: Outcome, model: str) -> str:
    """A task as Markdown that a person reads."""
    lines = [f"# {done.task}", "", f"{model}; ended: {done.status}", ""]
    if done.plan:
        lines += [f"**Plan.** {done.plan}", ""]
    for number, step in enumerate(done.steps, start=1):
        call = f"`{shown_call(step.call)}`" if step.call else f"a call that cannot be read: `{step.said}`"
        lines += [f"{number}. {call}", f"   {'failed: ' if step.failed else ''}{' '.join(step.result.split())}"]
    return "\n".join([*lines, "", f"**Answer.** {done.answer}", ""])
