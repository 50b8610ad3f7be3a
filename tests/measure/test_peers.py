"""Peers make artefacts like every other; what each needs is named; sizes match; engines score as torch does."""

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
import transformers  # noqa: F401 - before avalab, whose modules import torchao
from safetensors.torch import load_file

from avalab import engines
from avalab.compress import quantize
from avalab.data import corpora
from avalab.engines import EngineUnavailable
from avalab.lab import artifacts, llamacpp_library
from avalab.lab.run import Record, load_records
from avalab.measure import answers, peers
from avalab.models import checkpoint, packed, predict, sizes
from avalab.report import tables

EMBEDDING = "model.embed_tokens.weight"
KEPT, OTHER = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def run(run):
    """A run whose calibration text is read once, and is short."""
    tokenizer = checkpoint.load_tokenizer(checkpoint.base_artifact(run))
    few = corpora.windows(corpora.evaluation_text("python_docs", tokenizer), tokenizer, count=2, tokens=64, offset=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "calibration_windows", lambda *arguments: few)
        yield run


@pytest.fixture(scope="module")
def against(run, base):
    tokenizer = checkpoint.load_tokenizer(base)
    windows = corpora.windows(corpora.evaluation_text("python_docs", tokenizer), tokenizer, count=3, tokens=48)
    return predict.make_reference(base, windows, run.artifacts_dir / "cache")


@pytest.fixture(scope="module")
def rounded(run, base):
    return peers.make_peer(base, "rtn-w4g64", run=run)


@pytest.fixture(scope="module")
def short(run, base):
    """The tiny model's first block as a base of its own."""
    model = checkpoint.load_model(base)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    about = {"base": {"name": "t", "sha256": "0"}, "recipe": [{"step": "cast"}], "format": "bf16", "licence": "t"}
    save = lambda folder: checkpoint.save_model(model, checkpoint.load_tokenizer(base), folder)  # noqa: E731 - one line
    return artifacts.write_artifact("short", run.artifacts_dir, save, **about)


@pytest.fixture(scope="module")
def tuned(run, short):
    return quantize.compress_artifact(short, "autoround", run=run, iterations=1, skip=(KEPT,))


def divergence(artifact, against) -> float:
    return float(predict.score_model(checkpoint.load_model(artifact), against).kl.mean())


# What is refused


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_peer_without_its_library_names_it_and_how_to_get_it(peer, run, base, monkeypatch):
    row = quantize.METHODS[peers.PEERS[peer][0]]
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == row.library else real(name))
    for build in llamacpp_library.BUILDS:
        monkeypatch.setitem(llamacpp_library.BUILDS, build, lambda: None)
    with pytest.raises(EngineUnavailable, match=rf"{row.library}; install it: (pip install|make )|; get it: python -m"):
        peers.make_peer(base, peer, run=run)


def test_an_unknown_peer_is_refused_with_the_known_ones(run, base):
    with pytest.raises(ValueError, match=r"unknown peer 'gptq'; choose one of rtn-w4g64, .*gguf-q2_k"):
        peers.make_peer(base, "gptq", run=run)


def test_what_is_compressed_already_is_no_base(run, rounded):
    with pytest.raises(ValueError, match="in format 'compressed-tensors'; only bf16"):
        peers.make_peer(rounded, "nf4", run=run)


# An int8 embedding


@pytest.fixture(scope="module")
def small(run, base, rounded):
    return peers.make_peer(base, "rtn-w4g64-int8emb", run=run)


def test_an_int8_embedding_leaves_every_linear_layer_as_it_was(small, rounded):
    before, after = (load_file(artifact.path / "model.safetensors") for artifact in (rounded, small))
    same = [name for name in before if name != EMBEDDING]
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert set(after) - set(before) == {"model.embed_tokens.weight_scale", "lm_head.weight_scale"}


def test_an_int8_embedding_halves_its_bytes_and_loads_as_its_codes_say(small, rounded, base):
    table = load_file(base.path / "model.safetensors")[EMBEDDING]
    codes, scales = packed.int8_rows(table)
    assert rounded.bytes - small.bytes == pytest.approx(table.numel(), rel=0.05)
    assert torch.equal(
        checkpoint.load_model(small, packed=False).get_input_embeddings().weight, (codes.bfloat16() * scales)
    )


