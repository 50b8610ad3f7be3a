"""The report page of a results folder, and the list of its findings in a README.

1. Of an executed copy, the title is the question; the finding is the text of the cell tagged `finding` (else of the
   last code cell that printed any); tables are the HTML outputs of cells tagged `table` (else of all cells), with
   nothing but a table's structure kept. A notebook without a result is listed as not run.
2. A figure `figures/NN_*.png` has the heading above the cell that drew it as caption, and as alternative text the
   description inside the file.
3. Of a failed notebook there is the last line of its error, and beneath it the earlier good run, if there is one.
4. `templates/page.html.j2` makes a page of it that asks for nothing from elsewhere and runs no script; it begins with
   the choice for each memory budget (of several models, where results/sizes has it) and the headlines (first lines of
   findings), beside each the one of the longer run of the same model, where there is one. The README's list stands
   between `<!-- findings -->` and `<!-- /findings -->`.
"""

from __future__ import annotations

import argparse
import base64
import html
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import nbformat
from bs4 import BeautifulSoup
from bs4.element import PreformattedString
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image, UnidentifiedImageError

from avalab.lab.errors import InputError, MissingFile
from avalab.lab.run import ROOT, Record, load_records, write_atomically
from avalab.report.dependencies import code_states
from avalab.report.tables import metric_words, value_text

TABLE_TAGS = {"table", "thead", "tbody", "tr", "th", "td", "caption", "p", "small", "sup"}

TABLE_ATTRIBUTES = {"scope", "colspan", "rowspan"}

MARKERS = ("<!-- findings -->", "<!-- /findings -->")

MODELS = ("sizes", "20_three_sizes")  # the run and the notebook that compare models

FILE_WORDS = {
    "ipynb": "executed notebook",
    "json": "records",
    "failed.ipynb": "failed copy",
    "traceback.txt": "traceback",
}

PROVENANCE = {"model": "model", "seed": "seed", "commit": "commit", "device": "", "threads": "threads"}  # and its word

LONGER = {"laptop": "long"}  # profile -> the one that asks the same questions of the same model for longer

AGES = {
    "stale": "Results older than the code they come from",
    "cannot tell": "Results that may be older than the code they come from",
}


@dataclass(frozen=True)
class Figure:
    """A picture of the results folder: its path there, caption, description and size in pixels."""

    path: str
    caption: str
    alt: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Longer:
    """What the longer run in a folder beside this one found."""

    folder: str
    headline: str


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
    longer: Longer | None = None

    @property
    def headline(self) -> str:
        """The first line of the finding, called earlier when the last run failed."""
        first = self.finding.strip().partition("\n")[0]
        return f"Earlier run: {first}" if first and self.state == "failed" else first

    @property
    def provenance(self) -> str:
        """When, on what and from which commit the records are; several values are all named."""
        when = sorted(record.when for record in self.records if record.when)
        facts = [f"Measured {' to '.join(dict.fromkeys((when[0], when[-1]))) if when else 'at an unknown time'}"]
        for key, word in PROVENANCE.items():
            values = dict.fromkeys(str(getattr(record, key)) for record in self.records if getattr(record, key) != "")
            facts += [f"{word} {', '.join(values)}".strip()] if values else []
        return "; ".join(facts)


# --- what a results folder says ---


def read_entries(folder: Path, notebooks: Path) -> list[Entry]:
    """One entry for each notebook that exists or has left something in the folder, by name."""
    found = [path for place in (notebooks, folder) for path in place.glob("[0-9][0-9]_*.ipynb")]
    found += folder.glob("[0-9][0-9]_*.txt")
    return [read_entry(name, folder, notebooks) for name in sorted({path.name.split(".")[0] for path in found})]


def read_entry(name: str, folder: Path, notebooks: Path) -> Entry:
    """Collect what the folder holds of one notebook."""
    executed, failed, traceback, records = (
        folder / f"{name}.{ending}" for ending in ("ipynb", "failed.ipynb", "traceback.txt", "json")
    )
    state = "failed" if traceback.is_file() or failed.is_file() else "done" if executed.is_file() else "not run"
    source = next((path for path in (executed, failed, notebooks / f"{name}.ipynb") if path.is_file()), None)
    cells = read_cells(source) if source else []
    error = traceback.read_text(encoding="utf-8").strip() if traceback.is_file() else ""
    return Entry(
        name=name,
        state=state,
        question=next((heading for cell in cells for heading in _headings(cell)), name),
        error=(error.splitlines() or ["no traceback was kept"])[-1] if state == "failed" else "",
        finding=_finding(cells) if executed.is_file() else "",
        tables=_tables(cells) if executed.is_file() else (),
        figures=_figures(name, folder, cells),
        records=tuple(load_records(records)) if records.is_file() else (),
        files=tuple(f"{name}.{ending}" for ending in FILE_WORDS if (folder / f"{name}.{ending}").is_file()),
    )


