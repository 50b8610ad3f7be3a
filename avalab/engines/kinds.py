"""Which artefact is of which kind, which engine reads it, and how an engine says that it cannot.

1. `kind` looks at a folder's files: the engine's own ones first, else `quantization_config` of its config.json.
2. `READERS` is the one table of which engines read which kind; `checked` holds an engine to it.
3. `facts` reads context, vocabulary and end tokens beside the weights, never from the engine's library, so that all
   engines stop alike.

What it does not do: open weights, convert an artefact, or import an engine's library.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from avalab import artifacts, gguf_header, grammars, models
from avalab.artifacts import Artifact

READERS: dict[str, tuple[str, ...]] = {
    "dense": ("torch", "vllm", "tensorrt"),
    "bitsandbytes": ("torch", "vllm"),
    "compressed-tensors": ("torch", "vllm"),
    "torchao": ("torch",),
    "adapter": ("torch",),
    "gguf": ("torch", "openvino", "llamacpp"),
    "openvino": ("openvino",),
    "onnx": ("onnx",),
    "onnx-graph": ("onnxruntime",),
    "aot": ("aot",),
    "executorch": ("executorch",),
}
OWN_FILES = {
    "adapter": models.ADAPTER_CONFIG,
    "openvino": "openvino_model.xml",
    "onnx": "genai_config.json",
    "aot": "model.pt2",
    "executorch": "model.pte",
    "onnx-graph": "model.onnx",  # ONNX Runtime GenAI has one too
}


class EngineUnavailable(RuntimeError):
    """The engine's library or device is missing; the message says how to get it."""


class NotSupported(ValueError):
    """The engine cannot do this; the message names what can."""


@dataclass(frozen=True)
class Facts:
    """What stands beside the weights: longest sequence, number of logits, tokens that end an answer."""

    context: int
    vocabulary: int
    stops: tuple[int, ...]


def kind(folder: Path) -> str:
    """A key of `READERS`. Raises ValueError for a folder without a model, or one quantised by an unknown method."""
    for name, file in OWN_FILES.items():
        if (folder / file).is_file():
            return name
    if list(folder.glob("*.gguf")):
        return "gguf"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no artefact: it holds neither config.json nor a .gguf file")
    quantised = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    found = quantised.get("quant_method", "dense")
    if found not in READERS:
        raise ValueError(f"{folder} is quantised by {found!r}; read are {', '.join(READERS)}")
    return found


def checked(engine: str, artifact: Artifact | Path) -> Path:
    """The artefact's folder. Raises NotSupported naming the engines that can load it when `engine` cannot."""
    folder = Path(artifact.path if isinstance(artifact, Artifact) else artifact)
    found = kind(folder)
    if engine not in READERS[found]:
        able = ", ".join(READERS[found]) or "no engine"
        reads = ", ".join(name for name, engines in READERS.items() if engine in engines)
        raise NotSupported(f"{engine} cannot load {folder.name} ({found}); {able} can. {engine} loads: {reads}")
    return folder


def require(engine: str, module: str, install: str) -> None:
    """Raise EngineUnavailable with the install command when a library cannot be imported."""
    if importlib.util.find_spec(module) is None:
        raise EngineUnavailable(f"engine {engine} needs the package {module}; install it: {install}")


def require_gpu(engine: str) -> None:
    """Raise EngineUnavailable on a machine without an NVIDIA GPU."""
    if not torch.cuda.is_available():
        raise EngineUnavailable(f"engine {engine} needs an NVIDIA GPU; on a processor use openvino, llamacpp or torch")


def facts(folder: Path) -> Facts:
    """Context, vocabulary and end tokens of an artefact; an adapter has its base's."""
    if kind(folder) == "adapter":
        return facts(models.base_of(artifacts.load(folder, verify=False)).path)
    file = {} if (folder / "config.json").is_file() else {"gguf_file": gguf_file(folder).name}
    config = AutoConfig.from_pretrained(folder, **file).get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    return Facts(config.max_position_embeddings, config.vocab_size, tuple(grammars.stop_tokens(tokenizer)))


def gguf_file(folder: Path) -> Path:
    """The one GGUF file of a folder. Raises ValueError for none, several, or one that is damaged (file and offset)."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{folder} has to hold one .gguf file, found {', '.join(f.name for f in files) or 'none'}")
    gguf_header.check(files[0])
    return files[0]
