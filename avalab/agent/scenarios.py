"""Scenarios x metrics, in the manner of HELM: one model, several kinds of question, several things that matter.

| metric | what it is | source |
|---|---|---|
| `right_share` | share of items answered right | |
| `calibration_error` | mean gap between how sure the model was and how often it was right, in bins | Guo et al. 2017 |
| `robust_share` | share of items right as written, with typos, in capitals, and paraphrased | Liang et al. 2022 |
| `fair_share` | share of items right whatever the person's name is, and in informal English | Liang et al. 2022 |
| `answer_seconds` | time an answer | |

A scenario is a row of `SCENARIOS`: a function that makes its items. An item carries its request with `{name}` where a
person is named; the variants change the request and nothing else, never a number, a quoted text or a name of code.
How sure the model was is the geometric mean of its tokens' probabilities. What cannot be had here (MMLU, GSM8K and
HellaSwag come from the hub, through `measure.harness`) is recorded without a value and with the reason.

Source: Liang et al. 2022, "Holistic Evaluation of Language Models", arXiv 2211.09110. Names: Bertrand and Mullainathan
2004. Robustness and fairness are worst cases over variants, as there.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from avalab.agent.speaker import Speaker
from avalab.agent.tasks import FOLDER, is_right, tasks
from avalab.data import calls, toolbox
from avalab.lab import statistics
from avalab.lab.errors import InputError
from avalab.lab.run import Run, load_average

METRICS = ("right_share", "calibration_error", "robust_share", "fair_share", "answer_seconds")

NAMES = ("Emily", "Lakisha", "Jamal", "Greg", "Mehmet")  # the first is the item as written

BINS = 10

ANSWER_TOKENS, CALL_TOKENS = 24, 64

UNREACHED = {
    "mmlu": "its questions come from the hub; avalab eval MODEL --tasks mmlu where it can be reached",
    "gsm8k": "its questions come from the hub; avalab eval MODEL --tasks gsm8k where it can be reached",
    "hellaswag": "its questions come from the hub; avalab eval MODEL --tasks hellaswag where it can be reached",
}

INFORMAL = {
    "going to": "gonna", "want to": "wanna", "is not": "ain't", "do not": "don't", "please": "pls",
    "could you": "can u",
    "you": "ya", "because": "cuz", "what is": "what's", "thank": "thx", "give me": "gimme", "let me": "lemme",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A request, what surrounds it, and how an answer to it is checked."""

    id: str
    request: str
    check: Callable[[str], bool]
    context: str = ""
    functions: tuple[dict, ...] = ()

    def chat(self, request: str) -> list[dict]:
        """The messages that ask it."""
        if self.functions:
            system = toolbox.system_prompt(list(self.functions))
        else:
            system = "Answer with the number or the word alone."
        asked = f"{self.context}\n\n{request}" if self.context else request
        return [{"role": "system", "content": system}, {"role": "user", "content": asked}]


@dataclass(frozen=True)
class Answer:
    """Whether an answer is right, how sure the model was, and the seconds it took."""

    right: bool
    sure: float
    seconds: float


# --- the scenarios ---------------------------------------------------------------------------------------------------


def function_calls(count: int, seed: int) -> list[Item]:
    """One fitting function among others, of the lab's held-out tools."""
    found = calls.cases("toolbox_multiple", count)
    return [
        Item(
            case.id,
            case.messages[-1]["content"],
            lambda text, case=case: calls.check_calls(case, calls.parse_calls(text)).correct,
            functions=tuple(case.functions),
        )
        for case in found
    ]


def everyday_sums(count: int, seed: int) -> list[Item]:
    """A sum in words about a person."""
    rng, items = random.Random(f"sums-{seed}"), []
    for number in range(count):
        a, b, c = rng.randint(12, 60), rng.randint(3, 11), rng.randint(2, 9)
        thing = rng.choice(["apples", "stamps", "books", "marbles"])
        text, value = rng.choice(
            [
                (f"{{name}} has {a} {thing}, gives away {b} and buys {c}. How many {thing} are there now?", a - b + c),
                (f"{{name}} buys {b} boxes of {c} {thing}. How many {thing} is that?", b * c),
                (f"{{name}} shares {b * c} {thing} fairly among {b} friends. How many does each get?", c),
            ]
        )
        items.append(Item(f"sum-{number}", text, lambda said, value=value: _numbers(said)[:1] == [value]))
    return items


def _numbers(text: str) -> list[int]:
    """The whole numbers of an answer, the last one first: an answer ends in its result."""
    return [int(each) for each in reversed(re.findall(r"-?\d+", text.replace(",", "")))]


def reading(count: int, seed: int) -> list[Item]:
    """A question about a page of the agent's handbook, which stands before it."""
    pages = [path.read_text(encoding="utf-8") for path in sorted((FOLDER / "handbook").glob("*.md"))]
    asked = [task for task in tasks() if task.kind == "documents" and len(task.solution) == 1][:count]
    return [
        Item(
            task.id,
            f"{{name}} asks: {task.task}",
            lambda said, task=task: is_right(task, said, FOLDER),
            max(pages, key=lambda page, task=task: len(_words(task.task) & _words(page))),
        )
        for task in asked
    ]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower()))


SCENARIOS: dict[str, Callable[[int, int], list[Item]]] = {
    "function calls": function_calls,
    "everyday sums": everyday_sums,
    "reading": reading,
}


_KEPT = re.compile(  # quoted text, the place of a name, names of code
    r"""((?<!\w)'[^']*'(?!\w)|"[^"]*"|\{\w+\}|\b\w+(?:[._]\w+)+)"""
)

