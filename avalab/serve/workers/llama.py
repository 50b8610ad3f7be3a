"""GGUF files through llama.cpp's server inside this process (xllamacpp): its slots batch continuously.

What llama.cpp's server leaves to whoever calls it:

1. Prompts are read in pieces of `prefill_tokens`. Between two pieces a long prompt waits while an urgent request has no
   first token yet.
2. What was read of a prompt is kept (a slot's state, in a file of the memory file system): another request with the
   same beginning takes it over into its own slot, also while the first one still answers. A request whose beginning is
   being read waits for that instead of reading it, too.
3. Calls and JSON are forced by a grammar of llguidance's: the functions' schemas are those of `lab.schemas`; strings
   and lists without a bound get one, so that a small model comes to an end.

The weights are mapped from the file and not repacked, so that processes share them. No torch in here.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from avalab.lab import schemas
from avalab.lab.errors import InputError, ProcessFailed, Unavailable
from avalab.serve.policy import batching

LEAST_SHARED = 64  # tokens of a shared beginning that are worth a copy

CALL = ("<tool_call>", "</tool_call>")  # of data.grammars, which imports torch

LONGEST_TEXT, MOST_ITEMS = 48, 4  # of a string or list whose schema bounds neither

COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}

Emit = Callable[[dict], None]


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(eq=False)
class Slot:
    """One of llama.cpp's sequences: what it has read, and whether somebody uses it."""

    id: int
    tokens: list[int] = field(default_factory=list)
    is_busy: bool = False


@dataclass(eq=False)
class Prefill:
    """A prompt that is being read: how much of it can be taken over, and how much others wait for."""

    tokens: list[int]
    kept: int = 0
    wanted: set[int] = field(default_factory=set)


