"""What the tests of serving share: the tiny model as a GGUF file, and servers as processes of their own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from avalab.lab.run import ROOT

TINY = ROOT / "data" / "tiny-llama"

START_SECONDS = 120


@dataclass
class Server:
    """A running `avalab serve`: its address, its process and its log."""

    url: str
    process: subprocess.Popen
    log: object
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def ask(self, text: str = "hello", **more) -> httpx.Response:
        """A chat of one message to the tiny model."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 8, **more}
        return self.client.post("/v1/chat/completions", json=body)

    def metrics(self) -> dict:
        """What the batches are like."""
        return self.client.get("/api/v1/batch/metrics").json()

    def lines(self) -> list[dict]:
        """The log so far."""
        self.log.seek(0)
        return [json.loads(line) for line in self.log.read().splitlines() if line.startswith("{")]


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """The tiny model as `tiny.gguf`."""
    pytest.importorskip("xllamacpp", reason="GGUF files are served by xllamacpp: pip install -e '.[lab]'")
    pytest.importorskip("uvicorn", reason="serving needs FastAPI and uvicorn: pip install -e '.[serve]'")
    from avalab.engines import gguf

    folder = tmp_path_factory.mktemp("gguf")
    gguf.export(TINY, folder / "tiny.gguf", "f16")
    return folder / "tiny.gguf"


@pytest.fixture(scope="session")
def started():
    """A context that starts `avalab serve` with models, settings and environment, and ends it."""

    @contextmanager
    def start(*models, environment=(), **settings):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
            config = Path(folder) / "settings.json"
            small = {"context": 768, "threads": 1, "max_batch_size": 4, "prefill_tokens": 64}
            config.write_text(json.dumps(small | settings))
            command = ["-m", "avalab.cli", "serve", "--port", "0", "--config", str(config)]
            process = subprocess.Popen(
                [sys.executable, *command, "--models", *map(str, models)],
                stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | dict(environment), cwd=ROOT,
            )  # fmt: skip
            try:
                line = process.stdout.readline()
                log.seek(0)
                assert "http://" in line, log.read()
                server = Server(line.split(" at ")[1].split("/v1")[0], process, log)
                end = time.monotonic() + START_SECONDS
                while time.monotonic() < end:
                    try:
                        server.client.get("/health")
                        break
                    except httpx.TransportError:
                        time.sleep(0.05)
                yield server
                server.client.close()
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(40)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
                process.stdout.close()

    return start


@pytest.fixture(scope="module")
def server(started, tiny_gguf):
    """One server on the tiny model."""
    with started(tiny_gguf) as running:
        yield running
