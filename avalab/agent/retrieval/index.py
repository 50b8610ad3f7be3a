"""An index of documents in one file of sqlite: found by words, by meaning, and by both.

1. `build` reads the documents below a folder. One whose bytes are known by their SHA-256 is left as it is, one that
   changed replaces what it was, one that is gone leaves the index. A document is one transaction: a killed build goes
   on with the next. What cannot be read is named, with the reason, and does not stop the others.
2. Words: sqlite's FTS5 with Porter stems, ranked by BM25 (Robertson and Zaragoza 2009); headings count `HEADING_WEIGHT`
   times as much as text. Meaning: the exact product with the vectors of all pieces, held as float16.
3. Fused: reciprocal rank fusion, the sum of `1 / (60 + rank)` over both lists (Cormack, Clarke and Buettcher 2009).

An index without vectors answers by words alone.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from avalab.agent.retrieval import documents
from avalab.agent.retrieval.documents import Section
from avalab.agent.retrieval.embedding import SIZE, Embedder
from avalab.lab.errors import InputError, LabError, MissingFile

WAYS = ("fused", "words", "meaning")

CANDIDATES = 50  # of each list, before they are fused

FUSION = 60

HEADING_WEIGHT = 2.0

SCHEMA = """
CREATE TABLE IF NOT EXISTS document (id INTEGER PRIMARY KEY, path TEXT UNIQUE, sha256 TEXT);
CREATE TABLE IF NOT EXISTS piece (id INTEGER PRIMARY KEY, document INTEGER, number INTEGER, heading TEXT, text TEXT);
CREATE INDEX IF NOT EXISTS piece_of ON piece (document);
CREATE TABLE IF NOT EXISTS vector (piece INTEGER PRIMARY KEY, numbers BLOB);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(heading, text, content='',
    tokenize='porter unicode61');
