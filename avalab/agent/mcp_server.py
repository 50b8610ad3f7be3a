"""The lab as an MCP server: show, compare and compress models, search documents, over stdio or HTTP on loopback.

A tool that computes runs the command of the same name in a process of its own, below one folder: what the process says
on stderr becomes progress, and a call that is cancelled ends the process and its children. What writes (`compress`) is
offered only where the person who started the server says so, and writes below that folder only.

Needs the package mcp (extra `agent`).
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from avalab.agent.retrieval.index import Index
from avalab.agent.toolkit import INSTALL
from avalab.lab.errors import InputError, LabError, Unavailable
from avalab.lab.run import child_environment

NAME = "avalab"

SECONDS = 3600.0  # of a command

OUTPUT_CHARACTERS = 20_000

PROGRESS_SECONDS = 0.5  # at most one report in this time


@dataclass(frozen=True)
class Settings:
    """Where commands run, what is searched, and whether a client may write."""

    folder: Path
    index: Path | None = None
    writes: bool = False
    seconds: float = SECONDS
    command: Sequence[str] = (sys.executable, "-m", "avalab.cli")


def inside(folder: Path, name: str) -> str:
    """A path below the folder, as a command takes it. Raises InputError for one outside, or an option."""
    root = folder.resolve()
    if not name or name.startswith("-") or not (root / name).resolve().is_relative_to(root):
        raise InputError(f"{name!r} is not a path below the server's folder")
    return name


def model_name(folder: Path, name: str) -> str:
    """A model's name: a path below the folder, or the name of an asset or of a hub's model."""
    if not name or name.startswith(("-", "/", "~")) or ".." in Path(name).parts:
        raise InputError(f"{name!r} is no model's name; give a folder below the server's, or an asset's name")
    return inside(folder, name) if (folder / name).exists() else name


def make(settings: Settings) -> object:
    """The server. Raises Unavailable without the package mcp, LabError for an index that cannot be opened."""
    try:
        from mcp.server.mcpserver import Context, MCPServer
        from mcp.server.mcpserver.exceptions import ToolError
    except ImportError as error:
        raise Unavailable(f"the lab's MCP server needs the package mcp; install it: {INSTALL}") from error
    server, folder = (
        MCPServer(NAME, instructions="Make language models smaller and measure what that costs."),
        settings.folder,
    )

    async def ran(ctx: Context, *arguments: str) -> str:
        try:
            return await run_command(settings, arguments, ctx.report_progress)
        except LabError as error:
            raise ToolError(str(error)) from error

    def checked(check: object, *given: str) -> list[str]:
        try:
            return [check(folder, name) for name in given]
        except LabError as error:
            raise ToolError(str(error)) from error

    @server.tool(description="Say what an artefact is made of: base, recipe, bytes by component.")
    async def show(artifact: str, ctx: Context) -> str:
        return await ran(ctx, "show", *checked(inside, artifact))

    @server.tool(description="Say which of two artefacts is better at a task (text, bfcl), or whether none is.")
    async def compare(first: str, second: str, task: str, ctx: Context) -> str:
        return await ran(ctx, "compare", *checked(inside, first, second), "--task", *checked(_word, task))

    if settings.writes:

        @server.tool(description="Make a model smaller (method ava, nf4, gptq, ...) and write it to a new folder.")
        async def compress(model: str, method: str, out: str, ctx: Context, size: str = "") -> str:
            given = ["--model", *checked(model_name, model), "--method", *checked(_word, method)]
            given += ["--out", *checked(inside, out), *(["--bytes", *checked(_word, size)] if size else [])]
            return await ran(ctx, "quantize", *given)

    if settings.index:
        index = Index.existing(settings.index)

        @server.tool(description="Search the documents; gives the passages that fit best, with their names.")
        def search_documents(question: str, most: int = 5) -> str:
            found = index.search(question, max(1, min(most, 20)))
            return "\n\n".join(f"[{piece.name}] {piece.heading}\n{piece.text}" for piece in found) or "nothing found"

    return server


def _word(folder: Path, text: str) -> str:
    """An option's value: letters, digits and a few signs, no option itself."""
    if not text or text.startswith("-") or not all(sign.isalnum() or sign in "._,-" for sign in text):
        raise InputError(f"{text!r} is no value that this tool takes")
    return text


async def run_command(settings: Settings, arguments: Sequence[str], report: object) -> str:
    """What a command of the lab prints. `report(progress, total, message)` hears each line of its stderr.

    Raises InputError with the command's last line where it fails, or takes too long; a cancelled call ends it.
    """
    import anyio

    began, errors, out = time.monotonic(), [], bytearray()
    environment = {**child_environment(), "PYTHONUNBUFFERED": "1"}
    process = await anyio.open_process(
        [*settings.command, *arguments], cwd=settings.folder, env=environment, start_new_session=True, stdin=None
    )

    async def hear() -> None:
        said, pending = 0.0, b""
        async for chunk in process.stderr:
            *lines, pending = (pending + chunk).replace(b"\r", b"\n").split(b"\n")
            errors.extend(line.decode(errors="replace").strip() for line in lines if line.strip())
            del errors[:-50]
            now = time.monotonic()
            if errors and now - said > PROGRESS_SECONDS:
                said = now
                await report(now - began, None, errors[-1][:200])

    async def collect() -> None:
        async for chunk in process.stdout:
            if len(out) < OUTPUT_CHARACTERS:
                out.extend(chunk)

    try:
        with anyio.fail_after(settings.seconds):
            async with anyio.create_task_group() as group:
                group.start_soon(hear)
                group.start_soon(collect)
            code = await process.wait()
    except TimeoutError:
        raise InputError(f"{arguments[0]} took longer than {settings.seconds:g} s and was ended") from None
    finally:  # also of a call that is cancelled
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with anyio.CancelScope(shield=True):
            await process.aclose()
    if code:
        raise InputError(errors[-1] if errors else f"{arguments[0]} ended with code {code}")
    return out.decode(errors="replace")[:OUTPUT_CHARACTERS].strip()


def serve(settings: Settings, *, port: int = 0) -> None:
    """Run the server until its client leaves: over stdio, or with a port over HTTP on loopback."""
    server = make(settings)
    if port:
        server.run("streamable-http", host="127.0.0.1", port=port)
    else:
        server.run("stdio")
