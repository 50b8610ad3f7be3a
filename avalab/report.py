"""The findings of a results folder, as one static page and as the table of a README.

The page begins with the choice for each memory budget, questions and headlines (the first line of a finding); then it
shows each notebook's question, finding, tables, figures and records. A failed notebook shows the last line of its
error, and beneath it the earlier good run, if there is one. The page asks for nothing from elsewhere, runs no script.
The table of headlines, one row for each executed notebook, stands between `<!-- findings -->` and `<!-- /findings -->`.
Both are the same for the same inputs. What is read from a notebook is the matter of `executed`.

What it does not do: compute or judge anything, or render whole notebooks (it links to them).
"""

from __future__ import annotations

import argparse
import html
import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

from avalab.executed import Entry, Figure, read_entries
from avalab.experiment import ROOT, Record, write_atomically
from avalab.tables import show, words

LEAD = '<table><thead><tr><th scope="col">memory</th>'  # how the table of choices by budget begins
MARKERS = ("<!-- findings -->", "<!-- /findings -->")
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --faint: #5b636b; --line: #d5d9de; --soft: #f3f5f7;
  --link: #0b5cad; --bad: #a3201d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --paper: #15181b; --faint: #a3abb3; --line: #3a4047;
  --soft: #1f2428; --link: #7db7f0; --bad: #ff8f87; } }
body { margin: 0 auto; max-width: 1100px; padding: 1rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.35rem; margin: 0 0 .5rem; line-height: 1.3; }
a { color: var(--link); } .meta { color: var(--faint); font-size: .88rem; } .bad { color: var(--bad); }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1.5rem; }
.finding { border-left: 4px solid var(--link); background: var(--soft); padding: .5rem 1rem; margin: 1rem 0; }
.finding p { margin: .3rem 0; } .scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child { text-align: left; } thead th { background: var(--soft); }
tbody th { font-weight: 600; white-space: nowrap; }
table.words { width: 100%; } table.words td, table.words th { text-align: left; white-space: normal; }
figure { margin: 1.5rem 0; } figcaption { color: var(--faint); font-size: .92rem; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); }
summary { cursor: pointer; color: var(--link); } code { background: var(--soft); padding: 0 .2em; }
"""


def build(folder: Path, notebooks: Path = ROOT / "notebooks") -> Path:
    """Write `folder/index.html` and return its path.

    Raises FileNotFoundError when there is no such folder, ValueError naming a file in it that cannot be read.
    """
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in folder.parent.glob("[!.]*/"))) or "none"
        raise FileNotFoundError(f"no results folder {folder} (beside it: {there})")
    text = page(f"{folder.resolve().name}", read_entries(folder, notebooks))
    write_atomically(folder / "index.html", text.replace(f"{ROOT}/", ""))
    return folder / "index.html"


def write_findings(folder: Path, readme: Path, notebooks: Path = ROOT / "notebooks") -> list[str]:
    """Put the table of the findings between the markers of a README; returns the notebooks that have no result.

    Raises ValueError when the README does not hold each marker once, on lines of their own and in order.
    """
    lines = readme.read_text(encoding="utf-8").split("\n")
    places = [i for i, line in enumerate(lines) if line.strip() in MARKERS]
    if [lines[i].strip() for i in places] != list(MARKERS):
        raise ValueError(f"{readme} needs one line {MARKERS[0]} and after it one line {MARKERS[1]}")
    entries = read_entries(folder, notebooks)
    link = quote(Path(os.path.relpath(folder.resolve(), readme.resolve().parent)).as_posix())
    table = findings_table([e for e in entries if _was_run(e)], link).replace(f"{ROOT}/", "")
    write_atomically(readme, "\n".join([*lines[: places[0] + 1], table, *lines[places[1] :]]))
    return [e.name for e in entries if not _was_run(e)]


def _was_run(entry: Entry) -> bool:
    return f"{entry.name}.ipynb" in entry.files


def findings_table(entries: list[Entry], link: str) -> str:
    """A markdown table with a row for each notebook; `link` is the way from the README to the results folder."""
    rows = [
        (
            _markdown(entry.question),
            _markdown(_headline(entry)) or "no finding printed",
            ", ".join(f"[{Path(f.path).stem[3:].replace('_', ' ')}]({link}/{quote(f.path)})" for f in entry.figures),
            f"[{entry.name}]({link}/{quote(entry.name)}.ipynb)",
        )
        for entry in entries
    ]
    lines = [("question", "finding", "figure", "notebook"), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _headline(entry: Entry) -> str:
    first = entry.finding.strip().partition("\n")[0]
    return f"Earlier run: {first}" if first and entry.state == "failed" else first


def _markdown(text: str) -> str:
    """Text for a cell: one line, no column of its own, and no tag unless it is code."""
    line = " ".join(text.split()).replace("|", "\\|")
    return re.sub(r"(`[^`]*`)|([&<>])", lambda m: m[1] or html.escape(m[2]), line)


def page(name: str, entries: list[Entry]) -> str:
    """The whole page as text; `name` is the results folder's."""
    counts = [(s, sum(e.state == s for e in entries)) for s in ("done", "failed", "not run")]
    said = ", ".join(f"{n} {state}" for state, n in counts if n) or "no notebook"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>AVA Lab: {html.escape(name)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>AVA Lab: {html.escape(name)}</h1>
<p class="meta">{said}. Intervals are 95 %; 1 MB is 10<sup>6</sup> bytes.</p>
</header>
<main>
{_lead(entries)}{_summary(entries)}
{"".join(_section(e) for e in entries)}</main>
</body>
</html>
"""


def _lead(entries: list[Entry]) -> str:
    """What to use for which budget, if a notebook has answered that."""
    found = [
        (entry.name, table) for entry in entries for table in entry.tables if table.replace("\n", "").startswith(LEAD)
    ]
    if not found:
        return ""
    name, table = found[0]
    link = f'<p class="meta">From <a href="#{quote(name)}">{html.escape(name)}</a>.</p>'
    return f'<h2>What should I use?</h2>\n<div class="scroll">{table}</div>\n{link}\n'


def _summary(entries: list[Entry]) -> str:
    head = "".join(f'<th scope="col">{h}</th>' for h in ("Notebook", "Question", "Finding"))
    rows = "".join(_summary_row(e) for e in entries)
    return f"""<div class="scroll"><table class="words">
<thead><tr>{head}</tr></thead>
<tbody>
{rows}</tbody>
</table></div>"""


def _summary_row(entry: Entry) -> str:
    found = _inline(_headline(entry)) or ("no finding printed" if entry.state == "done" else "")
    state = "" if entry.state == "done" else f'<strong class="bad">{entry.state}</strong> {_inline(entry.error)} '
    link = f'<a href="#{quote(entry.name)}">{html.escape(entry.name)}</a>'
    return f"<tr><td>{link}</td><td>{_inline(entry.question)}</td><td>{state}{found}</td></tr>\n"


def _section(entry: Entry) -> str:
    parts = [f'<section id="{quote(entry.name)}">', f"<h2>{_inline(entry.question)}</h2>"]
    if entry.state == "failed":
        parts.append(f'<p class="bad"><strong>The last run failed:</strong> {_inline(entry.error)}</p>')
        parts.append("<p>What follows is from the run before it.</p>" if entry.finding else "")
    if entry.state == "not run":
        parts.append('<p class="bad"><strong>Not run:</strong> this folder holds no executed copy.</p>')
    paragraphs = "".join(f"<p>{_inline(p)}</p>" for p in re.split(r"\n+", entry.finding) if p.strip())
    parts.append(f'<div class="finding">{paragraphs}</div>' if paragraphs else "")
    parts += [f'<div class="scroll">{table}</div>' for table in entry.tables]
    parts += [_figure(figure) for figure in entry.figures]
    parts.append(_details(entry.records) if entry.records else "")
    parts.append(f'<p class="meta">{_provenance(entry.records)}{_links(entry.files)}</p>')
    return "\n".join([*filter(None, parts), "</section>\n"])


def _figure(figure: Figure) -> str:
    caption, alt = html.escape(figure.caption), html.escape(figure.alt)
    size = f'width="{figure.size[0]}" height="{figure.size[1]}"'
    picture = f'<img src="{quote(figure.path)}" alt="{alt}" {size} loading="lazy">'
    return f"<figure>{picture}\n<figcaption><strong>{caption}.</strong> {alt}</figcaption></figure>"


def _details(records: tuple[Record, ...]) -> str:
    """Every record in a table that opens on demand."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(r.subject)}</th><td>{html.escape(words(r.metric))}</td>'
        f"<td>{'not measured' if r.value is None else _value(r)}</td><td>{r.n or ''}</td>"
        f"<td>{html.escape(r.engine)}</td><td>{html.escape(r.note)}</td></tr>\n"
        for r in records
    )
    head = "".join(f'<th scope="col">{h}</th>' for h in ("Subject", "Metric", "Value", "n", "Engine", "Note"))
    table = f'<table class="words"><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table>'
    return f'<details><summary>All {len(records)} records</summary>\n<div class="scroll">{table}</div>\n</details>'


