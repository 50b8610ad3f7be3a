"""The sub-commands of planning: plan, deploy, status, rollback."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from avalab.cli.options import AsJson, Profile, Seed, one_of
from avalab.lab.errors import InputError
from avalab.lab.run import Run, byte_count
from avalab.plan.agents import EXAMPLE, read_agents

Agents = Annotated[Path | None, typer.Argument(help="TOML file of agents; the committed example of 69 without.")]

Memory = Annotated[str, typer.Option(help="Budget of memory for all of them, such as 4GiB.")]

BACKENDS = ("processes", "ray")  # of avalab.plan.work

Site = Annotated[Path, typer.Option(help="Folder of the deployment: links, releases, backups.")]


def plan(
    agents: Agents = None,
    memory: Memory = "4GiB",
    figure: Annotated[Path | None, typer.Option(help="Write the candidates as bytes against agreement (PNG).")] = None,
    observed: Annotated[
        Path | None, typer.Option(help="A site whose logged load takes the place of the file's.")
    ] = None,
    profile: Profile = "laptop",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Choose what each agent's model becomes under a budget of memory, exactly, and say why; nothing is made."""
    budget = byte_count(memory, least=1)
    run, question, seconds = _asked(agents, budget, profile, seed, observed)
    from avalab.plan import pipeline

    start = time.perf_counter()
    found = question.answer()
    seconds += time.perf_counter() - start
    if figure:
        _draw(run, question, figure)
    if as_json:
        print(json.dumps(pipeline.as_document(found), indent=1, sort_keys=True))
        return
    print("\n".join(pipeline.as_lines(found)))
    print(f"planned in {seconds:.1f} s; avalab deploy makes and serves it")


def deploy(
    agents: Agents = None,
    memory: Memory = "4GiB",
    site: Site = Path("site"),
    workers: Annotated[int, typer.Option(min=1, help="Recipes that are made at a time.")] = 1,
    backend: Annotated[
        str, typer.Option(help="processes, or ray: tasks over the nodes that are joined.")
    ] = "processes",
    profile: Profile = "laptop",
    seed: Seed = 0,
) -> None:
    """Plan, make and race what is needed, and deploy it in stages; stopped, it goes on where it was."""
    budget = byte_count(memory, least=1)
    one_of("backend", backend, BACKENDS)
    run = Run("plan", profile, seed)
    file = agents or EXAMPLE
    read_agents(file)
    from avalab.plan import pipeline

    done = pipeline.whole(run, file, memory_bytes=budget, site=site, workers=workers, backend=backend)
    if not done.outcome.deployed:
        raise InputError(
            f"the new plan was not deployed, and release {done.outcome.release} is served: see {done.page}"
        )


def status(
    site: Site = Path("site"),
    drift: Annotated[bool, typer.Option("--watch", help="Say what drifted in the requests that were logged.")] = False,
    events: Annotated[bool, typer.Option("--history", help="Show what was done to the site.")] = False,
    profile: Profile = "laptop",
    as_json: AsJson = False,
) -> None:
    """Say what is deployed, proven by sha256, which releases are kept, and what was done."""
    from avalab.plan import rollout

    now = rollout.current_release(site)
    if now is None:
        raise InputError(f"nothing is deployed in {site}; avalab deploy puts a plan there")
    proof = rollout.proven(site, now)
    about = rollout.read_release(site, now)
    found = {"release": now, **about, "releases": rollout.releases(site), "history": rollout.history(site)}
    if as_json:
        print(json.dumps(found, indent=1, sort_keys=True))
        return
    print(
        f"release {now} of {about['when']}, before it {about['before'] or 'none'}; kept: {', '.join(found['releases'])}"
    )
    groups: dict[tuple[str, str], list[str]] = {}
    for agent, sha256 in proof.items():
        groups.setdefault((about["agents"][agent]["artifact"], sha256), []).append(agent)
    for (name, sha256), members in groups.items():
        print(
            f"{name:48} {sha256[:12]}  {len(members):3} agents: {', '.join(members[:4])}{', ...' * (len(members) > 4)}"
        )
    print(f"all {len(proof)} artefacts are what was deployed: every file's sha256 is its card's")
    if drift:
        from avalab.plan import pipeline

        count, drifted = pipeline.watched(site, Run("plan", profile))
        print(f"{count} requests logged; {'; '.join(map(str, drifted)) or 'nothing drifted'}")
    for event in found["history"] if events else ():
        print("  ".join(str(value) for value in event.values()))


def rollback(
    site: Site = Path("site"),
    release: Annotated[str, typer.Option(help="A release that is kept; without, the one before.")] = "",
) -> None:
    """Go back to the release before, or to another one that is kept, and prove its bytes."""
    from avalab.plan import rollout

    start = time.perf_counter()
    now, proof = rollout.rollback(site, release)
    print(
        f"release {now} is served; {len(proof)} agents' artefacts proven by sha256, {time.perf_counter() - start:.2f} s"
    )


def _asked(file: Path | None, budget: int, profile: str, seed: int, site: Path | None):
    """The run, the question, and the seconds that it took to ask it, imports left out."""
    run = Run("plan", profile, seed)
    read_agents(file or EXAMPLE)  # refused before anything heavy is imported
    from avalab.plan import pipeline, watch

    load = watch.calls_per_minute(watch.logged(site)) if site else {}
    if site and not load:
        raise InputError(f"{site} has logged less than a minute of requests; leave out --observed")
    start = time.perf_counter()
    question = pipeline.ask(run, file or EXAMPLE, memory_bytes=budget, observed=load)
    return run, question, time.perf_counter() - start


def _draw(run: Run, question, figure: Path) -> None:
    """The candidates of all models, memory against lost agreement."""
    from avalab.report import plots

    records = []
    for model, rows in question.forecasts.items():
        for each in rows:
            subject = f"{model.split('-')[0]} {each.name}"
            records.append(run.record(subject, "artifact_bytes", each.weights.value, "byte"))
            records.append(run.record(subject, "top1_agreement", each.quality.value, "1"))
    plots.pareto(records, y="top1_agreement", path=figure)
