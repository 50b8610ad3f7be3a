"""What a student reads while it is distilled: general text, whole chats, and answers that somebody else gave.

- `text_rows`: windows of calibration text, every token scored; it shares no eight words with an evaluation text.
- `chat_rows`: packed chats, every token scored, since a teacher has an opinion about the prompt's tokens too.
- `answered`: the same prompts with the answers of a function from messages to text, such as `teachers.endpoint`: what
  a student can learn from a teacher that shows no probabilities (Kim and Rush 2016, arXiv 1606.07947).
- `own_answers`: the same prompts with what the student itself says, sampled at temperature 1: with the teacher's loss
  on them it learns on the mistakes that it really makes (on-policy: Agarwal et al. 2024, arXiv 2306.13649).

What it does not do: judge answers (`gates` does), or generate anew at every step: a round of answers is a data set.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from avalab import corpora, grammars, models, packed_rows
from avalab.artifacts import Artifact
from avalab.experiment import Run
from avalab.packed_rows import IGNORED

Rows = list[dict[str, Tensor]]


def text_rows(run: Run, tokenizer: PreTrainedTokenizerBase, *, tokens: int, row_tokens: int) -> Rows:
    """About `tokens` tokens of calibration text in rows of `row_tokens`, in a seeded order.

    Raises ValueError when there is not so much text.
    """
    text = corpora.calibration_text(tokenizer, evaluation=corpora.evaluation_texts(run, tokenizer))
    everything = corpora.windows(text, tokenizer, count=10**6, tokens=row_tokens)
    count = max(1, tokens // row_tokens)
    if count > len(everything):
        raise ValueError(f"{tokens} tokens asked for, there are {everything.numel()}")
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(run.seed))
    return [window_row(window) for window in everything[order[:count]]]


def window_row(window: Int[Tensor, "token"]) -> dict[str, Tensor]:
    """A row of one text, each token predicting the next."""
    row = {"input_ids": window, "position_ids": torch.arange(len(window)), "boundaries": torch.tensor([0, len(window)])}
    return whole_row(row)


def about(tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict], *, tokens: int, seed: int) -> list[dict]:
    """The first examples in a seeded order that have `tokens` tokens together; all where there are fewer.

    Raises ValueError when there are none.
    """
    chosen, total = [], 0
    for example in random.Random(seed).sample(list(examples), len(examples)):
        if total >= tokens:
            break
        chosen.append(example)
        total += len(packed_rows.encode(tokenizer, example["messages"]).ids)
    if not chosen:
        raise ValueError("no example fits into a row; use longer rows or other examples")
    return chosen


def chat_rows(tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict], *, row_tokens: int, seed: int) -> Rows:
    """Packed chats, every token scored; those longer than a row are left out."""
    fitting = packed_rows.fitting(tokenizer, examples, row_tokens)
    packed = packed_rows.rows(tokenizer, fitting, row_tokens=row_tokens, context=row_tokens, seed=seed)
    return [whole_row(row) for row in packed]


def whole_row(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """The row with every token scored that has a successor in its own example."""
    labels = row["input_ids"].roll(-1)
    labels[row["boundaries"][1:] - 1] = IGNORED
    return {**row, "labels": labels}


def answered(examples: Sequence[dict], teacher: Callable[[list[dict]], str]) -> list[dict]:
    """The examples with the teacher's answers in place of theirs; teachers keep their answers, so a stop costs none."""
    asked = [example["messages"][:-1] for example in examples]
    if hasattr(teacher, "ahead"):
        teacher.ahead(asked, progress=teacher.__name__)
    texts = (teacher(messages) for messages in tqdm(asked, desc="teacher", leave=False))
    return [_with_answer(example, text) for example, text in zip(examples, texts, strict=True)]


def own_answers(
    student: Artifact, examples: Sequence[dict], *, run: Run, new_tokens: int = 64, batch_size: int = 8
) -> list[dict]:
    """The examples with answers that the student draws at temperature 1, the same ones for the same seed."""
    model, tokenizer = models.load(student, run.device), models.load_tokenizer(student)
    stops, found = grammars.stop_tokens(tokenizer), []
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        for start in tqdm(range(0, len(examples), batch_size), desc=f"{student.name} answers", leave=False):
            part = examples[start : start + batch_size]
            prompts = [_prompt(tokenizer, example["messages"][:-1]) for example in part]
            ids, seen = (t.to(model.device) for t in grammars.left_padded(prompts, stops[0]))
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new_tokens}
            out = model.generate(ids, attention_mask=seen, eos_token_id=stops, pad_token_id=stops[0], **how)
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            found += [_with_answer(example, text) for example, text in zip(part, texts, strict=True)]
    return found


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def _with_answer(example: dict, text: str) -> dict:
    return {**example, "messages": [*example["messages"][:-1], {"role": "assistant", "content": text}]}
