"""The walk over a causal LM's blocks: what every linear layer reads, and what calibration text tells of it.

While weights change (`sites`):
1. Run the model up to its first block on all calibration windows and keep what enters it.
2. In each block, run the weights as they were once, and keep every linear layer's input. Layers that read the same
   tensor (q, k and v; gate and up) form one `Site`.
3. Yield the sites in the order they are called, each with its second moment. Whoever walks may change the weights of a
   site before asking for the next one, which then sees what the changed weights give it; so does the next block.
4. Beside the moment of the changed model's inputs stands their cross moment with the unchanged model's: what error
   compensation needs to aim at the original outputs (GPTAQ, Li et al. 2025, arXiv 2504.02692).

While they do not (`measure_moments`), one walk serves every score, pattern and sparsity. One file a block holds

- the second moment X^T X / tokens of every input that its linear layers read, named by those layers;
- the block's influence 1 - E[cos(input, output)] (ShortGPT, Men et al. 2024, arXiv 2403.03853);
- the seconds that all this took, so that a score can be charged for a walk that another one needed first.

A walk that was killed goes on at the first block without a file. What a pruned block does to the next is left out.

Gradients come from one backward pass (`gradient_pass`) of the loss of labels that the model itself draws. Memory is one
block's inputs and moments, for gradients the model's activations. Blocks are those of `blocks`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from avalab.lab import artifacts, cache, process
from avalab.lab.artifacts import Artifact
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.models import checkpoint, predict

# --- layers by name --------------------------------------------------------------------------------------------------

BLOCKS = ("layers", "h")  # how families call their list of blocks; GPT-2 and its kin the latter

IN_BLOCK = re.compile(rf"(?:^|\.)(?:{'|'.join(BLOCKS)})\.(\d+)\.")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers inside the transformer blocks by qualified name, in order; the LM head is not one of them."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and IN_BLOCK.search(name)}


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks in order. Raises InputError naming a family that keeps them where nothing here looks."""
    found = [m for name, m in model.base_model.named_children() if name in BLOCKS and isinstance(m, nn.ModuleList)]
    if len(found) != 1:
        known = " or ".join(BLOCKS)
        raise InputError(f"{model.config.model_type} models have no list of blocks called {known}; they are not walked")
    return found[0]


