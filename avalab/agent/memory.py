"""What an agent remembers between sessions, in one file of sqlite: facts it was told to keep, and what it did.

Facts are found again by words (FTS5, BM25) and stand in the next task's system message; a known fact is not kept
twice. A session is a task, how it ended and its transcript, written when it ends.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from avalab.agent.retrieval.index import COMMON
from avalab.agent.toolkit import Tool, schema
from avalab.lab.errors import InputError
from avalab.lab.run import time_now

LONGEST_FACT = 500

SCHEMA = """
CREATE TABLE IF NOT EXISTS fact (id INTEGER PRIMARY KEY, text TEXT UNIQUE, kept TEXT);
CREATE VIRTUAL TABLE IF NOT EXISTS fact_words USING fts5(text, content='fact', content_rowid='id',
    tokenize='porter unicode61');
CREATE TABLE IF NOT EXISTS session (id INTEGER PRIMARY KEY, ended TEXT, model TEXT, task TEXT, status TEXT, answer TEXT,
    transcript TEXT);
"""


@dataclass(frozen=True)
class Session:
    """A task that was worked on."""

    ended: str
    model: str
    task: str
    status: str
    answer: str
    transcript: str


class Memory:
    """A file of facts and sessions. Raises InputError for a file that is no memory."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(self._open()) as base:
                base.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.path} is no memory of an agent ({error}); give another file") from error

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, isolation_level=None, timeout=10)

    def keep(self, fact: str) -> str:
        """Keep a fact. Raises InputError for one that is empty or longer than LONGEST_FACT characters."""
        fact = " ".join(fact.split())
        if not 0 < len(fact) <= LONGEST_FACT:
            raise InputError(f"a fact has 1 to {LONGEST_FACT} characters, this one {len(fact)}")
        with closing(self._open()) as base:
            base.execute("BEGIN IMMEDIATE")
            added = base.execute("INSERT OR IGNORE INTO fact (text, kept) VALUES (?, ?)", (fact, time_now()))
            if added.rowcount:
                base.execute("INSERT INTO fact_words (rowid, text) VALUES (?, ?)", (added.lastrowid, fact))
            base.execute("COMMIT")
        return "kept" if added.rowcount else "known already"

    def facts(self, about: str, most: int = 3) -> list[str]:
        """The facts that fit a text best, the best first."""
        words = [word for word in re.findall(r"\w+", about.lower()) if word not in COMMON]
        if not words:
            return []
        asked = " OR ".join(f'"{word}"' for word in dict.fromkeys(words))
        query = "SELECT text FROM fact_words WHERE fact_words MATCH ? ORDER BY bm25(fact_words) LIMIT ?"
        with closing(self._open()) as base:
            return [row[0] for row in base.execute(query, (asked, most))]

    def write_session(self, session: Session) -> None:
        """Add a session."""
        with closing(self._open()) as base:
            row = (session.ended, session.model, session.task, session.status, session.answer, session.transcript)
            base.execute(
                "INSERT INTO session (ended, model, task, status, answer, transcript) VALUES (?, ?, ?, ?, ?, ?)", row
            )

    def sessions(self, most: int = 10) -> list[Session]:
        """The latest sessions, the latest first."""
        query = "SELECT ended, model, task, status, answer, transcript FROM session ORDER BY id DESC LIMIT ?"
        with closing(self._open()) as base:
            return [Session(*row) for row in base.execute(query, (most,))]


def memory_tools(memory: Memory) -> list[Tool]:
    """Keeping a fact, and looking facts up."""
    return [
        Tool("remember", "Keep a fact for later sessions.", schema(fact=("string", "one sentence")), memory.keep),
        Tool(
            "recall",
            "Look up facts that were kept in earlier sessions.",
            schema(about=("string", "what they are about")),
            lambda about: "\n".join(memory.facts(about)) or "nothing is known about it",
        ),
    ]
