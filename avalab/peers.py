"""The peers of the lab's compressor: other people's methods, one signature, one evaluator, the same file bytes.

1. `write` makes an artefact with a peer; what calibrates does so on the run's own windows.
2. `match` makes the lab's artefact of the same file bytes: its budget is a number of bytes, so the lab does the
   matching, and one it has made already serves again within 1 %.
3. `record` appends bytes, seconds and scores, and the ratio of the two KL divergences on the same windows.
4. `python -m avalab.peers` does all of it for a model and writes results/<run>/peers.json after each subject.

| peer | library | embedding in the file |
|---|---|---|
| `rtn-*`, `gptq-*`, `awq-*` | llmcompressor | bf16; with `-int8emb` int8 rows, put there by `peers_embedding` |
| `nf4`, `nf4-dq` | bitsandbytes | bf16 |
| `autoround-*` | AutoRound | bf16; `-int8emb` likewise |
| `openvino-int4`, `nncf-int4` | NNCF: no data; AWQ and scale estimation | int8, a scale and zero point a row |
| `onnx-k-quant` | ONNX Runtime | int4 in groups of 32 |
| `gguf-*` | llama.cpp with an importance matrix | the mixture's choice, 8 bits where 256 does not divide a row |

A missing library raises EngineUnavailable with the install line; the command records that and goes on. What it does not
do: tune a peer, train after rounding, or HQQ, whose fractional zero points no file format here holds.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace

from avalab import corpora, models, peers_making, quality, quantize
from avalab import peers_scores as scoring
from avalab.artifacts import Artifact
from avalab.engines import kinds, llamacpp, onnx, openvino
from avalab.experiment import PROFILES, ROOT, Run, load_average
from avalab.peers_making import Maker, quantized, with_int8_embedding
from avalab.quality import Reference, TokenScores

LAB = 'pip install -e ".[lab]"'
SAME_BYTES = 0.01  # two files within this share are of one size


@dataclass(frozen=True)
class Peer:
    """How a peer is made, the module it needs, how to get that, the engine that scores it, and its embedding."""

    make: Maker
    module: str
    install: str = LAB
    engine: str = "torch"
    embedding: str = "bf16"


def write(base: Artifact, peer: str, *, run: Run) -> Artifact:
    """The artefact of a peer, below `run.artifacts_dir`; one of the same recipe and code is reused.

    Raises ValueError for an unknown peer or a base that is no bf16 artefact, EngineUnavailable without its library.
    """
    row = known(peer)
    if base.format != "bf16":
        raise ValueError(f"{base.name} is in format {base.format!r}; only bf16 artefacts can be compressed")
    if importlib.util.find_spec(row.module) is None:
        raise kinds.EngineUnavailable(f"peer {peer} needs the package {row.module}; install it: {row.install}")
    return row.make(base, run)


def known(peer: str) -> Peer:
    """The row of a peer. Raises ValueError listing the names for an unknown one."""
    if peer not in PEERS:
        raise ValueError(f"unknown peer {peer!r}; choose one of {', '.join(NAMES)}")
    return PEERS[peer]


def match(base: Artifact, size: int, *, run: Run, made: Sequence[Artifact] = ()) -> Artifact:
    """The lab's artefact of `size` bytes: one of `made` within 1 % of it, or a new one.

    Raises ValueError as `ava` does for a budget that no file fits.
    """
    near = [artifact for artifact in made if abs(artifact.bytes / size - 1) <= SAME_BYTES]
    return near[0] if near else quantize.write(base, "ava", bytes=size, run=run)


def references(run: Run, base: Artifact) -> dict[str, Reference]:
    """What every subject is compared with: the base on the windows of each evaluation text of the profile."""
    tokenizer, cache = models.load_tokenizer(base), run.artifacts_dir / "cache"
    texts = corpora.evaluation_texts(run, tokenizer)
    windows = {text.name: corpora.profile_windows(run, text, tokenizer) for text in texts}
    return {name: quality.reference(base, rows, cache, run.device) for name, rows in windows.items()}


def record(
    run: Run,
    subject: str,
    artifact: Artifact,
    against: dict[str, Reference],
    *,
    peer: str = "",
    rival: Artifact | None = None,
) -> dict[str, TokenScores]:
    """Append bytes, seconds and, for each text, KL (mean, 99th percentile), agreement, perplexity and rise in loss.

    `peer` names the row whose engine scores the artefact (none: torch). With `rival`, which torch has to load, also
    `kl_ratio`: the rival's mean KL divergence over this one's, windows paired. Returns the token scores by text.
    """
    row = known(peer) if peer else None
    about = {"artifact_sha256": artifact.sha256, "engine": row.engine if row else "torch"}
    measured, recipe = artifact.card["measured"], artifact.card["recipe"]
    stored = {"embedding": row.embedding if row else "as its recipe says", "format": artifact.format}
    run.record(subject, "artifact_bytes", artifact.bytes, "bytes", n=1, details=stored, **about)
    details = {"recipe": recipe, **measured}
    run.record(subject, "compress_seconds", measured.get("compress_seconds"), "s", n=1, details=details, **about)
    cache, found = run.artifacts_dir / "cache", {}
    for text, reference in against.items():
        found[text] = scoring.scores(artifact, reference, cache, engine=about["engine"], device=run.device)
        base = scoring.scores(reference.base, reference, cache, device=run.device)
        rows = _estimates(run, found[text], base)
        for metric, unit, estimate in rows:
            run.record(subject, f"{metric}:{text}", unit=unit, **vars(estimate), **about)
        if rival:
            theirs = scoring.scores(rival, reference, cache, device=run.device)
            estimate = scoring.ratio(theirs.kl, found[text].kl, resamples=run.profile.resamples, seed=run.seed)
            sizes = {"rival": rival.name, "rival_bytes": rival.bytes, "rival_sha256": rival.sha256}
            run.record(subject, f"kl_ratio:{text}", unit="1", **vars(estimate), details=sizes, **about)
    return found


def compare(run: Run, names: Sequence[str]) -> None:
    """Record the base, each named peer and the lab's artefact of its size; the file is written after each subject."""
    base = models.base(run)
    against = references(run, base)
    record(run, "base", base, against)
    rivals: list[Artifact] = []
    for name in names:
        _compare_one(run, base, name, against, rivals)
        run.save()


