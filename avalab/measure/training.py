"""Benchmarks of a training step: its speed and memory against peft + bitsandbytes, its limit, and each loss's price.

    python -m avalab.measure.training [--profile P]        (make bench-train)

**Speed** (`measure_training`).
1. Every arm is a process of its own (its peak resident memory is its own), fine-tunes the same NF4 base with the same
   adapters, seed, optimizer and examples, four a step, and is asked for a few steps in turn, so that a busy moment of
   the machine meets them all. The first round warms up and is not counted.
2. Arms: `peft` is the usual recipe (bitsandbytes' 4-bit layers, PEFT's float32 adapters, a padded batch, logits of
   every position); `packed` is `finetune`'s path on packed 4-bit weights, `decoded` the same with the weights held in
   bf16, `unfused` packs and computes the loss as we do but leaves the layers to PEFT.
3. Tokens a second count the examples' own tokens, never padding. `loss_gap` is the largest difference of an arm's loss
   from the baseline's over the first fifty steps, `loss_gap:last` that at the last of them: the same curve, or
   something was changed. What a Trainer does besides (checkpoints, logging) is the same for all and left out.

**Limit**: what a QLoRA step of published shapes needs within 4 GiB of GPU memory. One row of 1,024 tokens, adapters on
every linear layer of an NF4 base. `LIMIT_ARMS` switches each technique off alone, and then all: recomputed activations,
a loss in chunks, an 8-bit paged optimizer, weights that stay packed.
1. `predict_limit` records what `train.memory` expects of each shape and arm, with the engine `predicted`.
2. `measure_limit` runs them on a GPU, each in a process of its own under torch's own memory limit, and beside them
   peft + bitsandbytes and, where it is installed, unsloth, all on the same NF4 weights. Those are random: neither
   memory nor speed depends on them. What does not fit is recorded without a value. The CUDA context, the libraries'
   workspaces and the pages that the paged optimizer keeps in the host's memory are beyond that limit.

**Losses** (`record_step_times`): one student with adapters makes a forward and backward pass on the same row with each
recipe's loss, in turn. A recipe's ratio to the first one is the median over rounds of ratios within a round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, LlamaConfig, PreTrainedModel

from avalab.compress import quantize
from avalab.data import packing, synthesize
from avalab.data.packing import IGNORED, Encoded, one_row_batch
from avalab.lab import artifacts, process, trackers
from avalab.lab.artifacts import Artifact
from avalab.lab.run import PROFILES, ROOT, Run, load_average
from avalab.lab.statistics import median_and_range
from avalab.models import adapters, checkpoint
from avalab.models.attention import apply_packed_attention
from avalab.models.sizes import Shape
from avalab.train import distill, finetune, loop, losses, memory, targets
from avalab.train.distill import ONLINE, Recipe
from avalab.train.memory import TrainingStep
from avalab.train.targets import TargetForm

ARMS = ("peft", "unfused", "packed", "decoded")

EXAMPLES_PER_STEP = 4

CURVE_STEPS = 50  # the curves are compared up to here

LIMIT_BYTES = 4 * 2**30

LIMIT_SECONDS = 1800.0  # at most, of the process of one arm

TOKENS = 1024

WARM_UP, TIMED = 2, 7  # steps

FRUGAL = {"recompute": True, "chunked_loss": True, "optimizer_bytes": 2, "decoded": False}

LIMIT_ARMS = {
    "all": {},
    "activations kept": {"recompute": False},
    "logits at once": {"chunked_loss": False},
    "32-bit optimizer": {"optimizer_bytes": 8},
    "weights decoded": {"decoded": True},
    "none": {"recompute": False, "chunked_loss": False, "optimizer_bytes": 8},
}

PEERS = ("peft", "unsloth")


@dataclass(frozen=True)
class Sizes:
    """What one profile measures."""

    rounds: int
    steps: int  # of each arm in each round
    rank: int


SIZES = {"smoke": Sizes(3, 2, 4), "laptop": Sizes(11, 5, 16), "a2000": Sizes(11, 10, 16)}

LOADED: dict = {}  # of an arm's own process


def measure_training(run: Run, sizes: Sizes | None = None) -> None:
    """Append every arm's speed, memory and loss gap to the run's records. Raises BrokenProcessPool when an arm dies."""
    sizes = sizes or run.profile.pick(SIZES)
    base = quantize.compress_artifact(checkpoint.base_artifact(run), "nf4", run=run, double_quantization=True)
    found: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    with ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        arms = {arm: stack.enter_context(ProcessPoolExecutor(1, context)) for arm in ARMS}
        loading = [each.submit(load_arm, arm, base.path, run.device, sizes) for arm, each in arms.items()]
        for loaded in loading:
            loaded.result()
        for _ in tqdm(range(sizes.rounds), desc="rounds"):
            for arm, process_of_arm in arms.items():
                found[arm].append(process_of_arm.submit(train_steps, sizes.steps).result())
    for arm in ARMS:
        _record_arm(run, arm, found, base.sha256)
    predict_limit(run, sizes.rank)
    if run.device.startswith("cuda"):
        measure_limit(run, sizes.rank)


def _record_arm(run: Run, arm: str, found: dict[str, list[dict]], sha256: str) -> None:
    ours, baseline = found[arm][1:], found["peft"][1:]
    details = {"load_average": load_average(), "examples_per_step": EXAMPLES_PER_STEP}
    record = partial(run.record, arm, artifact_sha256=sha256, engine="torch", details=details)
    speeds = [r["tokens"] / r["seconds"] for r in ours]
    ratios = [b["seconds"] / r["seconds"] for r, b in zip(ours, baseline, strict=True)]  # the same examples
    record("train_tokens_per_s", unit="tokens/s", samples=speeds, **vars(median_and_range(speeds)))
    record("train_tokens_per_s/peft", unit="1", **vars(median_and_range(ratios)))
    metric = "peak_vram_bytes" if run.device.startswith("cuda") else "peak_rss_bytes"
    peak, peak_of_baseline = ours[-1]["peak_bytes"], baseline[-1]["peak_bytes"]
    record(metric, peak, "bytes", n=len(ours))
    record(f"{metric}/peft", peak / peak_of_baseline, "1", n=len(ours))
    curve, expected = ([loss for r in found[name] for loss in r["losses"]][:CURVE_STEPS] for name in (arm, "peft"))
    gaps = [abs(a - b) for a, b in zip(curve, expected, strict=True)]
    record("loss_gap", max(gaps), "nats/token", n=len(gaps), samples=curve)
    record("loss_gap:last", gaps[-1], "nats/token", n=len(gaps), samples=curve)


def load_arm(arm: str, folder: Path, device: str, sizes: Sizes) -> None:
    """In the arm's process: make the step that `train_steps` takes."""
    step = training_step(arm, folder, device, rank=sizes.rank, steps=sizes.rounds * sizes.steps)
    LOADED.update(step=step, device=device)


