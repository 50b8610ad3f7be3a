"""How fast a training step is, and in how much memory: the lab's arms against peft + bitsandbytes, in one run.

    python -m avalab.train_bench [--profile P]        (make bench-train)

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
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from avalab import adapters, losses, models, packed_rows, quantize, synthesize, train, train_limit, train_memory
from avalab.experiment import PROFILES, ROOT, Run, load_average
from avalab.packed_attention import apply_packed_attention
from avalab.packed_rows import IGNORED, Encoded

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


def measure(run: Run, sizes: Sizes | None = None) -> None:
    """Append every arm's speed, memory and loss gap to the run's records."""
    sizes = sizes or SIZES[run.profile_name]
    base = quantize.compress_artifact(models.base(run), "nf4", run=run, double_quantization=True)
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
    train_limit.predict(run, sizes.rank)
    if run.device.startswith("cuda"):
        train_limit.measure(run, sizes.rank)


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
    student = None if arm == "peft" else train.Student(model, losses.next_token)
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
                "peak_bytes": train_memory.peak_bytes(device),
            }
        )


def _prepared(arm: str, folder: Path, device: str, sizes: Sizes) -> tuple[PreTrainedModel, Iterator]:
    model = models.load(folder, device)
    adapters.attach(model, rank=sizes.rank, alpha=2 * sizes.rank, seed=0)
    if arm in ("packed", "decoded"):
        adapters.apply_fused(model, decoded=arm == "decoded")
    if arm != "peft":
        apply_packed_attention(model)
    model.train()
    steps = sizes.rounds * sizes.steps
    return model, batches(arm, folder, device, steps)


def batches(arm: str, folder: Path, device: str, steps: int) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """(batch, its examples' tokens) of each step; every arm gets the same examples in the same order."""
    tokenizer = models.load_tokenizer(folder)
    examples = synthesize.load_examples(ROOT / "data" / "synthetic_datasets" / "single_call.jsonl")[
        : steps * EXAMPLES_PER_STEP
    ]
    encoded = [packed_rows.encode(tokenizer, example["messages"]) for example in examples]
    for start in range(0, len(encoded), EXAMPLES_PER_STEP):
        members = encoded[start : start + EXAMPLES_PER_STEP]
        count = sum(len(member.ids) for member in members)
        batch = (
            padded(members)
            if arm == "peft"
            else packed_rows.collate(packed_rows.pack(members, row_tokens=count, seed=0))
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
    measure(run)
    path = run.save()
    for record in run.records:
        value = record.note if record.value is None else f"{record.value:14.4g} {record.unit:10} {record.engine}"
        print(f"{record.subject:32} {record.metric:26} {value}{_fits(record.details)}")
    print(f"load average {load_average()}; records: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
