"""Engines: run an artefact elsewhere, one file an engine, the same verbs in each.

`load(name, artifact, **options)` is the way in; the options are those of the engine's own `load`. An engine whose
library is missing, or crashes here, raises `EngineUnavailable`, one that cannot read an artefact `NotSupported`. No
engine's library is imported before that engine is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from avalab.engines import aot, executorch, llamacpp, tensorrt
from avalab.engines import onnx as genai_folder
from avalab.engines import onnxruntime as onnxruntime_engine
from avalab.engines import openvino as openvino_engine
from avalab.engines import torch as torch_engine
from avalab.engines import vllm as vllm_engine
from avalab.engines.engine import (
    OWN_FILES,
    READERS,
    Engine,
    EngineUnavailable,
    Facts,
    NotSupported,
    gguf_file,
    require,
    sampler,
    usable,
)
from avalab.engines.engine import artifact_kind as kind
from avalab.engines.engine import model_facts as facts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError

__all__ = ["ENGINES", "OWN_FILES", "READERS", "Engine", "EngineUnavailable", "Facts", "NotSupported", "facts",
           "gguf_file", "kind", "load", "require", "sampler", "usable_options"]  # fmt: skip

ENGINES: dict[str, Callable[..., Engine]] = {
    "torch": torch_engine.load,
    "openvino": openvino_engine.load,
    "onnx": genai_folder.load,
    "llamacpp": llamacpp.load,
    "onnxruntime": onnxruntime_engine.load,
    "aot": aot.load,
    "executorch": executorch.load,
    "vllm": vllm_engine.load,
    "tensorrt": tensorrt.load,
}


def load(name: str, artifact: Artifact | Path, **options) -> Engine:
    """Open an artefact in the engine of that name; a child process has opened one of its kind before (`usable`).

    Options that the library does not survive are changed where others are, and `note` and the log say so.
    Raises ValueError for an unknown engine, EngineUnavailable without its library or where it crashes, NotSupported for
    an artefact that it cannot read.
    """
    options, note = usable_options(name, artifact, **options)
    opened = ENGINES[name](artifact, **options)
    return replace(opened, note=note) if note else opened


def usable_options(name: str, artifact: Artifact | Path, **options) -> tuple[dict[str, object], str]:
    """The options with which `load` would open the artefact, and a note, also logged, where they are others."""
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    return usable(name, ENGINES[name], artifact, options)
