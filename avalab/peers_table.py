"""The table of other people's methods that `python -m avalab.peers` left in the results folder.

A row is a file: its bytes, the seconds it took, its KL divergence on each text, and the lab's divergence over it at the
same bytes, in each form of the lab's artefact, windows paired. Where function calls were asked, also how many were
right, and the lab's share less its, cases paired, with the p-value of McNemar's test; the lab's file is the one with an
int8 embedding, or the form that the cell names. Where a row has no number its note stands there instead.

What it does not do: measure, or mix these numbers with a notebook's own (other windows, another day): the note says
where they are from.
"""

from __future__ import annotations

from avalab.experiment import ROOT, Record, Run, load_records

FORMS = {"": "int8 embedding", ":packed": "packed embedding", ":gguf": "GGUF"}
CALLS = ("calls right, forced", "ours - its, share of calls")
SHARE, DIFFERENCE = "call_accuracy_forced:all", "call_accuracy_forced_difference:all"
Rows = tuple[tuple[str, ...], ...]
Found = dict[tuple[str, str], Record]


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
    asked = any(metric == SHARE for _, metric in found)
    header += CALLS if asked else ()
    rows = tuple(_row(found, subject, texts, asked=asked) for subject in dict.fromkeys(r.subject for r in records))
    one = records[0]
    return (
        header,
        rows,
        f"From {where}: model {one.model}, commit {one.commit}, {one.when[:10]}, threads {one.threads}.",
    )


def _row(found: Found, subject: str, texts: tuple[str, ...], *, asked: bool) -> tuple[str, ...]:
    size, seconds = (found.get((subject, metric)) for metric in ("artifact_bytes", "compress_seconds"))
    if size is None:
        note = next(r.note for (name, _), r in found.items() if name == subject)
        return (subject, note, *[""] * (1 + len(texts) * (1 + len(FORMS)) + asked * len(CALLS)))
    cells = [
        subject,
        f"{size.value / 1e6:.1f}",
        f"{seconds.value:.0f}" if seconds and seconds.value is not None else "",
    ]
    cells += [_estimate(found.get((subject, f"kl_divergence:{text}"))) for text in texts]
    ratios = [f"kl_ratio:{text}{form}" for text in texts for form in FORMS]
    cells += [_estimate(found.get((subject, metric)), digits=2) for metric in ratios]
    return (*cells, *((_share(found, subject), _difference(found, subject)) if asked else ()))


def _share(found: Found, subject: str) -> str:
    """`37 of 64`; the reason where a subject was not asked."""
    record = found.get((subject, SHARE))
    if record is None or record.value is None:
        return record.note if record else ""
    return f"{round(record.value * record.n)} of {record.n}"


def _difference(found: Found, subject: str) -> str:
    """`+0.03 [-0.06, +0.12], p 0.69`, of the first form of the lab's artefact that there is."""
    pairs = ((name, found.get((subject, DIFFERENCE + form))) for form, name in FORMS.items())
    name, record = next((pair for pair in pairs if pair[1]), ("", None))
    if record is None:
        return ""
    form = "" if name == FORMS[""] else f"{name}: "
    ends = f"[{record.low:+.2f}, {record.high:+.2f}]"
    return f"{form}{record.value:+.2f} {ends}, p {record.details['p_value']:.2g}"


def _estimate(record: Record | None, digits: int = 3) -> str:
    if record is None or record.value is None:
        return ""
    if record.low is None:
        return f"{record.value:.{digits}f}"
    return f"{record.value:.{digits}f} [{record.low:.{digits}f}, {record.high:.{digits}f}]"
