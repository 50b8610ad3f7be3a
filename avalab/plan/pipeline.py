"""From a file of agents to a served deployment: analyse, plan, race and make, deploy, report.

    python -m avalab.plan [--agents FILE] [--memory 4GiB] [--profile smoke] [--site FOLDER]

1. Analyse: who shares which model, and what each model could become (`forecast`).
2. Plan: the exact choice under the budget (`assign`).
3. Make: each recipe that the plan needs, and its `RIVALS` that promise most without more memory, in processes of their
   own, with a ledger (`work`). They are raced on windows of text (`racing`): a rival that agrees more than the plan's
   choice becomes evidence, and the plan is made again with what was measured.
4. Deploy: by links, in stages, old against new on the same function calls (`rollout`, `canary`).
5. Report: a page and records.

Whatever was made, measured or answered is found again: a run that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jinja2
import numpy as np

from avalab.data.calls import Case, cases
from avalab.lab import artifacts, process, statistics
from avalab.lab.errors import InputError, LabError, MissingFile
from avalab.lab.run import Run, artifacts_root, time_now, write_atomically
from avalab.measure import answers
from avalab.models import checkpoint
from avalab.models.sizes import Shape
from avalab.plan import agents, assign, forecast, recipes, rollout, watch, work
from avalab.plan.agents import Agent
from avalab.plan.assign import Plan
from avalab.plan.forecast import Evidence, Forecast
from avalab.plan.policy.canary import OPEN, PASSED, Trial
from avalab.plan.policy.racing import Race, hold_race
from avalab.plan.rollout import Approval, Outcome
from avalab.plan.watch import Drift

RIVALS = 2  # of each recipe of a plan that are made and raced

RACE_SHARE = 0.5  # of measuring every candidate on every window

LIMIT_SECONDS = 3600.0

ASKED_AT_A_TIME = 25  # requests of a trial, which then may know enough

PROMPTS = 16  # of each agent, the last ones: what divergence is measured on

DEPLOYED = "plan.json"  # of a site: the plan that it serves

SMOKE_RECIPES = ["bf16", "torchao-int8", "nf4", "gguf-q8_0", "gguf-q4_0", "pruned30-int8"]  # made in seconds

Say = Callable[[str], object]


@dataclass(frozen=True)
class Question:
    """Everything that a plan is made from."""

    agents: list[Agent]
    shapes: dict[str, Shape]
    forecasts: dict[str, list[Forecast]]
    memory_bytes: int
    process_bytes: int

    def answer(self) -> Plan:
        """The best plan; raises as `assign.plan`."""
        return assign.plan(
            self.agents,
            self.forecasts,
            self.shapes,
            memory_bytes=self.memory_bytes,
            process_bytes=self.process_bytes,
        )


def run_of(model: str, run: Run) -> Run:
    """The run of another model in the same profile."""
    return Run(run.notebook, run.profile_name, run.seed, model)


def ask(
    run: Run,
    file: Path,
    *,
    memory_bytes: int,
    records: list | None = None,
    observed: Mapping[str, float] | None = None,
) -> Question:
    """Read the agents and forecast what their models can become; `records` are further evidence.

    `observed` calls a minute, by agent, take the place of those in the file.

    The profile `smoke` plans for its tiny model and for recipes that are made in seconds. Raises as `read_agents`.
    """
    tiny = run.model if run.profile_name == "smoke" else ""
    found = agents.read_agents(file, model=tiny)
    found = [replace(a, calls_per_minute=(observed or {}).get(a.name, a.calls_per_minute)) for a in found]
    evidence = Evidence.of([*forecast.read_evidence(run).known.values(), *(records or [])])
    groups = agents.unique_models(found)
    shapes = {model: forecast.shape_of_model(model, run_of(model, run)) for model in groups}
    forecasts = {}
    for model, members in groups.items():
        tried = recipes.recipes_of({agent.size for agent in members})
        tried = [each for each in tried if not tiny or each.name in SMOKE_RECIPES]
        forecasts[model] = [forecast.forecast(each, model, shapes[model], evidence) for each in tried]
    return Question(found, shapes, forecasts, memory_bytes, forecast.runtime_bytes(evidence))


# --- evidence ---------------------------------------------------------------------------------------------------------


def contenders(plan: Plan, question: Question, *, rivals: int = RIVALS) -> dict[str, list[str]]:
    """By model, the recipes of the plan, and those that promise most without more memory than one of these."""
    found: dict[str, list[str]] = {}
    for model, chosen in plan.needed:
        tried = {each.name: each for each in question.forecasts[model]}
        room = tried[chosen].memory.value
        others = sorted(
            (each for each in tried.values() if each.memory.value <= room and each.name != chosen),
            key=lambda each: -(each.quality.high or each.quality.value),
        )
        row = found.setdefault(model, [])
        row += [name for name in (chosen, *(each.name for each in others[:rivals])) if name not in row]
    return found


def make_and_race(
    run: Run, raced: Mapping[str, list[str]], *, workers: int = 1, backend: str = "processes", say: Say = print
) -> dict[str, Race]:
    """Make the contenders of each model and race them; what was measured is appended to the run as records.

    A recipe that cannot be made here leaves with the reason. Raises LabError where none of a model's could be.
    """
    races = {}
    for model, names in raced.items():
        of = run_of(model, run)
        chains = [work.Chain(model, name, windows=1) for name in names]
        made = work.make_chains(chains, of, ledger_file(of), workers=workers, backend=backend)
        ends = {chain.recipe: made[chain.name] for chain in chains}
        for name, why in ends.items():
            if isinstance(why, str):
                say(f"  {model}/{name} cannot be made: {why}")
        ends = {name: entries for name, entries in ends.items() if not isinstance(entries, str)}
        if not ends:
            raise InputError(f"none of {', '.join(names)} could be made of {model}; the reasons stand above")
        asked: dict[str, list[float]] = {name: [] for name in ends}

        def score(name: str, items: range, of: Run = of, ends: dict = ends, asked: dict = asked) -> list[float]:
            found = _scores(of, name, ends[name][-1].artifact, items)
            asked[name] += found["agrees"]
            return found["kl"]

        memory = {name: float(entries[-1].bytes) for name, entries in ends.items()}
        races[model] = hold_race(
            list(ends), score, items=of.profile.eval_windows, memory=memory, share=RACE_SHARE, first_items=2
        )
        _record(run, of, races[model], ends, asked)
    return races


def ledger_file(run: Run) -> Path:
    """Where the steps of a run's model are kept."""
    return run.artifacts_dir / "plan.sqlite"


