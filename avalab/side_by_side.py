"""A sheet of answers that people compare: the same requests to every artefact, side by side, and nobody knows whose.

1. Requests come from `prompts/side_by_side.txt`: questions, writing, reasoning, instructions, and requests with tools
   on offer: one tool does it, none helps, or a value is missing.
2. Every artefact answers greedily, through transformers in batches or through any engine; answers are kept (see
   `answer_cache`), so that a stopped run goes on and a sheet is made again in no time.
3. `make` writes two files: `sheet.json` with requests and answers under the hash of their text, and `key.json`, which
   says whose they are. Equal answers of two artefacts are one answer, read and scored once for both.
4. `order` gives a rater an order of requests, and of answers within each, of their own, from a hash: the same after a
   break, another one for the next rater.

Showing all answers to a request together, with a score each on several criteria, is what Novikova, Dusek and Rieser
("RankME", 2018) found more consistent than scoring them one by one; that criteria need a name and a definition each is
what van der Lee et al. ("Best practices for the human evaluation of automatically generated text", 2019) ask for.

What it does not do: score (see `rating`), show (see `rating_form`), sample, or continue a conversation.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from avalab import answer_cache, engines, grammars, models, toolbox
from avalab.artifacts import Artifact, sha256_of_text
from avalab.code import code_of
from avalab.evaluate import Respondent
from avalab.experiment import write_atomically

PROMPTS = Path(__file__).parent / "prompts" / "side_by_side.txt"
PLAIN_KINDS, TOOL_KINDS = ("question", "writing", "reasoning", "instruction"), ("call", "no_tool", "ask_back")
TRANSFORMERS = "transformers"  # in place of an engine's name: batches through the model that `models.load` opens
ANSWER_TOKENS = 128


@dataclass(frozen=True)
class Prompt:
    """A request, and the names of the tools that are on offer."""

    kind: str
    tools: tuple[str, ...]
    request: str

    @property
    def key(self) -> str:
        """Its identity: a hash of what is asked and offered."""
        return sha256_of_text(json.dumps([self.request, *self.tools]))[:16]

    @property
    def described(self) -> list[dict]:
        """The tools on offer as function descriptions, in the order of the prompt."""
        known = {tool["name"]: tool for tool in toolbox.tools()}
        return [known[name] for name in self.tools]

    @property
    def chat(self) -> list[dict]:
        """The chat that is answered: the tools in a system message, then the request."""
        system = [{"role": "system", "content": toolbox.system_prompt(self.described)}] if self.tools else []
        return [*system, {"role": "user", "content": self.request}]


def prompts(count: int = 0, path: Path = PROMPTS) -> list[Prompt]:
    """The first `count` requests of a file (0: all).

    Raises ValueError naming file and line for one that is not `kind | tools | request`, with known kinds and tools.
    """
    known, found = {tool["name"] for tool in toolbox.tools()}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        try:
            found.append(_parsed(line, known))
        except ValueError as error:
            raise ValueError(f"{path.name}:{number}: {error}") from error
    return found[: count or None]


def _parsed(line: str, known: set[str]) -> Prompt:
    parts = [part.strip() for part in line.split("|", 2)]
    if len(parts) != 3 or not parts[2]:
        raise ValueError(f"{line!r} is not `kind | tools or - | request`")
    kind, tools = parts[0], tuple(parts[1].split()) if parts[1] != "-" else ()
    kinds = TOOL_KINDS if tools else PLAIN_KINDS
    if kind not in kinds:
        raise ValueError(f"kind {kind!r} {'with' if tools else 'without'} tools; choose one of {', '.join(kinds)}")
    if unknown := [name for name in tools if name not in known]:
        raise ValueError(f"no tool {unknown[0]!r} in the toolbox; it has {', '.join(sorted(known))}")
    return Prompt(kind, tools, parts[2])


# ----------------------------------------------------------------------------------------------------------- answers


def answers(
    artifact: Artifact,
    asked: Sequence[Prompt],
    cache: Path,
    *,
    engine: str = TRANSFORMERS,
    device: str = "cpu",
    new_tokens: int = ANSWER_TOKENS,
) -> list[str]:
    """The artefact's greedy answers in the order of the prompts; read from `cache` where they are known.

    Raises ValueError, EngineUnavailable or NotSupported as the engine does.
    """
    if engine != TRANSFORMERS and engine not in engines.ENGINES:
        raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join((TRANSFORMERS, *engines.ENGINES))}")
    tokenizer = models.load_tokenizer(artifact)
    texts = [tokenizer.apply_chat_template(p.chat, tokenize=False, add_generation_prompt=True) for p in asked]
    keys = [sha256_of_text(text)[:16] for text in texts]

    def generate(wanted: list[int]) -> Iterator[tuple[int, str]]:
        missing = [texts[index] for index in wanted]
        if engine != TRANSFORMERS:
            return _of_engine(engine, artifact, tokenizer, missing, new_tokens)
        return _of_transformers(Respondent(artifact, device), tokenizer, missing, new_tokens)

    # Answers that older code gave are not trusted.
    code = code_of(_of_transformers) if engine == TRANSFORMERS else code_of(_of_engine, engines.ENGINES[engine])
    settings = sha256_of_text(f"{code} {new_tokens} {device}")[:8]
    path = cache / f"side-by-side-{artifact.sha256[:16]}-{engine}-{settings}.jsonl"
    return answer_cache.resumed(path, keys, generate, progress=f"{artifact.name} in {engine}")


def _of_transformers(respondent: Respondent, tokenizer, texts: list[str], new_tokens: int) -> Iterator:
    return grammars.answers(respondent.model, tokenizer, texts, max_new_tokens=new_tokens)


def _of_engine(engine: str, artifact: Artifact, tokenizer, texts: list[str], new_tokens: int) -> Iterator:
    loaded = engines.load(engine, artifact)
    try:
        for index, text in enumerate(texts):
            tokens = loaded.generate(tokenizer(text, add_special_tokens=False).input_ids, new_tokens)
            yield index, tokenizer.decode(tokens, skip_special_tokens=True)
    finally:
        loaded.close()


# ------------------------------------------------------------------------------------------------------------- sheet


def make(folder: Path, asked: Sequence[Prompt], answered: dict[str, list[str]], about: dict[str, dict]) -> dict:
    """Write `sheet.json` and `key.json` into a folder and return the sheet.

    `answered` holds each subject's answers in the order of `asked`; `about` what the key says of it beside (artefact's
    hash, engine). Raises ValueError for fewer than two subjects, or answers that do not match the requests.
    """
    if len(answered) < 2:
        raise ValueError(f"nothing to compare: {len(answered)} artefact; give two or more")
    if wrong := [name for name, texts in answered.items() if len(texts) != len(asked)]:
        raise ValueError(f"{wrong[0]} has {len(answered[wrong[0]])} answers to {len(asked)} requests")
    rows = []
    for index, prompt in enumerate(asked):
        texts = {answer_id(prompt, texts[index]): texts[index].strip() for texts in answered.values()}
        row = asdict(prompt) | {"key": prompt.key, "tools": prompt.described, "answers": dict(sorted(texts.items()))}
        rows.append(row)
    sheet = {"prompts": rows}
    whose = {
        name: about.get(name, {}) | {"answers": {p.key: answer_id(p, t) for p, t in zip(asked, texts, strict=True)}}
        for name, texts in answered.items()
    }
    for name, content in (("sheet.json", sheet), ("key.json", whose)):
        write_atomically(folder / name, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return sheet


def load(folder: Path) -> dict:
    """The sheet that `make` wrote. Raises FileNotFoundError naming the folder where there is none."""
    return json.loads((folder / "sheet.json").read_text(encoding="utf-8"))


def load_key(folder: Path) -> dict[str, dict]:
    """Whose answers they are: subject -> its facts and `answers` (prompt key -> answer id). Not for raters."""
    return json.loads((folder / "key.json").read_text(encoding="utf-8"))


def answer_id(prompt: Prompt, text: str) -> str:
    """The identity of an answer to a request: a hash of both, so that it says nothing of who gave it."""
    return sha256_of_text(f"{prompt.key} {text.strip()}")[:16]


def order(sheet: dict, rater: str) -> list[tuple[dict, list[str]]]:
    """The requests in this rater's order, each with the ids of its answers in this rater's order."""
    rows = _shuffled(sheet["prompts"], rater)
    return [(row, _shuffled(sorted(row["answers"]), f"{rater} {row['key']}")) for row in rows]


def _shuffled(things: Sequence, seed: str) -> list:
    return random.Random(f"side-by-side {seed}").sample(list(things), len(things))
