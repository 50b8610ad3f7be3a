"""Take weights out of a model: a score, a pattern and a share in, one artefact out.

`write(base, score, pattern, run=run, sparsity=0.5)` prunes the base by one row of `SCORES` and one of `PATTERNS`:

| pattern | what goes | what is left |
|---|---|---|
| `unstructured`, `2:4`, `4:8` | weights anywhere; two of every four neighbours; four of every eight | zeros |
| `heads`, `kv_groups`, `mlp_channels` | the same number in every block | a smaller model |
| `hidden` | channels of the residual stream | a smaller model |
| `layers` | whole blocks | a smaller model |

1. Calibrate once: `moments.measure` keeps what every score needs in one file a block; later calls only read it.
2. Carry the plan out block by block (`removal`). A killed run goes on at the first block that is not finished.
3. Save. Zeros are stored as zeros, since every engine here reads dense weights, and once more in a compressed layout
   (`sparse_storage`), which tells what they save on disk. Structures are cut out (`structured`).

Either way the artefact is an ordinary bf16 one that can be quantised next. What it does not do: train afterwards, touch
embeddings and norms (but for the hidden width), prune what is quantised already, score.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from avalab import (
    artifacts,
    corpora,
    models,
    moments,
    quantize,
    removal,
    sparse_storage,
    sparsity_patterns,
    structured,
)
from avalab.artifacts import Artifact
from avalab.code import code_of
from avalab.experiment import Run
from avalab.removal import Known, Plan
from avalab.saliency import SCORES
from avalab.sparsity_patterns import PATTERNS

ALLOCATIONS = ("uniform", "sensitivity")
# A configuration has one size for all blocks: these layers have to be among the targets.
CUT = {"heads": ("o_proj",), "kv_groups": ("o_proj",), "mlp_channels": ("down_proj",), "hidden": removal.READERS}


def write(
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
        raise ValueError(f"{base.name} is in format {base.format!r}; only bf16 artefacts can be pruned")
    plan = planned(
        base.path,
        score,
        pattern,
        sparsity=sparsity,
        target_modules=target_modules,
        allocation=allocation,
        seed=run.seed,
    )
    recipe = [*base.card["recipe"], _step(plan, run)]
    out = quantize._checked_target(out) or run.artifacts_dir / f"{base.name}+{label(plan, base.path)}"
    found = artifacts.find(out.name, out.parent, recipe, base.sha256)
    if found:
        return found
    identity = artifacts.sha256_of_text(f"{base.sha256} {recipe[-1]} {run.device}")[:16]
    progress = run.artifacts_dir / "cache" / f"pruning-{identity}"
    artifact = artifacts.write(
        out.name,
        out.parent,
        lambda folder: _prune_into(folder, base, plan, run=run, progress=progress),
        base={"name": base.name, "sha256": base.sha256},
        recipe=recipe,
        format="bf16",
        licence=base.card["licence"],
    )
    moments.forget(progress)
    return artifact


def planned(
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
    do not divide; targets that match nothing or leave out what the pattern cuts.
    """
    _refuse_unknown(score, pattern, allocation)
    _refuse_sparsity(pattern, sparsity)
    skeleton = quantize.skeleton(folder)
    layers = models.linear_layers(skeleton)
    wanted = (target_modules,) if isinstance(target_modules, str) else target_modules
    targets = models.select_linear(skeleton, wanted) if wanted else list(layers)
    plan = Plan(score, pattern, float(sparsity), targets, allocation, seed)
    if PATTERNS[pattern].structured:
        _refuse_structures(plan, list(layers), structured.sizes(skeleton))
    for name in targets:
        sparsity_patterns.refuse_ragged(layers[name].in_features, PATTERNS[pattern].group, name)
    return plan


def label(plan: Plan, folder: Path) -> str:
    """The score with what else distinguishes the recipe: `wanda-s50`, `sparsegpt-2of4`, `influence-layers-s20`."""
    fixed = PATTERNS[plan.pattern].fixed_sparsity
    parts = [plan.score] + ([plan.pattern.replace(":", "of")] if plan.pattern != "unstructured" else [])
    parts += [f"s{100 * plan.sparsity:.4g}"] if fixed is None else []
    parts += [plan.allocation] if plan.allocation != "uniform" else []
    names = list(models.linear_layers(quantize.skeleton(folder)))
    only = artifacts.sha256_of_text(",".join(plan.targets))[:4]
    return "-".join(parts + ([f"only{len(plan.targets)}.{only}"] if plan.targets != names else []))


def total_seconds(made: Iterable[Artifact]) -> float:
    """Seconds that some pruned artefacts took together: what they share of calibration counts once."""
    measured = [artifact.card["measured"] for artifact in made]
    walks = {m["calibration_seconds"] for m in measured}  # stored with the walk: equal where it was the same one
    return sum(m["compress_seconds"] - m["calibration_seconds"] for m in measured) + sum(walks)


