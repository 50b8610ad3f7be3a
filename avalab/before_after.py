"""The tables of what changed on a whole model: speed and peak memory of every form, and of the first one.

`rows` reads the records of `kernels_end_to_end`, `recorded` those that `make bench-train` left for the same results
folder, and says which file, commit and day they are from, so that no number is taken for this run's.

What it does not do: measure, or judge (`roofline.judge`).
"""

from __future__ import annotations

from avalab.experiment import ROOT, Record, Run, load_records

RATES = ("prefill_tokens_per_s", "decode_tokens_per_s", "train_tokens_per_s")
PEAKS = ("peak_rss_bytes:engine", "peak_rss_bytes", "peak_vram_bytes")
HEADER = ("work", "form", "tokens/s", "of the first form [rounds]", "peak memory [MB]")
Rows = tuple[tuple[str, ...], ...]


def rows(records: list[Record]) -> Rows:
    """Rows under `HEADER` of all speeds that have a ratio `<metric>/before`: one a work and form."""
    found = {(r.subject, r.metric): r for r in records if r.value is not None}
    shown = []
    for subject, metric in found:
        if metric in RATES and (subject, f"{metric}/before") in found:
            work, _, form = subject.rpartition(":")
            shown.append((work, form, *_cells(found, subject, metric, "before")))
    return tuple(shown)


def recorded(run: Run) -> tuple[Rows, str]:
    """Rows under `HEADER` of the longer training runs of `make bench-train`, and a note on where they are from."""
    path = run.results_dir / "bench_train.json"
    where = path.relative_to(ROOT)
    if not path.is_file():
        return (
            (),
            f"Longer training runs and their peaks of memory: make bench-train writes {where}; there is none yet.",
        )
    found = {(r.subject, r.metric): r for r in load_records(path) if r.value is not None}
    speeds = {arm: record for (arm, metric), record in found.items() if metric == RATES[2]}
    if not speeds:
        return (), f"{where} holds no speed of a training step."
    shown = [("train, longer run", arm, *_cells(found, arm, RATES[2], "peft")) for arm in speeds]
    one = next(iter(speeds.values()))
    return tuple(shown), f"Longer run: {where}, commit {one.commit}, {one.when[:10]}, threads {one.threads}."


def _cells(found: dict[tuple[str, str], Record], subject: str, metric: str, first: str) -> tuple[str, str, str]:
    """Speed, ratio with its range, and peak memory where it was measured."""
    ratio = found[subject, f"{metric}/{first}"]
    peak = next((found[subject, name].value for name in PEAKS if (subject, name) in found), None)
    span = f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
    return f"{found[subject, metric].value:.4g}", span, "" if peak is None else f"{peak / 1e6:.4g}"
