"""Pairs of answers to one prompt, of which the first is the better: read, made, and packed into rows.

1. A pair is `messages` (a chat up to where its next answer begins), `tools`, `chosen` and `rejected` (texts). A file
   holds one a line, in this form or in those of trl: `prompt` as text or messages, answers as texts or messages, or
   both answers as whole chats that begin alike.
2. Pairs come from a model's own answers: what it says at temperature 1 and is found wrong stands against the checked
   right answer (`own_mistakes`; `calls_right` judges calls, any other verifier has its form), or from the review form's
   scores (`rated_pairs`).
3. A row holds whole pairs. A prompt stands in it once, followed by both answers, of which the second is told to look
   past the first (`models.attention`, `forks`): exact, and near half the tokens where prompts are long.
   `sources`, `targets` and `owners` say which position predicts which token of which answer: the prompt's last position
   predicts the first token of both. `labels` marks one token a pair, which is what the Trainer counts in a step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from avalab.data import calls, chats, packing, synthesize, toolbox
from avalab.data.calls import Case
from avalab.data.packing import IGNORED, Encoded, Rows
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, MissingFile
from avalab.lab.run import Run, write_atomically

MARKER = re.compile(r"<\|[A-Za-z_]+\|>|\[/?INST\]|<(?:start|end)_of_turn>")  # of some family's chat template

JUDGED = ("single_call", "several_candidates", "parallel_calls", "no_function")  # kinds that `calls_right` can judge


def load_pairs(path: Path | str) -> list[dict]:
    """The pairs of a JSONL file, or of every one in a folder by name; see the module for their forms.

    Raises ValueError naming file and line for one that cannot be used, MissingFile where there is no file.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise MissingFile(f"no pairs at {path}; give a .jsonl file, or a folder of them")
    found = []
    for file in files:
        for place, line in chats.json_lines(file):
            try:
                found.append(normal_pair(line))
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
    if not found:
        raise InputError(f"{path} holds no pair; a line is a JSON object with prompt, chosen and rejected")
    return found


def store_pairs(path: Path, pairs: Sequence[dict]) -> None:
    """Write what `load_pairs` reads."""
    write_atomically(path, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))


def normal_pair(pair: object) -> dict:
    """A pair in the lab's form, its tools in the system message.

    Raises ValueError for missing fields, answers that are equal or empty, and what `chats.normalised` refuses.
    """
    if not isinstance(pair, dict):
        raise InputError(f"a {type(pair).__name__}, not an object with prompt, chosen and rejected")
    if missing := [name for name in ("chosen", "rejected") if name not in pair]:
        raise InputError(f"no field {missing[0]}; a pair has prompt, chosen and rejected")
    prompt, (chosen, rejected) = _prompt(pair), (_answer(pair[name]) for name in ("chosen", "rejected"))
    if not chosen.strip() or not rejected.strip():
        raise InputError(f"the {'rejected' if chosen.strip() else 'chosen'} answer is empty; leave the pair out")
    if chosen.strip() == rejected.strip():
        raise InputError(f"chosen and rejected are equal ({chosen.strip()[:40]!r}); leave the pair out")
    whole = [*prompt, {"role": "assistant", "content": chosen}]
    example = synthesize.with_system(chats.normalised({"messages": whole, "tools": pair.get("tools") or []}))
    return {"messages": example["messages"][:-1], "tools": [], "chosen": chosen, "rejected": rejected}


def _prompt(pair: dict) -> list[dict]:
    """The messages before the answers: stated, a text, or what two whole chats have in common."""
    given = pair.get("messages", pair.get("prompt"))
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if isinstance(given, list) and given:
        return given
    both = [pair[name] for name in ("chosen", "rejected")]
    if given is None and all(isinstance(chat, list) and len(chat) > 1 for chat in both):
        if both[0][:-1] != both[1][:-1]:
            raise InputError("chosen and rejected answer different prompts; both begin with the same messages")
        return both[0][:-1]
    raise InputError("no prompt: give text or messages as prompt, or whole chats as chosen and rejected")


