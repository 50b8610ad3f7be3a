"""A corpus and questions for measuring retrieval that need no download: the standard library's own documentation.

1. `write_documents` writes a Markdown file for each module: its docstring, and a section for each documented function
   and class, under its signature.
2. `questions` makes questions from the sections. `purpose` asks for the function that does what its first sentence
   says, `detail` for where a later sentence stands, `name` for what a function does. Of purpose and detail a third of
   the telling words is left out and others are replaced by words of like meaning (`LIKE`), so that the question is no
   quotation. A sentence that two sections share is not asked.
3. A hash of the module's name decides between `tune` and `test`: what is chosen by looking (weights, sizes) is chosen
   on `tune`. Questions that are made from the text they ask for are easier than a person's: read recall as a bound.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from avalab.agent.retrieval.index import COMMON, Found
from avalab.lab.errors import InputError

SPLITS = ("tune", "test")

TEST_SHARE = 0.75

KINDS = ("purpose", "detail", "name")

SKIPPED = frozenset(
    ["test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "__pycache__", "ensurepip"]
)

SHORTEST, LONGEST = 6, 30  # words of a sentence that is asked about

LIKE = {
    "return": "give", "returns": "gives", "convert": "turn", "create": "make", "remove": "delete", "delete": "remove",
    "find": "look for", "list": "sequence", "string": "text", "number": "count", "file": "document", "call": "invoke",
    "called": "invoked", "specified": "given", "given": "specified", "contains": "holds", "raise": "throw",
    "raised": "thrown", "check": "test", "whether": "if", "directory": "folder", "default": "standard",
    "method": "function", "function": "routine", "object": "thing", "value": "result", "read": "load",
    "write": "store", "start": "begin", "end": "finish", "new": "fresh", "current": "present", "all": "every",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question, the document and the section that answer it, and what a right answer names ("" where none is)."""

    text: str
    kind: str
    document: str
    heading: str
    sentence: str
    answer: str = ""

    def is_answered_by(self, piece: Found) -> bool:
        """Whether a piece is of the section that was asked about."""
        return piece.document == self.document and piece.heading.endswith(self.heading)

    def is_right(self, said: str) -> bool:
        """Whether an answer names what was asked for: the name without its module will do."""
        last = self.answer.rpartition(".")[2]
        return bool(self.answer) and re.search(rf"(?<![\w]){re.escape(last)}(?![\w])", said) is not None


def split_of(document: str) -> str:
    """`tune` or `test`, by a hash of the document's name."""
    place = int(hashlib.sha256(document.encode()).hexdigest(), 16) % 1000
    return SPLITS[place < 1000 * TEST_SHARE]


def write_documents(folder: Path, *, most: int | None = None) -> list[Path]:
    """Write the documentation of the first `most` modules, or of all, into a folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in _documents():
        if most is not None and len(written) >= most:
            break
        path = folder / f"{name}.md"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _documents() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if SKIPPED & set(place.parts) or place.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        name = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates and files in old encodings
            continue
        sections = list(_sections(tree, name))
        if sections:
            yield name, f"# {name}\n\n{_plain(ast.get_docstring(tree) or '')}\n\n" + "\n\n".join(sections) + "\n"


def _sections(node: ast.AST, path: str) -> Iterator[str]:
    for child in getattr(node, "body", ()):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        name, described = f"{path}.{child.name}", ast.get_docstring(child)
        if described:
            call = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
            yield f"## {name}\n\n{f'{child.name}{call}'}\n\n{_plain(described)}"
        if isinstance(child, ast.ClassDef):
            yield from _sections(child, name)


def _plain(text: str) -> str:
    """Without lines that Markdown would read as headings."""
    return re.sub(r"^#", r"\\#", text, flags=re.MULTILINE)


def questions(pieces: Sequence[Found], count: int, seed: int, split: str = "test") -> list[Question]:
    """`count` questions from the documents of a split, kinds in turn, the same for a seed and a corpus.

    Raises InputError for an unknown split, or a corpus that does not yield so many.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    rng, by_kind = random.Random(f"{split}-{seed}"), {kind: [] for kind in KINDS}
    shared = Counter(sentence for piece in pieces for sentence in dict.fromkeys(_sentences(_said(piece)[1])))
    for piece in pieces:
        name = piece.heading.rpartition(" > ")[2]
        if split_of(piece.document) != split or "." not in name or not piece.document.startswith(name.split(".")[0]):
            continue
        if name.split(".")[0] == name.rpartition(".")[2].lower():
            continue  # the question names its module
        begins, text = _said(piece)
        sentences = [each for each in _sentences(text) if shared[each] == 1]
        for sentence in sentences:
            kind = "purpose" if begins and " ".join(text.split()).startswith(sentence) else "detail"
            by_kind[kind].append((piece, name, sentence))
        if sentences:
            by_kind["name"].append((piece, name, sentences[0]))
    for kind in KINDS:
        rng.shuffle(by_kind[kind])
    made = [by_kind[KINDS[at % len(KINDS)]][at // len(KINDS) :][:1] for at in range(count)]
    if not all(made):
        raise InputError(f"these documents yield fewer than {count} questions of {split}; give more documents")
    return [_asked(KINDS[at % len(KINDS)], *one[0], rng) for at, one in enumerate(made)]


def _said(piece: Found) -> tuple[bool, str]:
    """Whether a piece begins with a signature, and so a docstring, and its text without that."""
    first, _, rest = piece.text.partition("\n")
    begins = re.match(rf"{re.escape(piece.heading.rpartition('.')[2])}(\(|$)", first) is not None
    return begins, rest if begins else piece.text


def _sentences(text: str) -> list[str]:
    """Sentences of prose that are neither too short nor too long to ask about."""
    whole = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n|\n(?=[-*>\s])", text)]
    return [
        each for each in whole
        if SHORTEST <= len(each.split()) <= LONGEST and each[0].isupper() and each.endswith(".") and ">>>" not in each
    ]  # fmt: skip


def _asked(kind: str, piece: Found, name: str, sentence: str, rng: random.Random) -> Question:
    if kind == "name":
        return Question(f"What does {name} do?", kind, piece.document, name, sentence)
    said = _reworded(sentence, name, rng)
    if kind == "purpose":
        text = f"Which function or class of Python's {name.split('.')[0]} is meant: {said}?"
        return Question(text, kind, piece.document, name, sentence, name)
    return Question(f"Where is this said of {name.split('.')[0]}: {said}?", kind, piece.document, name, sentence)


def _reworded(sentence: str, name: str, rng: random.Random) -> str:
    """A sentence without its own name, a third of its telling words left out, some replaced by ones of like meaning."""
    own = {part.lower() for part in re.split(r"[._]", name)}
    words = [word for word in sentence.rstrip(".").split() if word.strip("`'\"(),:;").lower() not in own]
    telling = [at for at, word in enumerate(words) if word.lower() not in COMMON]
    left_out = set(rng.sample(telling, len(telling) // 3))
    return " ".join(LIKE.get(word.lower(), word) for at, word in enumerate(words) if at not in left_out)
