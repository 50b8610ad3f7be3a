"""One tidy frame of records, what a metric is called, and tables of both.

A metric is a row of `METRICS`: its words, its unit and the factor to that unit; 1 MB is 10^6 bytes. Figures and tables
start from `frame`, a DataFrame with a row a record, and `measured`, which picks a metric from it as it is shown. An
interval decides the decimals of its value; a missing value is shown as the reason for it. Pandas is imported by what
needs it: numbers as text do without.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avalab.lab.errors import InputError
from avalab.lab.run import Record

if TYPE_CHECKING:
    import pandas


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
    "call_accuracy_grammar_gain": Metric("function calls right, with grammar, above templates", "%", 100, True),
    "call_accuracy_forced": Metric("function calls right, call forced", "%", 100, True),
    "call_accuracy_forced_difference": Metric("function calls right, ours less its", "%", 100, True),
    "irrelevance_accuracy_free": Metric("irrelevance noticed, free form", "%", 100, True),
    "irrelevance_accuracy": Metric("irrelevance noticed", "%", 100, True),
    "pass_at_1": Metric("pass@1", "%", 100, True),
    "rejected_share": Metric("rejected", "%", 100),
    "rejected_alone_share": Metric("rejected by no other gate", "%", 100),
    "answer_seconds": Metric("time an answer", "s"),
    "shared_prefix_seconds": Metric("requests that share a beginning", "s"),
    "prefill_share": Metric("tokens read over unique ones", "1"),
    "speedup": Metric("how many times as fast", "1", 1, True),
    "slowdown": Metric("how many times as slow", "1"),
    "urgent_first_token_ms": Metric("first token of an urgent request", "ms"),
    "valid_share": Metric("calls that fit their schema", "%", 100, True),
    "worker_bytes": Metric("memory of workers", "MB", 1e-6),
    "memory_ratio": Metric("memory over that of one", "1"),
    "second_worker_seconds": Metric("time to start another worker", "s"),
    "first_answer_ms": Metric("first answer", "ms"),
    "load_ratio": Metric("loads over those of plain LRU", "1"),
    "longest_wait_ms": Metric("longest wait", "ms"),
    "needle_kept": Metric("facts that are still there", "%", 100, True),
    "rating": Metric("rating", "of 5", 1, True),
    "preferred_share": Metric("preferred to the baseline", "%", 100, True),
    "krippendorff_alpha": Metric("agreement of raters, alpha", "1", 1, True),
    "same_answer_share": Metric("same answer as the baseline", "%", 100, True),
    "recovered": Metric("recovered", "%", 100, True),
    "pair_accuracy": Metric("pairs ranked right", "%", 100, True),
    "pair_margin": Metric("margin of pairs", "nats", 1, True),
    "recall_at_1": Metric("own name is the nearest", "%", 100, True),
    "recall_at_5": Metric("the right one is among the first five", "%", 100, True),
    "contrastive_loss": Metric("contrastive loss of a step", "nats"),
    "train_loss": Metric("loss of a step", "nats/token"),
    "calls_per_s": Metric("calls", "calls/s", 1, True),
    "speed_ratio": Metric("calls a second, ours over its", "1", 1, True),
    "readings_per_token": Metric("readings of the model a token", "1"),
    "grammar_share": Metric("time in the grammar", "%", 100),
    "identical_share": Metric("answers as by slow decoding", "%", 100, True),
    "right_share": Metric("right answers", "%", 100, True),
    "query_ms": Metric("time a query, 95th percentile", "ms"),
    "task_success": Metric("tasks solved", "%", 100, True),
    "steps_per_task": Metric("calls a task", "calls"),
    "tokens_per_task": Metric("tokens a task", "tokens"),
    "seconds_per_task": Metric("time a task", "s"),
    "calibration_error": Metric("calibration error", "%", 100),
    "robust_share": Metric("right in every spelling", "%", 100, True),
    "fair_share": Metric("right whoever asks", "%", 100, True),
    "valid_calls": Metric("calls answered as they should be", "%", 100, True),
    "caught_share": Metric("worse models caught", "%", 100, True),
    "false_alarm_share": Metric("equal models accused", "%", 100),
    "budgets_exceeded": Metric("budgets exceeded", ""),
    "plan_seconds": Metric("time to plan", "s"),
    "rollback_seconds": Metric("time to go back", "s"),
}


@dataclass(frozen=True, repr=False)
class Table:
    """Rows of text under a header; HTML in a notebook, markdown when printed."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        header = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self.header)
        rows = []
        for name, *cells in self.rows:
            texts = [html.escape(text.replace(", ", ",\N{NO-BREAK SPACE}")) for text in cells]
            row = "".join(f"<td>{text}</td>" for text in texts)
            rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{row}</tr>')
        notes = "".join(f"<p><small>{html.escape(note)}</small></p>\n" for note in self.notes)
        return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>{notes}"

    def __repr__(self) -> str:
        lines = [self.header, ("---", *["---:"] * (len(self.header) - 1)), *self.rows]
        notes = "".join(f"\n\n{note}" for note in self.notes)
        return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines) + notes


