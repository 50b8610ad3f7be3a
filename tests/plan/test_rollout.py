"""Deployment: all old or all new whenever it is killed, proof by sha256, the way back, and what is refused."""

import errno
import json
import random
import shutil
import subprocess
import sys
import threading
import time

import pytest

from avalab.lab import artifacts
from avalab.lab.errors import InputError, MissingFile, ProcessFailed
from avalab.plan import rollout
from avalab.plan.rollout import Approval

AGENTS = [f"agent{i}" for i in range(10)]


def made(folder, name, text):
    """A small artefact that holds a text."""

    def save(out):
        (out / "weights.gguf").write_text(text)

    base = {"name": "b", "sha256": "0"}
    return artifacts.write_artifact(name, folder, save, base=base, recipe=[], format="gguf").path


@pytest.fixture
def old(tmp_path):
    return made(tmp_path / "made", "old", "the old one")


@pytest.fixture
def new(tmp_path):
    return made(tmp_path / "made", "new", "the new one")


@pytest.fixture
def site(tmp_path, old):
    """A site where every agent has the old artefact."""
    rollout.deploy(tmp_path / "site", dict.fromkeys(AGENTS, old))
    return tmp_path / "site"


def texts(site):
    return {(rollout.artifact_of(site, agent) / "weights.gguf").read_text() for agent in AGENTS}


def test_a_deployment_changes_every_agent_and_a_rollback_proves_that_the_old_bytes_are_back(site, new):
    before = rollout.proven(site, "000001")
    outcome = rollout.deploy(site, dict.fromkeys(AGENTS, new))
    assert outcome.deployed
    assert texts(site) == {"the new one"}
    start = time.perf_counter()
    release, proof = rollout.rollback(site)
    assert time.perf_counter() - start < 1
    assert (release, proof, texts(site)) == ("000001", before, {"the old one"})
    assert rollout.rollback(site, outcome.release)[0] == outcome.release  # and forward again
    assert texts(site) == {"the new one"}
    assert [event["event"] for event in rollout.history(site)][-2:] == ["rolled back", "rolled back"]


def test_stages_give_some_agents_the_new_model_first_and_critical_ones_last(site, new):
    seen = []

    def approve(pairs):
        seen.append((sorted(pairs), {(rollout.artifact_of(site, a) / "weights.gguf").read_text() for a in AGENTS[:1]}))
        return Approval(True, "good")

    rollout.deploy(site, dict.fromkeys(AGENTS, new), last=["agent0"], approve=approve)
    assert [len(agents) for agents, _ in seen] == [1, 5, 10]
    assert ["agent0" in agents for agents, _ in seen] == [False, False, True]
    assert [text for _, text in seen] == [{"the old one"}] * 3


def test_a_failed_trial_returns_every_agent_to_the_proven_old_artefact(site, new):
    answers = iter([Approval(True, "fine"), Approval(False, "failed after 41 requests")])
    outcome = rollout.deploy(site, dict.fromkeys(AGENTS, new), approve=lambda pairs: next(answers))
    assert not outcome.deployed
    assert outcome.said == ("10%: fine", "50%: failed after 41 requests", outcome.said[-1])
    assert "sha256 of release 000001 are proven" in outcome.said[-1]
    assert texts(site) == {"the old one"}
    assert not (site / rollout.DEPLOYMENT).exists()


DEPLOYING = """
import os, signal, sys
from pathlib import Path
from avalab.plan import rollout
from avalab.plan.rollout import Approval

site, new, left = Path(sys.argv[1]), Path(sys.argv[2]), [int(sys.argv[3])]

def kill(event, _):
    if event in ("open", "os.rename", "os.mkdir", "os.symlink", "os.remove", "os.rmdir"):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
rollout.deploy(site, {f"agent{i}": new for i in range(10)}, approve=lambda pairs: Approval(True, "fine"))
"""


def test_a_deployment_killed_at_twenty_points_leaves_all_old_or_all_new(site, tmp_path):
    """Killed by itself at a step on the file system that is drawn: the first, one of its last, or between them."""
    draw, ends = random.Random(0), []
    for number in range(20):
        new = made(tmp_path / "made", f"new{number}", f"new {number}" * 20_000)
        before = texts(site)
        step = draw.randrange(1, 250)
        subprocess.run([sys.executable, "-c", DEPLOYING, str(site), str(new), str(step)], check=False)
        rollout.recover(site)
        now = texts(site)
        assert len(now) == 1
        assert now in (before, {f"new {number}" * 20_000})
        ends.append(now == before)
        rollout.proven(site, rollout.current_release(site))
    assert {True, False} == set(ends), "no child was killed in the middle"
    assert rollout.deploy(site, dict.fromkeys(AGENTS, new)).deployed  # the lock went with the dead


