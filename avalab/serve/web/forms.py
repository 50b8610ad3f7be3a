"""OpenAI's requests and answers: what is asked is checked and becomes a job, what was computed becomes their form.

Of the lab's own: `priority` (0 to 10), `agent` (whose order of models is learnt), `cache` (exact, near or off),
`window` (none, sliding_window or compress) with `window_tokens` and `overlap`. A temperature that is left out is 0.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from avalab.data import calls, chats, toolbox
from avalab.lab import schemas
from avalab.lab.errors import InputError
from avalab.serve.policy import windows

CACHES = ("exact", "near", "off")

MOST_CALLS, MOST_DEPTH, MOST_TOOLS, MOST_ANSWERS = 4, 64, 128, 8

NUMBERS = {  # name: (kind, least, most)
    "max_tokens": (int, 1, 1_000_000),
    "max_completion_tokens": (int, 1, 1_000_000),
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "frequency_penalty": (float, -2, 2),
    "presence_penalty": (float, -2, 2),
    "seed": (int, -(2**63), 2**63 - 1),
    "n": (int, 1, MOST_ANSWERS),
    "top_logprobs": (int, 0, 20),
    "priority": (float, 0, 10),
    "window_tokens": (int, 16, 1_000_000),
    "overlap": (int, 0, 1_000_000),
}

UNKNOWN = ("logit_bias", "audio", "modalities", "prediction", "functions", "function_call", "suffix", "best_of")


@dataclass(frozen=True)
class Asked:
    """A request that has been checked: the job of a worker, and how it is to be answered."""

    model: str
    job: dict
    is_chat: bool
    stream: bool = False
    with_usage: bool = False
    answers: int = 1
    priority: float = 5.0
    agent: str = ""
    cache: str = "exact"
    has_tools: bool = False

    @property
    def said(self) -> str:
        """The text of the prompt, as far as it can be told before a template writes it."""
        if "messages" in self.job:
            return "\n".join(f"{message['role']}: {message['content']}" for message in self.job["messages"])
        prompt = self.job["prompt"]
        return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def read_body(raw: bytes) -> dict:
    """The JSON object of a request's body. Raises InputError for what is none, or is nested too deeply."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"the body is no JSON: {reason}") from None
    if not isinstance(body, dict):
        raise InputError(f"the body is a {type(body).__name__}; it is an object")
    if _depth(body) > MOST_DEPTH:
        raise InputError(f"the body is nested deeper than {MOST_DEPTH} levels")
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise InputError(f"the body holds what no text or JSON can hold (half a character, NaN): {error}") from None
    return body


def _depth(value: Any) -> int:
    """Levels of a value; counted to one more than is allowed."""
    level, values = 0, [value]
    while values and level <= MOST_DEPTH:
        level += 1
        values = [
            each
            for item in values
            if isinstance(item, dict | list)
            for each in (item.values() if isinstance(item, dict) else item)
        ]
    return level


def read_chat(body: dict) -> Asked:
    """A request to /v1/chat/completions. Raises InputError naming the field."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise InputError("messages is missing; it is a list of at least one message with role and content")
    messages = chats.normal_messages(given)
    tools, choice = _tools(body.get("tools")), body.get("tool_choice")
    functions, refusal = _offered(tools, choice)
    form = body.get("response_format")
    wanted = _schema(form)
    if functions and wanted:
        raise InputError("response_format and tools exclude each other; leave one out, or set tool_choice to none")
    job: dict[str, Any] = {"messages": messages}
    if functions:
        job["messages"] = chats.prefaced(messages, toolbox.system_prompt(functions))
        most = 1 if body.get("parallel_tool_calls") is False else MOST_CALLS
        job["grammar"] = {"kind": "calls", "functions": functions, "refusal": refusal, "max_calls": most}
    elif wanted:
        job["grammar"] = {"kind": "json", "schema": wanted}
    if body.get("logprobs"):
        job["logprobs"] = body.get("top_logprobs") or 0
    elif body.get("top_logprobs") is not None:
        raise InputError("top_logprobs needs logprobs to be true")
    asked = _common(body, job, is_chat=True)
    return _windowed(asked, body)


def read_completion(body: dict) -> Asked:
    """A request to /v1/completions. Raises InputError naming the field."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    tokens = isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt)
    if not (isinstance(prompt, str) or tokens):
        raise InputError("prompt is missing; it is a text, or a list of token ids")
    job: dict[str, Any] = {"prompt": prompt}
    if body.get("logprobs") is not None:
        if type(body["logprobs"]) is not int or not 0 <= body["logprobs"] <= 20:
            raise InputError(f"logprobs is {body['logprobs']!r}; it is a whole number from 0 to 20")
        job["logprobs"] = body["logprobs"]
    job["max_tokens"] = 16  # OpenAI's own
    if wanted := _schema(body.get("response_format")):
        job["grammar"] = {"kind": "json", "schema": wanted}
    return _common(body, job, is_chat=False)


