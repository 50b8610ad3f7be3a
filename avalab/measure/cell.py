"""A cell: one artefact in one engine, loaded, run and measured in a process of its own.

1. The process has imported the lab's libraries; its resident memory is then the *runtime*. It loads the artefact in the
   engine and generates once at each prompt length, which is also the warm-up: some engines unpack or re-pack their
   weights in the first call.
2. Samples: prompts of random tokens, another one each time (an engine that remembers prompts gains nothing), lengths
   interleaved, exactly `new_tokens` greedy tokens each. The first token ends the time to first token, each further one
   is a latency. Prefill speed is the prompt over the time to first token, one head product included.
3. Peaks of resident memory, while loading and while generating, are reset in between. What engine and artefact need is
   the peak above the runtime, the engine's library included; the `torch` engine's is in the runtime already, as far as
   its pages were touched before.
4. A cell during which other processes kept more than `DISTURBED` processors busy is measured once more; the calmer of
   both counts, and its records say so where it was disturbed, too.
5. The memory read rate is measured last, at the size of the bytes that a token reads and with the cell's threads.

A `predictable` cell (torch only) is one that `cost.predict_memory` can be held against. Its layers are those that the
libraries load, without the lab's kernels. Its runtime includes what any model pays: the libraries of the artefact's
format, a toy model that has run (thread pools, kernels' code pages) and a tokenizer that was read. And freed memory
goes back to the system: glibc's malloc keeps tensors of up to 32 MiB once it has seen one, and what that leaves behind
varies (20 to 240 MB on a model of 135 M parameters whose engine unpacks its weights). Until the warm-up is over, blocks
from 1 MiB are therefore mapped one by one, so that the peak is what the model needs. Samples are taken with malloc's
usual limits, since mapping costs time.

Several sequences at once (`measure_batches`): random prompts of equal length, each batch size in turn. The prefill's
time is that to the first token of all sequences. torch and ONNX Runtime tell when a step is over; OpenVINO (with paged
attention, which batches need) does not, so that a generation of one token is timed there, and one of all of them:
decoding is their difference.
"""

from __future__ import annotations

import importlib
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from avalab import engines
from avalab.engines.engine import Engine
from avalab.lab import process, statistics, trackers
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.lab.run import Run, load_average, time_now
from avalab.models import checkpoint
from avalab.models.sizes import folder_of, kv_cache_bytes, shape_of, weight_bytes_read, weight_file_bytes

FAILURES = {"EngineUnavailable": engines.EngineUnavailable, "NotSupported": engines.NotSupported}

LIBRARIES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "compressed-tensors": "compressed_tensors"}

MAPS_ITS_FILE = ("torch", "llamacpp")  # the others read it into memory of their own

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

DISTURBED = 0.25  # processors that others kept busy, on average, while samples were taken

MALLOC_RETURNS = 2**20  # bytes from which a freed block goes back to the system while memory is measured

MALLOC_KEEPS = 2**25  # glibc's own upper limit, where its sliding threshold ends in a process that runs tensors


@dataclass(frozen=True)
class Workload:
    """What an engine is asked to do: sizes in tokens, samples of each, threads (0: the engine's choice).

    `device` is that of the engine `torch`; the others choose theirs.
    """

    prompts: tuple[int, ...] = (16, 512)
    new_tokens: int = 32
    samples: int = 7
    threads: int = 0
    seed: int = 0
    device: str = "cpu"
    batches: tuple[int, ...] = (1, 4, 16)  # sequences at once, where batches are measured
    predictable: bool = False
    memory_cap_gib: float | None = None  # enforced: of a GPU's memory, or of the process beyond what it starts with
    limit_seconds: float = 600


