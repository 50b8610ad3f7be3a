"""The worth of the kernels on a whole model: one NF4 artefact before and after, in turn, in one run.

1. Decoding. `transformers-bitsandbytes` is the artefact as the two libraries come: `generate`. `avalab` is the lab's
   torch engine on the same artefact; `reference` is the same engine with AVALAB_KERNELS=reference, which decodes every
   weight whole at every call. In each round every arm reads a long prompt (prefill: prompt tokens over the time to the
   first token) and continues a short one (decode: further tokens over their time), the same tokens for all; the first
   round warms up, and the slow reference takes part in few. `top1_agreement`: the same next token before and after.
2. Training. `peft-bitsandbytes` is the usual QLoRA step, `avalab` what `finetune` does: the arms `peft` and `decoded`
   of `training`, on the same examples.
3. Peak memory: each decoding arm alone, in a process of its own. The peaks of training, which need longer runs, are
   those that `make bench-train` left for the same results folder; `longer_runs` reads them and says which file, commit
   and day they are from, so that no number is taken for this run's.
Records: tokens a second with samples, and every arm's ratio to the first one, with the range of the rounds;
`speed_rows` and `longer_runs` are the lines of a table under `HEADER`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from avalab.lab.statistics import median_and_range
from avalab.measure import cell, training
from avalab.models import checkpoint

RATES = ("prefill_tokens_per_s", "decode_tokens_per_s", "train_tokens_per_s")

PEAKS = ("peak_rss_bytes:engine", "peak_rss_bytes", "peak_vram_bytes")

PEAK_SECONDS = 300  # at most, of a process that measures a peak

HEADER = ("work", "form", "tokens/s", "of the first form [rounds]", "peak memory [MB]")

BEFORE, AFTER, REFERENCE, PEFT = "transformers-bitsandbytes", "avalab", "reference", "peft-bitsandbytes"

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


def nf4_base(run: Run) -> Artifact:
    """The artefact that everything here is measured on: the run's model in NF4, scales quantized again."""
    return quantize.compress_artifact(checkpoint.base_artifact(run), "nf4", run=run, double_quantization=True)


def record_decoding(run: Run, sizes: Sizes | None = None) -> None:
    """Append speed of reading and of decoding, agreement and peak memory of the arms to the run's records."""
    sizes, artifact = sizes or run.profile.pick(SIZES), nf4_base(run)
    record = partial(run.record, artifact_sha256=artifact.sha256, details={"load_average": load_average()})
    model, engine = checkpoint.load_model(artifact, run.device), engines.load("torch", artifact, device=run.device)
    arms = {BEFORE: generating(model), AFTER: telling(engine), REFERENCE: telling(engine, form="reference")}
    for metric, by_arm in _rounds(arms, sizes, engine.facts.vocabulary).items():
        for arm, rates in by_arm.items():
            subject = f"{metric.partition('_')[0]} {artifact.name}:{arm}"
            name = "transformers" if arm == BEFORE else "torch"
            _record_rates(partial(record, subject, engine=name), metric, rates, by_arm[BEFORE])
    same = _agreement(model, engine, run.profile.pick(SIZES).prompts[1])
    subject, share = f"decode {artifact.name}:{AFTER}", same.float().mean().item()
    record(subject, "top1_agreement", share, "1", n=len(same), engine="torch")
    engine.close()
    metric = "peak_vram_bytes" if run.device.startswith("cuda") else "peak_rss_bytes:engine"
    for arm in (BEFORE, AFTER):
        subject = f"decode {artifact.name}:{arm}"
        request = {"folder": str(artifact.path), "arm": arm, "device": run.device, "prompts": list(sizes.prompts)}
        target = "avalab.measure.before_after:measure_peak"
        found = process.call(target, request, limit_seconds=PEAK_SECONDS, label=subject)
        record(subject, metric, found["peak_bytes"], "byte", n=1)


def telling(engine: Engine, *, form: str = "") -> Told:
    """An engine's generation, with `form` as the only form of the kernels."""

    def told(prompt: list[int], new_tokens: int) -> list[float]:
        before = os.environ.get(dispatch.SWITCH, "")
        if form:
            os.environ[dispatch.SWITCH] = form
        try:
            return cell.time_tokens(engine, prompt, new_tokens)
        finally:
            if form:
                os.environ[dispatch.SWITCH] = before

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


def _agreement(model: PreTrainedModel, engine: Engine, length: int) -> torch.Tensor:
    """Where before and after find the same token the most likely, over a prompt of random tokens."""
    draw, vocabulary = random.Random(1), engine.facts.vocabulary
    prompt = [draw.randrange(vocabulary) for _ in range(length)]
    with torch.inference_mode():
        before = model(torch.tensor([prompt], device=model.device)).logits[0].float().cpu()
    return before[:, :vocabulary].argmax(-1) == engine.logits(prompt).argmax(-1)


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


def record_training(run: Run, sizes: Sizes | None = None) -> None:
    """Append the speed of a QLoRA step, before and after, and how far the losses are apart at the last step."""
    sizes, artifact = sizes or run.profile.pick(SIZES), nf4_base(run)
    count = sizes.train_rounds + 1
    steps = {
        name: training.training_step(arm, artifact.path, run.device, rank=sizes.rank, steps=count)
        for name, arm in ((PEFT, "peft"), (AFTER, "decoded"))
    }
    rates, losses = ({name: [] for name in steps} for _ in range(2))
    for _ in tqdm(range(count), desc="training step"):
        for name, step in steps.items():
            start = time.perf_counter()
            tokens, loss = step()
            rates[name].append(tokens / (time.perf_counter() - start))
            losses[name].append(loss)
    details = {"load_average": load_average(), "rank": sizes.rank}
    record = partial(run.record, artifact_sha256=artifact.sha256, details=details)
    for name in steps:
        one = partial(record, f"train {artifact.name}:{name}", engine="torch")
        _record_rates(one, RATES[2], rates[name][1:], rates[PEFT][1:])  # the first round warms up
    gap = abs(losses[AFTER][-1] - losses[PEFT][-1])
    record(f"train {artifact.name}:{AFTER}", "loss_gap:last", gap, "nats/token", n=count)


def _record_rates(record: Callable, metric: str, rates: list[float], baseline: list[float]) -> None:
    """Tokens a second of an arm, and the ratio to the baseline round by round; `record` knows their subject."""
    record(metric, unit="token/s", samples=rates, **vars(median_and_range(rates)))
    ratios = [a / b for a, b in zip(rates, baseline[: len(rates)], strict=True)]
    record(f"{metric}/before", unit="1", samples=ratios, **vars(median_and_range(ratios)))


# --- tables -----------------------------------------------------------------------------------------------------------


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
