"""Any task of lm-evaluation-harness, scored on an artefact that is loaded back from its folder.

1. The harness (Gao et al., "A framework for few-shot language model evaluation", lm-eval 0.4) knows the tasks: their
   data, prompts, number of examples and metrics. A folder of task files adds tasks of one's own (`include_path`), with
   JSON lines beside them and no network; paths in such a file are relative to the folder. A task file may name Python
   functions beside it: such a folder is code, to be chosen like a program.
2. The model is the one `checkpoint.load_model` gives, wrapped as the harness's transformers model.
3. Tasks are scored one by one, and the harness's answer for each is kept as JSON under a key of everything it depends
   on: a killed run goes on with the next task.
4. A number becomes a `Record` of the metric `harness:<task>:<metric>`, with `:<filter>` behind it where the harness
   extracts answers in several ways. The interval is Wilson's where the standard error is that of a share of right
   answers, else 1.96 standard errors to each side; none where the harness gives no standard error.

What it does not do: tasks that run model-written code in this process. The harness asks for a confirmation that is
never given here; `answers` has HumanEval in a sandbox.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from avalab.engines import EngineUnavailable
from avalab.lab import artifacts, process, statistics
from avalab.lab.artifacts import Artifact
from avalab.lab.assets import AssetUnavailable
from avalab.lab.cache import cache_path, cached_document
from avalab.lab.errors import InputError
from avalab.lab.run import Record, Run, slug
from avalab.lab.statistics import Estimate
from avalab.models import checkpoint

BATCH = 16

KEPT = ("results", "n-samples", "versions", "n-shot", "higher_is_better")  # of the harness's answer

INSTALL = 'pip install -e ".[harness]"'

Z = 1.959964  # the 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Score:
    """One number of one task; `details` are the harness's version of the task, its examples and its standard error."""

    task: str
    metric: str
    estimate: Estimate
    details: dict = field(default_factory=dict)


def record_tasks(
    artifact: Artifact,
    tasks: Sequence[str],
    *,
    run: Run,
    limit: int | None = None,
    folder: Path | None = None,
    chat: bool = False,
) -> list[Record]:
    """Append a record for each metric of each task (of a group of tasks: of its members too), and return them.

    `limit` documents of each task (the profile's number without), `folder` holds tasks of one's own, `chat` puts the
    prompts into the chat template. Raises EngineUnavailable without the library, ValueError for a task it does not
    know, AssetUnavailable naming the task whose data cannot be reached.
    """
    require_harness()
    if not tasks:
        raise InputError("no task named; give at least one, such as hellaswag, mmlu or gsm8k")
    settings = {"limit": limit or run.profile.call_items, "chat": chat, "seed": run.seed, "batch": BATCH}
    settings |= {"lm_eval": importlib.metadata.version("lm_eval"), "folder_sha256": _folder_sha256(folder)}
    record = functools.partial(run.record, artifact.name, unit="1", artifact_sha256=artifact.sha256, engine="torch")
    recorded = []
    for answer in _evaluated(artifact, list(dict.fromkeys(tasks)), run, settings, folder):
        for score in score_tasks(answer):
            metric, details = f"harness:{score.task}:{score.metric}", settings | score.details
            recorded.append(record(metric, details=details, **vars(score.estimate)))
    return recorded


