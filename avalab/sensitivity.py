"""Which layer can bear fewer bits: the KL divergence after rounding one linear layer, all others kept.

1. Run the base once on a few windows and keep what enters every transformer block.
2. For each linear layer: round its weight to the format, continue from the block that holds it (nothing before it has
   changed), score against the base, put the weight back.

Rounding is to nearest, so the map shows where error hurts, not what a better method would do about it. Starting at the
layer's own block halves the work. What it does not do: add effects up (two layers rounded together are not the sum).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from avalab import models, numerics, quality, statistics
from avalab.experiment import Run
from avalab.numerics import NumberFormat
from avalab.quality import Reference


def layer_by_layer(
    model: PreTrainedModel, against: Reference, format: NumberFormat
) -> Iterator[tuple[str, Float[Tensor, "window token"]]]:
    """Yield every linear layer's name and the KL divergence per token when only that layer is in `format`.

    The model is left as it was. Layers whose columns the format's groups do not divide raise ValueError.
    """
    blocks = model.base_model.layers
    entering = _entering(model, blocks, against.windows)
    for name, layer in tqdm(models.linear_layers(model).items(), desc="sensitivity", leave=False):
        kept = layer.weight.data
        layer.weight.data = numerics.round_to_nearest(kept.float(), format).to(kept.dtype)
        try:
            yield name, _kl_from(model, block_index(name), entering, against)
        finally:
            layer.weight.data = kept


def record(run: Run, model: PreTrainedModel, against: Reference, format: NumberFormat, **more) -> None:
    """Append a `kl_divergence` record for each layer, subject `layer 07/mlp.down_proj`."""
    for name, kl in layer_by_layer(model, against, format):
        estimate = statistics.mean(kl, resamples=run.profile.resamples, seed=run.seed)
        details = {"format": format.name, "windows_sha256": quality.windows_sha256(against.windows)}
        run.record(subject(name), "kl_divergence", unit="nats/token", **vars(estimate), details=details, **more)


def block_index(name: str) -> int:
    """The number of the transformer block in a module name: `model.layers.7.mlp.down_proj` -> 7."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1])


def subject(name: str) -> str:
    """`model.layers.7.mlp.down_proj` -> `layer 07/mlp.down_proj`."""
    parts = name.split(".")
    at = parts.index("layers")
    return f"layer {int(parts[at + 1]):02d}/{'.'.join(parts[at + 2 :])}"


@torch.inference_mode()
def _entering(model: PreTrainedModel, blocks: nn.ModuleList, windows: Tensor) -> list[tuple[tuple, dict]]:
    """Positional and keyword arguments of each block in one pass over the windows."""
    seen: list[tuple[tuple, dict]] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        for block in blocks
    ]
    try:
        quality.hidden_states(model, windows)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.inference_mode()
def _kl_from(
    model: PreTrainedModel, start: int, entering: list[tuple[tuple, dict]], against: Reference
) -> Float[Tensor, "window token"]:
    (hidden, *_), _ = entering[start]
    for block, (args, kwargs) in zip(model.base_model.layers[start:], entering[start:], strict=True):
        output = block(hidden, *args[1:], **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
    return quality.score_hidden(model, model.base_model.norm(hidden), against).kl