def _value(record: Record) -> str:
    return html.escape(show(record)).replace(", ", ",&nbsp;")


def _provenance(records: tuple[Record, ...]) -> str:
    """When, on what and from which commit; several values are all named."""
    if not records:
        return ""
    when = sorted(r.when for r in records if r.when)
    span = " to ".join(dict.fromkeys((when[0], when[-1]))) if when else "at an unknown time"
    facts = [("model", "model"), ("seed", "seed"), ("commit", "commit"), ("device", ""), ("threads", "threads")]
    named = [
        (word, dict.fromkeys(str(getattr(r, key)) for r in records if getattr(r, key) != "")) for key, word in facts
    ]
    return (
        html.escape("; ".join([f"Measured {span}", *[f"{w} {', '.join(v)}".strip() for w, v in named if v]])) + ".<br>"
    )


def _links(files: tuple[str, ...]) -> str:
    words = {
        "ipynb": "executed notebook",
        "json": "records",
        "failed.ipynb": "failed copy",
        "traceback.txt": "traceback",
    }
    return " · ".join(f'<a href="{quote(f)}">{words[f.split(".", 1)[1]]}</a>' for f in files)


def _inline(text: str) -> str:
    """Escaped text in which `code` and **strong** of markdown are kept."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text.strip()))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def main(arguments: list[str] | None = None) -> int:
    """Build the page of one results folder, and a README's table of it; 0, or 2 when one cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m avalab.report", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="results/<name>")
    parser.add_argument("--readme", type=Path, help="also put the findings between its <!-- findings --> markers")
    given = parser.parse_args(arguments)
    try:
        print(f"report: {build(given.folder)}")
        if given.readme:
            missing = write_findings(given.folder, given.readme)
            print(f"report: {given.readme}" + (f" (without a result: {', '.join(missing)})" if missing else ""))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