def test_no_request_fails_while_releases_are_swapped(site, old, new):
    stop, failed, served = threading.Event(), [], 0

    def serve():
        nonlocal served
        while not stop.is_set():
            try:
                text = (rollout.artifact_of(site, AGENTS[served % 10]) / "weights.gguf").read_text()
                assert text in ("the old one", "the new one")
                served += 1
            except Exception as error:  # whatever it is, it is a failed request
                failed.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for turn in range(12):
            rollout.deploy(site, dict.fromkeys(AGENTS, (old, new)[turn % 2]))
    finally:
        stop.set()
        thread.join()
    assert (failed, served > 12) == ([], True)
    assert len(rollout.releases(site)) <= rollout.KEPT + 1


def test_an_artefact_altered_after_deployment_is_refused_and_what_was_current_stays(site, old, new):
    rollout.deploy(site, dict.fromkeys(AGENTS, new))
    stored = site / "store" / artifacts.load_artifact(old).sha256[:24] / "weights.gguf"
    stored.chmod(0o644)
    stored.write_text("the odd one")
    with pytest.raises(InputError, match="release 000001 is not what was deployed: agent 'agent0'"):
        rollout.rollback(site, "000001")
    assert texts(site) == {"the new one"}
    with pytest.raises(InputError, match="altered"):
        rollout.deploy(site, dict.fromkeys(AGENTS, old))
    assert texts(site) == {"the new one"}


def test_an_artefact_altered_before_deployment_is_refused(site, new):
    (new / "weights.gguf").write_text("the odd one")
    with pytest.raises(InputError, match="altered"):
        rollout.deploy(site, dict.fromkeys(AGENTS, new))
    assert texts(site) == {"the old one"}


def test_a_full_disk_leaves_the_old_release_and_nothing_half_written(site, new, monkeypatch):
    def full(source, target, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match=r"no space for a copy of new .* what is served stays"):
        rollout.deploy(site, dict.fromkeys(AGENTS, new))
    assert texts(site) == {"the old one"}
    assert not list((site / "store").glob(".writing-*"))


def test_the_second_of_two_deployments_is_told_who_is_at_it(site, new):
    with rollout.locked(site, "deploy"), pytest.raises(ProcessFailed, match=r"deploy of .*, process \d+, since 20"):
        rollout.deploy(site, dict.fromkeys(AGENTS, new))
    assert rollout.deploy(site, dict.fromkeys(AGENTS, new)).deployed


def test_what_is_already_there_is_not_deployed_again(site, old):
    assert rollout.deploy(site, dict.fromkeys(AGENTS, old)).said == ("everything is as it was",)
    assert rollout.releases(site) == ["000001"]


def test_backups_beyond_the_policy_go_and_the_way_back_stays(site, old, new):
    for turn in range(6):
        rollout.deploy(site, dict.fromkeys(AGENTS, (new, old)[turn % 2]), kept=1)
    assert len(rollout.releases(site)) == 2
    rollout.rollback(site)
    with pytest.raises(InputError, match="0 backups"):
        rollout.prune_backups(site, kept=0)


def test_nothing_deployed_no_agents_an_unknown_agent_and_a_damaged_release_are_said_in_one_line(site, tmp_path):
    with pytest.raises(MissingFile, match="nothing is deployed in"):
        rollout.artifact_of(tmp_path / "empty", "a")
    with pytest.raises(InputError, match="nothing to go back from"):
        rollout.rollback(tmp_path / "empty")
    with pytest.raises(InputError, match="is the first of"):
        rollout.rollback(site)
    with pytest.raises(MissingFile, match="no agent 'x' in release 000001"):
        rollout.artifact_of(site, "x")
    with pytest.raises(MissingFile, match=r"no release 000009 .* it has 000001"):
        rollout.rollback(site, "000009")
    with pytest.raises(InputError, match="no agents to deploy"):
        rollout.deploy(site, {})
    (site / "releases" / "000001" / "release.json").write_text(json.dumps({"agents": {}}))
    with pytest.raises(InputError, match="is damaged"):
        rollout.read_release(site, "000001")
