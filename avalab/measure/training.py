"""How fast a training step is, and in how much memory: the lab's arms against peft + bitsandbytes, in one run.

    python -m avalab.measure.training [--profile P]        (make bench-train)

1. Every arm is a process of its own (its peak resident memory is its own), fine-tunes the same NF4 base with the same
   adapters, seed, optimizer and examples, four a step, and is asked for a few steps in turn, so that a busy moment of
   the machine meets them all. The first round warms up and is not counted.
2. Arms: `peft` is the usual recipe (bitsandbytes' 4-bit layers, PEFT's float32 adapters, a padded batch, logits of
   every position); `packed` is `finetune`'s path on packed 4-bit weights, `decoded` the same with the weights held in
   bf16, `unfused` packs and computes the loss as we do but leaves the layers to PEFT.
3. Tokens a second count the examples' own tokens, never padding. `loss_gap` is the largest difference of an arm's loss
   from the baseline's over the first fifty steps, `loss_gap:last` that at the last of them: the same curve, or
   something was changed.

What a step of larger, published shapes needs within 4 GiB is `train_limit`'s: predicted, and measured on a GPU only.

What it does not do: the Trainer's work (checkpoints, logging), which is the same for all.

What a fine-tuning step of published shapes needs within 4 GiB of GPU memory: predicted anywhere, measured on a GPU.

The step is QLoRA's: one row of 1,024 tokens, rank-r adapters on every linear layer of an NF4 base. Its techniques are
parameters: recomputed activations, a loss in chunks, an 8-bit paged optimizer, and weights that stay packed. `ARMS`
switches each of them off alone, and then all of them, so that every one's price and gain can be read off.

1. `predict` records what `train_memory` expects of each shape and arm, with the engine `predicted`.
2. `measure` runs them, on a GPU only, each in a process of its own under `set_per_process_memory_fraction`, and beside
   them peft + bitsandbytes and, where it is installed, unsloth, all on the same artefact: NF4 weights that are random,
   since neither memory nor speed depends on them. What does not fit is recorded without a value, and says so.

The limit is that of torch's allocator: the CUDA context, the libraries' own workspaces and the pages that the paged
optimizer keeps in the host's memory are beyond it. What it does not do: other lengths, batches or losses.

How long a training step takes with each way of listening, in one process, in turn.

The students of a comparison are trained one after another, and a busy moment of the machine meets only one of them.
Here one student with adapters makes a forward and backward pass on the same row with each recipe's loss, in turn, and
a recipe's ratio to the first one is the median over rounds of ratios within a round.

What it does not do: the optimizer's step and the Trainer's work, which are the same for all; change the student.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, LlamaConfig, PreTrainedModel

from avalab.compress import quantize
from avalab.data import packing, synthesize
from avalab.data.packing import IGNORED, Encoded, collate
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.run import PROFILES, ROOT, Run, load_average
from avalab.lab.trackers import interleaved
from avalab.models import adapters, checkpoint
from avalab.models.attention import apply_packed_attention
from avalab.models.sizes import Shape
from avalab.train import distill, finetune, loop, losses, memory, targets
from avalab.train.distill import ONLINE, Recipe
from avalab.train.memory import Step
from avalab.train.targets import Form

LIMIT_BYTES = 4 * 2**30

TOKENS = 1024

WARM_UP, TIMED = 2, 7  # steps

FRUGAL = {"recompute": True, "chunked_loss": True, "optimizer_bytes": 2, "decoded": False}

LAVISH = {"recompute": False, "chunked_loss": False, "optimizer_bytes": 8}

LIMIT_ARMS = {
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
    return Step(**{**about, **FRUGAL, **LIMIT_ARMS[arm]})


def predict_limit(run: Run, rank: int) -> None:
    """Append the predicted peak of every known shape and arm; `details` has the parts and whether they fit."""
    here = "" if run.device.startswith("cuda") else "; no GPU here, nothing of this size was run"
    about = {"engine": "predicted", "device": "", "threads": 0, "note": f"predicted from the shape{here}"}
    for name, shape in memory.KNOWN_SHAPES.items():
        for arm in LIMIT_ARMS:
            parts = memory.predict_memory(shape, step(arm, rank))
            total = sum(parts.values())
            details = {"parts": parts, "limit_bytes": LIMIT_BYTES, "fits": total <= LIMIT_BYTES}
            run.record(f"{name}, {arm}", "predicted_bytes:peak_vram", total, "bytes", details=details, **about)


def measure_limit(run: Run, rank: int, shapes: dict[str, Shape] | None = None) -> None:
    """Append peak and speed of every shape, arm and peer, and the speed's ratio to peft's, as far as they fit."""
    for name, shape in (shapes or memory.KNOWN_SHAPES).items():
        base = random_base(name, shape, run.artifacts_dir)
        found = {arm: isolated(base.path, arm, run.device, rank) for arm in tqdm((*PEERS, *LIMIT_ARMS), desc=name)}
        for arm, outcome in found.items():
            _train_limit_record(run, f"{name}, {arm}", base.sha256, outcome, found["peft"])


def _train_limit_record(run: Run, subject: str, sha256: str, outcome: dict, peft: dict) -> None:
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
    found = artifacts.find_artifact(f"{name}-random-nf4", directory, recipe, "")
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
        checkpoint.load_tokenizer(ROOT / "data" / "tiny-llama").save_pretrained(folder)  # unsloth wants one

    about = {"base": {"name": "random", "sha256": ""}, "format": "bitsandbytes", "licence": "none: random numbers"}
    return artifacts.write_artifact(f"{name}-random-nf4", directory, save, recipe=recipe, **about)


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
        pipe.send(time_steps(artifacts.load_artifact(folder, verify=False), arm, device, rank))
    except torch.cuda.OutOfMemoryError:
        pipe.send({"why_not": f"does not fit into {LIMIT_BYTES / 2**30:g} GiB"})


def time_steps(base: Artifact, arm: str, device: str, rank: int) -> dict:
    """Warm up, then time steps of one row of 1,024 random tokens, all of them counted in the loss."""
    model, loss = _peer(base, arm, device, rank) if arm in PEERS else _ours(base, arm, device, rank)
    ids = torch.randint(3, model.config.vocab_size, (TOKENS + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    row = packing.pack_rows([Encoded(ids[:-1], ids[1:])], row_tokens=TOKENS, seed=0)
    batch = {name: value.to(device) for name, value in packing.collate(row).items()}
    optimizer = _optimizer(model, LIMIT_ARMS.get(arm, {}).get("optimizer_bytes", 2), device)
    seconds = []
    for _ in range(WARM_UP + TIMED):
        start = time.perf_counter()
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"peak_bytes": memory.peak_bytes(device), "seconds": seconds[WARM_UP:]}


def _ours(base: Artifact, arm: str, device: str, rank: int) -> tuple[PreTrainedModel, Callable[[dict], Tensor]]:
    wanted = step(arm, rank)
    model = checkpoint.load_model(base, device)
    adapters.attach_adapters(model, rank=rank, alpha=2 * rank, seed=0)
    adapters.apply_fused(model, decoded=wanted.decoded)
    with torch.no_grad():  # the kernels check themselves in their first call, which recomputation must not watch
        model(torch.tensor([[3, 4]], device=device))
    apply_packed_attention(model)
    if wanted.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    student = loop.Student(model, losses.next_token if wanted.chunked_loss else dense_loss).train()
    return model, lambda batch: student(**batch)["loss"]


def _peer(base: Artifact, arm: str, device: str, rank: int) -> tuple[PreTrainedModel, Callable[[dict], Tensor]]:
    """The usual recipe: the library's layers and its own loss, recomputed activations."""
    if arm == "unsloth":
        recipe = finetune.Recipe(rank=rank, alpha=2 * rank, schedule=loop.Schedule(gradient_checkpointing=True))
        model = finetune.prepare_model(base, recipe, Run("bench_train"))
    else:
        model = checkpoint.load_model(base, device)
        adapters.attach_adapters(model, rank=rank, alpha=2 * rank, seed=0)
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


