"""The table of other people's methods that `python -m avalab.peers` left in the results folder.

A row is a file: its bytes, the seconds it took, its KL divergence on each text, and the lab's divergence over it at the
same bytes, in each form of the lab's artefact, windows paired. Where a row has no number its note stands there instead.

What it does not do: measure, or mix these numbers with a notebook's own (other windows, another day): the note says
where they are from.
"""

from __future__ import annotations

from avalab.experiment import ROOT, Record, Run, load_records

FORMS = {"": "int8 embedding", ":packed": "packed embedding", ":gguf": "GGUF"}
Rows = tuple[tuple[str, ...], ...]


def recorded(run: Run) -> tuple[tuple[str, ...], Rows, str]:
    """Header, rows and the note on where they are from; no rows where nothing was recorded."""
    texts = run.profile.eval_texts[:2]
    header = ("file", "MB", "seconds", *(f"KL, {text}" for text in texts))
    header += tuple(f"ours/its, {name}, {text}" for text in texts for name in FORMS.values())
    path = run.results_dir / "peers.json"
    where = path.relative_to(ROOT)
    if not path.is_file():
        return header, (), f"Other people's methods: make bench-peers writes {where}; there is none yet."
    records = load_records(path)
    found = {(r.subject, r.metric): r for r in records}
    rows = tuple(_row(found, subject, texts, len(header)) for subject in dict.fromkeys(r.subject for r in records))
    one = records[0]
    return (
        header,
        rows,
        f"From {where}: model {one.model}, commit {one.commit}, {one.when[:10]}, threads {one.threads}.",
    )


def _row(found: dict[tuple[str, str], Record], subject: str, texts: tuple[str, ...], width: int) -> tuple[str, ...]:
    size, seconds = (found.get((subject, metric)) for metric in ("artifact_bytes", "compress_seconds"))
    if size is None:
        note = next(r.note for (name, _), r in found.items() if name == subject)
        return (subject, note, *[""] * (width - 2))
    cells = [
        subject,
        f"{size.value / 1e6:.1f}",
        f"{seconds.value:.0f}" if seconds and seconds.value is not None else "",
    ]
    cells += [_estimate(found.get((subject, f"kl_divergence:{text}"))) for text in texts]
    ratios = [f"kl_ratio:{text}{form}" for text in texts for form in FORMS]
    return (*cells, *(_estimate(found.get((subject, metric)), digits=2) for metric in ratios))


def _estimate(record: Record | None, digits: int = 3) -> str:
    if record is None or record.value is None:
        return ""
    if record.low is None:
        return f"{record.value:.{digits}f}"
    return f"{record.value:.{digits}f} [{record.low:.{digits}f}, {record.high:.{digits}f}]"
