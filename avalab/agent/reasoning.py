"""Ways to reason at equal tokens: direct, a chain of thought, votes, verified draws, and a tree of thoughts.

Each way may decode the same number of tokens for a question and says how many it used.

| way | what it does with its tokens | source |
|---|---|---|
| `direct` | answers at once | |
| `chain` | one greedy chain of thought | Wei et al. 2022, arXiv 2201.11903 |
| `votes` | draws chains, takes the answer given most often | Wang et al. 2022, arXiv 2203.11171 |
| `verified` | draws chains until one passes the verifier, else votes | Cobbe et al. 2021, arXiv 2110.14168 |
| `breadth`, `depth` | proposes next steps, values each, goes on with the best | Yao et al. 2023, arXiv 2305.10601 |

Questions come from the package reasoning-gym (optional extra `reasoning`), whose generators make as many as are asked
for. A verifier never sees the solution: it puts a value into an equation, or adds up an expression. Where a task has
none, `verified` is not run. A tree that finds nothing within its tokens answers from its best leaf, and says so.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from avalab.agent.speaker import Speaker
from avalab.agent.toolkit import calculate
from avalab.lab import statistics
from avalab.lab.errors import InputError, Unavailable
from avalab.lab.run import Run

WAYS = ("direct", "chain", "votes", "verified", "breadth", "depth")

INSTALL = 'pip install "avalab[reasoning]"'

THINK = "Think step by step, in few words. End with a line `Answer: ` and the answer alone."

STEP = "Write only the next step of the solution, in one line. If it is solved, write `Answer: ` and the answer alone."

JUDGE = "Is this beginning of a solution right so far? Say one word: sure, maybe or impossible."

WORTH = {"sure": 1.0, "maybe": 0.5, "impossible": 0.05}

CHAIN_TOKENS, DIRECT_TOKENS, STEP_TOKENS, JUDGE_TOKENS = 120, 24, 32, 4

TEMPERATURE, WIDTH, KEPT, DEPTH = 0.7, 2, 1, 4

Node = TypeVar("Node")

_ANSWER = re.compile(r"answer\s*(?:is)?\s*[:=]\s*(.+)", re.IGNORECASE)

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """A question, how an answer is scored (1 is right), and a verifier that does not know the solution, if any."""

    task: str
    question: str
    score: Callable[[str], float]
    verify: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Attempt:
    """An answer, whether it is right, the tokens it took, and a word on how it was found."""

    answer: str
    right: bool
    tokens: int
    note: str = ""


# --- questions -------------------------------------------------------------------------------------------------------

TASKS: dict[str, dict] = {  # of reasoning-gym, in sizes that a small model can do some of
    "chain_sum": {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 2},
    "simple_equations": {"min_terms": 2, "max_terms": 3, "min_value": 1, "max_value": 20},
    "countdown": {
        "min_numbers": 3,
        "max_numbers": 3,
        "min_value": 1,
        "max_value": 20,
        "min_target": 10,
        "max_target": 60,
    },
}


def problems(task: str, count: int, seed: int) -> list[Problem]:
    """`count` questions of a task, the same for a seed. Raises Unavailable without reasoning-gym."""
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    try:
        import reasoning_gym
    except ImportError as error:
        raise Unavailable(f"reasoning tasks need reasoning-gym; install it: {INSTALL}") from error
    made = reasoning_gym.create_dataset(task, size=count, seed=seed, **TASKS[task])
    verifier = VERIFIERS.get(task)
    return [
        Problem(
            task,
            entry["question"],
            lambda answer, entry=entry: float(made.score_answer(answer, entry)),
            (lambda answer, entry=entry: verifier(entry, answer)) if verifier else None,
        )
        for entry in made
    ]


def solves_equation(entry: dict, answer: str) -> bool:
    """Whether a value makes both sides of the question's equation equal."""
    equation = re.search(r"[^\n:]*[\w)] *= *[^\n]+", entry["question"].split("\n")[-1] or entry["question"])
    value = _NUMBER.search(answer)
    if equation is None or value is None:
        return False
    sides = re.sub(r"(?<=\d)(?=[a-z])", "*", equation[0].strip()).split("=")
    try:
        left, right = (float(calculate(re.sub(r"\b[a-z]\b", f"({value[0]})", side))) for side in sides)
    except ValueError:
        return False
    return abs(left - right) < 1e-6


