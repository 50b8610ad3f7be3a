"""Runs, profiles, folder names and records: what a result says about where it came from."""

import json
import os
import platform
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avalab.lab import run as lab_run
from avalab.lab.errors import InputError
from avalab.lab.run import PROFILES, Record, Run

FINITE = st.floats(allow_nan=False, allow_infinity=False)
# Plain fields, not records: the type checker draws from `random`, which hypothesis forbids while it builds values.
FIELDS = st.fixed_dictionaries(
    {
        "notebook": st.text(),
        "subject": st.text(),
        "metric": st.text(),
        "value": st.none() | FINITE,
        "unit": st.text(),
        "low": st.none() | FINITE,
        "high": st.none() | FINITE,
        "n": st.none() | st.integers(0, 2**53),
        "seed": st.integers(0, 2**31),
        "note": st.text(),
        "details": st.dictionaries(st.text(), st.integers() | st.text() | FINITE, max_size=3),
        "samples": st.lists(FINITE, max_size=3),
    }
)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(lab_run, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def repository(root, monkeypatch):
    """A git repository with one commit of `code.py` and `results/table.json`; nobody's git settings matter."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    (root / "results").mkdir()
    (root / "code.py").write_text("x = 1\n")
    (root / "results" / "table.json").write_text("[]\n")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


@settings(max_examples=40, deadline=None)
@given(st.lists(FIELDS, max_size=3))
def test_records_come_back_as_they_were_saved(tmp_path_factory, rows):
    records = [Record(**row) for row in rows]
    path = tmp_path_factory.mktemp("records") / "01_subject.json"
    lab_run.save_records(records, path)
    assert lab_run.load_records(path) == records


def test_a_saved_record_has_sorted_keys_and_every_field(tmp_path):
    lab_run.save_records([Record("nb", "bf16", "perplexity", 16.09, "1")], tmp_path / "r.json")
    (row,) = json.loads((tmp_path / "r.json").read_text())
    assert list(row) == sorted(field.name for field in fields(Record))


def test_a_crash_while_writing_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    lab_run.write_atomically(path, "old")

    def crash(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        lab_run.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_the_text_is_on_disk_in_full_before_it_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    seen = []

    def look(descriptor):
        seen.append((path.exists(), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", look)
    lab_run.write_atomically(path, "x" * 100_000)
    assert seen == [(False, 100_000)]


def test_a_record_that_json_cannot_hold_leaves_the_old_records(tmp_path):
    path = tmp_path / "r.json"
    old = [Record("nb", "bf16", "perplexity", 16.09, "1")]
    lab_run.save_records(old, path)
    with pytest.raises(TypeError):
        lab_run.save_records([Record("nb", "bf16", "perplexity", 1.0, "1", details={"object": object()})], path)
    assert lab_run.load_records(path) == old


def test_text_is_written_as_utf_8(tmp_path):
    lab_run.write_atomically(tmp_path / "t", "4 \u00d7 4")
    assert (tmp_path / "t").read_bytes() == b"4 \xc3\x97 4"


@pytest.mark.parametrize("content", [b"{}", b"[", b"3", b'["x"]', b'[{"unheard_of": 1}]', b"\xff\xfe"])
def test_a_file_that_is_no_list_of_records_is_named(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"r\.json is not a list of records with the fields notebook, subject"):
        lab_run.load_records(tmp_path / "r.json")


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown profile 'huge'; choose one of smoke, laptop, a2000"):
        Run("01_subject", "huge")


def test_a_run_of_the_profiles_own_model_and_seed_is_named_by_the_profile(root):
    run = Run("01_subject", "smoke", model="data/tiny-llama")
    assert (run.name, run.model) == ("smoke", "data/tiny-llama")
    assert run.records_path == root / "results" / "smoke" / "01_subject.json"
    assert run.figures_dir == root / "results" / "smoke" / "figures"
    assert run.artifacts_dir == root / "artifacts" / "smoke"


@pytest.mark.parametrize(
    ("model", "seed", "name"),
    [
        ("", 3, "laptop+seed3"),
        ("Org/My_Model-1.5B", 0, "laptop+org-my-model-1.5b"),
        ("Org/My_Model-1.5B", 3, "laptop+org-my-model-1.5b+seed3"),
    ],
)
def test_another_model_or_seed_never_shares_a_folder_with_the_profiles_own(model, seed, name):
    run = Run("01_subject", "laptop", seed, model)
    assert run.name == name
    assert run.results_dir != Run("01_subject", "laptop").results_dir
    assert run.artifacts_dir.name == name


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40))
def test_a_models_name_is_always_safe_in_a_file_name(tmp_path_factory, model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_run, "ROOT", tmp_path_factory.getbasetemp() / "empty")
        shown = lab_run.slug(model)
    assert set(shown) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
    assert not shown.startswith((".", "-"))


def test_a_folders_name_does_not_depend_on_the_working_directory(root, monkeypatch):
    (root / "models" / "Version-2").mkdir(parents=True)
    (root / "models" / "latest").symlink_to(root / "models" / "Version-2")
    names = []
    for directory in (root, root / "models"):
        monkeypatch.chdir(directory)
        names.append(lab_run.slug("models/latest"))
    assert names == ["version-2", "version-2"]


def test_a_record_is_stamped_with_its_run_and_a_caller_may_say_more(root, monkeypatch):
    monkeypatch.setenv("AVALAB_DEVICE", "cpu")
    run = Run("01_subject", "smoke", seed=5)
    record = run.record("nf4", "perplexity", 17.0, "1", low=16.0, high=18.0, n=8, engine="torch")
    assert (record.notebook, record.profile, record.seed, record.model) == ("01_subject", "smoke", 5, "data/tiny-llama")
    assert (record.low, record.high, record.n, record.engine) == (16.0, 18.0, 8, "torch")
    assert record.device.startswith("cpu: ")
    assert record.threads >= 1
    assert record.when.endswith("+00:00")
    assert lab_run.load_records(run.save()) == [record] == run.records


def test_a_device_name_holds_no_host_name(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    name = lab_run.device_name("cpu")
    assert name.startswith("cpu: ")
    assert f"{os.cpu_count()} cores" in name
    assert "secret-host" not in name
    assert os.uname().nodename not in name


def test_a_machine_without_proc_still_has_a_device_name(monkeypatch):
    monkeypatch.setattr(lab_run, "_cpuinfo", lambda key: "")
    assert platform.machine() in lab_run.device_name("cpu") or platform.processor() in lab_run.device_name("cpu")


def test_a_clean_checkout_is_named_by_its_commit_alone(repository):
    head = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert lab_run.commit_hash()
    assert head.startswith(lab_run.commit_hash())


@pytest.mark.parametrize("staged", [False, True])
def test_changed_sources_add_a_plus_to_the_commit(repository, staged):
    (repository / "code.py").write_text("x = 2\n")
    if staged:
        subprocess.run(["git", "-C", str(repository), "add", "code.py"], check=True)
    assert lab_run.commit_hash().endswith("+")


def test_results_that_the_run_writes_do_not_make_its_commit_differ(repository):
    (repository / "results" / "table.json").write_text("[1]\n")
    assert not lab_run.commit_hash().endswith("+")


def test_there_is_no_commit_outside_a_repository_or_before_the_first_one(root, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(root.parent))
    assert lab_run.commit_hash() == ""
    subprocess.run(["git", "-C", str(root), "init", "-q"], check=True)
    assert lab_run.commit_hash() == ""


def test_a_machine_without_git_records_no_commit(root, monkeypatch):
    monkeypatch.setenv("PATH", str(root))
    assert lab_run.commit_hash() == ""


def test_a_home_folder_of_nobody_is_a_name_like_any_other():
    assert lab_run.as_path("~0") == Path("~0")
    assert lab_run.as_path("~") == Path.home()


def test_profiles_grow_in_every_size():
    smoke, laptop, a2000 = (PROFILES[name] for name in ("smoke", "laptop", "a2000"))
    sizes = [f.name for f in fields(smoke) if isinstance(getattr(smoke, f.name), int)]
    assert "window_tokens" in sizes
    for size in sizes:
        assert getattr(smoke, size) <= getattr(laptop, size) <= getattr(a2000, size), size


def test_a_gpu_run_is_held_to_its_profiles_memory(monkeypatch):
    """4 GiB of a 16 GiB card is a quarter of it; a card with less is used whole."""
    import torch

    fractions = []
    monkeypatch.setenv("AVALAB_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    for total in (16 * 2**30, 2 * 2**30):
        card = type("Card", (), {"total_memory": total})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, card=card: card)
        assert Run("01_subject", "a2000").device == "cuda"
    assert fractions == [0.25, 1.0]


def test_importing_the_module_does_not_import_torch():
    code = "import sys, avalab.lab.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=lab_run.ROOT).returncode == 0


def test_a_child_that_computes_lets_waiting_threads_sleep_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "100")
    found = lab_run.child_environment()
    assert (found["OMP_WAIT_POLICY"], found["GOMP_SPINCOUNT"]) == ("PASSIVE", "100")
    assert found["PATH"] == os.environ["PATH"]


def test_artefacts_lie_below_the_lab_or_where_the_environment_says(root, monkeypatch):
    monkeypatch.delenv("AVALAB_ARTIFACTS", raising=False)
    assert Run("t", "smoke").artifacts_dir == root / "artifacts" / "smoke"
    monkeypatch.setenv("AVALAB_ARTIFACTS", str(root / "elsewhere"))
    assert Run("t", "smoke").artifacts_dir == root / "elsewhere" / "smoke"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_altered_or_truncated_records_are_read_or_one_line_names_their_file(tmp_path_factory, data):
    """What is read can be shown: text is text, numbers are numbers."""
    path = tmp_path_factory.getbasetemp() / "altered.json"
    row = dict.fromkeys((f.name for f in fields(Record)), "x")
    row |= {"value": 1.5, "low": None, "high": None, "n": 3, "seed": 0, "threads": 2, "details": {}, "samples": [1.0]}
    if data.draw(st.booleans()):
        row[data.draw(st.sampled_from([*row, "other"]))] = data.draw(JSON)
        text = json.dumps([row])
    else:
        whole = json.dumps([row, row])
        text = whole[: data.draw(st.integers(0, len(whole)))]
    path.write_text(text)
    try:
        found, said = lab_run.load_records(path), str(path)
    except InputError as error:
        found, said = [], str(error)
    assert str(path) in said
    for record in found:
        assert all(isinstance(v, int | float | None) for v in (record.value, record.low, record.high, *record.samples))
        assert isinstance(record.metric + record.subject + record.when + record.note, str)
        assert isinstance(record.details, dict)


def test_names_in_other_alphabets_are_never_empty_and_never_collide():
    names = ["模型", "模形", "модель", "my модель v1", "my модел v1", "x" * 200, "x" * 201]
    found = [lab_run.slug(name) for name in names]
    assert len(set(found)) == len(names)
    assert all(name.isascii() and 0 < len(name) < 100 for name in found)
    assert lab_run.slug("model (copy)") == "model-copy"
