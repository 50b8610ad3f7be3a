"""Chats: normalised once, where they are read, and rendered into a prompt's text on one road.

1. `json_lines` reads a file, `normalised` turns an example of the lab's form or of OpenAI's (chat completions,
   fine-tuning files) into the lab's: `kind`, `tools` (bare descriptions), `messages` (role and text) and `calls`.
   An answer's calls become text, `<tool_call>[...]</tool_call>`, because that is what the system message asks for;
   reasoning becomes a `<think>` part before the answer. What cannot be kept is refused.
2. The tools reach a model in one way, whatever its template could do with them: `prefaced` puts the lab's own text at
   the beginning of the system message. Training, evaluation and chat then see the same prompt.
3. `prompt_text` and `chat_text` render a chat through the tokenizer's template. What the template cannot show is put
   where it can: a system message at the beginning of the first request, results of tools and turns of one role in a
   row into one request. What a template can show is found out by trying (`Template`), never by its name; what was put
   elsewhere is said once. A model without a template gets ChatML, if its vocabulary has it, or plain text.

Source: OpenAI, "Chat completions" and "Supervised fine-tuning" (message formats); Hugging Face, "Chat templates".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from avalab.data import toolbox
from avalab.lab.errors import InputError

ROLES = {
    **{"system": "system", "developer": "system", "user": "user", "assistant": "assistant"},
    **{"tool": "tool", "function": "tool"},
}

SETTINGS = {  # of templates that have them: no reasoning before the answer, and no prompt that changes with the day
    "enable_thinking": False,
    "date_string": "26 Jul 2024",
    "strftime_now": lambda _: "26 Jul 2024",
}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PLAIN = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{{ (eos_token or '') if m['role'] == 'assistant' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


# --- reading ---------------------------------------------------------------------------------------------------------


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file, each after its place (`file:line`); blank lines and byte-order marks are passed over.

    Raises ValueError naming what cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold other line ends
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        stripped = line.strip("\ufeff \t\r")
        if not stripped:
            continue
        try:
            yield f"{path}:{number}", json.loads(stripped)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            raise InputError(f"{path}:{number}: not JSON ({error})") from error


def normalised(example: Any) -> dict:
    """An example as the lab reads it; equal to its argument for one that is in this form already.

    Raises ValueError, without the place, for what cannot be kept: a message without text, an unknown role, an image.
    """
    if not isinstance(example, dict):
        raise InputError(f"no object with the field messages, but {_shown(example)}")
    _refuse_unwritable(example)
    if not isinstance(given := example.get("messages"), list) or len(given) < 2:
        raise InputError("no field messages that is a list of a request and an answer")
    kept = {key: value for key, value in example.items() if key != "functions"}
    tools = _described_tools(example.get("tools", example.get("functions")))
    messages = normal_messages(given)
    calls = _own_calls(example["calls"]) if "calls" in example else _message_calls(given[-1])
    if calls and not messages[-1]["content"]:
        messages[-1]["content"] = toolbox.call_text(calls)
    if empty := [i for i, m in enumerate(messages, start=1) if m["role"] == "assistant" and not m["content"].strip()]:
        raise InputError(f"message {empty[0]} (assistant) has neither content nor calls")
    kind = example.get("kind", "chat")
    if not isinstance(kind, str) or not kind:
        raise InputError(f"kind is {_shown(kind)}; it is a word such as chat")
    return {**kept, "kind": kind, "tools": tools, "messages": messages, "calls": calls}


def normal_messages(messages: Sequence[Any]) -> list[dict]:
    """Messages with role and text: several system messages at the beginning are one, results in their calls' order."""
    found: list[dict] = []
    named: dict[str, tuple[int, str]] = {}  # id of a call -> its place and function
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(f"message {number}: unknown role {_shown(role)}; choose one of {', '.join(ROLES)}")
        try:
            made = _message(message, ROLES[role])
        except InputError as error:
            raise InputError(f"message {number} ({role}): {error}") from error
        if made["role"] == "system" and found:
            if any(other["role"] != "system" for other in found):
                raise InputError(f"message {number} ({role}): a system message after the chat has begun; put it first")
            found[0]["content"] += "\n\n" + made["content"]
            continue
        for call in message.get("tool_calls") or ():
            if isinstance(call, dict) and isinstance(call.get("id"), str):
                named[call["id"]] = (len(named), plain_call(call)["name"])
        place, function = named.get(message.get("tool_call_id"), (None, ""))
        if function:
            made.setdefault("name", function)
        found.append(made | ({} if place is None else {"place": place}))
    return _in_call_order(found)


