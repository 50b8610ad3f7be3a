"""What a fine-tuning step of published shapes needs within 4 GiB of GPU memory: predicted anywhere, measured on a GPU.

The step is QLoRA's: one row of 1,024 tokens, rank-r adapters on every linear layer of an NF4 base. Its techniques are
parameters: recomputed activations, a loss in chunks, an 8-bit paged optimizer, and weights that stay packed. `ARMS`
switches each of them off alone, and then all of them, so that every one's price and gain can be read off.

1. `predict` records what `train_memory` expects of each shape and arm, with the engine `predicted`.
2. `measure` runs them, on a GPU only, each in a process of its own under `set_per_process_memory_fraction`, and beside
   them peft + bitsandbytes and, where it is installed, unsloth, all on the same artefact: NF4 weights that are random,
   since neither memory nor speed depends on them. What does not fit is recorded without a value, and says so.

The limit is that of torch's allocator: the CUDA context, the libraries' own workspaces and the pages that the paged
optimizer keeps in the host's memory are beyond it. What it does not do: other lengths, batches or losses.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, LlamaConfig, PreTrainedModel

from avalab import adapters, artifacts, finetune, losses, models, packed_rows, train, train_memory
from avalab.artifacts import Artifact
from avalab.experiment import ROOT, Run
from avalab.packed_attention import apply_packed_attention
from avalab.packed_rows import IGNORED, Encoded
from avalab.storage import Shape
from avalab.train_memory import Step

LIMIT_BYTES = 4 * 2**30
TOKENS = 1024
WARM_UP, TIMED = 2, 7  # steps
FRUGAL = {"recompute": True, "chunked_loss": True, "optimizer_bytes": 2, "decoded": False}
LAVISH = {"recompute": False, "chunked_loss": False, "optimizer_bytes": 8}
ARMS = {
    "all": {},
    "activations kept": {"recompute": False},
    "logits at once": {"chunked_loss": False},
    "32-bit optimizer": {"optimizer_bytes": 8},
    "weights decoded": {"decoded": True},
    "none": LAVISH,
}
PEERS = ("peft", "unsloth")


def step(arm: str, rank: int, tokens: int = TOKENS) -> Step:
    """The step of an arm of ARMS, as the predictor takes it."""
    about = {"tokens": tokens, "example_tokens": tokens, "rank": rank, "on_gpu": True}
    return Step(**{**about, **FRUGAL, **ARMS[arm]})


def predict(run: Run, rank: int) -> None:
    """Append the predicted peak of every known shape and arm; `details` has the parts and whether they fit."""
    here = "" if run.device.startswith("cuda") else "; no GPU here, nothing of this size was run"
    about = {"engine": "predicted", "device": "", "threads": 0, "note": f"predicted from the shape{here}"}
    for name, shape in train_memory.KNOWN_SHAPES.items():
        for arm in ARMS:
            parts = train_memory.predict(shape, step(arm, rank))
            total = sum(parts.values())
            details = {"parts": parts, "limit_bytes": LIMIT_BYTES, "fits": total <= LIMIT_BYTES}
            run.record(f"{name}, {arm}", "predicted_bytes:peak_vram", total, "bytes", details=details, **about)


def measure(run: Run, rank: int, shapes: dict[str, Shape] | None = None) -> None:
    """Append peak and speed of every shape, arm and peer, and the speed's ratio to peft's, as far as they fit."""
    for name, shape in (shapes or train_memory.KNOWN_SHAPES).items():
        base = random_base(name, shape, run.artifacts_dir)
        found = {arm: isolated(base.path, arm, run.device, rank) for arm in tqdm((*PEERS, *ARMS), desc=name)}
        for arm, outcome in found.items():
            _record(run, f"{name}, {arm}", base.sha256, outcome, found["peft"])


def _record(run: Run, subject: str, sha256: str, outcome: dict, peft: dict) -> None:
    engine = "unsloth" if subject.endswith("unsloth") else "torch"
    about = {"artifact_sha256": sha256, "engine": engine, "details": {"limit_bytes": LIMIT_BYTES, "tokens": TOKENS}}
    memory = "peak_vram_bytes" if run.device.startswith("cuda") else "peak_rss_bytes"
    if "why_not" in outcome:
        run.record(subject, memory, None, "bytes", note=outcome["why_not"], **about)
        return
    run.record(subject, memory, outcome["peak_bytes"], "bytes", n=1, **about)
    speeds = [TOKENS / seconds for seconds in outcome["seconds"]]
    spread = {"low": min(speeds), "high": max(speeds), "n": len(speeds), "samples": speeds}
    run.record(subject, "train_tokens_per_s", statistics.median(speeds), "tokens/s", **spread, **about)
    if "why_not" not in peft:
        ratio = statistics.median(peft["seconds"]) / statistics.median(outcome["seconds"])
        run.record(subject, "train_tokens_per_s/peft", ratio, "1", n=len(speeds), **about)


def random_base(name: str, shape: Shape, directory: Path) -> Artifact:
    """An NF4 artefact of a Llama of this shape with random weights, written without ever holding it in bf16."""
    recipe = [{"step": "random_nf4", **asdict(shape)}]
    found = artifacts.find(f"{name}-random-nf4", directory, recipe, "")
    if found:
        return found

    def save(folder: Path) -> None:
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        _config(shape, quantization_config=four_bits.to_dict()).save_pretrained(folder)
        save_file(_random_tensors(shape), folder / "model.safetensors", metadata={"format": "pt"})
        models.load_tokenizer(ROOT / "data" / "tiny-llama").save_pretrained(folder)  # unsloth wants one

    about = {"base": {"name": "random", "sha256": ""}, "format": "bitsandbytes", "licence": "none: random numbers"}
    return artifacts.write(f"{name}-random-nf4", directory, save, recipe=recipe, **about)


def _config(shape: Shape, **more) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp, head_dim=shape.head_dim,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied, max_position_embeddings=4 * TOKENS, architectures=["LlamaForCausalLM"],
        dtype="bfloat16", **more,
    )  # fmt: skip


def _random_tensors(shape: Shape) -> dict[str, Tensor]:
    """Embedding, norms, head, and the packed linear weights: drawn once for each kind of layer."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    tensors = {"model.embed_tokens.weight": normal(shape.vocab, shape.hidden)}
    tensors |= {} if shape.tied else {"lm_head.weight": normal(shape.vocab, shape.hidden)}
    ones = ["model.norm"] + [
        f"model.layers.{i}.{norm}"
        for i in range(shape.layers)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    tensors |= {f"{name}.weight": torch.ones(shape.hidden, dtype=torch.bfloat16) for name in ones}
    for kind, (rows, columns) in shape.linears().items():
        packed = _packed(normal(rows, columns))
        for i in range(shape.layers):
            tensors |= {f"model.layers.{i}.{kind}.{ending}": part.clone() for ending, part in packed.items()}
    return tensors


def _packed(weight: Tensor) -> dict[str, Tensor]:
    import bitsandbytes as bnb

    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return {"weight": codes, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}


# --- one arm, in a process of its own ---------------------------------------------------------------------------------


def isolated(folder: Path, arm: str, device: str, rank: int) -> dict:
    """`peak_bytes` and `seconds` of the timed steps, or `why_not`."""
    if arm == "unsloth" and finetune.backend(device) != "unsloth":
        return {"why_not": "unsloth is not installed, or there is no GPU"}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, folder, arm, device, rank), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"the process of arm {arm!r} died; its error is printed above") from None
    finally:
        process.join()