def _compare_one(run: Run, base: Artifact, name: str, against: dict[str, Reference], rivals: list[Artifact]) -> None:
    try:
        artifact = write(base, name, run=run)
        rival = _rival(run, base, artifact, against, rivals)
        record(run, name, artifact, against, peer=name, rival=rival)
    except (kinds.EngineUnavailable, ValueError, RuntimeError) as error:  # NotSupported is a ValueError
        run.record(name, "kl_divergence", None, "nats/token", note=" ".join(str(error).split()))


def _rival(run: Run, base: Artifact, artifact: Artifact, against: dict, rivals: list[Artifact]) -> Artifact | None:
    """The lab's artefact of the same size, recorded when it is new; None, with the reason, where there is none."""
    try:
        rival = match(base, artifact.bytes, run=run, made=rivals)
    except ValueError as error:
        run.record(f"ava-{artifact.bytes}b", "kl_divergence", None, "nats/token", note=" ".join(str(error).split()))
        return None
    if rival not in rivals:
        rivals.append(rival)
        record(run, f"ava-{rival.bytes}b", rival, against)
    return rival


def _estimates(run: Run, ours: TokenScores, base: TokenScores) -> list[tuple[str, str, quality.Estimate]]:
    how = {"resamples": run.profile.resamples, "seed": run.seed}
    return [
        ("kl_divergence", "nats/token", quality.mean(ours.kl, **how)),
        ("kl_divergence_p99", "nats/token", scoring.tail(ours.kl, **how)),
        ("top1_agreement", "1", quality.mean(ours.agrees, **how)),
        ("perplexity", "1", quality.perplexity(ours.nll, **how)),
        ("loss_rise", "nats/token", quality.paired_difference(ours.nll, base.nll, **how)),
    ]


