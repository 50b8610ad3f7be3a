"""Contrastive losses of a batch of pairs, and towers whose memory does not grow with the batch.

With unit vectors x of images and y of texts, logits z_ij = scale x_i . y_j + bias:

- `clip`: mean of the cross-entropies over rows and columns, the pair itself being right (Radford et al. 2021, arXiv
  2103.00020, figure 3); the bias cancels;
- `siglip`: -sum_ij log sigmoid(s_ij z_ij) / n with s = 1 for the pair itself and -1 elsewhere (Zhai et al. 2023, arXiv
  2303.15343, eq. 1): every entry is a question of its own.

Both need all embeddings of a batch at once, but not all of a tower's activations: `in_chunks` keeps embeddings and
computes each chunk's activations again when its gradient is due (gradient caching: Gao et al. 2021, arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Vectors = Float[Tensor, "pair width"]


def clip(images: Vectors, texts: Vectors, *, scale: Tensor, bias: Tensor) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of finding the text of an image and the image of a text."""
    logits = scale * images @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def siglip(images: Vectors, texts: Vectors, *, scale: Tensor, bias: Tensor) -> Float[Tensor, ""]:
    """Sum over a batch's questions "do these two belong together?", in nats a pair."""
    logits = scale * images @ texts.T + bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


LOSSES: dict[str, Callable[..., Tensor]] = {"clip": clip, "siglip": siglip}

STARTS = {"clip": (14.3, 0.0), "siglip": (10.0, -10.0)}  # scale and bias of each, from its paper


def in_chunks(tower: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """What a tower says of all images, so that its activations exist for `size` of them at a time.

    The gradient is the plain one: the tower treats each image by itself (no norm over the batch).
    """
    if size >= len(images):
        return tower(images)
    if not torch.is_grad_enabled():
        return torch.cat([tower(part) for part in images.split(size)])
    return torch.cat([checkpoint(tower, part, use_reentrant=False) for part in images.split(size)])