def train_steps(count: int) -> dict:
    """In the arm's process: `seconds`, `tokens`, `losses` and `peak_bytes` of so many steps."""
    start = time.perf_counter()
    tokens, seen = zip(*(LOADED["step"]() for _ in range(count)), strict=True)
    seconds = time.perf_counter() - start
    peak = memory.peak_bytes(LOADED["device"])
    return {"seconds": seconds, "tokens": sum(tokens), "losses": list(seen), "peak_bytes": peak}


def training_step(arm: str, folder: Path, device: str, *, rank: int, steps: int) -> Callable[[], tuple[int, float]]:
    """One step of an arm of `ARMS`, which `steps` calls may take: its tokens, and its loss in nats a token."""
    model = checkpoint.load_model(folder, device)
    adapters.attach_adapters(model, rank=rank, alpha=2 * rank, seed=0)
    if arm in ("packed", "decoded"):
        adapters.apply_fused_adapters(model, decoded=arm == "decoded")
    if arm != "peft":
        apply_packed_attention(model)
    model.train()
    student = loop.Student(model, losses.next_token)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    rows = example_batches(arm, folder, device, steps)

    def step() -> tuple[int, float]:
        batch, tokens = next(rows)
        loss = model(**batch, use_cache=False).loss if arm == "peft" else student(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return tokens, loss.item()  # on a GPU: waits for all of the step

    return step


def example_batches(arm: str, folder: Path, device: str, steps: int) -> Iterator[tuple[dict[str, Tensor], int]]:
    """(batch, its examples' tokens) of each step; every arm gets the same examples in the same order."""
    tokenizer = checkpoint.load_tokenizer(folder)
    examples = synthesize.load_examples(ROOT / "data" / "synthetic_datasets" / "single_call.jsonl")
    encoded = [packing.encode_chat(tokenizer, e["messages"]) for e in examples[: steps * EXAMPLES_PER_STEP]]
    for start in range(0, len(encoded), EXAMPLES_PER_STEP):
        members = encoded[start : start + EXAMPLES_PER_STEP]
        count = sum(len(member.ids) for member in members)
        batch = (
            padded(members) if arm == "peft" else one_row_batch(packing.pack_rows(members, row_tokens=count, seed=0))
        )
        yield {name: value.to(device) for name, value in batch.items()}, count


def padded(members: list[Encoded]) -> dict[str, Tensor]:
    """The usual batch: padded on the right, labels where the tokens stand (the model shifts them itself)."""
    longest = max(len(member.ids) for member in members)

    def filled(values: list[list[int]], filling: int) -> Tensor:
        return torch.tensor([row + [filling] * (longest - len(row)) for row in values])

    return {
        "input_ids": filled([member.ids for member in members], 0),
        "attention_mask": filled([[1] * len(member.ids) for member in members], 0),
        "labels": filled([[IGNORED, *member.labels[:-1]] for member in members], IGNORED),
    }


# --- the limit --------------------------------------------------------------------------------------------------------


def limit_step(arm: str, rank: int, tokens: int = TOKENS) -> TrainingStep:
    """The step of an arm of `LIMIT_ARMS`, as the predictor takes it."""
    step = TrainingStep(tokens=tokens, example_tokens=tokens, rank=rank, on_gpu=True)
    return replace(step, **(FRUGAL | LIMIT_ARMS[arm]))


def predict_limit(run: Run, rank: int) -> None:
    """Append the predicted peak of every known shape and arm; `details` has the parts and whether they fit."""
    here = "" if run.device.startswith("cuda") else "; no GPU here, nothing of this size was run"
    note = f"predicted from the shape{here}"
    for name, shape in memory.KNOWN_SHAPES.items():
        for arm in LIMIT_ARMS:
            parts = memory.predict_memory(shape, limit_step(arm, rank))
            total = sum(parts.values())
            run.record(
                f"{name}, {arm}",
                "predicted_bytes:peak_vram",
                total,
                "bytes",
                engine="predicted",
                device="",
                threads=0,
                note=note,
                details={"parts": parts, "limit_bytes": LIMIT_BYTES, "fits": total <= LIMIT_BYTES},
            )


def measure_limit(run: Run, rank: int, shapes: dict[str, Shape] | None = None) -> None:
    """Append peak and speed of every shape, arm and peer, and the speed's ratio to peft's, as far as they fit."""
    for name, shape in (shapes or memory.KNOWN_SHAPES).items():
        base = random_base(name, shape, run.artifacts_dir)
        found = {arm: run_alone(base.path, arm, run.device, rank) for arm in tqdm((*PEERS, *LIMIT_ARMS), desc=name)}
        for arm, outcome in found.items():
            _record_limit(run, f"{name}, {arm}", base.sha256, outcome, found["peft"])


def _record_limit(run: Run, subject: str, sha256: str, outcome: dict, peft: dict) -> None:
    engine = "unsloth" if subject.endswith("unsloth") else "torch"
    details = {"limit_bytes": LIMIT_BYTES, "tokens": TOKENS}
    record = partial(run.record, subject, artifact_sha256=sha256, engine=engine, details=details)
    metric = "peak_vram_bytes" if run.device.startswith("cuda") else "peak_rss_bytes"
    if "why_not" in outcome:
        record(metric, None, "bytes", note=outcome["why_not"])
        return
    record(metric, outcome["peak_bytes"], "bytes", n=1)
    speeds = [TOKENS / seconds for seconds in outcome["seconds"]]
    record("train_tokens_per_s", unit="tokens/s", samples=speeds, **vars(median_and_range(speeds)))
    if "why_not" not in peft:
        ratio = median_and_range(peft["seconds"]).value / median_and_range(outcome["seconds"]).value
        record("train_tokens_per_s/peft", ratio, "1", n=len(speeds))


def random_base(name: str, shape: Shape, directory: Path) -> Artifact:
    """An NF4 artefact of a Llama of this shape with random weights, written without ever holding it in bf16."""
    name, recipe = f"{name}-random-nf4", [{"step": "random_nf4", **asdict(shape)}]
    found = artifacts.find_artifact(name, directory, recipe, "")
    if found:
        return found

    def save(folder: Path) -> None:
        _random_config(shape).save_pretrained(folder)
        save_file(_random_tensors(shape), folder / "model.safetensors", metadata={"format": "pt"})
        checkpoint.load_tokenizer(ROOT / "data" / "tiny-llama").save_pretrained(folder)  # unsloth wants one

    return artifacts.write_artifact(
        name,
        directory,
        save,
        base={"name": "random", "sha256": ""},
        recipe=recipe,
        format="bitsandbytes",
        licence="none: random numbers",
    )


def _random_config(shape: Shape) -> LlamaConfig:
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp, head_dim=shape.head_dim,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied, max_position_embeddings=4 * TOKENS, architectures=["LlamaForCausalLM"],
        dtype="bfloat16", quantization_config=four_bits.to_dict(),
    )  # fmt: skip


