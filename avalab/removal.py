"""A pruning plan carried out on a model, block by block: zeros in place, or a list of what a smaller model keeps.

- `apply_zeros`: every targeted linear layer loses its lowest weights; SparseGPT also changes those that stay. Blocks
  that a killed run finished are read from `progress`.
- `kept_structures`: which heads, channels or blocks stay. A structure's score is the sum of the squared scores of the
  weights that read it: a head's columns of the output projection, an MLP channel's column of the down projection, a
  hidden channel's columns in all that reads the residual stream (each layer with one vote), all linear layers of a
  block. With SparseGPT the readers are solved anew for the columns that stay.

What it does not do: check a plan (`avalab.prune` does), calibrate, or write a model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from avalab import layer_sparsity, models, moments, saliency, structured, surgeon
from avalab.cache import cached_tensors
from avalab.saliency import SCORES, Evidence
from avalab.sensitivity import block_index
from avalab.sparsity_patterns import PATTERNS, keep, lowest, n_of_m, removed, step
from avalab.structured import Kept, Sizes

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # of the residual stream


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
    """Where calibration left what it found (`avalab.moments`)."""

    moments: Path
    gradients: Path


@torch.no_grad()
def apply_zeros(model: PreTrainedModel, plan: Plan, known: Known, progress: Path) -> None:
    """Set the plan's weights to zero, in place. Finished blocks of calibrated scores are kept in `progress`."""
    layers = {name: layer for name, layer in models.linear_layers(model).items() if name in plan.targets}
    counts = _counts(layers, plan, known)
    for block, names in tqdm(_by_block(layers).items(), desc=f"prune {plan.score}", leave=False):
        path = moments.path_of(progress, block)
        prune = functools.partial(_pruned_block, model, plan, known, {name: counts[name] for name in names})
        pruned = cached_tensors(path, prune) if plan.needs else prune()
        for name, weight in pruned.items():
            layers[name].weight.data = weight.to(layers[name].weight)


