"""The measuring process: loads one artefact, generates, and writes what it cost to a file.

Run by `avalab.cost.measure` as `python -m avalab.probe REQUEST RESULT`, one artefact a process, so that the peak
resident memory is that artefact's alone. In this order:

1. import the libraries its format needs, load and run a one-layer toy model: the resident memory now is the *runtime*,
   which any model pays (library code, thread pools, kernels' code pages);
2. load the artefact; then one whole generation, which is also the warm-up (some engines unpack or re-pack their weights
   in the first call). The peak-memory counters are reset before loading and again before this generation, so that the
   peak of loading and the peak of inference are two numbers;
3. per sample: prefill (last position's logits only, as transformers' `generate` does), the first greedy token, then
   one step a token with a key-value cache; the device is synchronised before every clock reading;
4. only then allocate a buffer of the bytes that one decode step reads and time reading it.

Weights on a CPU are memory-mapped from safetensors: their pages count as *file* resident memory, appear when first
touched and stay. Copies that an engine makes are *anonymous*. Both are reported, their sum is what is compared.

glibc's malloc keeps freed tensors of up to 32 MiB for itself once it has seen one, and what that leaves behind varies
from run to run (20 to 240 MB on a model of 135 M parameters whose engine unpacks its weights). In step 2 blocks from
1 MiB are therefore mapped and returned one by one: the peak is what the model needs, and it repeats. Steps 3 and 4 run
with malloc's usual limits, since mapping costs time; the peak there is `timed_peak_rss_bytes`.

What it does not do: decide anything or judge outputs. Prompt tokens are random ids; decoding cost does not depend on
them except in LLM.int8(), where tokens with outlier activations cost more.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from avalab import models, quiet
from avalab.experiment import load_average

LIBRARIES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "compressed-tensors": "compressed_tensors"}
MALLOC_RETURNS = 2**20  # bytes from which a freed block goes back to the system while memory is measured
MALLOC_KEEPS = 2**25  # glibc's own upper limit, where its sliding threshold ends in a process that runs tensors


def main(request: str, result: str, errors: str = "") -> None:
    """Measure what the JSON `request` describes and write the JSON answer to the file `result`.

    With `errors`, everything the process prints goes to that file.
    """
    if errors:
        sink = os.open(errors, os.O_WRONLY | os.O_CREAT)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
    Path(result).write_text(json.dumps(run(json.loads(request))))


@torch.inference_mode()
def run(request: dict) -> dict:
    """All measurements of one artefact; `request` holds `folder`, `device` and the fields of `cost.Workload`.

    The keys of the answer are the fields of `cost.Measurement`.
    """
    folder, device, prompt_tokens, new_tokens, threads = (
        request[key] for key in ("folder", "device", "prompt_tokens", "new_tokens", "threads")
    )
    limit_vram(device, request["memory_cap_gib"])
    torch.set_num_threads(threads or torch.get_num_threads())
    facts = {"threads": torch.get_num_threads(), "load_average": load_average()}
    facts |= {"device": device, "prompt_tokens": prompt_tokens, "runtime_bytes": start_runtime(Path(folder), device)}
    model = timed_load(Path(folder), device, facts)
    generator = torch.Generator().manual_seed(request["seed"])
    prompt = torch.randint(model.config.vocab_size, (1, prompt_tokens), generator=generator).to(device)
    facts |= generate_once(model, prompt, new_tokens)
    facts |= generate_samples(model, prompt, new_tokens=new_tokens, samples=request["samples"])
    facts["weight_bytes_in_memory"] = weight_bytes(model)
    cache = facts["cache_bytes_per_token"] * (prompt_tokens + new_tokens // 2)  # half-way through the generation
    footprint = facts["bytes_read_per_token"] = weight_bytes(model, skip=input_embedding(model)) + cache
    facts["memory_read_bytes_per_s"] = memory_read_rate(footprint, device=device)
    torch.set_num_threads(1)
    facts["memory_read_bytes_per_s_one_thread"] = memory_read_rate(footprint, device=device)
    return facts


def start_runtime(folder: Path, device: str) -> int:
    """Import what the artefact's format needs, run a toy model, and return the resident bytes before any weights."""
    quiet.quiet_libraries()
    method = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("quant_method")
    if method in LIBRARIES:
        importlib.import_module(LIBRARIES[method])
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as toy:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(toy)
        generate(models.load(Path(toy), device), torch.zeros(1, 16, dtype=torch.long, device=device), 2, device)
    return memory()["rss"]


def timed_load(folder: Path, device: str, facts: dict) -> PreTrainedModel:
    """Load the artefact and add seconds, resident bytes and peak bytes of loading to `facts`."""
    set_malloc_threshold(MALLOC_RETURNS)
    reset_peak(device)
    start = time.perf_counter()
    model = models.load(folder, device)
    synchronize(device)
    facts["load_seconds"] = time.perf_counter() - start
    now = memory()
    facts |= {"loaded_bytes": now["rss"], "load_peak_bytes": now["peak"]}
    return model


