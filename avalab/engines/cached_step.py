"""A causal language model as one function of tensors, its key-value cache an argument: what the compilers export.

`CachedStep` reads some tokens after those whose keys and values it is given, and returns logits and the new keys and
values; whoever runs it keeps the cache. Positions and the attention mask are arguments too, so that one module serves
a compiler that wants every size free and one that wants every size fixed. Time is the cache's first axis: a cache that
grows is then a contiguous piece of a larger buffer.

What it does not do: compile, choose tokens, or serve models whose cache is not keys and values of equal size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel


class CachedStep(nn.Module):
    """The model as `forward(ids, positions, mask, kept, keys, values)`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, kept: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits at the places `kept` of `ids`, and what to append to keys and values.

        `ids` (batch, time), `positions` (time), `mask` (time, past + time), added to scores; `keys` and `values`
        (past, layer, batch, head, dim). Shapes stand here, as checking them would tie the sizes that are to be free.
        """
        past = keys.shape[0]
        cache = DynamicCache(config=self.model.config)
        for layer, pair in enumerate(zip(*(part.permute(1, 2, 3, 0, 4) for part in (keys, values)), strict=True)):
            cache.update(*pair, layer)
        output = self.model(
            ids,
            attention_mask=mask[None, None],
            position_ids=positions[None],
            past_key_values=cache,
            logits_to_keep=kept,
        )
        new = [[getattr(layer, part)[:, :, past:] for layer in cache.layers] for part in ("keys", "values")]
        return output.logits, *(torch.stack(part).permute(3, 0, 1, 2, 4) for part in new)


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """What a program has to know to keep the cache: layers, heads, dim, context and vocabulary."""
    config = model.config.get_text_config()
    return {
        "layers": config.num_hidden_layers,
        "heads": config.num_key_value_heads,
        "dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
    }


def example(shape: dict[str, int], *, batch: int, time: int, past: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Arguments of `CachedStep.forward` of some sizes, every logit kept: what an exporter traces the model with."""
    cache = torch.zeros(past, shape["layers"], batch, shape["heads"], shape["dim"], dtype=dtype)
    ids, places = torch.zeros(batch, time, dtype=torch.int64), torch.arange(time)
    mask = torch.zeros(time, past + time, dtype=dtype)
    return ids, places + past, mask, places, cache, cache.clone()
