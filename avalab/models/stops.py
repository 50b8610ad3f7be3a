"""What ends an answer: every token that configuration, tokenizer or chat template names, for every decoder and export.

Publishers write it in different places, and none of them is complete: `config.json`, `generation_config.json` (where a
list often stands), the tokenizer's `eos_token`, and the token that closes a turn in the chat template. The last one is
found by showing the template an answer and reading what it writes behind it, so that no table of families is needed;
where there is no template, known names of turn ends in the vocabulary stand for it.

The first token is the one that a finished turn ends with, or else the most specific one: what fits into one place of a
file (GGUF's `eos_token_id`) is this one. A number in a configuration that stands for an ordinary piece of text is a
default of transformers' class, and counts only where nothing else names an end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from avalab.lab.artifacts import Artifact
from avalab.models import loading

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>")

MARK = "4711 is the answer."

Source = Artifact | Path | PreTrainedModel | PreTrainedConfig | PreTrainedTokenizerBase


def stop_tokens(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, ...]:
    """Ids of all tokens that end an answer, the end of a turn first; empty where nothing names any.

    `source` is a folder or an artefact, with its tokenizer unless one is given; a model or a configuration, with the
    tokenizer given; or a tokenizer alone, where nothing else is known.
    """
    if isinstance(source, PreTrainedTokenizerBase):
        tokenizer = source
    elif tokenizer is None:
        assert isinstance(source, Artifact | Path), "a model or a configuration has no tokenizer of its own"
        tokenizer = loading.read_tokenizer(_folder(source))
    words = set(tokenizer.get_vocab().values())
    marked = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    named = dict.fromkeys([*_turn_end(tokenizer), *_configured(source)])
    if tokenizer.eos_token_id is not None:
        named[tokenizer.eos_token_id] = None
    known = [token for token in named if token in words]
    return tuple([token for token in known if token in marked] or known)


def padding_token(stops: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills the short rows of a batch, where it is masked: the tokenizer's own, else the first end, else id 0."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The first token of its own that the chat template writes behind an answer."""
    behind = _behind_an_answer(tokenizer)
    if behind is None:
        vocabulary = tokenizer.get_vocab()
        return [vocabulary[text] for text in TURN_ENDS if text in vocabulary]
    own = tokenizer.added_tokens_decoder
    ids = tokenizer(behind, add_special_tokens=False).input_ids if behind else []
    return [index for index in ids if index in own and str(own[index]).strip()][:1]


def _behind_an_answer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text behind an assistant's answer; None without a template, or one that shows no answer."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": MARK}]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]
    for messages in (chat, parts):  # some templates read a list of parts only
        try:
            _, found, behind = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(MARK)
        except (TemplateError, TypeError, ValueError, KeyError):
            continue
        if found:
            return behind
    return None


def _configured(source: Source) -> Iterator[int]:
    """The end tokens of generation configuration and configuration, in this order."""
    if isinstance(source, PreTrainedModel):
        told = [source.generation_config and source.generation_config.eos_token_id, source.config.eos_token_id]
    elif isinstance(source, PreTrainedTokenizerBase):
        told = []
    elif isinstance(source, PreTrainedConfig):
        told = [getattr(source.get_text_config(), "eos_token_id", None)]
    else:
        files = (_folder(source) / name for name in (loading.GENERATION, "config.json"))
        told = [loading.told_ids(file, "eos_token_id") for file in files]
    for found in told:
        yield from found if isinstance(found, list) else [] if found is None else [found]


def _folder(source: Artifact | Path) -> Path:
    return source.path if isinstance(source, Artifact) else source
