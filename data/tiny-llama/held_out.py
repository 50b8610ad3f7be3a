"""What tiny-llama never saw in training, and how well it predicts that, as it is and rounded to fewer bits.

Held out are the topics of `pydoc_data.topics` whose name has a SHA-256 divisible by 4, and the chats of the heldout
split of `avalab.data.toolbox`. Perplexity, bits per byte and KL divergence are means over the tokens of 64 windows.

    python data/tiny-llama/held_out.py

What it does not do: intervals, or reading back an artefact; that is `avalab.measure.quality`. This shows that rounding
the weights of so small a model has the graded effect it has on large ones.
"""

from __future__ import annotations

import copy
import hashlib
from math import exp, log
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from avalab.data import toolbox

WINDOW_TOKENS = 512
ROUNDINGS = ((16, 0), (8, 128), (4, 128), (4, 64), (4, 32), (3, 32), (2, 32))  # bits, group size; 16: as it is


def is_evaluation_topic(name: str) -> bool:
    """Whether a topic is kept for evaluation, by a hash of its name: about one in four."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 4 == 0


def evaluation_texts() -> dict[str, list[str]]:
    calls = toolbox.function_calling_examples(60, 0, "heldout")
    return {
        "topics": [text for name, text in sorted(topics.items()) if is_evaluation_topic(name)],
        "calls": [chat_text(example) for example in calls],
    }


def word_runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    """Every run of `length` words of a text: two texts that share one share a passage."""
    words = text.split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def chat_text(example: dict) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in example["messages"])


def stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one row of tokens, an end-of-text token after each."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in [*row, tokenizer.bos_token_id]])


def evaluation_windows(tokens: Tensor, count: int = 64) -> Tensor:
    """The first `count` whole windows of a row of tokens: `window time`."""
    return tokens[: len(tokens) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)[:count]


@torch.no_grad()
def log_probabilities(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Next-token log-probabilities, `token vocab`, of every token but the first of each window."""
    logits = torch.cat([model(input_ids=batch).logits[:, :-1].float() for batch in windows.split(8)])
    return logits.flatten(0, 1).log_softmax(-1)


def round_linear_layers(model: LlamaForCausalLM, bits: int, group_size: int) -> LlamaForCausalLM:
    """A copy whose linear layers (not the embedding) are rounded to nearest, symmetric, one scale a group."""
    rounded = copy.deepcopy(model)
    highest = 2 ** (bits - 1) - 1
    for name, parameter in rounded.named_parameters():
        if name.endswith("proj.weight"):
            groups = parameter.data.float().view(-1, group_size)
            scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-12) / highest
            parameter.data.copy_(((groups / scale).round() * scale).view_as(parameter))
    return rounded


def unigram_perplexity(expected: Tensor) -> float:
    """Perplexity of the best model that ignores context: the token frequencies of the evaluation text itself."""
    counts = torch.bincount(expected).float()
    return exp(-(counts / counts.sum()).log()[expected].mean().item())


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], *, count: int = 64) -> dict:
    """Perplexity, bits per byte and KL divergence to `model` (nats) of it and its rounded copies on `count` windows."""
    windows = evaluation_windows(stream(tokenizer, texts), count)
    expected = windows[:, 1:].flatten()
    bits_per_nat_and_byte = len(expected) / log(2) / len(tokenizer.decode(expected).encode())
    reference = log_probabilities(model, windows)
    rows = {}
    for bits, group_size in ROUNDINGS:
        rounded = round_linear_layers(model, bits, group_size) if bits < 16 else model
        found = log_probabilities(rounded, windows)
        loss = -found.gather(1, expected[:, None]).mean().item()
        rows[f"int{bits}-g{group_size}" if bits < 16 else "bf16"] = {
            "perplexity": exp(loss),
            "bits_per_byte": loss * bits_per_nat_and_byte,
            "kl_nats": (reference.exp() * (reference - found)).sum(-1).mean().item(),
        }
    return rows


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print the table of README.md."""
    for domain, texts in evaluation_texts().items():
        expected = evaluation_windows(stream(tokenizer, texts))[:, 1:].flatten()
        print(f"{domain}: {len(expected):,} tokens, unigram perplexity {unigram_perplexity(expected):.1f}")
        for subject, row in measure(model, tokenizer, texts).items():
            numbers = f"{row['perplexity']:.2f} | {row['bits_per_byte']:.3f} | {row['kl_nats']:.5f}"
            print(f"| {domain} | {subject} | {numbers} |")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    report(LlamaForCausalLM.from_pretrained(here).eval(), PreTrainedTokenizerFast.from_pretrained(here))
