"""A process in which model-written Python can do no harm, and HumanEval answers judged with it.

The code runs with an empty environment, closed input and a temporary folder. Around it lie the layers that the machine
allows; `layers()` names the active ones and every `Outcome` carries them:

- `limits`: resource limits for CPU time, address space, file size, open files, processes (setrlimit), and wall time.
- `namespaces`: own process tree (all of it ends with its first process), network without interfaces, IPC, host name
  (bubblewrap where `bwrap` is installed and works, else unshare; without root inside a user namespace).
- `root`: own file system: Python's library and /usr read-only, a small tmpfs to work in (bubblewrap, else mount and
  chroot).
- `landlock`: reading only below those folders, writing only in the temporary folder, no TCP (Linux >= 5.13).
- `user`: user and group `nobody` when started as root, and no capabilities.
- `seccomp`: system calls for sockets, processes, signals, tracing, mounts, keys and shared memory fail (x86-64).
- `audit`: Python's own events for the same; easily evaded, it explains and covers systems without the rest.

Each layer is tried alone: one that the system refuses is left out, not an error, so look at `layers()` before running
code that might be hostile: one of `namespaces` and `seccomp` and one of `root` and `landlock` is the least. Outside
Linux there are `limits` and `audit` only. Not covered: bugs in the kernel or in Python; side channels; reading /usr and
Python's library; without `root`, a disk full of many small files; without `namespaces` and `seccomp`, processes that
detach themselves; code that inspects its own interpreter to report success (a HumanEval pass means "no accident").
Sources: the manual pages bwrap(1), landlock(7), seccomp(2), namespaces(7), capabilities(7); Chen et al. (2021).
"""

from __future__ import annotations

import ctypes
import gzip
import json
import math
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

if __name__ != "__main__":  # in the sandbox this file is run alone, without the package
    from avalab.lab.errors import InputError, MissingFile

FILE_BYTES = 4 << 20  # of one file, standard output included

SMALL = f"size={16 << 20},nr_inodes=2000"  # the temporary folder, where `root` is active

OUTPUT_CHARACTERS = 20_000

STARTUP_SECONDS = 10  # on top of the time limit, for a busy machine to start the process

NOBODY = 65534

# Exit codes of the confined process; FINISHED is not 0, so that a stray exit() is no success.
FINISHED, FAILED, OUT_OF_MEMORY = 113, 1, 114

# x86-64 numbers. Processes and threads (56, 435) are treated apart.
DENIED_CALLS = {
    "network": (41, 42, 43, 44, 46, 49, 50, 53, 288, 307),
    "processes": (57, 58, 59, 322),
    "signals": (62, 129, 200, 234, 297, 424, 434, 438),
    "tracing": (101, 298, 310, 311, 312, 321, 323, 440),
    "file systems": (155, 161, 165, 166, 272, 308, 428, 429, 430, 431, 432, 433, 442, 133, 259, 300, 303, 304),
    "shared memory, queues, io_uring, keys": (29, 30, 64, 68, 240, 248, 249, 250, 319, 425, 426, 427, 447),
    "system": (103, 135, 159, 163, 164, 167, 168, 169, 170, 171, 172, 173, 175, 176, 179, 227, 246, 305, 313, 320),
}