def _serve(pipe: Connection, folder: Path, arm: str, device: str, rank: int) -> None:
    cuda = device.startswith("cuda")
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT_BYTES / total))
    try:
        pipe.send(time_steps(artifacts.load(folder, verify=False), arm, device, rank))
    except torch.cuda.OutOfMemoryError:
        pipe.send({"why_not": f"does not fit into {LIMIT_BYTES / 2**30:g} GiB"})


def time_steps(base: Artifact, arm: str, device: str, rank: int) -> dict:
    """Warm up, then time steps of one row of 1,024 random tokens, all of them counted in the loss."""
    model, loss = _peer(base, arm, device, rank) if arm in PEERS else _ours(base, arm, device, rank)
    ids = torch.randint(3, model.config.vocab_size, (TOKENS + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    row = packed_rows.pack([Encoded(ids[:-1], ids[1:])], row_tokens=TOKENS, seed=0)
    batch = {name: value.to(device) for name, value in packed_rows.collate(row).items()}
    optimizer = _optimizer(model, ARMS.get(arm, {}).get("optimizer_bytes", 2), device)
    seconds = []
    for _ in range(WARM_UP + TIMED):
        start = time.perf_counter()
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"peak_bytes": train_memory.peak_bytes(device), "seconds": seconds[WARM_UP:]}


def _ours(base: Artifact, arm: str, device: str, rank: int) -> tuple[PreTrainedModel, Callable[[dict], Tensor]]:
    wanted = step(arm, rank)
    model = models.load(base, device)
    adapters.attach(model, rank=rank, alpha=2 * rank, seed=0)
    adapters.apply_fused(model, decoded=wanted.decoded)
    with torch.no_grad():  # the kernels check themselves in their first call, which recomputation must not watch
        model(torch.tensor([[3, 4]], device=device))
    apply_packed_attention(model)
    if wanted.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    student = train.Student(model, losses.next_token if wanted.chunked_loss else dense_loss).train()
    return model, lambda batch: student(**batch)["loss"]


def _peer(base: Artifact, arm: str, device: str, rank: int) -> tuple[PreTrainedModel, Callable[[dict], Tensor]]:
    """The usual recipe: the library's layers and its own loss, recomputed activations."""
    if arm == "unsloth":
        recipe = finetune.Recipe(rank=rank, alpha=2 * rank, schedule=train.Schedule(gradient_checkpointing=True))
        model = finetune.prepared(base, recipe, Run("bench_train"))
    else:
        model = models.load(base, device)
        adapters.attach(model, rank=rank, alpha=2 * rank, seed=0)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    # The model shifts the labels itself: every token but the last one's successor is predicted.
    return model, lambda batch: model(batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss


def dense_loss(hidden: Tensor, head: Tensor, batch: dict) -> Tensor:
    """The cross-entropy of `losses.next_token` with the logits of every token at once, in float32."""
    return F.cross_entropy((hidden[0] @ head.T).float(), batch["labels"][0], ignore_index=IGNORED)


def _optimizer(model: PreTrainedModel, state_bytes: int, device: str) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if device.startswith("cuda") and state_bytes == 2:
        import bitsandbytes as bnb

        return bnb.optim.PagedAdamW8bit(parameters, lr=1e-4)
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
