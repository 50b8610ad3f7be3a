"""Evaluation and calibration text: deterministic, hashed, and disjoint.

Evaluation texts need no download beyond the assets: `python_docs`, a quarter of the topics of Python's language
reference (chosen by a hash of the topic's name: the quarter that data/tiny-llama never trained on); `function_calls`,
tools and requests of the Berkeley Function Calling Leaderboard in the model's chat format; `toolbox_calls`, those of
the held-out tools of `avalab.data.toolbox`. Two come from elsewhere, so that what a method learnt from calibration
text in the style of Python's documentation does not count for it: `encyclopedia`, the leads of some hundred articles of
the English Wikipedia, and `dialogue`, small talk and questions in the model's chat format. `wikitext2` is read from the
hub, at a pinned commit.

Calibration text is the docstrings of the standard library, without those that share eight consecutive words with an
evaluation text. Docstrings and topics belong to the running Python: a text carries its SHA-256, and records repeat it.
"""

from __future__ import annotations

import ast
import bz2
import re
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from pydoc_data.topics import topics
from xml.etree import ElementTree

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from avalab.data import calls, chats, toolbox
from avalab.lab import artifacts, assets
from avalab.lab.errors import InputError
from avalab.lab.run import Run

BFCL_CATEGORIES = ("simple_python", "multiple")

CHAT_EXAMPLES = 400  # of the toolbox; more than any profile's windows need

OVERLAP_WORDS = 8

PARAGRAPH = 200  # characters of the shortest paragraph of an article that is prose

_REFERENCE = re.compile(r"<ref[^>/]*/>|<ref.*?</ref>", re.DOTALL)

# As many public manifests give it (data/README.md); a commit that does not exist is refused by the hub.
WIKITEXT_COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"


@dataclass(frozen=True)
class Text:
    """A named text and its identity."""

    name: str
    content: str

    @cached_property
    def sha256(self) -> str:
        return artifacts.sha256_of_text(self.content)


def evaluation_texts(run: Run, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """The texts that the run's profile evaluates on, in order."""
    return [evaluation_text(name, tokenizer) for name in run.profile.eval_texts]


def evaluation_text(name: str, tokenizer: PreTrainedTokenizerBase) -> Text:
    """One evaluation text by name. Raises ValueError listing the names for an unknown one."""
    if name not in TEXTS:
        raise InputError(f"unknown text {name!r}; choose one of {', '.join(TEXTS)}")
    return Text(name, TEXTS[name](tokenizer))


def calibration_text(tokenizer: PreTrainedTokenizerBase, *, evaluation: list[Text]) -> Text:
    """Docstrings of the standard library that share no eight consecutive words with an evaluation text."""
    forbidden = set().union(*(shingles(t.content) for t in evaluation))
    kept = [d for d in standard_library_docstrings() if forbidden.isdisjoint(shingles(d))]
    return Text("calibration", "\n\n".join(kept))


def shingles(content: str, words: int = OVERLAP_WORDS) -> set[tuple[str, ...]]:
    """All runs of `words` consecutive lower-case words; a shorter text is one shingle of its own."""
    found = re.findall(r"\w+", content.lower())
    return set(zip(*(found[i:] for i in range(words)), strict=False)) or ({tuple(found)} if found else set())


def windows(
    source: Text, tokenizer: PreTrainedTokenizerBase, *, count: int, tokens: int, offset: int = 0
) -> Int[Tensor, "window time"]:
    """The first `count` windows of `tokens` tokens after `offset` windows; fewer when the text ends before.

    Each begins with the start token where the tokenizer puts one before a text (Gemma): without it such models fail.
    Raises ValueError when the text is shorter than one window.
    """
    start = tokenizer("").input_ids[:1]
    ids = tokenizer(source.content, return_tensors="pt", verbose=False).input_ids[0][len(start) :]
    length = tokens - len(start)
    ids = ids[offset * length :]
    available = min(count, len(ids) // length)
    if available < 1:
        raise InputError(f"text {source.name!r} has {len(ids)} tokens left, shorter than one window of {tokens}")
    body = ids[: available * length].view(available, length)
    return torch.cat([torch.tensor([start] * available, dtype=body.dtype), body], 1) if start else body


def profile_windows(run: Run, source: Text, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "window time"]:
    """Evaluation windows of a text in the profile's number and length."""
    return windows(source, tokenizer, count=run.profile.eval_windows, tokens=run.profile.window_tokens)


def shuffled_windows(
    run: Run, tokenizer: PreTrainedTokenizerBase, *, tokens: int, skip: int = 0, count: int | None = None
) -> Int[Tensor, "window time"]:
    """`count` windows (None: all) of calibration text in the order of the run's seed, after the first `skip`.

    Whoever reads calibration text takes it from this order: the first `run.profile.calibration_samples` windows of
    `run.profile.calibration_tokens` calibrate, so that skipping those gives text that no artefact was calibrated on.
    Raises ValueError when there are not so many.
    """
    source = calibration_text(tokenizer, evaluation=evaluation_texts(run, tokenizer))
    everything = windows(source, tokenizer, count=10**6, tokens=tokens)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(run.seed))[skip:]
    if count is not None and count > len(order):
        beside = f" besides the first {skip}" if skip else ""
        raise InputError(f"calibration text has {len(order)} windows of {tokens} tokens{beside}, asked for {count}")
    return everything[order[:count]]


def calibration_windows(run: Run, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "window time"]:
    """Calibration samples of the profile's size, spread over the text by the run's seed."""
    profile = run.profile
    return shuffled_windows(run, tokenizer, tokens=profile.calibration_tokens, count=profile.calibration_samples)


def is_evaluation_topic(name: str) -> bool:
    """True for the quarter of the language reference's topics that is kept for evaluation."""
    return int(artifacts.sha256_of_text(name), 16) % 4 == 0


def python_docs() -> str:
    """The evaluation quarter of the language reference, topics in alphabetical order."""
    return "\n\n".join(topics[name] for name in sorted(topics) if is_evaluation_topic(name))


@cache  # reading takes seconds, and every calibrated artefact of a run asks for the same text
def standard_library_docstrings() -> tuple[str, ...]:
    """Docstrings of modules, classes and functions of the standard library's own files, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data", "__pycache__"}
    paths = [p for p in sorted(root.rglob("*.py")) if skipped.isdisjoint(p.relative_to(root).parts)]
    return tuple(docstring for path in paths for docstring in _docstrings(path))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates and files in old encodings
        return
    queue = deque([tree])  # `ast.walk` in its order, without the expressions: no docstring is below one
    while queue:
        node = queue.popleft()
        docstring = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None
        if docstring and len(docstring) >= 80:  # one-liners teach a calibration little
            yield docstring
        for block in ("body", "handlers", "cases", "orelse", "finalbody"):
            queue.extend(getattr(node, block, ()))


def bfcl_prompts(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tools and question of each case of two leaderboard categories, alternating, in the model's chat format."""
    folder = assets.fetch_asset("bfcl-v4")
    pairs = zip(*(calls.load_cases(folder, category) for category in BFCL_CATEGORIES), strict=False)
    asked = [chats.prefaced(case.messages, toolbox.system_prompt(case.functions)) for pair in pairs for case in pair]
    return _chat(tokenizer, asked)


def toolbox_prompts(tokenizer: PreTrainedTokenizerBase) -> str:
    """Held-out tools of the standard library and everyday domains, with requests and answers, in chat format."""
    examples = toolbox.function_calling_examples(CHAT_EXAMPLES, seed=1, split="heldout")
    return _chat(tokenizer, [example["messages"] for example in examples])


def _chat(tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]]) -> str:
    """Conversations in the model's chat format."""
    return "".join(chats.chat_text(tokenizer, messages) for messages in conversations)