@dataclass(frozen=True)
class Cell:
    """What was measured: bytes and seconds. Samples by prompt length: to the first token, then of each further one."""

    runtime_bytes: int  # resident before any weights
    load_seconds: list[float]  # one a process
    load_peak_bytes: int
    loaded_bytes: int
    peak_bytes: int  # of generating; of a predictable cell, of the warm-up
    load_average: float  # before the measurement began
    first: dict[str, list[float]]
    further: dict[str, list[list[float]]]
    joules: dict[str, list[float]]  # of each whole generation; empty where the machine shows no energy
    when: str  # the measurement began
    energy_note: str = ""
    bytes_read_per_token: int = 0  # weights, and of a predictable cell the cache half-way
    read_bytes_per_s: float = 0.0  # memory, at that footprint
    read_bytes_per_s_one_thread: float = 0.0  # of a predictable cell
    peak_vram_bytes: int | None = None
    torch_threads: int = 0
    first_prefill_seconds: float = 0.0  # includes what an engine does once: unpacking, re-packing
    timed_peak_bytes: int = 0  # while samples were taken: what malloc keeps for itself is in it
    anonymous_bytes: int = 0  # resident after the warm-up: the process's own memory
    file_bytes: int = 0  # resident after the warm-up: mapped files (weights, library code)
    others: float = 0.0  # processors that other processes kept busy while samples were taken
    threads: int | None = None  # that were used, where they are not those asked for
    note: str = ""  # and why

    def decode_rates(self, prompt: int | str) -> list[float]:
        """Decoded tokens a second after a prompt of this length, one value a generation."""
        return [len(seconds) / sum(seconds) for seconds in self.further[str(prompt)]]

    @property
    def best_read_bytes_per_s(self) -> float:
        """The better read rate of one thread and all: on a busy processor a single one can be the faster."""
        return max(self.read_bytes_per_s, self.read_bytes_per_s_one_thread)

    @property
    def roofline_fractions(self) -> list[float]:
        """Bytes that decoding after the shortest prompt read a second, over what memory gives at that footprint."""
        shortest = min(self.further, key=int, default=None)
        if shortest is None or not self.best_read_bytes_per_s:
            return []
        return [r * self.bytes_read_per_token / self.best_read_bytes_per_s for r in self.decode_rates(shortest)]


def measure_cell(artifact: Artifact | Path, engine: str, *, work: Workload = Workload()) -> Cell:
    """Measure one cell.

    Raises EngineUnavailable or NotSupported as the engine does, RuntimeError in one line for any other failure:
    killed (out of memory, mostly), stopped after `limit_seconds`, or an error of the engine. ValueError for fewer than
    2 new tokens, no sample, or a predictable cell of another engine than torch.
    """
    if work.new_tokens < 2 or work.samples < 1:
        raise InputError(f"need at least 2 new tokens and 1 sample, got {work.new_tokens} and {work.samples}")
    if work.predictable and engine != "torch":
        raise InputError(f"memory is predicted for the engine torch only, got {engine}")
    work, note = usable_work(artifact, engine, work)
    ask = partial(ask_engine, "avalab.measure.cell:run_cell", artifact, engine, asdict(work), work.limit_seconds)
    found = Cell(**ask())
    if found.others > DISTURBED:
        found = min(found, Cell(**ask()), key=lambda cell: cell.others)
    if found.others > DISTURBED:
        note = "; ".join(filter(None, (note, f"disturbed: others kept {found.others:.1f} processors busy")))
    return replace(found, threads=work.threads, note=note) if note else found


def measure_batches(artifact: Artifact | Path, engine: str, *, work: Workload) -> dict[str, dict[str, list[float]]]:
    """Batch size -> `prefill` and `decode`, seconds of each sample, prompts of the longest length.

    Raises as `measure_cell` does.
    """
    work, _ = usable_work(artifact, engine, work)
    return ask_engine("avalab.measure.cell:run_batches", artifact, engine, asdict(work), work.limit_seconds)


def usable_work(artifact: Artifact | Path, engine: str, work: Workload) -> tuple[Workload, str]:
    """The workload with threads that the engine's library survives, and a note where they are not those asked for."""
    options, note = engines.usable_options(engine, folder_of(artifact), threads=work.threads)
    return replace(work, threads=options["threads"]), note


def ask_engine(target: str, artifact: Artifact | Path, engine: str, request: dict, limit_seconds: float) -> dict:
    """What `target` (`module:function`) answers about an artefact in an engine, in a process of its own.

    It gets `request` with the artefact's `folder` and `engine`. Where that names a `memory_cap_gib` and the device is
    no GPU, the process cannot take more (`growth_bytes`). Raises as `measure_cell` does.
    """
    folder, cap = folder_of(artifact).resolve(), request.get("memory_cap_gib")
    request = request | {"folder": str(folder), "engine": engine}
    is_capped = cap and not request.get("device", "cpu").startswith("cuda")
    return process.call(
        target,
        request,
        limit_seconds=limit_seconds,
        errors=FAILURES,
        label=f"{artifact.name} in {engine}",
        growth_bytes=growth_bytes(folder, engine, cap) if is_capped else 0,
    )