def reaches_target(entry: dict, answer: str) -> bool:
    """Whether an expression uses each given number once and comes to the target."""
    facts, expression = entry["metadata"], answer.split("=")[0]
    if sorted(map(int, re.findall(r"\d+", expression))) != sorted(facts["numbers"]):
        return False
    try:
        return abs(float(calculate(expression)) - facts["target"]) < 1e-6
    except ValueError:
        return False


VERIFIERS = {"simple_equations": solves_equation, "countdown": reaches_target}


def answer_of(text: str) -> str:
    """What a chain of thought ends in: after the last `Answer:`, else its last number, else nothing."""
    if said := _ANSWER.findall(text):
        return re.sub(r"[*`$\\]|\.$", "", said[-1].strip()).strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else ""


# --- the ways --------------------------------------------------------------------------------------------------------


def solve(problem: Problem, way: str, speaker: Speaker, *, tokens: int, seed: int = 0) -> Attempt:
    """Answer a question in one of WAYS with at most `tokens` decoded tokens.

    Raises InputError for an unknown way, a number of tokens below one step, or `verified` without a verifier.
    """
    if way not in WAYS:
        raise InputError(f"unknown way {way!r}; choose one of {', '.join(WAYS)}")
    if tokens < STEP_TOKENS:
        raise InputError(f"{tokens} tokens are no step; give at least {STEP_TOKENS}")
    if way == "verified" and problem.verify is None:
        raise InputError(f"{problem.task} has no verifier; {', '.join(VERIFIERS)} have, or take votes")
    before = speaker.cost.new_tokens
    left = lambda: tokens - (speaker.cost.new_tokens - before)  # noqa: E731
    if way in ("direct", "chain"):
        short = way == "direct"
        asked = f"{problem.question}\n\n{'Give the answer alone.' if short else THINK}"
        most = min(tokens, DIRECT_TOKENS) if short else tokens
        answer, note = answer_of(speaker.say([{"role": "user", "content": asked}], most=most).text), ""
    elif way in ("votes", "verified"):
        answer, note = _drawn(problem, speaker, left, seed, verified=way == "verified")
    else:
        answer, note = _tree(problem, speaker, left, seed, depth_first=way == "depth")
    return Attempt(answer, problem.score(answer) >= 0.99, speaker.cost.new_tokens - before, note)


def _drawn(
    problem: Problem, speaker: Speaker, left: Callable[[], int], seed: int, *, verified: bool
) -> tuple[str, str]:
    """Chains by chance while there are tokens; the first that is verified, or what most of them say."""
    answers: list[str] = []
    chat = [{"role": "user", "content": f"{problem.question}\n\n{THINK}"}]
    while left() >= STEP_TOKENS:
        most = min(left(), CHAIN_TOKENS)
        said = speaker.say(chat, most=most, temperature=TEMPERATURE, seed=seed + len(answers))
        answers.append(answer_of(said.text))
        if verified and problem.verify(answers[-1]):
            return answers[-1], f"verified after {len(answers)}"
    given = [answer for answer in answers if answer]
    if not given:
        return "", "no chain came to an answer"
    (answer, count), *_ = Counter(given).most_common(1)
    return answer, f"{count} of {len(answers)} agree"


def _tree(
    problem: Problem, speaker: Speaker, left: Callable[[], int], seed: int, *, depth_first: bool
) -> tuple[str, str]:
    """The tree of thoughts of a question: steps that the model proposes and values itself."""

    def propose(lines: tuple[str, ...]) -> list[tuple[str, ...]]:
        chat = [{"role": "user", "content": f"{problem.question}\n\n{_shown(lines)}{STEP}"}]
        found = []
        for number in range(WIDTH):
            most = min(left(), STEP_TOKENS)
            if most < JUDGE_TOKENS:
                break
            draw = seed + 1000 * len(lines) + number
            said = speaker.say(chat, most=most, temperature=TEMPERATURE, seed=draw).text.strip()
            found.append((*lines, said.splitlines()[0] if said else ""))
        return list(dict.fromkeys(found))

    def worth(lines: tuple[str, ...]) -> float:
        if left() < JUDGE_TOKENS:
            return 0.0
        if is_done(lines) and problem.verify:
            return 2.0 if problem.verify(answer_of(lines[-1])) else 0.0
        chat = [{"role": "user", "content": f"{problem.question}\n\n{_shown(lines)}{JUDGE}"}]
        word = speaker.say(chat, most=JUDGE_TOKENS).text.strip().lower()
        return next((value for name, value in WORTH.items() if word.startswith(name)), WORTH["maybe"])

    def is_done(lines: tuple[str, ...]) -> bool:
        return bool(lines) and _ANSWER.search(lines[-1]) is not None

    best = search((), propose, worth, is_done, more=lambda: left() >= STEP_TOKENS, depth_first=depth_first)
    if is_done(best):
        return answer_of(best[-1]), f"{len(best)} steps"
    return answer_of("\n".join(best)), "no leaf came to an answer; its best one is taken"