class Llama:
    """A GGUF file, opened for `slots` requests at once of `context` tokens each."""

    def __init__(
        self,
        file: Path,
        *,
        context: int,
        slots: int,
        threads: int,
        prefill_tokens: int = 128,
        prefix_bytes: int = 2**29,
    ) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise Unavailable(f"GGUF files need xllamacpp: {error}; pip install xllamacpp") from error
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="avalab-prefix-", dir=memory if memory.is_dir() else None))
        self.file, self.threads, self.prefix_bytes = file, threads, prefix_bytes
        parameters = self._parameters(xllamacpp, context * slots)
        parameters.n_parallel, parameters.cont_batching, parameters.kv_unified = slots, True, True
        parameters.n_batch = parameters.n_ubatch = max(prefill_tokens, 32)
        parameters.cache_ram_mib = 0  # kept here instead, see 2
        parameters.endpoint_slots, parameters.slot_save_path = True, f"{self.folder}/"
        self.library = xllamacpp
        self.server = self._opened(parameters)
        self.client = httpx.Client(base_url=self.server.listening_address, timeout=120.0, trust_env=False)
        properties = self.client.get("/props").json()
        trained = _trained_context(self.client)
        self.context = min(context, trained) if trained else context
        self.template: str = properties.get("chat_template", "")
        self.prefill_tokens = prefill_tokens
        self.slots = [Slot(index) for index in range(slots)]
        self.kept: OrderedDict[tuple[int, ...], tuple[str, int]] = OrderedDict()  # tokens -> file, bytes
        self.reading: list[Prefill] = []
        self.changed = threading.Condition()
        self.urgent = 0  # requests without a first token yet
        self.prefilled = 0  # tokens that were read, of all prompts
        self.embedder: Any = None

    def _parameters(self, library: Any, context: int) -> Any:
        parameters = library.CommonParams()
        parameters.model.path = str(self.file)
        parameters.n_ctx, parameters.warmup, parameters.use_jinja = context, False, True
        parameters.verbosity, parameters.no_extra_bufts = -1, True
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = self.threads
        return parameters

    def _opened(self, parameters: Any) -> Any:
        try:
            return self.library.Server(parameters)
        except Exception as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise InputError(
                f"llama.cpp cannot open {self.file}: {str(error).strip() or 'it does not say why'}"
            ) from None

    def close(self) -> None:
        """Let go of what was kept; the process's end frees the rest."""
        self.client.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- a request ---------------------------------------------------------------------------------------------------

    def generate(self, job: dict, emit: Emit, is_cancelled: Callable[[], bool]) -> dict:
        """Answer a job, token by token through `emit`; what the answer was like at its end.

        Raises InputError for what the model cannot do, Cancelled when nobody listens any more.
        """
        tokens = self.tokens_of(job)
        limit = self._limit(len(tokens), job.get("max_tokens"))
        urgent = bool(job.get("urgent"))
        if urgent:
            self._count_urgent(1)
        first = [urgent]

        def told(event: dict) -> None:
            if first[0]:
                first[0] = False
                self._count_urgent(-1)
            emit(event)

        try:
            with self._slot(tokens, urgent, is_cancelled) as slot:
                own = Prefill(tokens[:-1])
                try:
                    known = self._take_over(slot, tokens, own, urgent, is_cancelled)
                    read = self._read(slot, own, known, urgent, is_cancelled)
                finally:
                    with self.changed:
                        self.reading = [other for other in self.reading if other is not own]
                        self.changed.notify_all()
                end = self._answer(slot, tokens, job, limit, told, is_cancelled)
                return end | {"cached_tokens": max(0, len(tokens) - read - end.pop("last_read"))}
        finally:
            if first[0]:
                self._count_urgent(-1)

    def tokens_of(self, job: dict) -> list[int]:
        """Tokens of a job's chat, written by the file's own template, or of its prompt."""
        if "messages" in job:
            text = self._rendered(job["messages"])
        elif isinstance(job["prompt"], str):
            text = job["prompt"]
        else:
            return list(job["prompt"])
        tokens = self.client.post("/tokenize", json={"content": text, "add_special": True, "parse_special": True})
        return tokens.json()["tokens"] or [0]

    def _rendered(self, messages: list[dict]) -> str:
        for shown in (messages, _plain(messages)):
            found = self.client.post("/apply-template", json={"messages": shown}).json()
            if "prompt" in found:
                return found["prompt"]
        raise InputError(f"the chat template refuses these messages: {found['error']['message'][:200]}")

    def _limit(self, length: int, wanted: int | None) -> int:
        room = self.context - length
        if room < 1 or (wanted or 0) > room:
            raise InputError(
                f"context_length_exceeded: {length} tokens of prompt and {wanted or 1} of answer; the model has room "
                f"for {self.context}; shorten the messages, lower max_tokens, or ask for a window"
            )
        return wanted or room

    def _count_urgent(self, change: int) -> None:
        with self.changed:
            self.urgent += change
            self.changed.notify_all()

    @contextlib.contextmanager
    def _slot(self, tokens: list[int], urgent: bool, is_cancelled: Callable[[], bool]) -> Iterator[Slot]:
        """The free slot that has read most of these tokens; the last one is for urgent requests."""
        usable = self.slots if urgent or len(self.slots) == 1 else self.slots[:-1]
        with self.changed:
            while not (free := [slot for slot in usable if not slot.is_busy]):
                if is_cancelled():
                    raise Cancelled
                self.changed.wait(0.05)
            index, shared = batching.longest_match(tokens, [slot.tokens for slot in free])
            slot = free[index] if shared >= LEAST_SHARED else min(free, key=lambda slot: len(slot.tokens))
            slot.is_busy = True
        try:
            yield slot
        finally:
            with self.changed:
                slot.is_busy = False
                self.changed.notify_all()

    def _take_over(
        self, slot: Slot, tokens: list[int], prefill: Prefill, urgent: bool, is_cancelled: Callable[[], bool]
    ) -> int:
        """Bring what another request has read into this slot; how many of the tokens it then holds.

        From the moment that nothing more is waited for, others may wait for this prompt's `prefill`.
        """
        own = batching.longest_match(tokens, [slot.tokens])[1]
        with self.changed:
            while True:
                if is_cancelled():
                    raise Cancelled
                kept = list(self.kept)
                index, shared = batching.longest_match(tokens, kept)
                have = max(own, shared)
                at, ahead = batching.longest_match(tokens, [other.tokens for other in self.reading])
                if urgent or ahead - have < LEAST_SHARED:
                    break
                self.reading[at].wanted.add(ahead)
                self.changed.wait(0.05)
            self.reading.append(prefill)
            if shared - own < LEAST_SHARED:
                return own
            self.kept.move_to_end(kept[index])
            name = self.kept[kept[index]][0]
            done = self.client.post(f"/slots/{slot.id}", params={"action": "restore"}, json={"filename": name})
            if done.status_code != 200:  # a full disk, mostly: read it again
                return own
            slot.tokens = list(kept[index])
            return shared

    def _read(self, slot: Slot, own: Prefill, known: int, urgent: bool, is_cancelled: Callable[[], bool]) -> int:
        """Read a prompt but its last token in pieces; how many tokens were: none where one step can read the rest."""
        tokens, end, read = own.tokens, len(own.tokens), 0
        if end - known < self.prefill_tokens:  # read with the answer's first step
            return 0
        own.kept = known
        try:
            for cut in batching.pieces(known, end, self.prefill_tokens):
                with self.changed:
                    while self.urgent and not urgent and not is_cancelled():
                        self.changed.wait(0.05)
                if is_cancelled():
                    raise Cancelled
                job = {"prompt": tokens[:cut], "n_predict": 0, "id_slot": slot.id, "cache_prompt": True}
                made = _checked(self.server.handle_completions(job))
                read += made["timings"]["prompt_n"]
                slot.tokens = tokens[:cut]
                if cut == end or any(own.kept < wanted <= cut for wanted in own.wanted):
                    self._keep(slot, own, cut)
        finally:
            with self.changed:
                self.prefilled += read
        return read

    def _keep(self, slot: Slot, prefill: Prefill, done: int) -> None:
        """Keep what a slot has read; a disk without room keeps nothing, and others read for themselves."""
        tokens = tuple(prefill.tokens[:done])
        if self.prefix_bytes and tokens not in self.kept:
            name = f"{abs(hash(tokens)):x}.state"
            made = self.client.post(f"/slots/{slot.id}", params={"action": "save"}, json={"filename": name})
            with self.changed:
                if made.status_code == 200:
                    self.kept[tokens] = (name, made.json()["n_written"])
                while sum(size for _, size in self.kept.values()) > self.prefix_bytes:
                    (self.folder / self.kept.popitem(last=False)[1][0]).unlink(missing_ok=True)
        with self.changed:
            prefill.kept = done
            self.changed.notify_all()

    def _answer(
        self, slot: Slot, tokens: list[int], job: dict, limit: int, emit: Emit, is_cancelled: Callable[[], bool]
    ) -> dict:
        request = {
            "prompt": tokens, "n_predict": limit, "id_slot": slot.id, "cache_prompt": True, "stream": True,
            "temperature": job.get("temperature") or 0.0, "top_p": job.get("top_p", 1.0), "top_k": 0, "min_p": 0.0,
            "seed": job.get("seed", 0), "stop": job.get("stop") or [], "repeat_penalty": 1.0,
            "frequency_penalty": job.get("frequency_penalty", 0.0),
            "presence_penalty": job.get("presence_penalty", 0.0),
        }  # fmt: skip
        if job.get("logprobs") is not None:
            request["n_probs"] = max(1, job["logprobs"])
        if job.get("grammar"):
            request["grammar"] = grammar_text(job["grammar"])
        end: dict = {}
        stopped = False

        def told(chunk: Any) -> bool:
            nonlocal stopped
            for each in chunk if isinstance(chunk, list) else [chunk]:
                if "error" in each:
                    end.update(each)
                    continue
                choice = each["choices"][0]
                if choice.get("text"):
                    emit({"text": choice["text"], "logprobs": _logprobs(choice)})
                if choice.get("finish_reason"):
                    end.update(each)
            stopped = is_cancelled()
            return stopped

        slot.tokens = list(tokens)
        self.server.handle_completions(request, told)
        if stopped:
            raise Cancelled
        _checked(end)
        usage, timings = end["usage"], end.get("timings", {})
        with self.changed:
            self.prefilled += timings.get("prompt_n", 0)
        return {
            "finish_reason": end["choices"][0]["finish_reason"],
            "prompt_tokens": len(tokens),
            "completion_tokens": usage["completion_tokens"],
            "last_read": timings.get("prompt_n", 0),
        }

    # --- embeddings --------------------------------------------------------------------------------------------------

    def embed(self, texts: list[str]) -> list[list[float]]:
        """The mean of the last hidden states of each text's tokens, of length one."""
        with self.changed:
            if self.embedder is None:
                parameters = self._parameters(self.library, self.context)
                parameters.embedding, parameters.n_parallel = True, 1
                parameters.n_batch = parameters.n_ubatch = self.context
                parameters.pooling_type = self.library.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
                self.embedder = self._opened(parameters)
        found = _checked(self.embedder.handle_embeddings({"input": texts}))
        rows = sorted(found["data"], key=lambda row: row["index"])
        return [row["embedding"][0] if isinstance(row["embedding"][0], list) else row["embedding"] for row in rows]

    def stats(self) -> dict:
        """Counts for the figures: tokens read, beginnings kept and their bytes."""
        with self.changed:
            return {
                "prefilled_tokens": self.prefilled,
                "kept_prefixes": len(self.kept),
                "kept_prefix_bytes": sum(size for _, size in self.kept.values()),
            }


