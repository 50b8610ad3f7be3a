"""Engines: run an artefact elsewhere, one file an engine, the same verbs in each.

`load(name, artifact, **options)` is the way in; the options are those of the engine's own `load`. An engine whose
library is missing raises `EngineUnavailable`, one that cannot read an artefact `NotSupported`.

What it does not do: import any engine's library before that engine is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from avalab.artifacts import Artifact
from avalab.engines import aot, executorch, llamacpp, onnx, onnxruntime, openvino, tensorrt, torch, vllm
from avalab.engines.engine import Engine
from avalab.engines.kinds import EngineUnavailable, NotSupported

ENGINES: dict[str, Callable[..., Engine]] = {
    "torch": torch.load,
    "openvino": openvino.load,
    "onnx": onnx.load,
    "llamacpp": llamacpp.load,
    "onnxruntime": onnxruntime.load,
    "aot": aot.load,
    "executorch": executorch.load,
    "vllm": vllm.load,
    "tensorrt": tensorrt.load,
}


def load(name: str, artifact: Artifact | Path, **options) -> Engine:
    """Open an artefact in the engine of that name.

    Raises ValueError for an unknown engine, EngineUnavailable without its library, NotSupported for an artefact that
    it cannot read.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    return ENGINES[name](artifact, **options)


__all__ = ["ENGINES", "Engine", "EngineUnavailable", "NotSupported", "load"]