def _common(body: dict, job: dict, *, is_chat: bool) -> Asked:
    numbers = {name: _number(body, name) for name in NUMBERS if body.get(name) is not None}
    if unknown := [name for name in UNKNOWN if body.get(name)]:
        raise InputError(f"{unknown[0]} is not supported; leave it out")
    if not isinstance(body.get("model"), str):
        raise InputError("model is missing; /v1/models lists what there is")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(each, str) and each for each in stop):
        raise InputError("stop is a text, or a list of at most 4 texts")
    cache = body.get("cache", "exact")
    if cache not in CACHES:
        raise InputError(f"cache is {cache!r}; choose one of {', '.join(CACHES)}")
    for name in ("stream", "logprobs", "parallel_tool_calls", "echo"):
        if is_chat and not isinstance(body.get(name), bool | None):
            raise InputError(f"{name} is {body[name]!r}; it is true or false")
    tokens = numbers.get("max_completion_tokens", numbers.get("max_tokens"))
    sampling = ("temperature", "top_p", "seed", "frequency_penalty", "presence_penalty")
    job |= {name: numbers[name] for name in sampling if name in numbers} | {"stop": stop}
    if tokens:
        job["max_tokens"] = tokens
    options = body.get("stream_options") or {}
    return Asked(
        model=body["model"],
        job=job,
        is_chat=is_chat,
        stream=bool(body.get("stream")),
        with_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        answers=numbers.get("n", 1),
        priority=float(numbers.get("priority", 5.0)),
        agent=str(body.get("agent") or body.get("user") or ""),
        cache=cache,
        has_tools=job.get("grammar", {}).get("kind") == "calls",
    )


def _number(body: dict, name: str) -> float:
    kind, least, most = NUMBERS[name]
    value = body[name]
    right = type(value) is int if kind is int else type(value) in (int, float)
    if not right or not least <= value <= most:
        raise InputError(f"{name} is {_shown(value)}; it is a number from {least} to {most}")
    return value


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _tools(given: Any) -> list[dict]:
    if given is None:
        return []
    if not isinstance(given, list) or len(given) > MOST_TOOLS:
        raise InputError(f"tools is a list of at most {MOST_TOOLS} functions")
    found = [chats.described_tool(tool) for tool in given]
    for tool in found:
        try:
            schemas.refuse_loops(schemas.to_json_schema(tool))
        except (InputError, RecursionError) as error:
            raise InputError(f"tool {tool['name']!r}: {error}") from None
    if len({tool["name"] for tool in found}) < len(found):
        raise InputError("two tools have the same name")
    return found


def _offered(tools: list[dict], choice: Any) -> tuple[list[dict], bool]:
    """The functions that may be called, and whether a text without a call will do."""
    if choice in (None, "auto", "required"):
        if choice == "required" and not tools:
            raise InputError("tool_choice is required, and there are no tools")
        return tools, choice != "required"
    if choice == "none":
        return [], True
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    named = [tool for tool in tools if tool["name"] == name]
    if not named:
        raise InputError(f"tool_choice is {_shown(choice)}; it is none, auto, required, or the name of a tool")
    return named, False


def _schema(form: Any) -> dict | None:
    """The schema of `response_format`; None for free text."""
    kind = form.get("type") if isinstance(form, dict) else form
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"type": "object"}
    inner = form.get("json_schema") if isinstance(form, dict) else None
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict):
        raise InputError("response_format is text, json_object, or json_schema with a schema in it")
    if schema.get("type") != "object":
        return schema
    translated = schemas.to_json_schema({"name": "answer", "parameters": schema})
    schemas.refuse_loops(translated)
    return translated


