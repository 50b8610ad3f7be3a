"""Answers of an artefact in whichever engine runs it: function calls (BFCL v4, the lab's tools) and code (HumanEval).

1. A case becomes a chat: the tools in a system message, then the question. The artefact answers greedily, in one of
   three modes: `free` (any text), `grammar` (calls that fit the schemas, or a plain-text refusal) and `forced` (calls
   only, which says how well it fills arguments in, and cannot refuse). Outside the parallel categories the grammar
   allows one call an answer, as a caller does who switches parallel calls off.
2. torch answers in batches, and reads a beginning that the grammar leaves no choice about with the prompt. Any other
   engine answers one question after another, in a process of its own with a time limit, and chooses the tokens of that
   beginning too: the same text, perhaps in other tokens.
3. Every answer is appended to a file of the cache as soon as it is there, under a key of prompt and grammar, in a file
   named after artefact, engine, task and decoding code: a killed run goes on. With bf16 arithmetic, another batch can
   turn a near-tie of two tokens, and what is cached decides the batches.
4. `calls.check_calls` judges the answers, `sandbox.passes` the programs. Judging is quick and never cached. HumanEval
   is completion, not chat: the prompt as it stands, cut where the function ends (Chen et al. 2021).
5. The loss of right answers moves long before the share of right calls does, which needs hundreds of cases to show ten
   points. It is the mean negative log-likelihood of the answer's tokens, split off as in training. What a training set
   is worth is a mean over draws of the set: each draw trains an artefact of its own, and the increase over a baseline
   is paired by draw, because chance in the set and in training moves the loss more than the choice of examples does.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avalab import engines
from avalab.data import calls, grammars, packing
from avalab.data.calls import Case, Verdict, cases
from avalab.lab import artifacts, assets, sandbox, statistics
from avalab.lab.artifacts import Artifact
from avalab.lab.cache import cache_path, cached_lines, cached_tensors, known_lines, seconds_of_lines
from avalab.lab.code import code_of
from avalab.lab.errors import InputError
from avalab.lab.run import ROOT, Run
from avalab.lab.sandbox import Problem
from avalab.lab.statistics import Estimate
from avalab.measure import cell
from avalab.measure.quality import LIMIT_SECONDS, TORCH, engine_code
from avalab.models import checkpoint, predict
from avalab.models.stops import stop_tokens

MODES = {"free": "call_accuracy", "grammar": "call_accuracy_grammar", "forced": "call_accuracy_forced"}

CALL_TOKENS, CODE_TOKENS = 128, 256

SECONDS_PER_ANSWER = 60.0  # an engine that answers slower than that is stopped; what it answered is kept

_END_OF_FUNCTION = re.compile(r"\n(?=\S)|<\|")


@dataclass(frozen=True)
class Respondent:
    """An artefact that answers in an engine. What torch needs is loaded when it is first asked something new."""

    artifact: Artifact
    device: str = "cpu"
    engine: str = field(default=TORCH, kw_only=True)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The artefact's tokenizer."""
        return checkpoint.load_tokenizer(self.artifact)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, loaded back from the artefact's folder in its own format."""
        return checkpoint.load_model(self.artifact, self.device)

    @cached_property
    def context(self) -> int:
        """The longest sequence that the model was made for, prompt and answer together."""
        return engines.facts(self.artifact.path).context

    @cached_property
    def compiler(self) -> grammars.Compiler:
        """Makes grammars for this tokenizer and this number of logits."""
        stops = stop_tokens(self.model, self.tokenizer)
        return grammars.grammar_compiler(self.tokenizer, self.model.config.vocab_size, stops)


@dataclass(frozen=True)
class Question:
    """A finished prompt; with `functions`, the answer has to be calls to them, or with `refusal` a text without one."""

    prompt: str
    functions: list[dict] | None = None
    refusal: bool = False
    max_calls: int = 1

    @property
    def key(self) -> str:
        """Its identity: a hash of all of it."""
        return artifacts.sha256_of_text(json.dumps(asdict(self)))[:16]


