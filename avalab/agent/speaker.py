"""A model that answers chats in whichever engine runs it, and says what an answer cost.

1. `open_model` takes what a user calls a model: an asset such as `qwen2.5-coder-0.5b-instruct`, a folder, an artefact
   or a GGUF file. A GGUF file is opened as it is, by llama.cpp; its tokenizer, which takes half a minute to read from
   the file, is kept beside a link to it and read from there the next time.
2. `Speaker.say` writes the chat with the model's own template, leaves out the oldest turns where the context is full
   (`serve.chat.fitted`), and decodes greedily, by chance, or within a grammar of calls. llama.cpp keeps what it read:
   a chat that grows is not read again.
3. `Speaker.cost` counts tokens and seconds of all answers so far: methods are compared at equal tokens.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from avalab import engines
from avalab.data import calls, chats, grammars
from avalab.engines import Engine
from avalab.lab import artifacts, assets
from avalab.lab.errors import InputError
from avalab.lab.run import Run
from avalab.models import checkpoint, loading
from avalab.serve import chat as chat_turns

ANSWER_TOKENS = 256

SHARE = 10  # of the context that an answer may have at most: tools and results take the rest of a small one

CONTEXT = 4096  # of llama.cpp's cache; other engines have the model's own


@dataclass(frozen=True)
class Said:
    """An answer, what it cost, and whether it was cut off before its end."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    is_cut: bool
    left_out: int = 0  # messages that had no room


@dataclass
class Cost:
    """Tokens and seconds of the answers so far."""

    answers: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0

    def add(self, said: Said) -> None:
        """Count one answer."""
        self.answers += 1
        self.prompt_tokens += said.prompt_tokens
        self.new_tokens += said.new_tokens
        self.seconds += said.seconds

    def since(self, before: Cost) -> Cost:
        """What was added since a copy was taken."""
        return Cost(*(getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__))

    def copy(self) -> Cost:
        """The numbers as they are now."""
        return Cost(self.answers, self.prompt_tokens, self.new_tokens, self.seconds)


@dataclass
class Speaker:
    """An opened model with its tokenizer."""

    name: str
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    cost: Cost = field(default_factory=Cost)

    @cached_property
    def compiler(self) -> grammars.Compiler:
        """Makes grammars for this tokenizer and this number of logits."""
        return grammars.grammar_compiler(self.tokenizer, self.engine.facts.vocabulary, self.engine.facts.stops)

    def tokens(self, chat: list[dict]) -> list[int]:
        """The chat up to where its next answer begins."""
        return self.tokenizer(chats.prompt_text(self.tokenizer, chat), add_special_tokens=False).input_ids

    def room(self, chat: list[dict], most: int = ANSWER_TOKENS) -> int:
        """Tokens that are left in the context beside a chat and an answer to it; below 0 where it does not fit."""
        return self.engine.facts.context - self._most(most) - len(self.tokens(chat))

    def _most(self, tokens: int) -> int:
        return min(tokens, self.engine.facts.context // SHARE)

    def say(
        self,
        chat: list[dict],
        *,
        most: int = ANSWER_TOKENS,
        functions: list[dict] | None = None,
        refusal: bool = True,
        temperature: float = 0.0,
        seed: int = 0,
        choose: Callable[[Tensor], int] | None = None,
    ) -> Said:
        """The answer to a chat, `most` tokens at most and a tenth of the context.

        With `functions` it is calls to them, or, with `refusal`, a text without one. A temperature draws;
        `choose` picks each token from its logits.
        Raises ValueError where the last request alone has no room.
        """
        most = self._most(most)
        kept = chat_turns.fitted(chat, lambda part: len(self.tokens(part)), self.engine.facts.context - most)
        ids, began = self.tokens(kept), time.perf_counter()
        grammar = grammars.call_grammar(self.compiler, functions, refusal=refusal, max_calls=1) if functions else None
        choose = engines.sampler(temperature, seed) if temperature else choose
        new = self.engine.generate(ids, most, grammar, choose=choose)
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        said = Said(
            text, len(ids), len(new), time.perf_counter() - began, len(new) == most, left_out=len(chat) - len(kept)
        )
        self.cost.add(said)
        return said

    def calls(self, text: str) -> list[calls.Call] | str:
        """The calls in an answer, or why there are none."""
        return calls.parse_calls(text)

    def close(self) -> None:
        """Let go of the weights."""
        self.engine.close()


def open_model(model: str, run: Run, *, engine: str = "", threads: int = 0) -> Speaker:
    """The speaker of a model by a user's name for it; `engine` empty: llama.cpp for GGUF files, torch for folders.

    Raises InputError for a name that is no model, EngineUnavailable without the engine.
    """
    path = Path(model) if (Path(model) / artifacts.CARD).is_file() else assets.resolve_model(model)
    if path.is_dir() and engines.kind(path) == "gguf":
        path = engines.gguf_file(path)
    folder = _beside(path, run) if path.suffix == ".gguf" else path
    chosen = engine or engines.READERS[engines.kind(folder)][-1 if path.suffix == ".gguf" else 0]
    options: dict[str, object] = {"threads": threads} if chosen != "torch" else {}
    if chosen == "llamacpp":
        options |= {"keep_prefix": True, "context": CONTEXT}
    opened = engines.load(chosen, folder, **options)
    return Speaker(path.stem if path.suffix == ".gguf" else path.name, opened, checkpoint.load_tokenizer(folder))


def _beside(file: Path, run: Run) -> Path:
    """A folder with a link to a GGUF file, and the configuration and tokenizer that the file holds."""
    if (file.parent / "tokenizer.json").is_file() and (file.parent / "config.json").is_file():
        return file.parent
    about = file.stat()
    identity = artifacts.sha256_of_text(f"{file.resolve()} {about.st_size} {about.st_mtime_ns}")[:16]
    folder = run.artifacts_dir / "cache" / f"opened-{file.stem}-{identity}"
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        loading.read_tokenizer(file.parent, gguf_file=file.name).save_pretrained(temporary)
        loading.read_config(file.parent, gguf_file=file.name).save_pretrained(temporary)
        (temporary / file.name).symlink_to(file.resolve())
        temporary.rename(folder)
    except FileExistsError:  # another process was quicker
        shutil.rmtree(temporary)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {error}; make room, or give a folder with a tokenizer"
        ) from error
    return folder