def select_linear(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the linear layers that any pattern fits: a kind (`attention`, `mlp`), a glob, a name or its end.

    Raises ValueError for a pattern that matches nothing, saying where such weights are in a model that keeps them
    elsewhere: in transposed layers (GPT-2), or stacked experts.
    """
    names = list(linear_layers(model))
    if not names:
        matrices = [m for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.dim() > 1]
        kinds = sorted({type(m).__name__ for m in matrices if not isinstance(m, nn.Embedding | nn.Linear)}) or ["none"]
        raise InputError(
            f"{_family(model)} models have no linear layers of torch in their blocks (but {', '.join(kinds)}): "
            "they can be measured and talked to, not trained or pruned by layer"
        )

    def fits(name: str, pattern: str) -> bool:
        return checkpoint.component(name) == pattern or fnmatchcase(name, pattern) or name.endswith(f".{pattern}")

    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            stacked = sorted({name for name, p in model.named_parameters() if p.dim() == 3})
            why = f" of this {_family(model)} model, whose experts are stacked ({stacked[0]})" if stacked else ""
            known = [kind for kind in ("attention", "mlp") if any(checkpoint.component(name) == kind for name in names)]
            raise InputError(
                f"{pattern!r} matches no linear layer{why}; use {', '.join(known)}, or names like {names[0]}"
            )
    return [name for name in names if any(fits(name, pattern) for pattern in patterns)]


def _family(model: nn.Module) -> str:
    return model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__


def replace_linear(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the linear layer `name` was. Raises ValueError when there is no such layer."""
    known = linear_layers(model)
    if name not in known:
        raise InputError(f"no linear layer {name!r}; this model has {', '.join(list(known)[:7])}, ...")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# --- the walk over a causal LM's blocks -----------------------------------------------------------------------------


BATCH_WINDOWS = 8

GRADIENT_WINDOWS = 8

INFLUENCE, SECONDS = "influence", "seconds"

Call = tuple[tuple, dict]  # positional and keyword arguments of a block


@dataclass(frozen=True)
class Site:
    """Linear layers that read one input, and the second moments of that input over all tokens.

    `moment` is X^T X / tokens with the model as it is now; `cross` is R^T X / tokens, where R is what the same layers
    read before anything was changed. Without changes the two are equal.
    """

    block: int
    layers: dict[str, nn.Linear]
    moment: Float[Tensor, "cols cols"]
    cross: Float[Tensor, "cols cols"]
    tokens: int


class _Reached(Exception):
    """Control flow only: the site's input was seen, the rest of the block need not run."""


def block_index(name: str) -> int:
    """The number of the transformer block in a module name: `model.layers.7.mlp.down_proj` -> 7."""
    found = IN_BLOCK.search(f"{name}.")
    if found is None:
        raise InputError(f"{name} lies in no block")
    return int(found[1])


@torch.no_grad()
def calibration_sites(
    model: PreTrainedModel, windows: Int[Tensor, "window time"], *, dtype: torch.dtype = torch.float32
) -> Iterator[Site]:
    """Yield every site of the model in order of execution; see the module for what may be changed meanwhile.

    Raises ValueError for calibration windows that are empty.
    """
    _refuse_empty(windows)
    walked = blocks(model)
    changed = first_calls(model, walked[0], windows)
    original = changed
    prefix = next(name for name, module in model.named_modules() if module is walked)
    keywords = own_keywords(model, windows)
    for index, block in enumerate(walked):
        if keywords:  # the block's own rotary embedding and mask
            original, changed = (with_keywords(calls, keywords[index]) for calls in (original, changed))
        names = {module: f"{prefix}.{index}.{name}" for name, module in block.named_modules()}
        inputs, following = _original_inputs(block, original)
        for layers, rows in inputs:
            moment, cross = _moments(block, layers[0], changed, rows, dtype)
            tokens = sum(part.shape[0] for part in rows)
            yield Site(index, {names[layer]: layer for layer in layers}, moment / tokens, cross / tokens, tokens)
        original, changed = following, [next_call(block, call) for call in changed]


def _refuse_empty(windows: Tensor) -> None:
    if windows.numel() == 0:
        raise InputError(f"calibration needs at least one token, got windows of shape {tuple(windows.shape)}")


def gradient_pass(
    model: PreTrainedModel,
    windows: Int[Tensor, "window time"],
    names: list[str],
    measure: Callable[[nn.Module, Tensor, Tensor], None],
    *,
    seed: int = 0,
) -> None:
    """Call `measure(layer, inputs, gradients)` for each named layer: of -log p(y) of all tokens to its outputs.

    The labels y are drawn from the model's own predictions, so mean squared gradients are Fisher information, not the
    text's surprise. One batch: inputs and gradients cover every token, `window time channel`. Layers that read one
    input are handed the same tensor; head and embedding may be named too. Weights get no gradients.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    handles = [model.get_input_embeddings().register_forward_hook(lambda _m, _a, output: output.requires_grad_())]

    def listen(layer: nn.Module, args: tuple, output: Tensor) -> None:
        output.register_hook(lambda gradients: measure(layer, args[0], gradients))

    handles += [model.get_submodule(name).register_forward_hook(listen) for name in names]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with _hooked(handles), torch.enable_grad():
            logits = model(input_ids=windows.to(model.device), use_cache=False).logits.flatten(0, -2)
            _sampled_loss(logits, seed).backward()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _sampled_loss(logits: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(logits.device).manual_seed(seed)
    total = torch.zeros((), device=logits.device)
    for rows in logits.split(256):
        labels = torch.multinomial(rows.detach().float().softmax(-1), 1, generator=generator).squeeze(-1)
        total = total + torch.nn.functional.cross_entropy(rows.float(), labels, reduction="sum")
    return total


def first_calls(model: PreTrainedModel, first: nn.Module, windows: Tensor) -> list[Call]:
    """Arguments of the first block, batch by batch."""
    calls: list[Call] = []

    def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))
        raise _Reached

    with _hooked([first.register_forward_pre_hook(stop, with_kwargs=True)]):
        for batch in windows.split(BATCH_WINDOWS):
            try:
                model.base_model(input_ids=batch.to(model.device), use_cache=False)
            except _Reached:
                continue
    return calls


def own_keywords(model: PreTrainedModel, windows: Tensor) -> list[list[dict]]:
    """Keyword arguments by block and batch of a model whose blocks differ in them (Gemma 3), else nothing."""
    kinds = getattr(model.config, "layer_types", None) or []
    if len(set(kinds)) < 2:
        return []
    found: dict[str, list[dict]] = {}

    def note(kind: str) -> Callable[..., None]:
        return lambda _module, _args, kwargs: found.setdefault(kind, []).append(kwargs)

    firsts = [blocks(model)[kinds.index(kind)] for kind in dict.fromkeys(kinds)]
    hooks = zip(firsts, map(note, dict.fromkeys(kinds)), strict=True)
    with _hooked([block.register_forward_pre_hook(hook, with_kwargs=True) for block, hook in hooks]):
        for batch in windows.split(BATCH_WINDOWS):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    return [found[kind] for kind in kinds]


def with_keywords(calls: list[Call], keywords: list[dict]) -> list[Call]:
    """The calls with keyword arguments of the block's own."""
    return [(args, own) for (args, _shared), own in zip(calls, keywords, strict=True)]


def _original_inputs(block: nn.Module, calls: list[Call]) -> tuple[list[tuple[list, list]], list[Call]]:
    """What each group of linear layers reads from the unchanged block, and the next block's arguments.

    Layers belong together when they are handed the very same tensor.
    """
    groups: list[tuple[list[nn.Linear], list[Tensor]]] = []
    seen: list[tuple[Tensor, int]] = []  # tensors read in the present call (held: identities are reused), and by whom

    def note(layer: nn.Linear, args: tuple) -> None:
        (given,) = args
        at = next((index for tensor, index in seen if tensor is given), None)
        if at is not None:
            if layer not in groups[at][0]:
                groups[at][0].append(layer)
            return
        at = next((index for index, (layers, _) in enumerate(groups) if layer in layers), len(groups))
        if at == len(groups):
            groups.append(([layer], []))
        groups[at][1].append(given.flatten(0, -2))
        seen.append((given, at))

    following = []
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    with _hooked([layer.register_forward_pre_hook(note) for layer in linears]):
        for call in calls:
            seen.clear()
            following.append(next_call(block, call))
    return groups, following


def _moments(
    block: nn.Module, layer: nn.Linear, calls: list[Call], originals: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of X^T X and R^T X, running the block only as far as this layer.

    R^T X is X^T X plus (R - X)^T X, a small correction: its products may run in the model's own, shorter, type.
    """
    columns = originals[0].shape[1]
    moment, shift = (torch.zeros(columns, columns, dtype=dtype, device=originals[0].device) for _ in range(2))
    held: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple) -> None:
        held.append(args[0])
        raise _Reached

    with _hooked([layer.register_forward_pre_hook(stop)]):
        for (args, kwargs), original in zip(calls, originals, strict=True):
            try:
                block(*args, **kwargs)
            except _Reached:
                rows = held.pop().flatten(0, -2)
            shift += (original - rows).T @ rows
            moment += second_moment(rows, dtype)
    return moment, moment + shift


def second_moment(rows: Float[Tensor, "token cols"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "cols cols"]:
    """X^T X in `dtype`. Products of bfloat16 values are exact in float32, so the fast units may form them."""
    before = torch.get_float32_matmul_precision()
    exact = rows.dtype == torch.bfloat16
    rows = rows.to(dtype)
    try:
        torch.set_float32_matmul_precision("medium" if exact else before)
        return rows.T.contiguous() @ rows
    finally:
        torch.set_float32_matmul_precision(before)


def next_call(block: nn.Module, call: Call) -> Call:
    """Run a block; the arguments of the one after it."""
    args, kwargs = call
    output = block(*args, **kwargs)
    return ((output[0] if isinstance(output, tuple) else output), *args[1:]), kwargs


@contextmanager
def _hooked(handles: list) -> Iterator[None]:
    """Remove hooks when the block of code ends, however it ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def moments_folder(base: Artifact, windows: Int[Tensor, "window time"], cache: Path) -> Path:
    """Where the moments of these windows in this model are kept: a name from what determines them."""
    code = code_of(measure_moments, measure_squared_gradients)
    parts = [("base", base.sha256), ("windows", predict.windows_sha256(windows)), ("code", code)]
    return cache / f"moments-{artifacts.combined_sha256(parts)[:16]}"


@torch.no_grad()
def measure_moments(model: PreTrainedModel, windows: Int[Tensor, "window time"], folder: Path) -> list[Path]:
    """Write a file for each block that has none yet, and return all of them; see the module.

    Raises ValueError for no calibration text, and for activations that are not finite, naming the layer.
    """
    _refuse_empty(windows)
    walked = blocks(model)
    files = [block_file(folder, index) for index in range(len(walked))]
    finished = [_is_readable(file) for file in files]
    if all(finished):
        return files
    start = time.perf_counter()
    calls = first_calls(model, walked[0], windows)
    keywords = own_keywords(model, windows)
    for index, block in enumerate(process.progress(walked, desc="calibration")):
        if keywords:  # the block's own rotary embedding and mask
            calls = with_keywords(calls, keywords[index])
        if finished[index]:
            calls = [next_call(block, call) for call in calls]
            continue
        found, calls = _of_block(block, calls, index)
        cache.save_tensors(found | {SECONDS: torch.tensor(time.perf_counter() - start)}, files[index])
        start = time.perf_counter()
    return files


def block_file(folder: Path, block: int) -> Path:
    """The file of a block."""
    return folder / f"block-{block:03d}.safetensors"


def stored_moment(folder: Path, layer: str) -> Float[Tensor, "cols cols"]:
    """The second moment of what a linear layer, by its full name, reads."""
    return _stored(block_file(folder, block_index(layer)), "+".join(stored_readers(folder, layer)))


def stored_readers(folder: Path, layer: str) -> tuple[str, ...]:
    """Names below the block of all layers that read the same input as this one."""
    with safe_open(block_file(folder, block_index(layer)), "pt") as file:
        found = [tuple(key.split("+")) for key in file.keys()]  # noqa: SIM118  (a file is no dict)
    return next(names for names in found if any(layer.endswith(f".{name}") for name in names))


def stored_influence(folder: Path, block: int) -> float:
    """How much a block turns what enters it: 0 where it changes nothing but the length."""
    return float(_stored(block_file(folder, block), INFLUENCE))


def stored_seconds(files: list[Path]) -> float:
    """What measuring took, summed over the files that it left."""
    return sum(float(_stored(path, SECONDS)) for path in files)


def measure_squared_gradients(
    model: PreTrainedModel, windows: Int[Tensor, "window time"], path: Path, *, seed: int = 0
) -> Path:
    """Write E[(dL/dw)^2] a token of all linear layers' weights, in bfloat16, unless the file is there; its path.

    L is the loss of labels drawn from the model's own predictions; each token's gradient counts by itself.
    """
    if _is_readable(path):
        return path
    start = time.perf_counter()
    names = {layer: name for name, layer in linear_layers(model).items()}
    found: dict[str, Tensor] = {}

    def keep_squares(layer: nn.Linear, inputs: Tensor, gradients: Tensor) -> None:
        rows, columns = gradients.flatten(0, -2).float().square(), inputs.detach().flatten(0, -2).float().square()
        found[names[layer]] = (rows.T @ columns / len(rows)).bfloat16().cpu()

    gradient_pass(model, windows[:GRADIENT_WINDOWS], list(names.values()), keep_squares, seed=seed)
    _refuse_non_finite(found, "gradients of")
    cache.save_tensors(found | {SECONDS: torch.tensor(time.perf_counter() - start)}, path)
    return path


def stored_squared_gradient(path: Path, name: str) -> Float[Tensor, "rows cols"]:
    """The squared gradients of one layer."""
    return _stored(path, name)


def _stored(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _of_block(block: nn.Module, calls: list, index: int) -> tuple[dict[str, Tensor], list]:
    """Everything a block's file holds, and the arguments of the next block."""
    names = {module: name for name, module in block.named_modules()}
    found: dict[str, Tensor] = {}
    inputs, following = _original_inputs(block, calls)
    for layers, rows in inputs:
        moment = sum(second_moment(part) for part in rows) / sum(len(part) for part in rows)
        found["+".join(names[layer] for layer in layers)] = moment
        _refuse_non_finite({f"layers.{index}.{names[layer]}": moment for layer in layers}, "inputs of")
    pairs = [(before[0].float(), after[0].float()) for (before, _), (after, _) in zip(calls, following, strict=True)]
    cosines = torch.cat([torch.nn.functional.cosine_similarity(*pair, dim=-1) for pair in pairs])
    return found | {INFLUENCE: 1 - cosines.mean()}, following


def _refuse_non_finite(tensors: dict[str, Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(
                f"calibration gave NaN or infinite values: {what} {name}; the text or the model is damaged"
            )


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return bool(file.keys())
    except (OSError, SafetensorError):  # absent or damaged: measured again
        return False
