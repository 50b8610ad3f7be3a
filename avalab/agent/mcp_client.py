"""Tools of other people's MCP servers, over stdio and HTTP, within what a person allowed.

1. A file names the servers: `{"servers": {"files": {"command": "...", "args": [...], "allow": ["read"],
   "confirm": ["write"]}}}`, or `"url"` in place of `"command"`. Only what stands in `allow` or `confirm` is ever
   offered to a model; what stands in `confirm` is asked about each time. What a server says of its own tools (such as
   that they only read) decides nothing.
2. A tool's name begins with its server's, `files.read`, so that no server can take the place of another's tool.
3. A call has `seconds`, its arguments and its result have sizes. A server that hangs, answers rubbish or dies makes the
   call fail with a reason that the model reads; while a server is connected to, it is a line for the person.

Needs the package mcp (extra `agent`). Source: the Model Context Protocol, 2026-07-28 and before.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

from avalab.agent.retrieval.index import Index
from avalab.agent.toolkit import INSTALL, Tool, perform
from avalab.data import gates
from avalab.data.calls import Call
from avalab.lab import statistics
from avalab.lab.errors import InputError, LabError, MissingFile, ProcessFailed, Unavailable
from avalab.lab.run import Record, Run
from avalab.serve.tools import shortened

CONNECT_SECONDS, CALL_SECONDS = 20.0, 30.0

ARGUMENT_BYTES, RESULT_CHARACTERS = 64 << 10, 4000

MOST_PAGES = 20  # of a list of tools

NAME = re.compile(r"[A-Za-z][\w-]{0,31}")

FIELDS = {"command", "args", "env", "cwd", "url", "allow", "confirm"}


@dataclass(frozen=True)
class Server:
    """A server: how it is started or where it listens, and which of its tools a model may call."""

    name: str
    command: str = ""
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = ""
    url: str = ""
    allow: tuple[str, ...] = ()
    confirm: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """How a message names it."""
        return f"MCP server {self.name!r} ({self.url or self.command})"


def read_servers(path: Path | str) -> list[Server]:
    """The servers of a file. Raises InputError naming the file and the server that cannot be used."""
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"there is no file of MCP servers {path}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["servers"]
        items = list(rows.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{path} is not {{"servers": {{name: {{...}}}}}}: {error}') from error
    return [_server(path, name, row) for name, row in items]


def _server(path: Path, name: str, row: object) -> Server:
    where = f"{path}, server {name!r}"
    if not NAME.fullmatch(name):
        raise InputError(f"{where}: a name has letters, digits, - and _, at most 32")
    if not isinstance(row, dict) or set(row) - FIELDS:
        raise InputError(f"{where}: known are {', '.join(sorted(FIELDS))}; got {str(row)[:80]}")
    if bool(row.get("command")) == bool(row.get("url")):
        raise InputError(f"{where}: give either command (started here) or url (it listens there)")
    if row.get("url") and not str(row["url"]).startswith(("http://", "https://")):
        raise InputError(f"{where}: url {row['url']!r} is neither http:// nor https://")
    for each in ("args", "allow", "confirm"):
        if not isinstance(row.get(each, []), list) or not all(isinstance(text, str) for text in row.get(each, [])):
            raise InputError(f"{where}: {each} is a list of texts, got {row[each]!r}")
    if not row.get("allow") and not row.get("confirm"):
        raise InputError(f"{where}: nothing is allowed; name its tools in allow, or in confirm to be asked")
    env = tuple((str(key), str(value)) for key, value in dict(row.get("env") or {}).items())
    lists = {each: tuple(row.get(each, ())) for each in ("args", "allow", "confirm")}
    return Server(
        name, str(row.get("command", "")), env=env, cwd=str(row.get("cwd", "")), url=row.get("url", ""), **lists
    )


@contextmanager
def connected(
    servers: Sequence[Server], *, connect_seconds: float = CONNECT_SECONDS, call_seconds: float = CALL_SECONDS
) -> Iterator[list[Tool]]:
    """The allowed tools of servers, which are connected as long as the block lasts.

    Raises Unavailable without the package, ProcessFailed for a server that does not answer as one, InputError for an
    allowed tool that a server does not have, or has twice, or two servers of one name.
    """
    try:
        import anyio.from_thread
        from mcp import Client
    except ImportError as error:
        raise Unavailable(f"MCP servers need the package mcp; install it: {INSTALL}") from error
    if twice := {s.name for s in servers if [o.name for o in servers].count(s.name) > 1}:
        raise InputError(f"two MCP servers are called {', '.join(sorted(twice))}; rename one")
    with ExitStack() as stack:
        portal = stack.enter_context(anyio.from_thread.start_blocking_portal())
        tools: list[Tool] = []
        for server in servers:
            errors = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            client = Client(_transport(server, errors), read_timeout_seconds=call_seconds)
            try:
                session = stack.enter_context(_bounded(portal, client, connect_seconds))
                offered = portal.call(partial(_listed, session, connect_seconds))
            except LabError:
                raise
            except BaseException as error:  # of asyncio's groups, too
                why = f"{_why(error, connect_seconds)}{_last_line(errors)}"
                raise ProcessFailed(f"{server.shown} does not answer as one: {why}") from error
            tools += _allowed(server, offered, partial(_called, portal, session, call_seconds))
        yield tools


def _transport(server: Server, errors: TextIO) -> object:
    """How a server is reached; what a process says on stderr goes to a file, as a notebook has no stderr for it."""
    if server.url:
        return server.url
    from mcp import StdioServerParameters, stdio_client

    parameters = StdioServerParameters(
        command=server.command, args=list(server.args), env=dict(server.env) or None, cwd=server.cwd or None
    )
    return stdio_client(parameters, errlog=errors)


def _last_line(errors: TextIO) -> str:
    errors.seek(0)
    lines = errors.read().strip().splitlines()
    return f"; it said: {lines[-1][:200]}" if lines else ""


@contextmanager
def _bounded(portal: object, client: object, seconds: float) -> Iterator[object]:
    """The client, entered within some seconds, in the loop of another thread."""
    import anyio

    @asynccontextmanager
    async def entered():
        with anyio.fail_after(seconds) as limit:
            async with client as session:
                limit.deadline = float("inf")
                yield session

    raised = None
    with portal.wrap_async_context_manager(entered()) as session:
        try:
            yield session
        except BaseException as error:  # raised outside, where no group of asyncio's tasks wraps it
            raised = error
    if raised is not None:
        raise raised


async def _listed(session: object, seconds: float) -> list:
    import anyio

    found, cursor = [], None
    with anyio.fail_after(seconds):
        for _ in range(MOST_PAGES):
            page = await session.list_tools(cursor=cursor)
            found += page.tools
            cursor = page.next_cursor
            if not cursor:
                return found
    raise InputError(f"a list of tools has more than {MOST_PAGES} pages")


def _allowed(server: Server, offered: list, call: object) -> list[Tool]:
    """The tools that a person allowed, checked as every other one's schema is."""
    names = [tool.name for tool in offered]
    tools = []
    for name in dict.fromkeys([*server.allow, *server.confirm]):
        if names.count(name) != 1:
            what = "has no tool" if name not in names else "offers twice the tool"
            raise InputError(f"{server.shown} {what} {name!r}; it offers {', '.join(sorted(set(names))) or 'none'}")
        tool = offered[names.index(name)]
        described = {
            "name": f"{server.name}.{name}",
            "description": shortened(" ".join((tool.description or name).split()), 300),
            "parameters": tool.input_schema,
        }
        try:
            gates.checked_schema(described)
        except ValueError as error:
            raise InputError(f"{server.shown}, tool {name!r}: {error}") from error
        tools.append(Tool(**described, run=partial(_run, call, name), writes=name in server.confirm))
    return tools


