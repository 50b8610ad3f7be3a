"""A chat in the terminal with an artefact that really calls its tools, and shows what it calls.

A turn: the tools stand in the system message; the artefact answers the request greedily, in free form or under the
grammar of the tools (a call or a plain text); calls in the answer are executed (`serve.tools`) and shown; results go
back as messages of the role `tool`, if the chat template shows such messages, and the artefact goes on, until it
answers without a call, repeats itself, or has answered `ROUNDS` times. The oldest turns are left out when the context
is full.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, TextStreamer

from avalab.data import calls, grammars, toolbox
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
        for call in found:
            say(f"  -> {shown_call(call)}")
            result = execute(tools, call)
            say(f"  <- {'failed: ' if result.failed else ''}{result.text}")
            content = json.dumps({"error": result.text}, ensure_ascii=False) if result.failed else result.text
            if returned:
                chat.append({"role": "tool", "name": call.name, "content": content})
        if not returned:
            break
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


def shows_results(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template lets the model see a message of the role `tool`."""
    chat = [{"role": role, "content": f"4711 {role}"} for role in ("user", "assistant", "tool")]
    try:
        return "4711 tool" in tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError):  # a template may refuse a role it does not know
        return False


def answerer(
    respondent: Respondent, tools: Sequence[Tool], mode: str, *, stream: bool = True, new_tokens: int = ANSWER_TOKENS
) -> Answer:
    """A function from a chat to the artefact's greedy answer, written to the terminal as it comes with `stream`.

    Raises ValueError for an unknown mode; the function, when a request has no place in the model's context.
    """
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    tokenizer, model = respondent.tokenizer, respondent.model
    stops = stop_tokens(model, tokenizer)
    room = getattr(model.config, "max_position_embeddings", DEFAULT_CONTEXT) - new_tokens
    offered = [tool.described for tool in tools]
    grammar = grammars.call_grammar(respondent.compiler, offered, max_calls=MAX_CALLS) if mode == "grammar" else None

    def tokens(chat: list[dict]) -> list[int]:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids

    def answer(chat: list[dict]) -> str:
        ids = torch.tensor([tokens(fitted(chat, lambda part: len(tokens(part)), room))], device=model.device)
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
        return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)

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