def generate_once(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> dict:
    """The first generation after loading: its peak memory, what is resident after it, and its prefill's seconds."""
    device = str(prompt.device)
    reset_peak(device)
    prefill, _, _, cache_bytes = generate(model, prompt, new_tokens, device)
    now = memory()
    facts = {"peak_rss_bytes": now["peak"], "anonymous_bytes": now["anonymous"], "file_bytes": now["file"]}
    facts["peak_vram_bytes"] = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    facts["cache_bytes_per_token"] = cache_bytes // (prompt.shape[1] + new_tokens - 1)
    return facts | {"first_prefill_seconds": prefill}


def generate_samples(model: PreTrainedModel, prompt: torch.Tensor, *, new_tokens: int, samples: int) -> dict:
    """Raw times of `samples` generations, after one that lets malloc settle."""
    set_malloc_threshold(MALLOC_KEEPS)
    device = str(prompt.device)
    reset_peak("cpu")
    generate(model, prompt, 2, device)
    runs = [generate(model, prompt, new_tokens, device) for _ in range(samples)]
    prefill, first, steps, _ = map(list, zip(*runs, strict=True))
    times = {"prefill_seconds": prefill, "first_token_seconds": first, "decode_seconds": steps}
    return times | {"timed_peak_rss_bytes": memory()["peak"]}


def generate(model: nn.Module, prompt: torch.Tensor, new_tokens: int, device: str) -> tuple:
    """Greedy generation: seconds of the prefill, to the first token, of each further token; cache bytes at the end."""
    synchronize(device)
    start = time.perf_counter()
    cache = DynamicCache()
    logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    synchronize(device)
    prefill = time.perf_counter() - start
    token = logits[:, -1].argmax(-1, keepdim=True)
    token.tolist()  # a token counts once the host has it
    first = time.perf_counter() - start
    steps = []
    for _ in range(new_tokens - 1):
        start = time.perf_counter()
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        token.tolist()
        steps.append(time.perf_counter() - start)
    return prefill, first, steps, sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def memory_read_rate(footprint: int, *, device: str = "cpu", seconds: float = 0.4) -> float:
    """Bytes per second at which this process sums a float32 buffer of `footprint` bytes; the best of at least 5 passes.

    The buffer has the size of what it is compared with, so that caches help both alike.
    """
    buffer = torch.ones(max(footprint // 4, 1), dtype=torch.float32, device=device)
    best, passes, stop = float("inf"), 0, time.perf_counter() + seconds
    while passes < 5 or time.perf_counter() < stop:
        synchronize(device)
        start = time.perf_counter()
        buffer.sum()
        synchronize(device)
        best, passes = min(best, time.perf_counter() - start), passes + 1
    return buffer.nbytes / best


def weight_bytes(model: nn.Module, *, skip: torch.Tensor | None = None) -> int:
    """Bytes of the tensors a forward pass reads, scales included, each storage once; `skip` is left out."""
    sizes = {t.data_ptr(): t.nbytes for t in stored_tensors(model)}
    if skip is not None:
        sizes.pop(skip.data_ptr(), None)
    return sum(sizes.values())


def input_embedding(model: PreTrainedModel) -> torch.Tensor | None:
    """The input embedding's table unless the head reads it too: a step gathers one row of it, which is nothing."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    return None if head is not None and head.weight.data_ptr() == table.data_ptr() else table


def stored_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Plain tensors behind a model's parameters and buffers: tensor subclasses and quantisation states opened."""
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            yield from _plain(tensor)
        yield from _state_tensors(getattr(getattr(module, "weight", None), "quant_state", None))
        yield from _state_tensors(getattr(module, "state", None))


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def _state_tensors(state: object) -> Iterator[torch.Tensor]:
    """Tensors of a bitsandbytes quantisation state (4-bit: `absmax`, `code`, nested `state2`; 8-bit: `CB`, `SCB`)."""
    if type(state).__name__ in ("QuantState", "MatmulLtState"):
        for value in vars(state).values():
            if isinstance(value, torch.Tensor):
                yield value
            else:
                yield from _state_tensors(value)


def memory() -> dict[str, int]:
    """Resident bytes of this process now (`rss` = `anonymous` + `file`) and their peak since `reset_peak`.

    Outside Linux only `rss` is known and stands for the peak as well.
    """
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        rss = psutil.Process().memory_info().rss
        return {"rss": rss, "anonymous": 0, "file": 0, "peak": rss}
    kilobytes = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    names = {"rss": "VmRSS", "anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {name: kilobytes[key] * 1024 for name, key in names.items()}


def set_malloc_threshold(size: int) -> None:
    """From `size` bytes on, map and unmap each block instead of keeping it; nothing where malloc is not glibc's."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, size)
        libc.mallopt(trim_threshold, 2 * size)


def reset_peak(device: str) -> None:
    """Start a new peak; where the kernel does not allow it, the peak is that of the process's whole life."""
    if Path("/proc/self/clear_refs").exists() and os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def limit_vram(device: str, gib: float | None) -> None:
    """Enforce a profile's cap on GPU memory in this process too."""
    if gib and device.startswith("cuda"):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock reading covers what was launched."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