def _random_tensors(shape: Shape) -> dict[str, Tensor]:
    """Embedding, norms, head, and the packed linear weights: drawn once for each kind of layer."""
    import bitsandbytes as bnb

    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": normal(shape.vocab, shape.hidden), "model.norm.weight": ones.clone()}
    if not shape.tied:
        tensors["lm_head.weight"] = normal(shape.vocab, shape.hidden)
    for i in range(shape.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = ones.clone()
    for kind, (rows, columns) in shape.linears().items():
        weight = normal(rows, columns)
        codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        packed = {"weight": codes} | {f"weight.{part}": t for part, t in state.as_dict(packed=True).items()}
        for i in range(shape.layers):
            tensors |= {f"model.layers.{i}.{kind}.{ending}": part.clone() for ending, part in packed.items()}
    return tensors


def run_alone(folder: Path, arm: str, device: str, rank: int) -> dict:
    """`time_steps` in a process of its own under the limit, or `why_not`. Raises RuntimeError when it fails."""
    if arm == "unsloth" and finetune.training_backend(device) != "unsloth":
        return {"why_not": "unsloth is not installed, or there is no GPU"}
    return process.call(
        "avalab.measure.training:answer_time_steps",
        {"folder": str(folder), "arm": arm, "device": device, "rank": rank},
        limit_seconds=LIMIT_SECONDS,
        label=f"arm {arm!r}",
    )


def answer_time_steps(request: dict) -> dict:
    """In the arm's process: what `time_steps` finds, or `why_not`."""
    trackers.limit_gpu_memory(request["device"], LIMIT_BYTES / 2**30)
    base = artifacts.load_artifact(request["folder"], verify=False)
    try:
        return time_steps(base, request["arm"], request["device"], request["rank"])
    except torch.cuda.OutOfMemoryError:
        return {"why_not": f"does not fit into {LIMIT_BYTES / 2**30:g} GiB"}


def time_steps(base: Artifact, arm: str, device: str, rank: int) -> dict:
    """`peak_bytes`, and `seconds` of steps of one row of 1,024 random tokens, all counted in the loss, after a few."""
    model, loss = limit_model(base, arm, device, rank)
    ids = torch.randint(3, model.config.vocab_size, (TOKENS + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    row = packing.pack_rows([Encoded(ids[:-1], ids[1:])], row_tokens=TOKENS, seed=0)
    batch = {name: value.to(device) for name, value in one_row_batch(row).items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    if device.startswith("cuda") and LIMIT_ARMS.get(arm, {}).get("optimizer_bytes", 2) == 2:
        import bitsandbytes as bnb

        optimizer = bnb.optim.PagedAdamW8bit(parameters, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    seconds = []
    for _ in range(WARM_UP + TIMED):
        start = time.perf_counter()
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        trackers.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {"peak_bytes": memory.peak_bytes(device), "seconds": seconds[WARM_UP:]}


def limit_model(base: Artifact, arm: str, device: str, rank: int) -> tuple[PreTrainedModel, Callable[[dict], Tensor]]:
    """The model of an arm of `LIMIT_ARMS` or `PEERS`, and the loss of a batch."""
    if arm == "unsloth":
        recipe = finetune.Recipe(rank=rank, alpha=2 * rank, schedule=loop.Schedule(gradient_checkpointing=True))
        model = finetune.prepare_model(base, recipe, Run("bench_train"))
    else:
        model = checkpoint.load_model(base, device)
        adapters.attach_adapters(model, rank=rank, alpha=2 * rank, seed=0)
    ours = limit_step(arm, rank) if arm in LIMIT_ARMS else None
    if ours:
        adapters.apply_fused_adapters(model, decoded=ours.decoded)
        with torch.no_grad():  # the kernels check themselves in their first call, which recomputation must not watch
            model(torch.tensor([[3, 4]], device=device))
        apply_packed_attention(model)
    if arm == "peft" or (ours and ours.recompute):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if ours:
        student = loop.Student(model, losses.next_token if ours.chunked_loss else dense_loss)
        return model, lambda batch: student(**batch)["loss"]
    # The libraries' own loss shifts the labels itself: every token but the last one's successor is predicted.
    return model, lambda batch: model(batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss


def dense_loss(hidden: Tensor, head: Tensor, batch: dict) -> Tensor:
    """The cross-entropy of `losses.next_token` with the logits of every token at once, in float32."""
    return F.cross_entropy((hidden[0] @ head.T).float(), batch["labels"][0], ignore_index=IGNORED)


# --- losses -----------------------------------------------------------------------------------------------------------


def record_step_times(
    run: Run, student: Artifact, teacher: Artifact, rows: list[dict[str, Tensor]], recipes: dict[str, Recipe]
) -> None:
    """Append `step_ms` of each recipe on the first row, and `step_time/<first>`, its ratio to the first recipe.

    Stored targets are those of all `rows`, read where they are there already. Every recipe trains the same parameters:
    those of the first one.
    """
    first, model = next(iter(recipes)), distill.prepare_student(student, next(iter(recipes.values())), run)
    apply_packed_attention(model)

    def pass_of(name: str, recipe: Recipe) -> Callable[[], None]:
        form = (
            TargetForm(recipe.teacher, recipe.count, recipe.temperature, run.seed) if recipe.teacher != ONLINE else None
        )
        row = targets.attach_targets(run, rows, teacher, form)[0][0] if form else rows[0]
        batch = {key: value.to(run.device) for key, value in one_row_batch([row]).items()}
        loss = distill.objective_of(model, teacher, recipe, rows=rows, device=run.device, identity=name)
        learner = loop.Student(model, loss).train()

        def forward_and_backward() -> None:
            learner(**batch)["loss"].backward()
            learner.zero_grad()

        return forward_and_backward

    arms = {name: pass_of(name, recipe) for name, recipe in recipes.items()}
    found = trackers.interleaved(arms, run.profile.latency_samples, run.device)
    details = {"load_average": load_average(), "tokens": len(rows[0]["input_ids"])}
    for name, samples in found.items():
        record = partial(run.record, name, engine="torch", artifact_sha256=student.sha256, details=details)
        record("step_ms", unit="ms", samples=samples, **vars(median_and_range(samples)))
        ratios = [ours / base for ours, base in zip(samples, found[first], strict=True)]
        record(f"step_time/{first}", unit="1", samples=ratios, **vars(median_and_range(ratios)))


def main() -> None:
    """`make bench-train`."""
    parser = argparse.ArgumentParser(description="Time a training step against peft + bitsandbytes.")
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    run = Run("bench_train", parser.parse_args().profile)
    measure_training(run)
    path = run.save()
    for record in run.records:
        value = record.note if record.value is None else f"{record.value:14.4g} {record.unit:10} {record.engine}"
        fits = {True: ", fits", False: ", does not fit", None: ""}[record.details.get("fits")]
        print(f"{record.subject:32} {record.metric:26} {value}{fits}")
    print(f"load average {load_average()}; records: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