def _scores(run: Run, recipe: str, folder: str, items: range) -> dict[str, list[float]]:
    request = {"model": run.model, "profile": run.profile_name, "seed": run.seed, "device": run.device}
    request |= {"folder": folder, "engine": recipes.RECIPES[recipe].engine, "items": [items.start, items.stop]}
    request["artifacts"] = str(artifacts_root().resolve())
    return process.call(f"{work.__name__}:answer_scores", request, limit_seconds=LIMIT_SECONDS, label=recipe)


def _record(run: Run, of: Run, race: Race, ends: dict, asked: dict) -> None:
    """Append bytes, divergence and agreement of every candidate to the run."""
    for name, entries in ends.items():
        subject, end = recipes.RECIPES[name].subject, entries[-1]
        about = {"model": of.model, "artifact_sha256": end.sha256, "engine": recipes.RECIPES[name].engine}
        run.record(subject, "artifact_bytes", end.bytes, "byte", **about)
        left = race.left.get(name, "stood to the end")
        for metric, unit, values in (
            (forecast.KL, "nats/token", race.losses[name]),
            (forecast.QUALITY, "1", asked[name]),
        ):
            estimate = statistics.mean(np.array(values)[:, None], resamples=run.profile.resamples, seed=run.seed)
            run.record(subject, metric, unit=unit, details={"race": left}, **vars(estimate), **about)


# --- deployment -------------------------------------------------------------------------------------------------------


def made_artifacts(run: Run, plan: Plan) -> dict[str, Path]:
    """The artefact folder of each agent, from the ledgers. Raises MissingFile naming a recipe that was not made."""
    found = {}
    for agent in plan.agents:
        recipe = plan.chosen[agent.name].forecast.name
        of = run_of(agent.model, run)
        entries = work.Ledger(ledger_file(of)).chain(f"{agent.model}/{recipe}")
        if not entries:
            raise MissingFile(f"agent {agent.name!r} needs {recipe} of {agent.model}, which was not made yet")
        found[agent.name] = Path(entries[-1].artifact)
    return found


