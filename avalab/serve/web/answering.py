"""From a checked request to its answer: what is known is given again, the rest is computed and then kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from avalab.lab.errors import InputError, LabError
from avalab.serve.policy import answers
from avalab.serve.web.figures import Figures
from avalab.serve.web.forms import Asked
from avalab.serve.web.stores import Layers
from avalab.serve.workers.dispatch import Dispatcher, Flight

TEMPLATE = "chats of 2026-11"  # how messages become a prompt; changes whenever `forms` writes another one


@dataclass
class Answer:
    """One answer as it becomes known, and where it came from: `miss`, `joined`, `exact` or `near`."""

    source: str = "miss"
    text: str = ""
    end: dict = field(default_factory=dict)
    logprobs: list[dict] = field(default_factory=list)
    first_s: float = 0.0


class Answering:
    """Answers to requests, over a dispatcher and the stores of answers and embeddings."""

    def __init__(self, dispatcher: Dispatcher, kept: Layers, vectors: Layers, figures: Figures) -> None:
        self.dispatcher, self.kept, self.vectors, self.figures = dispatcher, kept, vectors, figures

    async def sha256(self, model: str) -> str:
        """The identity of a model on offer. Raises InputError for another name."""
        if model not in self.dispatcher.models:
            raise InputError(f"model_not_found: no model {model!r}; there are {', '.join(self.dispatcher.models)}")
        return await asyncio.to_thread(lambda: self.dispatcher.models[model].sha256)

    async def pieces(self, asked: Asked, index: int, answer: Answer) -> AsyncIterator[tuple[str, list[dict] | None]]:
        """The texts of an answer as they come, with their log-probabilities; `answer` is whole at the end."""
        began = time.monotonic()
        sha256 = await self.sha256(asked.model)
        greedy = answers.is_greedy(asked.job)
        key = answers.exact_key(sha256, TEMPLATE, asked.job) if greedy else ""
        if greedy and asked.cache != "off" and (row := await self._known(key, sha256, asked, answer)):
            answer.text, answer.end, answer.logprobs = row["text"], row["end"], row["logprobs"]
            answer.first_s = time.monotonic() - began
            yield answer.text, answer.logprobs
            return
        flight = self._submit(asked, index, key, answer)
        async for event in self.dispatcher.listen(flight):
            if event.get("event") == "done":
                answer.end = {name: value for name, value in event.items() if name not in ("id", "event")}
                continue
            answer.first_s = answer.first_s or time.monotonic() - began
            answer.text += event["text"]
            answer.logprobs += event.get("logprobs") or []
            yield event["text"], event.get("logprobs")
        self.figures.tokens.labels("prompt").inc(answer.end.get("prompt_tokens", 0))
        self.figures.tokens.labels("answer").inc(answer.end.get("completion_tokens", 0))
        if greedy and asked.cache != "off":
            await self._keep(key, sha256, asked, answer)

    def _submit(self, asked: Asked, index: int, key: str, answer: Answer) -> Flight:
        job = dict(asked.job)
        if index and "seed" in job:
            job["seed"] += index
        elif not key:
            job.setdefault("seed", int.from_bytes(hashlib.sha256(f"{time.time_ns()}{index}".encode()).digest()[:4]))
        before = self.dispatcher.counts["joined"]
        flight = self.dispatcher.submit(
            asked.model, job, key=f"greedy-{key}" if key else "", priority=asked.priority, agent=asked.agent,
            said=asked.said,
        )  # fmt: skip
        answer.source = "joined" if self.dispatcher.counts["joined"] > before else "miss"
        return flight

    async def _known(self, key: str, sha256: str, asked: Asked, answer: Answer) -> dict | None:
        """What is kept of this request, or with `near` of one that says the same."""
        if row := _read(await asyncio.to_thread(self.kept.get, key)):
            answer.source = "exact"
            return row
        near = answers.near_key(sha256, TEMPLATE, asked.job) if asked.cache == "near" else None
        pointer = _read(await asyncio.to_thread(self.kept.get, near)) if near else None
        if not pointer:
            return None
        vector = await self._vector(asked)
        row = _read(await asyncio.to_thread(self.kept.get, pointer["key"]))
        if not row or not answers.is_near(vector, pointer["vector"]):
            return None
        answer.source = "near"
        return row

    async def _keep(self, key: str, sha256: str, asked: Asked, answer: Answer) -> None:
        row = json.dumps({"text": answer.text, "end": answer.end, "logprobs": answer.logprobs})
        await asyncio.to_thread(self.kept.put, key, row.encode())
        near = answers.near_key(sha256, TEMPLATE, asked.job) if asked.cache == "near" else None
        if near:
            pointer = json.dumps({"key": key, "vector": await self._vector(asked)})
            await asyncio.to_thread(self.kept.put, near, pointer.encode())

    async def _vector(self, asked: Asked) -> list[float] | None:
        """The embedding of what the user says last; None for a model that embeds nothing."""
        try:
            return (await self.embeddings(asked.model, [answers.last_said(asked.job)]))[0]
        except LabError:
            return None

    async def embeddings(self, model: str, texts: list[str]) -> list[list[float]]:
        """Embeddings of texts, those known from before not computed again."""
        sha256 = await self.sha256(model)
        keys = [hashlib.sha256(f"{sha256}\0{text}".encode()).hexdigest() for text in texts]
        found = [_read(await asyncio.to_thread(self.vectors.get, key)) for key in keys]
        missing = [index for index, row in enumerate(found) if row is None]
        if missing:
            made = await self.dispatcher.embed(model, [texts[index] for index in missing])
            for index, vector in zip(missing, made, strict=True):
                found[index] = {"vector": vector}
                await asyncio.to_thread(self.vectors.put, keys[index], json.dumps(found[index]).encode())
        return [row["vector"] for row in found if row]


def _read(raw: bytes | None) -> dict | None:
    """A kept row; None for one that is damaged."""
    try:
        row = json.loads(raw) if raw else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