def _windowed(asked: Asked, body: dict) -> Asked:
    """The request with its messages in as many tokens as it asks for."""
    if (mode := body.get("window")) is None:
        return asked
    target = body.get("window_tokens")
    if not target or mode not in windows.MODES:
        raise InputError(f"window is {mode!r}; it is one of {', '.join(windows.MODES)}, beside window_tokens")
    asked.job["messages"] = windows.fitted(asked.job["messages"], target, overlap=body.get("overlap") or 0, mode=mode)
    return asked


# --- answers ---------------------------------------------------------------------------------------------------------


def error_body(message: str, *, kind: str = "invalid_request_error", code: str | None = None) -> dict:
    """An error in OpenAI's form."""
    code = code or ("context_length_exceeded" if "context_length_exceeded" in message else None)
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def usage_of(ends: Sequence[dict]) -> dict:
    """Tokens of one request's answers."""
    prompt, made = ends[0]["prompt_tokens"], sum(end["completion_tokens"] for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": ends[0].get("cached_tokens", 0)},
    }


def new_id(is_chat: bool) -> str:
    """An identity that no other answer has."""
    return ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12)


def envelope(asked: Asked, name: str, *, stream: bool) -> dict:
    """What stands around every answer and piece of one."""
    kind = ("chat.completion.chunk" if stream else "chat.completion") if asked.is_chat else "text_completion"
    return {"id": name, "object": kind, "created": int(time.time()), "model": asked.model}


def choice_of(asked: Asked, index: int, text: str, end: dict, logprobs: list[dict]) -> dict:
    """A whole answer: its text, or the calls in it."""
    told = _told_logprobs(asked, logprobs)
    if not asked.is_chat:
        return {"index": index, "text": text, "logprobs": told, "finish_reason": end["finish_reason"]}
    found = called(text, end["finish_reason"]) if asked.has_tools else []
    message: dict[str, Any] = {"role": "assistant", "content": None if found else text, "refusal": None}
    if found:
        message["tool_calls"] = found
    reason = "tool_calls" if found else end["finish_reason"]
    return {"index": index, "message": message, "logprobs": told, "finish_reason": reason}


def called(text: str, reason: str) -> list[dict]:
    """The calls in an answer that came to its end, in OpenAI's form."""
    found = calls.parse_calls(text) if reason == "stop" else "no_call"
    if isinstance(found, str):
        return []
    return [
        {
            "id": f"call_{secrets.token_hex(8)}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in found
    ]


def _told_logprobs(asked: Asked, rows: list[dict]) -> dict | None:
    if asked.job.get("logprobs") is None:
        return None
    top = asked.job["logprobs"]
    shown = [{**_bare(row), "top_logprobs": [_bare(o) for o in row.get("top_logprobs", ())][:top]} for row in rows]
    if asked.is_chat:
        return {"content": shown, "refusal": None}
    offsets, at = [], 0
    for row in shown:
        offsets.append(at)
        at += len(row["token"])
    return {
        "tokens": [row["token"] for row in shown],
        "token_logprobs": [row["logprob"] for row in shown],
        "top_logprobs": [{other["token"]: other["logprob"] for other in row["top_logprobs"]} for row in shown],
        "text_offset": offsets,
    }


def _bare(row: dict) -> dict:
    return {"token": row["token"], "logprob": row["logprob"], "bytes": row.get("bytes")}


def delta_of(asked: Asked, index: int, text: str, logprobs: list[dict] | None, *, first: bool) -> dict:
    """A piece of an answer's text."""
    told = _told_logprobs(asked, logprobs) if logprobs else None
    if not asked.is_chat:
        return {"index": index, "text": text, "logprobs": told, "finish_reason": None}
    delta = {"role": "assistant", "content": text} if first else {"content": text}
    return {"index": index, "delta": delta, "logprobs": told, "finish_reason": None}


def last_delta(asked: Asked, index: int, found: list[dict], reason: str) -> dict:
    """The piece that ends an answer; calls are told in it whole."""
    if not asked.is_chat:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}
    delta = {"tool_calls": [{"index": at, **call} for at, call in enumerate(found)]} if found else {}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": "tool_calls" if found else reason}
