"""The header of a GGUF file, read as far as it takes to say whether the file is whole.

Engines map the file and trust it: a truncated one ends a process or gives weights of zeros. `check` walks the header
(magic, version, key-value pairs, one entry a tensor) and compares the end of each tensor with the end of the file.

Source: the GGUF specification, versions 2 and 3. What it does not do: interpret values, or read weights.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by type
STRING, ARRAY, ALIGNMENT = 8, 9, "general.alignment"


@dataclass
class Reader:
    """Bytes and where to read next."""

    data: mmap.mmap
    at: int = 0

    def number(self, form: str) -> int:
        """The next little-endian number, `I` of four bytes or `Q` of eight."""
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        """The next string."""
        size = self.number("Q")
        if self.at + size > len(self.data):
            raise struct.error("a string goes on beyond the end")
        self.at += size
        return self.data[self.at - size : self.at].decode(errors="replace")

    def skip(self, kind: int) -> None:
        """Pass over a value of a type, lists and their members included."""
        if kind == STRING:
            self.text()
        elif kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in SIZES:
                self.at += SIZES[inner] * count
            else:
                for _ in range(count):
                    self.skip(inner)
        elif kind in SIZES:
            self.at += SIZES[kind]
        else:
            raise struct.error(f"a value of unknown type {kind}")


def check(file: Path) -> None:
    """Raise ValueError naming file, offset and tensor for one that is no GGUF, truncated, or of an unknown type."""
    if not file.stat().st_size:
        raise ValueError(f"{file} is damaged: it is empty")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = Reader(data)
        try:
            tensors, start = _entries(reader)
        except struct.error as error:
            raise ValueError(f"{file} is damaged: its header breaks off at byte {reader.at} ({error})") from error
        for name, end in _ends(file, tensors, start):
            if end > len(data):
                raise ValueError(f"{file} is truncated: it has {len(data)} bytes, tensor {name} ends at byte {end}")


def _entries(reader: Reader) -> tuple[list[tuple[str, int, int, int]], int]:
    """(name, elements, type, offset) of every tensor, and where the first one's bytes begin."""
    if reader.data[:4] != b"GGUF":
        raise struct.error("it does not begin with GGUF")
    reader.at, alignment = 8, 32
    count, pairs = reader.number("Q"), reader.number("Q")
    for _ in range(pairs):
        key, kind, at = reader.text(), reader.number("I"), reader.at
        reader.skip(kind)
        if key == ALIGNMENT:
            (alignment,) = struct.unpack_from("<I", reader.data, at)
    tensors = []
    for _ in range(count):
        name, dimensions = reader.text(), reader.number("I")
        elements = prod(reader.number("Q") for _ in range(dimensions))
        tensors.append((name, elements, reader.number("I"), reader.number("Q")))
    return tensors, -(-reader.at // alignment) * alignment


def _ends(file: Path, tensors: list[tuple[str, int, int, int]], start: int) -> Iterator[tuple[str, int]]:
    """Name and end of each tensor, in bytes from the beginning of the file."""
    import gguf

    for name, elements, kind, offset in tensors:
        if kind not in list(gguf.GGMLQuantizationType):
            raise ValueError(f"{file}: tensor {name} at byte {start + offset} has the unknown type {kind}")
        weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        yield name, start + offset + elements // weights * size