def _trained_context(client: httpx.Client) -> int:
    rows = client.get("/v1/models").json().get("data") or [{}]
    return int((rows[0].get("meta") or {}).get("n_ctx_train") or 0)


def _checked(answer: dict | None) -> dict:
    if not answer:
        raise ProcessFailed("llama.cpp ended the request without an answer")
    if "error" in answer:
        error = answer["error"]
        kind = InputError if error.get("code") == 400 else ProcessFailed
        raise kind(f"llama.cpp: {error.get('message', error)}")
    return answer


def _plain(messages: list[dict]) -> list[dict]:
    """Messages for templates that know users and assistants only: others' words become a user's."""
    shown: list[dict] = []
    for message in messages:
        role = message["role"] if message["role"] == "assistant" else "user"
        text = message["content"]
        text = f"<tool_response>\n{text}\n</tool_response>" if message["role"] == "tool" else text
        if shown and shown[-1]["role"] == role:
            shown[-1] = {"role": role, "content": f"{shown[-1]['content']}\n\n{text}"}
        else:
            shown.append({"role": role, "content": text})
    return shown


def _logprobs(choice: dict) -> list[dict] | None:
    return (choice.get("logprobs") or {}).get("content")


# --- grammars --------------------------------------------------------------------------------------------------------


def grammar_text(wanted: dict) -> str:
    """llguidance's grammar of a schema, or of calls to functions (with `refusal`, or of a text without one)."""
    if wanted["kind"] == "json":
        return f"%llguidance {{}}\nstart: %json {json.dumps(bounded(wanted['schema']) | COMPACT)}\n"
    one_of = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": bounded(schemas.to_json_schema(function))},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in wanted["functions"]
    ]
    listed = {"type": "array", "items": {"anyOf": one_of}, "minItems": 1, "maxItems": wanted["max_calls"], **COMPACT}
    start = 'start: TEXT | "{}" calls "{}"\nTEXT: /[^<]+/' if wanted["refusal"] else 'start: "{}" calls "{}"'
    return f"%llguidance {{}}\n{start.format(*CALL)}\ncalls: %json {json.dumps(listed)}\n"