def growth_bytes(folder: Path, engine: str, cap_gib: float) -> int:
    """What a process may take of its own so that it stays below a limit: less the file, where an engine maps it.

    Raises InputError for a file that is larger than the limit alone.
    """
    mapped = weight_file_bytes(folder) if engine in MAPS_ITS_FILE else 0
    left = int(cap_gib * 2**30) - mapped
    if left <= 0:
        raise InputError(f"the file of {folder.name} is {mapped / 2**30:.2f} GiB, the limit {cap_gib:g} GiB in all")
    return left


# --- in the measuring process -----------------------------------------------------------------------------------------


def time_tokens(engine: Engine, prompt: list[int], new_tokens: int) -> list[float]:
    """Seconds from the call to each token of one generation; a token counts once the engine tells it."""
    told: list[float] = []
    start = time.perf_counter()
    engine.generate(prompt, new_tokens, on_token=lambda token: told.append(time.perf_counter() - start), past_end=True)
    return told


def run_cell(request: dict) -> dict:
    """All measurements of one cell, the fields of `Cell`."""
    device, folder, predictable = request["device"], Path(request["folder"]), request["predictable"]
    facts = {"load_average": load_average(), "when": time_now()}
    trackers.limit_gpu_memory(device, request["memory_cap_gib"])
    runtime_bytes = start_runtime(request) if predictable else trackers.process_memory()["rss"]
    if predictable:
        trackers.set_malloc_threshold(MALLOC_RETURNS)
    engine, loading = load_engine(request, **({"own_kernels": False} if predictable else {}))
    facts |= {"runtime_bytes": runtime_bytes, **loading, **sample_cell(engine, request)}
    facts |= {"energy_note": trackers.why_no_energy(device), "peak_vram_bytes": trackers.peak_gpu_memory(device)}
    footprint = weight_file_bytes(folder)
    if predictable:
        half_way = max(request["prompts"]) + request["new_tokens"] // 2
        cache = kv_cache_bytes(shape_of(folder), context=half_way)
        footprint = weight_bytes_read(engine.state["model"]) + cache
    engine.close()
    torch.set_num_threads(request["threads"] or torch.get_num_threads())
    facts |= {"torch_threads": torch.get_num_threads(), "bytes_read_per_token": footprint}
    facts["read_bytes_per_s"] = trackers.memory_read_rate(footprint, device=device)
    if predictable:
        torch.set_num_threads(1)
        facts["read_bytes_per_s_one_thread"] = trackers.memory_read_rate(footprint, device=device)
    return facts


def start_runtime(request: dict) -> int:
    """Resident bytes with all that a model of the artefact's format pays before any of its weights are loaded."""
    folder, device = Path(request["folder"]), request["device"]
    process.quiet_libraries()
    torch.set_num_threads(request["threads"] or torch.get_num_threads())
    method = engines.kind(folder)
    if method in LIBRARIES:
        importlib.import_module(LIBRARIES[method])
    engines.facts(folder)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as toy:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(toy)
        time_torch_batch(checkpoint.load_model(Path(toy), device), [[0] * 16], 2)
    return trackers.process_memory()["rss"]


def load_engine(request: dict, **options) -> tuple[Engine, dict]:
    """The engine of a request, and what loading it took; the peak of memory starts anew afterwards."""
    device = request["device"]
    if request["engine"] == "torch" and device != "cpu":
        options["device"] = device
    trackers.reset_peak_memory(device)
    start = time.perf_counter()
    engine = engines.load(request["engine"], Path(request["folder"]), threads=request["threads"], **options)
    trackers.synchronize(device)
    facts = {"load_seconds": [time.perf_counter() - start]}
    now = trackers.process_memory()
    facts |= {"load_peak_bytes": now["peak"], "loaded_bytes": now["rss"]}
    trackers.reset_peak_memory(device)
    return engine, facts


