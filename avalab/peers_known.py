"""Which peers there are: other people's methods by name, how each is made, and what it needs.

| peer | library | embedding in the file |
|---|---|---|
| `rtn-*`, `gptq-*`, `awq-*` | llmcompressor | bf16; with `-int8emb` int8 rows, put there by `peers_embedding` |
| `nf4`, `nf4-dq` | bitsandbytes | bf16 |
| `autoround-*` | AutoRound | bf16; `-int8emb` likewise |
| `openvino-int4`, `nncf-int4` | NNCF: no data; AWQ and scale estimation | int8, a scale and zero point a row |
| `onnx-k-quant` | ONNX Runtime | int4 in groups of 32 |
| `hqq-*` | HQQ, its own storage (`hqq_checkpoint`) | bf16; `-int8emb` likewise |
| `gguf-*` | llama.cpp with an importance matrix | the mixture's choice, 8 bits where 256 does not divide a row |

A name says method, bits and group size; `-int8emb` is the same file with its embedding in int8 rows.

What it does not do: make an artefact, or compare one (`peers`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from avalab import peers_making
from avalab.engines import llamacpp, onnx, openvino
from avalab.peers_making import Maker, quantized, with_int8_embedding

LAB = 'pip install -e ".[lab]"'
HQQ = "pip install hqq==0.2.8.post1"


@dataclass(frozen=True)
class Peer:
    """How a peer is made, the module it needs, how to get that, the engine that scores it, and its embedding."""

    make: Maker
    module: str
    install: str = LAB
    engine: str = "torch"
    embedding: str = "bf16"


def known(peer: str) -> Peer:
    """The row of a peer. Raises ValueError listing the names for an unknown one."""
    if peer not in PEERS:
        raise ValueError(f"unknown peer {peer!r}; choose one of {', '.join(NAMES)}")
    return PEERS[peer]


def _library(method: str, bits: int, group_size: int) -> Peer:
    row = quantized(method, bits=bits, group_size=group_size, symmetric=False)
    return Peer(row, "llmcompressor")


def _int8(peer: Peer) -> Peer:
    return replace(peer, make=with_int8_embedding(peer.make), embedding="int8, a scale a row")


_GGUF = {"module": "llama_cpp", "install": llamacpp.INSTALL, "embedding": "the mixture's choice"}
_HQQ = {"module": "hqq", "install": HQQ, "embedding": "int8, a scale a row"}
_WHOLE = {
    "rtn-w4g64": _library("rtn", 4, 64),
    "rtn-w3g64": _library("rtn", 3, 64),
    "rtn-w2g64": _library("rtn", 2, 64),
    "gptq-w6g64": _library("gptq", 6, 64),
    "gptq-w4g64": _library("gptq", 4, 64),
    "gptq-w3g64": _library("gptq", 3, 64),
    "gptq-w2g64": _library("gptq", 2, 64),
    "awq-w4g64": _library("awq", 4, 64),
    "autoround-w6g64": Peer(peers_making.autoround(6, 64), "auto_round"),
    "autoround-w4g64": Peer(peers_making.autoround(4, 64), "auto_round"),
    "autoround-w4g32": Peer(peers_making.autoround(4, 32), "auto_round"),
    "autoround-w3g64": Peer(peers_making.autoround(3, 64), "auto_round"),
    "autoround-w2g64": Peer(peers_making.autoround(2, 64), "auto_round"),
}
PEERS: dict[str, Peer] = {
    **_WHOLE,
    **{f"{name}-int8emb": _int8(peer) for name, peer in _WHOLE.items()},
    **{f"hqq-w{bits}g64": Peer(peers_making.hqq(bits, 64), "hqq", HQQ) for bits in (4, 3, 2)},
    **{f"hqq-w{bits}g64-int8emb": Peer(peers_making.hqq(bits, 64, int8_embedding=True), **_HQQ) for bits in (4, 3, 2)},
    "nf4": Peer(quantized("nf4"), "bitsandbytes"),
    "nf4-dq": Peer(quantized("nf4", double_quantization=True), "bitsandbytes"),
    "openvino-int4": Peer(peers_making.openvino_int4, "nncf", openvino.INSTALL, "openvino", "int8, a scale a row"),
    "nncf-int4": Peer(peers_making.nncf, "nncf", openvino.INSTALL, "openvino", "int8, a scale a row"),
    "onnx-k-quant": Peer(peers_making.onnx, "onnxruntime_genai", onnx.INSTALL, "onnx", "int4 in groups of 32"),
    **{
        f"gguf-{mixture}": Peer(peers_making.gguf_mixture(mixture), **_GGUF) for mixture in ("q4_k_m", "q3_k_m", "q2_k")
    },
}
NAMES: tuple[str, ...] = tuple(PEERS)
# The libraries that calibrate, at three sizes, and NNCF: two hours on one thread, most of them AutoRound's.
SHORT = (
    *(f"{method}-w{bits}g64-int8emb" for bits in (4, 3, 2) for method in ("gptq", "autoround")),
    "nncf-int4",
)
