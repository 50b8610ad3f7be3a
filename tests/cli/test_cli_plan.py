"""`avalab plan`, `deploy`, `status`, `rollback`: what they print, and what is wrong is one line."""

import json

import pytest

from avalab.cli import plan
from avalab.lab import artifacts
from avalab.plan import rollout, work


@pytest.fixture
def site(tmp_path):
    """A site with two releases of three agents."""

    def made(text):
        base = {"name": "b", "sha256": "0"}
        save = {"save": lambda out: (out / "weights.gguf").write_text(text) and None}
        return artifacts.write_artifact(text, tmp_path, save["save"], base=base, recipe=[], format="gguf").path

    for name in ("old", "new"):
        rollout.deploy(tmp_path / "site", dict.fromkeys(("a", "b", "c"), made(name)))
    return tmp_path / "site"


def test_the_example_is_planned_with_a_reason_for_every_line(avalab):
    code, text, error = avalab("plan", "--memory", "4GiB")
    assert code == 0, error
    assert "69 agents in" in text
    assert "planned in" in text
    code, text, error = avalab("plan", "--json")
    rows = json.loads(text)["agents"]
    assert len(rows) == 69
    assert all(row["reason"] for row in rows)


def test_an_impossible_budget_names_what_binds_and_what_would_do(avalab):
    code, _, error = avalab("plan", "--memory", "1GiB")
    assert (code, error.count("\n")) == (2, 1)
    assert "a memory of 1,024 MiB is too little: the smallest that would do is" in error


def test_status_proves_what_is_served_and_rollback_goes_back(avalab, site):
    code, text, error = avalab("status", "--site", site, "--history")
    assert code == 0, error
    assert f"release {rollout.current_release(site)} of" in text
    assert "3 agents: a, b, c" in text
    assert "all 3 artefacts are what was deployed" in text
    assert "deployed" in text
    code, text, error = avalab("rollback", "--site", site)
    assert code == 0, error
    assert "release 000001 is served; 3 agents' artefacts proven" in text
    assert json.loads(avalab("status", "--site", site, "--json")[1])["release"] == "000001"


def test_backends_are_those_of_the_package():
    assert plan.BACKENDS == work.BACKENDS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "none.toml"), "no agents at none.toml; the example is"),
        (("plan", "--memory", "much"), "'much' is not a size"),
        (("plan", "--memory", "0"), "it has to be 1 or more"),
        (("plan", "--profile", "huge"), "unknown profile 'huge'"),
        (("plan", "--observed", "nowhere"), "nowhere has logged less than a minute of requests"),
        (("deploy", "--backend", "threads"), "unknown backend 'threads'; choose one of processes, ray"),
        (("status", "--site", "nowhere"), "nothing is deployed in nowhere; avalab deploy puts a plan there"),
        (("rollback", "--site", "nowhere"), "nothing is deployed in nowhere: nothing to go back from"),
    ],
)
def test_wrong_input_is_one_line(arguments, said, avalab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = avalab(*arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert said in error
