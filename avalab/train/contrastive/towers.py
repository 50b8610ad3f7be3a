"""A small image tower beside a frozen language model: what they are, how they are trained, what they find.

1. The text tower is an artefact of the lab, never trained: the mean of its final hidden states over a name's tokens,
   standardised over the names that are trained on. Computed once, kept in a file.
2. The image tower is a residual network of three sizes of picture with group norms (none looks at other images), and a
   linear map of either side leads into one space of unit vectors; scale and bias of the loss are trained too.
3. Training is `loop.fit_module`: a batch is different emoji, drawn by the seed of its number, so that a killed run goes
   on with what it would have seen. `chunk` images at a time are in memory, whatever the batch (`losses.in_chunks`).
4. `rounded` gives the image tower as the lab's number formats would store it; a text tower of fewer bits is another
   artefact.
"""

from __future__ import annotations

import json
import statistics as numbers
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from avalab.kernels import formats
from avalab.lab import artifacts, statistics
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cache_path, cached_tensors
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import Run
from avalab.models import checkpoint, predict
from avalab.train import loop
from avalab.train.contrastive import losses
from avalab.train.contrastive.emoji import Emoji, augmented
from avalab.train.recipes import ImageRecipe as Recipe

WEIGHTS, ABOUT = "tower.safetensors", "tower.json"


class Residual(nn.Module):
    """Two convolutions around which the picture also passes unchanged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, width), nn.GroupNorm(8, width)])
        self.convolutions = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)])

    def forward(self, x: Float[Tensor, "image width y x"]) -> Float[Tensor, "image width y x"]:
        """The picture and what was learned to add to it."""
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(F.relu(norm(y)))
        return x + y


class Towers(nn.Module):
    """Images and text vectors in one space; `forward` is a batch's loss, as `loop.fit_module` wants it."""

    main_input_name = "places"  # counted as what a step has read: images

    def __init__(self, text_width: int, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, width = recipe, recipe.width
        stages = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            stages += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), Residual(after)]
        self.stages = nn.Sequential(*stages, nn.GroupNorm(8, 4 * width), nn.ReLU())
        self.to_shared = nn.Linear(8 * width, recipe.shared, bias=False)
        self.text_to_shared = nn.Linear(text_width, recipe.shared, bias=False)
        scale, bias = losses.STARTS[recipe.loss]
        self.log_scale, self.bias = (nn.Parameter(torch.tensor(float(v))) for v in (torch.tensor(scale).log(), bias))

    @property
    def device(self) -> torch.device:
        """Where the towers are."""
        return self.bias.device

    def images(self, pictures: Float[Tensor, "image 3 side side"]) -> Float[Tensor, "image shared"]:
        """Unit vectors of pictures: mean and maximum over the places of the last, smallest picture."""
        x = self.stages(2 * pictures - 1).flatten(2)
        return F.normalize(self.to_shared(torch.cat([x.mean(-1), x.amax(-1)], 1)), dim=-1)

    def texts(self, features: Float[Tensor, "text width"]) -> Float[Tensor, "text shared"]:
        """Unit vectors of texts, from what the frozen tower says of them."""
        return F.normalize(self.text_to_shared(features), dim=-1)

    def forward(self, pictures: Tensor, features: Tensor, places: Tensor) -> dict[str, Tensor]:
        """`{"loss"}` of a batch of pairs, `chunk` images in memory at a time."""
        found = losses.in_chunks(self.images, pictures, self.recipe.chunk)
        scale = self.log_scale.exp().clamp(max=100)
        return {"loss": losses.LOSSES[self.recipe.loss](found, self.texts(features), scale=scale, bias=self.bias)}


@dataclass(frozen=True)
class Batches(Dataset):
    """Training's batches by number: different emoji, each drawn anew."""

    emoji: Emoji
    features: Float[Tensor, "emoji width"]
    recipe: Recipe
    seed: int

    def __len__(self) -> int:
        return self.recipe.schedule.steps

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        seen = self.emoji.seen
        places = seen[torch.randperm(len(seen), generator=generator)[: self.recipe.batch]]
        pictures = augmented(self.emoji.pictures[places], generator)
        return {"pictures": pictures, "features": self.features[places], "places": places}