"""

COMMON = frozenset(  # words that a question is made of and that tell nothing apart
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "can",
        "did",
        "do",
        "does",
        "for",
        "from",
        "have",
        "how",
        "i",
        "in",
        "is",
        "it",
        "my",
        "of",
        "on",
        "or",
        "that",
        "the",
        "this",
        "to",
        "was",
        "what",
        "when",
        "where",
        "which",
        "who",
        "why",
        "will",
        "with",
        "you",
        "your",
    ]
)

_WORD = re.compile(r"\w+")

_PARTS = re.compile(r"(?<=[a-z])(?=[A-Z])|[_.]")


@dataclass(frozen=True)
class Found:
    """A piece and where it stands: `document:number` names it in an answer."""

    id: int
    document: str
    number: int
    heading: str
    text: str
    score: float

    @property
    def name(self) -> str:
        """`guide.md:3`."""
        return f"{self.document}:{self.number}"


@dataclass
class Built:
    """What a build did: documents added or replaced, left, removed, and refused with the reason."""

    added: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


class Index:
    """An index in a file; `Index(path)` opens or begins one. Raises InputError for a file that is none."""

    def __init__(self, path: Path | str, embedder: Embedder | None = None) -> None:
        self.path, self.embedder = Path(path), embedder
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._vectors: tuple[np.ndarray, np.ndarray] | None = None
        self._base = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        try:
            self._base.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + SCHEMA)
        except sqlite3.DatabaseError as error:
            self._base.close()
            raise InputError(f"{self.path} is no index of documents ({error}); give another file") from error

    @classmethod
    def existing(cls, path: Path | str, embedder: Embedder | None = None) -> Index:
        """The index in a file. Raises MissingFile where there is none."""
        if not Path(path).is_file():
            raise MissingFile(f"there is no index {path}; make it: avalab index FOLDER --out {path}")
        return cls(path, embedder)

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def __len__(self) -> int:
        return self._base.execute("SELECT count(*) FROM piece").fetchone()[0]

    # --- filling it ---

    def build(self, folder: Path, *, progress: bool = False) -> Built:
        """Bring the index to what lies below the folder, and nothing else."""
        from tqdm.auto import tqdm

        folder, done = Path(folder), Built()
        root = folder.parent if folder.is_file() else folder
        files = {path.relative_to(root).as_posix(): path for path in documents.find(folder)}
        known = self._known()
        for name in sorted(known.keys() - files.keys()):
            self.remove(name)
            done.removed.append(name)
        for name, path in tqdm(files.items(), desc="documents", disable=not progress, leave=False):
            try:
                sha256 = _sha256(path)
                if known.get(name) == sha256:
                    done.kept.append(name)
                    continue
                self.add(name, documents.read(path), sha256)
                done.added.append(name)
            except (LabError, OSError) as error:
                done.refused[name] = str(error)
        return done

    def add(self, name: str, sections: Sequence[Section], sha256: str = "") -> int:
        """Put a document into the index, in place of one of that name; returns how many pieces it has."""
        pieces = documents.pieces(list(sections))
        texts = [f"{piece.heading}\n{piece.text}" for piece in pieces]
        vectors = self.embedder.embed(texts).astype(np.float16) if self.embedder and texts else None
        with self._transaction() as base:
            self._delete(base, name)
            row = base.execute("INSERT INTO document (path, sha256) VALUES (?, ?)", (name, sha256)).lastrowid
            for at, piece in enumerate(pieces):
                fields = (row, piece.number, piece.heading, piece.text)
                key = base.execute(
                    "INSERT INTO piece (document, number, heading, text) VALUES (?, ?, ?, ?)", fields
                ).lastrowid
                words = (key, _spelt(f"{name} {piece.heading}"), _spelt(piece.text))
                base.execute("INSERT INTO words (rowid, heading, text) VALUES (?, ?, ?)", words)
                if vectors is not None:
                    base.execute("INSERT INTO vector VALUES (?, ?)", (key, vectors[at].tobytes()))
        return len(pieces)

    def remove(self, name: str) -> None:
        """Take a document out of the index."""
        with self._transaction() as base:
            self._delete(base, name)

    def _delete(self, base: sqlite3.Connection, name: str) -> None:
        for key, heading, text in base.execute(
            "SELECT p.id, p.heading, p.text FROM piece p JOIN document d ON d.id = p.document WHERE d.path = ?", (name,)
        ).fetchall():
            old = (key, _spelt(f"{name} {heading}"), _spelt(text))
            base.execute("INSERT INTO words (words, rowid, heading, text) VALUES ('delete', ?, ?, ?)", old)
            base.execute("DELETE FROM vector WHERE piece = ?", (key,))
            base.execute("DELETE FROM piece WHERE id = ?", (key,))
        base.execute("DELETE FROM document WHERE path = ?", (name,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._vectors = None
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield self._base
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def _known(self) -> dict[str, str]:
        return dict(self._base.execute("SELECT path, sha256 FROM document"))

    # --- finding in it ---

    def search(self, question: str, most: int = 5, *, way: str = "fused") -> list[Found]:
        """The best pieces, the best first. Raises InputError for an unknown way, or `meaning` without vectors."""
        if way not in WAYS:
            raise InputError(f"unknown way {way!r}; choose one of {', '.join(WAYS)}")
        with self._lock:
            lists = []
            if way != "meaning":
                lists.append(self._by_words(question))
            if way != "words" and self.has_vectors:
                lists.append(self._by_meaning(question))
            elif way == "meaning":
                raise InputError(f"{self.path} holds no vectors; make it again where the asset minilm-l6-int8 is")
            return self._pieces(fused(lists)[:most])

    @property
    def has_vectors(self) -> bool:
        """Whether pieces can be found by meaning."""
        return self.embedder is not None and bool(self._base.execute("SELECT 1 FROM vector LIMIT 1").fetchone())

    def _by_words(self, question: str) -> list[int]:
        words = [word for word in _WORD.findall(_spelt(question).lower()) if word not in COMMON]
        if not words:
            return []
        asked = " OR ".join(f'"{word}"' for word in dict.fromkeys(words))
        rows = self._base.execute(
            f"SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words, {HEADING_WEIGHT}, 1.0) LIMIT ?",
            (asked, CANDIDATES),
        )
        return [row[0] for row in rows]

    def _by_meaning(self, question: str) -> list[int]:
        if self._vectors is None:
            rows = self._base.execute("SELECT piece, numbers FROM vector ORDER BY piece").fetchall()
            numbers = np.frombuffer(b"".join(row[1] for row in rows), np.float16).reshape(len(rows), SIZE)
            self._vectors = np.array([row[0] for row in rows]), numbers.astype(np.float32)
        keys, vectors = self._vectors
        scores = vectors @ self.embedder.embed([question])[0]
        count = min(CANDIDATES, len(scores))
        best = np.argpartition(-scores, count - 1)[:count]
        return keys[best[np.argsort(-scores[best], kind="stable")]].tolist()

    def _pieces(self, ranked: Iterable[tuple[int, float]]) -> list[Found]:
        found = []
        for key, score in ranked:
            row = self._base.execute(
                "SELECT d.path, p.number, p.heading, p.text FROM piece p JOIN document d ON d.id = p.document "
                "WHERE p.id = ?",
                (key,),
            ).fetchone()
            found.append(Found(key, *row, score))
        return found

    def pieces(self) -> list[Found]:
        """Every piece, document by document."""
        rows = self._base.execute("SELECT id FROM piece ORDER BY document, number").fetchall()
        return self._pieces((row[0], 0.0) for row in rows)


def fused(lists: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Items by the sum of `1 / (60 + rank)` over ranked lists, the highest first, ranks from 1."""
    scores: dict[int, float] = {}
    for ranked in lists:
        for rank, item in enumerate(ranked, start=1):
            scores[item] = scores.get(item, 0.0) + 1 / (FUSION + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])


def _spelt(text: str) -> str:
    """Names of code as words too: `splitlines keep_ends` is found by `keep`, `HTTPServer` by itself."""
    parts = {word: _PARTS.sub(" ", word) for word in re.findall(r"[\w.]+", text) if _PARTS.search(word.strip("."))}
    return f"{text} {' '.join(parts.values())}" if parts else text


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
