"""Where names go beside their points, so that none covers another.

1. Each name is offered places on rings around its point, near ones first.
2. A place costs what it covers, in pixels: other names, markers, drawn lines, leading lines, the world outside.
3. In turn, from the top down, each name takes the cheapest place given where the others are; a few sweeps settle it.

It works on pixels alone and knows no drawing library. It is a heuristic: it finds a good layout, not the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float

SWEEPS = 6  # over all labels of a figure; later sweeps move nothing more


def place(
    centres: Float[np.ndarray, "label 2"],
    sizes: Float[np.ndarray, "label 2"],
    *,
    lines: Sequence[Float[np.ndarray, "_ 2"]],
    frame: Float[np.ndarray, "4"],
) -> Float[np.ndarray, "label 2"]:
    """The middle of each label of a point, in pixels like everything here.

    `sizes` are widths and heights, `lines` the vertices of what is drawn, `frame` left, bottom, right and top.
    """
    drawn = np.concatenate([centres[:0], *[_along(*pair) for line in lines for pair in pairwise(line)]])
    chosen = centres.copy()
    for _ in range(SWEEPS):
        for i in np.argsort(-centres[:, 1]).tolist():
            offers = _offers(centres[i], sizes[i])
            blots = _blots(offers, sizes[i], drawn, frame)
            chosen[i] = offers[np.argmin(blots + _conflicts(i, offers, chosen, centres, sizes))]
    return chosen


def _offers(centre: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Middles of boxes of this size around a point, in pixels; the near ones first."""
    angles = np.arange(0, 2 * np.pi, np.pi / 8)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([centre + circle * (size / 2 + gap) for gap in (9, 15, 24, 36, 52, 72, 96, 130, 170)])


def _conflicts(i: int, offers: np.ndarray, chosen: np.ndarray, centres: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """What label i would cover of other labels, markers and leading lines, and its own line of them, in pixels."""
    others = np.arange(len(centres)) != i
    boxes = chosen[others], sizes[others]
    leads = np.concatenate([offers[:0], *[_along(*pair) for pair in zip(centres[others], boxes[0], strict=True)]])
    overlap = (sizes[i] / 2 + boxes[1] / 2 - abs(offers[:, None] - boxes[0])).clip(0).prod(2).sum(1)
    marker = (sizes[i] / 2 + 7 - abs(offers[:, None] - centres)).clip(0).prod(2).sum(1)
    gap = np.linalg.norm((abs(offers - centres[i]) - sizes[i] / 2).clip(0), axis=1)
    own = [_along(centres[i], offer) for offer in offers]
    crossed = np.array([_inside(line, *boxes) + _inside(line, centres[others], 12) for line in own])
    beside = np.array([_inside(line[2:], leads, 8) for line in own])
    covered = np.array([_inside(leads, offer[None], sizes[i]) for offer in offers])
    return 2 * overlap + marker + 40 * (crossed + covered) + 25 * beside + gap


def _blots(offers: np.ndarray, size: np.ndarray, drawn: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The cost of lying on drawn lines, and of leaving the axes."""
    outside = (frame[:2] - (offers - size / 2)).clip(0).sum(1) + ((offers + size / 2) - frame[2:]).clip(0).sum(1)
    return 100 * outside + 8 * np.array([_inside(drawn, offer[None], size) for offer in offers])


def _along(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Points on a segment, one about every six pixels."""
    steps = np.linspace(0, 1, 2 + int(np.linalg.norm(np.subtract(end, start)) / 6))
    return np.asarray(start) + steps[:, None] * np.subtract(end, start)


def _inside(points: np.ndarray, middles: np.ndarray, sizes: np.ndarray | int) -> int:
    """How many pairs of a point and a box there are with the point in the box."""
    return int((abs(points[:, None] - middles) < np.asarray(sizes) / 2).all(axis=2).sum())
