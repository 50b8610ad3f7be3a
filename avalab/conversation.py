"""A chat in the terminal with an artefact that really calls its tools, and shows what it calls.

A turn: the tools stand in the system message; the artefact answers the request greedily, in free form or under the
grammar of the tools (a call or a plain text); calls in the answer are checked against the tool's schema and executed;
results go back as messages of the role `tool`, if the chat template shows such messages, and the artefact goes on,
until it answers without a call, repeats itself, or has answered `ROUNDS` times. The oldest turns are left out when the
context is full.

A tool is a row of data: name, description, JSON schema of its arguments, and a callable `module:function` of the
standard library that stands on the list of pure ones in `gates`. There is no way to name other code. Each call runs in
a process of its own in the `sandbox`, because pure is not quick: `math.factorial(10**9)` is ended by the time limit.

What it does not do: sampling, tools with an effect, or telling the model what a template without a `tool` role hides.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, TextStreamer

from avalab import calls, gates, grammars, sandbox, toolbox
from avalab.calls import Call
from avalab.evaluate import Respondent

MODES = ("free", "grammar")
FIELDS = ("name", "description", "parameters", "callable")
BUILT_IN = ("math", "statistics", "calendar")  # modules of the toolbox's tools that are on offer without a file
ROUNDS, MAX_CALLS = 4, 4  # answers in a turn, calls in an answer
ANSWER_TOKENS, DEFAULT_CONTEXT = 256, 2048
SECONDS, MEMORY_BYTES = 5.0, 256 << 20  # of one call
SHOWN_CHARACTERS = 1000  # of a result
QUIT = "/quit"

# What the sandbox runs. Many built-in functions take their arguments by place only: then in the schema's order.
PROGRAM = """
import importlib, inspect, json
module, name, arguments = json.loads({request!r})
function = getattr(importlib.import_module(module), name)
try:
    by_name = inspect.signature(function).bind(**arguments)
except (TypeError, ValueError):
    by_name = None
result = function(**arguments) if by_name else function(*arguments.values())
print(json.dumps(result, default=str, ensure_ascii=False))
"""
Answer = Callable[[list[dict]], str]  # chat messages in, the artefact's text out
Read, Say = Callable[[str], str], Callable[[str], object]


@dataclass(frozen=True)
class Tool:
    """A function on offer; `callable` is `module:function` and whitelisted."""

    name: str
    description: str
    parameters: dict
    callable: str

    @property
    def described(self) -> dict:
        """What the model sees."""
        return {"name": self.name, "description": self.description, "parameters": self.parameters}


@dataclass(frozen=True)
class Result:
    """What a call gave: the value as JSON, or with `failed` the reason there is none."""

    text: str
    failed: bool = False


# ------------------------------------------------------------------------------------------------------------ tools


def built_in() -> list[Tool]:
    """The toolbox's tools of a few pure modules."""
    offered = [tool for tool in toolbox.tools() if tool["name"].rpartition(".")[0] in BUILT_IN]
    return [Tool(**tool, callable=":".join(tool["name"].rsplit(".", 1))) for tool in offered]


def read_tools(path: Path | str) -> list[Tool]:
    """The tools of a file: a JSON list of objects with the FIELDS.

    Raises ValueError naming the file, and the tool that lacks a field, has an invalid schema or another one's name, or
    whose callable is not whitelisted.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no list of tools; each is an object with {', '.join(FIELDS)}")
    tools: dict[str, Tool] = {}
    for number, row in enumerate(rows, start=1):
        try:
            tool = _tool(row)
            if tools.setdefault(tool.name, tool) is not tool:
                raise ValueError(f"the name {tool.name!r} stands twice")
        except ValueError as error:
            raise ValueError(f"{path}, tool {number}: {error}") from error
    return list(tools.values())


def _tool(row: object) -> Tool:
    if not isinstance(row, dict) or set(row) != set(FIELDS):
        raise ValueError(f"a tool has {', '.join(FIELDS)}; this is {json.dumps(row)[:80]}")
    if not all(isinstance(row[field], str) for field in ("name", "description", "callable")):
        raise ValueError("name, description and callable are text")
    gates.checked_schema(row)
    resolve(row["callable"])
    return Tool(**row)


def resolve(name: str) -> Callable:
    """The function of `module:function`. Raises ValueError for one that is not on the list of pure ones."""
    module, _, function = name.partition(":")
    if not function.isidentifier() or function.startswith("_") or not gates.is_pure(f"{module}.{function}"):
        modules = ", ".join(sorted(gates.PURE_MODULES))
        raise ValueError(f"callable {name!r} is none of the lab's pure functions (module:function, of {modules})")
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise ValueError(f"callable {name!r}: {module} has no such function")
    return found


def execute(tools: Sequence[Tool], call: Call, *, seconds: float = SECONDS) -> Result:
    """Check a call against its tool's schema and run it in the sandbox, for at most `seconds`."""
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        return Result(f"there is no function {call.name!r}", failed=True)
    resolve(tool.callable)  # also of a tool that no file was read for
    schema = gates.checked_schema(tool.described)
    wrong = jsonschema.Draft202012Validator(schema).iter_errors(call.arguments)
    if error := jsonschema.exceptions.best_match(wrong):
        return Result(error.message, failed=True)
    places = [name for name in schema.get("properties", {}) if name in call.arguments]
    ordered = {name: call.arguments[name] for name in dict.fromkeys([*places, *call.arguments])}
    request = json.dumps([*tool.callable.split(":"), ordered])
    outcome = sandbox.run(PROGRAM.format(request=request), seconds=seconds, memory_bytes=MEMORY_BYTES)
    return _result(outcome, seconds)


