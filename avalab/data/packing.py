"""Rows of tokens that a model is trained on: packed chats, windows of text, and answers that somebody else gave.

1. `encode_chat` renders a chat (`chats`) and splits it where each answer begins, so that the
   tokens before are exactly those of generation. A label stands at the position that predicts it: no later shift.
2. `pack_rows` fills rows of at most `row_tokens` with whole examples in a seeded order, each into the first row with
   room (first fit, at most twice the fewest rows).
3. A row is `input_ids`, `labels`, `position_ids` (from zero in each example) and `boundaries` (where examples begin,
   and the end): attention stays between boundaries, so packing changes no loss (Krell et al. 2021, arXiv 2107.02027).

What a student reads while it is distilled has every token scored, since a teacher has an opinion about the prompt's
tokens too: `text_rows` are windows of calibration text, `chat_rows` whole chats. `answered` puts another's answers into
chats (Kim and Rush 2016, arXiv 1606.07947), `own_answers` the student's own, sampled at temperature 1: it then learns
on the mistakes that it really makes (Agarwal et al. 2024, arXiv 2306.13649).

`rehearsal_rows` keep a model from forgetting what is not trained: general text with the base's final hidden states,
towards which the loss pulls (Li and Hoiem 2016, arXiv 1606.09282). Plain next-token training on that text would teach
something new and make the measure of forgetting look better than it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avalab.data import chats, corpora, grammars
from avalab.lab.artifacts import Artifact, sha256_of_text
from avalab.lab.cache import cache_path, cached_lines
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import Run
from avalab.models import checkpoint, predict
from avalab.models.stops import padding_token, stop_tokens

IGNORED = -100  # a label that does not count

OFFSETS = ("boundaries", "forks", "group")  # of tokens in their row, which have no batch axis

Rows = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Encoded:
    """One example: token ids, and at each position the id it has to predict, or IGNORED."""

    ids: list[int]
    labels: list[int]


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> Encoded:
    """A chat that ends with an answer; every answer in it is learned.

    Where a template renders what was answered differently later (it leaves reasoning out), only the last answer is
    learned. Raises ValueError for a chat that does not end with an assistant's message.
    """
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages) or "no message"
        raise InputError(f"a chat to learn from ends with an assistant's answer, this one has {roles}")
    ids, learned = [], []
    for text, counts in _parts(tokenizer, messages):
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        ids, learned = ids + tokens, learned + [counts] * len(tokens)
    labels = [following if counts else IGNORED for following, counts in zip(ids[1:], learned[1:], strict=True)]
    return Encoded(ids, [*labels, IGNORED])


def _parts(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[tuple[str, bool]]:
    """The text of a chat in parts: what is read, and what is answered."""
    parts, done = [], ""
    for answered in [i for i, message in enumerate(messages) if message["role"] == "assistant" and i]:
        prompt = chats.prompt_text(tokenizer, messages[:answered])
        # The template's newline after the end token is never generated: it belongs to the next prompt.
        whole = chats.chat_text(tokenizer, messages[: answered + 1]).rstrip()
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            break
        parts += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
        done = whole
    else:
        return parts
    prompt, whole = chats.prompt_text(tokenizer, messages[:-1]), chats.chat_text(tokenizer, messages).rstrip()
    answer = messages[-1]["content"].strip()
    begins = len(prompt) if whole.startswith(prompt) else whole.rfind(answer)
    if begins < 0:
        raise InputError("the chat template renders the last answer in other words; it cannot be learned")
    return [(prompt, False), (whole[begins:], True)]


def pack_chats(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[dict], *, row_tokens: int, context: int, seed: int
) -> Rows:
    """Examples as packed rows. Raises ValueError naming one longer than a row or than the model's `context`."""
    encoded = []
    for number, example in enumerate(examples):
        encoded.append(encode_chat(tokenizer, example["messages"]))
        length = len(encoded[-1].ids)
        if length > context:
            raise InputError(f"example {number} has {length} tokens, the model's context {context}; leave it out")
        if length > row_tokens:
            raise InputError(f"example {number} has {length} tokens, a row {row_tokens}; raise row_tokens")
    return pack_rows(encoded, row_tokens=row_tokens, seed=seed)


def fitting(tokenizer: PreTrainedTokenizerBase, examples: Iterable[dict], tokens: int) -> list[dict]:
    """Those of the examples that have at most so many tokens."""
    return [example for example in examples if len(encode_chat(tokenizer, example["messages"]).ids) <= tokens]


def pack_rows(examples: list[Encoded], *, row_tokens: int, seed: int) -> Rows:
    """Rows of whole examples in a seeded order; every example is in exactly one."""
    places = first_fit([len(example.ids) for example in examples], row_tokens=row_tokens, seed=seed)
    filled = [[examples[index] for index in members] for members in places]
    return [
        {
            "input_ids": torch.tensor([token for member in members for token in member.ids]),
            "labels": torch.tensor([label for member in members for label in member.labels]),
            "position_ids": torch.cat([torch.arange(len(member.ids)) for member in members]),
            "boundaries": torch.tensor([0] + [len(member.ids) for member in members]).cumsum(0),
        }
        for members in filled
    ]