def test_only_a_compressed_checkpoint_gets_an_int8_embedding(base):
    with pytest.raises(ValueError, match="is dense; needed is compressed-tensors"):
        packed.replace_embedding(base.path)


def test_the_bytes_of_an_int8_embedding_are_predicted(small):
    measured, predicted = sizes.bytes_by_component(small), sizes.predicted_bytes(small)
    assert {part: predicted[part] for part in ("embedding", "scales", "mlp")} == {
        part: measured[part] for part in ("embedding", "scales", "mlp")
    }
    assert sum(predicted.values()) == pytest.approx(small.bytes, rel=0.002)


# AutoRound


def test_autoround_loads_back_rounded_but_for_the_layer_that_is_kept(tuned, short, run):
    card = tuned.card["recipe"][-1]
    assert (card["step"], card["bits"], card["iterations"]) == ("autoround", 4, 1)
    stored, source = (load_file(artifact.path / "model.safetensors") for artifact in (tuned, short))
    assert torch.equal(stored[f"{KEPT}.weight"], source[f"{KEPT}.weight"])
    plain = quantize.compress_artifact(short, "rtn", run=run, skip=(KEPT,))
    assert tuned.bytes == pytest.approx(plain.bytes, rel=0.01)
    assert sum(sizes.predicted_bytes(tuned).values()) == pytest.approx(tuned.bytes, rel=0.01)
    loaded, original = (
        checkpoint.load_model(artifact, packed=False).get_submodule(OTHER).weight for artifact in (tuned, short)
    )
    assert 0 < (loaded - original).norm() < 0.15 * original.norm()


# Matching


def test_a_lab_artefact_within_one_percent_serves_again(base, run, monkeypatch):
    near = artifacts.Artifact(base.path, base.card)
    assert peers.match_size(base, round(base.bytes * 1.009), run=run, made=[near]) is near
    asked, other = [], artifacts.Artifact(base.path, base.card | {"name": "other"})

    def written(_base, method, *, run, **how):
        asked.append((method, how))
        return other

    monkeypatch.setattr(quantize, "compress_artifact", written)
    size = round(base.bytes * 1.02)
    for form in peers.FORMS:
        assert peers.match_size(base, size, run=run, form=form, made=[near]) is other
    assert asked == [
        ("ava", {"bytes": size}),
        ("ava", {"bytes": size, "embedding": "packed"}),
        ("ava", {"bytes": size, "format": "gguf"}),
    ]
    with pytest.raises(ValueError, match="unknown form 'nf4' of the lab's artefact; choose one of ava, ava-packed"):
        peers.match_size(base, size, run=run, form="nf4")


# Scores


def test_a_table_has_a_line_a_subject_a_dash_for_what_is_missing_and_its_note():
    rows = [Record("n", "a", "kl_divergence:t", 0.25, "nats"), Record("n", "b", "x", None, "1", note="no library")]
    lines = peers.peers_table(rows, ["artifact_bytes", "kl_divergence:t"]).splitlines()
    assert [line.split() for line in lines] == [
        ["subject", "bytes", "kl:t"],
        ["a", "-", "0.25"],
        ["b", "-", "-", "no", "library"],
    ]


# The command


