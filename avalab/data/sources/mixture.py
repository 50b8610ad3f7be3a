"""Calibration text of many kinds: what a compressed model should keep doing, in the shares in which it is to count.

| kind | what it is |
|---|---|
| `docs` | docstrings of the standard library, as `corpora.calibration_windows` gives them |
| `prose` | what the model itself goes on to write after a few words; data-free (Liu et al. 2023, arXiv 2305.17888) |
| `chats` | its own answers to questions, in its chat format |
| `calls` | requests with tools and the calls that answer them: tools of the toolbox that are never evaluated on |

No kind shares its source with an evaluation text: no encyclopedia, no leaderboard and no corpus of dialogue is read.
Samples are drawn at temperature 1 from the whole distribution, seeded, and kept under the model's hash, so that every
method calibrates on the same ones. Windows of the kinds take turns, so that any first few hold them all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from avalab.data import chats, corpora, toolbox
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cache_path, cached_document
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import Run
from avalab.models import checkpoint

BEGINNINGS = (
    "The", "In", "A", "It was", "When", "During the", "After", "She", "He", "They", "On the", "According to",
    "For many", "Once", "There is", "Although", "Most people", "In the early", "One of the", "The history of", "My",
    "Yesterday",
)  # fmt: skip

QUESTIONS = (
    "What is the difference between a lake and a river?", "How do I boil an egg?", "Tell me about your favourite book.",
    "Why is the sky blue?", "Write a short letter to a friend.", "How does a bicycle stay upright?", "Who are you?",
    "Give me advice for a long walk.", "What happens at night in a forest?", "Explain what money is to a child.",
    "Write a function that reverses a list.", "Summarise what makes a good meeting.", "How are you today?",
    "Which animals live in cold places?", "Plan a day in an old town.", "What should I cook tonight?",
)  # fmt: skip

SAMPLES_AT_ONCE = 16

CALL_EXAMPLES = 400  # of the toolbox; more than any profile's windows need

Kind = Callable[[Run, Artifact, PreTrainedTokenizerBase, int], Int[Tensor, "window time"]]


def mixed_windows(run: Run, base: Artifact) -> Int[Tensor, "window time"]:
    """Calibration windows of the profile's number and length, as many of each kind as that gives, in turns.

    Raises ValueError where a kind has not enough text.
    """
    tokenizer, count = checkpoint.load_tokenizer(base), run.profile.calibration_samples
    shares = [count // len(KINDS) + (place < count % len(KINDS)) for place in range(len(KINDS))]
    found = [kind(run, base, tokenizer, share) for kind, share in zip(KINDS.values(), shares, strict=True) if share]
    for name, share, windows in zip(KINDS, shares, found, strict=False):
        if len(windows) < share:
            raise InputError(f"{name} of the calibration mix has {len(windows)} windows, asked for {share}")
    return torch.stack([windows[turn] for turn in range(max(shares)) for windows in found if turn < len(windows)])


def _docs(run: Run, base: Artifact, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    return corpora.calibration_windows(run, tokenizer)[:count]


def _prose(run: Run, base: Artifact, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    return sampled_windows(run, base, "prose", list(BEGINNINGS), count)


def _chats(run: Run, base: Artifact, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    asked = [chats.prompt_text(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    return sampled_windows(run, base, "chats", asked, count)


def _calls(run: Run, base: Artifact, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    examples = toolbox.function_calling_examples(CALL_EXAMPLES, seed=run.seed + 3, split="train")
    text = "".join(chats.chat_text(tokenizer, example["messages"]) for example in examples)
    source = corpora.Text("calls", text)
    return corpora.windows(source, tokenizer, count=count, tokens=run.profile.calibration_tokens)


KINDS: dict[str, Kind] = {"docs": _docs, "prose": _prose, "chats": _chats, "calls": _calls}


def sampled_windows(
    run: Run, base: Artifact, name: str, beginnings: list[str], count: int
) -> Int[Tensor, "window time"]:
    """`count` windows that a model writes after beginnings in turn, which are part of them; kept once written."""
    tokens, seed = run.profile.calibration_tokens, run.seed
    parts = (name, base.sha256, code_of("avalab.data.sources.mixture:sample")[:8], f"{count}x{tokens}", str(seed))
    path = cache_path(run.artifacts_dir / "cache", "own-text", *parts, suffix=".json")

    def write() -> dict:
        model, tokenizer = checkpoint.load_model(base, run.device), checkpoint.load_tokenizer(base)
        prompts = [tokenizer(beginnings[place % len(beginnings)]).input_ids[:tokens] for place in range(count)]
        return {"windows": sample(model, prompts, tokens, seed=seed)}

    return torch.tensor(cached_document(path, write)["windows"])


@torch.inference_mode()
def sample(model, prompts: list[list[int]], tokens: int, *, seed: int) -> list[list[int]]:
    """Every prompt and what the model draws after it, `tokens` in all; an end of text is a token like others."""
    generator = torch.Generator(model.device).manual_seed(seed)
    windows = []
    for first in range(0, len(prompts), SAMPLES_AT_ONCE):
        group = prompts[first : first + SAMPLES_AT_ONCE]
        for size in sorted({len(prompt) for prompt in group}):
            rows = torch.tensor([prompt for prompt in group if len(prompt) == size], device=model.device)
            cache = None
            while rows.shape[1] < tokens:
                given = model(rows if cache is None else rows[:, -1:], past_key_values=cache, use_cache=True)
                cache, odds = given.past_key_values, given.logits[:, -1].float().softmax(-1)
                rows = torch.cat([rows, torch.multinomial(odds, 1, generator=generator)], 1)
            windows += rows.tolist()
    return windows
