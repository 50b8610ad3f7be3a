"""A server on an address: refused where it would be open to others without a key, drained when it is told to end."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from avalab.lab.errors import InputError, Unavailable
from avalab.serve.policy.settings import Settings
from avalab.serve.web import addresses
from avalab.serve.workers.pool import served

CONNECTIONS = 1024


def serve(paths: Sequence[Path], settings: Settings, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answer requests until SIGTERM or Ctrl-C; what is being answered then is finished first.

    Raises InputError for an address beyond this machine without a key, or one that is taken.
    """
    check_address(host, settings.api_key)
    models = served(paths)
    try:
        import uvicorn

        from avalab.serve.web.app import DRAIN_SECONDS, create_app
    except ImportError as error:
        raise Unavailable(f'serving needs {error.name}: pip install -e ".[serve]"') from None
    app = create_app(models, settings)
    bound = _bound(host, port)
    address = bound.getsockname()
    print(f"{', '.join(models)} at http://{host}:{address[1]}/v1 (figures at /, end with Ctrl-C)", flush=True)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", loop="asyncio", http="h11",
        limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=int(DRAIN_SECONDS), server_header=False,
        timeout_keep_alive=30,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.run(sockets=[bound])
    if not server.started:
        raise InputError("the server did not start; its log says why")


def check_address(host: str, key: str) -> None:
    """Raise InputError for an address that others reach, where no key is needed."""
    if not addresses.is_loopback(host) and not key:
        raise InputError(
            f"--host {host} is open to other machines; set api_key in --config or AVALAB_API_KEY, or stay on 127.0.0.1"
        )


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises InputError for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise InputError(f"{host}:{port} cannot be listened on: {error}; give another --port (0: any)") from None
    return bound
