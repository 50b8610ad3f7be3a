"""The price of a longer context: time a token and memory at each length, in an engine, beside what formulas predict.

1. A fresh process loads the artefact once. For each length, shortest first, it reads a prompt of random tokens and
   makes `new_tokens` greedy ones: at the end `length` tokens are in the context. The first length is done twice, to
   warm up. A token's latency is the time since the token before it.
2. The peak of resident memory is reset before each length. Memory that an engine keeps is in the next peak too, which
   changes nothing as lengths grow; llama.cpp allocates the cache of the longest length when it loads.
3. After each length the process reads a buffer of the bytes that one token reads; the best rate is that of step 5.
4. Each length is written down when it is done: where the process dies (out of memory), the shorter ones stay.
5. Predictions. Memory: the parts of `cost.predict_memory`, with the cache at `cache_bits` and its scales. Time:

       seconds a token = (weight bytes + 2 x layers x kv heads x head size x cached bytes a value x length) / read rate

   which is a bound (Williams et al., "Roofline", 2009): nothing computes, all bytes come from memory, none twice.

Cache precision: 16 bits everywhere; 8 bits in OpenVINO (u8, a scale and a zero point a head and token) and in llama.cpp
(q8_0, a scale for 32 values). An untied input embedding counts as read though one row of it is.

llama.cpp maps its file, and beside it holds copies of the tensors whose blocks it interleaves (`INTERLEAVED`), float32
activations of `llamacpp.BATCH` tokens, float32 logits, and its vocabulary with the merges (`VOCABULARY_BYTES` a token
and some for itself, measured: 49,152 and 151,936 tokens took 23 and 53 MB).

OpenVINO GenAI keeps 1.15 times a GGUF file beside it, and a library of 70 MB (measured with nothing read yet: files of
1, 92 and 145 MB took 73, 272 and 380 MB).

Not in the formula: what OpenVINO's unpaged graph needs to read a prompt, which grows with the square of its length.

And what a longer context is worth: `record_positions`, the perplexity of each stretch of positions in long windows, and
`record_passkeys`, whether five digits hidden in a long text are found again (Mohtashami and Jaggi 2023, arXiv
2305.16300, section 4.2). Both read a prompt in one pass, with full attention.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avalab import engines
from avalab.engines import llamacpp
from avalab.lab import artifacts, llamacpp_library, statistics, trackers
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cache_path, cached_tensors
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import Run, load_average
from avalab.measure import cell, cost
from avalab.measure.cell import Workload
from avalab.models import checkpoint, gguf_layout, predict, sizes
from avalab.models.inference.quantized_cache import GROUP

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)

CACHE_BITS = (16, 8)

# Types of which llama.cpp's x86 build makes a copy in another order; of q4_0 and q4_k it was measured, of the others it
# is what its repack.cpp says. Rows are looked up in an embedding, which therefore stays as it is.
INTERLEAVED = ("q4_0", "q4_k", "iq4_nl", "q2_k")

VOCABULARY_BYTES, LIBRARY_BYTES = 300, 8 * 10**6  # of llama.cpp: a token, and once

OPENVINO_COPIES, OPENVINO_BYTES = 1.15, 70 * 10**6  # of a GGUF file, and once

LIMIT_SECONDS = 600

LIBRARIES = {"openvino": "openvino_genai", "onnx": "onnxruntime_genai"}

QUANTIZED_CACHE = "{} keeps its cache in 16 bits here; torch, openvino and llamacpp have one of 8 bits"


@dataclass(frozen=True)
class Point:
    """One length: bytes and seconds, measured and predicted. Values are None where `note` says what stopped it."""

    length: int  # tokens in the context when the last one is made
    seconds_per_token: float | None  # median
    first_token_seconds: float | None
    peak_bytes: int | None
    predicted_bytes: int | None = None
    predicted_seconds: float | None = None  # a bound: what reading takes
    samples: tuple[float, ...] = ()
    note: str = ""
    details: dict = field(default_factory=dict)  # load average, read rate, parts of the predicted memory


def measure_lengths(
    artifact: Artifact | Path,
    engine: str,
    *,
    lengths: Sequence[int] = LENGTHS,
    cache_bits: int = 16,
    threads: int = 0,
    new_tokens: int = 16,
    memory_cap_gib: float | None = None,
) -> list[Point]:
    """Measure an artefact at each length, in a process of its own; points in the order of length.

    Within `memory_cap_gib` the process cannot take more, and a length that is predicted not to fit is not started.
    Raises ValueError for such a length, one that the model's context does not hold or that leaves no prompt, or a
    limit that not even the shortest keeps to, EngineUnavailable or
    NotSupported as the engine does (also for a cache it does not have), RuntimeError when not one length was measured.
    """
    folder = sizes.folder_of(artifact).resolve()
    lengths = _checked_lengths(lengths, new_tokens, engines.facts(folder).context)
    prompts = tuple(length - new_tokens for length in lengths)
    asked = {"engine": engine, "cache_bits": cache_bits, "new_tokens": new_tokens, "longest": lengths[-1]}
    refuse_over_cap(folder, asked, memory_cap_gib)
    work = Workload(
        prompts=prompts,
        new_tokens=new_tokens,
        threads=threads,
        memory_cap_gib=memory_cap_gib,
        limit_seconds=LIMIT_SECONDS,
    )
    lines, why = _measure_in_process(folder, engine, work, cache_options(engine, cache_bits, lengths[-1]))
    rate = max((line["read_bytes_per_s"] for line in lines), default=0.0)
    note = f"stopped after {len(lines)} of {len(lengths)} lengths: {why}"
    rest = [Point(length, None, None, None, note=note) for length in lengths[len(lines) :]]
    return [_point(folder, line, asked, rate) for line in lines] + rest


def refuse_over_cap(folder: Path, asked: dict, cap_gib: float | None) -> None:
    """Raise InputError, with the prediction, where the longest context of a measurement would not fit into a limit."""
    if cap_gib:
        parts = predict_length(folder, asked=asked, length=asked["longest"], runtime_bytes=0, bytes_per_s=1.0)["memory"]
        cost.refuse_over_cap(folder.name, asked["engine"], parts, cap_gib, tokens=asked["longest"])


def _checked_lengths(lengths: Sequence[int], new_tokens: int, context: int) -> list[int]:
    ordered = sorted(set(lengths))
    if new_tokens < 2:
        raise InputError(f"need at least 2 new tokens to time one, got {new_tokens}")
    if not ordered or ordered[0] <= new_tokens or ordered[-1] > context:
        shown = ", ".join(f"{n:,}" for n in lengths) or "none"
        raise InputError(f"lengths have to be {new_tokens + 1} to {context:,} tokens, the model's context; got {shown}")
    return ordered


def cache_options(engine: str, cache_bits: int, context: int) -> dict:
    """What the engine is loaded with for such a cache. Raises ValueError for other bits, NotSupported without one."""
    known = (*CACHE_BITS, 4) if engine == "torch" else CACHE_BITS
    if cache_bits not in known:
        raise InputError(f"no cache of {cache_bits} bits in {engine}; choose {' or '.join(map(str, known))}")
    if engine == "torch":
        return {} if cache_bits == 16 else {"cache_bits": cache_bits}
    if engine == "openvino":
        return {"properties": {"KV_CACHE_PRECISION": {16: "f16", 8: "u8"}[cache_bits]}}
    if engine == "llamacpp":
        return {"context": context, "cache_bits": cache_bits}
    if cache_bits != 16:
        raise engines.NotSupported(QUANTIZED_CACHE.format(engine))
    return {"context": context} if engine in ("vllm", "tensorrt") else {}


def _measure_in_process(folder: Path, engine: str, work: Workload, options: dict) -> tuple[list[dict], str]:
    """The lengths that were measured before the process ended, and what stopped it ('' when it finished).

    Raises what stopped it where that was before the first length.
    """
    work, _ = cell.usable_work(folder, engine, work)
    with tempfile.TemporaryDirectory() as scratch:
        file, why = Path(scratch) / "lengths.jsonl", ""
        request = asdict(work) | {"options": options, "file": str(file)}
        try:
            cell.ask_engine("avalab.measure.context:run_lengths", folder, engine, request, work.limit_seconds)
        except RuntimeError as error:
            if not file.is_file():
                raise
            why = str(error)
        # A line that the process was writing when it died has no end.
        return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")], why


def run_lengths(request: dict) -> dict:
    """In the measuring process: a line in `file` for each of `prompts` and its new tokens: seconds, bytes, read rate.

    `request` is that of `cell.ask_engine`, with a workload's fields, `file` and the engine's `options`.
    """
    library = LIBRARIES.get(request["engine"])
    if library and importlib.util.find_spec(library):
        importlib.import_module(library)  # its code is no part of what the artefact needs
    if request["engine"] == "llamacpp":
        llamacpp_library.opened(llamacpp_library.find())
    engines.facts(Path(request["folder"]))  # reads the tokenizer, which is the program's
    trackers.return_free_memory()
    facts = {"runtime_bytes": trackers.process_memory()["rss"], "load_average": load_average()}
    folder, new, draw = Path(request["folder"]), request["new_tokens"], random.Random(0)
    engine, loading = cell.load_engine(request, **request["options"])
    facts["idle_bytes"] = loading["loaded_bytes"]
    weights, shape = sizes.weight_file_bytes(folder), sizes.shape_of(folder)
    for index, tokens in enumerate([request["prompts"][0], *request["prompts"]]):
        prompt = [draw.randrange(engine.facts.vocabulary) for _ in range(tokens)]
        trackers.reset_peak_memory("cpu")
        told = cell.time_tokens(engine, prompt, new)
        if index:  # the first one warms up
            peak = trackers.process_memory()["peak"]
            steps = [after - before for before, after in itertools.pairwise(told)]
            footprint = weights + sizes.kv_cache_bytes(shape, context=tokens + new)
            rate = trackers.best_memory_read_rate(footprint, threads=request["threads"])
            line = {"length": tokens + new, "first": told[0], "steps": steps, "peak": peak, "read_bytes_per_s": rate}
            with Path(request["file"]).open("a") as file:
                file.write(json.dumps(facts | line) + "\n")
    return {}


def _point(folder: Path, line: dict, asked: dict, bytes_per_s: float) -> Point:
    predicted = predict_length(
        folder, asked=asked, length=line["length"], runtime_bytes=line["runtime_bytes"], bytes_per_s=bytes_per_s
    )
    details = {"memory": predicted["memory"], "cache_bits": asked["cache_bits"]}
    details |= {name: line[name] for name in ("length", "read_bytes_per_s", "load_average", "idle_bytes")}
    return Point(
        length=line["length"],
        seconds_per_token=statistics.quantile(line["steps"]).value,
        first_token_seconds=line["first"],
        peak_bytes=line["peak"],
        predicted_bytes=predicted["memory"]["total"],
        predicted_seconds=predicted["seconds"],
        samples=tuple(line["steps"]),
        details=details,
    )


def predict_length(folder: Path, *, asked: dict, length: int, runtime_bytes: int, bytes_per_s: float) -> dict:
    """Predicted `memory` (bytes, part by part, with `total`), `seconds` a token and `read_bytes` at a length.

    `asked` holds `engine`, `cache_bits`, `new_tokens` and `longest`, the greatest length of the measurement.
    """
    model, engine = sizes.shape_of(folder), asked["engine"]
    bits = cached_bits(engine, asked["cache_bits"], model.head_dim)
    weights, prompt = sizes.weight_file_bytes(folder), length - asked["new_tokens"]
    at_once = min(prompt, llamacpp.BATCH) if engine == "llamacpp" else prompt
    memory = cost.predict_memory(
        model,
        _storage_of(folder, engine),
        weight_bytes=weights,
        work=Workload(prompts=(at_once,), new_tokens=asked["new_tokens"]),
        runtime_bytes=runtime_bytes,
    )
    is_gguf = engines.kind(folder) == "gguf"
    if engine == "llamacpp" and is_gguf:
        memory |= _llamacpp_parts(folder, model, at_once)
    elif engine == "openvino" and is_gguf:
        memory |= {"copies": int(OPENVINO_COPIES * weights), "library": OPENVINO_BYTES}
    held = asked["longest"] if engine == "llamacpp" else length
    memory["kv_cache"] = int(sizes.kv_cache_bytes(model, context=held) * bits / 16)
    memory["total"] = sum(size for part, size in memory.items() if part != "total")
    read = weights + int(sizes.kv_cache_bytes(model, context=length) * bits / 16)
    return {"memory": memory, "seconds": read / bytes_per_s, "read_bytes": read}


def _llamacpp_parts(folder: Path, model: sizes.Shape, tokens: int) -> dict[str, int]:
    """What differs in llama.cpp from the parts of `cost.predict_memory`."""
    tensors = gguf_layout.tensor_bytes(engines.gguf_file(folder))
    looked_up = "" if model.tied else "token_embd.weight"  # a tied one is multiplied with, too
    copied = sum(size for name, (kind, size) in tensors.items() if kind in INTERLEAVED and name != looked_up)
    return {
        "copies": copied,
        "activations": 4 * tokens * (2 * model.hidden + 3 * model.mlp),
        "logits": 4 * model.vocab,
        "vocabulary": LIBRARY_BYTES + VOCABULARY_BYTES * model.vocab,
    }


def cached_bits(engine: str, cache_bits: int, head_dim: int) -> float:
    """Bits that the cache takes for one value, scales included."""
    if cache_bits == 16:
        return 16.0
    if engine == "torch":  # keys by channel of 32 tokens, values by token: scale and least value in 16 bits each
        return cache_bits + 32 * (1 / GROUP + 1 / head_dim) / 2
    return 8 + 16 / 32 if engine == "llamacpp" else 8 + 2 * 32 / head_dim


def _storage_of(folder: Path, engine: str) -> sizes.Storage:
    """What the torch engine copies is known by the artefact's last step; other engines are taken to copy nothing."""
    if engine != "torch" or not (folder / artifacts.CARD).is_file():
        return sizes.BF16
    try:
        return sizes.storage_of_artifact(artifacts.load_artifact(folder, verify=False))[0]
    except (ValueError, IndexError):  # a step that stores dense weights, or no recipe at all
        return sizes.BF16