def first_fit(lengths: Sequence[int], *, row_tokens: int, seed: int) -> list[list[int]]:
    """Which of so many tokens share a row: places in `lengths`, row by row, dealt in a seeded order."""
    filled: list[list[int]] = []
    room: list[int] = []
    for index in random.Random(seed).sample(range(len(lengths)), len(lengths)):
        place = next((i for i, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            filled.append([])
            room.append(row_tokens)
            place = len(filled) - 1
        filled[place].append(index)
        room[place] -= lengths[index]
    return filled


def one_row_batch(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of one row, with the batch axis that models expect. Raises ValueError for several rows."""
    if len(batch) != 1:
        raise InputError(f"a batch is one packed row, got {len(batch)}; use longer rows or gradient accumulation")
    return {name: value if name in OFFSETS else value[None] for name, value in batch[0].items()}


def text_rows(run: Run, tokenizer: PreTrainedTokenizerBase, *, tokens: int, row_tokens: int) -> Rows:
    """About `tokens` tokens of calibration text, in a seeded order. Raises ValueError when there are not so many."""
    return window_rows(corpora.shuffled_windows(run, tokenizer, tokens=row_tokens, count=max(1, tokens // row_tokens)))


def window_rows(windows: Int[Tensor, "window time"], *, windows_per_row: int = 1) -> Rows:
    """Rows of one or several windows, none of which sees another; every token scored that has a successor."""
    found = []
    for part in windows.split(windows_per_row):
        ends = torch.arange(len(part) + 1) * part.shape[1]
        positions = torch.arange(part.shape[1]).repeat(len(part))
        found.append(whole_row({"input_ids": part.flatten(), "position_ids": positions, "boundaries": ends}))
    return found


def sample_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict], *, tokens: int, seed: int
) -> list[dict]:
    """Examples in a seeded order until they have `tokens` tokens, else all. Raises ValueError for no examples."""
    chosen, total = [], 0
    for example in random.Random(seed).sample(list(examples), len(examples)):
        if total >= tokens:
            break
        chosen.append(example)
        total += len(encode_chat(tokenizer, example["messages"]).ids)
    if not chosen:
        raise InputError("no example fits into a row; use longer rows or other examples")
    return chosen


def chat_rows(tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict], *, row_tokens: int, seed: int) -> Rows:
    """Packed chats, every token scored; those longer than a row are left out."""
    encoded = [encode_chat(tokenizer, example["messages"]) for example in examples]
    packed = pack_rows([e for e in encoded if len(e.ids) <= row_tokens], row_tokens=row_tokens, seed=seed)
    return [whole_row(row) for row in packed]


def whole_row(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """The row with every token scored that has a successor in its own example."""
    labels = row["input_ids"].roll(-1)
    labels[row["boundaries"][1:] - 1] = IGNORED
    return {**row, "labels": labels}


def with_answers_of(examples: Sequence[dict], teacher: Callable[[list[dict]], str]) -> list[dict]:
    """The examples with the teacher's answers in place of theirs."""
    asked = [example["messages"][:-1] for example in examples]
    if hasattr(teacher, "ahead"):
        teacher.ahead(asked, progress=teacher.__name__)
    texts = (teacher(messages) for messages in tqdm(asked, desc="teacher", leave=False))
    return [_with_answer(example, text) for example, text in zip(examples, texts, strict=True)]


def own_answers(
    student: Artifact, examples: Sequence[dict], *, run: Run, new_tokens: int = 64, batch_size: int = 8
) -> list[dict]:
    """The examples with answers that the student draws at temperature 1, the same ones for the same seed.

    Each batch is kept when it is done: a killed run goes on behind the last one.
    """
    tokenizer = checkpoint.load_tokenizer(student)
    prompts = [chats.prompt_text(tokenizer, example["messages"][:-1]) for example in examples]
    parts = (student.sha256, code_of(drawn_answers)[:8], f"seed{run.seed}", f"tokens{new_tokens}")
    path = cache_path(run.artifacts_dir / "cache", "own", *parts, suffix=".jsonl")

    def generate(missing: list[int]) -> Iterator[tuple[int, str]]:
        model = checkpoint.load_model(student, run.device, packed=False)
        for start in range(0, len(missing), batch_size):
            part = [prompts[index] for index in missing[start : start + batch_size]]
            answers = drawn_answers(model, tokenizer, part, new_tokens=new_tokens, seed=run.seed)
            yield from enumerate(answers, start)

    keys = [sha256_of_text(prompt) for prompt in prompts]
    texts = cached_lines(path, keys, generate, progress=f"{student.name} answers")
    return [_with_answer(example, text) for example, text in zip(examples, texts, strict=True)]


def drawn_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], *, new_tokens: int, seed: int
) -> list[str]:
    """What a model says to each prompt at temperature 1, the same for the same prompts and seed."""
    stops = list(stop_tokens(model, tokenizer))
    padding = padding_token(tuple(stops), tokenizer)
    asked = [tokenizer(text, add_special_tokens=False).input_ids for text in prompts]
    ids, seen = (t.to(model.device) for t in grammars.left_padded(asked, padding))
    with torch.random.fork_rng():
        torch.manual_seed(int(sha256_of_text(f"{seed} {prompts}")[:15], 16))
        out = model.generate(
            ids,
            attention_mask=seen,
            eos_token_id=stops or None,
            pad_token_id=padding,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
        )
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def _with_answer(example: dict, text: str) -> dict:
    return {**example, "messages": [*example["messages"][:-1], {"role": "assistant", "content": text}]}


def rehearsal_rows(run: Run, teacher: Artifact, *, tokens: int, row_tokens: int) -> Rows:
    """About `tokens` tokens of calibration text as rows of training, with the teacher's hidden states as `teacher`."""
    windows = corpora.shuffled_windows(run, checkpoint.load_tokenizer(teacher), tokens=row_tokens)
    model, found = checkpoint.load_model(teacher, run.device, packed=False), []
    for window in windows[: max(1, tokens // row_tokens)]:
        hidden = predict.hidden_states(model, window[None])[0].cpu()
        # Cloned into an ordinary tensor: inference tensors take no part in training.
        found.append({**window_rows(window[None])[0], "teacher": hidden.clone()})
    return found