def _message(message: dict, role: str) -> dict:
    text, calls = _text(message.get("content")), _message_calls(message)
    if message.get("weight") == 0:
        raise InputError("weight 0 is not supported, every answer is learned; cut the chat before this message")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if role != "assistant":
        if text is None:
            raise InputError("no content")
        if calls:
            raise InputError("calls are an assistant's")
        name = {"name": message["name"]} if role == "tool" and isinstance(message.get("name"), str) else {}
        return {"role": role, **name, "content": text}
    if text is None and not calls and "content" not in message:
        raise InputError("no content")
    text = text or ""
    if isinstance(reasoning, str) and reasoning.strip():
        text = f"<think>\n{reasoning.strip()}\n</think>\n\n{text}"
    if calls:
        text = text.rstrip() + ("\n" if text.strip() else "") + toolbox.call_text(calls)
    return {"role": role, "content": text}


def _text(content: Any) -> str | None:
    """The text of a message's content; parts of text are joined by line ends."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"content is {_shown(content)}; it is text, null or a list of parts")
    found = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise InputError(f"a part of the content is {_shown(kind if kind != 'text' else part)}; only text is kept")
        found.append(text)
    return "\n".join(found)


def _in_call_order(messages: list[dict]) -> list[dict]:
    """Results of calls that were made together, in the order of the calls, whatever order they came in."""
    found: list[dict] = []
    waiting: list[dict] = []
    for message in [*messages, {"role": "", "content": ""}]:
        if message["role"] == "tool":
            waiting.append(message)
            continue
        if all("place" in result for result in waiting):
            waiting.sort(key=lambda result: result["place"])
        found += [{key: value for key, value in each.items() if key != "place"} for each in (*waiting, message)]
        waiting = []
    return found[:-1]


def last_request(messages: Sequence[dict]) -> str:
    """What the user said last: in a dialogue results of tools follow it."""
    return next(message["content"] for message in reversed(messages) if message["role"] == "user")


def _described_tools(tools: Any) -> list[dict]:
    if isinstance(tools, str):  # a column of a table holds them as JSON
        try:
            tools = json.loads(tools) if tools.strip() else []
        except ValueError as error:
            raise InputError(f"no field tools that is a list: text that is not JSON ({error})") from error
    if tools is not None and not isinstance(tools, list):
        raise InputError("no field tools that is a list")
    found = [described_tool(tool) for tool in tools or ()]
    names = [tool["name"] for tool in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"the tool {twice[0]!r} stands twice")
    return found


def described_tool(tool: Any) -> dict:
    """A function's description, out of OpenAI's `{"type": "function", "function": {...}}` where it stands in one."""
    inner = tool.get("function") if isinstance(tool, dict) and isinstance(tool.get("function"), dict) else tool
    if isinstance(tool, dict) and inner is tool and tool.get("type", "function") != "function":
        raise InputError(f"a tool of the type {_shown(tool['type'])}; only functions are kept")
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise InputError(f"no field name in an item of tools: {_shown(tool)}")
    bare = {key: value for key, value in inner.items() if key != "type"}
    if bare.get("parameters") is None:  # none is an empty list
        bare["parameters"] = {"type": "object", "properties": {}}
    if not isinstance(bare["parameters"], dict):
        raise InputError(f"tool {bare['name']!r}: parameters are {_shown(bare['parameters'])}; they are a JSON schema")
    return bare


def _own_calls(calls: Any) -> list[dict]:
    if not isinstance(calls, list):
        raise InputError("no field calls that is a list")
    for call in calls:
        inner = call.get("function") if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
        if lacks := [name for name in ("name", "arguments") if not isinstance(inner, dict) or name not in inner]:
            raise InputError(f"no field {', '.join(lacks)} in an item of calls")
    return [plain_call(call) for call in calls]


def _message_calls(message: Any) -> list[dict]:
    """The calls of an assistant's message in OpenAI's form, today's or that with `function_call`."""
    if not isinstance(message, dict):
        return []
    given = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if not isinstance(given, list):
        raise InputError(f"tool_calls are {_shown(given)}; they are a list")
    return [plain_call(call) for call in given]