@torch.no_grad()
def kept_structures(model: PreTrainedModel, plan: Plan, known: Known) -> Kept:
    """What the plan keeps. A score with an update changes, in place, the layers that read what goes."""
    of = structured.sizes(model)
    if plan.pattern == "layers":
        return Kept(blocks=_kept_blocks(model, plan, known, of))
    if plan.pattern == "hidden":
        return _kept_hidden(model, plan, known, of)
    kept: list[Tensor] = []
    reader = "mlp.down_proj" if plan.pattern == "mlp_channels" else "self_attn.o_proj"
    for name, layer in models.linear_layers(model).items():
        if not name.endswith(reader):
            continue
        columns = scored(name, layer, plan, known).square().sum(0)
        chosen = chosen_structures(plan.pattern, columns, plan.sparsity, of)
        width = 1 if plan.pattern == "mlp_channels" else of.head_dim
        _apply_refit(name, layer, structured.channels_of(chosen, width), plan, known)
        kept.append(chosen)
    if plan.pattern == "mlp_channels":
        return Kept(channels=kept)
    if plan.pattern == "heads" and of.heads > of.kv_heads:
        return Kept(heads=kept)
    shared = of.heads // of.kv_heads
    return Kept(heads=kept, kv_heads=[heads[::shared] // shared for heads in kept])


def chosen_structures(pattern: str, columns: Tensor, sparsity: float, of: Sizes) -> Tensor:
    """Indices of the channels or query heads that stay, from the scores of the columns that read them.

    "heads": equally many of each KV group; where every head has its own keys, and for "kv_groups", whole groups.
    """
    if pattern == "mlp_channels":
        gone = removed(of.channels, sparsity, of="MLP channels", granularity=step(of.channels))
        return keep(columns, gone).cpu()
    groups = columns.view(of.kv_heads, of.heads // of.kv_heads, of.head_dim).sum(2).cpu()
    shared = groups.shape[1]
    if pattern == "heads" and shared > 1:
        gone = removed(shared, sparsity, of="query heads of each KV group")
        return torch.cat([keep(scores, gone) + group * shared for group, scores in enumerate(groups)])
    gone = removed(of.kv_heads, sparsity, of="KV groups of each block")
    return structured.query_heads(keep(groups.sum(1), gone), of)


def refuse_impossible(plan: Plan, of: Sizes) -> None:
    """Raise ValueError where a structured plan would remove every structure, or none though some were asked for."""
    if plan.pattern == "hidden":
        removed(of.hidden, plan.sparsity, of="hidden channels", granularity=step(of.hidden, of_heads=of.heads))
    elif plan.pattern == "layers":
        gone = removed(of.blocks, plan.sparsity, of="blocks")
        candidates = {block_index(name) for name in plan.targets}
        if gone > len(candidates):
            raise ValueError(f"sparsity {plan.sparsity} removes {gone} blocks; the targets are in {len(candidates)}")
    else:
        columns = of.channels if plan.pattern == "mlp_channels" else of.heads * of.head_dim
        left = len(chosen_structures(plan.pattern, torch.zeros(columns), plan.sparsity, of))
        if plan.pattern != "mlp_channels" and of.hidden % left:
            raise ValueError(
                f"sparsity {plan.sparsity} leaves {left} of {of.heads} heads; a Llama configuration needs a number "
                f"that divides the hidden size {of.hidden}"
            )


def scored(name: str, layer: nn.Linear, plan: Plan, known: Known) -> Tensor:
    """The plan's score of every weight of a layer."""
    needs = SCORES[plan.score].needs
    moment = moments.moment(known.moments, name).to(layer.weight.device) if needs == "moments" else None
    squared = moments.squared_gradient(known.gradients, name).to(layer.weight.device) if needs == "gradients" else None
    seen = Evidence(moment, squared, saliency.layer_seed(plan.seed, name))
    return saliency.of_layer(plan.score, layer.weight.detach(), seen)


def _counts(layers: dict[str, nn.Linear], plan: Plan, known: Known) -> dict[str, int]:
    if plan.allocation == "uniform":
        return layer_sparsity.uniform(layers, plan.sparsity)
    return layer_sparsity.sensitivity(
        layers,
        plan.sparsity,
        score=lambda name: scored(name, layers[name], plan, known),
        squared_gradient=lambda name: moments.squared_gradient(known.gradients, name).to(layers[name].weight.device),
    )


def _by_block(layers: dict[str, nn.Linear]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in layers:
        found.setdefault(block_index(name), []).append(name)
    return found


def _pruned_block(model: PreTrainedModel, plan: Plan, known: Known, counts: dict[str, int]) -> dict[str, Tensor]:
    """The new weights of some layers of one block; layers with one input share its factorised moment."""
    pattern, updates = PATTERNS[plan.pattern], SCORES[plan.score].updates
    posed, last, found = None, (), {}
    for name, count in counts.items():
        layer = model.get_submodule(name)
        if updates:
            readers = moments.readers(known.moments, name)
            if readers != last:
                moment = moments.moment(known.moments, name).to(layer.weight.device)
                posed, last = surgeon.problem(moment, pattern.group), readers
            weight = surgeon.prune(layer.weight, posed, pattern, count=count)
        else:
            scores = scored(name, layer, plan, known)
            compared = SCORES[plan.score].compared
            mask = n_of_m(scores, pattern.zeros, pattern.group) if pattern.zeros else None
            weight = layer.weight.masked_fill(lowest(scores, count, compared=compared) if mask is None else mask, 0)
        found[name] = weight.to(layer.weight.dtype)
    return found


def _kept_blocks(model: PreTrainedModel, plan: Plan, known: Known, of: Sizes) -> list[int]:
    """Blocks in order, without the least important of those that hold a target."""
    layers = models.linear_layers(model)
    candidates = sorted({block_index(name) for name in plan.targets})
    if plan.score == "influence":
        scores = [moments.influence(known.moments, block) for block in candidates]
    else:
        energy = dict.fromkeys(candidates, 0.0)
        for name, layer in layers.items():
            if block_index(name) in energy:
                energy[block_index(name)] += float(scored(name, layer, plan, known).square().sum())
        scores = list(energy.values())
    gone = removed(of.blocks, plan.sparsity, of="blocks")
    lowest_first = sorted(zip(scores, candidates, strict=True))
    going = {block for _, block in lowest_first[:gone]}
    return [block for block in range(of.blocks) if block not in going]


def _kept_hidden(model: PreTrainedModel, plan: Plan, known: Known, of: Sizes) -> Kept:
    """Hidden channels by the mean share that they have in the scores of what reads them."""
    readers = {n: m for n, m in models.linear_layers(model).items() if n.rpartition(".")[2] in READERS}
    shares = torch.zeros(of.hidden)
    for name, layer in readers.items():
        columns = scored(name, layer, plan, known).square().sum(0).cpu()
        shares += columns / columns.sum()
    kept = keep(
        shares, removed(of.hidden, plan.sparsity, of="hidden channels", granularity=step(of.hidden, of_heads=of.heads))
    )
    for name, layer in readers.items():
        _apply_refit(name, layer, kept, plan, known)
    return Kept(hidden=kept)


def _apply_refit(name: str, layer: nn.Linear, kept: Tensor, plan: Plan, known: Known) -> None:
    """Solve a reader, in place, for the columns that stay; nothing for a score without an update."""
    if SCORES[plan.score].updates:
        moment = moments.moment(known.moments, name).to(layer.weight.device)
        layer.weight.data = surgeon.without_columns(layer.weight, moment, kept.to(moment.device)).to(layer.weight)
