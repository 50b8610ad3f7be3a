"""Several sequences at once: prefill and decode speed of a cell at batch 1, 4 and 16, where the engine offers batches.

1. A fresh process loads the artefact (OpenVINO with paged attention, which continuous batching needs), warms up and
   takes a few samples of each batch size in turn: random prompts of equal length, exactly `new_tokens` greedy tokens.
2. The prefill's time is that to the first token of all sequences. torch and ONNX Runtime tell when a step is over;
   OpenVINO does not for batches, so that a generation of one token is timed there, and one of all of them: decoding is
   their difference.
3. Speeds are those of all sequences together. An engine without batches is one record that says so.

What it does not do: sequences of different lengths, requests that arrive one after another, or memory.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from avalab import artifacts, cost, engine_bench, engines, process
from avalab.contestants import Entry
from avalab.engines import engine
from avalab.engines.engine import Engine
from avalab.experiment import Run, device_name

SIZES = (1, 4, 16)


@dataclass(frozen=True)
class Batches:
    """Sizes of the measurement: sequences at once, tokens of each prompt, and those of `Race`."""

    prompt_tokens: int = 64
    new_tokens: int = 12
    samples: int = 2
    threads: int = 0
    seed: int = 0
    limit_seconds: float = 180
    device: str = "cpu"
    sizes: tuple[int, ...] = SIZES


WORK = {"smoke": Batches(8, 4, 2, limit_seconds=60, sizes=(1, 4)), "laptop": Batches(32, 8, 2)}


def record_all(run: Run, taking_part: list[Entry]) -> None:
    """Measure the cells of the highest thread count at every batch size; read back what was measured before."""
    most = max((entry.threads for entry in taking_part), default=0)
    device = "cuda" if run.device.startswith("cuda") else "cpu"
    work = replace(WORK.get(run.profile_name, Batches(256, 32, 5)), threads=most, seed=run.seed, device=device)
    for entry in tqdm([e for e in taking_part if e.threads == most], desc="batches", leave=False):
        about = {"artifact_sha256": entry.artifact.sha256, "engine": entry.engine, "threads": most}
        try:
            found = _cached(run, entry, work)
        except engines.EngineUnavailable:
            continue  # the race has said so
        except (RuntimeError, ValueError) as error:
            run.record(entry.subject, "decode_tokens_per_s:batch", None, "token/s", note=str(error), **about)
            continue
        for size, seconds in found.items():
            _add(run, entry.subject, int(size), seconds, work, about)


def measure(folder: Path, name: str, work: Batches) -> dict[str, dict[str, list[float]]]:
    """Batch size -> `prefill` and `decode`, seconds of each sample. Raises as `engine_bench.measure` does."""
    request = {"folder": str(folder.resolve()), "engine": name, **asdict(work)}
    how = {"limit_seconds": work.limit_seconds, "errors": engine_bench.FAILURES, "label": f"{folder.name} in {name}"}
    return process.call(f"{__name__}:run", request, **how)


def run(request: dict) -> dict:
    """All batch sizes of one artefact, in this process."""
    name = request["engine"]
    if name not in STEPS:
        raise engines.NotSupported(f"{name} offers no batches here; {', '.join(STEPS)} do")
    loaded, _ = engine_bench.loaded(request, **({"paged": True} if name == "openvino" else {}))
    draw, found = (
        random.Random(request["seed"]),
        {str(size): {"prefill": [], "decode": []} for size in request["sizes"]},
    )
    for sample in range(request["samples"] + 1):
        for size in request["sizes"]:
            prompts = [
                [draw.randrange(loaded.facts.vocabulary) for _ in range(request["prompt_tokens"])] for _ in range(size)
            ]
            prefill, decode = STEPS[name](loaded, prompts, request["new_tokens"])
            if sample:  # the first round warms up
                found[str(size)]["prefill"].append(prefill)
                found[str(size)]["decode"].append(decode)
    return found


# --- one generation of a batch in each engine: seconds to the first tokens, and of all further ones -------------------


@torch.inference_mode()
def _torch(loaded: Engine, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    model = loaded.state["model"]
    cache, ids = DynamicCache(config=model.config), torch.tensor(prompts, device=model.device)

    def step(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    return _timed(step, ids, new_tokens, done=lambda tokens: tokens.tolist())


def _onnx(loaded: Engine, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    import onnxruntime_genai

    parameters = onnxruntime_genai.GeneratorParams(loaded.state["model"])
    longest = len(prompts[0]) + new_tokens
    parameters.set_search_options(max_length=longest, batch_size=len(prompts), do_sample=False)
    generator = onnxruntime_genai.Generator(loaded.state["model"], parameters)

    def step(tokens: np.ndarray | None) -> None:
        if tokens is not None:  # a batch takes its prompts once; the library chooses and keeps what follows
            generator.append_tokens(tokens)
        generator.generate_next_token()

    return _timed(step, np.array(prompts, dtype=np.int32), new_tokens)


def _openvino(loaded: Engine, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    import openvino
    import openvino_genai

    def seconds(tokens: list[list[int]], count: int) -> float:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = count, False, True
        batch = openvino_genai.TokenizedInputs(
            openvino.Tensor(np.array(tokens, dtype=np.int64)), openvino.Tensor(np.ones_like(tokens, dtype=np.int64))
        )
        start = time.perf_counter()
        loaded.state["pipeline"].generate(batch, config)
        return time.perf_counter() - start

    reversed_prompts = [prompt[::-1] for prompt in prompts]  # others of the same kind: it remembers those it has read
    first = seconds(reversed_prompts, 1)
    return first, max(seconds(prompts, new_tokens) - first, 1e-9)


def _timed(step: Callable, tokens, new_tokens: int, done: Callable = lambda tokens: None) -> tuple[float, float]:
    start = time.perf_counter()
    tokens = step(tokens)
    done(tokens)  # the host has them
    first = time.perf_counter() - start
    for _ in range(new_tokens - 1):
        tokens = step(tokens)
        done(tokens)
    return first, time.perf_counter() - start - first


STEPS = {"torch": _torch, "openvino": _openvino, "onnx": _onnx}


# --- records ----------------------------------------------------------------------------------------------------------


def _cached(run: Run, entry: Entry, work: Batches) -> dict[str, dict[str, list[float]]]:
    here = Path(__file__)
    files = [here, Path(engine.__file__), *sorted((here.parent / "engines").glob(f"{entry.engine}*.py"))]
    about = [entry.artifact.sha256, entry.engine, asdict(work), artifacts.code_sha256(files), device_name(run.device)]
    path = run.artifacts_dir / "cache" / f"batches-{artifacts.sha256_of_text(json.dumps(about))[:24]}.json"
    return process.kept(path, lambda: measure(entry.artifact.path, entry.engine, work))


def _add(run: Run, subject: str, size: int, seconds: dict[str, list[float]], work: Batches, about: dict) -> None:
    tokens = {"prefill": size * work.prompt_tokens, "decode": size * (work.new_tokens - 1)}
    for name, count in tokens.items():
        rates = [count / s for s in seconds[name]]
        low, high = cost.quantile_interval(rates)
        more = {"low": low, "high": high, "n": len(rates), "samples": rates} | about
        run.record(subject, f"{name}_tokens_per_s:batch{size}", cost.quantile(rates, 0.5), "token/s", **more)
