"""Readers of several sequences: llama.cpp's batches, and a transformers model over a cache of the lab's own.

torch: keys and values of all slots lie in one block a layer, `slots heads context dim`. A row writes at its own places
and reads its own beginning, which the mask says; rows of a batch are padded at their ends, and what padding wrote is
written over. So slots of different lengths are read in one call, and a prefix is copied by a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from avalab.lab import llamacpp_library
from avalab.lab.llamacpp_library import Row

BATCH = 512  # tokens that llama.cpp reads at once


def tokenizer_beside(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file's folder, or where there is none the one that the file holds."""
    own = {} if (file.parent / "config.json").is_file() else {"gguf_file": file.name}
    return AutoTokenizer.from_pretrained(file.parent, **own)


class LlamaCppReader:
    """A GGUF file in llama.cpp; every slot may grow to `context` tokens, `cells` of them in all (0: as many)."""

    def __init__(
        self,
        file: Path,
        *,
        slots: int,
        context: int,
        cells: int = 0,
        threads: int = 0,
        build: str = "",
        batch: int = 512,
    ) -> None:
        library = llamacpp_library.opened(llamacpp_library.find(build))
        self.slots, self.context = slots, context
        self.model = llamacpp_library.Model(
            library, file, context=cells or slots * context, batch=BATCH, threads=threads, sequences=slots
        )
        self.vocabulary = self.model.vocabulary

    def read(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Read tokens of several slots in one batch."""
        return self.model.read_rows(rows)

    def share(self, source: int, target: int, place: int) -> None:
        """Share the cells of a beginning."""
        self.model.share(source, target, place)

    def forget(self, slot: int, place: int) -> None:
        """Forget a slot's tokens from this place on."""
        self.model.forget(slot, place)

    def close(self) -> None:
        """Let go of weights and cache."""
        self.model.close()


class TorchReader:
    """A transformers model, loaded as any engine's; `slots` sequences of `context` tokens."""

    def __init__(self, model: PreTrainedModel, *, slots: int, context: int) -> None:
        self.model, self.slots, self.context = model, slots, context
        self.cache = SlotCache(model, slots, context)

    @torch.inference_mode()
    def read(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Read tokens of several slots in one call; the head is applied where logits are wanted alone."""
        longest, device = max(len(row.tokens) for row in rows), self.model.device
        width = max(row.place + longest for row in rows)
        ids = torch.tensor([row.tokens + [0] * (longest - len(row.tokens)) for row in rows], device=device)
        places = torch.tensor([row.place for row in rows], device=device)[:, None] + torch.arange(
            longest, device=device
        )
        self.cache.begin([row.sequence for row in rows], places.clamp(max=self.context - 1), min(width, self.context))
        seen = torch.arange(self.cache.width, device=device) <= places[..., None]
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=device).masked_fill(
            ~seen, torch.finfo(self.model.dtype).min
        )
        body = self.model.get_decoder()
        hidden = body(
            input_ids=ids, attention_mask=mask[:, None], position_ids=places, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        ends = [(i, len(row.tokens) - row.wanted, len(row.tokens)) for i, row in enumerate(rows)]
        wanted = torch.cat([hidden[i, begin:end] for i, begin, end in ends])
        logits = self.model.get_output_embeddings()(wanted).float().cpu().numpy()
        return np.split(logits, np.cumsum([row.wanted for row in rows])[:-1])

    def share(self, source: int, target: int, place: int) -> None:
        """Copy a beginning from one slot to another."""
        self.cache.copy(source, target, place)

    def forget(self, slot: int, place: int) -> None:
        """Nothing to do: what lies behind a slot's length is masked, and written over."""

    def close(self) -> None:
        """Let go of the cache."""
        self.cache.blocks.clear()


class SlotCache(Cache):
    """Keys and values of all slots; `begin` says which rows the next call reads, and where they write."""

    def __init__(self, model: PreTrainedModel, slots: int, context: int) -> None:
        self.slots, self.context = slots, context
        self.blocks: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows = self.places = torch.empty(0)
        self.width = 0

    def begin(self, rows: list[int], places: Tensor, width: int) -> None:
        """The next call reads these slots; row i writes at `places[i]`, and reads the first `width` places."""
        self.rows, self.places, self.width = torch.tensor(rows, device=places.device), places, width

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write `batch heads time dim` to the rows' places; what they may read of the layer."""
        if layer_idx not in self.blocks:
            shape = (self.slots, key_states.shape[1], self.context, key_states.shape[3])
            self.blocks[layer_idx] = (key_states.new_zeros(shape), value_states.new_zeros(shape))
        for block, states in zip(self.blocks[layer_idx], (key_states, value_states), strict=True):
            block[self.rows[:, None], :, self.places] = states.transpose(1, 2)
        keys, values = self.blocks[layer_idx]
        return keys[self.rows, :, : self.width], values[self.rows, :, : self.width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those of this call; positions are given, so that it only has to be defined."""
        return 0

    @torch.inference_mode()  # the blocks are made by a reading, in that mode
    def copy(self, source: int, target: int, place: int) -> None:
        """Copy the first `place` tokens of a slot."""
        for blocks in self.blocks.values():
            for block in blocks:
                block[target, :, :place] = block[source, :, :place]
