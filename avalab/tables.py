"""Values as text: what a metric is called, how a number with its interval is written, and tables of both.

A metric is a row of `METRICS`: its words, its unit and the factor to that unit. A number has four significant digits,
an interval decides the decimals of its value, and 1 MB is 10^6 bytes. A missing value is shown as the reason for it.

What it does not do: draw, measure, average or test anything; it loads no drawing library.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from avalab.experiment import Record


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: its words, its unit and the factor from the recorded value to that unit."""

    words: str
    unit: str
    factor: float = 1.0
    higher_is_better: bool = False


METRICS = {
    "artifact_bytes": Metric("artefact", "MB", 1e-6),
    "predicted_bytes": Metric("predicted", "MB", 1e-6),
    "peak_rss_bytes": Metric("peak memory", "MB", 1e-6),
    "peak_vram_bytes": Metric("peak GPU memory", "MB", 1e-6),
    "perplexity": Metric("perplexity", "1"),
    "kl_divergence": Metric("KL divergence", "nats/token"),
    "top1_agreement": Metric("top-1 agreement", "%", 100, True),
    "kl_ratio": Metric("KL divergence, ours over its", "1"),
    "prefill_tokens_per_s": Metric("prefill", "tokens/s", 1, True),
    "decode_tokens_per_s": Metric("decode", "tokens/s", 1, True),
    "time_to_first_token_ms": Metric("time to first token", "ms"),
    "token_latency_ms": Metric("time of a further token", "ms"),
    "energy_joules_per_token": Metric("energy of a token", "J/token"),
    "roofline_fraction": Metric("share of the memory read rate", "%", 100, True),
    "memory_read_bytes_per_s": Metric("memory read rate", "GB/s", 1e-9, True),
    "load_seconds": Metric("time to load", "s"),
    "compress_seconds": Metric("time to compress", "s"),
    "train_tokens_per_s": Metric("training", "tokens/s", 1, True),
    "call_accuracy": Metric("function calls right", "%", 100, True),
    "call_accuracy_grammar": Metric("function calls right, with grammar", "%", 100, True),
    "call_accuracy_forced": Metric("function calls right, call forced", "%", 100, True),
    "call_accuracy_forced_difference": Metric("function calls right, ours less its", "%", 100, True),
    "irrelevance_accuracy_free": Metric("irrelevance noticed, free form", "%", 100, True),
    "irrelevance_accuracy": Metric("irrelevance noticed", "%", 100, True),
    "pass_at_1": Metric("pass@1", "%", 100, True),
    "rejected_share": Metric("rejected", "%", 100),
    "rejected_alone_share": Metric("rejected by no other gate", "%", 100),
    "answer_seconds": Metric("time an answer", "s"),
    "rating": Metric("rating", "of 5", 1, True),
    "preferred_share": Metric("preferred to the baseline", "%", 100, True),
    "krippendorff_alpha": Metric("agreement of raters, alpha", "1", 1, True),
    "same_answer_share": Metric("same answer as the baseline", "%", 100, True),
    "recovered": Metric("recovered", "%", 100, True),
    "right_share": Metric("right answers", "%", 100, True),
}


@dataclass(frozen=True, repr=False)
class Table:
    """Rows of text under a header; HTML in a notebook, markdown when printed."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in self.header)
        body = "".join(_html_row(row) for row in self.rows)
        notes = "".join(f"<p><small>{html.escape(note)}</small></p>\n" for note in self.notes)
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n{notes}"

    def __repr__(self) -> str:
        lines = [self.header, ("---", *["---:"] * (len(self.header) - 1)), *self.rows]
        notes = "".join(f"\n\n{note}" for note in self.notes)
        return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines) + notes


def _html_row(row: tuple[str, ...]) -> str:
    """A row whose intervals do not break at their comma."""
    cells = "".join(f"<td>{html.escape(c)}</td>" for c in row[1:]).replace(", ", ",&nbsp;")
    return f'<tr><th scope="row">{html.escape(row[0])}</th>{cells}</tr>\n'


def table(records: list[Record], subjects: Sequence[str], metrics: Sequence[str], *, baseline: str = "bf16") -> Table:
    """One row a subject, one column a metric: `0.231 [0.214, 0.249]`, the unit in the header.

    `artifact_bytes/baseline` is a column of its own: how many times better than the baseline (`2.40x`). A cell without
    a value refers to a note that gives the reason. Raises ValueError naming the subjects nothing was recorded of.
    """
    known = {r.subject for r in records}
    if unknown := [s for s in subjects if s not in known]:
        raise ValueError(f"no record of {', '.join(unknown)}; recorded: {', '.join(sorted(known))}")
    notes: dict[str, int] = {}
    rows = [(s, *[_cell(records, s, metric, baseline, notes) for metric in metrics]) for s in subjects]
    header = ("", *[_heading(records, metric) for metric in metrics])
    return Table(header, tuple(rows), tuple(f"({n}) {note}" for note, n in notes.items()))


def _heading(records: list[Record], metric: str) -> str:
    name, is_ratio = metric.removesuffix("/baseline"), metric.endswith("/baseline")
    if is_ratio:
        return f"{words(name)}, {'gain' if described(name).higher_is_better else 'times smaller'} [x]"
    found = next((r for r in records if r.metric == name), None)
    return words(name) if _unit(name, found) == "1" else f"{words(name)} [{_unit(name, found)}]"


def _cell(records: list[Record], subject: str, metric: str, baseline: str, notes: dict[str, int]) -> str:
    """The text of a cell; a missing value becomes the number of its reason in `notes`, which grows."""
    name = metric.removesuffix("/baseline")
    found = _last(records, name)
    record = found.get(subject)
    if record is None or record.value is None:
        reason = (record.note if record else "") or "not measured"
        return f"({notes.setdefault(reason, len(notes) + 1)})"
    if name == metric:
        return show(record, unit=False)
    base = found.get(baseline)
    if base is None or not base.value or not record.value:
        return f"({notes.setdefault(f'no ratio to {baseline}', len(notes) + 1)})"
    ratio = record.value / base.value
    return f"{ratio if described(name).higher_is_better else 1 / ratio:.2f}x"


def show(record: Record, *, unit: bool = True) -> str:
    """`0.231 [0.214, 0.249] nats/token`; the interval's half width is shown with two digits."""
    value, low, high, _ = scaled(record)
    name = _unit(record.metric, record)
    ending = f" {name}" if unit and name not in ("", "1") else ""
    if low is None or high is None or high <= low:
        return number(value) + ending
    decimals = max(0, 1 - math.floor(math.log10((high - low) / 2)))
    return f"{value:,.{decimals}f} [{low:,.{decimals}f}, {high:,.{decimals}f}]{ending}"