def require_harness() -> None:
    """Raise EngineUnavailable with the install command where lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise EngineUnavailable(f"tasks of lm-evaluation-harness need the package lm-eval; install it: {INSTALL}")


def score_tasks(answer: dict) -> Iterator[Score]:
    """What the harness's results say, in their order: every number that is one, with its interval.

    `answer` is what `lm_eval.simple_evaluate` returns (`results` and the tables beside it).
    """
    for task, row in answer["results"].items():
        counted = answer.get("n-samples", {}).get(task, {})
        for key, value in row.items():
            name, comma, how = key.partition(",")
            if not comma or name.endswith("_stderr") or not _is_number(value):
                continue
            error = row.get(f"{name}_stderr,{how}")
            details = {
                "documents": counted.get("original"),
                "version": answer.get("versions", {}).get(task),
                "shots": answer.get("n-shot", {}).get(task),
                "stderr": error if _is_number(error) else None,
                "higher_is_better": answer.get("higher_is_better", {}).get(task, {}).get(name),
            }
            n = row.get("sample_count", {}).get(key) or row.get("sample_len") or counted["effective"]
            metric = name if how == "none" else f"{name}:{how}"
            yield Score(task, metric, interval(value, details["stderr"], n), details)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def interval(value: float, stderr: float | None, n: int) -> Estimate:
    """The value with its 95 % interval: Wilson's for a share of `n` right answers, else the normal one.

    A share is told by its standard error, sqrt(p (1 - p) / (n - 1)), and by p n being a whole number. Without a
    standard error there is no interval.
    """
    if stderr is None:
        return Estimate(float(value), None, None, n)
    if n > 1 and 0 <= value <= 1 and math.isclose(value * n, round(value * n), abs_tol=1e-6):
        of_a_share = math.sqrt(value * (1 - value) / (n - 1))
        if math.isclose(stderr, of_a_share, rel_tol=1e-6, abs_tol=1e-9):
            return statistics.wilson(round(value * n), n)
    return Estimate(float(value), value - Z * stderr, value + Z * stderr, n)


def _evaluated(artifact: Artifact, tasks: list[str], run: Run, settings: dict, folder: Path | None) -> Iterator[dict]:
    """The harness's answer for each task, from the cache where it is known; the model is loaded when first needed."""
    manager, ask = None, None

    def evaluate(task: str) -> dict:
        nonlocal manager, ask
        with _quiet():
            manager = manager or _manager(folder)
            refuse_unknown(tasks, manager.all_tasks)
            loaded = load_task(task, manager, folder)
            ask = ask or _asker(artifact, run.device, settings, manager)
            return ask(loaded)

    for task in tasks:
        key = artifacts.sha256_of_text(json.dumps([task, settings, run.device, KEPT], sort_keys=True))
        parts = (artifact.sha256, slug(task), key[:8])
        path = cache_path(run.artifacts_dir / "cache", "harness", *parts, suffix=".json")
        yield cached_document(path, functools.partial(evaluate, task))


def _asker(artifact: Artifact, device: str, settings: dict, manager: object) -> Callable[[list], dict]:
    """A function that has the harness score the artefact on loaded tasks."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = checkpoint.load_model(artifact, device), checkpoint.load_tokenizer(artifact)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings["batch"])

    def ask(loaded: list) -> dict:
        answer = lm_eval.simple_evaluate(
            wrapped,
            tasks=loaded,
            task_manager=manager,
            log_samples=False,
            limit=settings["limit"],
            apply_chat_template=settings["chat"],
            random_seed=settings["seed"],
            numpy_random_seed=settings["seed"],
            torch_random_seed=settings["seed"],
            fewshot_random_seed=settings["seed"],
        )
        return json.loads(json.dumps({key: answer.get(key, {}) for key in KEPT}, default=str))

    return ask


def load_task(task: str, manager: object, folder: Path | None = None) -> list:
    """The harness's objects for a task (one, or those of a tag), with their data.

    `manager` is its task manager. Raises AssetUnavailable, in one line, when the data is out of reach.
    """
    try:
        with contextlib.chdir(folder or Path.cwd()):  # a task file names its data by a relative path
            found = manager.load([task])
    except (OSError, httpx.HTTPError) as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise AssetUnavailable(f"the data of task {task!r} cannot be reached: {why}") from error
    groups = found.get("groups", {})
    return [groups[task]] if task in groups else list(found["tasks"].values())


def refuse_unknown(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError naming the first task the harness does not know, and the names nearest to it."""
    for task in tasks:
        if task not in known:
            near = ", ".join(difflib.get_close_matches(task, known, 4)) or "none"
            raise InputError(f"unknown task {task!r} among {len(known):,} of lm-evaluation-harness; similar: {near}")


def _manager(folder: Path | None) -> object:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder.resolve()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own remarks; their progress bars stay."""
    process.quiet_libraries()
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _folder_sha256(folder: Path | None) -> str:
    """The identity of a folder of tasks, '' for none. Raises ValueError where there is no such folder."""
    if folder is None:
        return ""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of task files")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return artifacts.combined_sha256((f.relative_to(folder).as_posix(), artifacts.sha256_of(f)) for f in files)