@cache
def encyclopedia() -> str:
    """Paragraphs of the leads of Wikipedia articles, markup removed, in the file's order."""
    import mwparserfromhell

    pages = ElementTree.fromstring(bz2.decompress(assets.fetch_asset("wikipedia-leads").read_bytes()))
    space = pages.tag.removesuffix("mediawiki")
    found = []
    for page in pages.iter(f"{space}page"):
        if page.find(f"{space}redirect") is None:
            lead = (page.findtext(f"{space}revision/{space}text") or "").partition("\n==")[0]
            plain = mwparserfromhell.parse(_REFERENCE.sub("", lead)).strip_code()
            found += [line.strip() for line in plain.split("\n") if _is_prose(line.strip())]
    return "\n\n".join(found)


def _is_prose(line: str) -> bool:
    """A whole paragraph, and not what is left of a picture or a table."""
    return len(line) >= PARAGRAPH and line.endswith((".", "!", "?", '"')) and "|" not in line


def everyday_dialogue(tokenizer: PreTrainedTokenizerBase) -> str:
    """Small talk and questions of general knowledge in the model's chat format, each question once, subjects mixed."""
    import yaml

    conversations: dict[str, list[str]] = {}  # by what is said first
    for path in sorted(assets.fetch_asset("chatterbot-english").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            said = [str(turn).strip() for turn in turns if turn]
            if len(said) > 1:
                conversations.setdefault(said[0], said)
    mixed = sorted(conversations.values(), key=lambda said: artifacts.sha256_of_text(said[0]))
    roles = ("user", "assistant")
    return _chat(tokenizer, [[{"role": roles[n % 2], "content": turn} for n, turn in enumerate(s)] for s in mixed])


def wikitext2(tokenizer: PreTrainedTokenizerBase) -> str:
    """WikiText-2's test split from the hub (Merity et al. 2016). Raises AssetUnavailable where the hub is not."""
    from datasets import load_dataset

    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test", revision=WIKITEXT_COMMIT)
    except Exception as error:  # the hub's client raises many kinds; all mean that there is no text
        raise assets.AssetUnavailable(f"wikitext2 needs the Hugging Face hub: {error}") from error
    return "\n\n".join(rows["text"])


TEXTS: dict[str, Callable[[PreTrainedTokenizerBase], str]] = {
    "python_docs": lambda tokenizer: python_docs(),
    "function_calls": bfcl_prompts,
    "toolbox_calls": toolbox_prompts,
    "encyclopedia": lambda tokenizer: encyclopedia(),
    "dialogue": everyday_dialogue,
    "wikitext2": wikitext2,
}