DENIED_EVENTS = ("socket.", "subprocess.", "ctypes.", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.system")

INSIDE = "/sandbox.py"  # this file, where bubblewrap shows it

LAYERS = ("limits", "namespaces", "root", "landlock", "user", "seccomp", "audit")


@dataclass(frozen=True)
class Outcome:
    """How the code ended: `finished` (ran to its end), `error`, `timeout`, `memory` or `killed` (by a signal)."""

    status: str
    stdout: str
    stderr: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """One HumanEval problem: a function's head, tests that define `check(candidate)`, and a solution."""

    task_id: str
    prompt: str
    canonical_solution: str
    test: str
    entry_point: str


def run_code(code: str, *, seconds: float = 5.0, memory_bytes: int = 1 << 30, without: Collection[str] = ()) -> Outcome:
    """Run `code` as a module named `__main__` in the sandbox.

    `seconds` limits both wall and CPU time, `memory_bytes` the address space (Python itself needs about 64 MiB).
    `without` leaves layers out, for tests. Raises ValueError for a limit that is not positive or an unknown layer.
    """
    if seconds <= 0 or memory_bytes <= 0:
        raise InputError(f"limits must be positive, got seconds={seconds}, memory_bytes={memory_bytes}")
    if unknown := set(without) - set(LAYERS):
        raise InputError(f"unknown layers {sorted(unknown)}; there are {', '.join(LAYERS)}")
    around = _bubblewrap() if not {"namespaces", "root"} & set(without) else ()
    return _run(code, around, seconds=seconds, memory_bytes=memory_bytes, without=without)


def _run(code: str, around: Sequence[str], *, seconds: float, memory_bytes: int, without: Collection[str]) -> Outcome:
    """Run in a new process, which another program confines where `around` is its command line."""
    file = tempfile.TemporaryFile
    with tempfile.TemporaryDirectory() as folder, file() as out, file() as err, file() as report:
        settings = json.dumps([folder, seconds, memory_bytes, sorted(without), report.fileno(), bool(around)])
        python, program = (sys._base_executable, INSIDE) if around else (sys.executable, __file__)
        process = subprocess.Popen(
            [*around, python, "-I", "-S", "-B", program, settings], stdin=subprocess.PIPE, stdout=out, stderr=err,
            env={}, cwd=folder, start_new_session=True, pass_fds=[report.fileno()],
        )  # fmt: skip
        status = _wait(process, code, seconds + STARTUP_SECONDS)
        texts = []
        for written in (out, err, report):
            written.seek(0)
            texts.append(written.read(OUTPUT_CHARACTERS).decode("utf-8", "replace"))
        return Outcome(status, texts[0], texts[1], tuple(texts[2].split()))


@cache
def _bubblewrap() -> tuple[str, ...]:
    """The command line of bubblewrap, nothing where it is not installed or does not confine a first run."""
    program = shutil.which("bwrap")
    if program is None:
        return ()
    # One capability, to limit the number of files below; `_drop_user` gives it up before the code runs.
    around = [program, "--as-pid-1", "--die-with-parent", "--cap-add", "CAP_SYS_ADMIN"]
    around += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    for folder in _readable_folders():
        for above in list(Path(folder).parents)[-2::-1]:
            around += ["--perms", "0755", "--dir", str(above)]  # nobody passes through
        link = Path(folder).is_symlink()
        around += ["--symlink", str(Path(folder).readlink()), folder] if link else ["--ro-bind", folder, folder]
    around += ["--tmpfs", "/tmp", "--ro-bind", __file__, INSIDE, "--remount-ro", "/"]
    first = _run("", around, seconds=30, memory_bytes=1 << 30, without=())
    return tuple(around) if first.status == "finished" and {"namespaces", "root"} <= set(first.layers) else ()


@cache
def layers() -> tuple[str, ...]:
    """The layers that are active on this machine, found by running nothing in them."""
    return run_code("", seconds=30).layers


def load_problems(path: Path | str) -> list[Problem]:
    """The problems of a HumanEval file (`.jsonl` or `.jsonl.gz`), or of the one such file below a folder.

    Raises FileNotFoundError when there is none, ValueError naming file and line for a damaged one.
    """
    path = Path(path)
    found = [path] if path.is_file() else sorted(path.rglob("HumanEval.jsonl*"))
    if not found:
        raise MissingFile(f"no HumanEval.jsonl or HumanEval.jsonl.gz below {path}")
    opener = gzip.open if found[0].suffix == ".gz" else open
    problems = []
    with opener(found[0], "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                problems.append(Problem(**{name: row[name] for name in Problem.__dataclass_fields__}))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InputError(f"{found[0]}:{number}: not a HumanEval problem ({error!r})") from error
    return problems


def passes(problem: Problem, completion: str, *, seconds: float = 5.0, memory_bytes: int = 1 << 30) -> Outcome:
    """Run a completion of `problem.prompt` against the problem's tests; it passes when the status is `finished`."""
    code = f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})\n"
    return run_code(code, seconds=seconds, memory_bytes=memory_bytes)


