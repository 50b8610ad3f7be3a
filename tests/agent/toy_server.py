"""A small MCP server for the tests: `python toy_server.py MODE`."""

import sys
import time

mode = sys.argv[1]
if mode == "rubbish":
    print("this is not JSON-RPC", flush=True)
    sys.exit(0)
if mode == "hangs":
    time.sleep(60)

from mcp.server.mcpserver import MCPServer  # noqa: E402

server = MCPServer("toy")


@server.tool()
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def erase(path: str) -> str:
    """Erase a file."""
    return f"erased {path}"


@server.tool()
def slow() -> str:
    """Take long."""
    time.sleep(30)
    return "late"


@server.tool()
def fails() -> str:
    """Fail."""
    raise ValueError("it is broken")


@server.tool()
def long() -> str:
    """Say much."""
    return "x" * 100_000


if mode.startswith("http:"):
    server.run("streamable-http", host="127.0.0.1", port=int(mode.removeprefix("http:")))
else:
    server.run("stdio")