def judge(run: Run, *, most: int = 200, say: Say = print) -> rollout.Approve:
    """What approves a stage of a deployment: old and new on the same function calls, until the trial knows.

    A new artefact of the same bytes is approved unseen. Too little evidence is no approval.
    """

    def approve(pairs: dict[str, tuple[Path, Path]]) -> Approval:
        for old, new in sorted({pair for pair in pairs.values() if pair[0] != pair[1]}):
            asked, trial = cases(run.profile.call_categories[0], most), Trial(most=most)
            for start in range(0, len(asked), ASKED_AT_A_TIME):
                if trial.verdict == OPEN:
                    some = asked[start : start + ASKED_AT_A_TIME]
                    for a, b in zip(_right(run, old, some), _right(run, new, some), strict=True):
                        trial.see(a, b)
            said = f"{artifacts.load_artifact(new, verify=False).name}: {trial}"
            say(f"  {said}")
            if trial.verdict != PASSED:
                return Approval(False, said)
        return Approval(True, f"{len(pairs)} agents, nothing worse")

    return approve


def _right(run: Run, folder: Path, asked: list[Case]) -> list[bool]:
    """Whether an artefact gets function-calling cases right, forced by a grammar."""
    found = artifacts.load_artifact(folder, verify=False)
    engine = (found.card.get("engines") or ["torch"])[0]
    respondent = answers.Respondent(found, run.device, engine="llamacpp" if found.format.startswith("gguf") else engine)
    texts = answers.answer_calls(respondent, asked, "forced", run.artifacts_dir / "cache")
    return [verdict.correct for verdict in answers.judge_calls(asked, texts)]


def deploy(run: Run, plan: Plan, site: Path, *, trial: bool = True, say: Say = print) -> Outcome:
    """Deploy a plan whose recipes were made; without `trial`, nothing is asked before the switch."""
    critical = [agent.name for agent in plan.agents if agent.critical]
    wanted = made_artifacts(run, plan)
    outcome = rollout.deploy(site, wanted, last=critical, approve=judge(run, say=say) if trial else None)
    if outcome.deployed:
        write_atomically(site / DEPLOYED, json.dumps(as_document(plan), indent=1, sort_keys=True) + "\n")
    return outcome


def watched(site: Path, run: Run | None = None) -> tuple[int, list[Drift]]:
    """How many requests a site logged, and what in them is no longer as the deployed plan said.

    With a run, the divergence on the last `PROMPTS` logged prompts of each agent is measured, too. Raises MissingFile
    for a site that no plan was deployed to.
    """
    if not (site / DEPLOYED).is_file():
        raise MissingFile(f"no plan was deployed to {site}; avalab deploy puts one there")
    rows = json.loads((site / DEPLOYED).read_text(encoding="utf-8"))["agents"]
    seen, far = watch.logged(site), {}
    for row in rows if run else ():
        prompts = [request.prompt for request in seen if request.agent == row["agent"] and request.prompt]
        if prompts:
            of, served = run_of(row["model"], run), rollout.artifact_of(site, row["agent"])
            base, found = checkpoint.base_artifact(of), artifacts.load_artifact(served, verify=False)
            far[row["agent"]] = work.prompt_divergences(found, base, prompts[-PROMPTS:], of, row["engine"])
    accepted = {row["agent"]: row["kl"]["high"] or row["kl"]["value"] for row in rows}
    members = [Agent(**row["asked"]) for row in rows]
    return len(seen), watch.drifts(seen, members, divergences=far, accepted_kl=accepted)


# --- what is kept and shown -------------------------------------------------------------------------------------------


def as_document(plan: Plan) -> dict:
    """A plan as JSON: totals, and a row an agent with its figures and the reason."""
    rows = []
    for agent in plan.agents:
        option = plan.chosen[agent.name]
        each = option.forecast
        row = {"agent": agent.name, "model": agent.model, "recipe": each.name, "engine": each.recipe.engine}
        row |= {
            name: asdict(getattr(each, name)) for name in ("weights", "memory", "decode", "prefill", "kl", "quality")
        }
        row |= {"latency_ms": 1e3 * option.seconds, "asked": asdict(agent), "reason": plan.reasons[agent.name]}
        rows.append(row)
    totals = {"memory_bytes": plan.memory_bytes, "budget_bytes": plan.budget_bytes, "quality": plan.quality}
    totals |= {"busy_share": plan.busy_share, "context_bytes": plan.context_bytes, "units": plan.units}
    return {**totals, "process_bytes": plan.process_bytes, "agents": rows}


