"""Peers and the lab's artefacts answer the same calls; the answers are paired, kept, and never of another file."""

import sys

import pytest
import transformers  # noqa: F401 - before avalab, whose modules import torchao

from avalab.engines import EngineUnavailable
from avalab.lab import artifacts
from avalab.lab.run import load_records
from avalab.measure import answers, peers
from avalab.models import checkpoint

CATEGORY = "toolbox_simple"


@pytest.fixture
def asked_run(run, base, monkeypatch, tmp_path):
    """A run whose records hold the base, a peer and its rival: three subjects, all of the base's bytes."""
    monkeypatch.setattr(type(run), "results_dir", property(lambda self: tmp_path))
    run.records.clear()
    for subject in ("base", "peer", f"ava-gguf-{base.bytes}b"):
        about = {"artifact_sha256": base.sha256, "engine": "torch"}
        run.record(subject, "artifact_bytes", base.bytes, "bytes", n=1, **about)
    sizes = {"rival": base.name, "rival_bytes": base.bytes, "rival_sha256": base.sha256}
    for text in run.profile.eval_texts:
        run.record("peer", f"kl_ratio:{text}:gguf", 1.0, "1", n=8, details=sizes, **about)
    return run


def by_name(records) -> dict:
    return {(r.subject, r.metric): r for r in records}


# Asking


def test_every_subject_is_asked_and_a_peer_is_paired_with_its_rival(asked_run):
    peers.record_peer_calls(asked_run, 3)
    found = by_name(load_records(asked_run.records_path))
    names = peers.categories(asked_run)
    assert names == ["toolbox_simple", "toolbox_multiple"]  # nothing to force where no call is right
    for subject in ("base", "peer"):
        shares = [found[subject, f"call_accuracy_forced:{name}"] for name in names]
        every = found[subject, "call_accuracy_forced:all"]
        assert every.n == sum(share.n for share in shares) == 6
        assert every.value == pytest.approx(sum(share.value for share in shares) / 2)
    pair = found["peer", "call_accuracy_forced_difference:all:gguf"]
    assert (pair.value, pair.n) == (0, 6)
    assert pair.details["only_ours"] == pair.details["only_its"] == 0
    assert pair.details["p_value"] == 1
    assert not [metric for subject, metric in found if subject == "base" and "difference" in metric]
    assert asked_run.records[-1].subject == "peer"  # after its rival, so that a killed run leaves whole pairs


def test_only_what_one_of_the_two_gets_right_counts(asked_run):
    ratio = by_name(asked_run.records)["peer", f"kl_ratio:{asked_run.profile.eval_texts[0]}:gguf"]
    ours, theirs = {"a": [True] * 6 + [False] * 2}, {"a": [False] * 6 + [True, False], "b": [True]}
    peers.record_difference(asked_run, "peer", ours, theirs, form=":gguf", ratio=ratio)
    pair = asked_run.records[-1]
    assert pair.metric == "call_accuracy_forced_difference:a:gguf"  # b was not asked of both
    assert pair.value == pytest.approx(5 / 8)
    assert (pair.details["only_ours"], pair.details["only_its"]) == (6, 1)
    assert pair.details["p_value"] == pytest.approx(2 * (1 + 7) / 2**7)


def test_asking_again_replaces_what_was_asked_and_generates_nothing(asked_run, monkeypatch):
    peers.record_peer_calls(asked_run, 2, chosen=[CATEGORY])
    before = {key: row.value for key, row in by_name(asked_run.records).items()}
    count = len(asked_run.records)
    monkeypatch.setattr(checkpoint, "load_model", None)
    peers.record_peer_calls(asked_run, 2, chosen=[CATEGORY])
    assert {key: row.value for key, row in by_name(asked_run.records).items()} == before
    assert len(asked_run.records) == count


