"""A chat in the terminal with an artefact that really calls its tools, and shows what it calls.

A turn: the tools stand in the system message; the artefact answers the request greedily, in free form or under the
grammar of the tools (a call or a plain text); calls in the answer are executed (`serve.tools`) and shown; results go
back as messages of the role `tool`, which `data.chats` writes so that every model sees them, and the artefact goes on,
until it answers without a call, repeats itself, or has answered `ROUNDS` times. The oldest turns are left out when the
context is full; that, and an answer that is cut off before its end, is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
from transformers import TextStreamer

from avalab.data import calls, chats, grammars, toolbox
from avalab.data.calls import Call
from avalab.lab.errors import InputError
from avalab.measure.answers import Respondent
from avalab.models.stops import padding_token, stop_tokens
from avalab.serve.tools import Tool, execute, shown_call

MODES = ("free", "grammar")

ROUNDS, MAX_CALLS = 4, 4  # answers in a turn, calls in an answer

ANSWER_TOKENS, DEFAULT_CONTEXT = 256, 2048

QUIT = "/quit"

Answer = Callable[[list[dict]], str]  # chat messages in, the artefact's text out

Read, Say = Callable[[str], str], Callable[[str], object]


def opening(tools: Sequence[Tool]) -> list[dict]:
    """The beginning of every chat: the system message with the tools."""
    return [{"role": "system", "content": toolbox.system_prompt([tool.described for tool in tools])}]


def respond(
    request: str, history: list[dict], tools: Sequence[Tool], answer: Answer, *, say: Say = print
) -> list[dict]:
    """One turn; returns the chat so far: `history`, the request, the answers and the results.

    Each call and its result is shown through `say`.
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
        for call in found:
            say(f"  -> {shown_call(call)}")
            result = execute(tools, call)
            say(f"  <- {'failed: ' if result.failed else ''}{result.text}")
            content = json.dumps({"error": result.text}, ensure_ascii=False) if result.failed else result.text
            chat.append({"role": "tool", "name": call.name, "content": content})
    return chat


def fitted(chat: list[dict], length: Callable[[list[dict]], int], most: int) -> list[dict]:
    """The chat without its oldest turns, so that `length` (in tokens) is at most `most`; the system message stays.

    Raises ValueError when the last turn alone is too long.
    """
    starts = [i for i, message in enumerate(chat) if message["role"] == "user"]
    for start in starts:
        kept = [*chat[: starts[0]], *chat[start:]]
        if length(kept) <= most:
            return kept
    raise InputError(f"the tools and this request take {length(kept):,} tokens; the model has room for {most:,}")


def answerer(
    respondent: Respondent,
    tools: Sequence[Tool],
    mode: str,
    *,
    stream: bool = True,
    new_tokens: int = ANSWER_TOKENS,
    say: Say = print,
) -> Answer:
    """A function from a chat to the artefact's greedy answer, written to the terminal as it comes with `stream`.

    An answer has `new_tokens` at most, and half of the context. Raises ValueError for an unknown mode; the function,
    when a request has no place in the model's context.
    """
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    tokenizer, model = respondent.tokenizer, respondent.model
    stops = stop_tokens(model, tokenizer)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", DEFAULT_CONTEXT)
    new_tokens = min(new_tokens, context // 2)
    room = context - new_tokens
    offered = [tool.described for tool in tools]
    grammar = grammars.call_grammar(respondent.compiler, offered, max_calls=MAX_CALLS) if mode == "grammar" else None

    def tokens(chat: list[dict]) -> list[int]:
        return tokenizer(chats.prompt_text(tokenizer, chat), add_special_tokens=False).input_ids

    def answer(chat: list[dict]) -> str:
        kept = fitted(chat, lambda part: len(tokens(part)), room)
        if left_out := len(chat) - len(kept):
            say(f"(the {left_out} oldest messages are left out: the model has room for {room:,} tokens)")
        ids = torch.tensor([tokens(kept)], device=model.device)
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=list(stops) or None,
            pad_token_id=padding_token(stops, tokenizer),
            logits_processor=[grammars.logits_mask([grammar])] if grammar else [],
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        )
        new = whole[0, ids.shape[1] :].tolist()
        if len(new) == new_tokens and new[-1] not in stops:
            say(f"(cut off after {new_tokens:,} tokens)")
        return tokenizer.decode(new, skip_special_tokens=True)

    return answer


def converse(
    respondent: Respondent, tools: Sequence[Tool], *, mode: str = "grammar", read: Read = input, say: Say = print
) -> list[dict]:
    """Chat until `/quit`, the end of input (Ctrl-D) or an interrupt (Ctrl-C); returns the chat."""
    answer = answerer(respondent, tools, mode, say=say)
    say(f"{respondent.artifact.name} with {', '.join(tool.name for tool in tools)}. {QUIT} or Ctrl-D ends.")
    chat = opening(tools)
    try:
        while (request := read("> ").strip()) != QUIT:
            try:
                chat = respond(request, chat, tools, answer, say=say) if request else chat
            except InputError as error:  # of this request only, such as one that is too long
                say(f"({error})")
    except (EOFError, KeyboardInterrupt):
        say("")  # the shell's prompt gets a line of its own
    return chat
