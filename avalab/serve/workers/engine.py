"""Artefacts that are no GGUF files, through the lab's engines: greedy, one request after the other.

Prompts, grammars, end tokens and greedy steps are the lab's own (`data.chats`, `data.grammars`, `engines`). What an
engine does not do is refused by name: chance (temperature), and embeddings.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from avalab import engines
from avalab.data import chats, grammars
from avalab.data.grammars import CallGrammar
from avalab.lab import artifacts, schemas
from avalab.lab.errors import InputError
from avalab.models import checkpoint
from avalab.serve.workers.llama import Cancelled, Emit, bounded


class _Ended(Exception):
    """A text that ends the answer was written."""


class EngineModel:
    """An artefact in the first engine of its card that is here."""

    def __init__(self, folder: Path, *, context: int, threads: int) -> None:
        self.artifact = artifacts.load_artifact(folder, verify=False)
        wanted = self.artifact.card.get("engines") or ["torch"]
        name = "torch" if "torch" in wanted else wanted[0]
        options = {"threads": threads} if name in ("torch", "openvino", "llamacpp") else {}
        self.engine = engines.load(name, folder, **options)
        self.tokenizer = checkpoint.load_tokenizer(self.artifact)
        self.context = min(context, self.engine.facts.context)
        self.template: str = chats.template_text(self.tokenizer)
        self.compiler = grammars.grammar_compiler(
            self.tokenizer, self.engine.facts.vocabulary, self.engine.facts.stops or None
        )
        self.one = threading.Lock()  # an engine computes one answer at a time
        self.prefilled = 0

    def close(self) -> None:
        """Let go of the weights."""
        self.engine.close()

    def generate(self, job: dict, emit: Emit, is_cancelled: Callable[[], bool]) -> dict:
        """As `Llama.generate`. Raises InputError for a temperature: engines are greedy."""
        if job.get("temperature"):
            raise InputError(
                f"temperature is {job['temperature']}; the engine {self.engine.name} answers greedily: leave it out, "
                "or serve a GGUF file (avalab export --to gguf), which samples"
            )
        prompt = self._tokens(job)
        room = self.context - len(prompt)
        limit = job.get("max_tokens") or room
        if limit > room or room < 1:
            raise InputError(
                f"context_length_exceeded: {len(prompt)} tokens of prompt and {limit} of answer; the model has room "
                f"for {self.context}; shorten the messages, lower max_tokens, or ask for a window"
            )
        told = _Told(self.tokenizer, job.get("stop") or [], emit, is_cancelled)
        reason = "stop"
        with self.one:
            try:
                made = self.engine.generate(prompt, limit, self._grammar(job.get("grammar")), on_token=told)
                told.flush()
                reason = "length" if len(made) >= limit else "stop"
            except _Ended:
                made = told.tokens
            details = self._logprobs(prompt, made, job["logprobs"]) if job.get("logprobs") is not None else None
            self.prefilled += len(prompt)
        if details:
            emit({"text": "", "logprobs": details})
        return {
            "finish_reason": reason, "prompt_tokens": len(prompt), "completion_tokens": len(made),
            "cached_tokens": 0,
        }  # fmt: skip

    def _tokens(self, job: dict) -> list[int]:
        if "messages" in job:
            text = chats.prompt_text(self.tokenizer, job["messages"])
        elif isinstance(job["prompt"], str):
            text = job["prompt"]
        else:
            return list(job["prompt"])
        return self.tokenizer(text, add_special_tokens=False).input_ids or [0]

    def _grammar(self, wanted: dict | None) -> CallGrammar | None:
        if not wanted:
            return None
        if wanted["kind"] == "calls":
            functions = [f | {"parameters": bounded(schemas.to_json_schema(f))} for f in wanted["functions"]]
            return grammars.call_grammar(
                self.compiler, functions, refusal=wanted["refusal"], max_calls=wanted["max_calls"]
            )
        rewriting = schemas.Rewriting(bounded(wanted["schema"]))
        schema = {**rewriting.whole(), "$defs": rewriting.defs}
        try:
            compiled = self.compiler.engine.compile_json_schema(
                json.dumps(schema), any_whitespace=False, strict_mode=False
            )
        except RuntimeError as error:
            raise InputError(f"no grammar can be made of this schema: {str(error)[:200]}") from error
        return CallGrammar(compiled)

    def _logprobs(self, prompt: list[int], made: list[int], top: int) -> list[dict]:
        """Log-probabilities of an answer's tokens and of the `top` most likely ones in their places."""
        if not made:
            return []
        rows = self.engine.logits([*prompt, *made])[len(prompt) - 1 : -1].log_softmax(-1)
        found = []
        for row, token in zip(rows, made, strict=True):
            best = torch.topk(row, max(1, top)).indices.tolist()
            listed = [self._shown(each, float(row[each])) for each in best]
            found.append(self._shown(token, float(row[token])) | {"top_logprobs": listed})
        return found

    def _shown(self, token: int, logprob: float) -> dict:
        text = self.tokenizer.decode([token])
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

    def embed(self, texts: list[str]) -> list[list[float]]:
        """Raises InputError: the engines give no hidden states."""
        raise InputError(f"{self.artifact.name} gives no embeddings in {self.engine.name}; serve it as a GGUF file")

    def stats(self) -> dict:
        """Counts for the figures."""
        return {"prefilled_tokens": self.prefilled, "kept_prefixes": 0, "kept_prefix_bytes": 0}


class _Told:
    """Tells the text of tokens as it becomes sure: whole characters, and nothing of a text that ends the answer."""

    def __init__(self, tokenizer, stops: list[str], emit: Emit, is_cancelled: Callable[[], bool]) -> None:
        self.tokenizer, self.stops, self.emit, self.is_cancelled = tokenizer, stops, emit, is_cancelled
        self.tokens: list[int] = []
        self.said = 0

    def __call__(self, token: int) -> None:
        if self.is_cancelled():
            raise Cancelled
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self._say(text[: min(ends)])
            raise _Ended
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        if not text.endswith("\ufffd"):
            self._say(text[: len(text) - held])

    def flush(self) -> None:
        """Tell what was held back."""
        self._say(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _say(self, text: str) -> None:
        if len(text) > self.said:
            self.emit({"text": text[self.said :], "logprobs": None})
            self.said = len(text)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that may be the beginning of what ends it."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
