"""Pruning: a score, a pattern and a share in, one artefact out.

`prune_artifact(base, score, pattern, run=run, sparsity=0.5)` prunes by a row of `SCORES` and one of `PATTERNS`:

| pattern | what goes | what is left |
|---|---|---|
| `unstructured`, `2:4`, `4:8` | weights anywhere; two of every four neighbours; four of every eight | zeros |
| `heads`, `kv_groups`, `mlp_channels` | the same number in every block | a smaller model |
| `hidden` | channels of the residual stream | a smaller model |
| `layers` | whole blocks | a smaller model |

1. Calibrate once: `walk.measure_moments` keeps what every score needs in one file a block; later calls only read it.
2. Zeros (`apply_zeros`): every targeted linear layer loses its lowest weights, block by block; a killed run goes on at
   the first block that is not finished. Structures (`kept_structures`) are scored by the squared scores of the weights
   that read them: a head's columns of the output projection, an MLP channel's of the down projection, a hidden
   channel's in all that reads the residual stream (each layer with one vote), all of a block.
3. Save an ordinary bf16 artefact, which can be quantised next. Zeros are stored as zeros, since every engine here reads
   dense weights, and once more in a compressed layout (`stored.write_sparse`), which tells what they save on disk.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from avalab.compress import patterns, quantize, reach, saliency
from avalab.compress.patterns import PATTERNS, kept_indices, lowest, n_of_m, removed_count, step_size
from avalab.compress.saliency import SCORES, Evidence
from avalab.data import corpora
from avalab.lab import artifacts, cache, process
from avalab.lab.artifacts import Artifact
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import Run
from avalab.models import checkpoint, smaller, stored, walk
from avalab.models.smaller import Kept, Sizes
from avalab.models.walk import block_index

ALLOCATIONS = ("uniform", "sensitivity")

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # of the residual stream

# A configuration has one size for all blocks: these layers have to be among the targets.
CUT = {"heads": ("o_proj",), "kv_groups": ("o_proj",), "mlp_channels": ("down_proj",), "hidden": READERS}


@dataclass(frozen=True)
class Plan:
    """What goes: score, pattern, share, linear layers (all of them for structures), and how layers share the loss."""

    score: str
    pattern: str
    sparsity: float
    targets: list[str]
    allocation: str = "uniform"
    seed: int = 0

    @property
    def needs(self) -> set[str]:
        """What calibration has to find out first: "moments", "gradients"."""
        return ({SCORES[self.score].needs} | ({"gradients"} if self.allocation == "sensitivity" else set())) - {""}


@dataclass(frozen=True)
class Known:
    """Where calibration left what it found (`avalab.models.walk`)."""

    moments: Path
    gradients: Path


def prune_artifact(
    base: Artifact,
    score: str,
    pattern: str = "unstructured",
    *,
    run: Run,
    sparsity: float,
    target_modules: str | tuple[str, ...] = (),
    allocation: str = "uniform",
    out: Path | None = None,
) -> Artifact:
    """Prune `base` into the folder `out`, or one below `run.artifacts_dir` named after the recipe.

    `sparsity` is the share that goes: of the targeted weights, or of the structures. `target_modules` are kinds
    ("attention", "mlp"), names, their ends ("q_proj") or globs of linear layers; all without. `allocation`
    "sensitivity" lets layers share the loss unevenly. An artefact of the same recipe and base is reused.
    Raises ValueError for a base that is not in bf16 and for everything that `planned` refuses.
    """
    if base.format != "bf16":
        raise InputError(f"{base.name} is in format {base.format!r}; only bf16 artefacts can be pruned")
    plan = plan_pruning(
        base.path,
        score,
        pattern,
        sparsity=sparsity,
        target_modules=target_modules,
        allocation=allocation,
        seed=run.seed,
    )
    # The code's hash: an artefact that an older version of it made is made again, not trusted.
    step = {"step": "prune", **vars(plan), "code": code_of(_prune_into)[:12]}
    step |= {"calibration": [run.profile.calibration_samples, run.profile.calibration_tokens]} if plan.needs else {}
    identity = artifacts.sha256_of_text(f"{base.sha256} {step} {run.device}")[:16]
    progress = run.artifacts_dir / "cache" / f"pruning-{identity}"
    artifact = artifacts.make_artifact(
        artifacts.checked_target(out) or run.artifacts_dir / f"{base.name}+{pruning_label(plan, base.path)}",
        lambda folder: _prune_into(folder, base, plan, run=run, progress=progress),
        base=base,
        step=step,
        format="bf16",
    )
    shutil.rmtree(progress, ignore_errors=True)
    return artifact


def plan_pruning(
    folder: Path,
    score: str,
    pattern: str,
    *,
    sparsity: float,
    target_modules: str | tuple[str, ...] = (),
    allocation: str = "uniform",
    seed: int = 0,
) -> Plan:
    """What would be pruned of the model in a folder; nothing but its configuration is read.

    Raises ValueError for an unknown score, pattern or allocation, or ones that do not go together; a sparsity outside
    [0, 1), one that a pattern cannot have, or one that removes every structure or none; columns that a pattern's groups
    do not divide; targets that match nothing or leave out what the pattern cuts; a family whose linear layers are less
    than half of its blocks, unless targets are named.
    """
    _refuse_mismatch(score, pattern, allocation, sparsity)
    skeleton = checkpoint.skeleton(folder)
    layers = walk.linear_layers(skeleton)
    wanted = (target_modules,) if isinstance(target_modules, str) else target_modules
    remedy = "--target-modules attention prunes a part alone"
    reach.refuse_unreachable(skeleton, layers, "pruning", partial=bool(wanted), remedy=remedy)
    targets = walk.select_linear(skeleton, wanted) if wanted else list(layers)
    plan = Plan(score, pattern, float(sparsity), targets, allocation, seed)
    if PATTERNS[pattern].structured:
        of = smaller.structure_sizes(skeleton, inside_blocks=pattern != "layers")
        _refuse_structures(plan, list(layers), of)
    for name in targets:
        patterns.refuse_ragged(layers[name].in_features, PATTERNS[pattern].group, name)
    return plan


def _refuse_mismatch(score: str, pattern: str, allocation: str, sparsity: float) -> None:
    tables = {"score": (score, SCORES), "pattern": (pattern, PATTERNS), "allocation": (allocation, ALLOCATIONS)}
    for kind, (name, known) in tables.items():
        if name not in known:
            raise InputError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}")
    if allocation == "sensitivity" and pattern != "unstructured":
        raise InputError(f"pattern {pattern!r} takes the same share of every layer; allocation has to be 'uniform'")
    if SCORES[score].compute is None and pattern != "layers":
        raise InputError(f"score {score!r} belongs to whole blocks; use it with pattern 'layers', not {pattern!r}")
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity {sparsity} is outside [0, 1): it is the share that goes, 0.5 removes half")
    fixed = PATTERNS[pattern].fixed_sparsity
    if fixed is not None and sparsity != fixed:
        raise InputError(f"pattern {pattern!r} removes exactly {fixed}; got sparsity {sparsity}")


def _refuse_structures(plan: Plan, names: list[str], of: Sizes) -> None:
    """Raise where nothing or everything of a kind would go, or targets leave out some of what is cut everywhere."""
    endings = CUT.get(plan.pattern, ())
    if left_out := [n for n in names if n.rpartition(".")[2] in endings and n not in plan.targets]:
        raise InputError(f"pattern {plan.pattern!r} cuts all blocks alike, but the targets leave out {left_out[0]}")
    if plan.pattern == "hidden":
        _hidden_channels_gone(plan, of)
    elif plan.pattern == "layers":
        gone = removed_count(of.blocks, plan.sparsity, of="blocks")
        candidates = {block_index(name) for name in plan.targets}
        if gone > len(candidates):
            raise InputError(f"sparsity {plan.sparsity} removes {gone} blocks; the targets are in {len(candidates)}")
    else:
        columns = of.channels if plan.pattern == "mlp_channels" else of.heads * of.head_dim
        left = len(chosen_structures(plan.pattern, torch.zeros(columns), plan.sparsity, of))
        if plan.pattern != "mlp_channels" and of.hidden % left:
            raise InputError(
                f"sparsity {plan.sparsity} leaves {left} of {of.heads} heads; a Llama configuration needs a number "
                f"that divides the hidden size {of.hidden}"
            )


def pruning_label(plan: Plan, folder: Path) -> str:
    """The score with what else distinguishes the recipe: `wanda-s50`, `sparsegpt-2of4`, `influence-layers-s20`."""
    fixed = PATTERNS[plan.pattern].fixed_sparsity
    parts = [plan.score] + ([plan.pattern.replace(":", "of")] if plan.pattern != "unstructured" else [])
    parts += [f"s{100 * plan.sparsity:.4g}"] if fixed is None else []
    parts += [plan.allocation] if plan.allocation != "uniform" else []
    names = list(walk.linear_layers(checkpoint.skeleton(folder)))
    only = artifacts.sha256_of_text(",".join(plan.targets))[:4]
    return "-".join(parts + ([f"only{len(plan.targets)}.{only}"] if plan.targets != names else []))


def total_pruning_seconds(made: Iterable[Artifact]) -> float:
    """Seconds that some pruned artefacts took together: what they share of calibration counts once."""
    measured = [artifact.card["measured"] for artifact in made]
    walks = {m["calibration_seconds"] for m in measured}  # stored with the walk: equal where it was the same one
    return sum(m["compress_seconds"] - m["calibration_seconds"] for m in measured) + sum(walks)


def record_pruning(run: Run, subject: str, artifact: Artifact) -> None:
    """Append `sparsity` (share of the base's linear weights that is gone), `parameters`, bytes and seconds.

    `artifact_bytes` are those of the file that engines load, `sparse_bytes` those of the compressed layout, where zeros
    were made. `compress_seconds` count calibration, whoever needed it first. The base itself has sparsity 0.
    """
    measured, sparse = artifact.card["measured"], artifact.path / stored.SPARSE_FILE
    about = {"artifact_sha256": artifact.sha256, "details": {"recipe": artifact.card["recipe"]}}
    run.record(subject, "sparsity", measured.get("sparsity", 0.0), "1", **about)
    count = checkpoint.parameter_count(checkpoint.skeleton(artifact.path))
    run.record(subject, "parameters", count, "1", **about)
    run.record(subject, "artifact_bytes", artifact.bytes, "byte", **about)
    size, note = (sparse.stat().st_size, "") if sparse.is_file() else (None, "no zeros to compress: the file is dense")
    run.record(subject, "sparse_bytes", size, "byte", note=note, **about)
    quantize.record_compression(run, subject, artifact)


def _prune_into(folder: Path, base: Artifact, plan: Plan, *, run: Run, progress: Path) -> dict:
    start = time.perf_counter()
    model, tokenizer = checkpoint.load_model(base, run.device), checkpoint.load_tokenizer(base)
    checkpoint.refuse_non_finite(model)
    before = sum(layer.weight.numel() for layer in walk.linear_layers(model).values())
    known, calibration_seconds, waited = _calibrated(model, base, plan, run)
    if PATTERNS[plan.pattern].structured:
        smaller.save_smaller(model, kept_structures(model, plan, known), folder)
        tokenizer.save_pretrained(folder)
        after = sum(layer.weight.numel() for layer in walk.linear_layers(checkpoint.skeleton(folder)).values())
        sizes = {}
    else:
        apply_zeros(model, plan, known, progress)
        checkpoint.save_model(model, tokenizer, folder)
        after = sum(int(layer.weight.count_nonzero()) for layer in walk.linear_layers(model).values())
        tensors = model.state_dict()
        if model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        names, layout = [f"{name}.weight" for name in plan.targets], "2:4" if plan.pattern == "2:4" else "bitmask"
        sizes = {"sparse_bytes": stored.write_sparse(tensors, names, folder / stored.SPARSE_FILE, layout=layout)}
    own = time.perf_counter() - start - waited
    seconds = {"compress_seconds": own + calibration_seconds, "calibration_seconds": calibration_seconds}
    reached = sum(layer.weight.numel() for name, layer in walk.linear_layers(model).items() if name in plan.targets)
    share = round(reached / checkpoint.parameter_count(model), 4)
    return seconds | sizes | {"sparsity": 1 - after / before, "reached_share": share}


def _calibrated(model, base: Artifact, plan: Plan, run: Run) -> tuple[Known, float, float]:
    """Where calibration's findings are, the seconds that finding them took, now or earlier, and those waited now."""
    start, cache = time.perf_counter(), run.artifacts_dir / "cache"
    if not plan.needs:
        return Known(cache, cache), 0.0, 0.0
    windows = corpora.calibration_windows(run, checkpoint.load_tokenizer(base))
    folder = walk.moments_folder(base, windows, cache)
    known = Known(folder, folder / f"gradients-seed{run.seed}.safetensors")
    files: list[Path] = []
    if "moments" in plan.needs:
        files += walk.measure_moments(model, windows, folder)
    if "gradients" in plan.needs:
        files += [walk.measure_squared_gradients(model, windows, known.gradients, seed=run.seed)]
    return known, walk.stored_seconds(files), time.perf_counter() - start


@torch.no_grad()
def apply_zeros(model: PreTrainedModel, plan: Plan, known: Known, progress: Path) -> None:
    """Set the plan's weights to zero, in place. Finished blocks of calibrated scores are kept in `progress`."""
    layers = {name: layer for name, layer in walk.linear_layers(model).items() if name in plan.targets}
    if plan.allocation == "uniform":
        counts = {name: round(plan.sparsity * layer.weight.numel()) for name, layer in layers.items()}
    else:
        counts = patterns.cheapest_counts(
            layers,
            plan.sparsity,
            score=lambda name: scored(name, layers[name], plan, known),
            squared_gradient=lambda name: walk.stored_squared_gradient(known.gradients, name).to(model.device),
        )
    blocks: dict[int, dict[str, int]] = {}
    for name in layers:
        blocks.setdefault(block_index(name), {})[name] = counts[name]
    for block, counted in process.progress(blocks.items(), desc=f"prune {plan.score}"):
        prune = functools.partial(_pruned_block, model, plan, known, counted)
        pruned = cache.cached_tensors(walk.block_file(progress, block), prune) if plan.needs else prune()
        for name, weight in pruned.items():
            layers[name].weight.data = weight.to(layers[name].weight)


def _pruned_block(model: PreTrainedModel, plan: Plan, known: Known, counts: dict[str, int]) -> dict[str, Tensor]:
    """The new weights of some layers of one block; layers with one input share its factorised moment."""
    pattern, score = PATTERNS[plan.pattern], SCORES[plan.score]
    posed, last, found = None, (), {}
    for name, count in counts.items():
        layer = model.get_submodule(name)
        if score.updates:
            readers = walk.stored_readers(known.moments, name)
            if readers != last:
                moment = walk.stored_moment(known.moments, name).to(layer.weight.device)
                posed, last = saliency.surgery_problem(moment, pattern.group), readers
            weight = saliency.remove_weights(layer.weight, posed, pattern, count=count)
        else:
            scores = scored(name, layer, plan, known)
            if pattern.zeros:
                mask = n_of_m(scores, pattern.zeros, pattern.group)
            else:
                mask = lowest(scores, count, compared=score.compared)
            weight = layer.weight.masked_fill(mask, 0)
        found[name] = weight.to(layer.weight.dtype)
    return found


def scored(name: str, layer: nn.Linear, plan: Plan, known: Known) -> Tensor:
    """The plan's score of every weight of a layer."""
    needs, device = SCORES[plan.score].needs, layer.weight.device
    moment = walk.stored_moment(known.moments, name).to(device) if needs == "moments" else None
    squared = walk.stored_squared_gradient(known.gradients, name).to(device) if needs == "gradients" else None
    seen = Evidence(moment, squared, saliency.layer_seed(plan.seed, name))
    return saliency.score_weights(plan.score, layer.weight.detach(), seen)


@torch.no_grad()
def kept_structures(model: PreTrainedModel, plan: Plan, known: Known) -> Kept:
    """What the plan keeps. A score with an update changes, in place, the layers that read what goes."""
    of = smaller.structure_sizes(model, inside_blocks=plan.pattern != "layers")
    layers = walk.linear_layers(model)
    if plan.pattern == "layers":
        return Kept(blocks=_kept_blocks(layers, plan, known, of))
    readers = {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in CUT[plan.pattern]}
    scores = {name: scored(name, layer, plan, known).square().sum(0) for name, layer in readers.items()}
    if plan.pattern == "hidden":  # one choice, by the mean share that channels have in the scores of what reads them
        shares = sum((columns.cpu() / columns.cpu().sum() for columns in scores.values()), torch.zeros(of.hidden))
        kept = dict.fromkeys(readers, kept_indices(shares, _hidden_channels_gone(plan, of)))
    else:
        kept = {n: chosen_structures(plan.pattern, columns, plan.sparsity, of) for n, columns in scores.items()}
    if SCORES[plan.score].updates:
        width = 1 if plan.pattern in ("hidden", "mlp_channels") else of.head_dim
        for name, layer in readers.items():
            moment = walk.stored_moment(known.moments, name).to(layer.weight.device)
            columns = smaller.channels_of(kept[name], width).to(moment.device)
            layer.weight.data = saliency.remove_columns(layer.weight, moment, columns).to(layer.weight)
    if plan.pattern == "hidden":
        return Kept(hidden=next(iter(kept.values())))
    if plan.pattern == "mlp_channels":
        return Kept(channels=list(kept.values()))
    if plan.pattern == "heads" and of.heads > of.kv_heads:
        return Kept(heads=list(kept.values()))
    shared = of.heads // of.kv_heads
    return Kept(heads=list(kept.values()), kv_heads=[heads[::shared] // shared for heads in kept.values()])


def chosen_structures(pattern: str, columns: Tensor, sparsity: float, of: Sizes) -> Tensor:
    """Indices of the channels or query heads that stay, from the scores of the columns that read them.

    "heads": equally many of each KV group; where every head has its own keys, and for "kv_groups", whole groups.
    """
    if pattern == "mlp_channels":
        gone = removed_count(of.channels, sparsity, of="MLP channels", granularity=step_size(of.channels))
        return kept_indices(columns, gone).cpu()
    groups = columns.view(of.kv_heads, of.heads // of.kv_heads, of.head_dim).sum(2).cpu()
    shared = groups.shape[1]
    if pattern == "heads" and shared > 1:
        gone = removed_count(shared, sparsity, of="query heads of each KV group")
        return torch.cat([kept_indices(scores, gone) + group * shared for group, scores in enumerate(groups)])
    gone = removed_count(of.kv_heads, sparsity, of="KV groups of each block")
    return smaller.query_heads(kept_indices(groups.sum(1), gone), of)


def _kept_blocks(layers: dict[str, nn.Linear], plan: Plan, known: Known, of: Sizes) -> list[int]:
    """Blocks in order, without the least important of those that hold a target."""
    scores = dict.fromkeys(sorted({block_index(name) for name in plan.targets}), 0.0)
    if plan.score == "influence":
        scores = {block: walk.stored_influence(known.moments, block) for block in scores}
    else:
        for name, layer in layers.items():
            if block_index(name) in scores:
                scores[block_index(name)] += float(scored(name, layer, plan, known).square().sum())
    gone = removed_count(of.blocks, plan.sparsity, of="blocks")
    going = sorted(scores, key=lambda block: (scores[block], block))[:gone]
    return [block for block in range(of.blocks) if block not in going]


def _hidden_channels_gone(plan: Plan, of: Sizes) -> int:
    granularity = step_size(of.hidden, of_heads=of.heads)
    return removed_count(of.hidden, plan.sparsity, of="hidden channels", granularity=granularity)
