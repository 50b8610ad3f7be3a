"""The same application as a Ray Serve deployment: replicas on the nodes of a cluster, requests sent to one of them.

1. Every replica builds the application of `web.app` and holds workers of its own; nothing of it knows of Ray. Answers
   are shared between nodes by Redis (`redis_url`), weights by whatever file system the nodes share.
2. A client that names the model in the header `serve_multiplexed_model_id` is sent to a replica that has it in memory:
   Ray's own model multiplexing. Without the header any replica answers.
3. The proxy binds to loopback. Ray's usage statistics are off: nothing leaves this machine.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from avalab.lab.errors import InputError, Unavailable
from avalab.serve.policy.settings import Settings
from avalab.serve.workers.pool import served

APPLICATION = "avalab"

HEADER = b"serve_multiplexed_model_id"


def library() -> Any:
    """Ray Serve. Raises Unavailable with the way to get it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from ray import serve
    except ImportError as error:
        raise Unavailable(f'--ray needs Ray Serve ({error}): pip install -e ".[ray]"') from None
    return serve


def bound(paths: Sequence[Path], settings: Settings, *, replicas: int = 1, processors: float = 1.0) -> Any:
    """The deployment, ready for `ray.serve.run`: each replica is given this many processors."""
    serve = library()
    served(paths)  # what is wrong with a path is said here, not in a replica's log
    files = [path.resolve() for path in paths]

    @serve.deployment(name=APPLICATION, num_replicas=replicas, ray_actor_options={"num_cpus": processors})
    @serve.ingress(_builder(files, settings))
    class Replica:
        """One copy of the application; how many models it keeps is settled by memory, not by Ray."""

        @serve.multiplexed(max_num_models_per_replica=len(files))
        async def has_model(self, name: str) -> str:
            return name

    return Replica.bind()


def _builder(files: Sequence[Path], settings: Settings) -> Callable:
    """A function that makes the application, called in each replica."""

    def build() -> Callable:
        from avalab.serve.web.app import create_app

        return create_app(served(files), settings)

    return build


def start(paths: Sequence[Path], settings: Settings, *, port: int, replicas: int = 1, processors: float = 1.0) -> str:
    """Run the deployment on the Ray that this process is connected to, or on a new one here; its address."""
    serve = library()
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(bound(paths, settings, replicas=replicas, processors=processors), name=APPLICATION, route_prefix="/")
    return f"http://127.0.0.1:{port}"


def serve_on_ray(paths: Sequence[Path], settings: Settings, *, port: int, replicas: int) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises Unavailable without Ray, InputError where the port cannot be had."""
    serve = library()
    try:
        address = start(paths, settings, port=port, replicas=replicas)
    except RuntimeError as error:
        raise InputError(f"Ray Serve did not start on port {port}: {str(error).splitlines()[0]}") from error
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    print(f"{replicas} replicas at {address}/v1 (end with Ctrl-C)", flush=True)
    try:
        ended.wait()
    finally:
        serve.shutdown()
