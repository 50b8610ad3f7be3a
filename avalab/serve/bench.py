"""What serving costs, beside llama.cpp's own server on the same weights and threads: `make bench-serve`.

1. Both servers are processes of their own on loopback and are asked over HTTP: ours by `avalab serve`, the peer by
   xllamacpp's server with as many slots, continuous batching, a unified cache, prompt cache in memory. Rounds alternate
   between them, and a round has a beginning that no other round has.
2. `shared_prefix`: requests that come at once and share a beginning. `urgent`: the time to the first token of a short
   request, alone and while long prompts are read. `batch`: requests at once and one after the other. `hits`: an answer
   that is known. `calls`: OpenAI's client, each call with a schema of its own. `workers`: memory and start of several
   processes of one model. `models`: loads of a thrashing trace and of 69 agents, on a clock that only counts.
   `windows`: whether a fact survives when a chat is shortened.
3. Ratios are of the same round; their intervals are the smallest and the largest round, or of order statistics.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jsonschema

from avalab.lab.artifacts import Artifact
from avalab.lab.llamacpp_library import processors
from avalab.lab.run import PROFILES, ROOT, Record, Run, load_average
from avalab.lab.statistics import median_and_range, quantile, wilson
from avalab.serve.policy import windows
from avalab.serve.policy.models import replay
from avalab.serve.policy.settings import Settings
from avalab.serve.rivals import ASK_SECONDS, OURS, PEER, Running, at_once, ours, peer
from avalab.serve.workers.dispatch import Dispatcher
from avalab.serve.workers.pool import Served

WORDS = (
    *("river", "stone", "window", "garden", "music", "number", "letter", "winter"),
    *("engine", "silver", "market", "teacher", "bridge", "orange", "simple"),
)

GOALS = {  # of a metric of ours: the value, and whether it is the least or the most that will do
    "speedup:shared_prefix": (2.0, "least"),
    "prefill_share": (1.1, "most"),
    "slowdown:urgent": (1.5, "most"),
    "load_ratio:thrash": (0.5, "most"),
    "memory_ratio:4_workers": (1.15, "most"),
    "second_worker_seconds": (0.5, "most"),
    "speedup:batch_of_8": (3.0, "least"),
    "speedup:known_answer": (100.0, "least"),
    "valid_share": (1.0, "least"),
}


def is_reached(record: Record) -> bool:
    """Whether a record is as good as its goal."""
    goal, kind = GOALS[record.metric]
    return record.value is not None and (record.value >= goal if kind == "least" else record.value <= goal)


def text_of(tokens: int, seed: int) -> str:
    """Words that make about so many tokens, never the same for two seeds."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(tokens))


# --- measurements ----------------------------------------------------------------------------------------------------


def _recorder(run: Run, artifact: Artifact) -> Callable:
    return partial(run.record, artifact_sha256=artifact.sha256, details={"load_average": load_average()})


def measure_prefix(run: Run, artifact: Artifact, servers: Sequence[Running]) -> None:
    """`shared_prefix_seconds` of both, their ratio, and the tokens that ours read over the unique ones."""
    size = run.profile
    seconds: dict[str, list[float]] = {server.name: [] for server in servers}
    read: list[float] = []
    for at in range(size.serve_rounds):
        system = text_of(size.serve_prefix_tokens, run.seed + at)
        for server in servers if at % 2 else servers[::-1]:
            jobs = [partial(server.chat, f"Word {n}?", system=system) for n in range(size.serve_requests)]
            taken, answers = at_once(jobs)
            seconds[server.name].append(taken)
            if server.name == OURS:
                usages = [answer["usage"] for answer in answers]
                computed = sum(u["prompt_tokens"] - u["prompt_tokens_details"]["cached_tokens"] for u in usages)
                read.append(computed / unique_tokens(servers[-1], system, size.serve_requests))
    record = _recorder(run, artifact)
    for name, samples in seconds.items():
        record(name, "shared_prefix_seconds", unit="s", engine=name, samples=samples, **vars(median_and_range(samples)))
    ratios = [theirs / mine for theirs, mine in zip(seconds[PEER], seconds[OURS], strict=True)]
    record(OURS, "speedup:shared_prefix", unit="1", engine=OURS, samples=ratios, **vars(median_and_range(ratios)))
    record(OURS, "prefill_share", unit="1", engine=OURS, samples=read, **vars(median_and_range(read)))


