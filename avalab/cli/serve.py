"""The sub-command that serves models over HTTP, in OpenAI's form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli import options
from avalab.lab import artifacts
from avalab.lab.errors import InputError
from avalab.lab.run import Run


def serve(
    models: Annotated[list[Path], typer.Option(help="GGUF files or artefact folders, as in --models A B C.")],
    more: Annotated[list[Path] | None, typer.Argument(help="Further models.", metavar="[MODEL]...")] = None,
    host: Annotated[str, typer.Option(help="Address; beyond this machine an API key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any and says which.")] = 8000,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes of a model, at most.")] = None,
    memory: Annotated[str, typer.Option(help="Memory of all models, such as 4GiB.")] = "",
    config: Annotated[Path | None, typer.Option(help="Settings, .toml or .json; options overrule them.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="As a Ray Serve deployment with --workers replicas.")] = False,
) -> None:
    """Serve models to OpenAI clients: batched, cached, several models in limited memory."""
    from avalab.serve.policy.settings import read_settings, size_bytes
    from avalab.serve.web.listen import serve

    settings = read_settings(
        config,
        workers=workers,
        max_memory_mb=size_bytes(memory) / 2**20 if memory else None,
        api_key=os.environ.get("AVALAB_API_KEY"),
    )
    paths = [_servable(path) for path in (*models, *(more or ()))]
    if ray:
        if host != "127.0.0.1":
            raise InputError(f"--host {host} and --ray exclude each other: Ray's proxy binds to 127.0.0.1 here")
        from avalab.serve.cluster import serve_on_ray

        serve_on_ray(paths, settings, port=port, replicas=workers or 1)
        return
    serve(paths, settings, host=host, port=port)


def _servable(path: Path) -> Path:
    """A file or artefact as it is; of a model's folder the artefact that is made of it once."""
    options.readable(path)
    if path.is_file() or (path / artifacts.CARD).is_file() or any(path.glob("*.gguf")):
        return path
    return options.source_artifact(path, Run("avalab_serve")).path