def sample_cell(engine: Engine, request: dict) -> dict:
    """Warm up, then take times, joules and peaks of generations at each prompt length that the context holds."""
    draw, new, device = random.Random(request["seed"]), request["new_tokens"], request["device"]
    lengths = [n for n in request["prompts"] if n + new <= engine.facts.context]
    if not lengths:
        raise InputError(f"prompts of {request['prompts']} and {new} tokens exceed a context of {engine.facts.context}")
    counters = trackers.energy_counters(device)
    first, further, joules = ({str(n): [] for n in lengths} for _ in range(3))
    facts = {}
    for sample in range(request["samples"] + 1):
        for length in lengths:
            prompt = [draw.randrange(engine.facts.vocabulary) for _ in range(length)]
            before = trackers.read_counters(counters)
            told = time_tokens(engine, prompt, new)
            if not sample:
                facts.setdefault("first_prefill_seconds", told[0])
                continue
            first[str(length)].append(told[0])
            further[str(length)].append([b - a for a, b in itertools.pairwise(told)])
            if counters:
                joules[str(length)].append(trackers.joules_between(counters, before, trackers.read_counters(counters)))
        if not sample:
            quiet = trackers.processor_seconds()
            warm = trackers.process_memory()
            facts |= {"anonymous_bytes": warm["anonymous"], "file_bytes": warm["file"]}
            if request["predictable"]:  # malloc as usual again, and one generation that lets it settle
                trackers.set_malloc_threshold(MALLOC_KEEPS)
                trackers.reset_peak_memory("cpu")
                time_tokens(engine, [0] * max(lengths), 2)
    others = trackers.processors_of_others(quiet, trackers.processor_seconds())
    timed = trackers.process_memory()["peak"]
    facts |= {"peak_bytes": warm["peak"] if request["predictable"] else timed, "timed_peak_bytes": timed}
    return facts | {"others": others, "first": first, "further": further, "joules": joules}


# --- several sequences at once, in the measuring process --------------------------------------------------------------


def run_batches(request: dict) -> dict:
    """Times of all batch sizes of one artefact."""
    name, sizes = request["engine"], request["batches"]
    if name not in BATCHES:
        raise engines.NotSupported(f"{name} offers no batches here; {', '.join(BATCHES)} do")
    loaded, _ = load_engine(request, **({"paged": True} if name == "openvino" else {}))
    draw, length = random.Random(request["seed"]), max(request["prompts"])
    found = {str(size): {"prefill": [], "decode": []} for size in sizes}
    for sample in range(request["samples"] + 1):
        for size in sizes:
            prompts = [[draw.randrange(loaded.facts.vocabulary) for _ in range(length)] for _ in range(size)]
            prefill, decode = BATCHES[name](loaded.state, prompts, request["new_tokens"])
            if sample:  # the first round warms up
                found[str(size)]["prefill"].append(prefill)
                found[str(size)]["decode"].append(decode)
    return found