def table(
    records: Iterable[Record] | pandas.DataFrame,
    subjects: Sequence[str],
    metrics: Sequence[str],
    *,
    baseline: str = "bf16",
) -> Table:
    """One row a subject, one column a metric: `0.231 [0.214, 0.249]`, the unit in the header.

    A column `artifact_bytes/baseline` says how many times better than the baseline (`2.40x`). A number in parentheses
    is that of the reason for a missing value, or of what disturbed its measurement. Raises ValueError naming subjects
    without a record.
    """
    found = frame(records)
    if unknown := [s for s in subjects if s not in set(found.subject)]:
        raise InputError(f"no record of {', '.join(unknown)}; recorded: {', '.join(sorted(set(found.subject)))}")
    newest = {(r.subject, r.metric): r for r in found.record}
    first = {r.metric: r for r in reversed(list(found.record))}
    notes: dict[str, int] = {}
    rows = [(s, *[_cell(newest, s, metric, baseline, notes) for metric in metrics]) for s in subjects]
    header = [""]
    for metric in metrics:
        name = metric.removesuffix("/baseline")
        if name != metric:
            header.append(
                f"{metric_words(name)}, {'gain' if described(name).higher_is_better else 'times smaller'} [x]"
            )
        else:
            unit = _unit(name, first.get(name))
            header.append(metric_words(name) if unit == "1" else f"{metric_words(name)} [{unit}]")
    return Table(tuple(header), tuple(rows), tuple(f"({n}) {note}" for note, n in notes.items()))


def _cell(newest: dict, subject: str, metric: str, baseline: str, notes: dict[str, int]) -> str:
    """The text of a cell; a missing value becomes the number of its reason in `notes`, which grows."""
    name = metric.removesuffix("/baseline")
    record, base = newest.get((subject, name)), newest.get((baseline, name))
    if record is None or record.value is None:
        reason = (record.note if record else "") or "not measured"
        return f"({notes.setdefault(reason, len(notes) + 1)})"
    if name == metric:
        mark = f" ({notes.setdefault(record.note, len(notes) + 1)})" if "disturbed: " in record.note else ""
        return value_text(record, unit=False) + mark
    if base is None or not base.value or not record.value:
        return f"({notes.setdefault(f'no ratio to {baseline}', len(notes) + 1)})"
    ratio = record.value / base.value
    return f"{ratio if described(name).higher_is_better else 1 / ratio:.2f}x"


def budget_table(choices: Sequence[tuple], *, kl_limit: float) -> Table:
    """What to use for each budget and why, of `choose.choices`."""
    speeds = ("decode [tokens/s]", "prefill [tokens/s]")
    header = ("memory", "use", "needs [MB]", *speeds, "KL [nats/token]", "calls", "why")
    rows = []
    for budget, chosen, why in choices:
        cells = ["nothing", *[""] * 5]
        if chosen:
            needs = (chosen.memory, chosen.decode, chosen.prefill, chosen.kl)
            calls = value_text(chosen.calls) if chosen.calls else ""
            cells = [chosen.subject, *[value_text(record, unit=False) for record in needs], calls]
        rows.append((f"{budget / 2**30:g} GiB", *cells, why))
    note = f"good enough: a KL divergence of at most {kl_limit:g} nats/token; memory above the process's runtime"
    return Table(header, tuple(rows), (note,))


