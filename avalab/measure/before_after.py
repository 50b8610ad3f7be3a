"""The worth of the kernels on a whole model: one NF4 artefact before and after, in turn, in one run.

1. Decoding. `transformers-bitsandbytes` is the artefact as the two libraries come: `generate`. `avalab` is the lab's
   torch engine on the same artefact; `reference` is the same engine with AVALAB_KERNELS=reference, which decodes every
   weight whole at every call. In each round every arm reads a long prompt (prefill: prompt tokens over the time to the
   first token) and continues a short one (decode: further tokens over their time), the same tokens for all; the first
   round warms up, and the slow reference takes part in few. `top1_agreement`: the same next token before and after.
2. Training. `peft-bitsandbytes` is the usual QLoRA step (padded batch, logits of every position), `avalab` what
   `finetune` does: packed rows, fused layers, loss by chunks; the same examples, adapters, seed and optimizer.
3. Peak memory: each decoding arm alone, in a process of its own. The peaks of training, which need longer runs, are
   `train_bench`'s; `longer_runs` reads those that `make bench-train` left for the same results folder and says which
   file, commit and day they are from, so that no number is taken for this run's.
Records: tokens a second with samples, and every arm's ratio to the first one, with the range of the rounds;
`speed_rows` and `longer_runs` are the lines of a table under `HEADER`.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from avalab import engines
from avalab.compress import quantize
from avalab.engines import Engine
from avalab.kernels import dispatch
from avalab.lab import process, trackers
from avalab.lab.artifacts import Artifact
from avalab.lab.run import ROOT, Record, Run, load_average, load_records
from avalab.measure import cell, training
from avalab.models import adapters, checkpoint
from avalab.models.attention import apply_packed_attention
from avalab.train import loop, losses

RATES = ("prefill_tokens_per_s", "decode_tokens_per_s", "train_tokens_per_s")

PEAKS = ("peak_rss_bytes:engine", "peak_rss_bytes", "peak_vram_bytes")

HEADER = ("work", "form", "tokens/s", "of the first form [rounds]", "peak memory [MB]")

BEFORE, AFTER, REFERENCE, PEFT = "transformers-bitsandbytes", "avalab", "reference", "peft-bitsandbytes"

PEAK_SECONDS = 300  # at most, of a process that measures a peak

Told = Callable[[list[int], int], list[float]]  # prompt, new tokens -> seconds from the call to each token

Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Sizes:
    """What one profile measures."""

    rounds: int
    new_tokens: int
    reference: tuple[int, int]  # rounds and new tokens of the slow arm
    train_rounds: int  # of one step each
    rank: int
    prompts: tuple[int, int] = (16, 512)  # to continue, to read


SIZES = {
    "smoke": Sizes(3, 8, (2, 2), 2, 4),
    "laptop": Sizes(5, 32, (2, 2), 2, 16),
    "a2000": Sizes(11, 64, (3, 8), 7, 16),
}

SIZES["long"] = SIZES["laptop"]


def nf4_base(run: Run) -> Artifact:
    """The artefact that everything here is measured on: the run's model in NF4, scales quantized again."""
    return quantize.compress_artifact(checkpoint.base_artifact(run), "nf4", run=run, double_quantization=True)


# --- decoding ----------------------------------------------------------------------------------------------------


def record_decoding(run: Run, sizes: Sizes | None = None) -> None:
    """Append speed of reading and of decoding, agreement and peak memory of the arms to the run's records."""
    sizes, artifact = sizes or SIZES[run.profile_name], nf4_base(run)
    model, engine = checkpoint.load_model(artifact, run.device), engines.load("torch", artifact, device=run.device)
    arms = {BEFORE: generating(model), AFTER: telling(engine), REFERENCE: telling(engine, form="reference")}
    found = _rounds(arms, sizes, engine.facts.vocabulary)
    about = {"artifact_sha256": artifact.sha256, "details": {"load_average": load_average()}}
    for metric, by_arm in found.items():
        work = f"{metric.partition('_')[0]} {artifact.name}"
        for arm in arms:
            engine_name = "transformers" if arm == BEFORE else "torch"
            _record_rate(run, f"{work}:{arm}", metric, by_arm[arm], by_arm[BEFORE], engine=engine_name, **about)
    _agreement(run, f"decode {artifact.name}:{AFTER}", model, engine, **about)
    engine.close()
    for arm in (BEFORE, AFTER):
        _peak(run, f"decode {artifact.name}:{arm}", artifact, sizes, **about)


