"""Two servers to compare, as processes of their own on loopback: ours, and llama.cpp's through xllamacpp."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from avalab.lab.errors import ProcessFailed, Unavailable
from avalab.lab.run import ROOT, child_environment

OURS, PEER = "avalab", "llama.cpp"

START_SECONDS, ASK_SECONDS = 120.0, 600.0

ANSWER_TOKENS = 8

PEER_PROGRAM = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
p.cont_batching = p.kv_unified = p.use_jinja = True
p.verbosity = -1
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Running:
    """A server that answers: its name in records, its address, and the model's name in requests."""

    name: str
    client: httpx.Client
    model: str
    process: subprocess.Popen

    def chat(self, text: str, *, system: str = "", tokens: int = ANSWER_TOKENS, **more) -> dict:
        """The answer to a chat. Raises ProcessFailed for any but a good one."""
        messages = [{"role": "system", "content": system}] if system else []
        body = {
            "model": self.model, "messages": [*messages, {"role": "user", "content": text}], "max_tokens": tokens,
            "temperature": 0, **more,
        }  # fmt: skip
        found = self.client.post("/v1/chat/completions", json=body)
        if found.status_code != 200:
            raise ProcessFailed(f"{self.name} answered {found.status_code}: {found.text[:300]}")
        return found.json()

    def first_token_s(self, text: str, **more) -> float:
        """Seconds to the first token of a stream."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "max_tokens": 2, "stream": True}
        began = time.perf_counter()
        with self.client.stream("POST", "/v1/chat/completions", json={**body, "temperature": 0, **more}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {") and (json.loads(line[6:])["choices"] or [{}])[0].get("delta", {}).get(
                    "content"
                ):
                    break
            return time.perf_counter() - began


@contextlib.contextmanager
def ours(file: Path, settings: dict) -> Iterator[Running]:
    """`avalab serve` on a GGUF file."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "settings.json"
        config.write_text(json.dumps(settings | {"log_file": str(Path(folder) / "requests.log")}))
        command = ["-m", "avalab.cli", "serve", "--port", "0", "--config", str(config), "--models", str(file)]
        with _process(command) as process:
            line = process.stdout.readline() if process.stdout else ""
            yield from _ready(OURS, process, line.partition(" at ")[2].partition("/v1")[0], file.stem)


@contextlib.contextmanager
def peer(file: Path, *, context: int, slots: int, threads: int) -> Iterator[Running]:
    """llama.cpp's server on a GGUF file."""
    with _process(["-c", PEER_PROGRAM, str(file), str(context * slots), str(slots), str(threads)]) as process:
        line = process.stdout.readline().strip() if process.stdout else ""
        yield from _ready(PEER, process, line, file.stem)


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=child_environment() | {"PYTHONPATH": str(ROOT)}, cwd=ROOT,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()


def _ready(name: str, process: subprocess.Popen, address: str, model: str) -> Iterator[Running]:
    if not address.startswith("http"):
        raise Unavailable(f"the server {name} did not start")
    with httpx.Client(base_url=address, timeout=ASK_SECONDS, trust_env=False) as client:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health").status_code == 200:
                    break
            time.sleep(0.02)
        yield Running(name, client, model, process)


def at_once(jobs: Sequence[Callable[[], dict]]) -> tuple[float, list[dict]]:
    """Seconds until all jobs, begun together, are done; and what they return, in their order."""
    with ThreadPoolExecutor(len(jobs)) as beside:
        began = time.perf_counter()
        found = [made.result() for made in [beside.submit(job) for job in jobs]]
        return time.perf_counter() - began, found
