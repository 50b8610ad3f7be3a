"""Kernels of other projects, timed where they are installed and can run; elsewhere a row says what is missing.

`PEERS` is the one table: the arm's name, the package and module, what it computes, whether it needs a GPU, and the
function that makes a call of it. Nothing here is a dependency of the lab: a module is imported when its arm is made.
On a CPU cut cross-entropy falls back on a compiled dense loss (`torch.compile`, which needs a C++ compiler), Liger's
and GemLite's kernels are Triton's, and bitsandbytes' 4-bit products are the arms of `bench_arms`.
`checked` runs every arm once and drops, with its reason, one that fails or computes something else.

Sources: Wijmans et al. 2024 (cut cross-entropy), Hsu et al. 2024 (Liger kernel), GemLite and bitsandbytes as packages.
What it does not do: install anything, or time (`bench`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from avalab.kernels.weight import Weight4, group_scales

Arms = dict[str, Callable[[], object]]
ALLOWED_DIFFERENCE = 0.05  # of the plain form's result, in norm: bf16 and 4-bit scales in bf16 stay far below


@dataclass(frozen=True)
class Peer:
    """One kernel of another project; `make` takes an operation's inputs and returns the call that is timed."""

    arm: str
    package: str  # as pip knows it
    module: str
    operation: str  # nf4, int4 or loss
    make: Callable[..., Callable[[], Tensor]]
    needs_gpu: bool = True


def missing(peer: Peer, device: str) -> str:
    """Why a peer cannot run here: not installed, or no GPU; empty when it can be tried."""
    if find_spec(peer.module) is None:
        return f"not installed: pip install {peer.package}" + (" (and it needs a GPU)" if peer.needs_gpu else "")
    return "needs a GPU" if peer.needs_gpu and not device.startswith("cuda") else ""


def arms(operation: str, device: str, *inputs: object) -> Arms:
    """The calls of all peers that compute `operation` and can run on `device`."""
    return {peer.arm: peer.make(*inputs) for peer in PEERS if peer.operation == operation and not missing(peer, device)}


def reasons(device: str) -> dict[str, str]:
    """`product nf4:gemlite`-like subject -> why that peer is not timed here."""
    found = {peer: missing(peer, device) for peer in PEERS}
    return {f"{NAMES[peer.operation]}:{peer.arm}": reason for peer, reason in found.items() if reason}


def checked(arms: Arms, plain: str) -> tuple[Arms, dict[str, str]]:
    """The arms that run and agree with the arm `plain`, and the reasons of the others."""
    kept, dropped, expected = {}, {}, _flat(arms[plain]())
    for name, arm in arms.items():
        try:
            gap = float((_flat(arm()) - expected).norm() / expected.norm())
        except Exception as error:  # another project's kernel on this machine: whatever it raises is the answer
            said = str(error).strip() or type(error).__name__
            dropped[name] = f"fails here: {said.splitlines()[0]}"
            continue
        if gap <= ALLOWED_DIFFERENCE:
            kept[name] = arm
        else:
            dropped[name] = f"computes something else: {gap:.2g} of the result away"
    return kept, dropped


def _flat(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.detach().float().flatten() for part in parts])


# --- products: activations, weight ---------------------------------------------------------------------------------


def _bitsandbytes_gemm(x: Tensor, weight: Weight4) -> Callable[[], Tensor]:
    """The fused 4-bit product that `matmul_4bit` takes for inference."""
    import bitsandbytes  # noqa: F401  (its import registers the operator)

    run, scales = torch.ops.bitsandbytes.gemm_4bit.default, group_scales(weight).reshape(-1)
    codes, shape = weight.codes.reshape(-1, 1), list(weight.shape)
    return lambda: run(x, codes, shape, scales, weight.group_size, "nf4")


def _bitsandbytes_gemv(x: Tensor, weight: Weight4) -> Callable[[], Tensor]:
    """The older product, of one row of activations: with more it fails the check."""
    import bitsandbytes  # noqa: F401  (its import registers the operator)

    run, scales = torch.ops.bitsandbytes.gemv_4bit.default, group_scales(weight).reshape(-1)
    codes, shape = weight.codes.reshape(-1, 1), list(weight.shape)
    return lambda: run(x, codes, shape, scales, weight.levels, weight.group_size)


def _gemlite(x: Tensor, weight: Weight4) -> Callable[[], Tensor]:
    """GemLite's product of (code - zero point) * scale."""
    from gemlite.helper import A16W4_HQQ_INT

    codes = torch.stack((weight.codes >> 4, weight.codes & 15), -1).view(weight.shape)
    parts = [part.to(x.dtype).reshape(-1, 1) for part in (group_scales(weight), weight.zero_points)]
    layer = A16W4_HQQ_INT(device=str(x.device), dtype=x.dtype).from_weights(codes, *parts)
    return lambda: layer(x)


# --- losses: hidden states, head, targets --------------------------------------------------------------------------


def _liger(hidden: Tensor, head: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda: liger_fused_linear_cross_entropy(hidden, head, targets)


def _cut_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    form = "cce" if hidden.is_cuda else "torch_compile"
    return lambda: linear_cross_entropy(hidden, head, targets, impl=form)


PEERS = (
    Peer("bitsandbytes-gemm", "bitsandbytes", "bitsandbytes", "nf4", _bitsandbytes_gemm),
    Peer("bitsandbytes-gemv", "bitsandbytes", "bitsandbytes", "nf4", _bitsandbytes_gemv),
    Peer("gemlite", "gemlite", "gemlite", "int4", _gemlite),
    Peer("liger", "liger-kernel", "liger_kernel", "loss", _liger),
    Peer("cut-cross-entropy", "cut-cross-entropy", "cut_cross_entropy", "loss", _cut_cross_entropy, needs_gpu=False),
)
NAMES = {"nf4": "product nf4", "int4": "product int4_zero_point", "loss": "loss"}