def _shown(run: Run) -> str:
    """A line a subject: bytes, seconds, and for each text the KL divergence and the lab's ratio to it."""
    columns = ("artifact_bytes", "compress_seconds", *(f"{m}:{t}" for t in run.profile.eval_texts for m in SHOWN))
    found = {(r.subject, r.metric): r for r in run.records}
    lines = []
    for subject in dict.fromkeys(r.subject for r in run.records):
        cells = [found.get((subject, column)) for column in columns]
        values = " ".join(f"{c.value:14.6g}" if c and c.value is not None else f"{'-':>14}" for c in cells)
        note = next((r.note for r in run.records if r.subject == subject and r.note), "")
        lines.append(f"{subject:28}{values}  {note}".rstrip())
    headings = [c.removeprefix("artifact_").removeprefix("compress_").replace("_divergence", "") for c in columns]
    return "\n".join([f"{'subject':28}" + " ".join(f"{heading[:14]:>14}" for heading in headings), *lines])


def main() -> None:
    """Compare peers with the lab's compressor on one model; prints a table."""
    parser = argparse.ArgumentParser(prog="python -m avalab.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="", help="asset, folder or hub id; the profile's own without it")
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", default=",".join(SHORT), help=f"names joined by commas; all: {', '.join(NAMES)}")
    options = parser.parse_args()
    names = options.peers.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        parser.error(f"unknown peer {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    run = Run("peers", options.profile, options.seed, options.model)
    compare(run, names)
    print(_shown(run))
    print(f"load average {load_average()}; records: {run.records_path.relative_to(ROOT)}")


def _library(method: str, bits: int, group_size: int) -> Peer:
    row = quantized(method, bits=bits, group_size=group_size, symmetric=False)
    return Peer(row, "llmcompressor")


def _int8(peer: Peer) -> Peer:
    return replace(peer, make=with_int8_embedding(peer.make), embedding="int8, a scale a row")


SHOWN = ("kl_divergence", "kl_divergence_p99", "top1_agreement", "perplexity", "kl_ratio")
_GGUF = {"module": "llama_cpp", "install": llamacpp.INSTALL, "embedding": "the mixture's choice"}
_WHOLE = {
    "rtn-w4g64": _library("rtn", 4, 64),
    "rtn-w3g64": _library("rtn", 3, 64),
    "rtn-w2g64": _library("rtn", 2, 64),
    "gptq-w6g64": _library("gptq", 6, 64),
    "gptq-w4g64": _library("gptq", 4, 64),
    "gptq-w3g64": _library("gptq", 3, 64),
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
    "nf4": Peer(quantized("nf4"), "bitsandbytes"),
    "nf4-dq": Peer(quantized("nf4", double_quantization=True), "bitsandbytes"),
    "openvino-int4": Peer(peers_making.openvino, "nncf", openvino.INSTALL, "openvino", "int8, a scale a row"),
    "nncf-int4": Peer(peers_making.nncf, "nncf", openvino.INSTALL, "openvino", "int8, a scale a row"),
    "onnx-k-quant": Peer(peers_making.onnx, "onnxruntime_genai", onnx.INSTALL, "onnx", "int4 in groups of 32"),
    **{f"gguf-{mixture}": Peer(peers_making.gguf(mixture), **_GGUF) for mixture in ("q4_k_m", "q3_k_m", "q2_k")},
}
NAMES: tuple[str, ...] = tuple(PEERS)
# The strongest library and the fairest setting at each size, round-to-nearest beside them: minutes, not hours.
SHORT = ("rtn-w4g64-int8emb", "gptq-w6g64-int8emb", "autoround-w4g64", "autoround-w4g64-int8emb", "nncf-int4")

if __name__ == "__main__":
    main()
