"""Steps of preference training against trl's, in speed and memory: `python -m avalab.train.preferences.bench`.

1. The same student, pairs, rank and optimizer; four pairs a step. Each arm runs in processes of its own, in turn with
   the other, so that a busy minute falls on both; the peak is a process's resident memory.
2. Tokens are counted as trl reads them, prompt and chosen and prompt and rejected, whatever an arm saves of them.
3. The reference of a step's pairs counts as part of the step in both arms, although a second epoch of ours would read
   it from disk; trl computes it in each step with its adapters off.
4. trl 1.15 takes log-probabilities from a Triton kernel that no CPU runs. On a CPU, torch's definition on the labelled
   tokens stands in for it (`PlainLogProbabilities`), and the record says so.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from avalab.data import synthesize
from avalab.data.packing import one_row_batch
from avalab.lab import artifacts, process, statistics
from avalab.lab.artifacts import Artifact
from avalab.lab.run import PROFILES, ROOT, Run, load_average
from avalab.models import adapters, checkpoint
from avalab.models.attention import apply_packed_attention
from avalab.train import loop, memory
from avalab.train.preferences import align, pairs
from avalab.train.recipes import PreferenceRecipe

ARMS = ("ours", "trl")

PAIRS_PER_STEP, WARM_UP, ROW_TOKENS = 4, 1, 8192

LIMIT_SECONDS = 900

RANK = 16


class PlainLogProbabilities:
    """What trl's kernel computes for labelled tokens, by definition."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, _bias: Tensor | None, targets: Tensor, *_: object) -> tuple:
        """log p of the targets; zeros for what is only logged."""
        logits = (hidden @ weight.T).float()
        found = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return found, *[torch.zeros_like(found)] * 3, found > 0


def wrong_calls(count: int) -> list[dict]:
    """Pairs without a model: an example's right call over the next example's, which answers another request."""
    examples = synthesize.load_examples(ROOT / "data" / "synthetic_datasets" / "single_call.jsonl")[: count + 1]
    answers = [example["messages"][-1]["content"] for example in examples]
    prompts = [example["messages"][:-1] for example in examples]
    return [
        {"messages": prompt, "tools": [], "chosen": right, "rejected": wrong}
        for prompt, right, wrong in zip(prompts, answers, answers[1:], strict=False)
        if right != wrong
    ]


def time_arm(request: dict) -> dict:
    """In the arm's process: `seconds` and `tokens` of each step after the first, and `peak_bytes`."""
    folder, arm, steps, device = (request[name] for name in ("folder", "arm", "steps", "device"))
    base = artifacts.load_artifact(folder, verify=False)
    batches = [wrong_calls(PAIRS_PER_STEP * steps)[i::steps] for i in range(steps)]
    step = (our_step if arm == "ours" else trl_step)(base, batches, device)
    seconds, tokens = [], []
    for number in range(steps):
        start = time.perf_counter()
        read, before = step(number)
        tokens.append(read)
        seconds.append(time.perf_counter() - start + before)
    return {"seconds": seconds[WARM_UP:], "tokens": tokens[WARM_UP:], "peak_bytes": memory.peak_bytes(device)}


def our_step(base: Artifact, batches: list[list[dict]], device: str) -> Callable[[int], tuple[int, float]]:
    """A step of the lab by number: tokens, and what their reference has cost before there were adapters."""
    model, tokenizer = checkpoint.load_model(base, device), checkpoint.load_tokenizer(base)
    counts, rows, reference_seconds = [tokens_of(tokenizer, batch) for batch in batches], [], []
    apply_packed_attention(model)
    for batch in batches:
        start = time.perf_counter()
        (row,) = pairs.pack_pairs(tokenizer, batch, row_tokens=ROW_TOKENS, context=ROW_TOKENS, seed=0)
        (known,) = align.log_probabilities(model, [row])
        rows.append({**row, "reference": known})
        reference_seconds.append(time.perf_counter() - start)
    adapters.attach_adapters(model, rank=RANK, alpha=2 * RANK, seed=0)
    adapters.apply_fused_adapters(model)
    student = loop.Student(model, align.Objective(PreferenceRecipe(), "bench")).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0)

    def step(number: int) -> tuple[int, float]:
        inputs = one_row_batch([rows[number]])
        student(**{name: value.to(device) for name, value in inputs.items()})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        return counts[number], reference_seconds[number]

    return step


