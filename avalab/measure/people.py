"""Human ratings: a sheet of answers to the same requests, the scores that people give them, and what these say.

1. Requests come from `data/prompts/side_by_side.txt`: questions, writing, reasoning, instructions, and requests with
   tools on offer: one tool does it, none helps, or a value is missing. Every artefact answers greedily in any engine.
2. `make_sheet` writes `sheet.json`, requests and answers under the hash of their text, and `key.json`, which says whose
   they are. Equal answers of two artefacts are one answer, read and scored once for both. `order` gives each rater an
   order of requests, and of answers within each, from a hash: the same after a break, another for the next rater.
3. A score is a whole number from 1 to 5 on a criterion of `CRITERIA`; tool use only where tools were on offer. One line
   an answer and rater stands in `ratings/<rater>.jsonl` beside the sheet, rewritten whole at every request. Who comes
   back goes on with what has no scores.
4. How far raters agree is Krippendorff's alpha for ordinal data. An artefact's score is the mean over requests and
   raters; what decides is the preference: how often a rater scored it higher than another on the same request, a tie
   counting half, which takes no distance between scores for granted. Intervals resample requests.
5. Whose answers they are is looked up only when every rater who began has finished: a name that is known earlier is a
   judgement that is lost.

All answers to a request together with a score each is what Novikova, Dusek and Rieser ("RankME", 2018) found more
consistent than scoring them one by one; that criteria need a name and a definition each is what van der Lee et al.
("Best practices for the human evaluation of automatically generated text", 2019) ask for. Nothing corrects for several
comparisons.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from avalab import engines
from avalab.data import chats, toolbox
from avalab.lab import statistics
from avalab.lab.artifacts import Artifact, sha256_of_text
from avalab.lab.errors import InputError, MissingFile
from avalab.lab.run import Run, write_atomically
from avalab.lab.statistics import Estimate
from avalab.measure.answers import Question, Respondent, answer

PROMPTS = Path(toolbox.__file__).with_name("prompts") / "side_by_side.txt"

PLAIN_KINDS, TOOL_KINDS = ("question", "writing", "reasoning", "instruction"), ("call", "no_tool", "ask_back")

ANSWER_TOKENS = 128

CRITERIA = {
    "coherence": "it is well formed, holds together and does not contradict or repeat itself",
    "helpfulness": "it does what was asked, correctly and without what nobody asked for",
    "tool_use": "it calls the right tool with the right values, asks for a missing one, or rightly calls none",
}

SCORES = (1, 2, 3, 4, 5)

FIELDS = ("prompt", "answer", "rater", *CRITERIA, "note", "when")

NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")

NOBODY = "not measured: nobody has rated yet"


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


def load_prompts(count: int = 0, path: Path = PROMPTS) -> list[Prompt]:
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
            raise InputError(f"{path.name}:{number}: {error}") from error
    return found[: count or None]


def _parsed(line: str, known: set[str]) -> Prompt:
    parts = [part.strip() for part in line.split("|", 2)]
    if len(parts) != 3 or not parts[2]:
        raise InputError(f"{line!r} is not `kind | tools or - | request`")
    kind, tools = parts[0], tuple(parts[1].split()) if parts[1] != "-" else ()
    kinds = TOOL_KINDS if tools else PLAIN_KINDS
    if kind not in kinds:
        raise InputError(f"kind {kind!r} {'with' if tools else 'without'} tools; choose one of {', '.join(kinds)}")
    if unknown := [name for name in tools if name not in known]:
        raise InputError(f"no tool {unknown[0]!r} in the toolbox; it has {', '.join(sorted(known))}")
    return Prompt(kind, tools, parts[2])


def answer_prompts(
    artifact: Artifact,
    asked: Sequence[Prompt],
    cache: Path,
    *,
    engine: str = "torch",
    device: str = "cpu",
    new_tokens: int = ANSWER_TOKENS,
) -> list[str]:
    """The artefact's greedy answers in the order of the prompts; read from `cache` where they are known.

    Raises ValueError, EngineUnavailable or NotSupported as the engine does.
    """
    if engine not in engines.ENGINES:
        raise InputError(f"unknown engine {engine!r}; choose one of {', '.join(engines.ENGINES)}")
    respondent = Respondent(artifact, device, engine=engine)
    prompts = [chats.prompt_text(respondent.tokenizer, prompt.chat) for prompt in asked]
    questions, progress = [Question(prompt) for prompt in prompts], f"{artifact.name} in {engine}"
    return answer(respondent, questions, cache, task="side-by-side", tokens=new_tokens, progress=progress)


def make_sheet(folder: Path, asked: Sequence[Prompt], answered: dict[str, list[str]], about: dict[str, dict]) -> dict:
    """Write `sheet.json` and `key.json` into a folder and return the sheet.

    `answered` holds each subject's answers in the order of `asked`; `about` what the key says of it beside (artefact's
    hash, engine). Raises ValueError for fewer than two subjects, or answers that do not match the requests.
    """
    if len(answered) < 2:
        raise InputError(f"nothing to compare: {len(answered)} artefact; give two or more")
    if wrong := [name for name, texts in answered.items() if len(texts) != len(asked)]:
        raise InputError(f"{wrong[0]} has {len(answered[wrong[0]])} answers to {len(asked)} requests")
    sheet = {"prompts": []}
    for index, prompt in enumerate(asked):
        texts = {answer_id(prompt, texts[index]): texts[index].strip() for texts in answered.values()}
        row = {"key": prompt.key, "tools": prompt.described, "answers": dict(sorted(texts.items()))}
        sheet["prompts"].append(asdict(prompt) | row)
    whose = {
        name: about.get(name, {}) | {"answers": {p.key: answer_id(p, t) for p, t in zip(asked, texts, strict=True)}}
        for name, texts in answered.items()
    }
    for name, content in (("sheet.json", sheet), ("key.json", whose)):
        write_atomically(folder / name, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return sheet


def load_sheet(folder: Path) -> dict:
    """The sheet that `make_sheet` wrote. Raises MissingFile where there is none, ValueError for a damaged one."""
    path = folder / "sheet.json"
    try:
        sheet = json.loads(path.read_text(encoding="utf-8"))
        fields = ("key", "tools", "request", "answers")
        if missing := [name for prompt in sheet["prompts"] for name in fields if name not in prompt]:
            raise InputError(f"{path} has a request without {missing[0]}; make the sheet again")
    except FileNotFoundError as error:
        raise MissingFile(f"{folder} holds no sheet.json of the review form; notebook 12 makes one") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}; make the sheet again") from error
    return sheet


def load_key(folder: Path) -> dict[str, dict]:
    """Whose answers they are: subject -> its facts and `answers` (prompt key -> answer id). Not for raters."""
    try:
        return json.loads((folder / "key.json").read_text(encoding="utf-8"))
    except ValueError as error:  # a JSON error is one
        raise InputError(f"{folder / 'key.json'} is damaged: {error}; make the sheet again") from error


def answer_id(prompt: Prompt, text: str) -> str:
    """The identity of an answer to a request: a hash of both, so that it says nothing of who gave it."""
    return sha256_of_text(f"{prompt.key} {text.strip()}")[:16]


def order_for_rater(sheet: dict, rater: str) -> list[tuple[dict, list[str]]]:
    """The requests in this rater's order, each with the ids of its answers in this rater's order."""

    def shuffled(things: list, seed: str) -> list:
        return random.Random(f"side-by-side {seed}").sample(things, len(things))

    rows = shuffled(sheet["prompts"], rater)
    return [(row, shuffled(sorted(row["answers"]), f"{rater} {row['key']}")) for row in rows]


# --- scores -----------------------------------------------------------------------------------------------------------


def criteria_of(prompt: dict) -> tuple[str, ...]:
    """The criteria that answers to a request of the sheet are scored on."""
    return tuple(name for name in CRITERIA if name != "tool_use" or prompt["tools"])


def load_preferences(folder: Path) -> list[dict]:
    """All raters' lines; none before anybody rated.

    Raises ValueError naming file and line for one that is no rating.
    """
    rows = {}
    for path in sorted((folder / "ratings").glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                if set(row) != set(FIELDS) or not {row[name] for name in CRITERIA} <= {*SCORES, None}:
                    raise InputError(f"fields {', '.join(row)}")
            except (ValueError, TypeError) as error:  # a JSON error is a ValueError
                raise InputError(f"{path}:{number}: {error}; a rating has the fields {', '.join(FIELDS)}") from error
            rows[row["rater"], row["prompt"], row["answer"]] = row
    return list(rows.values())


def store_preference(
    folder: Path, prompt: dict, rater: str, scores: dict[str, dict[str, int]], note: str = ""
) -> list[dict]:
    """Keep a rater's scores (answer id -> criterion -> score) of all answers to a request; returns all ratings.

    A second time replaces the first. Raises ValueError for a name that is none, and for scores that are missing, of a
    criterion that does not apply, or not 1 to 5.
    """
    checked_name(rater)
    if set(scores) != set(prompt["answers"]):
        raise InputError(f"{len(scores)} answers are scored; the request has {len(prompt['answers'])}")
    wanted, when = criteria_of(prompt), datetime.now(UTC).isoformat(timespec="seconds")
    kept = {(row["prompt"], row["answer"]): row for row in load_preferences(folder) if row["rater"] == rater}
    for answer_id, given in scores.items():
        if set(given) != set(wanted) or not set(given.values()) <= set(SCORES):
            raise InputError(f"scores {given}; give each of {', '.join(wanted)} one of {', '.join(map(str, SCORES))}")
        row = {"prompt": prompt["key"], "answer": answer_id, "rater": rater, **dict.fromkeys(CRITERIA), **given}
        kept[prompt["key"], answer_id] = row | {"note": note, "when": when}
    write_atomically(folder / "ratings" / f"{rater}.jsonl", "".join(json.dumps(row) + "\n" for row in kept.values()))
    return load_preferences(folder)


def checked_name(rater: str) -> str:
    """The name, if it can be one. Raises ValueError otherwise."""
    if not NAME.fullmatch(rater):
        raise InputError(f"{rater!r} is no name for a rater; use 1 to 32 letters, digits, - and _, such as r1")
    return rater


def pending_requests(sheet: dict, ratings: Sequence[dict], rater: str) -> list[dict]:
    """The requests of the sheet that this rater has not scored all answers of."""
    known = {(row["prompt"], row["answer"]) for row in ratings if row["rater"] == rater}
    return [p for p in sheet["prompts"] if any((p["key"], answer) not in known for answer in p["answers"])]


def requests_left(sheet: dict, ratings: Sequence[dict]) -> dict[str, int]:
    """How many requests each rater has left, of those who scored anything that is on the sheet."""
    on_sheet = {(p["key"], answer) for p in sheet["prompts"] for answer in p["answers"]}
    names = sorted({row["rater"] for row in ratings if (row["prompt"], row["answer"]) in on_sheet})
    return {name: len(pending_requests(sheet, ratings, name)) for name in names}


def why_no_result(sheet: dict, ratings: Sequence[dict]) -> str:
    """Why there is no result yet, '' when there is one: somebody rated, and all who began have finished."""
    left = requests_left(sheet, ratings)
    unfinished = [f"{name} has {count} of {len(sheet['prompts'])} left" for name, count in left.items() if count]
    if not left:
        return NOBODY
    return f"not measured: {', '.join(unfinished)} (to go on without, remove ratings/NAME.jsonl)" if unfinished else ""


@dataclass(frozen=True)
class Preference:
    """One artefact against another, request by request and rater by rater; `share`: preferred, a tie counting half."""

    preferred: int
    tied: int
    other: int
    share: Estimate
    verdict: str

    def __str__(self) -> str:
        counts = f"preferred {self.preferred}, tied {self.tied}, the other preferred {self.other} times"
        ends = "" if self.share.low is None else f" [{self.share.low:.0%}, {self.share.high:.0%}]"
        return f"{self.verdict}: {counts}; {self.share.value:.0%}{ends}"


def preference_scores(
    sheet: dict, key: dict, ratings: Sequence[dict], criterion: str
) -> dict[str, Float[Tensor, "prompt rater"]]:
    """Each subject's scores. Raises ValueError, with the reason, while there is no result."""
    if reason := why_no_result(sheet, ratings):
        raise InputError(reason)
    names = list(requests_left(sheet, ratings))
    asked = [p["key"] for p in sheet["prompts"] if criterion in criteria_of(p)]
    known = {(row["rater"], row["prompt"], row["answer"]): row[criterion] for row in ratings}
    return {
        subject: torch.tensor([[float(known[name, p, facts["answers"][p]]) for name in names] for p in asked])
        for subject, facts in key.items()
    }