def unique_tokens(server: Running, system: str, requests: int) -> int:
    """Tokens that have to be read once when these requests share what they can, by llama.cpp's own tokenizer."""
    known: set[tuple[int, ...]] = set()
    for n in range(requests):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": f"Word {n}?"}]
        prompt = server.client.post("/apply-template", json={"messages": messages}).json()["prompt"]
        asked = {"content": prompt, "add_special": True, "parse_special": True}
        tokens = server.client.post("/tokenize", json=asked).json()["tokens"]
        known |= {tuple(tokens[: end + 1]) for end in range(len(tokens))}
    return len(known)


def measure_urgent(run: Run, artifact: Artifact, servers: Sequence[Running]) -> None:
    """`urgent_first_token_ms`: alone, and while long prompts are read; the ratio of the medians, for both servers."""
    size = run.profile
    record = _recorder(run, artifact)
    for server in servers:
        more = {"priority": 9, "cache": "off"} if server.name == OURS else {}
        idle = [1000 * server.first_token_s(f"Say {text_of(4, at)}", **more) for at in range(2 * size.serve_rounds)]
        busy: list[float] = []
        for at in range(size.serve_rounds):
            long = text_of(2 * size.serve_prefix_tokens, 1000 + run.seed + at)
            with ThreadPoolExecutor(1) as beside:
                reading = beside.submit(server.chat, long, tokens=2)
                time.sleep(0.2)
                for step in range(2):
                    if not reading.done():
                        busy.append(1000 * server.first_token_s(f"Say {text_of(4, 99 + 2 * at + step)}", **more))
                reading.result()
        for name, samples in (("idle", idle), ("busy", busy)):
            found = quantile(samples) if samples else None
            note = "" if found else "the long prompts were read before anything urgent came"
            record(
                server.name, f"urgent_first_token_ms:{name}", unit="ms", engine=server.name, samples=samples, note=note,
                **(vars(found) if found else {"value": None}),
            )  # fmt: skip
        if busy:
            ratio = quantile(busy).value / quantile(idle).value
            record(server.name, "slowdown:urgent", ratio, "1", n=len(busy), engine=server.name)


def measure_batch(run: Run, artifact: Artifact, server: Running) -> None:
    """`speedup:batch`: tokens a second of 8 requests at once over those of one after the other."""
    ratios = []
    for at in range(run.profile.serve_rounds):
        jobs = [
            partial(server.chat, f"Write about {text_of(6, 8 * at + n)}.", tokens=24, cache="off") for n in range(8)
        ]
        alone, one = 0.0, []
        for job in jobs:
            began = time.perf_counter()
            one.append(job())
            alone += time.perf_counter() - began
        shifted = [
            partial(server.chat, f"Tell of {text_of(6, 800 + 8 * at + n)}.", tokens=24, cache="off") for n in range(8)
        ]
        together, many = at_once(shifted)
        tokens = [sum(answer["usage"]["completion_tokens"] for answer in answers) for answers in (one, many)]
        ratios.append((tokens[1] / together) / (tokens[0] / alone))
    _recorder(run, artifact)(
        OURS, "speedup:batch_of_8", unit="1", engine=OURS, samples=ratios, **vars(median_and_range(ratios))
    )


def measure_hits(run: Run, artifact: Artifact, server: Running) -> None:
    """`speedup:known_answer`: the time to compute an answer over that of giving it again."""
    ratios = []
    for at in range(run.profile.serve_rounds):
        job = partial(server.chat, f"Describe {text_of(20, 5000 + at)}.", tokens=48)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            job()
            times.append(time.perf_counter() - began)
        ratios.append(times[0] / min(times[1:]))
    _recorder(run, artifact)(
        OURS, "speedup:known_answer", unit="1", engine=OURS, samples=ratios, **vars(median_and_range(ratios))
    )