def _answer(given: object) -> str:
    last = given[-1] if isinstance(given, list) and given else given
    text = last.get("content") if isinstance(last, dict) and last.get("role") == "assistant" else last
    if not isinstance(text, str):
        raise InputError("chosen and rejected are texts, or messages of which the last is an assistant's")
    return text


# --- where pairs come from ---------------------------------------------------------------------------------------


def calls_right(example: dict, text: str) -> bool:
    """Whether an answer's calls are those of the example, or none where it has none."""
    expected = calls.accepted_calls(example["calls"])
    category = "own_answer" if expected else "own_irrelevance"
    case = Case("0", category, [], example["tools"], expected)
    return calls.check_calls(case, calls.parse_calls(text)).correct


def own_mistakes(
    student: Artifact,
    examples: Sequence[dict],
    *,
    run: Run,
    draws: int = 1,
    new_tokens: int = 64,
    right: Callable[[dict, str], bool] = calls_right,
) -> list[dict]:
    """A pair for each example that the student gets wrong: the example's own answer over the first wrong one.

    Each is answered up to `draws` times at temperature 1; only those that were right so far are asked again.
    """
    waiting, found = list(examples), {}
    for draw in range(draws):
        seeded = Run(run.notebook, run.profile_name, run.seed + draw, run.model)
        answered = packing.own_answers(student, waiting, run=seeded, new_tokens=new_tokens) if waiting else []
        still = []
        for example, own in zip(waiting, answered, strict=True):
            text = own["messages"][-1]["content"]
            if not text.strip() or right(example, text):
                still.append(example)
                continue
            chosen = example["messages"][-1]["content"]
            found[id(example)] = {"messages": example["messages"][:-1], "tools": [], "chosen": chosen, "rejected": text}
        waiting = still
    return [found[id(example)] for example in examples if id(example) in found]


def rated_pairs(sheet: dict, ratings: Sequence[dict], *, by: str) -> list[dict]:
    """A pair for every two answers to a request of the review form of which one was scored higher on a criterion.

    `sheet` and `ratings` are `measure.people`'s. Scores of several raters are added up over those who scored both; ties
    give no pair.
    """
    scores: dict[tuple[str, str], dict[str, int]] = {}
    for row in ratings:
        if row.get(by) is not None:
            scores.setdefault((row["prompt"], row["answer"]), {})[row["rater"]] = row[by]
    found = []
    for prompt in sheet["prompts"]:
        tools = prompt["tools"]
        asked = [{"role": "system", "content": toolbox.system_prompt(tools)}] if tools else []
        asked.append({"role": "user", "content": prompt["request"]})
        names = sorted(prompt["answers"])
        for first, second in ((a, b) for i, a in enumerate(names) for b in names[i + 1 :]):
            ours, theirs = (scores.get((prompt["key"], name), {}) for name in (first, second))
            gap = sum(ours[rater] - theirs[rater] for rater in ours.keys() & theirs.keys())
            if not gap:
                continue
            better, worse = (first, second) if gap > 0 else (second, first)
            answers = {"chosen": prompt["answers"][better], "rejected": prompt["answers"][worse]}
            if all(text.strip() for text in answers.values()):
                found.append({"messages": asked, "tools": [], **answers})
    return found


# --- rows ----------------------------------------------------------------------------------------------------------