def telling(engine: Engine, *, form: str = "") -> Told:
    """An engine's generation, with `form` as the only form of the kernels."""

    def told(prompt: list[int], new_tokens: int) -> list[float]:
        with _only(form):
            return cell.time_tokens(engine, prompt, new_tokens)

    return told


def generating(model: PreTrainedModel) -> Told:
    """transformers' own greedy `generate`; a token counts once its logits are there."""

    def told(prompt: list[int], new_tokens: int) -> list[float]:
        seconds: list[float] = []
        ids = torch.tensor([prompt], device=model.device)

        def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[0, 0].item()  # on a GPU: wait for them
            seconds.append(time.perf_counter() - start)
            return scores

        options = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0}
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[note], **options)
        return seconds

    return told


@contextmanager
def _only(form: str) -> Iterator[None]:
    """AVALAB_KERNELS is `form` in the block; empty: what it was."""
    before = os.environ.get(dispatch.SWITCH)
    if form:
        os.environ[dispatch.SWITCH] = form
    try:
        yield
    finally:
        os.environ.pop(dispatch.SWITCH, None) if before is None else os.environ.update({dispatch.SWITCH: before})


def _rounds(arms: dict[str, Told], sizes: Sizes, vocabulary: int) -> dict[str, dict[str, list[float]]]:
    """metric -> arm -> tokens a second, one a round; the first round warms up."""
    draw, (short, long) = random.Random(0), sizes.prompts
    found = {metric: {arm: [] for arm in arms} for metric in RATES[:2]}
    for number in tqdm(range(sizes.rounds + 1), desc="whole model"):
        prompts = [[draw.randrange(vocabulary) for _ in range(length)] for length in (short, long)]
        for arm, told in arms.items():
            rounds, new = sizes.reference if arm == REFERENCE else (sizes.rounds, sizes.new_tokens)
            if number > rounds or (arm == REFERENCE and not number):  # the reference has nothing to warm up
                continue
            (first,), steps = told(prompts[1], 1), told(prompts[0], new)
            if number:
                found[RATES[0]][arm].append(long / first)
                found[RATES[1]][arm].append((new - 1) / (steps[-1] - steps[0]))
    return found


def _agreement(run: Run, subject: str, model: PreTrainedModel, engine: Engine, **about) -> None:
    """How often before and after find the same token the most likely, over a prompt of random tokens."""
    draw = random.Random(1)
    prompt = [draw.randrange(engine.facts.vocabulary) for _ in range(SIZES[run.profile_name].prompts[1])]
    with torch.inference_mode():
        before = model(torch.tensor([prompt], device=model.device)).logits[0].float().cpu()
    same = before[:, : engine.facts.vocabulary].argmax(-1) == engine.logits(prompt).argmax(-1)
    run.record(subject, "top1_agreement", same.float().mean().item(), "1", n=len(prompt), engine="torch", **about)


def _peak(run: Run, subject: str, artifact: Artifact, sizes: Sizes, **about) -> None:
    arm = subject.rpartition(":")[2]
    request = {"folder": str(artifact.path), "arm": arm, "device": run.device, "prompts": list(sizes.prompts)}
    found = process.call("avalab.measure.before_after:measure_peak", request, limit_seconds=PEAK_SECONDS, label=subject)
    metric = "peak_vram_bytes" if run.device.startswith("cuda") else "peak_rss_bytes:engine"
    run.record(subject, metric, found["peak_bytes"], "byte", n=1, **about)


def measure_peak(request: dict) -> dict:
    """Peak bytes of loading an arm, reading and continuing prompts: above the libraries, or of a GPU's memory."""
    folder, device, before = Path(request["folder"]), request["device"], trackers.process_memory()["rss"]
    trackers.reset_peak_memory(device)
    if request["arm"] == BEFORE:
        told = generating(checkpoint.load_model(folder, device))
    else:
        told = telling(engines.load("torch", folder, device=device))
    for length in request["prompts"]:
        told([1] * length, 2)
    above = trackers.process_memory()["peak"] - before
    return {"peak_bytes": trackers.peak_gpu_memory(device) or above}


# --- training ----------------------------------------------------------------------------------------------------


