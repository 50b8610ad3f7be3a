"""Deployment by links: which artefact each agent gets, changed all at once, provable, and undone.

A site is a folder:

    store/<sha256>/           copies of artefacts, read-only, each once
    releases/000007/          a link an agent to its artefact in the store, and release.json with every sha256
    current                   a link to one release
    deployment.json           there while a deployment is under way: where it began
    history.jsonl             a line an event
    lock                      held (flock) by whoever deploys; says who

Whoever serves asks `artifact_of(site, agent)` for each request, or follows `current/<agent>`: `avalab chat
site/current/weather` works as with any artefact. `current` changes by the rename of a new link over it, which is
atomic: a reader sees the old release or the new one. A release that was current stays on disk for `KEPT` more, so that
a request that has begun ends with the files it began with.

`deploy` copies and verifies what is new, then goes in stages: some agents first, critical ones last. Before each stage
a trial of paired requests (`avalab.plan.policy.canary`) may decide; where it fails, or shows too little, everything
goes back to the release it began with, whose sha256 are proven. A process that dies in between leaves
`deployment.json`: the next one that opens the site goes back, too (`recover`). Only the standard library and the lab:
nothing here loads a model.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from avalab.lab import artifacts
from avalab.lab.errors import InputError, MissingFile, ProcessFailed
from avalab.lab.run import time_now, write_atomically

KEPT = 3  # releases that stay on disk besides the current one

STAGES = (0.1, 0.5, 1.0)  # shares of the agents that change

CURRENT, DEPLOYMENT, HISTORY, LOCK = "current", "deployment.json", "history.jsonl", "lock"

Approve = Callable[[dict[str, tuple[Path | None, Path]]], "Approval"]


@dataclass(frozen=True)
class Approval:
    """Whether a stage may go on, and what was seen."""

    passed: bool
    why: str


@dataclass(frozen=True)
class Outcome:
    """How a deployment ended: the release that is current now, and what was said of every stage."""

    release: str
    deployed: bool
    said: tuple[str, ...]


# --- reading a site ---------------------------------------------------------------------------------------------------


def artifact_of(site: Path, agent: str) -> Path:
    """The artefact folder that an agent has now; `current` is read once, so that one request has one release.

    Raises MissingFile for a site without a release, or an agent that it does not know.
    """
    release = current_release(site)
    if release is None:
        raise MissingFile(f"nothing is deployed in {site}; avalab deploy puts a plan there")
    link = site / "releases" / release / agent
    if not link.is_symlink():
        known = ", ".join(sorted(read_release(site, release)["agents"])) or "none"
        raise MissingFile(f"no agent {agent!r} in release {release} of {site}; it has {known}")
    return link.resolve()


def current_release(site: Path) -> str | None:
    """The name of the current release; None where nothing was deployed yet."""
    try:
        return (site / CURRENT).readlink().name
    except FileNotFoundError:
        return None


def read_release(site: Path, release: str) -> dict:
    """What release.json holds: `agents` (artefact's name and sha256 by agent), `before`, `when`.

    Raises MissingFile for a release that is not there, InputError for a damaged one.
    """
    file = site / "releases" / release / "release.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"agents": dict(found["agents"]), "before": found["before"], "when": found["when"]}
    except FileNotFoundError:
        raise MissingFile(f"no release {release} in {site}; it has {', '.join(releases(site)) or 'none'}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}); avalab rollback goes to a release before it") from error


def releases(site: Path) -> list[str]:
    """Names of the releases on disk, the oldest first."""
    return sorted(path.name for path in (site / "releases").glob("[0-9]*") if path.is_dir())


def history(site: Path) -> list[dict]:
    """What was done to a site, the oldest first; a line that was cut off is left out."""
    lines = (site / HISTORY).read_text(encoding="utf-8").splitlines() if (site / HISTORY).is_file() else []
    events = []
    for line in lines:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def proven(site: Path, release: str) -> dict[str, str]:
    """sha256 by agent of a release, every file hashed anew.

    Raises InputError naming the agent and the file for an artefact that was altered after it was deployed.
    """
    said, checked = read_release(site, release)["agents"], {}
    for agent, about in said.items():
        if about["sha256"] not in checked:
            try:
                found = artifacts.load_artifact(_stored(site, about["sha256"]))
            except (InputError, MissingFile) as error:
                raise InputError(f"release {release} is not what was deployed: agent {agent!r}: {error}") from error
            checked[about["sha256"]] = found.sha256
        if checked[about["sha256"]] != about["sha256"]:
            raise InputError(f"release {release}: agent {agent!r} has another artefact than was deployed")
    return {agent: checked[about["sha256"]] for agent, about in said.items()}


def _stored(site: Path, sha256: str) -> Path:
    return site / "store" / sha256[:24]


# --- changing one -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(site: Path, what: str) -> Iterator[None]:
    """Hold the site's lock, which a process that dies gives back. Raises ProcessFailed saying who holds it."""
    site.mkdir(parents=True, exist_ok=True)
    with (site / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ProcessFailed(f"{site} is being changed by {file.read().strip()}; wait for it, or end it") from None
        file.truncate(0)
        file.write(f"{what} of {_user()}, process {os.getpid()}, since {time_now()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        return f"user {os.getuid()}"


def recover(site: Path) -> str | None:
    """Go back from a deployment whose process died; the release that is current again, None where there was none."""
    file = site / DEPLOYMENT
    if not file.is_file():
        return None
    began = json.loads(file.read_text(encoding="utf-8"))["from"]
    if began is None:
        (site / CURRENT).unlink(missing_ok=True)
    else:
        _switch(site, began)
    _note(site, "recovered", release=began)
    file.unlink(missing_ok=True)
    return began


def deploy(
    site: Path,
    wanted: Mapping[str, Path],
    *,
    last: Sequence[str] = (),
    approve: Approve | None = None,
    stages: Sequence[float] = STAGES,
    kept: int = KEPT,
) -> Outcome:
    """Give each agent the artefact in a folder; agents of `last` change in the last stage.

    `approve` is asked before each stage what it thinks of the agents that change, (old, new) artefact by agent.
    Raises ProcessFailed where another deployment is under way, InputError for an artefact that is not what its card
    says or for no agents, OSError for a full disk: in all of these, what was current stays.
    """
    if not wanted:
        raise InputError("no agents to deploy; a plan names them")
    with locked(site, "deploy"):
        recover(site)
        before = current_release(site)
        found = {agent: _keep(site, artifacts.load_artifact(path)) for agent, path in wanted.items()}
        known = read_release(site, before)["agents"] if before else {}
        old = {agent: about["sha256"] for agent, about in known.items()}
        changed = [agent for agent in found if old.get(agent) != found[agent]["sha256"]]
        if not changed and set(old) == set(found):
            return Outcome(before, True, ("everything is as it was",))
        write_atomically(site / DEPLOYMENT, json.dumps({"from": before, "when": time_now()}))
        _note(site, "began", release=before, agents=len(changed))
        said = []
        for share, agents in staged(changed, last, stages if before else (1.0,)):
            approval = _asked(site, approve, {a: (old.get(a), found[a]["sha256"]) for a in agents if a in old})
            said.append(f"{share:.0%}: {approval.why}")
            if not approval.passed:
                recover(site)
                proven(site, before)
                _note(site, "returned", release=before, why=approval.why)
                return Outcome(before, False, (*said, f"returned; the sha256 of release {before} are proven"))
            reached = set(agents)
            mixed = {a: found[a] if a in reached or a not in known else known[a] for a in found}
            _switch(site, _write_release(site, mixed, before))
        release = current_release(site)
        (site / DEPLOYMENT).unlink()
        _note(site, "deployed", release=release, before=before)
        prune_backups(site, kept=kept)
        return Outcome(release, True, tuple(said))


def staged(agents: Sequence[str], last: Sequence[str], shares: Sequence[float]) -> Iterator[tuple[float, list[str]]]:
    """(share, agents that have changed by then) of each stage; those of `last` only in the last one."""
    order = [a for a in agents if a not in last] + [a for a in agents if a in last]
    early, before = len([a for a in agents if a not in last]), 0
    for share in shares:
        count = len(order) if share >= 1 else min(early, max(1, round(share * len(order))))
        if count > before:
            yield share, order[:count]
        before = count


def _asked(site: Path, approve: Approve | None, pairs: dict[str, tuple[str, str]]) -> Approval:
    if approve is None or not pairs:
        return Approval(True, "nothing to compare with" if approve else "no trial was asked for")
    return approve({agent: (_stored(site, old), _stored(site, new)) for agent, (old, new) in pairs.items()})


def _keep(site: Path, artifact: artifacts.Artifact) -> dict:
    """A verified copy of an artefact in the store, made once; what release.json says of it."""
    target = _stored(site, artifact.sha256)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".writing-{target.name}-{os.getpid()}")
        for stale in target.parent.glob(".writing-*"):  # we hold the lock: whoever wrote them is dead
            shutil.rmtree(stale, ignore_errors=True)
        try:
            shutil.copytree(artifact.path, temporary)
            copied = artifacts.load_artifact(temporary)
            assert copied.sha256 == artifact.sha256
            for file in temporary.rglob("*"):
                file.chmod(0o555 if file.is_dir() else 0o444)
            temporary.rename(target)
        except (shutil.Error, OSError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, shutil.Error) or error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(target.parent).free
                said = f"no space for a copy of {artifact.name} in {target.parent} ({free:,} bytes free)"
                raise OSError(errno.ENOSPC, f"{said}; what is served stays") from error
            raise
    else:
        artifacts.load_artifact(target)  # altered since: refused here, before anything changes
    return {"artifact": artifact.name, "sha256": artifact.sha256}


def _write_release(site: Path, agents: Mapping[str, dict], before: str | None) -> str:
    """A new release, complete before it has its name."""
    number = max((int(name) for name in releases(site)), default=0) + 1
    name = f"{number:06d}"
    temporary = site / "releases" / f".writing-{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for agent, about in agents.items():
        (temporary / agent).symlink_to(Path("../../store") / about["sha256"][:24])
    about = {"agents": dict(agents), "before": before, "when": time_now()}
    (temporary / "release.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.rename(site / "releases" / name)
    return name


def _switch(site: Path, release: str) -> None:
    """Make a release the current one: a new link is renamed over the old one."""
    temporary = site / f".{CURRENT}-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path("releases") / release)
    temporary.replace(site / CURRENT)
    folder = os.open(site, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def rollback(site: Path, release: str = "") -> tuple[str, dict[str, str]]:
    """Go back to a release, or to the one before the current; its name, and sha256 by agent, proven after the switch.

    Raises InputError where there is nothing to go back to; an altered artefact is refused, and what was current stays.
    """
    with locked(site, "rollback"):
        recover(site)
        now = current_release(site)
        if now is None:
            raise InputError(f"nothing is deployed in {site}: nothing to go back from")
        target = release or read_release(site, now)["before"]
        if not target:
            raise InputError(f"release {now} is the first of {site}: nothing to go back to")
        read_release(site, target)
        _switch(site, target)
        try:
            proof = proven(site, target)
        except InputError:
            _switch(site, now)
            raise
        _note(site, "rolled back", release=target, before=now)
        return target, proof


def prune_backups(site: Path, *, kept: int = KEPT) -> list[str]:
    """Delete all but the last `kept` releases besides the current one, and what none needs; names of the former."""
    if kept < 1:
        raise InputError(f"{kept} backups would leave nothing to go back to; keep 1 or more")
    now = current_release(site)
    before = read_release(site, now)["before"] if now else None
    others = [name for name in releases(site) if name not in (now, before)]
    gone = others[: max(0, len(others) - max(0, kept - 1))]
    for name in gone:
        shutil.rmtree(site / "releases" / name, ignore_errors=True)
    needed = {
        _stored(site, about["sha256"])
        for name in releases(site)
        for about in read_release(site, name)["agents"].values()
    }
    for folder in (site / "store").glob("[!.]*"):
        if folder not in needed:
            for each in (folder, *folder.rglob("*")):
                each.chmod(0o755 if each.is_dir() else 0o644)
            shutil.rmtree(folder, ignore_errors=True)
    return gone


def _note(site: Path, event: str, **more: object) -> None:
    with (site / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"when": time_now(), "event": event, **more}) + "\n")
