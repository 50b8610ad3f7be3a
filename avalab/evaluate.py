"""Can an artefact do the work: call functions (BFCL v4, or the lab's own tools) and write code (HumanEval).

1. A case becomes a chat: the tools in a system message, then the question. The artefact answers greedily, in one of
   three modes: `free` (any text), `grammar` (calls that fit the schemas, or a plain-text refusal) and `forced` (calls
   only, which says how well it fills arguments in, and cannot refuse).
2. Every answer is appended to a JSONL file as soon as its batch is there, under a key of prompt and schemas, in a file
   named after artefact, task, mode and decoding code: a killed run goes on, a longer one begins with what is known.
3. `calls.check` judges the answers, `sandbox.passes` the programs. Judging is quick and never cached.

Shares carry Wilson's score interval (1927). Two artefacts are compared on the same cases by the exact form of McNemar's
test (1947): of the cases that only one of them gets right, is the split compatible with a fair coin?

Outside the parallel categories the grammar allows one call an answer, as a caller does who switches parallel calls off.
HumanEval is completion, not chat: the prompt as it stands, cut where the function ends (Chen et al. 2021).

What it does not do: sampling, multi-turn cases, or the same batches whatever was cached: with bf16 arithmetic, another
batch can turn a near-tie of two tokens.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avalab import answer_cache, artifacts, assets, calls, grammars, models, sandbox, statistics
from avalab.artifacts import Artifact
from avalab.call_cases import cases, prompt
from avalab.calls import Case, Verdict
from avalab.code import code_of
from avalab.experiment import ROOT, Run
from avalab.sandbox import Problem
from avalab.statistics import Estimate

MODES = {"free": "call_accuracy", "grammar": "call_accuracy_grammar", "forced": "call_accuracy_forced"}
CALL_TOKENS, CODE_TOKENS = 128, 256
_END_OF_FUNCTION = re.compile(r"\n(?=\S)|<\|")


@dataclass(frozen=True)
class Respondent:
    """An artefact that answers. What it needs is loaded when it is first asked something new, and then kept."""

    artifact: Artifact
    device: str = "cpu"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The artefact's tokenizer."""
        return models.load_tokenizer(self.artifact)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, loaded back from the artefact's folder in its own format."""
        return models.load(self.artifact, self.device)

    @cached_property
    def compiler(self) -> grammars.Compiler:
        """Makes grammars for this tokenizer and this number of logits."""
        return grammars.compiler(self.tokenizer, self.model.config.vocab_size)


def problems(run: Run, limit: int | None = None) -> list[Problem]:
    """The first problems of the profile's set: HumanEval, or the lab's own few where nothing may be downloaded."""
    source = run.profile.code_problems
    path = ROOT / source if (ROOT / source).is_file() else assets.fetch(source)
    return sandbox.load_problems(path)[: limit or run.profile.humaneval_items]


def answer_calls(respondent: Respondent, asked: list[Case], mode: str, cache: Path, *, progress: str = "") -> list[str]:
    """The answers to cases of one category, in their order; read from `cache` where known. Raises as `metric` does."""
    metric(asked[0].category, mode)  # refuses such a mode
    prompts, keys = _call_prompts(respondent, asked, mode)

    def generate(wanted: list[int]) -> Iterator[tuple[int, str]]:
        chosen = None if mode == "free" else [_grammar(respondent, asked[i], mode) for i in wanted]
        return _generated(respondent, [prompts[i] for i in wanted], CALL_TOKENS, chosen)

    path = _cache_file(cache, respondent, f"{asked[0].category}-{mode}")
    return answer_cache.resumed(path, keys, generate, progress=progress)


def items_per_s(respondent: Respondent, asked: list[Case], mode: str, cache: Path) -> float | None:
    """How many of these cases were answered a second, loading apart, whenever that was; None where it is not known."""
    path = _cache_file(cache, respondent, f"{asked[0].category}-{mode}")
    keys = _call_prompts(respondent, asked, mode)[1]
    taken = answer_cache.seconds(path, keys)
    return len(set(keys)) / taken if taken else None


def _call_prompts(respondent: Respondent, asked: list[Case], mode: str) -> tuple[list[str], list[str]]:
    """The prompt of each case, and the key that its answer is kept under."""
    prompts = [prompt(respondent.tokenizer, case) for case in asked]
    schemas = [{f["name"]: calls.to_json_schema(f) for f in case.functions} for case in asked]
    keys = [_key(text, schema if mode != "free" else None) for text, schema in zip(prompts, schemas, strict=True)]
    return prompts, keys


def answer_code(respondent: Respondent, problems: list[Problem], cache: Path, *, progress: str = "") -> list[str]:
    """Completions of HumanEval prompts, cut where the function ends; read from `cache` where they are known."""
    keys = [_key(problem.prompt, None) for problem in problems]

    def generate(wanted: list[int]) -> Iterator[tuple[int, str]]:
        return _generated(respondent, [problems[i].prompt for i in wanted], CODE_TOKENS, None)

    path = _cache_file(cache, respondent, "humaneval")
    texts = answer_cache.resumed(path, keys, generate, progress=progress)
    return [_END_OF_FUNCTION.split(text, maxsplit=1)[0] for text in texts]