def as_lines(plan: Plan) -> list[str]:
    """A plan as a table: agents with the same recipe for the same reason in one line."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for agent in plan.agents:
        key = (agent.model, plan.chosen[agent.name].forecast.name, plan.reasons[agent.name])
        groups.setdefault(key, []).append(agent.name)
    lines = [f"{'model':30} {'recipe':24} {'MB':>7} {'in memory':>9} {'agreement':>13} {'agents':>6}  why"]
    for (model, recipe, reason), names in groups.items():
        each = plan.chosen[names[0]].forecast
        how = {"measured": "", "predicted": "~"}
        size = f"{how[each.weights.how]}{each.weights.value / 1e6:.1f}"
        memory = f"{how[each.memory.how]}{each.memory.value / 1e6:.0f}"
        share = f"{how[each.quality.how]}{each.quality.value:.3f}"
        lines.append(f"{model:30} {recipe:24} {size:>7} {memory:>9} {share:>13} {len(names):6}  {reason}")
    free = (plan.budget_bytes - plan.memory_bytes) / 2**20
    used, budget = plan.memory_bytes / 2**20, plan.budget_bytes / 2**20
    lines.append(
        f"{len(plan.agents)} agents in {used:,.0f} MiB, {free:,.0f} of {budget:,.0f} left; busy {plan.busy_share:.0%}; "
        f"mean agreement {plan.quality:.3f} (~: predicted)"
    )
    return lines


def write_page(path: Path, plan: Plan, races: Mapping[str, Race], outcome: Outcome) -> Path:
    """The page of a plan, one file without scripts: who got what and why, what was raced, what is deployed."""
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    more = {"the process": plan.process_bytes, "contexts of the agents": plan.context_bytes}
    shown = {
        "plan": plan,
        "races": races,
        "outcome": outcome,
        "units": sorted((plan.units | more).items(), key=lambda unit: -unit[1]),
        "when": time_now()[:16],
        "mib": lambda size: f"{size / 2**20:,.0f}",
    }
    write_atomically(path, environment.get_template("plan.html.j2").render(shown))
    return path


@dataclass(frozen=True)
class Done:
    """What a whole run of the pipeline left."""

    plan: Plan
    races: dict[str, Race]
    outcome: Outcome
    page: Path


def whole(
    run: Run,
    file: Path,
    *,
    memory_bytes: int,
    site: Path,
    workers: int = 1,
    backend: str = "processes",
    say: Say = print,
) -> Done:
    """All five steps. Raises as they do; what was finished is kept and found again."""
    say("1. analyse")
    question = ask(run, file, memory_bytes=memory_bytes)
    say(f"  {len(question.agents)} agents, {len(question.shapes)} models")
    say("2. plan")
    first = question.answer()
    say("\n".join(f"  {line}" for line in as_lines(first)))
    say("3. make and race")
    races = make_and_race(run, contenders(first, question), workers=workers, backend=backend, say=say)
    for model, race in races.items():
        say(f"  {model}: {race.standing[0]} stands, at {race.spent_share:.0%} of measuring everything")
    plan = _with_what_was_made(run, file, memory_bytes, races)
    say("\n".join(f"  {line}" for line in as_lines(plan)))
    say("4. deploy")
    outcome = deploy(run, plan, site, say=say)
    say(f"  release {outcome.release} of {site}: {'; '.join(outcome.said)}")
    say("5. report")
    run.save()
    written = write_page(run.results_dir / "plan.html", plan, races, outcome)
    say(f"  {written}")
    return Done(plan, races, outcome, written)


def _with_what_was_made(run: Run, file: Path, memory_bytes: int, races: Mapping[str, Race]) -> Plan:
    """The plan again, with what was measured, over the recipes that exist."""
    question = ask(run, file, memory_bytes=memory_bytes, records=run.records)
    made = {m: [f for f in rows if f.name in races[m].losses] for m, rows in question.forecasts.items() if m in races}
    try:
        return Question(question.agents, question.shapes, made, memory_bytes, question.process_bytes).answer()
    except LabError as error:
        raise InputError(f"what was measured does not keep what was predicted: {error}") from error