def _run(call: object, name: str, **arguments: object) -> str:
    if len(json.dumps(arguments)) > ARGUMENT_BYTES:
        raise InputError(f"the arguments of {name} are longer than {ARGUMENT_BYTES:,} bytes")
    return call(name, arguments)


def _called(portal: object, session: object, seconds: float, name: str, arguments: dict) -> str:
    """The text of a result. Raises ProcessFailed where there is none."""
    try:
        result = portal.call(partial(session.call_tool, name, arguments, read_timeout_seconds=seconds))
    except Exception as error:
        raise ProcessFailed(f"{name} gave no result: {_why(error, seconds)}") from error
    parts = [getattr(block, "text", None) or f"({block.type})" for block in result.content]
    text = shortened("\n".join(parts), RESULT_CHARACTERS)
    if result.is_error:
        raise ProcessFailed(text or f"{name} failed and does not say why")
    return text or json.dumps(result.structured_content)


def _why(error: BaseException, seconds: float) -> str:
    """The first line of what is at the bottom of an exception, or of a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return f"no answer within {seconds:g} s"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def record_calls(run: Run, index: Path, asked: Sequence[str]) -> Record:
    """The share of calls to the lab's own server, over stdio, that give what the index gives, and each call's time."""
    name = "search_documents"
    arguments = ("-m", "avalab.cli", "mcp", "--folder", str(index.parent), "--documents", str(index))
    env = tuple((key, value) for key, value in os.environ.items() if key.startswith(("AVALAB", "PYTHON")))
    server = Server("lab", sys.executable, arguments, env=env, allow=(name,))
    direct, right, times = Index.existing(index), 0, []
    try:
        with connected([server], connect_seconds=60.0) as tools:
            for question in asked:
                began = time.perf_counter()
                said = perform(tools, Call(f"lab.{name}", {"question": question, "most": 1}))
                times.append(1000 * (time.perf_counter() - began))
                right += not said.failed and all(piece.name in said.text for piece in direct.search(question, 1))
    except (Unavailable, ProcessFailed) as error:
        return run.record("lab.search_documents", "valid_calls", None, "1", note=str(error))
    finally:
        direct.close()
    share = statistics.wilson(right, len(asked))
    return run.record("lab.search_documents", "valid_calls", unit="1", samples=times, **vars(share))