def test_an_artefact_that_is_gone_or_altered_is_not_asked_and_says_why(asked_run, base, monkeypatch):
    monkeypatch.setattr(artifacts, "list_artifacts", lambda folder: [])
    peers.record_peer_calls(asked_run, 1, chosen=[CATEGORY])
    row = by_name(asked_run.records)["peer", "call_accuracy_forced:all"]
    assert row.value is None
    assert row.note == "not asked: no artefact of these bytes is left"
    assert not [r for r in asked_run.records if "difference" in r.metric]


def test_an_engine_that_cannot_be_had_is_a_row_with_the_reason(asked_run, monkeypatch):
    def missing(*arguments, **options):
        raise EngineUnavailable("openvino is\nnot installed")

    monkeypatch.setattr(answers, "answer_calls", missing)
    peers.record_peer_calls(asked_run, 1, chosen=[CATEGORY])
    assert by_name(asked_run.records)["base", "call_accuracy_forced:all"].note == "not asked: openvino is not installed"


# What is refused


@pytest.mark.parametrize(
    ("limit", "chosen", "message"),
    [
        (0, (), "have to be 1 or more, got 0"),
        (-3, (), "have to be 1 or more, got -3"),
        (1, ("simple",), "unknown category 'simple'; choose one of simple_python"),
        (1, ("toolbox_irrelevance",), "'forced' cannot call nothing"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(asked_run, limit, chosen, message):
    before = len(asked_run.records)
    with pytest.raises(ValueError, match=message):
        peers.record_peer_calls(asked_run, limit, chosen=chosen)
    assert len(asked_run.records) == before


def test_the_command_refuses_a_negative_number_of_calls(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers", "--profile", "smoke", "--calls", "-1"])
    monkeypatch.setattr(peers, "compare_peers", None)
    with pytest.raises(SystemExit):
        peers.main()
    assert "--calls has to be 0 or more, got -1" in capsys.readouterr().err


# Going on from a file of records


def test_adding_a_peer_leaves_the_rows_of_others_and_takes_the_labs_artefact_of_theirs(asked_run, base, monkeypatch):
    done = []
    monkeypatch.setattr(peers, "references", lambda *arguments: {})
    monkeypatch.setattr(peers, "_compare_one", lambda run, base, name, against, made: done.append((name, made)))
    asked_run.record("late", "kl_divergence", None, "nats/token", note="needs the package x")
    peers.compare_peers(asked_run, ["peer", "late"], forms=["ava", "ava-gguf"])
    ((name, made),) = done
    assert name == "late"
    assert made["ava"] == []
    assert [artifact.sha256 for artifact in made["ava-gguf"]] == [base.sha256]
    kept = by_name(load_records(asked_run.records_path))
    assert ("peer", "artifact_bytes") in kept
    assert ("late", "kl_divergence") not in kept


def test_records_of_another_base_are_not_added_to(asked_run):
    row = asked_run.records.pop(0)
    asked_run.record("base", "artifact_bytes", row.value, "bytes", artifact_sha256="another")
    with pytest.raises(ValueError, match=r"about another base than .*; start anew, without --add"):
        peers.compare_peers(asked_run, ["rtn-w4g64"])


def test_the_command_adds_to_the_file_and_asks_as_many_calls_as_it_was_told(asked_run, monkeypatch, capsys):
    asked_run.save()
    steps = []
    monkeypatch.setattr(peers, "Run", lambda *arguments: asked_run)
    monkeypatch.setattr(peers, "ROOT", asked_run.results_dir)
    monkeypatch.setattr(peers, "compare_peers", lambda run, names, **how: steps.append(len(run.records)))
    monkeypatch.setattr(peers, "record_peer_calls", lambda run, limit: steps.append(limit))
    asked_run.records.clear()
    for given in (["--add", "--calls", "7"], ["--calls", "0"], []):
        monkeypatch.setattr(sys, "argv", ["peers", *given])
        peers.main()
        asked_run.records.clear()
    assert steps == [5, 7, 0, 0, asked_run.profile.call_items]
    assert "peer" in capsys.readouterr().out