def measure_calls(run: Run, artifact: Artifact, server: Running) -> None:
    """`valid_share`: answers of OpenAI's client that are valid against the schema of their own request."""
    import openai

    rng, right = random.Random(run.seed), 0
    with openai.OpenAI(base_url=f"{server.client.base_url}/v1", api_key="none", timeout=ASK_SECONDS) as client:
        for at in range(run.profile.serve_calls):
            schema = drawn_schema(rng)
            made = client.chat.completions.create(
                model=server.model, messages=[{"role": "user", "content": f"Act on case {at}."}], max_tokens=160,
                tools=[{"type": "function", "function": {"name": "act", "parameters": schema}}],
                tool_choice="required", parallel_tool_calls=False,
            )  # fmt: skip
            called = made.choices[0].message.tool_calls or []
            with contextlib.suppress(ValueError, jsonschema.ValidationError):
                for call in called:
                    jsonschema.validate(json.loads(call.function.arguments), schema)
                right += bool(called)
    found = wilson(right, run.profile.serve_calls)
    _recorder(run, artifact)(OURS, "valid_share", unit="1", engine=OURS, **vars(found))


def drawn_schema(rng: random.Random) -> dict:
    """A schema of one to three arguments."""
    kinds = (
        {"type": "string", "maxLength": 12}, {"type": "integer", "minimum": 0, "maximum": 999}, {"type": "boolean"},
        {"enum": ["red", "green", "blue"]}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    )  # fmt: skip
    names = rng.sample(["city", "count", "flag", "colour", "items"], rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: rng.choice(kinds) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def measure_workers(run: Run, artifact: Artifact, file: Path, settings: dict) -> None:
    """Memory of 1 and 4 processes of one model, and how long the second one takes to start."""
    settings = settings | {"workers": 4, "max_batch_size": 1, "context": 256, "dynamic_batching": False}

    async def grow() -> tuple[list[int], list[float]]:
        dispatcher = Dispatcher({file.stem: Served(file.stem, file)}, Settings(**settings))
        sizes, seconds = [], []
        try:
            for count in range(1, 5):
                began = time.perf_counter()
                await dispatcher.share_model(file.stem, count)
                seconds.append(time.perf_counter() - began)
                group = dispatcher.workers[file.stem]
                for worker in group[-1:]:
                    async for _ in worker.run({"op": "generate", "prompt": "hello", "max_tokens": 2}):
                        pass
                sizes.append(sum(worker.pss_bytes for worker in group))
        finally:
            await dispatcher.stop(1.0)
        return sizes, seconds

    with ThreadPoolExecutor(1) as beside:  # in a notebook, this thread runs a loop already
        sizes, seconds = beside.submit(asyncio.run, grow()).result()
    record = _recorder(run, artifact)
    record(OURS, "worker_bytes:1", sizes[0], "bytes", engine=OURS)
    record(OURS, "worker_bytes:4", sizes[3], "bytes", engine=OURS)
    record(OURS, "memory_ratio:4_workers", sizes[3] / sizes[0], "1", engine=OURS)
    record(
        OURS, "second_worker_seconds", unit="s", engine=OURS, samples=seconds[1:], **vars(median_and_range(seconds[1:]))
    )


def measure_cold(run: Run, artifact: Artifact, file: Path, settings: dict) -> None:
    """The first answer of a model that has to be loaded, over that of one that was loaded at the start."""
    samples: dict[str, list[float]] = {"cold": [], "preloaded": []}
    for at in range(run.profile.serve_rounds):
        for name in samples:
            pinned = [file.stem] if name == "preloaded" else []
            with ours(file, settings | {"pinned": pinned}) as server:
                samples[name].append(1000 * server.first_token_s(f"Say {text_of(4, at)}"))
    record = _recorder(run, artifact)
    for name, found in samples.items():
        record(OURS, f"first_answer_ms:{name}", unit="ms", engine=OURS, samples=found, **vars(median_and_range(found)))


def measure_models(run: Run, artifact: Artifact) -> None:
    """Loads of a trace over five models in memory for two, and of 69 agents over three models, against plain LRU."""
    rng = random.Random(run.seed)
    traces = {
        "thrash": ([(40.0 * at, f"m{rng.randrange(5)}") for at in range(500)], 100),
        "69_agents": (_agents(rng), 100),
    }
    record = _recorder(run, artifact)
    for name, (trace, room) in traces.items():
        sizes = {model: 50 for _, model in trace}
        shared = {"max_bytes": room, "load_ms": 100.0, "serve_ms": 20.0}
        lru = replay(trace, sizes, max_swap_wait_ms=None, **shared)
        own = replay(trace, sizes, max_swap_wait_ms=2000.0, **shared)
        about = {"engine": "policy", "n": len(trace), "note": "on a clock that only counts, not measured in time"}
        record(OURS, f"load_ratio:{name}", own.loads / lru.loads, "1", **about)
        record(OURS, f"longest_wait_ms:{name}", max(own.waits_ms), "ms", **about)
        record("LRU", f"longest_wait_ms:{name}", max(lru.waits_ms), "ms", **about)


def _agents(rng: random.Random) -> list[tuple[float, str]]:
    """69 agents, each asking the three models in an order of its own, again and again."""
    found = []
    for agent in range(69):
        order = rng.sample(["small", "medium", "large"], 3)
        start = rng.uniform(0, 5000)
        found += [(start + 400.0 * step + rng.uniform(0, 50), order[(agent + step) % 3]) for step in range(9)]
    return sorted(found)


def measure_windows(run: Run, artifact: Artifact) -> None:
    """`needle_kept`: how often a fact told long ago is there still in a chat of an eighth of its tokens."""
    rng, kept = random.Random(run.seed), {"compress": 0, "sliding_window": 0}
    chats = 10 * run.profile.serve_rounds
    for at in range(chats):
        code = str(rng.randrange(1000, 9999))
        name = rng.choice(WORDS)
        turns = [f"{text_of(12, 100 * at + n)}. Nothing about {text_of(3, n)}." for n in range(120)]
        turns[rng.randrange(110)] += f" The code of the {name} room is {code}."
        messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
        messages = [{"role": "system", "content": "Be brief."}, *messages]
        messages.append({"role": "user", "content": f"What is the code of the {name} room?"})
        target = windows.total(messages, windows.estimate) // 8
        for mode in kept:
            left = windows.fitted(messages, target, mode=mode)
            kept[mode] += any(code in message["content"] for message in left)
    for mode, count in kept.items():
        about = {"engine": "policy", **vars(wilson(count, chats))}
        _recorder(run, artifact)(mode, "needle_kept", unit="1", **about)


# --- the whole -------------------------------------------------------------------------------------------------------


def settings_for(run: Run) -> dict:
    """What both servers are given: context, slots, threads."""
    context = max(1024, 4 * run.profile.serve_prefix_tokens)
    return {
        "context": context, "max_batch_size": max(8, run.profile.serve_requests), "threads": processors(),
        "dynamic_batching": False, "max_wait_time_ms": 2,
    }  # fmt: skip


@contextlib.contextmanager
def both(run: Run, file: Path) -> Iterator[list[Running]]:
    """Our server and llama.cpp's, warm."""
    settings = settings_for(run)
    slots = settings["max_batch_size"]
    with (
        ours(file, settings) as mine,
        peer(file, context=settings["context"], slots=slots, threads=settings["threads"]) as theirs,
    ):
        for server in (mine, theirs):
            server.chat("Are you there?", tokens=2)
        yield [mine, theirs]


def gguf_of(run: Run) -> tuple[Artifact, Path]:
    """The profile's model as a GGUF artefact in 8 bits, and its file."""
    from avalab.engines import gguf
    from avalab.models import checkpoint

    artifact = gguf.write(checkpoint.base_artifact(run), "q8_0")
    return artifact, next(artifact.path.glob("*.gguf"))


def measure_serving(run: Run) -> None:
    """Every measurement, one after the other."""
    artifact, file = gguf_of(run)
    with both(run, file) as servers:
        measure_prefix(run, artifact, servers)
        measure_urgent(run, artifact, servers)
        measure_batch(run, artifact, servers[0])
        measure_hits(run, artifact, servers[0])
        measure_calls(run, artifact, servers[0])
    measure_workers(run, artifact, file, settings_for(run))
    measure_cold(run, artifact, file, settings_for(run))
    measure_models(run, artifact)
    measure_windows(run, artifact)


def main() -> None:
    """`make bench-serve`."""
    parser = argparse.ArgumentParser(description="Measure serving beside llama.cpp's server.")
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    run = Run("bench_serve", parser.parse_args().profile)
    os.environ.setdefault("AVALAB_DEVICE", "cpu")
    measure_serving(run)
    path = run.save()
    for record in run.records:
        value = record.note if record.value is None else f"{record.value:12.4g} {record.unit:6}"
        spread = f"[{record.low:.4g}, {record.high:.4g}]" if record.low is not None and record.high is not None else ""
        print(f"{record.subject:12} {record.metric:34} {value} {spread}")
    print(f"load average {load_average()}; records: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