def read_cells(path: Path) -> list[nbformat.NotebookNode]:
    """The cells of a notebook. Raises ValueError naming a file that is none."""
    try:
        return nbformat.read(path, as_version=4).cells
    except (ValueError, KeyError, AttributeError, nbformat.ValidationError) as error:  # as nbformat finds it
        raise InputError(f"{path} is not a notebook: {str(error)[:200]!r}") from error


def _headings(cell: nbformat.NotebookNode) -> list[str]:
    found = re.findall(r"^#+\s+(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else []
    return [heading.strip() for heading in found]


def _outputs(cells: list[nbformat.NotebookNode], tag: str) -> list[list[nbformat.NotebookNode]]:
    """The outputs of the code cells with a tag; of all code cells where none has it."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if tag in cell.metadata.get("tags", [])]
    return [cell.outputs for cell in tagged or code]


def _finding(cells: list[nbformat.NotebookNode]) -> str:
    texts = ["".join(map(_text, outputs)).strip() for outputs in _outputs(cells, "finding")]
    return next((text for text in reversed(texts) if text), "")


def _text(output: nbformat.NotebookNode) -> str:
    """What was printed or returned as text; the text that stands in for a picture or a table is no text."""
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    data = output.get("data", {})
    return "" if {"image/png", "text/html"} & data.keys() else data.get("text/markdown") or data.get("text/plain", "")


def _tables(cells: list[nbformat.NotebookNode]) -> tuple[str, ...]:
    pages = [out.get("data", {}).get("text/html", "") for outs in _outputs(cells, "table") for out in outs]
    return tuple(only_table(text) for text in pages if "<table" in text)


def only_table(text: str) -> str:
    """The tables of a piece of HTML, without styles, scripts, links and attributes other than the structure's."""
    soup = BeautifulSoup(text, "html.parser")
    for unseen in [*soup(["script", "style"]), *soup(string=lambda s: isinstance(s, PreformattedString))]:
        unseen.extract()
    for tag in soup(True):
        tag.attrs = {name: value for name, value in tag.attrs.items() if name in TABLE_ATTRIBUTES}
        if tag.name not in TABLE_TAGS:
            tag.unwrap()
    return str(soup).strip()


def _figures(name: str, folder: Path, cells: list[nbformat.NotebookNode]) -> tuple[Figure, ...]:
    """The figures of a notebook, in the order in which its cells draw them."""
    placed = []
    for path in sorted((folder / "figures").glob(f"{name[:2]}_*.png")):
        shown, place = base64.b64encode(path.read_bytes()).decode(), len(cells)  # last, if no cell drew it
        for i, cell in reversed(list(enumerate(cells))):
            pictures = [output.get("data", {}).get("image/png", "") for output in cell.get("outputs", [])]
            if path.name in cell.source or shown in [picture.replace("\n", "") for picture in pictures]:
                place = i
        above = [heading for cell in cells[:place] for heading in _headings(cell)] if place < len(cells) else []
        caption = above[-1] if above else path.stem[3:].replace("_", " ")
        size, alt = picture_size_and_alt(path)
        placed.append((place, Figure(f"figures/{path.name}", caption, alt or caption, size)))
    return tuple(figure for _, figure in sorted(placed, key=lambda pair: pair[0]))


def picture_size_and_alt(path: Path) -> tuple[tuple[int, int], str]:
    """Width and height in pixels of a PNG, and the description inside it ('' without one).

    Raises ValueError naming a file that is no picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.size, str(picture.info.get("Description", ""))
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a PNG") from error


# --- the page ---


def build_page(folder: Path, notebooks: Path = ROOT / "notebooks") -> Path:
    """Write `folder/index.html` and return its path.

    Raises FileNotFoundError when there is no such folder, ValueError naming a file in it that cannot be read.
    """
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in folder.parent.glob("[!.]*/") if p.name != "families")) or "none"
        raise MissingFile(f"no results folder {folder} (beside it: {there})")
    folder = folder.resolve()
    entries = _beside_longer_run(read_entries(folder, notebooks), folder, notebooks)
    states, lead = code_states(folder, notebooks.parent), lead_of_models(folder, notebooks)
    others = sorted(p.parent.name for p in folder.parent.glob("*/index.html") if p.parent != folder)
    text = render_page(folder.name, entries, states, lead=lead, others=others)
    write_atomically(folder / "index.html", text.replace(f"{ROOT}/", ""))
    return folder / "index.html"


def _beside_longer_run(entries: list[Entry], folder: Path, notebooks: Path) -> list[Entry]:
    profile, plus, rest = folder.name.partition("+")
    beside = folder.parent / f"{LONGER.get(profile, '')}{plus}{rest}"
    if profile not in LONGER or not beside.is_dir():
        return entries
    found = {entry.name: entry.headline for entry in read_entries(beside, notebooks)}
    return [replace(e, longer=Longer(beside.name, found[e.name])) if found.get(e.name) else e for e in entries]


def render_page(
    name: str,
    entries: list[Entry],
    states: dict[str, str] | None = None,
    *,
    lead: dict[str, str] | None = None,
    others: Sequence[str] = (),
) -> str:
    """The whole page as text; `name` is the results folder's, `states` what `code_states` says of its notebooks.

    `lead` is what to use for which memory; without one it is looked for among the entries. `others` are the results
    folders beside it that have a page.
    """
    environment = Environment(
        loader=PackageLoader("avalab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"inline": inline, "quote": quote, "show": value_text, "words": metric_words}
    counts = [(state, sum(entry.state == state for entry in entries)) for state in ("done", "failed", "not run")]
    aged = [(said, [n for n, s in (states or {}).items() if s.startswith(state)]) for state, said in AGES.items()]
    return environment.get_template("page.html.j2").render(
        name=name,
        entries=entries,
        counts=", ".join(f"{count} {state}" for state, count in counts if count) or "no notebook",
        ages=[(said, names) for said, names in aged if names],
        lead=lead or _lead(entries),
        others=others,
        file_words=FILE_WORDS,
    )


def lead_of_models(folder: Path, notebooks: Path) -> dict[str, str] | None:
    """What to use of several models, where the folder itself or `MODELS` beside it answers that."""
    for place in (folder, folder.parent / MODELS[0]):
        if (place / f"{MODELS[1]}.ipynb").is_file() and (lead := _lead([read_entry(MODELS[1], place, notebooks)])):
            elsewhere = "" if place.resolve() == folder.resolve() else f"../{quote(place.name)}/index.html"
            return {**lead, "page": elsewhere, "table": lead["table"].replace(f"{ROOT}/", "")}
    return None


def _lead(entries: list[Entry]) -> dict[str, str] | None:
    """What to use for which memory, if a notebook has answered that: its table begins with a column `memory`."""
    for entry in entries:
        for table in entry.tables:
            first = BeautifulSoup(table, "html.parser").th
            if first and first.get_text() == "memory":
                return {"name": entry.name, "table": table, "page": ""}
    return None


def inline(text: str) -> Markup:
    """Escaped text in which `code` and **strong** of markdown are kept."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text.strip()))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text))


# --- the list of a README ---


def write_findings(folder: Path, readme: Path, notebooks: Path = ROOT / "notebooks") -> list[str]:
    """Put the list of the findings between the markers of a README; returns the notebooks that have no result.

    Raises ValueError when the README does not hold each marker once, on lines of their own and in order.
    """
    lines = readme.read_text(encoding="utf-8").split("\n")
    places = [i for i, line in enumerate(lines) if line.strip() in MARKERS]
    if [lines[i].strip() for i in places] != list(MARKERS):
        raise InputError(f"{readme} needs one line {MARKERS[0]} and after it one line {MARKERS[1]}")
    entries = read_entries(folder, notebooks)
    done = [entry for entry in entries if f"{entry.name}.ipynb" in entry.files]
    link = quote(Path(os.path.relpath(folder.resolve(), readme.resolve().parent)).as_posix())
    findings = findings_list(done, link).replace(f"{ROOT}/", "")
    write_atomically(readme, "\n".join([*lines[: places[0] + 1], findings, *lines[places[1] :]]))
    return [entry.name for entry in entries if entry not in done]


def findings_list(entries: Sequence[Entry], link: str) -> str:
    """A markdown list with an item for each notebook; `link` is the way from the README to the results folder."""
    lines = []
    for entry in entries:
        links = [f"[{entry.name}]({link}/{quote(entry.name)}.ipynb)"]
        links += [f"[{Path(f.path).stem[3:].replace('_', ' ')}]({link}/{quote(f.path)})" for f in entry.figures]
        finding = _markdown(entry.headline) or "no finding printed"
        lines.append(f"- **{_markdown(entry.question)}** {finding} ({', '.join(links)})")
    return "\n".join(lines)


def _markdown(text: str) -> str:
    """Text for an item: one line, and no tag unless it is code."""
    line = " ".join(text.split())
    return re.sub(r"(`[^`]*`)|([&<>])", lambda m: m[1] or html.escape(m[2]), line)


def main(arguments: list[str] | None = None) -> int:
    """Build the page of one results folder, and a README's list of it; 0, or 2 when one cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m avalab.report.page", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="results/<name>")
    parser.add_argument("--readme", type=Path, help="also put the findings between its <!-- findings --> markers")
    given = parser.parse_args(arguments)
    try:
        print(f"report: {build_page(given.folder)}")
        if given.readme:
            missing = write_findings(given.folder, given.readme)
            print(f"report: {given.readme}" + (f" (without a result: {', '.join(missing)})" if missing else ""))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
