"""Teachers: whoever answers a prompt during data synthesis. A teacher is a function from chat messages to a text.

- `endpoint`: any server that speaks the OpenAI chat-completions protocol. In steps: look the question up in the answer
  cache; refuse when the cost limit is spent; wait until the rate limit allows; ask, and ask again with growing pauses
  while the server is down, slow, busy (429, `Retry-After` is honoured) or failing (5xx), or returns rubbish.
- `local`: a model of this lab, from an artefact folder, greedy decoding, many questions at once with `ahead`; with a
  JSON schema its answers cannot have another form.

Answers are appended to a JSONL cache, each flushed to disk before it is used: after a crash nothing is paid twice, and
the spent cost is counted from the cache, so a limit holds across restarts. A last line cut off by a crash is dropped.
Two processes must not share a cache file. The key is read from the environment and never stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx
from tqdm.auto import tqdm

from avalab.lab.artifacts import Artifact, load_artifact
from avalab.lab.errors import InputError, Unavailable

Teacher = Callable[[list[dict]], str]

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses that another attempt may cure


class TeacherUnavailable(Unavailable):
    """The teacher gave no usable answer after every attempt; what was answered before is in the cache."""


class CostLimitReached(Unavailable):
    """The next question might cost more than the limit allows; names both sums."""


@dataclass(frozen=True)
class Limits:
    """How hard an endpoint may be used. Prices are for a million tokens, in whatever currency `cost` is in."""

    requests_per_minute: float = 60.0
    cost: float = float("inf")
    price_in: float = 0.0
    price_out: float = 0.0
    attempts: int = 5
    timeout_s: float = 60.0
    pause_s: float = 1.0  # before the second attempt; doubled for each further one
    longest_pause_s: float = 60.0
    new_tokens: int = 256


def endpoint_teacher(
    base_url: str,
    model: str,
    *,
    cache: Path | str,
    key_variable: str = "OPENAI_API_KEY",
    limits: Limits = Limits(),
    sleep: Callable[[float], None] = time.sleep,
) -> Teacher:
    """A teacher behind `base_url` (which ends before `/chat/completions`, usually in `/v1`).

    Calling it raises TeacherUnavailable after the last attempt, or at once for a refusal such as 401, and
    CostLimitReached. Raises ValueError for a base URL without http(s).
    """
    if not base_url.startswith(("http://", "https://")):
        raise InputError(f"base URL {base_url!r}; it must begin with http:// or https://")
    url, answers, last = base_url.rstrip("/") + "/chat/completions", AnswerCache(Path(cache)), [float("-inf")]

    def ask(messages: list[dict]) -> str:
        question = {"model": model, "messages": messages, "max_tokens": limits.new_tokens, "temperature": 0.7}
        key = question_key(base_url, question)
        if key in answers.texts:
            return answers.texts[key]
        tokens_in = len(json.dumps(messages)) / 3  # the worst case: three characters a token, and the longest answer
        worst = (tokens_in * limits.price_in + limits.new_tokens * limits.price_out) / 1e6
        if answers.spent + worst > limits.cost:
            raise CostLimitReached(
                f"spent {answers.spent:.4f}, the next question may cost {worst:.4f}, the limit is {limits.cost:.4f}"
            )
        for number in range(1, limits.attempts + 1):
            sleep(max(0.0, last[0] + 60 / limits.requests_per_minute - time.monotonic()))
            last[0] = time.monotonic()
            reply = _post(url, question, os.environ.get(key_variable, ""), limits)
            if isinstance(reply, Reply):
                answers.add(key, reply.text, reply.tokens_in * limits.price_in, reply.tokens_out * limits.price_out)
                return reply.text
            if not reply.again:
                break
            if number < limits.attempts:
                sleep(min(limits.longest_pause_s, max(reply.wait_s, limits.pause_s * 2 ** (number - 1))))
        raise TeacherUnavailable(f"{url} gave no answer in {number} attempts; the last: {reply.reason}")

    ask.__name__ = f"{model} (endpoint)"
    return ask


class AnswerCache:
    """Answers by the hash of their question, in a JSONL file; those of `known`, another such file, are read first.

    Raises ValueError naming a damaged line but the last.
    """

    def __init__(self, path: Path, known: Path | None = None) -> None:
        self.path, self.texts, self.spent = path, {}, 0.0
        if known is not None and known.exists():
            self.texts |= AnswerCache(known).texts
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                row = json.loads(line)
                self.texts[row["key"]], self.spent = row["text"], self.spent + row["cost"]
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):  # a complete line: not the trace of a crash
                    raise InputError(f"{path}:{number}: not an answer of the cache ({error})") from error
                path.write_bytes(b"\n".join([*lines[:-1], b""]))

    def add(self, key: str, text: str, cost_in: float, cost_out: float) -> None:
        """Store an answer and flush it to disk; costs in millionths of the currency."""
        cost = (cost_in + cost_out) / 1e6
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "text": text, "cost": cost}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.texts[key], self.spent = text, self.spent + cost


@dataclass(frozen=True)
class Local:
    """A model of this lab as teacher; it is loaded at its first new question, and then kept."""

    folder: Path
    sha256: str  # of the artefact: the cache may be shared with others
    answers: AnswerCache
    new_tokens: int
    device: str
    schema: dict | None

    @property
    def __name__(self) -> str:
        return f"{self.folder.name} (local)"

    def __call__(self, messages: list[dict]) -> str:
        self.ahead([messages])
        return self.answers.texts[self._key(messages)]

    def ahead(self, questions: Sequence[list[dict]], *, progress: str = "") -> None:
        """Answer what is not in the cache yet, batch after batch; later calls then cost nothing."""
        from avalab.data import chats, grammars

        new = {key: q for q in questions if (key := self._key(q)) not in self.answers.texts}
        if not new:
            return
        keys = list(new)
        model, tokenizer, grammar = self._loaded
        prompts = [chats.prompt_text(tokenizer, question) for question in new.values()]
        form = None if grammar is None else [grammar] * len(prompts)
        found = grammars.greedy_answers(model, tokenizer, prompts, grammars=form, max_new_tokens=self.new_tokens)
        for index, text in tqdm(found, total=len(new), desc=progress, disable=not progress, leave=False):
            self.answers.add(keys[index], text, 0.0, 0.0)

    def _key(self, messages: list[dict]) -> str:
        form = {} if self.schema is None else {"schema": self.schema}
        return question_key(self.sha256, {"messages": messages, "max_tokens": self.new_tokens, **form})

    @cached_property
    def _loaded(self) -> tuple:
        from avalab.data import grammars
        from avalab.models import checkpoint
        from avalab.models.stops import stop_tokens

        model, tokenizer = checkpoint.load_model(self.folder, self.device), checkpoint.load_tokenizer(self.folder)
        if self.schema is None:
            return model, tokenizer, None
        stops = stop_tokens(model, tokenizer)
        engine = grammars.grammar_compiler(tokenizer, model.config.vocab_size, stops).engine
        compiled = engine.compile_json_schema(json.dumps(self.schema), any_whitespace=False)
        return model, tokenizer, grammars.CallGrammar(compiled)


def local_teacher(
    artifact: Artifact | Path,
    *,
    cache: Path | str,
    new_tokens: int = 128,
    device: str = "cpu",
    schema: dict | None = None,
) -> Local:
    """A model of this lab as teacher. The cache may be another teacher's too: keys hold the artefact's hash.

    With `schema`, a grammar holds every answer to JSON that satisfies it (an answer that is cut off may not be whole).
    """
    folder = artifact if isinstance(artifact, Path) else artifact.path
    answers = AnswerCache(Path(cache))
    return Local(folder, load_artifact(folder).sha256, answers, new_tokens, device, schema)


def question_key(where: str, question: dict) -> str:
    """The identity of a question to a server or a model: a hash of all of it."""
    return hashlib.sha256((where + json.dumps(question, sort_keys=True)).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """A server's answer, and what it counted."""

    text: str
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed, whether another may help, and how long the server asks to wait."""

    reason: str
    again: bool = True
    wait_s: float = 0.0


def _post(url: str, question: dict, key: str, limits: Limits) -> Reply | Failure:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.post(url, json=question, headers=headers, timeout=limits.timeout_s)
    except httpx.HTTPError as error:
        return Failure(f"{type(error).__name__}: {error}")
    if response.status_code != 200:
        try:
            wait_s = max(0.0, float(response.headers.get("retry-after", 0)))
        except ValueError:  # a date: the pauses of our own will do
            wait_s = 0.0
        again = response.status_code in AGAIN
        return Failure(f"status {response.status_code}: {response.text[:200]}", again, wait_s)
    try:
        body = response.json()
        text, usage = body["choices"][0]["message"]["content"], body.get("usage") or {}
        tokens_in = int(usage.get("prompt_tokens", len(json.dumps(question)) // 3))
        tokens_out = int(usage.get("completion_tokens", limits.new_tokens))  # unknown: the most it may have been
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        return Failure(f"not a chat completion ({type(error).__name__}: {error}): {response.text[:80]!r}")
    if not isinstance(text, str) or not text.strip():
        return Failure("an empty answer")
    return Reply(text, tokens_in, tokens_out)
