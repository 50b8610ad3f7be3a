"""A process that holds one model: jobs come as JSON lines over a socket, tokens go back the same way.

In: `{"id", "op": "generate" | "embed" | "stats" | "cancel", ...}`; out: first `{"event": "ready", ...}` or
`{"event": "refused", ...}`, then for each id tokens (`text`), and one `done`, `error` or `cancelled`. Every job has a
thread. The end of the socket ends the process: no worker outlives its server.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from avalab.lab.errors import InputError, LabError


def main(descriptor: int, options: dict) -> None:
    """Serve jobs until the socket ends."""
    began = time.perf_counter()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the server drains
    lines = socket.socket(fileno=descriptor)
    lock = threading.Lock()

    def tell(event: dict) -> None:
        with lock:
            try:
                lines.sendall(json.dumps(event).encode() + b"\n")
            except OSError:  # the server is gone
                os._exit(0)

    if options.get("processors") and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, options["processors"])
    try:
        model = opened(options)
    except (LabError, OSError, ValueError) as error:
        tell({"event": "refused", "message": " ".join(str(error).split())})
        return
    load_ms = (time.perf_counter() - began) * 1000
    tell({"event": "ready", "context": model.context, "template": model.template, "load_ms": load_ms})
    cancelled: set[int] = set()
    try:
        for line in lines.makefile("rb"):
            job = json.loads(line)
            if job["op"] == "cancel":
                cancelled.add(job["id"])
            else:
                threading.Thread(target=_run, args=(model, job, tell, cancelled), daemon=True).start()
    finally:
        model.close()
        os._exit(0)  # native threads may still compute for a job that nobody waits for


def opened(options: dict):
    """The model of a path: GGUF files in llama.cpp, other artefacts in the lab's engines."""
    path = Path(options["path"])
    file = path if path.suffix == ".gguf" else next(iter(sorted(path.glob("*.gguf"))), None)
    if file and file.is_file():
        from avalab.serve.workers.llama import Llama

        return Llama(
            file,
            context=options["context"],
            slots=options["slots"],
            threads=options["threads"],
            prefill_tokens=options["prefill_tokens"],
            prefix_bytes=options["prefix_bytes"],
        )
    from avalab.serve.workers.engine import EngineModel

    return EngineModel(path, context=options["context"], threads=options["threads"])


def _run(model, job: dict, tell: Callable[[dict], None], cancelled: set[int]) -> None:
    from avalab.serve.workers.llama import Cancelled

    name = job["id"]
    try:
        if job["op"] == "generate":
            end = model.generate(job, lambda event: tell({"id": name, **event}), lambda: name in cancelled)
        else:
            end = {"vectors": model.embed(job["texts"])} if job["op"] == "embed" else model.stats()
        tell({"id": name, "event": "done", **end})
    except Cancelled:
        tell({"id": name, "event": "cancelled"})
    except Exception as error:  # told to the server, which answers for it
        status = 400 if isinstance(error, InputError) else 500
        message = " ".join(str(error).split()) or type(error).__name__
        tell({"id": name, "event": "error", "status": status, "message": message[:1000]})
    finally:
        cancelled.discard(name)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