def answer(
    respondent: Respondent, questions: Sequence[Question], cache: Path, *, task: str, tokens: int, progress: str = ""
) -> list[str]:
    """The answers to questions of a task in their order, `tokens` long at most; read from `cache` where known.

    A prompt that leaves no room for so many in the model's context is not asked; its answer is the empty text.
    Raises ValueError for an artefact that cannot be loaded; from engines other than torch EngineUnavailable,
    NotSupported, or RuntimeError in one line for any other failure.
    """
    if any(late := too_long(respondent, questions, tokens)):
        fitting = [question for question, is_late in zip(questions, late, strict=True) if not is_late]
        given = iter(answer(respondent, fitting, cache, task=task, tokens=tokens, progress=progress))
        return ["" if is_late else next(given) for is_late in late]
    path, keys = _answers_file(respondent, cache, task, tokens), [question.key for question in questions]
    if respondent.engine == TORCH:

        def generate(wanted: list[int]) -> Iterator[tuple[int, str]]:
            return _in_batches(respondent, [questions[i] for i in wanted], tokens)

        return cached_lines(path, keys, generate, progress=progress)
    known = known_lines(path)
    missing = [asdict(question) for question, key in zip(questions, keys, strict=True) if key not in known]
    if missing:
        request = {"questions": missing, "tokens": tokens, "path": str(path)}
        limit = max(LIMIT_SECONDS, SECONDS_PER_ANSWER * len(missing))
        target = "avalab.measure.answers:answer_questions"
        cell.ask_engine(target, respondent.artifact, respondent.engine, request, limit)
        known = known_lines(path)
    return [known[key]["text"] for key in keys]


def too_long(respondent: Respondent, questions: Sequence[Question], tokens: int) -> list[bool]:
    """Which prompts leave less than `tokens` of the model's context: beyond it a model was never trained."""
    room = respondent.context - tokens
    encode = respondent.tokenizer
    return [len(encode(question.prompt, add_special_tokens=False).input_ids) > room for question in questions]


def answer_questions(request: dict) -> dict:
    """In a process of its own: append an engine's answers to the file `path`, one after another; returns how many."""
    questions = [Question(**question) for question in request["questions"]]

    def generate(wanted: list[int]) -> Iterator[tuple[int, str]]:
        opened = engines.load(request["engine"], Path(request["folder"]))
        tokenizer = checkpoint.load_tokenizer(Path(request["folder"]))
        compiler = grammars.grammar_compiler(tokenizer, opened.facts.vocabulary, opened.facts.stops)
        try:
            for position, index in enumerate(wanted):
                prompt = tokenizer(questions[index].prompt, add_special_tokens=False).input_ids
                new = opened.generate(prompt, request["tokens"], _grammar(compiler, questions[index]))
                yield position, tokenizer.decode(new, skip_special_tokens=True)
        finally:
            opened.close()

    return {"answers": len(cached_lines(Path(request["path"]), [q.key for q in questions], generate))}


def _in_batches(respondent: Respondent, questions: list[Question], tokens: int) -> Iterator[tuple[int, str]]:
    bound = [_grammar(respondent.compiler, question) for question in questions if question.functions is not None]
    return grammars.greedy_answers(
        respondent.model,
        respondent.tokenizer,
        [question.prompt for question in questions],
        grammars=bound or None,
        max_new_tokens=tokens,
    )


def _grammar(compiler: grammars.Compiler, question: Question) -> grammars.CallGrammar | None:
    if question.functions is None:
        return None
    return grammars.call_grammar(compiler, question.functions, refusal=question.refusal, max_calls=question.max_calls)


def _answers_file(respondent: Respondent, cache: Path, task: str, tokens: int) -> Path:
    chosen = (_in_batches, type(respondent))  # answers that older code gave are not trusted
    if respondent.engine != TORCH:
        chosen = (answer_questions, engine_code(respondent.engine))
    settings = artifacts.sha256_of_text(f"{code_of(*chosen)} {tokens} {respondent.device}")[:8]
    return cache_path(cache, "answers", respondent.artifact.sha256, respondent.engine, task, settings, suffix=".jsonl")


# --- function calls ---------------------------------------------------------------------------------------------------


def answer_calls(respondent: Respondent, asked: list[Case], mode: str, cache: Path, *, progress: str = "") -> list[str]:
    """The answers to cases of one category, in their order. Raises as `answer` and `call_metric` do."""
    call_metric(asked[0].category, mode)  # refuses such a mode
    questions, task = _questions(respondent, asked, mode), f"{asked[0].category}-{mode}"
    return answer(respondent, questions, cache, task=task, tokens=CALL_TOKENS, progress=progress)


def items_per_s(respondent: Respondent, asked: list[Case], mode: str, cache: Path) -> float | None:
    """How many of these cases were answered a second, loading apart, whenever that was; None where it is not known."""
    path = _answers_file(respondent, cache, f"{asked[0].category}-{mode}", CALL_TOKENS)
    keys = [question.key for question in _questions(respondent, asked, mode)]
    taken = seconds_of_lines(path, keys)
    return len(set(keys)) / taken if taken else None


