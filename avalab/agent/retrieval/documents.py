"""Documents and the pieces they are cut into: Markdown, HTML, plain text and PDF.

1. `read` turns a file into sections: a path of headings and the text below them. HTML is read by the standard library's
   parser, without scripts and styles; PDF by pypdf, where a page is a section. Every other text is read as Markdown,
   whose headings a plain text has not.
2. `pieces` cuts a section at paragraphs, then at sentences, so that a piece has at most `PIECE_WORDS` words; the last
   sentences of a piece begin the next one, as an answer may lie across the cut.

What is no document is refused by name: empty, binary, encrypted or enormous.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from avalab.lab.errors import InputError, MissingFile, Unavailable

SUFFIXES = (".md", ".markdown", ".txt", ".rst", ".html", ".htm", ".pdf")

MOST_BYTES = 64 << 20  # of a document

PIECE_WORDS, OVERLAP_WORDS = 160, 30

INSTALL_PDF = 'pip install "avalab[documents]"'

_HEADING = re.compile(r"^(#{1,6})[ \t]+(.+?)[ \t]*#*$", re.MULTILINE)

_FENCE = re.compile(r"^(```|~~~)")

_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Section:
    """Text below a path of headings, such as `Install > Windows`; of a PDF, `page 3`."""

    heading: str
    text: str


@dataclass(frozen=True)
class Piece:
    """What is found and cited: a part of a section, and its number in the document."""

    number: int
    heading: str
    text: str


def find(folder: Path) -> list[Path]:
    """The documents below a folder, or the one file, in order of their paths. Raises MissingFile for none."""
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise MissingFile(f"{folder} is neither a file nor a folder of documents")
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not found:
        raise MissingFile(f"{folder} holds no document; read are {', '.join(SUFFIXES)}")
    return found


def read(path: Path) -> list[Section]:
    """The sections of a document.

    Raises InputError naming the file for one that is empty, binary, encrypted or larger than MOST_BYTES, Unavailable
    for a PDF without its reader.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise InputError(f"{path} has {size:,} bytes; a document has at most {MOST_BYTES:,}: split it")
    suffix = path.suffix.lower()
    sections = _pdf(path) if suffix == ".pdf" else _of_text(_text(path), html=suffix in (".html", ".htm"))
    kept = [section for section in sections if section.text.strip()]
    if not kept:
        why = "no text layer; run it through an OCR program first" if suffix == ".pdf" else "no text"
        raise InputError(f"{path} is empty: {why}")
    return kept


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if b"\0" in raw[:8192] and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is binary, not text; documents are {', '.join(SUFFIXES)}")
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); convert it, as with iconv -t utf-8") from error


def _of_text(text: str, *, html: bool) -> list[Section]:
    if not html:
        return of_markdown(text)
    parser = _Reader()
    parser.feed(text)
    parser.close()
    return of_markdown("".join(parser.parts))


def of_markdown(text: str) -> list[Section]:
    """The sections of Markdown; a `#` inside a fenced block is no heading."""
    path: list[tuple[int, str]] = []
    sections, lines, fenced = [], [], False

    def close() -> None:
        body = "\n".join(lines).strip()
        if body:
            sections.append(Section(" > ".join(title for _, title in path), body))
        lines.clear()

    for line in text.splitlines():
        if _FENCE.match(line.lstrip()):
            fenced = not fenced
        heading = None if fenced else _HEADING.match(line)
        if heading is None:
            lines.append(line)
            continue
        close()
        depth = len(heading[1])
        path[:] = [(level, title) for level, title in path if level < depth]
        path.append((depth, heading[2]))
    close()
    return sections


class _Reader(HTMLParser):
    """HTML as Markdown: headings, paragraphs and cells on lines of their own, without what is not read."""

    SILENT = frozenset(("script", "style", "nav", "template", "noscript"))
    BLOCKS = frozenset(("p", "div", "li", "tr", "br", "pre", "section", "article", "dt", "dd", "table", "ul", "ol"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in self.SILENT:
            self.silent += 1
        elif len(tag) == 2 and tag[0] == "h" and tag[1] in "123456":
            self.parts.append(f"\n\n{'#' * int(tag[1])} ")
        elif tag in self.BLOCKS:
            self.parts.append("\n\n" if tag == "p" else "\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SILENT:
            self.silent = max(0, self.silent - 1)
        elif len(tag) == 2 and tag[0] == "h" and tag[1] in "123456":
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(" ".join(data.split(" ")) if data.strip() else " ")


def _pdf(path: Path) -> list[Section]:
    try:
        import pypdf
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise Unavailable(f"{path} is a PDF, which needs pypdf; install it: {INSTALL_PDF}") from error
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise InputError(f"{path} is encrypted; save a copy without its password")
        return [Section(f"page {n}", page.extract_text()) for n, page in enumerate(reader.pages, start=1)]
    except InputError:
        raise
    except (PyPdfError, ValueError, KeyError, TypeError, OSError, RecursionError, NotImplementedError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is no PDF that can be read: {said}") from error


def pieces(sections: list[Section]) -> list[Piece]:
    """The pieces of a document, numbered from 0."""
    cut = ((section.heading, text) for section in sections for text in _cut(section.text))
    return [Piece(number, heading, text) for number, (heading, text) in enumerate(cut)]


def _cut(text: str) -> Iterator[str]:
    """Texts of at most `PIECE_WORDS` words; the end of one begins the next."""
    held: list[str] = []
    fresh = False  # whether `held` has more than the end of the piece before
    for sentence in _sentences(text):
        if fresh and _words(held) + _words([sentence]) > PIECE_WORDS:
            yield "\n".join(held)
            held, fresh = _end(held), False
            if _words(held) + _words([sentence]) > PIECE_WORDS:
                held = []
        held.append(sentence)
        fresh = True
    if fresh:
        yield "\n".join(held)


def _sentences(text: str) -> Iterator[str]:
    """Paragraphs that fit, else their sentences, else runs of words."""
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.strip():
            continue
        if _words([paragraph]) <= PIECE_WORDS // 2:
            yield paragraph.strip()
            continue
        for sentence in _SENTENCE.split(paragraph):
            words = sentence.split()
            if len(words) <= PIECE_WORDS // 2:
                yield sentence.strip()
            else:
                yield from (
                    " ".join(words[at : at + PIECE_WORDS // 2]) for at in range(0, len(words), PIECE_WORDS // 2)
                )


def _words(texts: list[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _end(held: list[str]) -> list[str]:
    kept: list[str] = []
    for text in reversed(held):
        if _words([text, *kept]) > OVERLAP_WORDS:
            break
        kept.insert(0, text)
    return kept
