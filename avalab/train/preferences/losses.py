"""Losses of pairs of answers: how far a model has moved towards the chosen one, against the model it began as.

With log-ratios r = log pi(answer) - log pi_ref(answer), summed over an answer's tokens, and h = r_chosen - r_rejected:

| loss | of a pair | source |
|---|---|---|
| `dpo` | -log sigmoid(beta h) | Rafailov et al. 2023, arXiv 2305.18290, eq. 7 |
| `cdpo` | -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h): a share e of the pairs is the wrong way round | Mitchell 2023, "A note on DPO with noisy preferences", eq. 6 |
| `ipo` | (h' - 1 / (2 beta))^2, h' of ratios that are means over tokens | Azar et al. 2023, arXiv 2310.12036, eq. 17 |

`dpo` pushes a pair apart for ever, less and less; the other two have a margin at which they are content: `cdpo` at
beta h = log((1 - e) / e), `ipo` at 1 / (2 beta). That `ipo` takes means is its authors' practice, which the paper does
not say, and trl's: the sums would make long answers count by the square of their length.
"""  # noqa: E501  (a table's row)

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Ratios = Float[Tensor, "pair 2"]  # of the chosen answer and of the rejected one


def dpo(ratios: Ratios, lengths: Int[Tensor, "pair 2"], *, beta: float, smoothing: float) -> Float[Tensor, "pair"]:
    """-log sigmoid(beta h) of each pair, in nats."""
    return -F.logsigmoid(beta * margins(ratios))


def cdpo(ratios: Ratios, lengths: Int[Tensor, "pair 2"], *, beta: float, smoothing: float) -> Float[Tensor, "pair"]:
    """`dpo` where a share `smoothing` of the pairs is thought to be the wrong way round."""
    scaled = beta * margins(ratios)
    return -(1 - smoothing) * F.logsigmoid(scaled) - smoothing * F.logsigmoid(-scaled)


def ipo(ratios: Ratios, lengths: Int[Tensor, "pair 2"], *, beta: float, smoothing: float) -> Float[Tensor, "pair"]:
    """Squared distance of the margin of means from 1 / (2 beta)."""
    return (margins(ratios / lengths) - 1 / (2 * beta)).square()


LOSSES: dict[str, Callable[..., Tensor]] = {"dpo": dpo, "ipo": ipo, "cdpo": cdpo}


def margins(ratios: Ratios) -> Float[Tensor, "pair"]:
    """h: by how many nats the chosen answer gained more than the rejected one."""
    return ratios[:, 0] - ratios[:, 1]


def summed(values: Float[Tensor, "token"], owners: Int[Tensor, "token"], answers: int) -> Float[Tensor, "answer"]:
    """The sum over each answer's tokens."""
    return torch.zeros(answers, dtype=values.dtype, device=values.device).index_add(0, owners, values)