def answer_table(choices: Sequence, records: Iterable[Record], *, context: int) -> Table:
    """What to use for each budget and wish at a context, of `choose.answer`; its first column is `memory`."""
    files = {r.subject: r for r in records if r.metric == "artifact_bytes" and r.value is not None}
    rows = []
    for each in choices:
        cells = ["nothing", *[""] * 5]
        if found := each.candidate:
            shown = [files.get(found.subject), found.memory, found.decode, found.prefill]
            cells = [found.subject, *["" if r is None else value_text(r, unit=False) for r in shown]]
            cells.append(value_text(found.calls))
        rows.append((f"{each.budget_bytes / 2**30:g} GiB", each.wish.name, *cells, each.why))
    speeds = ("decode [tokens/s]", "prefill [tokens/s]")
    header = ("memory", "you want", "use", "file [MB]", "needs [MB]", *speeds, "calls right", "why")
    return Table(header, tuple(rows), (f"all at a context of {context:,} tokens; memory above the process's runtime",))


def claim_table(judged: Sequence) -> Table:
    """Claims about each subject and what was found, of `claims.judge_claims`."""
    claims = list(dict.fromkeys(each.claim.words for each in judged))
    found = {(each.subject, each.claim.words): each.verdict for each in judged}
    subjects = dict.fromkeys(each.subject for each in judged)
    return Table(("after", *claims), tuple((s, *[found[s, words] for words in claims]) for s in subjects))


def target_table(judged: Sequence[tuple]) -> Table:
    """What was asked of the default and what was found, of `choose.judge_targets`."""
    rows = [(target.claim, f"at least {target.wanted:g}x", sentence) for target, _, sentence in judged]
    return Table(("target", "asked", "found"), tuple(rows))


def value_text(record: Record, *, unit: bool = True) -> str:
    """`0.231 [0.214, 0.249] nats/token`; the interval's half width is shown with two digits.

    Raises ValueError when the record has no value.
    """
    if record.value is None:
        raise InputError(f"{record.metric} of {record.subject!r} has no value: {record.note or 'no reason given'}")
    factor, name = display_factor(record), _unit(record.metric, record)
    ending = f" {name}" if unit and name != "1" else ""
    value = factor * record.value
    if record.low is None or record.high is None or record.high <= record.low:
        return number(value) + ending
    low, high = factor * record.low, factor * record.high
    decimals = max(0, 1 - math.floor(math.log10((high - low) / 2)))
    return f"{value:,.{decimals}f} [{low:,.{decimals}f}, {high:,.{decimals}f}]{ending}"


def number(value: float) -> str:
    """Four significant digits without an exponent where that is readable: `112.4`, `0.001700`, `12,345`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-5:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def show_ratio(label: str, predicted: float, measured: float, *, unit: str = "bytes") -> None:
    """Print `bytes: predicted 123.4 MB, measured 124.0 MB, measured/predicted 1.005`; bytes are shown in MB.

    Raises ValueError when the prediction is not positive.
    """
    if not predicted > 0:
        raise InputError(f"predicted {label} is {predicted}; a ratio needs a positive prediction")
    factor, shown = (1e-6, "MB") if unit == "bytes" else (1, unit)
    before, after = number(factor * predicted), number(factor * measured)
    ratio = f"measured/predicted {measured / predicted:.3f}"
    print(f"{label}: predicted {before} {shown}, measured {after} {shown}, {ratio}")


def display_factor(record: Record) -> float:
    """What a record's value is multiplied with to be shown."""
    row = described(record.metric)
    return 1.0 if record.unit == row.unit else row.factor


