"""A .gguf file whose tensors have types of their own: what it holds, what it will weigh, and how it is written.

Header, tokenizer, names and the order of rows are those of `engines.gguf`; a tensor that was rounded brings its bytes
along, any other one stays bf16, or float32 if it is a vector. The size is known before: header and tokenizer are
written once without tensors, entries and alignment are counted at their most.

What it does not do: round, or choose types.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel

from avalab.block_rounding import BlockRounded
from avalab.engines import gguf

BF16 = "bf16"
ENTRY_BYTES = 8 + 4 + 2 * 8 + 4 + 8 + 32  # of a tensor in the header, and up to 32 of alignment; its name comes on top

Row = tuple[str, str, np.ndarray]


@dataclass(frozen=True)
class GgufModel:
    """A finished file in memory: its tensors, where configuration and tokenizer are, and what was measured."""

    source: Path
    rows: list[Row]
    config: PreTrainedConfig
    measured: dict

    def save_pretrained(self, folder: Path) -> None:
        """Write the .gguf file, configuration, tokenizer and Ollama's Modelfile."""
        file = Path(folder) / f"{self.source.name}.ava.gguf"
        gguf.write_tensors(self.source, file, self.rows, config=self.config, block=gguf.KEPT)
        gguf.copy_beside(self.source, Path(folder))


def checked_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model that GGUF has names for. Raises ValueError naming the exports that remain."""
    try:
        return gguf.checked_config(folder)
    except ValueError as error:
        raise ValueError(
            f"{error}; `ava` without format=gguf writes an artefact for transformers and vLLM, and `avalab export` "
            "writes the dense model for onnx, onnx-genai and openvino"
        ) from error


def fixed_bytes(folder: Path, config: PreTrainedConfig, model: PreTrainedModel, chosen: Collection[str]) -> int:
    """Bytes that no choice changes: header and tokenizer (written once to see), entries, norms and what was skipped."""
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "header.gguf"
        gguf.write_tensors(folder, file, [], config=config, block=gguf.KEPT)
        header = file.stat().st_size
    named = dict(model.named_parameters())  # a head tied to the embedding is not repeated
    entries = sum(ENTRY_BYTES + len(gguf.file_names(config)(name)) for name in named)
    rest = [p for name, p in named.items() if name.removesuffix(".weight") not in chosen]
    return header + entries + sum((4 if p.ndim == 1 else 2) * p.numel() for p in rest)


def rows(model: PreTrainedModel, config: PreTrainedConfig, rounded: Mapping[str, BlockRounded]) -> list[Row]:
    """Name, type and content of every tensor, rows in the file's order."""
    names, found = gguf.file_names(config), []
    for name, parameter in model.named_parameters():
        part = rounded.get(name.removesuffix(".weight"))
        kind = part.format.name if part else ("f32" if parameter.ndim == 1 else BF16)
        content = part.packed() if part else parameter.detach().cpu()
        content = gguf.in_file_order(name, content, config)
        found.append((names(name), kind, content.numpy() if part else gguf.encoded(content, kind)))
    return found