def _shown(lines: Sequence[str]) -> str:
    return "Steps so far:\n" + "\n".join(lines) + "\n\n" if lines else ""


def search(
    root: Node,
    propose: Callable[[Node], list[Node]],
    worth: Callable[[Node], float],
    is_done: Callable[[Node], bool],
    *,
    more: Callable[[], bool],
    depth_first: bool = False,
    kept: int = KEPT,
    depth: int = DEPTH,
) -> Node:
    """The best node of a tree: done before not done, then by worth.

    Breadth first, the `kept` best of a level are opened, `depth` levels down. Depth first, the best child is opened
    before its siblings, and what is worth less than `maybe` is cut. Both stop when `more` says so, or at a leaf that is
    done and certain.
    """
    best, rank = root, (False, 0.0)
    waiting: list[tuple[tuple, int, Node, int]] = [((0,), 0, root, 0)]
    count = 0
    while waiting and more():
        level = [heapq.heappop(waiting)] if depth_first else waiting
        waiting = waiting if depth_first else []
        valued: list[tuple[float, Node, int]] = []
        for _, _, node, at in level:
            if at >= depth:
                continue
            for child in propose(node):
                value = worth(child)
                if (is_done(child), value) > rank:
                    best, rank = child, (is_done(child), value)
                if not is_done(child):
                    valued.append((value, child, at + 1))
        if rank[0] and rank[1] >= WORTH["sure"]:
            break
        valued.sort(key=lambda each: -each[0])
        if depth_first:
            valued = [each for each in valued if each[0] >= WORTH["maybe"]]
        for value, node, at in valued if depth_first else valued[:kept]:
            count += 1
            heapq.heappush(waiting, ((-at, -value) if depth_first else (-value,), count, node, at))
    return best


# --- comparing them --------------------------------------------------------------------------------------------------


def compare(
    run: Run, speaker: Speaker, asked: Sequence[Problem], *, tokens: int, ways: Sequence[str] = WAYS, engine: str
) -> dict[str, list[Attempt]]:
    """Every way on the same questions in turn, recorded by task: share right, tokens, and the test against `chain`."""
    from tqdm.auto import tqdm

    found: dict[str, list[Attempt]] = {way: [] for way in ways}
    of_way = {way: [p for p in asked if way != "verified" or p.verify] for way in ways}
    for problem in tqdm(asked, desc="reason", leave=False):
        for way in ways:
            if problem in of_way[way]:
                found[way].append(solve(problem, way, speaker, tokens=tokens, seed=run.seed))
    for way, attempts in found.items():
        if not attempts:
            why = "no task among these has a verifier"
            run.record(way, "right_share:reasoning", None, "1", engine=engine, note=why)
            continue
        share = statistics.wilson(sum(a.right for a in attempts), len(attempts))
        chain = [a.right for p, a in zip(asked, found.get("chain", ()), strict=False) if p in of_way[way]]
        test = statistics.mcnemar([a.right for a in attempts], chain) if len(chain) == len(attempts) else None
        used = sum(a.tokens for a in attempts) / len(attempts)
        details = {"tokens": used, "budget": tokens, "tasks": dict(Counter(p.task for p in of_way[way]))}
        details |= {"against chain": vars(test)} if test else {}
        run.record(way, "right_share:reasoning", unit="1", engine=engine, details=details, **vars(share))
        run.record(way, "tokens_per_task:reasoning", used, "tokens", n=len(attempts), engine=engine)
    return found
