"""What calibration text does to a model, measured once and kept: one file a transformer block.

One walk over the unchanged model serves every score, pattern and sparsity. For each block its file holds

- the second moment X^T X / tokens of every input that its linear layers read, named by those layers;
- the block's influence 1 - E[cos(input, output)] (ShortGPT, Men et al. 2024, arXiv 2403.03853);
- the seconds that all this took, so that a score can be charged for a walk that another one needed first.

A walk that was killed goes on at the first block without a file; those before are only passed through. Memory is one
block's inputs and moments. Squared gradients of all weights come from one backward pass; they need a model's
activations.

What it does not do: see a changed model. Inputs are those of the unpruned one: what a pruned block does to the next is
left out, which is what lets one walk serve all.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from avalab import artifacts, calibration, models, quality
from avalab.artifacts import Artifact
from avalab.code import code_of
from avalab.sensitivity import block_index

GRADIENT_WINDOWS = 8
INFLUENCE, SECONDS = "influence", "seconds"


def folder_of(base: Artifact, windows: Int[Tensor, "window time"], cache: Path) -> Path:
    """Where the moments of these windows in this model are kept: a name from what determines them."""
    code = code_of(measure, squared_gradients)
    parts = [("base", base.sha256), ("windows", quality.windows_sha256(windows)), ("code", code)]
    return cache / f"moments-{artifacts.combined_sha256(parts)[:16]}"


@torch.no_grad()
def measure(model: PreTrainedModel, windows: Int[Tensor, "window time"], folder: Path) -> list[Path]:
    """Write a file for each block that has none yet, and return all of them; see the module.

    Raises ValueError for no calibration text, and for activations that are not finite, naming the layer.
    """
    if windows.numel() == 0:
        raise ValueError(f"calibration needs at least one token, got windows of shape {tuple(windows.shape)}")
    blocks = model.base_model.layers
    files = [path_of(folder, index) for index in range(len(blocks))]
    finished = [_is_readable(file) for file in files]
    if all(finished):
        return files
    start = time.perf_counter()
    calls = calibration._entering(model, blocks[0], windows)
    keywords = calibration._keywords(model, windows)
    for index, block in enumerate(tqdm(blocks, desc="calibration", leave=False)):
        if keywords:  # the block's own rotary embedding and mask
            calls = calibration._with_keywords(calls, keywords[index])
        if finished[index]:
            calls = [calibration._next_call(block, call) for call in calls]
            continue
        found, calls = _of_block(block, calls, index)
        quality.save_atomically(found | {SECONDS: torch.tensor(time.perf_counter() - start)}, files[index])
        start = time.perf_counter()
    return files


def path_of(folder: Path, block: int) -> Path:
    """The file of a block."""
    return folder / f"block-{block:03d}.safetensors"


def moment(folder: Path, layer: str) -> Float[Tensor, "cols cols"]:
    """The second moment of what a linear layer, by its full name, reads."""
    with safe_open(path_of(folder, block_index(layer)), "pt") as file:
        return file.get_tensor("+".join(_readers(file, layer)))


def readers(folder: Path, layer: str) -> tuple[str, ...]:
    """Names below the block of all layers that read the same input as this one."""
    with safe_open(path_of(folder, block_index(layer)), "pt") as file:
        return _readers(file, layer)


def influence(folder: Path, block: int) -> float:
    """How much a block turns what enters it: 0 where it changes nothing but the length."""
    with safe_open(path_of(folder, block), "pt") as file:
        return float(file.get_tensor(INFLUENCE))


def seconds(files: list[Path]) -> float:
    """What measuring took, summed over the files that it left."""
    total = 0.0
    for path in files:
        with safe_open(path, "pt") as file:
            total += float(file.get_tensor(SECONDS))
    return total


def squared_gradients(
    model: PreTrainedModel, windows: Int[Tensor, "window time"], path: Path, *, seed: int = 0
) -> Path:
    """Write E[(dL/dw)^2] a token of all linear layers' weights, in bfloat16, unless the file is there; its path.

    L is the loss of labels drawn from the model's own predictions; each token's gradient counts by itself.
    """
    if _is_readable(path):
        return path
    start = time.perf_counter()
    names = {layer: name for name, layer in models.linear_layers(model).items()}
    found: dict[str, Tensor] = {}

    def measure_layer(layer: nn.Linear, inputs: Tensor, gradients: Tensor) -> None:
        rows, columns = gradients.flatten(0, -2).float().square(), inputs.detach().flatten(0, -2).float().square()
        found[names[layer]] = (rows.T @ columns / len(rows)).bfloat16().cpu()

    calibration.gradient_pass(model, windows[:GRADIENT_WINDOWS], list(names.values()), measure_layer, seed=seed)
    _refuse_non_finite(found, "gradients of")
    quality.save_atomically(found | {SECONDS: torch.tensor(time.perf_counter() - start)}, path)
    return path


def squared_gradient(path: Path, name: str) -> Float[Tensor, "rows cols"]:
    """The squared gradients of one layer."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def forget(folder: Path) -> None:
    """Delete what was measured; nothing happens where there is nothing."""
    shutil.rmtree(folder, ignore_errors=True)


def _readers(file, layer: str) -> tuple[str, ...]:
    found = [tuple(key.split("+")) for key in file.keys()]  # noqa: SIM118  (a file is no dict)
    return next(names for names in found if any(layer.endswith(f".{name}") for name in names))


def _of_block(block: nn.Module, calls: list, index: int) -> tuple[dict[str, Tensor], list]:
    """Everything a block's file holds, and the arguments of the next block."""
    names = {module: name for name, module in block.named_modules()}
    found: dict[str, Tensor] = {}
    inputs, following = calibration._original_inputs(block, calls)
    for layers, rows in inputs:
        moment = sum(calibration.second_moment(part) for part in rows) / sum(len(part) for part in rows)
        found["+".join(names[layer] for layer in layers)] = moment
        _refuse_non_finite({f"layers.{index}.{names[layer]}": moment for layer in layers}, "inputs of")
    pairs = [(before[0].float(), after[0].float()) for (before, _), (after, _) in zip(calls, following, strict=True)]
    cosines = torch.cat([torch.nn.functional.cosine_similarity(*pair, dim=-1) for pair in pairs])
    return found | {INFLUENCE: 1 - cosines.mean()}, following


def _refuse_non_finite(tensors: dict[str, Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"calibration gave NaN or infinite values: {what} {name}; the text or the model is damaged"
            )


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return bool(file.keys())
    except (OSError, SafetensorError):  # absent or damaged: measured again
        return False