@torch.inference_mode()
def time_torch_batch(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token of all prompts, which are of equal length, and of all further ones."""
    cache = DynamicCache(config=model.config)

    def step(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        tokens.tolist()  # a token counts once the host has it
        return tokens

    return _time_steps(step, torch.tensor(prompts, device=model.device), new_tokens)


def _time_onnx_batch(state: dict, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    import onnxruntime_genai

    parameters = onnxruntime_genai.GeneratorParams(state["model"])
    longest = len(prompts[0]) + new_tokens
    parameters.set_search_options(max_length=longest, batch_size=len(prompts), do_sample=False)
    generator = onnxruntime_genai.Generator(state["model"], parameters)

    def step(tokens: np.ndarray | None) -> None:
        if tokens is not None:  # a batch takes its prompts once; the library chooses and keeps what follows
            generator.append_tokens(tokens)
        generator.generate_next_token()

    return _time_steps(step, np.array(prompts, dtype=np.int32), new_tokens)


def _time_openvino_batch(state: dict, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    import openvino
    import openvino_genai

    def seconds(tokens: list[list[int]], count: int) -> float:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = count, False, True
        batch = openvino_genai.TokenizedInputs(
            openvino.Tensor(np.array(tokens, dtype=np.int64)), openvino.Tensor(np.ones_like(tokens, dtype=np.int64))
        )
        start = time.perf_counter()
        state["pipeline"].generate(batch, config)
        return time.perf_counter() - start

    first = seconds([prompt[::-1] for prompt in prompts], 1)  # others of the same kind: it remembers those it has read
    return first, max(seconds(prompts, new_tokens) - first, 1e-9)


def _time_steps(step: Callable, tokens, new_tokens: int) -> tuple[float, float]:
    start = time.perf_counter()
    tokens = step(tokens)
    first = time.perf_counter() - start
    for _ in range(new_tokens - 1):
        tokens = step(tokens)
    return first, time.perf_counter() - start - first


BATCHES: dict[str, Callable[[dict, list[list[int]], int], tuple[float, float]]] = {
    "torch": lambda state, prompts, new_tokens: time_torch_batch(state["model"], prompts, new_tokens),
    "openvino": _time_openvino_batch,
    "onnx": _time_onnx_batch,
}


def merge_cells(cells: Sequence[Cell]) -> Cell:
    """Several measurements of the same cell as one: all samples, the highest peaks, the best read rate."""

    def joined(name: str) -> dict[str, list]:
        return {n: [s for cell in cells for s in getattr(cell, name)[n]] for n in getattr(cells[0], name)}

    peaks = ("load_peak_bytes", "peak_bytes", "timed_peak_bytes", "load_average", "others", "read_bytes_per_s")
    return replace(
        cells[0],
        **{name: max(getattr(cell, name) for cell in cells) for name in peaks},
        **{name: int(np.median([getattr(cell, name) for cell in cells])) for name in ("runtime_bytes", "loaded_bytes")},
        **{name: joined(name) for name in ("first", "further", "joules")},
        load_seconds=[s for cell in cells for s in cell.load_seconds],
        when=max(cell.when for cell in cells),
        note=next((cell.note for cell in cells if cell.note), ""),
        peak_vram_bytes=max((c.peak_vram_bytes for c in cells if c.peak_vram_bytes is not None), default=None),
    )


def record_cell(run: Run, artifact: Artifact, *, engine: str, work: Workload, cell: Cell, subject: str = "") -> None:
    """Append what was measured of a cell to `run`, under the artefact's name or `subject`."""
    record = partial(
        run.record,
        subject or artifact.name,
        artifact_sha256=artifact.sha256,
        engine=engine,
        threads=work.threads if cell.threads is None else cell.threads,
        note=cell.note,
        when=cell.when,
        details={
            "load_average": cell.load_average,
            "processors_of_others": cell.others,
            "runtime_bytes": cell.runtime_bytes,
        },
    )
    record("artifact_bytes", weight_file_bytes(artifact.path), "byte")
    record("peak_rss_bytes:load", cell.load_peak_bytes, "byte")
    record("peak_rss_bytes:idle", cell.loaded_bytes, "byte")
    record("peak_rss_bytes:inference", cell.peak_bytes, "byte")
    record("peak_rss_bytes:engine", max(0, cell.peak_bytes - cell.runtime_bytes), "byte")
    if cell.peak_vram_bytes is not None:
        record("peak_vram_bytes", cell.peak_vram_bytes, "byte")
    load = statistics.quantile(cell.load_seconds)
    record("load_seconds", load.value, "s", n=load.n, samples=cell.load_seconds)
    for length, first in cell.first.items():
        each = [second for steps in cell.further[length] for second in steps]
        record_latency(record, f"time_to_first_token_ms:prompt{length}", first)
        record_latency(record, f"token_latency_ms:prompt{length}", each)
        record_speeds(record, cell, length=int(length), ending=f":prompt{length}")
    if fractions := cell.roofline_fractions:
        record("roofline_fraction", unit="1", **vars(statistics.quantile(fractions)))
        record("memory_read_bytes_per_s", cell.read_bytes_per_s, "byte/s")
    if cell.energy_note:
        note = "; ".join(note for note in (cell.note, cell.energy_note) if note)
        record("energy_joules_per_token", None, "J/token", note=note)
        return
    for length, joules in cell.joules.items():
        found = statistics.quantile([each / work.new_tokens for each in joules])
        record(f"energy_joules_per_token:prompt{length}", unit="J/token", **vars(found))


def record_speeds(record: Callable, cell: Cell, *, length: int, ending: str = "") -> None:
    """Append prefill and decode speed at a prompt length with intervals and samples; `record` knows their subject."""
    prefill = [length / seconds for seconds in cell.first[str(length)]]
    for name, rates in (("prefill", prefill), ("decode", cell.decode_rates(length))):
        found = vars(statistics.quantile(rates))
        record(f"{name}_tokens_per_s{ending}", unit="token/s", samples=rates, **found)


def record_latency(record: Callable, metric: str, seconds: list[float], *, raw: bool = False) -> None:
    """Append `QUANTILES` of seconds, in ms, with intervals; `raw` samples with the first one."""
    samples = [1000 * s for s in seconds]
    for name, q in QUANTILES.items():
        kept = samples if raw and name == "p50" else []
        record(f"{metric}:{name}", unit="ms", samples=kept, **vars(statistics.quantile(samples, q)))
