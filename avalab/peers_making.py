"""One function a kind of peer: from a base and a run to an artefact folder, cached by recipe and code.

Each function here takes a peer's parameters and returns a `Maker`. What `quantize` can do already goes through it, with
its cache and its timing; the rest is written by `_made`, which times the filling of the folder as `quantize` does.

What it does not do: name peers (see `peers`), or check that a library is there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from avalab import (
    artifacts,
    corpora,
    hqq_checkpoint,
    models,
    packing,
    peers_autoround,
    peers_embedding,
    peers_runtimes,
    quantize,
)
from avalab.artifacts import Artifact
from avalab.compressors import Job
from avalab.engines import gguf, llamacpp, openvino
from avalab.experiment import Run

Maker = Callable[[Artifact, Run], Artifact]
ITERATIONS = 50  # of AutoRound: a quarter of its default


def quantized(method: str, **parameters) -> Maker:
    """A method of `quantize`."""
    return lambda base, run: quantize.write(base, method, run=run, **parameters)


def autoround(bits: int, group_size: int) -> Maker:
    """AutoRound on the run's calibration windows, asymmetric."""
    parameters = {"bits": bits, "group_size": group_size, "iterations": ITERATIONS}

    def make(base: Artifact, run: Run) -> Artifact:
        def fill(folder: Path) -> dict:
            tokenizer = models.load_tokenizer(base)
            windows = corpora.calibration_windows(run, tokenizer)
            standard_logger("autoround")
            packed = peers_autoround.compress(Job(base.path, run.device, parameters, [], windows), seed=run.seed)
            packed.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return packed.measured

        step = {"step": "autoround", **parameters, **_calibration(run), "code": _code(peers_autoround, packing)}
        return _made(base, run, f"autoround-w{bits}g{group_size}-asym", step, fill, format="compressed-tensors")

    return make


def hqq(bits: int, group_size: int, *, int8_embedding: bool = False) -> Maker:
    """HQQ with its defaults, in its own storage; the embedding in bf16 or int8 rows."""

    def make(base: Artifact, run: Run) -> Artifact:
        def fill(folder: Path) -> None:
            model = models.load(base)
            embedding = next(name for name, m in model.named_modules() if m is model.get_input_embeddings())
            layers = list(models.linear_layers(model))
            others = {n: p.detach() for n, p in model.named_parameters() if n.removesuffix(".weight") not in layers}
            if int8_embedding:
                table = f"{embedding}.weight"
                others[table], others[f"{table}_scale"] = packing.int8_rows(others[table])
            with quantize.quietly():
                hqq_checkpoint.write(model, layers, folder, bits=bits, group_size=group_size, others=others)
            models.load_tokenizer(base).save_pretrained(folder)

        step = {"step": "hqq", "bits": bits, "group_size": group_size, "int8_embedding": int8_embedding}
        name = f"hqq-w{bits}g{group_size}" + ("-int8emb" if int8_embedding else "")
        return _made(base, run, name, step | {"code": _code(hqq_checkpoint, packing)}, fill, format="hqq")

    return make


def standard_logger(name: str) -> None:
    """Give a library's logger the standard class back: NNCF, once imported, makes all new loggers its own.

    Its `warning_once` takes one argument where AutoRound passes two.
    """
    logging.getLogger(name).__class__ = logging.Logger


def with_int8_embedding(make: Maker) -> Maker:
    """Another peer's checkpoint with its embedding in int8; the seconds are those of both steps."""

    def wrapped(base: Artifact, run: Run) -> Artifact:
        source = make(base, run)
        before = source.card["measured"]["compress_seconds"]

        def fill(folder: Path) -> dict:
            peers_embedding.write(source.path, folder)
            return {"seconds_before": before}

        step = {"step": "int8-embedding", "code": _code(peers_embedding, packing)}
        return _made(source, run, "int8emb", step, fill, format="compressed-tensors")

    return wrapped


def nncf(base: Artifact, run: Run) -> Artifact:
    """NNCF's int4 with AWQ and scale estimation, for OpenVINO."""

    def fill(folder: Path) -> None:
        windows = corpora.calibration_windows(run, models.load_tokenizer(base))
        peers_runtimes.nncf_int4(base.path, folder, windows)

    step = {"step": "nncf-int4", **_calibration(run), "code": _code(peers_runtimes)}
    return _made(base, run, "nncf-int4", step, fill, format="openvino-int4", engines=["openvino"])


def openvino_int4(base: Artifact, run: Run) -> Artifact:
    """NNCF's int4 without data, as `avalab export` writes it."""

    def fill(folder: Path) -> None:
        openvino.export(base.path, folder, "int4")

    step = {"step": "openvino-int4", "code": _code(openvino)}
    return _made(base, run, "openvino-int4", step, fill, format="openvino-int4", engines=["openvino"])


def onnx(base: Artifact, run: Run) -> Artifact:
    """ONNX Runtime's k-quant."""

    def fill(folder: Path) -> None:
        peers_runtimes.onnx_k_quant(base.path, folder)

    step = {"step": "onnx-k-quant", "code": _code(peers_runtimes)}
    return _made(base, run, "onnx-k-quant", step, fill, format="onnx-int4", engines=["onnx"])


def gguf_mixture(block: str) -> Maker:
    """llama.cpp's own quantisation into a mixture of block types, with an importance matrix from the run's windows."""

    def make(base: Artifact, run: Run) -> Artifact:
        def fill(folder: Path) -> dict:
            windows = corpora.calibration_windows(run, models.load_tokenizer(base))
            return llamacpp.quantise(base, folder, block, windows)

        step = {"step": "llama.cpp", "mixture": block, **_calibration(run), "code": _code(llamacpp, gguf)}
        return _made(base, run, f"gguf-{block}", step, fill, format="gguf", engines=gguf.ENGINES)

    return make


def _made(
    base: Artifact,
    run: Run,
    name: str,
    step: dict,
    fill: Callable[[Path], dict | None],
    *,
    format: str,
    engines: Iterable[str] = ("torch",),
) -> Artifact:
    """The artefact `<base>+<name>`, reused when its recipe and base are the same; `compress_seconds` is in its card."""
    name, recipe = f"{base.name}+{name}", [*base.card["recipe"], step]
    found = artifacts.find(name, run.artifacts_dir, recipe, base.sha256)
    if found:
        return found

    def save(folder: Path) -> dict:
        start = time.perf_counter()
        measured = fill(folder) or {}
        return measured | {"compress_seconds": time.perf_counter() - start + measured.get("seconds_before", 0)}

    origin = {"name": base.name, "sha256": base.sha256}
    about = {"format": format, "engines": engines, "licence": base.card["licence"]}
    return artifacts.write(name, run.artifacts_dir, save, base=origin, recipe=recipe, **about)


def _calibration(run: Run) -> dict:
    return {"seed": run.seed, "calibration": [run.profile.calibration_samples, run.profile.calibration_tokens]}


def _code(*modules: ModuleType) -> str:
    return artifacts.code_sha256(Path(module.__file__) for module in modules)[:12]