def record_training(run: Run, sizes: Sizes | None = None) -> None:
    """Append the speed of a QLoRA step, before and after, and how far the losses are apart at the last step."""
    sizes, artifact = sizes or SIZES[run.profile_name], nf4_base(run)
    steps = {arm: training_step(arm, artifact, run.device, sizes) for arm in (PEFT, AFTER)}
    rates, losses = ({arm: [] for arm in steps} for _ in range(2))
    for number in tqdm(range(sizes.train_rounds + 1), desc="training step"):
        for arm, one in steps.items():
            rate, loss = one()
            losses[arm].append(loss)
            if number:
                rates[arm].append(rate)
    about = {"artifact_sha256": artifact.sha256, "details": {"load_average": load_average(), "rank": sizes.rank}}
    for arm in steps:
        _record_rate(run, f"train {artifact.name}:{arm}", RATES[2], rates[arm], rates[PEFT], engine="torch", **about)
    gap = abs(losses[AFTER][-1] - losses[PEFT][-1])
    run.record(f"train {artifact.name}:{AFTER}", "loss_gap:last", gap, "nats/token", n=len(losses[AFTER]), **about)


def training_step(arm: str, artifact: Artifact, device: str, sizes: Sizes) -> Callable[[], tuple[float, float]]:
    """One training step of an arm: tokens a second, and the loss in nats a token."""
    model = checkpoint.load_model(artifact, device)
    adapters.attach_adapters(model, rank=sizes.rank, alpha=2 * sizes.rank, seed=0)
    if arm != PEFT:
        adapters.apply_fused(model)
        apply_packed_attention(model)
    student = loop.Student(model.train(), losses.next_token)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    batches = training.batches("peft" if arm == PEFT else arm, artifact.path, device, sizes.train_rounds + 1)

    def one() -> tuple[float, float]:
        batch, tokens = next(batches)
        start = time.perf_counter()
        loss = model(**batch, use_cache=False).loss if arm == PEFT else student(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()  # on a GPU: wait for it
        trackers.synchronize(device)
        return tokens / (time.perf_counter() - start), value

    return one


# --- records --------------------------------------------------------------------------------------------


def _record_rate(run: Run, subject: str, metric: str, rates: list[float], baseline: list[float], **about) -> None:
    """Tokens a second of an arm, and the ratio to the baseline: its median and range over the rounds."""
    middle, more = statistics.median(rates), {"n": len(rates), **about}
    run.record(subject, metric, middle, "token/s", low=min(rates), high=max(rates), samples=rates, **more)
    ratios = [a / b for a, b in zip(rates, baseline[: len(rates)], strict=True)]
    ratio = statistics.median(ratios)
    run.record(subject, f"{metric}/before", ratio, "1", low=min(ratios), high=max(ratios), samples=ratios, **more)


# --- tables ------------------------------------------------------------------------------------------------------


def speed_rows(records: list[Record]) -> Rows:
    """Rows under `HEADER` of all speeds that have a ratio `<metric>/before`: one a work and form."""
    found = {(r.subject, r.metric): r for r in records if r.value is not None}
    shown = []
    for subject, metric in found:
        if metric in RATES and (subject, f"{metric}/before") in found:
            work, _, form = subject.rpartition(":")
            shown.append((work, form, *_cells(found, subject, metric, "before")))
    return tuple(shown)


def longer_runs(run: Run) -> tuple[Rows, str]:
    """Rows under `HEADER` of the longer training runs of `make bench-train`, and a note on where they are from."""
    path = run.results_dir / "bench_train.json"
    where = path.relative_to(ROOT)
    if not path.is_file():
        note = f"Longer training runs and their peaks of memory: make bench-train writes {where}; there is none yet."
        return (), note
    found = {(r.subject, r.metric): r for r in load_records(path) if r.value is not None}
    speeds = {arm: record for (arm, metric), record in found.items() if metric == RATES[2]}
    if not speeds:
        return (), f"{where} holds no speed of a training step."
    shown = [("train, longer run", arm, *_cells(found, arm, RATES[2], "peft")) for arm in speeds]
    one = next(iter(speeds.values()))
    return tuple(shown), f"Longer run: {where}, commit {one.commit}, {one.when[:10]}, threads {one.threads}."


def _cells(found: dict[tuple[str, str], Record], subject: str, metric: str, first: str) -> tuple[str, str, str]:
    """Speed, ratio with its range, and peak memory where it was measured."""
    ratio = found[subject, f"{metric}/{first}"]
    peak = next((found[subject, name].value for name in PEAKS if (subject, name) in found), None)
    span = f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
    return f"{found[subject, metric].value:.4g}", span, "" if peak is None else f"{peak / 1e6:.4g}"
