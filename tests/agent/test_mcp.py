"""MCP: other people's tools within what was allowed, and the lab as a server."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mcp", reason="MCP needs the extra `agent`")

import anyio
import mcp

from avalab.agent import mcp_client, mcp_server, toolkit
from avalab.agent.mcp_client import Server
from avalab.agent.mcp_server import Settings
from avalab.agent.retrieval.index import Index
from avalab.data.calls import Call
from avalab.lab.errors import InputError, ProcessFailed

TOY = str(Path(__file__).with_name("toy_server.py"))


def toy(mode: str = "stdio", **lists) -> Server:
    return Server("toy", sys.executable, (TOY, mode), **({"allow": ("add",)} | lists))


def test_allowed_tools_are_called_and_no_others(tmp_path):
    servers = [toy(allow=("add", "fails", "long"), confirm=("erase",))]
    with mcp_client.connected(servers) as tools:
        assert [tool.name for tool in tools] == ["toy.add", "toy.fails", "toy.long", "toy.erase"]
        answers = [toolkit.perform(tools, Call("toy.add", {"a": n, "b": 1})) for n in range(100)]
        assert [int(each.text) for each in answers] == list(range(1, 101))
        assert "no tool 'toy.slow'" in toolkit.perform(tools, Call("toy.slow", {})).text
        assert toolkit.perform(tools, Call("toy.add", {"a": "x", "b": 1})).failed
        assert "does not allow" in toolkit.perform(tools, Call("toy.erase", {"path": "/"})).text
        erased = toolkit.perform(tools, Call("toy.erase", {"path": "a"}), confirm=lambda *_: True)
        assert erased.text == "erased a"
        assert toolkit.perform(tools, Call("toy.fails", {})).failed
        assert len(toolkit.perform(tools, Call("toy.long", {})).text) <= mcp_client.RESULT_CHARACTERS


def test_a_call_that_takes_too_long_fails_with_the_time_and_the_next_one_works():
    with mcp_client.connected([toy(allow=("slow", "add"))], call_seconds=1.0) as tools:
        began = time.monotonic()
        assert toolkit.perform(tools, Call("toy.slow", {})).failed
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("mode", ["rubbish", "hangs"])
def test_a_server_that_does_not_answer_as_one_is_named(mode):
    with (
        pytest.raises(ProcessFailed, match=r"'toy'.*does not answer as one"),
        mcp_client.connected([toy(mode)], connect_seconds=3.0),
    ):
        pass


def test_a_tool_that_a_server_does_not_have_and_two_servers_of_a_name_are_refused():
    with pytest.raises(InputError, match="has no tool 'rm'"), mcp_client.connected([toy(allow=("rm",))]):
        pass
    with pytest.raises(InputError, match="two MCP servers are called toy"), mcp_client.connected([toy(), toy()]):
        pass
    with (
        pytest.raises(ProcessFailed, match="does not answer"),
        mcp_client.connected([Server("none", "/no/such/program", allow=("x",))]),
    ):
        pass


def test_a_server_over_http_is_used_as_one_over_stdio():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = subprocess.Popen([sys.executable, TOY, f"http:{port}"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        with mcp_client.connected([Server("toy", url=f"http://127.0.0.1:{port}/mcp", allow=("add",))]) as tools:
            assert toolkit.perform(tools, Call("toy.add", {"a": 2, "b": 3})).text == "5"
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "give either command"),
        ({"command": "x", "url": "http://a"}, "give either command"),
        ({"command": "x"}, "nothing is allowed"),
        ({"url": "ftp://a", "allow": ["b"]}, "url 'ftp://a' is neither http"),
        ({"command": "x", "allow": "b"}, "allow is a list"),
        ({"command": "x", "alow": ["b"]}, "known are"),
        ([], "known are"),
    ],
)
def test_a_server_that_cannot_be_used_is_named_with_its_file(tmp_path, row, said):
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"servers": {"one": row}}))
    with pytest.raises(InputError, match=rf"servers\.json, server 'one': {said}"):
        mcp_client.read_servers(file)


def test_a_file_of_servers_is_read(tmp_path):
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"servers": {"one": {"command": "x", "args": ["y"], "allow": ["a"], "confirm": ["b"]}}}))
    (server,) = mcp_client.read_servers(file)
    assert (server.command, server.args, server.allow, server.confirm) == ("x", ("y",), ("a",), ("b",))


# --- the lab as a server ---------------------------------------------------------------------------------------------

FAKE = """
import sys, time
print(*sys.argv[1:])
for n in range(int(sys.argv[-1]) if sys.argv[-1].isdigit() else 1):
    print("step", n, file=sys.stderr, flush=True)
    time.sleep(0.3)
"""


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "small").mkdir()
    page = tmp_path / "tea.md"
    page.write_text("# Tea\nGreen tea is brewed at 80 degrees.\n")
    index = Index(tmp_path / "i.sqlite")
    index.build(page)
    index.close()
    return Settings(tmp_path, tmp_path / "i.sqlite", writes=True, command=(sys.executable, "-c", FAKE))


def called(settings, name, arguments, **options):
    async def ask():
        async with mcp.Client(mcp_server.make(settings)) as client:
            return await client.call_tool(name, arguments, **options)

    return anyio.run(ask)


def test_the_lab_runs_its_commands_below_its_folder_and_searches(settings):
    assert called(settings, "show", {"artifact": "small"}).content[0].text == "show small"
    arguments = {"model": "small", "method": "nf4", "out": "new", "size": "80MB"}
    ran = called(settings, "compress", arguments).content[0].text
    assert ran == "quantize --model small --method nf4 --out new --bytes 80MB"
    assert "80 degrees" in called(settings, "search_documents", {"question": "green tea"}).content[0].text


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("show", {"artifact": "../secret"}),
        ("show", {"artifact": "--help"}),
        ("compress", {"model": "/etc", "method": "nf4", "out": "x"}),
        ("compress", {"model": "small", "method": "nf4", "out": "../x"}),
        ("compress", {"model": "small", "method": "--out", "out": "x"}),
    ],
)
def test_no_path_leaves_the_servers_folder_and_no_value_is_an_option(settings, name, arguments):
    assert called(settings, name, arguments).is_error


def test_a_server_that_may_not_write_does_not_offer_to(settings):
    async def names():
        async with mcp.Client(mcp_server.make(Settings(settings.folder))) as client:
            return {tool.name for tool in (await client.list_tools()).tools}

    assert anyio.run(names) == {"show", "compare"}


def test_a_long_command_reports_its_progress(settings):
    heard = []

    async def hear(progress, total, message):
        heard.append(message)

    (settings.folder / "4").mkdir()
    called(settings, "show", {"artifact": "4"}, progress_callback=hear)
    assert len(heard) >= 2
    assert all(message.startswith("step") for message in heard)


def test_a_cancelled_call_ends_the_process(settings):
    program = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    slow = Settings(settings.folder, command=(sys.executable, "-c", program))

    async def cancelled():
        with anyio.move_on_after(5):
            await mcp_server.run_command(slow, ["show"], lambda *_: None)

    began = time.monotonic()
    anyio.run(cancelled)
    assert time.monotonic() - began < 15
    pid = int((settings.folder / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_command_that_fails_says_its_last_line(settings):
    bad = Settings(settings.folder, command=(sys.executable, "-c", "import sys; sys.exit('avalab: no such artefact')"))
    result = called(bad, "show", {"artifact": "small"})
    assert result.is_error
    assert "avalab: no such artefact" in result.content[0].text