def one_batch(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the Trainer collates: a batch is made whole already."""
    return batch[0]


def text_features(text_tower: Artifact, emoji: Emoji, run: Run) -> Float[Tensor, "emoji width"]:
    """The frozen tower's standardised vectors of all names; mean and spread are those of the names that are seen."""
    about = artifacts.sha256_of_text(json.dumps(emoji.names))
    path = cache_path(run.artifacts_dir / "cache", "names", text_tower.sha256, about, code_of(mean_states)[:8])
    found = cached_tensors(path, lambda: {"states": mean_states(text_tower, emoji.names, run.device)})["states"]
    seen = found[emoji.seen]
    return (found - seen.mean(0)) / seen.std(0).clamp(min=1e-4)


@torch.no_grad()
def mean_states(text_tower: Artifact, names: list[str], device: str) -> Float[Tensor, "name width"]:
    """The mean of a model's final hidden states over each name's tokens, in float32."""
    model, tokenizer = checkpoint.load_model(text_tower, device), checkpoint.load_tokenizer(text_tower)
    found = []
    for name in names:
        ids = tokenizer(f" {name}", add_special_tokens=False, return_tensors="pt").input_ids
        found.append(predict.hidden_states(model, ids)[0].float().mean(0).cpu())
    return torch.stack(found)


def train_towers(text_tower: Artifact, emoji: Emoji, *, run: Run, name: str, recipe: Recipe | None = None) -> Artifact:
    """The artefact `name`: an image tower that belongs to this text tower. Raises ValueError as `loop.fit` does."""
    recipe = recipe or Recipe()
    if len(emoji.seen) < 2 or not len(emoji.unseen):
        raise InputError(f"{len(emoji.names)} emoji are too few to learn from and to hold some apart; give more")
    pictures = artifacts.sha256_of_text(repr((emoji.names, float(emoji.pictures.double().sum()))))
    step = {"step": "contrast", **asdict(recipe), "emoji": pictures, "seed": run.seed}
    step |= {"code": code_of(train_towers)[:12]}

    def train(folder: Path, identity: str) -> dict:
        features = text_features(text_tower, emoji, run)
        towers = new_towers(features.shape[1], recipe, seed=run.seed).to(run.device)
        kept = run.artifacts_dir / "checkpoints" / name
        batches = Batches(emoji, features, recipe, run.seed)
        settings = {"identity": identity}
        history = loop.fit_module(
            towers, batches, schedule=recipe.schedule, folder=kept, settings=settings, collate=one_batch
        )
        save_file({n: p.detach().contiguous().cpu() for n, p in towers.state_dict().items()}, folder / WEIGHTS)
        about = {"text_width": features.shape[1], "recipe": asdict(recipe)}
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        (folder / loop.HISTORY).write_text(json.dumps(history, indent=1) + "\n")
        return {"images": len(batches[0]["places"]) * len(batches)}

    return loop.train_artifact(run.artifacts_dir / name, train, base=text_tower, step=step, format="image-tower")


def new_towers(text_width: int, recipe: Recipe, *, seed: int) -> Towers:
    """Towers with drawn weights, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Towers(text_width, recipe)


def load_towers(artifact: Artifact) -> Towers:
    """The towers of an artefact. Raises ValueError for an artefact of another format."""
    if artifact.format != "image-tower":
        raise InputError(f"{artifact.name} is in format {artifact.format!r}; an image tower is wanted")
    about = json.loads((artifact.path / ABOUT).read_text(encoding="utf-8"))
    towers = Towers(about["text_width"], Recipe.of(about["recipe"]))
    towers.load_state_dict(load_file(artifact.path / WEIGHTS))
    return towers.eval()


def apply_rounding(towers: Towers, format: str) -> float:
    """Round the image tower's weights to a row of `kernels.formats`; bits a weight of the tower then.

    Weights whose columns the format's groups do not divide (the first layer's) stay as they are.
    """
    grid = formats.FORMATS[format]
    rounded = kept = 0
    for module in towers.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or module is towers.text_to_shared:
            continue
        flat = module.weight.data.flatten(1)
        if flat.shape[1] % (grid.group_size or 1):
            kept += flat.numel()
            continue
        module.weight.data = formats.round_to_nearest(flat, grid).view_as(module.weight)
        rounded += flat.numel()
    return (rounded * grid.bits_per_weight + 32 * kept) / (rounded + kept)


@torch.no_grad()
def ranks(towers: Towers, emoji: Emoji, features: Tensor, places: Int[Tensor, "asked"]) -> Int[Tensor, "asked"]:
    """At which place, from 0, each picture's own name stands among the names of all `places`."""
    scores = towers.images(emoji.pictures[places]) @ towers.texts(features[places]).T
    return (scores > scores.diagonal()[:, None]).sum(1)


@torch.no_grad()
def nearest(towers: Towers, picture: Tensor, features: Float[Tensor, "text width"], count: int = 5) -> list[int]:
    """The texts that a picture points to, nearest first."""
    scores = towers.images(picture[None]) @ towers.texts(features).T
    return scores[0].topk(min(count, len(features))).indices.tolist()


# --- records ---------------------------------------------------------------------------------------------------------


def record_training(run: Run, subject: str, artifact: Artifact) -> None:
    """Append training's seconds, and `contrastive_loss`: the curve over images, its value the last tenth's mean."""
    history = json.loads((artifact.path / loop.HISTORY).read_text(encoding="utf-8"))
    entries = [entry for entry in history if "loss" in entry]
    about = {"artifact_sha256": artifact.sha256, "engine": "torch", "n": len(entries)}
    curve = [entry["loss"] for entry in entries]
    details = {"tokens": [entry["tokens"] for entry in entries]}
    end = numbers.mean(curve[-max(1, len(curve) // 10) :])
    run.record(subject, "contrastive_loss", end, "nats", samples=curve, details=details, **about)
    run.record(subject, "train_seconds", entries[-1]["seconds"], "s", **about)


def record_recall(
    run: Run,
    subject: str,
    towers: Towers,
    emoji: Emoji,
    features: Tensor,
    places: Int[Tensor, "asked"],
    *,
    part: str,
    artifact: Artifact,
) -> None:
    """Append `recall_at_5:<part>` and `recall_at_1:<part>`: a picture's own name among the nearest of all `places`."""
    found = ranks(towers, emoji, features, places)
    details = {"chance": 1 / len(places)}
    for count in (5, 1):
        share = statistics.wilson(int((found < count).sum()), len(found))
        about = {"artifact_sha256": artifact.sha256, "engine": "torch", "details": details}
        run.record(subject, f"recall_at_{count}:{part}", unit="1", **about, **vars(share))


def kept_bytes(emoji: Emoji, recipe: Recipe, *, images: int) -> int:
    """Bytes that the image tower keeps of so many images for the backward pass: what a chunk, or a batch, costs."""
    towers = new_towers(1, recipe, seed=0)
    return loop.kept_for_backward(lambda: towers.images(emoji.pictures[:images]))