def record_lengths(
    run: Run,
    artifact: Artifact,
    engine: str,
    *,
    lengths: Sequence[int] = LENGTHS,
    cache_bits: int = 16,
    threads: int = 0,
) -> list[Point]:
    """`measure_lengths` and append to `run`, every metric with the ending `:context<length>:cache<bits>`.

    A failure as a whole is one record without value whose note gives the reason, and no point is returned.
    """
    record = partial(run.record, artifact.name, artifact_sha256=artifact.sha256, engine=engine, threads=threads)
    try:
        points = measure_lengths(
            artifact,
            engine,
            lengths=lengths,
            cache_bits=cache_bits,
            threads=threads,
            memory_cap_gib=run.profile.memory_cap_gib,
        )
    except (RuntimeError, ValueError) as error:
        metric = f"token_latency_ms:context{max(lengths)}:cache{cache_bits}"
        record(metric, None, "ms", note=str(error))
        return []
    for point in points:
        ending = f"context{point.length}:cache{cache_bits}"
        if point.seconds_per_token is None:
            record(f"token_latency_ms:{ending}", None, "ms", note=point.note)
            continue
        one, samples = partial(record, details=point.details), [1000 * s for s in point.samples]
        one(f"token_latency_ms:{ending}", unit="ms", samples=samples, **vars(statistics.quantile(samples)))
        one(f"time_to_first_token_ms:{ending}", 1000 * point.first_token_seconds, "ms", n=1)
        one(f"peak_rss_bytes:{ending}", point.peak_bytes, "byte")
        one(f"predicted_bytes:peak_rss:{ending}", point.predicted_bytes, "byte")
        one(f"predicted_token_latency_ms:{ending}", 1000 * point.predicted_seconds, "ms")
    return points