def number(value: float) -> str:
    """Four significant digits without an exponent where that is readable: `112.4`, `0.001700`, `12,345`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-5:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def ratio_line(label: str, predicted: float, measured: float, *, unit: str = "bytes") -> str:
    """`bytes: predicted 123.4 MB, measured 124.0 MB, measured/predicted 1.005`; bytes are shown in MB.

    Raises ValueError when the prediction is not positive.
    """
    if not predicted > 0:
        raise ValueError(f"predicted {label} is {predicted}; a ratio needs a positive prediction")
    factor, shown = (1e-6, "MB") if unit == "bytes" else (1, unit)
    before, after = number(factor * predicted), number(factor * measured)
    return (
        f"{label}: predicted {before} {shown}, measured {after} {shown}, measured/predicted {measured / predicted:.3f}"
    )


def show_ratio(label: str, predicted: float, measured: float, *, unit: str = "bytes") -> None:
    """Print `ratio_line`."""
    print(ratio_line(label, predicted, measured, unit=unit))


def scaled(record: Record) -> tuple[float, float | None, float | None, float]:
    """Value, low and high of a record in the unit it is shown in, and the factor that was applied.

    Raises ValueError when the record has no value.
    """
    if record.value is None:
        raise ValueError(f"{record.metric} of {record.subject!r} has no value: {record.note or 'no reason given'}")
    row = described(record.metric)
    factor = 1.0 if record.unit == row.unit else row.factor
    low, high = (None if bound is None else factor * bound for bound in (record.low, record.high))
    return factor * record.value, low, high, factor


def words(metric: str) -> str:
    """`KL divergence, function calls` for `kl_divergence:function_calls`."""
    name, _, part = metric.partition(":")
    whole = METRICS.get(part) or METRICS.get(f"{part}_bytes")  # predicted_bytes:peak_rss
    detail = whole.words if whole else part.replace("_", " ")
    return described(metric).words + (f", {detail}" if part and name in METRICS else "")


def predicted_record(records: list[Record], measured: Record) -> Record | None:
    """What was predicted for a measured record: `predicted_bytes:artifact` is for `artifact_bytes`, and so on."""
    names = [f"predicted_bytes:{measured.metric.removesuffix('_bytes')}", f"predicted_bytes:{measured.metric}"]
    found = [r for name in names for r in records if (r.subject, r.metric) == (measured.subject, name) and r.value]
    return found[0] if found else None


def components(records: list[Record], totals: dict[str, Record]) -> dict[str, dict[str, float]]:
    """Component -> subject -> size as shown; what the components leave of a total is the component `other`.

    A component that no subject has is left out.
    """
    names = dict.fromkeys(r.metric.partition(":")[2] for r in records if r.metric.startswith("artifact_bytes:"))
    sizes = {n: {s: scaled(r)[0] for s, r in measured(records, f"artifact_bytes:{n}").items()} for n in names}
    sizes = {name: size for name, size in sizes.items() if any(size.values())}
    whole = {s: scaled(r)[0] for s, r in totals.items()}
    rest = {s: whole[s] - sum(size.get(s, 0) for size in sizes.values()) for s in totals}
    return {**sizes, "other": rest} if any(rest[s] > 0.001 * whole[s] for s in totals) else sizes


def described(metric: str) -> Metric:
    """The row of a metric, a `:suffix` ignored; one of its own words and no unit if `METRICS` has none."""
    name = metric.partition(":")[0]
    return METRICS.get(name, Metric(metric.replace("_", " ").replace(":", ", "), ""))


def _unit(metric: str, record: Record | None) -> str:
    return described(metric).unit or (record.unit if record else "") or "1"


def axis_label(record: Record) -> str:
    """`KL divergence [nats/token]`."""
    return f"{words(record.metric)} [{_unit(record.metric, record)}]"


def _last(records: list[Record], metric: str) -> dict[str, Record]:
    """The newest record of a metric for each subject, in order of appearance."""
    return {r.subject: r for r in records if r.metric == metric}


def measured(records: list[Record], metric: str, baseline: str | None = None) -> dict[str, Record]:
    """The records of a metric that have a value, the baseline first.

    Raises ValueError when a baseline is named that is not among them.
    """
    found = {s: r for s, r in _last(records, metric).items() if r.value is not None}
    if baseline is None:
        return found
    if baseline not in found:
        raise ValueError(f"the baseline {baseline!r} has no {metric}; subjects that have: {', '.join(found) or 'none'}")
    return baseline_first(found, baseline)


def baseline_first(subjects: dict, baseline: str) -> dict:
    """The same subjects, the baseline moved to the front."""
    return {s: subjects[s] for s in sorted(subjects, key=lambda s: s != baseline)}
