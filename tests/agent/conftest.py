"""What the agent's tests share: a speaker that says what it was told to, and an embedder of words."""

import hashlib

import numpy as np
import pytest

from avalab.agent.retrieval.embedding import SIZE, Embedder
from avalab.agent.speaker import Cost, Said, Speaker


class Scripted(Speaker):
    """Says its lines one after another, and keeps what it was asked."""

    def __init__(self, *lines):
        self.name, self.lines, self.cost, self.asked = "scripted", list(lines), Cost(), []

    def room(self, chat, most=0):
        return 1000

    def say(self, chat, **options):
        self.asked.append(([dict(message) for message in chat], options))
        line = self.lines.pop(0)
        said = Said(line, sum(len(m["content"].split()) for m in chat), len(line.split()), 0.0, False)
        self.cost.add(said)
        return said


class Words(Embedder):
    """A vector in which each word has a place by its hash: texts with the same words are near."""

    def __init__(self):
        pass

    def embed(self, texts):
        found = np.full((len(texts), SIZE), 1e-6, np.float32)
        for row, text in zip(found, texts, strict=True):
            for word in text.lower().split():
                row[int(hashlib.sha256(word.encode()).hexdigest(), 16) % SIZE] += 1
            row /= np.linalg.norm(row)
        return found


@pytest.fixture
def scripted():
    return Scripted


@pytest.fixture
def words():
    return Words()
