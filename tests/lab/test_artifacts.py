"""Artefact folders: whole or not there, and never other bytes than their card says."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from avalab.lab import artifacts
from avalab.lab.errors import LabError

RECIPE = [{"step": "nf4", "group_size": 64}]
BASE = {"name": "tiny", "sha256": "ab" * 32}


def weights(content: bytes = b"weights"):
    """A function that fills a folder with one weight file and a tokenizer."""

    def save(folder: Path) -> dict:
        (folder / "model.safetensors").write_bytes(content)
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.json").write_text("{}")
        return {"compress_seconds": 1.5}

    return save


def write(directory: Path, save=None, *, name: str = "tiny+nf4", recipe=RECIPE, base=BASE) -> artifacts.Artifact:
    return artifacts.write_artifact(name, directory, save or weights(), base=base, recipe=recipe, format="nf4")


def failing(error: BaseException):
    """A function that writes half a model, then raises."""

    def save(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"wei")
        raise error

    return save


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_an_artefact_is_loaded_with_the_card_it_was_written_with(tmp_path):
    written = write(tmp_path)
    loaded = artifacts.load_artifact(tmp_path / "tiny+nf4")
    assert loaded == written
    assert (loaded.name, loaded.format) == ("tiny+nf4", "nf4")
    assert loaded.card["measured"] == {"compress_seconds": 1.5}
    assert [f["name"] for f in loaded.card["files"]] == ["model.safetensors", "tokenizer/vocab.json"]


def test_the_size_of_an_artefact_is_that_of_its_weight_files(tmp_path):
    """Seven bytes of weights; the two of the vocabulary and the card are not counted."""
    assert write(tmp_path).bytes == 7


def test_the_identity_is_the_hash_of_what_sha256sum_prints(tmp_path):
    lines = [(b"weights", "model.safetensors"), (b"{}", "tokenizer/vocab.json")]
    listing = "\n".join(f"{hashlib.sha256(content).hexdigest()}  {name}" for content, name in lines)
    assert write(tmp_path).sha256 == hashlib.sha256(listing.encode()).hexdigest()


def test_the_same_bytes_have_the_same_identity_wherever_and_however_they_were_made(tmp_path):
    first = write(tmp_path / "a")
    second = write(tmp_path / "b", name="other", recipe=[{"step": "copy"}])
    third = write(tmp_path / "c", weights(b"Weights"))
    assert first.sha256 == second.sha256 != third.sha256


@pytest.mark.parametrize("error", [RuntimeError("diverged"), KeyboardInterrupt()])
def test_an_artefact_whose_writing_fails_is_not_visible_and_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        write(tmp_path, failing(error))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_visible_while_an_artefact_is_being_written(tmp_path):
    def save(folder: Path) -> None:
        weights()(folder)
        assert artifacts.list_artifacts(tmp_path) == []
        assert not (tmp_path / "tiny+nf4").exists()
        assert not (folder / artifacts.CARD).exists()

    write(tmp_path, save)


def test_a_failed_second_attempt_leaves_the_first_artefact(tmp_path):
    first = write(tmp_path)
    with pytest.raises(RuntimeError):
        write(tmp_path, failing(RuntimeError("diverged")))
    assert artifacts.load_artifact(first.path) == first


def test_a_failed_rename_puts_the_old_artefact_back(tmp_path, monkeypatch):
    first = write(tmp_path)
    rename = Path.rename

    def refuse_new(self, target):
        if self.name.startswith(".writing-tiny"):
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OSError, match="input/output error"):
        write(tmp_path, weights(b"other"))
    assert artifacts.load_artifact(first.path) == first
    assert [p.name for p in tmp_path.iterdir()] == ["tiny+nf4"]


def test_an_artefact_of_the_same_name_is_replaced_whole(tmp_path):
    def more(folder: Path) -> None:
        weights(b"old")(folder)
        (folder / "extra.json").write_text("{}")

    write(tmp_path, more)
    second = write(tmp_path, weights(b"new"))
    assert artifacts.load_artifact(second.path).sha256 == second.sha256
    assert not (second.path / "extra.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["tiny+nf4"]


def test_a_dead_writers_folder_is_removed_and_a_live_ones_kept(tmp_path):
    dead = tmp_path / f".writing-gone-{dead_process()}"
    live = tmp_path / f".writing-busy-{os.getppid()}"
    foreign = tmp_path / ".writing-by-hand"
    for folder in (dead, live, foreign):
        folder.mkdir()
    write(tmp_path)
    assert not dead.exists()
    assert live.exists()
    assert foreign.exists()


def test_a_leftover_of_a_killed_process_with_our_id_is_no_obstacle(tmp_path):
    leftover = tmp_path / f".writing-tiny+nf4-{os.getpid()}"
    leftover.mkdir()
    (leftover / "half.safetensors").write_bytes(b"wei")
    assert [f["name"] for f in write(tmp_path).card["files"]] == ["model.safetensors", "tokenizer/vocab.json"]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.write_bytes(b"Weights"), "was altered"),
        (lambda path: path.write_bytes(b"weigh"), "has 5 bytes, its card says 7"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["altered", "truncated", "missing"],
)
def test_a_file_that_differs_from_the_card_is_named(tmp_path, damage, complaint):
    artifact = write(tmp_path)
    damage(artifact.path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors {complaint}.*make it again"):
        artifacts.load_artifact(artifact.path)
    assert artifacts.load_artifact(artifact.path, verify=False).card == artifact.card
    assert artifacts.find_artifact("tiny+nf4", tmp_path, RECIPE, BASE["sha256"]) is None


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b"{}", b'{"files": []}', b"\xff\xfe"])
def test_a_damaged_card_is_named_and_its_artefact_not_found(tmp_path, content):
    artifact = write(tmp_path)
    (artifact.path / artifacts.CARD).write_bytes(content)
    with pytest.raises(ValueError, match=r"card\.json is damaged"):
        artifacts.load_artifact(artifact.path)
    assert artifacts.find_artifact("tiny+nf4", tmp_path, RECIPE, BASE["sha256"]) is None


def test_a_card_with_another_identity_than_its_files_is_refused(tmp_path):
    artifact = write(tmp_path)
    (artifact.path / artifacts.CARD).write_text(json.dumps({**artifact.card, "sha256": "0" * 64}))
    with pytest.raises(ValueError, match="its sha256 is not that of its files"):
        artifacts.load_artifact(artifact.path)


def test_a_missing_artefact_is_refused_with_the_names_beside_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="artefacts beside it: none"):
        artifacts.load_artifact(tmp_path / "absent")
    write(tmp_path)
    (write(tmp_path, name="broken").path / artifacts.CARD).write_text("{")
    with pytest.raises(FileNotFoundError, match=re.escape("artefacts beside it: broken, tiny+nf4")):
        artifacts.load_artifact(tmp_path / "absent")


def is_folder_name(name: str) -> bool:
    return len(name.encode()) < 120 and not name.startswith(".") and not set(name) & {"/", "\0"}


@given(name=st.text(min_size=1, max_size=30).filter(is_folder_name))
@settings(max_examples=60, deadline=None)
def test_an_artefact_of_any_name_is_written_listed_and_found(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("any")
    written = write(folder, name=name)
    assert artifacts.load_artifact(folder / name) == written
    assert [found.name for found in artifacts.list_artifacts(folder)] == [name]
    assert artifacts.find_artifact(name, folder, RECIPE, BASE["sha256"]) == written


def test_artefacts_are_listed_by_name(tmp_path):
    assert artifacts.list_artifacts(tmp_path / "absent") == []
    for name in ("b", "a"):
        write(tmp_path, name=name)
    (tmp_path / "no-artefact").mkdir()
    assert [artifact.name for artifact in artifacts.list_artifacts(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "state.PKL", "a/b.ckpt"])
def test_pickled_weights_are_refused_by_name(tmp_path, name):
    def save(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"pickle")

    with pytest.raises(ValueError, match=re.escape(f"{Path(name).name}; only safetensors and GGUF")):
        write(tmp_path, save)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["disk", "quota", "safetensors"],
)
def test_a_full_disk_names_the_folder_and_its_free_bytes_and_leaves_nothing(tmp_path, error):
    with pytest.raises(OSError, match=rf"no space for artefact 'tiny\+nf4' in {tmp_path} \([\d,]+ bytes free\)"):
        write(tmp_path, failing(error))
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_safetensors_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(SafetensorError, match="header too large"):
        write(tmp_path, failing(SafetensorError("header too large")))


def test_a_folder_that_is_not_writable_is_named(tmp_path, monkeypatch):
    """Permissions do not bind the superuser, so the system's answer is imitated."""
    mkdir = Path.mkdir

    def refuse(self, *arguments, **options):
        if self.name.startswith(".writing-"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=re.escape(str(tmp_path))):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_is_found_only_for_its_own_recipe_and_base(tmp_path):
    artifact = write(tmp_path)
    assert artifacts.find_artifact("tiny+nf4", tmp_path, RECIPE, BASE["sha256"]) == artifact
    assert artifacts.find_artifact("tiny+nf4", tmp_path, [{"step": "nf4", "group_size": 32}], BASE["sha256"]) is None
    assert artifacts.find_artifact("tiny+nf4", tmp_path, [*RECIPE, {"step": "merge"}], BASE["sha256"]) is None
    assert artifacts.find_artifact("tiny+nf4", tmp_path, RECIPE, "cd" * 32) is None
    assert artifacts.find_artifact("tiny+fp4", tmp_path, RECIPE, BASE["sha256"]) is None


