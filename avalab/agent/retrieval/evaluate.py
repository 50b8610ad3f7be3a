"""What an index is worth: recall by way of searching, time of a query, and right answers with and without it.

The index of the standard library's documentation is built once below the run's artefacts and brought up to date by each
run. Its questions are of the documents of `test`; nothing here is chosen by looking at them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from avalab.agent.retrieval import citations, embedding, questions
from avalab.agent.retrieval.index import Index
from avalab.agent.retrieval.questions import Question
from avalab.agent.speaker import Speaker
from avalab.lab import statistics
from avalab.lab.run import Run, load_average
from avalab.lab.statistics import Comparison

FIRST = 5

DIRECT = "Answer with the dotted name alone, such as os.path.join."


def library_index(run: Run, *, threads: int = 0) -> Index:
    """The index of the documentation of the profile's first modules."""
    folder = run.artifacts_dir / "cache" / f"library-{run.profile.indexed_modules}"
    if not folder.is_dir():
        temporary = folder.with_name(f".{folder.name}")
        questions.write_documents(temporary, most=run.profile.indexed_modules)
        temporary.rename(folder)
    embedder = embedding.available(threads=threads) if run.profile.document_vectors else None
    index = Index(folder.with_suffix(".sqlite"), embedder)
    index.build(folder, progress=True)
    return index


def record_recall(run: Run, index: Index, asked: Sequence[Question]) -> dict[str, list[bool]]:
    """Which questions find their section among the first five, by way; recorded with the time of a query."""
    found: dict[str, list[bool]] = {}
    ways = ("words", "meaning", "fused") if index.has_vectors else ("words",)
    times: dict[str, list[float]] = {way: [] for way in ways}
    index.search("warm up")
    for question in asked:
        for way in ways:  # in turn, so that what else the machine does meets all of them
            began = time.perf_counter()
            pieces = index.search(question.text, FIRST, way=way)
            times[way].append(1000 * (time.perf_counter() - began))
            found.setdefault(way, []).append(any(map(question.is_answered_by, pieces)))
    for way in ways:
        by_kind = {
            kind: sum(hit for hit, q in zip(found[way], asked, strict=True) if q.kind == kind)
            / max(1, sum(q.kind == kind for q in asked))
            for kind in questions.KINDS
        }
        share = statistics.wilson(sum(found[way]), len(asked))
        run.record(way, "recall_at_5", unit="1", details={"by kind": by_kind, "pieces": len(index)}, **vars(share))
        about = {"load": load_average(), "pieces": len(index)}
        run.record(way, "query_ms", unit="ms", details=about, **vars(statistics.quantile(times[way], 0.95)))
    if not index.has_vectors:
        why = "no vectors: not in this profile, or minilm-l6-int8, its tokenizer or ONNX Runtime is not here"
        for way in ("meaning", "fused"):
            run.record(way, "recall_at_5", None, "1", note=why)
    return found


def record_answers(run: Run, speaker: Speaker, index: Index, asked: Sequence[Question]) -> Comparison:
    """Questions for a name, answered by the model alone and from the documents, recorded and compared in pairs."""
    right: dict[str, list[bool]] = {"alone": [], "with documents": []}
    cited = 0
    for question in asked:
        chat = [{"role": "system", "content": DIRECT}, {"role": "user", "content": question.text}]
        right["alone"].append(question.is_right(speaker.say(chat, most=24).text))
        reply = citations.ask(speaker, index, question.text)
        right["with documents"].append(question.is_right(reply.text) and reply.is_known)
        cited += reply.is_known
    for subject, each in right.items():
        details = {"answered": cited} if subject == "with documents" else {}
        share = statistics.wilson(sum(each), len(each))
        run.record(subject, "right_share:documents", unit="1", details=details, **vars(share))
    return statistics.mcnemar(right["with documents"], right["alone"])
