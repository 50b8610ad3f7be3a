"""Chats as rows of tokens for training: several in one row, none of them seeing another, loss on the answers only.

1. `encode` renders a chat through the tokenizer's template and splits it where each answer begins, so that the tokens
   before are exactly those of generation. A label stands at the position that predicts it: no later shift.
2. `pack` fills rows of at most `row_tokens` with whole examples in a seeded order, each into the first row with room
   (first fit, at most twice the fewest rows). Rows are not padded.
3. A row is `input_ids`, `labels`, `position_ids` (from zero in each example) and `boundaries` (where examples begin,
   and the end): attention stays between boundaries (`packed_attention`), so packing changes no loss.

Source: packing without cross-contamination: Krell et al. 2021, arXiv 2107.02027.
What it does not do: cut long examples; one that does not fit is refused.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a label that does not count


@dataclass(frozen=True)
class Encoded:
    """One example: token ids, and at each position the id it has to predict, or IGNORED."""

    ids: list[int]
    labels: list[int]


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> Encoded:
    """A chat that ends with an answer; every answer in it is learned.

    Raises ValueError for a chat that does not end with an assistant's message, or a template that renders the prompt
    differently once it is answered.
    """
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"a chat to learn from ends with an assistant's answer, this one has {_roles(messages)}")
    ids, learned, done = [], [], ""
    for answered in [i for i, message in enumerate(messages) if message["role"] == "assistant" and i]:
        prompt = tokenizer.apply_chat_template(messages[:answered], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: answered + 1], tokenize=False).rstrip()
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise ValueError("the chat template renders an answered prompt differently; answers cannot be told apart")
        # The template's newline after the end token is never generated: it belongs to the next prompt.
        for text, counts in ((prompt[len(done) :], False), (whole[len(prompt) :], True)):
            tokens = tokenizer(text, add_special_tokens=False).input_ids
            ids, learned, done = ids + tokens, learned + [counts] * len(tokens), whole
    labels = [following if counts else IGNORED for following, counts in zip(ids[1:], learned[1:], strict=True)]
    return Encoded(ids, [*labels, IGNORED])


def rows(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[dict], *, row_tokens: int, context: int, seed: int
) -> list[dict[str, Int[Tensor, "..."]]]:
    """Examples (`{"messages": [...]}`) as packed rows for a model that sees `context` tokens at once.

    Raises ValueError naming an example longer than a row or than the context.
    """
    encoded = []
    for number, example in enumerate(examples):
        encoded.append(encode(tokenizer, example["messages"]))
        length = len(encoded[-1].ids)
        if length > context:
            raise ValueError(f"example {number} has {length} tokens, the model's context {context}; leave it out")
        if length > row_tokens:
            raise ValueError(f"example {number} has {length} tokens, a row {row_tokens}; raise row_tokens")
    return pack(encoded, row_tokens=row_tokens, seed=seed)


def fitting(tokenizer: PreTrainedTokenizerBase, examples: Iterable[dict], tokens: int) -> list[dict]:
    """Those of the examples that have at most so many tokens."""
    return [example for example in examples if len(encode(tokenizer, example["messages"]).ids) <= tokens]


def pack(examples: list[Encoded], *, row_tokens: int, seed: int) -> list[dict[str, Int[Tensor, "..."]]]:
    """Rows of whole examples in a seeded order; every example is in exactly one."""
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    filled: list[list[Encoded]] = []
    room: list[int] = []
    for index in order:
        length = len(examples[index].ids)
        place = next((i for i, left in enumerate(room) if left >= length), None)
        if place is None:
            filled.append([])
            room.append(row_tokens)
            place = len(filled) - 1
        filled[place].append(examples[index])
        room[place] -= length
    return [_row(members) for members in filled]


def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of one row, with the batch axis that models expect. Raises ValueError for several rows."""
    if len(batch) != 1:
        raise ValueError(f"a batch is one packed row, got {len(batch)}; use longer rows or gradient accumulation")
    return {name: value if name == "boundaries" else value[None] for name, value in batch[0].items()}


def _row(members: list[Encoded]) -> dict[str, Tensor]:
    ends = torch.tensor([0] + [len(member.ids) for member in members]).cumsum(0)
    return {
        "input_ids": torch.tensor([i for member in members for i in member.ids]),
        "labels": torch.tensor([label for member in members for label in member.labels]),
        "position_ids": torch.cat([torch.arange(len(member.ids)) for member in members]),
        "boundaries": ends,
    }


def _roles(messages: list[dict]) -> str:
    return ", ".join(message["role"] for message in messages) or "no message"