def metric_words(metric: str) -> str:
    """`KL divergence, function calls` for `kl_divergence:function_calls`."""
    name, _, part = metric.partition(":")
    whole = METRICS.get(part) or METRICS.get(f"{part}_bytes")  # predicted_bytes:peak_rss
    detail = whole.words if whole else part.replace("_", " ")
    return described(metric).words + (f", {detail}" if part and name in METRICS else "")


def described(metric: str) -> Metric:
    """The row of a metric, a `:suffix` ignored; one of its own words and no unit if `METRICS` has none."""
    name = metric.partition(":")[0]
    return METRICS.get(name, Metric(metric.replace("_", " ").replace(":", ", "), ""))


def _unit(metric: str, record: Record | None) -> str:
    return described(metric).unit or (record.unit if record else "") or "1"


def axis_label(values: pandas.DataFrame) -> str:
    """`KL divergence [nats/token]`, of what `measured` found."""
    record = values.record.iloc[0]
    return f"{metric_words(record.metric)} [{_unit(record.metric, record)}]"


def frame(records: Iterable[Record] | pandas.DataFrame) -> pandas.DataFrame:
    """One row a record: its fields, its metric's `name` and what follows the colon (`part`), and the `record` itself.

    What has no value is NaN. A frame comes back as it is.
    """
    import pandas

    if isinstance(records, pandas.DataFrame):
        return records
    fields = [field.name for field in dataclasses.fields(Record)]
    rows = [(*vars(r).values(), *r.metric.partition(":")[::2], r) for r in records]
    found = pandas.DataFrame(rows, columns=[*fields, "name", "part", "record"])
    return found.astype({"value": float, "low": float, "high": float})


def measured(
    records: Iterable[Record] | pandas.DataFrame, metric: str, baseline: str | None = None
) -> pandas.DataFrame:
    """The newest record of a metric for each subject that has a value, by subject, the baseline first.

    `value`, `low` and `high` are in the unit they are shown in. Raises ValueError when a baseline is named that is not
    among them.
    """
    found = frame(records)
    found = found[found.metric == metric]
    order = found.subject.drop_duplicates()
    found = found.drop_duplicates("subject", keep="last").set_index("subject").loc[order].dropna(subset="value")
    if baseline is not None:
        if baseline not in found.index:
            raise InputError(
                f"the baseline {baseline!r} has no {metric}; subjects that have: {', '.join(found.index) or 'none'}"
            )
        found = found.loc[sorted(found.index, key=lambda subject: subject != baseline)]  # the others stay in order
    factors = [display_factor(record) for record in found.record]
    return found.assign(**{column: found[column] * factors for column in ("value", "low", "high")})


def predictions(records: Iterable[Record] | pandas.DataFrame, metric: str) -> pandas.DataFrame:
    """What `measured` finds of a metric, with what was `predicted` beside it, where there are both.

    `predicted_bytes:artifact` is for `artifact_bytes`, and so on; the part may be the metric's whole name, too.
    """
    found = frame(records)
    names = (f"predicted_bytes:{metric.removesuffix('_bytes')}", f"predicted_bytes:{metric}")
    long, short = (measured(found, name).value for name in reversed(names))
    return measured(found, metric).assign(predicted=short.combine_first(long)).dropna(subset="predicted")


def components(records: Iterable[Record] | pandas.DataFrame, totals: pandas.DataFrame) -> pandas.DataFrame:
    """Sizes as shown, a column a component, a row a subject of `totals`; what they leave of a total is `other`.

    A component that no subject has is left out.
    """
    found = frame(records)
    names = found[found.name == "artifact_bytes"].part.unique()
    sizes = totals[[]].assign(**{name: measured(found, f"artifact_bytes:{name}").value for name in names if name})
    sizes = sizes.fillna(0.0).loc[:, lambda each: each.any()]
    rest = totals.value - sizes.sum(axis=1)
    return sizes.assign(other=rest) if (rest > 0.001 * totals.value).any() else sizes