def _wait(process: subprocess.Popen, source: str, seconds: float) -> str:
    """Hand over the code, wait, end whatever is left of the process group, and say how it ended."""
    try:
        process.communicate(source.encode("utf-8", "surrogatepass"), timeout=seconds)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    endings = {FINISHED: "finished", OUT_OF_MEMORY: "memory"}
    endings |= {128 + signal.SIGALRM: "timeout", 128 + signal.SIGXCPU: "timeout"}
    return endings.get(code, "killed" if code > 128 else "error")


# Inside the new process

libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None


def _system(function: str, *arguments) -> int:
    """Call a function of libc; OSError when it fails, AttributeError where the system has no such function."""
    result = getattr(libc, function)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(option: int, *values) -> None:
    padded = [ctypes.c_ulong(v) if isinstance(v, int) else v for v in (*values, 0, 0, 0, 0)]
    _system("prctl", ctypes.c_int(option), *padded[:4])


def _die_with_parent() -> None:
    with suppress(OSError, AttributeError):
        _prctl(1, signal.SIGKILL)


def _main(settings: str) -> None:
    folder, seconds, memory_bytes, without, report, confined = json.loads(settings)
    source = sys.stdin.buffer.read()
    nothing, end = os.pipe()  # there is no /dev/null inside
    os.dup2(nothing, 0)
    os.close(nothing), os.close(end)
    os.environ.clear()
    os.umask(0o077)
    _die_with_parent()
    steps: list[tuple[str, Callable[[], None]]] = [
        ("namespaces", _continue_in_child if confined else _enter_namespaces),
        ("root", _limit_folder if confined else lambda: _enter_root(folder)),
        ("user", _drop_user),
        ("landlock", _enter_landlock),
        ("limits", lambda: _limit(seconds, memory_bytes)),
        ("seccomp", _filter_calls),
        ("audit", lambda: sys.addaudithook(_refuse_event)),
    ]
    active = set()
    for name, step in steps:
        if name not in without:
            with suppress(OSError, AttributeError, ValueError):  # refused, or no such call on this system
                step()
                active.add(name)
    os.write(report, " ".join(name for name in LAYERS if name in active).encode())
    os.close(report)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _execute(source)


def _execute(source: bytes) -> None:
    """Run the code and end the process with the exit code that says how it went."""
    ending = FAILED
    try:
        exec(compile(source, "<answer>", "exec"), {"__name__": "__main__"})
        ending = FINISHED
    except MemoryError:
        ending = OUT_OF_MEMORY
    except BaseException as error:  # SystemExit too: code that leaves early has not run its tests
        traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
    with suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(ending)


def _enter_namespaces() -> None:
    """New process, network, IPC, host-name and mount namespaces; the caller goes on as their second process."""
    flags = 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x00020000  # pid, net, ipc, uts, mount
    user, group = os.geteuid(), os.getegid()
    try:
        _system("unshare", flags)
    except OSError:
        _system("unshare", flags | 0x10000000)  # in a user namespace
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _continue_in_child()  # the first process of the namespace: its end ends all others
    _continue_in_child()


def _continue_in_child() -> None:
    """Fork; the parent waits and ends as the child did.

    The first process of a namespace ignores most signals, so it is not the one that runs the code.
    """
    child = os.fork()
    if child == 0:
        _die_with_parent()
        return
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def _readable_folders() -> list[str]:
    """Python's library and the system's, without folders that lie in another one of the list."""
    folders = [sys.base_prefix, "/usr", "/lib", "/lib64"]
    folders = [f for f in dict.fromkeys(folders) if Path(f).is_dir()]
    return [f for f in folders if not any(f != g and Path(f).is_relative_to(g) for g in folders)]


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _system("mount", *(text.encode() for text in (source, target, kind)), ctypes.c_ulong(flags), data.encode())