# --- what it is worth ------------------------------------------------------------------------------------------------

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "

HIDDEN = "The pass key is {key}. Remember it. {key} is the pass key. "

ASKED = "What is the pass key? The pass key is"


def position_losses(
    artifact: Artifact, windows: Int[Tensor, "window time"], cache: Path, device: str
) -> Float[Tensor, "window token"]:
    """Negative log-likelihood in nats of every token that has a predecessor in its window; kept in `cache`."""
    path = cache_path(cache, "positions", artifact.sha256, predict.windows_sha256(windows), code_of(token_losses)[:8])

    def compute() -> dict[str, Tensor]:
        model = checkpoint.load_model(artifact, device)
        found = [token_losses(model, window) for window in tqdm(windows, desc=artifact.name, leave=False)]
        return {"nll": torch.stack(found)}

    return cached_tensors(path, compute)["nll"]


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: Int[Tensor, "time"]) -> Float[Tensor, "token"]:
    """Negative log-likelihood of each token but the first."""
    hidden = predict.hidden_states(model, ids[None])[0]
    head, finish = predict.in_float32(*predict.output_head(model))
    found = [
        -predict.log_probabilities(hidden[rows], head, finish).gather(1, ids[1:, None][rows].to(hidden.device))[:, 0]
        for rows in predict.chunks(len(ids) - 1)
    ]
    return torch.cat(found).cpu()