def judge(asked: list[Case], texts: list[str]) -> list[Verdict]:
    """One verdict a case."""
    return [calls.check(case, calls.parse_calls(text)) for case, text in zip(asked, texts, strict=True)]


def metric(category: str, mode: str) -> str:
    """The metric's name, such as `call_accuracy_forced:multiple`; ValueError for a mode the category cannot have."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    if not category.endswith("irrelevance"):
        return f"{MODES[mode]}:{category}"
    if mode == "forced":
        raise ValueError(f"mode 'forced' cannot call nothing, the right answer in {category}; choose free or grammar")
    name = "irrelevance_accuracy" if mode == "grammar" else "irrelevance_accuracy_free"
    return name if category == "irrelevance" else f"{name}:{category}"


def answerable(categories: Sequence[str], mode: str) -> list[str]:
    """The categories that a mode can answer: not irrelevance when a call is forced."""
    return [c for c in categories if not (mode == "forced" and c.endswith("irrelevance"))]


def record(
    run: Run, subject: str, respondent: Respondent, *, category: str, mode: str, limit: int | None = None, skip: int = 0
) -> list[Verdict]:
    """Append the accuracy of one category, its errors and speed: `limit` cases (or the profile's number) after `skip`.

    Raises ValueError when no case of the category is left.
    """
    asked = cases(category, skip + (limit or run.profile.call_items))[skip:]
    if not asked:
        raise ValueError(f"skip {skip} leaves no case of {category}; it has {len(cases(category, skip))}")
    cache, label = run.artifacts_dir / "cache", f"{subject} {category} {mode}"
    verdicts = judge(asked, answer_calls(respondent, asked, mode, cache, progress=label))
    details = {"errors": errors(verdicts), "mode": mode, "skipped": skip, "max_calls": _max_calls(category)}
    details["items_per_s"] = items_per_s(respondent, asked, mode, cache)
    share = statistics.wilson(sum(v.correct for v in verdicts), len(verdicts))
    _record(run, subject, respondent, metric(category, mode), share, details)
    return verdicts


def record_pass_at_1(run: Run, subject: str, respondent: Respondent, problems: list[Problem]) -> list[bool]:
    """Append pass@1 (greedy) of HumanEval problems; how the programs ended is in the details.

    Raises ValueError where this machine's sandbox lacks what model-written code must be confined by.
    """
    active = set(sandbox.layers())
    if active.isdisjoint({"namespaces", "seccomp"}) or active.isdisjoint({"root", "landlock"}):
        raise ValueError(f"the sandbox of this machine has only {', '.join(sorted(active))}; code is not run in it")
    texts = answer_code(respondent, problems, run.artifacts_dir / "cache", progress=f"{subject} humaneval")
    bar = tqdm(zip(problems, texts, strict=True), total=len(texts), desc="sandbox", leave=False)
    endings = [sandbox.passes(problem, text).status for problem, text in bar]
    share = statistics.wilson(endings.count("finished"), len(endings))
    _record(run, subject, respondent, "pass_at_1", share, {"endings": dict(Counter(endings))})
    return [ending == "finished" for ending in endings]


def errors(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How often each error class occurred, the most frequent first."""
    return dict(Counter(v.error for v in verdicts if v.error).most_common())


def _record(run: Run, subject: str, respondent: Respondent, metric: str, share: Estimate, details: dict) -> None:
    about = {"artifact_sha256": respondent.artifact.sha256, "engine": "torch", "details": details}
    run.record(subject, metric, unit="1", **vars(share), **about)


def _max_calls(category: str) -> int:
    return grammars.MAX_CALLS if "parallel" in category else 1


def _grammar(respondent: Respondent, case: Case, mode: str) -> grammars.CallGrammar:
    refusal, most = mode == "grammar", _max_calls(case.category)
    return grammars.call_grammar(respondent.compiler, case.functions, refusal=refusal, max_calls=most)


def _generated(respondent: Respondent, prompts: list[str], tokens: int, chosen: list | None) -> Iterator:
    how = {"grammars": chosen, "max_new_tokens": tokens}
    return grammars.answers(respondent.model, respondent.tokenizer, prompts, **how)


def _key(text: str, schemas: dict | None) -> str:
    return artifacts.sha256_of_text(json.dumps([text, schemas]))[:16]


def _cache_file(cache: Path, respondent: Respondent, task: str) -> Path:
    code = code_of(answer_calls, answer_code, type(respondent))  # answers that older code gave are not trusted
    settings = artifacts.sha256_of_text(f"{code} {CALL_TOKENS} {CODE_TOKENS} {respondent.device}")
    return cache / f"answers-{respondent.artifact.sha256[:16]}-{task}-{settings[:8]}.jsonl"