def test_a_recipe_with_tuples_is_found_again_though_json_has_lists_only(tmp_path):
    recipe = [{"step": "nf4", "skip": ("lm_head",)}]
    artifact = write(tmp_path, recipe=recipe)
    assert artifacts.find_artifact("tiny+nf4", tmp_path, recipe, BASE["sha256"]).sha256 == artifact.sha256


def test_an_artefact_keeps_its_identity_when_it_is_moved(tmp_path):
    artifact = write(tmp_path / "a")
    shutil.move(artifact.path, tmp_path / "elsewhere")
    assert artifacts.load_artifact(tmp_path / "elsewhere").sha256 == artifact.sha256


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    """SHA-256 of "abc" as in FIPS 180-4's example."""
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert artifacts.sha256_of(tmp_path / "abc") == artifacts.sha256_of_text("abc") == expected


def test_the_bare_numbers_beside_an_openvino_graph_are_no_pickle(tmp_path):
    def save(folder: Path) -> None:
        (folder / "openvino_model.xml").write_text("<net/>")
        (folder / "openvino_model.bin").write_bytes(b"1234")

    written = artifacts.write_artifact(
        "x", tmp_path, save, base={"name": "b", "sha256": "0"}, recipe=[], format="openvino"
    )
    assert written.bytes == 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def outcome(read, path: Path):
    """What is read from a path, or None and the one line that is said."""
    try:
        return read(path), ""
    except LabError as error:
        return None, str(error)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_altered_or_truncated_card_loads_as_before_or_is_one_line_that_names_it(tmp_path, data):
    """Any part replaced by any JSON value, or the text cut anywhere: what loads has the forms that are read."""
    card = tmp_path / "a" / artifacts.CARD
    if not card.exists():
        write(tmp_path, name="a")
        (tmp_path / "kept.json").write_bytes(card.read_bytes())
    whole = (tmp_path / "kept.json").read_bytes()
    if data.draw(st.booleans()):
        card.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 2))])
    else:
        parts = json.loads(whole)
        key = data.draw(st.sampled_from(sorted(parts)))
        if isinstance(parts[key], dict) and parts[key] and data.draw(st.booleans()):
            parts[key][data.draw(st.sampled_from(sorted(parts[key])))] = data.draw(JSON)
        else:
            parts[key] = data.draw(JSON)
        card.write_text(json.dumps(parts))
    found, said = outcome(artifacts.load_artifact, tmp_path / "a")
    if found is None:
        assert str(tmp_path / "a") in said
        assert "\n" not in said
        return
    assert isinstance(found.name, str)
    assert isinstance(found.format, str)
    assert isinstance(found.card["base"]["name"], str)
    assert isinstance(found.bytes, int)
    assert all(isinstance(step, dict) for step in found.card["recipe"])
