"""Folders that are there already: nothing is replaced that the same step did not make, nor a model's own base."""

import re
from pathlib import Path

import pytest

from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact

STEP = {"step": "nf4", "block_size": 64, "code": "1"}


@pytest.fixture
def base(tmp_path) -> Artifact:
    origin = {"name": "model", "sha256": "ab" * 32}
    return artifacts.write_artifact(
        "base", tmp_path, _fill(b"base"), base=origin, recipe=[{"step": "cast"}], format="bf16"
    )


def _fill(content: bytes):
    return lambda folder: (folder / "model.gguf").write_bytes(content) and None


def make(base: Artifact, out: Path, content: bytes = b"small", **changed) -> Artifact:
    return artifacts.make_artifact(out, _fill(content), base=base, step={**STEP, **changed}, format="nf4")


def content(artifact: Artifact) -> bytes:
    return (artifact.path / "model.gguf").read_bytes()


def test_the_same_recipe_is_found_again_and_not_filled(base, tmp_path):
    first = make(base, tmp_path / "small")
    assert content(make(base, tmp_path / "small", b"other")) == content(first)


def test_what_older_code_of_the_same_step_made_is_made_again(base, tmp_path):
    make(base, tmp_path / "small")
    assert content(make(base, tmp_path / "small", b"newer", code="2")) == b"newer"


@pytest.mark.parametrize("changed", [{"block_size": 128}, {"step": "rtn"}])
def test_another_artefact_is_named_and_left_alone(changed, base, tmp_path):
    make(base, tmp_path / "small")
    with pytest.raises(ValueError, match=r"small holds another artefact \(nf4 of base\).*--force"):
        make(base, tmp_path / "small", b"other", **changed)
    assert content(artifacts.load_artifact(tmp_path / "small")) == b"small"


def test_an_artefact_of_another_base_is_left_alone(base, tmp_path):
    make(base, tmp_path / "small")
    origin = {"name": "model", "sha256": "cd" * 32}
    other = artifacts.write_artifact("other", tmp_path, _fill(b"x"), base=origin, recipe=[], format="bf16")
    with pytest.raises(ValueError, match="another artefact"):
        make(other, tmp_path / "small")


def test_a_folder_of_other_files_is_left_alone_and_an_empty_one_is_filled(base, tmp_path):
    (tmp_path / "mine").mkdir()
    assert content(make(base, tmp_path / "mine")) == b"small"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="notes exists and is not an artefact"):
        make(base, tmp_path / "notes")
    assert (tmp_path / "notes" / "README.md").read_text() == "mine"


def test_a_model_never_replaces_what_it_is_made_from(base, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{base.path} is what the new artefact is made from")):
        make(base, base.path)
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="made from"):
        make(base, tmp_path / "elsewhere" / "base")
    about = {"name": base.name, "sha256": base.sha256}
    recipe = [*base.card["recipe"], STEP]
    with pytest.raises(ValueError, match="made from"):
        artifacts.write_artifact("base", tmp_path, _fill(b"small"), base=about, recipe=recipe, format="nf4")
    assert content(artifacts.load_artifact(base.path)) == b"base"


def test_the_labs_own_folder_is_a_cache_and_asks_nobody(base, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "ROOT", tmp_path)
    make(base, tmp_path / "artifacts" / "small")
    assert content(make(base, tmp_path / "artifacts" / "small", b"other", block_size=128)) == b"other"