def pack_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Iterable[dict], *, row_tokens: int, context: int, seed: int
) -> Rows:
    """Pairs as packed rows. Raises ValueError naming one that does not fit, or that is not this tokenizer's."""
    encoded = []
    for number, pair in enumerate(tqdm(pairs, desc="pairs", leave=False)):
        _refuse_foreign_markers(tokenizer, pair, number)
        prompt, answers = encode_pair(tokenizer, pair, number)
        tokens = len(prompt) + sum(map(len, answers))
        longest = len(prompt) + max(map(len, answers))
        if longest > context:
            raise InputError(f"pair {number} has {longest} tokens, the model's context {context}; leave it out")
        if tokens > row_tokens:
            raise InputError(
                f"pair {number} has {tokens} tokens, {len(prompt)} of them its prompt, and a row {row_tokens}; raise "
                "row_tokens or leave it out"
            )
        encoded.append((prompt, answers))
    if not encoded:
        raise InputError("there is no pair to learn from")
    lengths = [len(prompt) + sum(map(len, answers)) for prompt, answers in encoded]
    places = packing.first_fit(lengths, row_tokens=row_tokens, seed=seed)
    return [_row([encoded[index] for index in members]) for members in places]


def fitting(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[dict], tokens: int) -> list[dict]:
    """Those of the pairs that have at most so many tokens, prompt and both answers together."""
    found = []
    for number, pair in enumerate(pairs):
        prompt, answers = encode_pair(tokenizer, pair, number)
        found += [pair] if len(prompt) + sum(map(len, answers)) <= tokens else []
    return found


def _refuse_foreign_markers(tokenizer: PreTrainedTokenizerBase, pair: dict, number: int) -> None:
    """Raise ValueError for answers that hold a marker of another family's template: it would be learned as text."""
    for name in ("chosen", "rejected"):
        for marker in MARKER.findall(pair[name]):
            if marker not in tokenizer.get_vocab():
                raise InputError(
                    f"pair {number}: {name} holds {marker}, a marker that this model's tokenizer does not have: the "
                    "pairs were written for another tokenizer; give plain text, the template adds its own markers"
                )


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: dict, number: int) -> tuple[list[int], list[list[int]]]:
    """Tokens of a pair's prompt, and of both its answers; ValueError, naming its `number`, where they are the same."""
    both = [
        packing.encode_chat(tokenizer, [*pair["messages"], {"role": "assistant", "content": pair[name]}])
        for name in ("chosen", "rejected")
    ]
    starts = [_answer_start(each) for each in both]
    prompt, answers = both[0].ids[: starts[0]], [each.ids[start:] for each, start in zip(both, starts, strict=True)]
    if both[1].ids[: starts[1]] != prompt or not all(answers):
        raise InputError(f"pair {number}: the chat template renders the prompt differently before its two answers")
    if answers[0] == answers[1]:
        raise InputError(f"pair {number}: chosen and rejected are the same {len(answers[0])} tokens; leave it out")
    return prompt, answers


def _answer_start(example: Encoded) -> int:
    """Where the last answer begins: behind the last position that predicts no answer's token."""
    learned = [label != IGNORED for label in example.labels[:-1]]
    return next((i for i in range(len(learned) - 1, -1, -1) if not learned[i]), -1) + 2


def _row(members: list[tuple[list[int], list[list[int]]]]) -> dict[str, torch.Tensor]:
    ids, positions, ends, forks, sources, targets, owners, marked = [], [], [0], [], [], [], [], []
    for prompt, (chosen, rejected) in members:
        start, read = len(ids), len(prompt)
        first, second = start + read, start + read + len(chosen)
        ids += [*prompt, *chosen, *rejected]
        positions += [*range(read + len(chosen)), *range(read, read + len(rejected))]
        for which, (answer, place) in enumerate([(chosen, first), (rejected, second)]):
            sources += [first - 1, *range(place, place + len(answer) - 1)]
            targets += answer
            owners += [2 * len(forks) + which] * len(answer)
        forks.append([first, second])
        ends.append(len(ids))
        marked.append(first)
    labels = torch.full((len(ids),), IGNORED)
    labels[marked] = 0
    named = {"input_ids": ids, "position_ids": positions, "boundaries": ends, "forks": forks}
    named |= {"sources": sources, "targets": targets, "owners": owners}
    return {"labels": labels} | {name: torch.tensor(values) for name, values in named.items()}