# --- how long a training step takes with each way of listening, in one process, in turn -----------------------------


def record_step_times(
    run: Run, student: Artifact, teacher: Artifact, rows: list[dict[str, Tensor]], recipes: dict[str, Recipe]
) -> None:
    """Append `step_ms` of each recipe on the first row, and `step_time/<first>`, its ratio to the first recipe.

    Stored targets are those of all `rows`, read where they are there already. Every recipe trains the same parameters:
    those of the first one.
    """
    model = distill.prepare_student(student, next(iter(recipes.values())), run)
    apply_packed_attention(model)
    arms = {}
    for name, recipe in recipes.items():
        form = Form(recipe.teacher, recipe.count, recipe.temperature, run.seed) if recipe.teacher != ONLINE else None
        row = targets.attach_targets(run, rows, teacher, form)[0][0] if form else rows[0]
        loss = distill.objective_of(model, teacher, recipe, rows=rows, device=run.device, identity=name)
        arms[name] = _step(loop.Student(model, loss), {k: v.to(run.device) for k, v in collate([row]).items()})
    found = interleaved(arms, run.profile.latency_samples, run.device)
    first = next(iter(found))
    about = {"engine": "torch", "n": run.profile.latency_samples, "artifact_sha256": student.sha256}
    about["details"] = {"load_average": load_average(), "tokens": len(rows[0]["input_ids"])}
    for name, samples in found.items():
        ends = {"low": min(samples), "high": max(samples), "samples": samples}
        run.record(name, "step_ms", statistics.median(samples), "ms", **ends, **about)
        ratios = [ours / base for ours, base in zip(samples, found[first], strict=True)]
        ends = {"low": min(ratios), "high": max(ratios), "samples": ratios}
        run.record(name, f"step_time/{first}", statistics.median(ratios), "1", **ends, **about)


