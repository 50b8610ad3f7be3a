"""Where answers are kept: memory, disk and Redis, and what becomes of requests when one of them fails."""

import logging
import shutil
import socket
import sqlite3
import subprocess
import time

import pytest

from avalab.lab.errors import InputError
from avalab.serve.web import stores

redis = pytest.importorskip("redis", reason="the shared store needs the package redis: pip install -e '.[serve]'")


@pytest.fixture
def redis_server(tmp_path):
    """Debian's redis-server on a free port of loopback; (url, process)."""
    program = shutil.which("redis-server")
    if not program:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port) as client:
            for _ in range(200):
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0", process
    finally:
        process.kill()
        process.wait()


def test_memory_lets_go_of_what_was_used_longest_ago():
    memory = stores.Memory(10)
    memory.put("a", b"12345")
    memory.put("b", b"12345")
    assert memory.get("a") == b"12345"
    memory.put("c", b"12345")
    assert (memory.get("a"), memory.get("b"), memory.bytes) == (b"12345", None, 10)
    memory.put("d", b"x" * 11)  # larger than the whole
    assert memory.bytes == 0


def test_two_servers_share_one_folder(tmp_path):
    one, other = stores.Disk(tmp_path, 10**6), stores.Disk(tmp_path, 10**6)
    one.put("k", b"\x00value")
    assert other.get("k") == b"\x00value"
    one.close()
    other.close()


def test_disk_keeps_no_more_than_it_may(tmp_path):
    disk = stores.Disk(tmp_path, 1000)
    for at in range(100):
        disk.put(f"k{at}", b"x" * 100)
    assert disk.get("k0") is None
    assert disk.get("k99") == b"x" * 100
    assert disk._do("SELECT SUM(LENGTH(value)) FROM answers", ())[0][0] <= 1000 + 1000 // 8 + 100
    disk.close()


def test_a_disk_that_fails_means_a_miss_and_one_line_in_the_log(tmp_path, caplog):
    disk = stores.Disk(tmp_path, 10**6)
    disk.file.execute("PRAGMA max_page_count=3")  # as a full disk
    with caplog.at_level(logging.WARNING):
        for at in range(5):
            disk.put(f"k{at}", b"x" * 100_000)
        assert disk.get("k0") is None
    assert len(caplog.records) == 1
    disk.close()


def test_a_damaged_file_and_a_folder_that_is_a_file_are_refused_by_name(tmp_path):
    (tmp_path / stores.FILE).write_bytes(b"no database at all" * 100)
    with pytest.raises(InputError, match="cache_dir"):
        stores.Disk(tmp_path, 100)
    with pytest.raises(InputError, match="cache_dir"):
        stores.Disk(tmp_path / stores.FILE, 100)


def test_what_is_found_further_out_is_kept_nearer(tmp_path):
    memory, disk = stores.Memory(1000), stores.Disk(tmp_path, 1000)
    disk.put("k", b"v")
    layers = stores.Layers([memory, disk])
    assert [layers.get("k"), layers.get("k"), layers.get("none")] == [b"v", b"v", None]
    assert layers.stats() == {
        "hits": 2, "hits_by_store": {"memory": 1, "disk": 1}, "misses": 1, "hit_rate": 2 / 3, "entries": 1, "bytes": 1,
    }  # fmt: skip
    layers.close()
    with pytest.raises(sqlite3.ProgrammingError):
        disk.file.execute("SELECT 1")


def test_another_node_finds_the_same_bytes_in_redis_and_does_without_when_it_is_gone(redis_server, caplog):
    url, process = redis_server
    nodes = [stores.Layers([stores.Memory(1000), stores.Shared(url)]) for _ in range(2)]
    value = b'{"text": "\xc3\xa9"}'
    nodes[0].put("k", value)
    assert nodes[1].get("k") == value
    process.kill()
    process.wait()
    with caplog.at_level(logging.WARNING):
        for at in range(20):
            nodes[0].put(f"x{at}", b"1")
            assert nodes[1].get(f"x{at}") is None
    assert len(caplog.records) == 2  # one a node
    assert nodes[1].get("k") == value  # kept nearby
    for node in nodes:
        node.close()


def test_a_redis_that_was_gone_is_asked_again_later():
    clock = [0.0]
    shared = stores.Shared("redis://127.0.0.1:1/0", clock=lambda: clock[0])
    assert shared.get("k") is None
    assert shared.closed_until == stores.RETRY_SECONDS
    clock[0] = 6.0
    shared.get("k")
    assert shared.closed_until == 6 + stores.RETRY_SECONDS
    shared.close()


def test_a_url_that_is_none_is_refused():
    with pytest.raises(InputError, match="redis_url"):
        stores.Shared("nonsense")
