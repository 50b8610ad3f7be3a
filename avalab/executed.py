"""What an executed notebook says: its question, finding, tables and figures, out of the results folder.

1. The notebooks are those of notebooks/ plus whatever the folder holds: one without a result is listed as not run.
2. Of an executed copy: the title is the question; the finding is the text of the cell tagged `finding` (else of the
   last code cell that printed any); tables are those of cells tagged `table` (else of all cells).
3. A figure `figures/NN_*.png` gets the heading above the cell that drew it as caption, and as alternative text the
   description that `plots` wrote into the file.
4. Of a failed notebook there is the last line of its error, and the earlier good run if the folder still holds it.

What it does not do: run a notebook, or judge what it says.
"""

from __future__ import annotations

import base64
import html
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from avalab.experiment import Record, load_records

TABLE_TAGS = {"table", "thead", "tbody", "tr", "th", "td", "caption", "p", "small", "sup"}
TABLE_ATTRIBUTES = {"scope", "colspan", "rowspan"}


@dataclass(frozen=True)
class Figure:
    """A picture of the results folder: its path there, caption, description and size in pixels."""

    path: str
    caption: str
    alt: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """What the page says of one notebook; `state` is done, failed or not run."""

    name: str
    state: str
    question: str
    error: str = ""
    finding: str = ""
    tables: tuple[str, ...] = ()  # HTML of the tags above
    figures: tuple[Figure, ...] = ()
    records: tuple[Record, ...] = ()
    files: tuple[str, ...] = ()  # what there is to link to


def read_entries(folder: Path, notebooks: Path) -> list[Entry]:
    """One entry for each notebook that exists or has left something in the folder, by name."""
    found = [
        *notebooks.glob("[0-9][0-9]_*.ipynb"),
        *folder.glob("[0-9][0-9]_*.ipynb"),
        *folder.glob("[0-9][0-9]_*.txt"),
    ]
    return [read_entry(name, folder, notebooks) for name in sorted({p.name.split(".")[0] for p in found})]


def read_entry(name: str, folder: Path, notebooks: Path) -> Entry:
    """Collect what the folder holds of one notebook."""
    executed, traceback = folder / f"{name}.ipynb", folder / f"{name}.traceback.txt"
    failed = next((p for p in (traceback, folder / f"{name}.failed.ipynb") if p.is_file()), None)
    state = "failed" if failed else "done" if executed.is_file() else "not run"
    sources = (executed, folder / f"{name}.failed.ipynb", notebooks / f"{name}.ipynb")
    cells = _cells(next((p for p in sources if p.is_file()), None))
    records = folder / f"{name}.json"
    endings = ("ipynb", "json", "failed.ipynb", "traceback.txt")
    return Entry(
        name=name,
        state=state,
        question=_question(cells) or name,
        error=_error(traceback) if failed else "",
        finding=_finding(cells) if executed.is_file() else "",
        tables=_tables(cells) if executed.is_file() else (),
        figures=_figures(name, folder, cells),
        records=tuple(load_records(records)) if records.is_file() else (),
        files=tuple(f"{name}.{e}" for e in endings if (folder / f"{name}.{e}").is_file()),
    )


def _cells(path: Path | None) -> list[dict]:
    if path is None:
        return []
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a notebook: {error!r}") from error
    return [{**cell, "source": "".join(cell["source"])} for cell in cells]


def _question(cells: list[dict]) -> str:
    titles = [m.group(1) for c in cells if c["cell_type"] == "markdown" for m in [_heading(c["source"])] if m]
    return titles[0].strip() if titles else ""


def _heading(markdown: str, first: bool = True) -> re.Match | None:
    found = list(re.finditer(r"^#+\s+(.+)$", markdown, re.MULTILINE))
    return found[0 if first else -1] if found else None


def _error(traceback: Path) -> str:
    lines = traceback.read_text(encoding="utf-8").strip().splitlines() if traceback.is_file() else []
    return lines[-1] if lines else "no traceback was kept"


def _tagged(cells: list[dict], tag: str) -> list[dict]:
    return [c for c in cells if c["cell_type"] == "code" and tag in c["metadata"].get("tags", [])]


def _finding(cells: list[dict]) -> str:
    texts = [_text(c) for c in _tagged(cells, "finding") or [c for c in cells if c["cell_type"] == "code"]]
    return next((text for text in reversed(texts) if text), "")


def _text(cell: dict) -> str:
    """What a cell printed or returned as text; the text that stands in for a picture or a table is no text."""
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if output.get("name") == "stdout":
            parts.append("".join(output["text"]))
        elif not {"image/png", "text/html"} & data.keys():
            parts.append("".join(data.get("text/markdown") or data.get("text/plain") or ""))
    return "".join(parts).strip()


def _tables(cells: list[dict]) -> tuple[str, ...]:
    chosen = _tagged(cells, "table") or [c for c in cells if c["cell_type"] == "code"]
    pages = ["".join(o.get("data", {}).get("text/html", "")) for c in chosen for o in c.get("outputs", [])]
    return tuple(only_table(text) for text in pages if "<table" in text)


class _TableParser(HTMLParser):
    """Keeps the tags of a table and escaped text; drops every other tag, and the content of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.silent += tag in ("script", "style")
        if tag in TABLE_TAGS:
            allowed = "".join(f' {k}="{html.escape(v or "")}"' for k, v in attrs if k in TABLE_ATTRIBUTES)
            self.kept.append(f"<{tag}{allowed}>")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in ("script", "style")
        if tag in TABLE_TAGS:
            self.kept.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.kept.append(html.escape(data))


def only_table(text: str) -> str:
    """The tables of a piece of HTML, without styles, scripts, links and attributes other than the structure's."""
    parser = _TableParser()
    parser.feed(text)
    parser.close()
    return "".join(parser.kept).strip()


def _figures(name: str, folder: Path, cells: list[dict]) -> tuple[Figure, ...]:
    """The figures of a notebook, in the order in which its cells draw them."""
    placed = []
    for path in sorted((folder / "figures").glob(f"{name[:2]}_*.png")):
        place = _drawn_in(path, cells)
        caption = _heading_above(place, cells) or path.stem[3:].replace("_", " ")
        size, alt = picture_size_and_alt(path)
        placed.append((place, Figure(f"figures/{path.name}", caption, alt or caption, size)))
    return tuple(figure for _, figure in sorted(placed, key=lambda pair: pair[0]))


def _drawn_in(path: Path, cells: list[dict]) -> int:
    """Index of the cell that shows this very picture or names its file; after the last cell when none does."""
    shown = base64.b64encode(path.read_bytes()).decode()
    for i, cell in enumerate(cells):
        pictures = ["".join(o.get("data", {}).get("image/png", "")) for o in cell.get("outputs", [])]
        if path.name in cell["source"] or shown in [p.replace("\n", "") for p in pictures]:
            return i
    return len(cells)


def _heading_above(place: int, cells: list[dict]) -> str:
    if place == len(cells):
        return ""
    above = [_heading(c["source"], first=False) for c in cells[:place] if c["cell_type"] == "markdown"]
    return next((m.group(1).strip() for m in reversed(above) if m), "")


def picture_size_and_alt(path: Path) -> tuple[tuple[int, int], str]:
    """Width and height in pixels of a PNG, and the description inside it ('' without one).

    Raises ValueError naming a file that is no picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.size, str(picture.info.get("Description", ""))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a PNG") from error