def plain_call(call: Any) -> dict:
    """`{"name", "arguments"}` of a call: wrapped or bare, its arguments (or `parameters`) an object or JSON text."""
    inner = call.get("function") if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or not name:
        raise InputError(f"not a call with a name: {_shown(call)}")
    arguments = inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise InputError(f"the arguments of {name!r} are text that is not JSON: {_shown(arguments)}") from error
    if arguments is not None and not isinstance(arguments, dict):
        raise InputError(f"the arguments of {name!r} are {_shown(arguments)}; they are an object")
    return {"name": name, "arguments": arguments or {}}


def _refuse_unwritable(value: Any) -> None:
    """Raise ValueError for what no file and no tokenizer can hold: half a surrogate pair, NaN."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise InputError(f"{half!a} is half a surrogate pair and no text; write the whole character") from error
    except ValueError as error:
        raise InputError("NaN or an infinite number; JSON has none, write null or text") from error


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# --- rendering -------------------------------------------------------------------------------------------------------


def prefaced(messages: Sequence[dict], preface: str) -> list[dict]:
    """The chat with this text first in its system message, before what it says itself; unchanged where it is so."""
    own = [message["content"] for message in messages if message["role"] == "system"]
    if own and (own[0] == preface or own[0].startswith(preface + "\n\n")):
        return list(messages)
    system = {"role": "system", "content": "\n\n".join([preface, *own])}
    return [system, *(message for message in messages if message["role"] != "system")]


def without_preface(messages: Sequence[dict], preface: str) -> list[dict]:
    """The chat before `prefaced`: with its own system message, or none."""
    first, *others = messages
    if first["role"] != "system" or not (first["content"] + "\n\n").startswith(preface + "\n\n"):
        return list(messages)
    own = first["content"][len(preface) + 2 :]
    return [*([{**first, "content": own}] if own else []), *others]


@dataclass(frozen=True)
class Template:
    """A chat template in jinja, whose it is, and what it shows: found out by trying."""

    name: str
    text: str
    system: bool = True  # a system message, at the same place however long the chat grows
    results: bool = True  # messages of the role tool
    repeats: bool = True  # two messages of one role in a row
    parts: bool = False  # content is a list of parts, not text


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict]) -> str:
    """The text of a chat up to where its next answer begins. Raises ValueError where the template refuses it."""
    return _rendered(tokenizer, messages, prompt=True)


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict]) -> str:
    """The text of a whole chat. Raises ValueError where the template refuses it."""
    return _rendered(tokenizer, messages, prompt=False)


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template: of several the one named `default`, of none the lab's substitute (said once).

    Raises ValueError for several without a default.
    """
    given = tokenizer.chat_template
    if isinstance(given, dict):
        if chosen := given.get("default") or (next(iter(given.values())) if len(given) == 1 else None):
            return chosen
        raise InputError(f"{_name(tokenizer)} has chat templates {', '.join(given)} and none is named default")
    if given:
        return given
    chatml = {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.get_vocab())
    form = "ChatML, whose tokens it has" if chatml else "plain text, `user: ...`"
    _say(f"{_name(tokenizer)} has no chat template; chats are written as {form}")
    return CHATML if chatml else PLAIN


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that chats are rendered with. Raises ValueError for one that shows no request at all."""
    return _tried(tokenizer, template_text(tokenizer))


@lru_cache(maxsize=8)
def _tried(tokenizer: PreTrainedTokenizerBase, text: str) -> Template:
    name = _name(tokenizer)
    for parts in (False, True):
        template = Template(name, text, parts=parts)
        try:
            shown = _shows(tokenizer, template, ("user", "assistant", "user"))
        except InputError:
            if parts:
                raise
            continue
        if shown:
            break
    else:
        raise InputError(f"the chat template of {name} does not show what a user says")
    dialogue = ("user", "assistant", "user", "assistant", "user")
    return Template(
        name,
        text,
        system=_can(tokenizer, template, ("system", *dialogue)) and _grows(tokenizer, template),
        results=_can(tokenizer, template, ("user", "assistant", "tool", "assistant", "user")),
        repeats=_can(tokenizer, template, ("user", "user", "assistant", "user", "user")),
        parts=parts,
    )


def _can(tokenizer: PreTrainedTokenizerBase, template: Template, roles: tuple[str, ...]) -> bool:
    try:
        return _shows(tokenizer, template, roles)
    except InputError:
        return False


def _shows(tokenizer: PreTrainedTokenizerBase, template: Template, roles: tuple[str, ...]) -> bool:
    """Whether a chat of these roles is rendered with all that is said in it."""
    chat = [{"role": role, "content": f"({number} {role})"} for number, role in enumerate(roles)]
    text = _apply(tokenizer, template, chat, prompt=True)
    return all(message["content"] in text for message in chat)


def _grows(tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    """Whether a system message stays where it was when the chat goes on (some templates move it to the last turn)."""
    chat = [{"role": role, "content": f"({role})"} for role in ("system", "user", "assistant", "user")]
    short, long = (_apply(tokenizer, template, part, prompt=True) for part in (chat[:2], chat))
    return long.startswith(short[: short.index("(user)")])


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], *, prompt: bool) -> str:
    if not messages:
        raise InputError("a chat without any message; give at least a request")
    template = template_of(tokenizer)
    text = _apply(tokenizer, template, shown_messages(template, messages), prompt=prompt)
    _refuse_unwritable(text)
    return text


def shown_messages(template: Template, messages: Sequence[dict]) -> list[dict]:
    """The messages with what the template cannot show put where it can; what was moved is said once."""
    shown = [dict(message) for message in messages]
    if not template.system and shown[0]["role"] == "system":
        _say(f"the chat template of {template.name} holds no system message; its text begins the first request")
        system, *rest = shown
        if rest and rest[0]["role"] == "user":
            shown = [{"role": "user", "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]
        else:
            shown = [{"role": "user", "content": system["content"]}, *rest]
    if not template.results and any(message["role"] == "tool" for message in shown):
        _say(f"the chat template of {template.name} shows no results of tools; they are written as requests")
        wrap = "<tool_response>\n{}\n</tool_response>".format
        shown = [
            {"role": "user", "content": wrap(message["content"])} if message["role"] == "tool" else message
            for message in shown
        ]
    if template.repeats:
        return shown
    joined: list[dict] = []
    for message in shown:  # answers are never joined: each is learned by itself
        if joined and message["role"] == joined[-1]["role"] == "user":
            joined[-1] = {"role": "user", "content": f"{joined[-1]['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    return joined


def _apply(tokenizer: PreTrainedTokenizerBase, template: Template, messages: list[dict], *, prompt: bool) -> str:
    if template.parts:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template.text, tokenize=False, add_generation_prompt=prompt, **SETTINGS
        )
    except _TEMPLATE_ERRORS as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"the chat template of {template.name} refuses a chat of {roles}: {said}") from error


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return Path(tokenizer.name_or_path or "this model").name


@cache
def _say(line: str) -> None:
    print(f"avalab: {line}", file=sys.stderr)