def trl_step(base: Artifact, batches: list[list[dict]], device: str) -> Callable[[int], tuple[int, float]]:
    """A step of trl's trainer by number, on the same pairs; its reference is inside the step."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer import utils

    if device == "cpu":
        utils._ChunkedLogProbFunction = PlainLogProbabilities
    process.quiet_libraries()
    model, tokenizer = checkpoint.load_model(base, device), checkpoint.load_tokenizer(base)
    options = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=device == "cpu", bf16=False, beta=0.1,
        gradient_checkpointing=False, max_length=None,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model,
        args=options,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.model.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step(number: int) -> tuple[int, float]:
        inputs = {name: value.to(device) for name, value in padded(tokenizer, batches[number]).items()}
        trainer._compute_loss(trainer.model, inputs, return_outputs=False).backward()
        optimizer.step()
        optimizer.zero_grad()
        return int(inputs["attention_mask"].sum()), 0.0

    return step


def padded(tokenizer, batch: list[dict]) -> dict[str, Tensor]:
    """trl's batch: all chosen answers with their prompts, then all rejected ones, padded on the right."""
    whole, counts = [], []
    for which in (0, 1):
        for number, pair in enumerate(batch):
            prompt, answers = pairs.encode_pair(tokenizer, pair, number)
            whole.append(torch.tensor(prompt + answers[which]))
            counts.append(torch.tensor([0] * len(prompt) + [1] * len(answers[which])))
    seen = [torch.ones_like(ids) for ids in whole]
    named = {"input_ids": whole, "attention_mask": seen, "completion_mask": counts}
    return {name: pad_sequence(parts, batch_first=True) for name, parts in named.items()}


def tokens_of(tokenizer, batch: list[dict]) -> int:
    """Tokens of a batch as trl reads them: each prompt twice."""
    return int(padded(tokenizer, batch)["attention_mask"].sum())


def measure(run: Run, *, steps: int, rounds: int) -> None:
    """Append `train_tokens_per_s` and the peak of both arms, and ours over trl's of each."""
    base = checkpoint.base_artifact(run)
    found: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm in ARMS:
            request = {"folder": str(base.path), "arm": arm, "steps": steps + WARM_UP, "device": run.device}
            found[arm].append(
                process.call(
                    "avalab.train.preferences.bench:time_arm", request, limit_seconds=LIMIT_SECONDS, label=f"arm {arm}"
                )
            )
    rates = {arm: [t / s for r in found[arm] for t, s in zip(r["tokens"], r["seconds"], strict=True)] for arm in ARMS}
    peaks = {arm: min(r["peak_bytes"] for r in results) for arm, results in found.items()}
    note = "" if run.device != "cpu" else "trl's Triton kernel does not run on a CPU: torch's definition in its place"
    memory_metric = "peak_rss_bytes" if run.device == "cpu" else "peak_vram_bytes"
    for arm in ARMS:
        details = {"load_average": load_average(), "pairs_per_step": PAIRS_PER_STEP, "rounds": rounds}
        record = partial(run.record, arm, artifact_sha256=base.sha256, engine="torch", details=details)
        spread = statistics.median_and_range(rates[arm])
        record(
            "train_tokens_per_s", unit="tokens/s", samples=rates[arm], note=note if arm == "trl" else "", **vars(spread)
        )
        record(memory_metric, peaks[arm], "bytes", n=rounds)
    ratios = [a / b for a, b in zip(rates["ours"], rates["trl"], strict=True)]
    run.record("ours", "train_tokens_per_s/trl", unit="1", samples=ratios, **vars(statistics.median_and_range(ratios)))
    run.record("ours", f"{memory_metric}/trl", peaks["ours"] / peaks["trl"], "1", n=rounds)


def main() -> None:
    """`make bench-align`."""
    parser = argparse.ArgumentParser(description="Time preference training against trl.")
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    run = Run("bench_align", asked.profile)
    measure(run, steps=asked.steps, rounds=asked.rounds)
    path = run.save()
    for record in run.records:
        print(f"{record.subject:6} {record.metric:26} {record.value:14.4g} {record.unit}  {record.note}")
    print(f"load average {load_average()}; records: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
