"""What several tests of measurements share: a small artefact, a run of the test's own, and engines that are torch."""

import pytest

from avalab import engines
from avalab.lab import artifacts, process
from avalab.lab.run import ROOT, Run

TINY = ROOT / "data" / "tiny-llama"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The tiny model as an artefact of the name `tiny`."""

    def save(folder) -> None:
        for file in TINY.iterdir():
            if file.suffix in (".json", ".safetensors", ".jinja"):
                (folder / file.name).write_bytes(file.read_bytes())

    base, out = {"name": "x", "sha256": "y"}, tmp_path_factory.mktemp("tiny")
    return artifacts.write_artifact("tiny", out, save, base=base, recipe=[{"step": "cast"}], format="bf16")


@pytest.fixture
def own_run(tmp_path, monkeypatch):
    """A run whose artefacts lie in a folder of the test's own."""
    monkeypatch.setattr(Run, "artifacts_dir", property(lambda self: tmp_path / self.name))
    monkeypatch.setenv("AVALAB_DEVICE", "cpu")
    return Run("t", "smoke")


@pytest.fixture
def in_this_process(monkeypatch):
    """Both halves of a call without the process; what the process would do is the same function."""
    monkeypatch.setattr(process, "_run", lambda arguments, limit: process.main(*arguments[:3]) or 0)


@pytest.fixture
def as_torch(in_this_process, monkeypatch):
    """Every engine is the torch one, in this process; the names that are asked for."""
    opened, asked = engines.load, []

    def load(name, folder):
        asked.append(name)
        return opened("torch", folder)

    monkeypatch.setattr(engines, "load", load)
    return asked
