"""Worker processes as the server sees them: started, asked, cancelled, killed, and never waited for in vain."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil

from avalab.lab import artifacts
from avalab.lab.errors import InputError, MissingFile, ProcessFailed
from avalab.lab.process import explain_end
from avalab.lab.run import child_environment
from avalab.serve.policy.settings import Settings

LONGEST_LINE = 2**26  # bytes of a worker's line: embeddings are long

START_SECONDS = 300.0

END_SECONDS = 5.0


class WorkerDied(ProcessFailed):
    """The process that computed an answer has ended."""


@dataclass(frozen=True)
class Served:
    """A model on offer: its name in requests, and where it lies."""

    name: str
    path: Path

    @cached_property
    def bytes(self) -> int:
        """Bytes of the weights."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(f.stat().st_size for f in self.path.iterdir() if f.name.endswith(artifacts.WEIGHT_SUFFIXES))

    @cached_property
    def sha256(self) -> str:
        """The identity of weights, tokenizer and template."""
        if self.path.is_file():
            return artifacts.sha256_of(self.path)
        return artifacts.load_artifact(self.path, verify=False).sha256


def served(paths: Sequence[Path]) -> dict[str, Served]:
    """The models of files and folders by name: the file's without suffix, or the folder's.

    Raises MissingFile, or InputError for what is no model and for two of one name.
    """
    found: dict[str, Served] = {}
    for path in paths:
        if not path.exists():
            raise MissingFile(f"no model at {path}; give a .gguf file or the folder of an artefact")
        files = sorted(path.glob("*.gguf")) if path.is_dir() else []
        if path.is_file() and path.suffix != ".gguf":
            raise InputError(f"{path} is no model; give a .gguf file or the folder of an artefact")
        if path.is_dir() and not (path / artifacts.CARD).is_file():
            if len(files) != 1:
                raise InputError(f"{path} is no artefact (card.json), and holds {len(files)} .gguf files, not one")
            path = files[0]
        name = path.stem if path.is_file() else path.name
        if name in found:
            raise InputError(f"two models are named {name}: {found[name].path} and {path}; rename one")
        found[name] = Served(name, path.resolve())
    if not found:
        raise InputError("no model to serve; give --models FILE or ARTEFACT")
    return found


class Worker:
    """A process that holds one model. `running` counts the jobs that it computes."""

    def __init__(self, model: Served, process: asyncio.subprocess.Process, reader, writer, output) -> None:
        self.model, self.process, self.writer, self.output = model, process, writer, output
        self.reader: asyncio.StreamReader = reader
        self.ready: dict = {}
        self.running = 0
        self.is_dead = False
        self._ids = itertools.count()
        self._answers: dict[int, asyncio.Queue] = {}
        self._listener: asyncio.Task | None = None

    @classmethod
    async def start(cls, model: Served, settings: Settings, processors: Sequence[int] = ()) -> Worker:
        """A worker that has opened its model. Raises InputError with the reason where it cannot."""
        ours, theirs = socket.socketpair()
        threads = settings.threads or max(1, len(processors) or os.cpu_count() or 1)
        options = {
            "path": str(model.path), "context": settings.context, "slots": settings.max_batch_size + 1,
            "threads": threads, "prefill_tokens": settings.prefill_tokens, "processors": list(processors),
            "prefix_bytes": int(settings.prefix_mb * 2**20),
        }  # fmt: skip
        command = ["-m", "avalab.serve.workers.worker", str(theirs.fileno()), json.dumps(options)]
        output = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, stdout=output,
            stderr=output, env=child_environment(), start_new_session=True,
        )  # fmt: skip
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=LONGEST_LINE)
        worker = cls(model, process, reader, writer, output)
        try:
            line = await asyncio.wait_for(reader.readline(), START_SECONDS)
        except (TimeoutError, OSError):
            line = b""
        worker.ready = json.loads(line) if line else {"event": "refused", "message": await worker._last_words()}
        if worker.ready["event"] != "ready":
            await worker.close()
            raise InputError(f"{model.name} cannot be served: {worker.ready['message']}")
        worker._listener = asyncio.create_task(worker._listen())
        return worker

    async def _last_words(self) -> str:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        code = await self.process.wait()
        self.output.seek(0)
        return explain_end(code, self.output.read().decode(errors="replace"))

    async def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await self.reader.readline():
                event = json.loads(line)
                if (answers := self._answers.get(event["id"])) is not None:
                    answers.put_nowait(event)
        self.is_dead = True
        for answers in self._answers.values():
            answers.put_nowait({"event": "died"})

    async def run(self, job: dict) -> AsyncIterator[dict]:
        """The events of a job: tokens, then `done`. Left early, the job is cancelled.

        Raises InputError for what the model refuses, ProcessFailed for what goes wrong in it, WorkerDied.
        """
        name, answers, finished = next(self._ids), asyncio.Queue(), False
        self._answers[name] = answers
        self.running += 1
        try:
            self._send({"id": name, **job})
            while True:
                event = await answers.get()
                kind = event.get("event")
                finished = kind is not None
                if kind == "died":
                    raise WorkerDied(f"the process that computed {self.model.name} has ended; ask again")
                if kind == "error":
                    raise (InputError if event["status"] == 400 else ProcessFailed)(event["message"])
                if kind == "cancelled":
                    return
                yield event
                if kind == "done":
                    return
        finally:
            self.running -= 1
            del self._answers[name]
            if not finished:
                with contextlib.suppress(WorkerDied):
                    self._send({"id": name, "op": "cancel"})

    def _send(self, job: dict) -> None:
        if self.is_dead or self.writer.is_closing():
            raise WorkerDied(f"the process that computed {self.model.name} has ended; ask again")
        self.writer.write(json.dumps(job).encode() + b"\n")

    async def ask(self, op: str, **more) -> dict:
        """The answer to a job that has one event: `embed` or `stats`."""
        async for event in self.run({"op": op, **more}):
            return event
        raise WorkerDied(f"the process that computed {self.model.name} has ended; ask again")

    @property
    def pss_bytes(self) -> int:
        """Memory of the process, its share of what it shares counted; 0 for one that has ended."""
        try:
            info = psutil.Process(self.process.pid).memory_full_info()
            return getattr(info, "pss", info.rss)
        except (psutil.Error, OSError):
            return 0

    def kill(self) -> None:
        """End the process now."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def close(self) -> None:
        """End the process, politely first."""
        self.writer.close()
        try:
            await asyncio.wait_for(self.process.wait(), END_SECONDS)
        except TimeoutError:
            self.kill()
            await self.process.wait()
        if self._listener:
            self._listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listener
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()
        self.output.close()