def _result(outcome: sandbox.Outcome, seconds: float) -> Result:
    text = outcome.stdout.strip()
    if outcome.status == "finished":
        return Result(text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "...")
    said = (outcome.stderr.strip().splitlines() or ["it ended early"])[-1]
    ends = {"error": said, "timeout": f"no result within {seconds:g} s", "memory": "it needs too much memory"}
    return Result(ends.get(outcome.status, "the process was ended"), failed=True)


# ------------------------------------------------------------------------------------------------------------- turns


def opening(tools: Sequence[Tool]) -> list[dict]:
    """The beginning of every chat: the system message with the tools."""
    return [{"role": "system", "content": toolbox.system_prompt([tool.described for tool in tools])}]


def respond(
    request: str, history: list[dict], tools: Sequence[Tool], answer: Answer, *, say: Say = print, returned: bool = True
) -> list[dict]:
    """One turn; returns the chat so far: `history`, the request, the answers and, if `returned`, the results.

    Each call and its result is shown through `say`. Without `returned` the artefact cannot go on after a call.
    """
    chat = [*history, {"role": "user", "content": request}]
    seen: list[list[Call]] = []
    for _ in range(ROUNDS):
        chat.append({"role": "assistant", "content": answer(chat)})
        found = calls.parse_calls(chat[-1]["content"])
        if found == "not_json":
            say("(this call cannot be read)")
        if isinstance(found, str) or found in seen:
            break
        seen.append(found)
        results = [_run(tools, call, say) for call in found]
        if not returned:
            break
        chat += [_message(call, result) for call, result in zip(found, results, strict=True)]
    return chat


def _run(tools: Sequence[Tool], call: Call, say: Say) -> Result:
    say(f"  -> {shown(call)}")
    result = execute(tools, call)
    say(f"  <- {'failed: ' if result.failed else ''}{result.text}")
    return result


def _message(call: Call, result: Result) -> dict:
    content = json.dumps({"error": result.text}, ensure_ascii=False) if result.failed else result.text
    return {"role": "tool", "name": call.name, "content": content}


def shown(call: Call) -> str:
    """`math.comb(n=5, k=2)`."""
    arguments = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    return f"{call.name}({arguments})"


def fitted(chat: list[dict], length: Callable[[list[dict]], int], most: int) -> list[dict]:
    """The chat without its oldest turns, so that `length` (in tokens) is at most `most`; the system message stays.

    Raises ValueError when the last turn alone is too long.
    """
    starts = [i for i, message in enumerate(chat) if message["role"] == "user"]
    for start in starts:
        kept = [*chat[: starts[0]], *chat[start:]]
        if length(kept) <= most:
            return kept
    raise ValueError(f"the tools and this request take {length(kept):,} tokens; the model has room for {most:,}")


def shows_results(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template lets the model see a message of the role `tool`."""
    chat = [{"role": role, "content": f"4711 {role}"} for role in ("user", "assistant", "tool")]
    try:
        return "4711 tool" in tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError):  # a template may refuse a role it does not know
        return False


# -------------------------------------------------------------------------------------------------------------- chat


def answerer(
    respondent: Respondent, tools: Sequence[Tool], mode: str, *, stream: bool = True, new_tokens: int = ANSWER_TOKENS
) -> Answer:
    """A function from a chat to the artefact's greedy answer, written to the terminal as it comes with `stream`.

    Raises ValueError for an unknown mode; the function, when a request has no place in the model's context.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    tokenizer, model, stops = respondent.tokenizer, respondent.model, grammars.stop_tokens(respondent.tokenizer)
    room = getattr(model.config, "max_position_embeddings", DEFAULT_CONTEXT) - new_tokens
    offered = [tool.described for tool in tools]
    grammar = grammars.call_grammar(respondent.compiler, offered, max_calls=MAX_CALLS) if mode == "grammar" else None

    def tokens(chat: list[dict]) -> list[int]:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids

    def answer(chat: list[dict]) -> str:
        ids = torch.tensor([tokens(fitted(chat, lambda part: len(tokens(part)), room))], device=model.device)
        how = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": stops, "pad_token_id": stops[0]}
        how["logits_processor"] = [grammars.constrain([grammar])] if grammar else []
        how["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        new = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True)

    return answer


def converse(
    respondent: Respondent, tools: Sequence[Tool], *, mode: str = "grammar", read: Read = input, say: Say = print
) -> list[dict]:
    """Chat until `/quit`, the end of input (Ctrl-D) or an interrupt (Ctrl-C); returns the chat."""
    answer = answerer(respondent, tools, mode)
    returned = shows_results(respondent.tokenizer)
    say(f"{respondent.artifact.name} with {', '.join(tool.name for tool in tools)}. {QUIT} or Ctrl-D ends.")
    chat = opening(tools)
    try:
        while (request := read("> ").strip()) != QUIT:
            try:
                chat = respond(request, chat, tools, answer, say=say, returned=returned) if request else chat
            except ValueError as error:  # of this request only, such as one that is too long
                say(f"({error})")
    except (EOFError, KeyboardInterrupt):
        say("")  # the shell's prompt gets a line of its own
    return chat