def record(run: Run, subject: str, artifact: Artifact) -> None:
    """Append `sparsity` (share of the base's linear weights that is gone), `parameters`, bytes and seconds.

    `artifact_bytes` are those of the file that engines load, `sparse_bytes` those of the compressed layout, where zeros
    were made. `compress_seconds` count calibration, whoever needed it first. The base itself has sparsity 0.
    """
    measured, sparse = artifact.card["measured"], artifact.path / sparse_storage.FILE
    about = {"artifact_sha256": artifact.sha256, "details": {"recipe": artifact.card["recipe"]}}
    run.record(subject, "sparsity", measured.get("sparsity", 0.0), "1", **about)
    count = models.parameter_count(quantize.skeleton(artifact.path))
    run.record(subject, "parameters", count, "1", **about)
    run.record(subject, "artifact_bytes", artifact.bytes, "byte", **about)
    size, note = (sparse.stat().st_size, "") if sparse.is_file() else (None, "no zeros to compress: the file is dense")
    run.record(subject, "sparse_bytes", size, "byte", note=note, **about)
    quantize.record(run, subject, artifact)


def _prune_into(folder: Path, base: Artifact, plan: Plan, *, run: Run, progress: Path) -> dict:
    start = time.perf_counter()
    model, tokenizer = models.load(base, run.device), models.load_tokenizer(base)
    models.refuse_non_finite(model)
    before = sum(layer.weight.numel() for layer in models.linear_layers(model).values())
    known, calibration_seconds, waited = _calibrated(model, base, plan, run)
    if PATTERNS[plan.pattern].structured:
        structured.save(model, removal.kept_structures(model, plan, known), folder)
        tokenizer.save_pretrained(folder)
        after = sum(layer.weight.numel() for layer in models.linear_layers(quantize.skeleton(folder)).values())
        sizes = {}
    else:
        removal.apply_zeros(model, plan, known, progress)
        models.save_model(model, tokenizer, folder)
        after = sum(int(layer.weight.count_nonzero()) for layer in models.linear_layers(model).values())
        sizes = {"sparse_bytes": _save_compressed(model, plan, folder)}
    own = time.perf_counter() - start - waited
    seconds = {"compress_seconds": own + calibration_seconds, "calibration_seconds": calibration_seconds}
    return seconds | sizes | {"sparsity": 1 - after / before}


def _calibrated(model, base: Artifact, plan: Plan, run: Run) -> tuple[Known, float, float]:
    """Where calibration's findings are, the seconds that finding them took, now or earlier, and those waited now."""
    start, cache = time.perf_counter(), run.artifacts_dir / "cache"
    if not plan.needs:
        return Known(cache, cache), 0.0, 0.0
    windows = corpora.calibration_windows(run, models.load_tokenizer(base))
    folder = moments.folder_of(base, windows, cache)
    known = Known(folder, folder / f"gradients-seed{run.seed}.safetensors")
    files: list[Path] = []
    if "moments" in plan.needs:
        files += moments.measure(model, windows, folder)
    if "gradients" in plan.needs:
        files += [moments.squared_gradients(model, windows, known.gradients, seed=run.seed)]
    return known, moments.seconds(files), time.perf_counter() - start


def _save_compressed(model, plan: Plan, folder: Path) -> int:
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    layout = "2:4" if plan.pattern == "2:4" else "bitmask"
    names = [f"{name}.weight" for name in plan.targets]
    return sparse_storage.write(tensors, names, folder / sparse_storage.FILE, layout=layout)


def _step(plan: Plan, run: Run) -> dict:
    """The recipe's step. The code's own hash: an artefact that an older version made is made again, not trusted."""
    code = code_of(_prune_into)[:12]
    sizes = {"calibration": [run.profile.calibration_samples, run.profile.calibration_tokens]} if plan.needs else {}
    return {"step": "prune", **vars(plan), "code": code} | sizes


def _refuse_unknown(score: str, pattern: str, allocation: str) -> None:
    tables = {"score": (score, SCORES), "pattern": (pattern, PATTERNS), "allocation": (allocation, ALLOCATIONS)}
    for kind, (name, known) in tables.items():
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}")
    if allocation == "sensitivity" and pattern != "unstructured":
        raise ValueError(f"pattern {pattern!r} takes the same share of every layer; allocation has to be 'uniform'")
    if SCORES[score].compute is None and pattern != "layers":
        raise ValueError(f"score {score!r} belongs to whole blocks; use it with pattern 'layers', not {pattern!r}")


def _refuse_sparsity(pattern: str, sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is outside [0, 1): it is the share that goes, 0.5 removes half")
    fixed = PATTERNS[pattern].fixed_sparsity
    if fixed is not None and sparsity != fixed:
        raise ValueError(f"pattern {pattern!r} removes exactly {fixed}; got sparsity {sparsity}")


def _refuse_structures(plan: Plan, names: list[str], of: structured.Sizes) -> None:
    """Raise where nothing or everything of a kind would go, or targets leave out some of what is cut everywhere."""
    endings = CUT.get(plan.pattern, ())
    if left := [n for n in names if n.rpartition(".")[2] in endings and n not in plan.targets]:
        raise ValueError(f"pattern {plan.pattern!r} cuts all blocks alike, but the targets leave out {left[0]}")
    removal.refuse_impossible(plan, of)