# --- variants of a request -------------------------------------------------------------------------------------------


def typos(text: str, rng: random.Random) -> str:
    """Two neighbouring letters exchanged in one of five longer words; numbers, quotes and names of code stay."""
    words = text.split(" ")
    for at, word in enumerate(words):
        if re.fullmatch(r"[a-z]{4,}[.,?]?", word) and rng.random() < 0.2:
            place = rng.randrange(1, len(word.rstrip(".,?")) - 1)
            words[at] = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return " ".join(words)


def capitals(text: str, rng: random.Random) -> str:
    """Words of small letters in capitals; quotes and names of code stay."""
    parts = _KEPT.split(text)
    return "".join(part if at % 2 else part.upper() for at, part in enumerate(parts))


def paraphrase(text: str, rng: random.Random) -> str:
    """The same request in a polite frame."""
    frame = rng.choice(["I would like to know this, please: {}", "Here is my question. {} Thank you.", "Quick one: {}"])
    return frame.replace("{}", text)


def informal(text: str, rng: random.Random) -> str:
    """Words and contractions of informal English."""
    for plain, said in INFORMAL.items():
        text = re.sub(rf"\b{plain}\b", said, text, flags=re.IGNORECASE)
    return text


def variants(item: Item, seed: int) -> dict[str, str]:
    """The request as written, and in each variant, the same for a seed."""
    rng = random.Random(f"{item.id}-{seed}")
    written = item.request.replace("{name}", NAMES[0])
    found = {"written": written}
    for change in (typos, capitals, paraphrase, informal):
        found[change.__name__] = change(item.request, rng).replace("{name}", NAMES[0])
    if "{name}" in item.request:
        found |= {f"name {name}": item.request.replace("{name}", name) for name in NAMES[1:]}
    return found


ROBUST = ("written", "typos", "capitals", "paraphrase")


# --- measuring -------------------------------------------------------------------------------------------------------


def answer(speaker: Speaker, item: Item, request: str) -> Answer:
    """One greedy answer, and the geometric mean of its tokens' probabilities."""
    log_probabilities: list[float] = []

    def choose(logits: Tensor) -> int:
        token = int(logits.argmax())
        log_probabilities.append(float(logits.float().log_softmax(-1)[token]))
        return token

    said = speaker.say(
        item.chat(request),
        most=CALL_TOKENS if item.functions else ANSWER_TOKENS,
        functions=list(item.functions) or None,
        refusal=False,
        choose=choose,
    )
    sure = math.exp(float(np.mean(log_probabilities))) if log_probabilities else 0.0
    return Answer(item.check(said.text), sure, said.seconds)


def calibration_error(sure: Sequence[float], right: Sequence[bool], bins: int = BINS) -> float:
    """The expected calibration error: mean gap of confidence and accuracy over bins, weighed by their items.

    Source: Guo et al. 2017, arXiv 1706.04599, eq. 3.
    """
    if len(sure) != len(right) or not len(sure):
        raise InputError(f"{len(sure)} confidences for {len(right)} answers; give one each, and at least one")
    values, hits = np.asarray(sure, float), np.asarray(right, float)
    of_bin = np.clip(np.ceil(values * bins).astype(int) - 1, 0, bins - 1)
    gaps = [abs(values[of_bin == b].mean() - hits[of_bin == b].mean()) * (of_bin == b).mean() for b in set(of_bin)]
    return float(sum(gaps))


def measure(
    run: Run, speaker: Speaker, *, items: int, engine: str, scenarios: Mapping[str, Callable] = SCENARIOS
) -> dict[str, list[dict[str, Answer]]]:
    """Every scenario in every variant, recorded as `metric:scenario`; what is missing here is recorded by name."""
    from tqdm.auto import tqdm

    found: dict[str, list[dict[str, Answer]]] = {}
    for name, make in scenarios.items():
        made = make(items, run.seed)
        found[name] = [
            {variant: answer(speaker, item, request) for variant, request in variants(item, run.seed).items()}
            for item in tqdm(made, desc=name, leave=False)
        ]
        _record(run, speaker.name, name, found[name], engine)
    for name, why in UNREACHED.items():
        run.record(speaker.name, f"right_share:{name}", None, "1", engine=engine, note=why)
    return found


def _record(run: Run, subject: str, scenario: str, answers: list[dict[str, Answer]], engine: str) -> None:
    written = [each["written"] for each in answers]
    worst = {
        "right_share": [each.right for each in written],
        "robust_share": [all(each[variant].right for variant in ROBUST) for each in answers],
        "fair_share": [all(a.right for v, a in each.items() if v not in ROBUST[1:]) for each in answers],
    }
    by_variant = {v: sum(each[v].right for each in answers) / len(answers) for v in answers[0]}
    for metric, right in worst.items():
        share = statistics.wilson(sum(right), len(right))
        details = {"right by variant": by_variant}
        run.record(subject, f"{metric}:{scenario}", unit="1", engine=engine, details=details, **vars(share))
    error = calibration_error([each.sure for each in written], worst["right_share"])
    run.record(subject, f"calibration_error:{scenario}", error, "1", n=len(written), engine=engine)
    seconds = [a.seconds for each in answers for a in each.values()]
    about = {"engine": engine, "details": {"load": load_average()}, "samples": seconds}
    run.record(subject, f"answer_seconds:{scenario}", unit="s", **vars(statistics.quantile(seconds)), **about)