def _limit_folder() -> None:
    """Go to the temporary folder of bubblewrap and make it as small as that of `_enter_root`."""
    no_suid, no_dev, remount = 2, 4, 32
    os.chdir("/tmp")
    _mount("none", "/tmp", "", remount | no_suid | no_dev, SMALL)


def _enter_root(folder: str) -> None:
    read_only, no_suid, no_dev, remount, bind, recursive, private = 1, 2, 4, 32, 4096, 16384, 1 << 18
    _mount("none", "/", "", recursive | private)
    _mount("sandbox", folder, "tmpfs", no_suid | no_dev, f"{SMALL},mode=755")
    for source in _readable_folders():
        target = Path(folder + source)
        if Path(source).is_symlink():
            target.symlink_to(Path(source).readlink())
            continue
        os.umask(0o022)
        target.mkdir(parents=True)
        _mount(source, str(target), "", bind | recursive)
        kept = os.statvfs(target).f_flag & (no_suid | no_dev | 8 | 1024 | 2048)  # locked flags must stay
        _mount(source, str(target), "", remount | bind | read_only | kept)
    Path(folder, "tmp").mkdir()
    os.chroot(folder)
    os.chdir("/tmp")
    os.umask(0o077)


def _drop_user() -> None:
    """Become nobody when root, if Python's library stays readable; give up every capability."""
    try:
        library = Path(sys.base_prefix)
        if os.geteuid() == 0 and all(each.stat().st_mode & 0o005 == 0o005 for each in (library, *library.parents)):
            os.chown(".", NOBODY, NOBODY)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            _die_with_parent()  # forgotten when the user changes
    finally:
        _system("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))


def _enter_landlock() -> None:
    version = _system("syscall", 444, None, 0, 1)
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("QQQ", rights, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _system("syscall", 444, attributes, ctypes.c_size_t(len(attributes)), 0)
    read = 1 | 4 | 8  # execute (shared libraries), read files, list folders
    for path, allowed in [(".", rights), *((path, read) for path in _readable_folders())]:
        opened = os.open(path, os.O_PATH)
        _system("syscall", 445, ruleset, 1, struct.pack("=Qi", allowed, opened), 0)
        os.close(opened)
    _prctl(38, 1)  # no new privileges
    _system("syscall", 446, ruleset, 0)
    os.close(ruleset)


def _limit(seconds: float, memory_bytes: int) -> None:
    cpu = math.ceil(seconds) + 1
    limits = {"CPU": cpu, "AS": memory_bytes, "FSIZE": FILE_BYTES, "NOFILE": 64, "NPROC": 32, "CORE": 0, "MEMLOCK": 0}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        ceiling = resource.getrlimit(kind)[1]  # a stricter limit that already holds stays
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(kind, (value, value))


def _filter_calls() -> None:
    if os.uname().machine != "x86_64" or sys.maxsize < 1 << 32:
        raise OSError("the list of system calls is that of x86-64")
    load, equal, at_least, any_bit, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, denied, unknown = 0x7FFF0000, 0x80000000, 0x50001, 0x50026  # errno EPERM, ENOSYS
    program = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (ret, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (ret, 0, 0, denied)]  # the x32 numbering
    for number in (n for numbers in DENIED_CALLS.values() for n in numbers):
        program += [(equal, 0, 1, number), (ret, 0, 0, denied)]
    program += [(equal, 0, 1, 435), (ret, 0, 0, unknown)]  # clone3: its flags cannot be seen; clone is used then
    program += [(equal, 0, 3, 56), (load, 0, 0, 16), (any_bit, 1, 0, 0x10000), (ret, 0, 0, denied)]  # threads only
    program += [(ret, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    _prctl(38, 1)
    _prctl(22, 2, ctypes.c_char_p(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))))


def _refuse_event(event: str, arguments: tuple) -> None:
    if event.startswith(DENIED_EVENTS):
        raise PermissionError(f"{event} is not allowed in the sandbox")


if __name__ == "__main__":
    _main(sys.argv[1])