def bounded(schema: Any) -> Any:
    """A schema that allows nothing else, with a bound for strings, lists and free objects that have none.

    Objects that name properties get no others.

    Bounds never contradict what the schema asks for; a schema with references keeps them.
    """
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions", "patternProperties"):
            made[key] = {name: bounded(each) for name, each in value.items()}
        elif key in ("items", "additionalProperties"):
            made[key] = bounded(value)
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            made[key] = [bounded(each) for each in value]
        else:
            made[key] = value
    kinds = made.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not {"enum", "const", "$ref", "pattern", "format"} & made.keys():
        if "string" in kinds and "maxLength" not in made:
            made["maxLength"] = max(LONGEST_TEXT, made.get("minLength", 0))
        if "array" in kinds and "maxItems" not in made:
            made["maxItems"] = max(MOST_ITEMS, made.get("minItems", 0), len(made.get("prefixItems", ())))
    composed = {"patternProperties", "additionalProperties", "allOf", "anyOf", "oneOf", "$ref"} & made.keys()
    if "properties" in made and not composed and set(made.get("required", ())) <= made["properties"].keys():
        made["additionalProperties"] = False
    if "object" in kinds and not {"properties", "additionalProperties", "patternProperties", "$ref"} & made.keys():
        made |= {"additionalProperties": {"type": ["string", "number", "boolean"], "maxLength": LONGEST_TEXT}}
        made["maxProperties"] = max(MOST_ITEMS, made.get("minProperties", 0))
    return made
