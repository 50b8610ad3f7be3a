"""Train the model of the smoke profile: a Llama of 0.9 million parameters, on text every Python installation holds.

1. Text: the language reference (`pydoc_data.topics`), the docstrings of the standard library's source files (parsed,
   not imported), and function-calling chats of `avalab.data.toolbox`'s train split.
2. Tokenizer: byte-level BPE, 1,024 tokens, trained on the same text.
3. Training: next-token loss on windows drawn from the three sources in fixed shares, AdamW, warm-up and cosine.
4. Evaluation by `held_out.py`, on topics and chats that were never trained on.
5. The files are written to a temporary folder and then renamed: an interrupted training changes nothing.

    python data/tiny-llama/train.py [--steps N]

The seed fixes the data order, and the weights on one machine and Python version; another processor rounds differently.
What it does not do: keep checkpoints. README.md beside this file holds the measured numbers.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import held_out
import torch
from held_out import chat_text, is_evaluation_topic, stream, word_runs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim import lr_scheduler
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from avalab.data import toolbox

HERE = Path(__file__).resolve().parent

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHARES = {"topics": 0.25, "docstrings": 0.45, "calls": 0.30}  # of the training windows
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "pydoc_data", "site-packages"}
BATCH_WINDOWS = 4


def docstrings() -> Iterator[str]:
    """Docstrings of the standard library's source files, by path and then by place in the file."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= 40:
                    yield text


def training_texts(seed: int) -> dict[str, list[str]]:
    """The three sources; none of them holds a passage of an evaluation topic or a heldout tool."""
    # Topics repeat one another ("with" is also a part of "compound") and docstrings repeat topics (pdb).
    seen = set().union(*map(word_runs, held_out.evaluation_texts()["topics"]))
    calls = toolbox.function_calling_examples(6000, seed, "train")
    return {
        "topics": [without(seen, text) for name, text in sorted(topics.items()) if not is_evaluation_topic(name)],
        "docstrings": [without(seen, text) for text in docstrings()],
        "calls": [chat_text(example) for example in calls],
    }


def without(seen: set[tuple[str, ...]], text: str) -> str:
    """The text less every paragraph that shares a run of words with `seen`."""
    return "\n\n".join(part for part in text.split("\n\n") if seen.isdisjoint(word_runs(part)))


def train_tokenizer(texts: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the chats count a tenth, or their few words would take up the vocabulary."""
    bpe = Tokenizer(models.BPE())
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts["topics"] + texts["docstrings"] + texts["calls"][::10], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (HERE / "chat_template.jinja").read_text()
    return tokenizer


def build_model(seed: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama whose linear layers all have 128 or 384 columns: groups of 32, 64 and 128 divide them."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def draw_batch(streams: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """Windows at random places; each window's source is drawn by its share."""
    shares = torch.tensor([SHARES[name] for name in streams])
    sources = list(streams.values())
    rows = []
    for source in torch.multinomial(shares, BATCH_WINDOWS, replacement=True, generator=generator).tolist():
        last = len(sources[source]) - held_out.WINDOW_TOKENS
        start = int(torch.randint(last, (), generator=generator))
        rows.append(sources[source][start : start + held_out.WINDOW_TOKENS])
    return torch.stack(rows)


def build_optimizer(model: LlamaForCausalLM, steps: int) -> tuple[torch.optim.Optimizer, lr_scheduler.LRScheduler]:
    """AdamW and its rate: 4 % warm-up, then a cosine down to a twentieth of the peak; gains are not decayed."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.95))
    warmup = max(1, steps // 25)
    rise = lr_scheduler.LinearLR(optimizer, 0.02, total_iters=warmup)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup), 2e-4)
    return optimizer, lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])


def train(model: LlamaForCausalLM, streams: dict[str, Tensor], steps: int, seed: int) -> None:
    """Change `model` in place: `steps` steps of next-token loss, bf16 products, fp32 weights."""
    generator = torch.Generator().manual_seed(seed)
    optimizer, schedule = build_optimizer(model, steps)
    model.train()
    average = None
    progress = tqdm(range(steps), desc="train", mininterval=2)
    for _ in progress:
        tokens = draw_batch(streams, generator)
        with torch.autocast("cpu", torch.bfloat16):  # 1.7 times as fast where the processor has bf16 products
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        progress.set_postfix(loss_nats=f"{average:.3f}", refresh=False)
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer to a temporary folder, then move each file into place."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tiny-llama-") as name:
        temporary = Path(name)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        described = json.loads((temporary / "tokenizer.json").read_text())
        (temporary / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False, separators=(",", ":")))
        for path in sorted(temporary.iterdir()):
            path.chmod(0o644)
            path.replace(folder / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder that receives the model (default: this one)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the same order of sums on every run
    texts = training_texts(options.seed)
    tokenizer = train_tokenizer(texts)
    streams = {name: stream(tokenizer, rows) for name, rows in texts.items()}
    model = build_model(options.seed, tokenizer)
    print(f"{model.num_parameters():,} parameters; tokens:", {name: f"{len(row):,}" for name, row in streams.items()})
    began = time.monotonic()
    train(model, streams, options.steps, options.seed)
    print(f"{options.steps} steps in {time.monotonic() - began:.0f} s")
    model = model.to(torch.bfloat16)
    held_out.report(model, tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