def _step(student: loop.Student, batch: dict[str, Tensor]):
    student.train()

    def step() -> None:
        student(**batch)["loss"].backward()
        student.zero_grad()

    return step


# --- how fast a training step is, and in how much memory ------------------------------------------------------------


ARMS = ("peft", "unfused", "packed", "decoded")

EXAMPLES_PER_STEP = 4

CURVE_STEPS = 50  # the curves are compared up to here


@dataclass(frozen=True)
class Sizes:
    """What one profile measures."""

    rounds: int
    steps: int  # of each arm in each round
    rank: int


SIZES = {"smoke": Sizes(3, 2, 4), "laptop": Sizes(11, 5, 16), "a2000": Sizes(11, 10, 16)}

SIZES["long"] = SIZES["laptop"]


def measure_training(run: Run, sizes: Sizes | None = None) -> None:
    """Append every arm's speed, memory and loss gap to the run's records."""
    sizes = sizes or SIZES[run.profile_name]
    base = quantize.compress_artifact(checkpoint.base_artifact(run), "nf4", run=run, double_quantization=True)
    context = multiprocessing.get_context("spawn")
    started = [_start(context, (arm, base.path, run.device, sizes)) for arm in ARMS]
    try:
        found = _rounds({arm: pipe for arm, (_, pipe) in zip(ARMS, started, strict=True)}, sizes)
    finally:
        for process, pipe in started:
            pipe.close()  # the arm ends when it next reads
            process.join(timeout=10)
            process.kill()
    for arm in ARMS:
        _record(run, arm, found, base.sha256)
    predict_limit(run, sizes.rank)
    if run.device.startswith("cuda"):
        measure_limit(run, sizes.rank)


def _start(context: multiprocessing.context.SpawnContext, about: tuple) -> tuple:
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *about), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _rounds(pipes: dict[str, Connection], sizes: Sizes) -> dict[str, list[dict]]:
    """Per arm, one dict a round: `seconds`, `tokens`, `losses`, `peak_bytes`."""
    for arm, pipe in pipes.items():
        _received(arm, pipe)  # loaded
    found: dict[str, list[dict]] = {arm: [] for arm in pipes}
    for _ in tqdm(range(sizes.rounds), desc="rounds"):
        for arm, pipe in pipes.items():
            pipe.send(sizes.steps)
            found[arm].append(_received(arm, pipe))
    return found


def _received(arm: str, pipe: Connection) -> dict | str:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"the process of arm {arm!r} died; its error is printed above") from None


def _record(run: Run, arm: str, found: dict[str, list[dict]], sha256: str) -> None:
    ours, baseline = found[arm][1:], found["peft"][1:]
    speeds = [r["tokens"] / r["seconds"] for r in ours]
    ratios = [b["seconds"] / r["seconds"] for r, b in zip(ours, baseline, strict=True)]  # the same examples
    curves = [[loss for r in found[name] for loss in r["losses"]][:CURVE_STEPS] for name in (arm, "peft")]
    gaps = [abs(a - b) for a, b in zip(*curves, strict=True)]
    peak, peak_base = found[arm][-1]["peak_bytes"], found["peft"][-1]["peak_bytes"]
    about = {"artifact_sha256": sha256, "engine": "torch", "n": len(speeds)}
    about |= {"details": {"load_average": load_average(), "examples_per_step": EXAMPLES_PER_STEP}}
    spread = {"low": min(speeds), "high": max(speeds), "samples": speeds}
    run.record(arm, "train_tokens_per_s", statistics.median(speeds), "tokens/s", **spread, **about)
    run.record(
        arm, "train_tokens_per_s/peft", statistics.median(ratios), "1", low=min(ratios), high=max(ratios), **about
    )
    memory = "peak_vram_bytes" if run.device.startswith("cuda") else "peak_rss_bytes"
    run.record(arm, memory, peak, "bytes", **about)
    run.record(arm, f"{memory}/peft", peak / peak_base, "1", **about)
    about |= {"n": len(gaps), "samples": curves[0]}
    run.record(arm, "loss_gap", max(gaps), "nats/token", **about)
    run.record(arm, "loss_gap:last", gaps[-1], "nats/token", **about)