def prefer(
    ours: Float[Tensor, "prompt rater"], theirs: Float[Tensor, "prompt rater"], *, resamples: int, seed: int
) -> Preference:
    """Compare two subjects' scores; `better` when the interval of the preferred share is above one half."""
    signs = torch.sign(ours - theirs)
    share = statistics.mean((signs + 1) / 2, resamples=resamples, seed=seed)
    ends = (None if end is None else end - 0.5 for end in (share.low, share.high))
    verdict = statistics.verdict(Estimate(share.value - 0.5, *ends, share.n), lower_is_better=False)
    return Preference(*(int((signs == sign).sum()) for sign in (1, 0, -1)), share, verdict)


def record_preferences(run: Run, sheet: dict, key: dict, ratings: Sequence[dict], *, baseline: str) -> str:
    """Append scores, preferences over `baseline` and agreement; without a result, one record whose note is returned."""
    if reason := why_no_result(sheet, ratings):
        run.record("all", "rating", None, "1", note=reason)
        return reason
    resamples, seed = run.profile.resamples, run.seed
    for criterion in (c for c in CRITERIA if any(c in criteria_of(p) for p in sheet["prompts"])):
        _record_agreement(run, sheet, ratings, criterion)
        given = preference_scores(sheet, key, ratings, criterion)
        for subject, each in given.items():
            facts = {k: key[subject].get(k, "") for k in ("artifact_sha256", "engine")}
            record, details = partial(run.record, subject, unit="1", **facts), {"raters": each.shape[1]}
            mean = statistics.mean(each, resamples=resamples, seed=seed)
            record(f"rating:{criterion}", details=details, **vars(mean))
            if subject != baseline:
                found = prefer(each, given[baseline], resamples=resamples, seed=seed)
                details = details | {"over": baseline, "verdict": found.verdict, "words": str(found)}
                record(f"preferred_share:{criterion}", details=details, **vars(found.share))
    return ""


def _record_agreement(run: Run, sheet: dict, ratings: Sequence[dict], criterion: str) -> None:
    record = partial(run.record, "raters", f"krippendorff_alpha:{criterion}", unit="1")
    names = list(requests_left(sheet, ratings))
    if len(names) < 2:
        record(value=None, note="agreement needs two raters; there is one")
        return
    units = [(p["key"], a) for p in sheet["prompts"] if criterion in criteria_of(p) for a in p["answers"]]
    known = {(row["rater"], row["prompt"], row["answer"]): row[criterion] for row in ratings}
    values = np.array([[known[name, *unit] for unit in units] for name in names], dtype=float)
    clusters, resamples = [key for key, _ in units], run.profile.resamples
    try:
        found = statistics.rater_agreement(values, clusters, resamples=resamples, seed=run.seed)
    except ValueError as error:  # everybody gave everything the same score
        record(value=None, note=str(error))
        return
    record(details={"raters": len(names), "allows": statistics.reliability(found)}, **vars(found))
