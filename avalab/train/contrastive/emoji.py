"""Colour emoji and their names: pictures that a font draws, words that Unicode gives, split by emoji.

1. Every code point of `BLOCKS` that the font of the asset `openmoji` has a picture for; its name is Unicode's, in lower
   case (`unicodedata`), with the words that mean nothing alone left out.
2. Drawn once at `SIDE` pixels, on white. Training sees it moved, resized, mirrored, its colours shifted, on backgrounds
   of any light colour; what is scored is as it was drawn.
3. A hash of the name says who is unseen: a fifth, the same whatever else there is.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from avalab.lab import assets
from avalab.lab.artifacts import sha256_of_text
from avalab.lab.errors import InputError, MissingFile, Unavailable

FONT = "openmoji"  # an asset

BLOCKS = ((0x2600, 0x27C0), (0x2B00, 0x2C00), (0x1F300, 0x1F650), (0x1F680, 0x1F700), (0x1F900, 0x1FB00))

SIDE = 32  # pixels

NOBODY = 0xE888  # a private code point, which stands for what a font does not have

EMPTY_WORDS = {"symbol", "sign", "with", "of", "and", "the", "black", "white", "heavy"}

UNSEEN = 5  # every so many


@dataclass(frozen=True)
class Emoji:
    """Pictures and names of the same things."""

    characters: list[str]
    names: list[str]
    pictures: Float[Tensor, "emoji 3 side side"]  # in [0, 1]

    @property
    def unseen(self) -> Int[Tensor, "held_out"]:
        """Places of those that no training sees."""
        return torch.tensor([i for i, name in enumerate(self.names) if _is_unseen(name)], dtype=torch.long)

    @property
    def seen(self) -> Int[Tensor, "trained"]:
        """Places of the others."""
        return torch.tensor([i for i, name in enumerate(self.names) if not _is_unseen(name)], dtype=torch.long)


def _is_unseen(name: str) -> bool:
    return int(sha256_of_text(name)[:8], 16) % UNSEEN == 0


def load_emoji(limit: int = 0, font: Path | None = None) -> Emoji:
    """All emoji of a font, or the first `limit` in a seeded order. Raises Unavailable without Pillow or the asset."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise Unavailable('pictures need Pillow: pip install -e ".[lab]"') from error
    try:
        drawn = ImageFont.truetype(str(font or assets.fetch_asset(FONT)), 2 * SIDE)
    except OSError as error:
        raise InputError(f"{font} is no font that can be drawn ({error}); give a TrueType file with colours") from error

    def picture(character: str) -> np.ndarray:
        canvas = Image.new("RGB", (3 * SIDE, 3 * SIDE), "white")
        place = (3 * SIDE // 2, 3 * SIDE // 2)
        ImageDraw.Draw(canvas).text(place, character, font=drawn, embedded_color=True, anchor="mm", fill="black")
        return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS))

    nothing, found, named = picture(chr(NOBODY)), [], {}
    for character in (chr(point) for first, end in BLOCKS for point in range(first, end)):
        name = spoken_name(character)
        if name and name not in named:
            named[name] = character
    names = sorted(named, key=sha256_of_text)
    kept = []
    for name in names:
        pixels = picture(named[name])
        if (pixels != nothing).any() and (pixels != 255).any():
            kept.append(name)
            found.append(torch.from_numpy(pixels.copy()))
        if limit and len(kept) == limit:
            break
    if not found:
        raise InputError(f"{font or FONT} draws none of the emoji of Unicode; give a font with colour pictures")
    pictures = torch.stack(found).permute(0, 3, 1, 2).float() / 255
    return Emoji([named[name] for name in kept], kept, pictures)


def spoken_name(character: str) -> str:
    """`grinning face`: Unicode's name in lower case, without words that mean nothing alone; "" where it has none."""
    words = unicodedata.name(character, "").lower().replace("-", " ").split()
    return " ".join(word for word in words if word not in EMPTY_WORDS)


def load_picture(path: Path) -> Float[Tensor, "3 side side"]:
    """A picture file as the tower sees it: squared on white, `SIDE` pixels.

    Raises MissingFile where there is none, ValueError for a file that is no picture or an enormous one.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise MissingFile(f"no picture at {path}")
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no picture that can be read ({error}); give a PNG, JPEG or WebP file") from error
    side = max(image.size)
    squared = Image.new("RGBA", (side, side), "white")
    squared.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    small = squared.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255


def augmented(
    pictures: Float[Tensor, "image 3 side side"], generator: torch.Generator
) -> Float[Tensor, "image 3 side side"]:
    """Each picture turned, resized, moved, half of them mirrored, with another contrast and tint, on a light ground."""
    n = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    turn, size = uniform(-0.3, 0.3), uniform(0.8, 1.3)
    mirror = 1 - 2 * (torch.rand(n, generator=generator) < 0.5).float()
    cos, sin = turn.cos() * size, turn.sin() * size
    rows = [
        torch.stack([cos * mirror, -sin, uniform(-0.2, 0.2)], 1),
        torch.stack([sin * mirror, cos, uniform(-0.2, 0.2)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(pictures.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - pictures, grid, align_corners=False)  # what comes in from outside is white
    tinted = moved * uniform(0.7, 1.0, 3, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)
    return tinted.clamp(0, 1)