# --- in the arm's own process -----------------------------------------------------------------------------------------


def serve(pipe: Connection, arm: str, folder: Path, device: str, sizes: Sizes) -> None:
    """Load, say so, then train as many steps as each message asks for, until the pipe is closed."""
    model, batches = _prepared(arm, folder, device, sizes)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    student = None if arm == "peft" else loop.Student(model, losses.next_token)
    pipe.send("ready")
    while True:
        try:
            steps = pipe.recv()
        except EOFError:
            return
        tokens, seen, start = 0, [], time.perf_counter()
        for _ in range(steps):
            batch, count = next(batches)
            loss = model(**batch, use_cache=False).loss if student is None else student(**batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tokens += count
            seen.append(loss.item())
        pipe.send(
            {
                "seconds": time.perf_counter() - start,
                "tokens": tokens,
                "losses": seen,
                "peak_bytes": memory.peak_bytes(device),
            }
        )


def _prepared(arm: str, folder: Path, device: str, sizes: Sizes) -> tuple[PreTrainedModel, Iterator]:
    model = checkpoint.load_model(folder, device)
    adapters.attach_adapters(model, rank=sizes.rank, alpha=2 * sizes.rank, seed=0)
    if arm in ("packed", "decoded"):
        adapters.apply_fused(model, decoded=arm == "decoded")
    if arm != "peft":
        apply_packed_attention(model)
    model.train()
    steps = sizes.rounds * sizes.steps
    return model, batches(arm, folder, device, steps)


def batches(arm: str, folder: Path, device: str, steps: int) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """(batch, its examples' tokens) of each step; every arm gets the same examples in the same order."""
    tokenizer = checkpoint.load_tokenizer(folder)
    examples = synthesize.load_examples(ROOT / "data" / "synthetic_datasets" / "single_call.jsonl")[
        : steps * EXAMPLES_PER_STEP
    ]
    encoded = [packing.encode_chat(tokenizer, example["messages"]) for example in examples]
    for start in range(0, len(encoded), EXAMPLES_PER_STEP):
        members = encoded[start : start + EXAMPLES_PER_STEP]
        count = sum(len(member.ids) for member in members)
        batch = (
            padded(members) if arm == "peft" else packing.collate(packing.pack_rows(members, row_tokens=count, seed=0))
        )
        yield {name: value.to(device) for name, value in batch.items()}, count


def padded(members: list[Encoded]) -> dict[str, torch.Tensor]:
    """The usual batch: padded on the right, labels where the tokens stand (the model shifts them itself)."""
    longest = max(len(member.ids) for member in members)

    def padded(values: list[list[int]], filling: int) -> torch.Tensor:
        return torch.tensor([row + [filling] * (longest - len(row)) for row in values])

    labels = [[IGNORED, *member.labels[:-1]] for member in members]
    mask = padded([[1] * len(member.ids) for member in members], 0)
    return {"input_ids": padded([m.ids for m in members], 0), "attention_mask": mask, "labels": padded(labels, IGNORED)}


def _fits(details: dict) -> str:
    return {True: ", fits", False: ", does not fit", None: ""}[details.get("fits")]


def main() -> None:
    """`make bench-train`."""
    parser = argparse.ArgumentParser(description="Time a training step against peft + bitsandbytes.")
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    run = Run("bench_train", parser.parse_args().profile)
    measure_training(run)
    path = run.save()
    for record in run.records:
        value = record.note if record.value is None else f"{record.value:14.4g} {record.unit:10} {record.engine}"
        print(f"{record.subject:32} {record.metric:26} {value}{_fits(record.details)}")
    print(f"load average {load_average()}; records: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