def _questions(respondent: Respondent, asked: list[Case], mode: str) -> list[Question]:
    prompts = [calls.case_prompt(respondent.tokenizer, case) for case in asked]
    if mode == "free":
        return [Question(prompt) for prompt in prompts]
    return [
        Question(prompt, case.functions, refusal=mode == "grammar", max_calls=_max_calls(case.category))
        for prompt, case in zip(prompts, asked, strict=True)
    ]


def _max_calls(category: str) -> int:
    return grammars.MAX_CALLS if "parallel" in category else 1


def judge_calls(asked: list[Case], texts: list[str]) -> list[Verdict]:
    """One verdict a case."""
    return [calls.check_calls(case, calls.parse_calls(text)) for case, text in zip(asked, texts, strict=True)]


def count_errors(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How often each error class occurred, the most frequent first."""
    return dict(Counter(v.error for v in verdicts if v.error).most_common())


def call_metric(category: str, mode: str) -> str:
    """The metric's name, such as `call_accuracy_forced:multiple`; ValueError for a mode the category cannot have."""
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    if not category.endswith("irrelevance"):
        return f"{MODES[mode]}:{category}"
    if mode == "forced":
        raise InputError(f"mode 'forced' cannot call nothing, the right answer in {category}; choose free or grammar")
    name = "irrelevance_accuracy" if mode == "grammar" else "irrelevance_accuracy_free"
    return name if category == "irrelevance" else f"{name}:{category}"


def answerable(categories: Sequence[str], mode: str) -> list[str]:
    """The categories that a mode can answer: not irrelevance when a call is forced."""
    return [c for c in categories if not (mode == "forced" and c.endswith("irrelevance"))]


def record_calls(
    run: Run, subject: str, respondent: Respondent, *, category: str, mode: str, limit: int | None = None, skip: int = 0
) -> list[Verdict]:
    """Append the accuracy of one category, its errors and speed: `limit` cases (or the profile's number) after `skip`.

    A failure of an engine other than torch is a record without value that says why, and nothing is returned.
    Raises ValueError when no case of the category is left.
    """
    asked = cases(category, skip + (limit or run.profile.call_items))[skip:]
    if not asked:
        raise InputError(f"skip {skip} leaves no case of {category}; it has {len(cases(category, skip))}")
    cache, metric = run.artifacts_dir / "cache", call_metric(category, mode)
    record = partial(
        run.record, subject, metric, unit="1", artifact_sha256=respondent.artifact.sha256, engine=respondent.engine
    )
    try:
        texts = answer_calls(respondent, asked, mode, cache, progress=f"{subject} {category} {mode}")
    except (RuntimeError, ValueError) as error:  # EngineUnavailable is the one, NotSupported the other
        if respondent.engine == TORCH:
            raise
        record(value=None, note=str(error))
        return []
    late = too_long(respondent, _questions(respondent, asked, mode), CALL_TOKENS)
    verdicts = [
        Verdict(False, "too_long") if is_late else verdict
        for is_late, verdict in zip(late, judge_calls(asked, texts), strict=True)
    ]
    details = {"errors": count_errors(verdicts), "mode": mode, "skipped": skip, "max_calls": _max_calls(category)}
    details["items_per_s"] = items_per_s(respondent, asked, mode, cache)
    beyond = (
        f"{sum(late)} of {len(asked)} prompts exceed the context of {respondent.context:,} tokens: counted as wrong"
    )
    share = statistics.wilson(sum(v.correct for v in verdicts), len(verdicts))
    record(details=details, note=beyond if any(late) else "", **vars(share))
    return verdicts


def read_modes(verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    """One line on what the modes say together: whether the form of a call is missing, or what stands in it.

    `verdicts` are those of the same cases in every mode, cases in which a call is right. McNemar's test decides between
    forced and free answers. Raises ValueError for modes of unequal numbers of cases, or none.
    """
    right = {mode: [verdict.correct for verdict in each] for mode, each in verdicts.items()}
    test = statistics.mcnemar(right["forced"], right["free"])
    forced, free = (statistics.wilson(sum(right[mode]), test.n).value for mode in ("forced", "free"))
    numbers = f"right when a call is forced {forced:.0%}, in free form {free:.0%}"
    said = {
        "better": "the form is what is missing",
        "worse": "forcing a call does harm",
        "not distinguishable": "the form is not what is missing" if forced else "more than the form is missing",
    }
    called = sum(verdict.error != "no_call" for verdict in verdicts["grammar"])
    choice = f"left the choice (grammar), it calls in {called} of {test.n} cases that need a call"
    return f"{said[test.verdict]}: {numbers} (p = {test.p_value:.2g}); {choice}"


# --- code -------------------------------------------------------------------------------------------------------------


def code_problems(run: Run, limit: int | None = None) -> list[Problem]:
    """The first problems of the profile's set: HumanEval, or the lab's own few where nothing may be downloaded."""
    source = run.profile.code_problems
    path = ROOT / source if (ROOT / source).is_file() else assets.fetch_asset(source)
    return sandbox.load_problems(path)[: limit or run.profile.humaneval_items]


def record_pass_at_1(run: Run, subject: str, respondent: Respondent, problems: list[Problem]) -> list[bool]:
    """Append pass@1 (greedy) of HumanEval problems; how the programs ended is in the details.

    Raises ValueError where this machine's sandbox lacks what model-written code must be confined by.
    """
    active = set(sandbox.layers())
    if active.isdisjoint({"namespaces", "seccomp"}) or active.isdisjoint({"root", "landlock"}):
        raise InputError(f"the sandbox of this machine has only {', '.join(sorted(active))}; code is not run in it")
    questions, cache = [Question(problem.prompt) for problem in problems], run.artifacts_dir / "cache"
    progress = f"{subject} humaneval"
    texts = answer(respondent, questions, cache, task="humaneval", tokens=CODE_TOKENS, progress=progress)
    texts = [_END_OF_FUNCTION.split(text, maxsplit=1)[0] for text in texts]
    bar = tqdm(zip(problems, texts, strict=True), total=len(texts), desc="sandbox", leave=False)
    endings = [sandbox.passes(problem, text).status for problem, text in bar]
    share = statistics.wilson(endings.count("finished"), len(endings))
    run.record(
        subject,
        "pass_at_1",
        unit="1",
        artifact_sha256=respondent.artifact.sha256,
        engine=respondent.engine,
        details={"endings": dict(Counter(endings))},
        **vars(share),
    )
    return [ending == "finished" for ending in endings]


# --- loss of right answers --------------------------------------------------------------------------------------------


def answer_losses(respondent: Respondent, examples: Sequence[dict], cache: Path) -> Float[Tensor, "example"]:
    """Mean loss of each example's answer tokens in nats, in torch; read from `cache` when it was scored before."""
    encoded = [packing.encode_chat(respondent.tokenizer, example["messages"]) for example in examples]
    identity = artifacts.sha256_of_text(str([(e.ids, e.labels) for e in encoded]))
    parts = (respondent.artifact.sha256, identity, torch.device(respondent.device).type, code_of(answer_losses)[:8])
    path = cache_path(cache, "answer-loss", *parts)

    def compute() -> dict[str, Tensor]:
        bar = tqdm(encoded, desc=f"score {respondent.artifact.name}", leave=False)
        return {"loss": torch.tensor([_answer_loss(respondent, example) for example in bar])}

    return cached_tensors(path, compute)["loss"]


@torch.inference_mode()
def _answer_loss(respondent: Respondent, example: packing.Encoded) -> float:
    """Logits exist only where there is loss."""
    labels = torch.tensor(example.labels)
    counted = (labels != packing.IGNORED).nonzero().squeeze(-1)
    hidden = predict.hidden_states(respondent.model, torch.tensor([example.ids]))[0, counted.to(respondent.device)]
    log_probabilities = predict.log_probabilities(hidden, *predict.output_head(respondent.model)).cpu()
    return -log_probabilities.gather(-1, labels[counted, None]).mean().item()


def record_answer_loss(
    run: Run,
    subject: str,
    losses: Float[Tensor, "draw example"],
    *,
    baseline: Float[Tensor, "_ _"],
    part: str,
    details: dict | None = None,
) -> Estimate:
    """Append `answer_loss:<part>` and its increase over the baseline, `answer_loss_rise:<part>`, which is returned.

    Raises ValueError when the two have another number of draws or examples.
    """
    if losses.shape != baseline.shape:
        raise InputError(f"cannot pair losses of shape {tuple(losses.shape)} with {tuple(baseline.shape)}")
    loss = statistics.over_draws(losses.mean(-1))
    increase = statistics.over_draws((losses - baseline).mean(-1))
    told = {"examples": losses.shape[1], **(details or {})}
    record = partial(run.record, subject, unit="nats/token", engine=TORCH)
    record(f"answer_loss:{part}", details=told, **vars(loss))
    verdict = statistics.verdict(increase)
    record(f"answer_loss_rise:{part}", details=told | {"verdict": verdict}, **vars(increase))
    return increase