def test_a_comparison_records_peer_rival_and_what_is_missing(run, base, rounded, monkeypatch, tmp_path):
    monkeypatch.setattr(type(run), "results_dir", property(lambda self: tmp_path))
    monkeypatch.setattr(peers, "match_size", lambda *arguments, **options: rounded)
    missing = replace(quantize.METHODS["onnx-k-quant"], library="no_such_module")
    monkeypatch.setitem(quantize.METHODS, "x", missing)
    monkeypatch.setitem(peers.PEERS, "x", ("x", {}))
    peers.compare_peers(run, ["rtn-w4g64", "x"])
    kept = {(r.subject, r.metric): r for r in load_records(tmp_path / f"{run.notebook}.json")}
    texts = run.profile.eval_texts
    assert all(kept["base", f"kl_divergence:{text}"].value == pytest.approx(0, abs=1e-6) for text in texts)
    for form, end in (("ava", ""), ("ava-packed", ":packed"), ("ava-gguf", ":gguf")):
        ratio = kept["rtn-w4g64", f"kl_ratio:{texts[0]}{end}"]
        assert ratio.value == pytest.approx(1)
        assert ratio.details["rival_bytes"] == rounded.bytes
        assert kept[f"{form}-{rounded.bytes}b", "artifact_bytes"].value == rounded.bytes
    assert "needs the package no_such_module" in kept["x", "kl_divergence"].note
    assert json.dumps(kept["rtn-w4g64", "artifact_bytes"].details["embedding"]) == '"bf16"'
    shown = tables.table(run.records, ["rtn-w4g64", "x"], peers.peers_columns(run))
    assert shown.rows[0][1] == f"{rounded.bytes / 1e6:.4f}"


def test_a_form_that_does_not_fit_is_recorded_with_the_reason(run, base, rounded, monkeypatch, tmp_path):
    monkeypatch.setattr(type(run), "results_dir", property(lambda self: tmp_path))

    def refused(_base, size, **_how):
        raise ValueError(f"a budget of {size:,} bytes is below the smallest file")

    monkeypatch.setattr(peers, "match_size", refused)
    run.records.clear()
    peers.compare_peers(run, ["rtn-w4g64"], forms=["ava-gguf"])
    kept = {(r.subject, r.metric): r for r in run.records}
    assert "below the smallest file" in kept[f"ava-gguf-{rounded.bytes}b", "kl_divergence"].note
    assert ("rtn-w4g64", f"kl_divergence:{run.profile.eval_texts[0]}") in kept
    assert not [metric for subject, metric in kept if metric.startswith("kl_ratio")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--peers", "rtn-w4g64,gptqq"], "unknown peer gptqq; choose from rtn-w4g64"),
        (["--forms", "ava,nf4"], "unknown form nf4; choose from ava, ava-packed, ava-gguf"),
    ],
)
def test_the_command_refuses_a_misspelt_name_before_anything_runs(monkeypatch, capsys, given, message):
    monkeypatch.setattr(sys, "argv", ["peers", *given])
    with pytest.raises(SystemExit):
        peers.main()
    assert message in capsys.readouterr().err


def test_every_peer_is_a_row_with_parameters_of_its_own_and_an_engine_that_exists():
    for method, parameters in peers.PEERS.values():
        row, _ = quantize.checked_method(method, parameters)
        assert row.engines[0] in engines.ENGINES
    assert set(peers.SHORT) <= peers.PEERS.keys()


def test_names_of_recorded_peers_stay_what_they_mean():
    weights = {"bits": 4, "group_size": 64, "embedding": "int8"}
    assert peers.known_peer("gptq-w4g64-int8emb") == ("gptq", weights)
    assert peers.known_peer("autoround-w4g32") == ("autoround", {"bits": 4, "group_size": 32, "embedding": "bf16"})
    assert peers.known_peer("nf4-dq") == ("nf4", {"double_quantization": True})
    assert len(peers.PEERS) == 40


# Function calls


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
    names = [name for name in asked_run.profile.call_categories if "irrelevance" not in name]
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
    made, tried = [], {}
    monkeypatch.setattr(peers, "references", lambda *arguments: {})
    monkeypatch.setattr(peers, "make_peer", lambda base, name, run: made.append(name) or base)
    monkeypatch.setattr(peers, "record_peer", lambda *arguments, **options: {})

    def match(base, size, *, run, form, made):
        tried[form] = [artifact.sha256 for artifact in made]
        return base

    monkeypatch.setattr(peers, "match_size", match)
    asked_run.record("late", "kl_divergence", None, "nats/token", note="needs the package x")
    peers.compare_peers(asked_run, ["peer", "late"], forms=["ava", "ava-gguf"])
    assert made == ["late"]
    assert tried == {"ava": [], "ava-gguf": [base.sha256]}
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