def record_positions(
    run: Run, subject: str, artifact: Artifact, windows: Int[Tensor, "window time"], *, parts: int = 4
) -> Float[Tensor, "window token"]:
    """Append `perplexity:<first>_<last>` of each of `parts` equal stretches of positions, intervals over windows."""
    nll = position_losses(artifact, windows, run.artifacts_dir / "cache", run.device)
    step = -(-nll.shape[1] // parts)
    for first in range(0, nll.shape[1], step):
        part = nll[:, first : first + step]
        found = statistics.perplexity(part.numpy(), resamples=run.profile.resamples, seed=run.seed)
        name = f"perplexity:{first}_{first + part.shape[1]}"
        run.record(subject, name, unit="1", artifact_sha256=artifact.sha256, engine="torch", **vars(found))
    return nll


def passkey_prompts(
    tokenizer: PreTrainedTokenizerBase, *, tokens: int, depths: Sequence[float], count: int, seed: int
) -> Iterator[tuple[float, list[int], list[int]]]:
    """(depth, prompt, answer), as tokens, of `count` keys hidden at each relative depth of a text; at most `tokens`."""
    random_key = random.Random(seed)
    filler, asked = (tokenizer(text, add_special_tokens=False).input_ids for text in (FILLER, ASKED))
    for depth in depths:
        for _ in range(count):
            key = random_key.randrange(10_000, 100_000)
            hidden = tokenizer(HIDDEN.format(key=key), add_special_tokens=False).input_ids
            answer = tokenizer(f" {key}", add_special_tokens=False).input_ids
            room = (tokens - len(hidden) - len(asked) - len(answer)) // len(filler)
            if room < 1:
                least = len(filler) + len(hidden) + len(asked) + len(answer)
                raise InputError(f"a pass key does not fit into {tokens} tokens; give at least {least}")
            before = round(depth * room)
            yield depth, filler * before + hidden + filler * (room - before) + asked, answer


@torch.no_grad()
def finds_passkey(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> bool:
    """Whether greedy decoding gives the answer: each of its tokens is the most probable one after those before."""
    ids = torch.tensor([prompt + answer[:-1]], device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -len(answer) :]
    head, finish = predict.output_head(model)
    return finish(head(hidden)).argmax(-1).tolist() == answer


def record_passkeys(
    run: Run, subject: str, artifact: Artifact, *, tokens: int, depths: Sequence[float] = (0.1, 0.5, 0.9)
) -> list[bool]:
    """Append `right_share:passkey_<tokens>`: how many of the profile's hidden keys are found, over all depths."""
    model, tokenizer = checkpoint.load_model(artifact, run.device), checkpoint.load_tokenizer(artifact)
    asked = list(passkey_prompts(tokenizer, tokens=tokens, depths=depths, count=run.profile.passkeys, seed=run.seed))
    found = [finds_passkey(model, prompt, answer) for _, prompt, answer in tqdm(asked, desc=subject, leave=False)]
    by_depth = {str(depth): sum(f for f, (d, *_) in zip(found, asked, strict=True) if d == depth) for depth in depths}
    about = {"artifact_sha256": artifact.sha256, "engine": "torch", "details": {"found_by_depth": by_depth}}
    run.record(
        subject, f"right_share:passkey_{tokens}", unit="1", **about, **vars(statistics.wilson(sum(found), len(found)))
    )
    return found
