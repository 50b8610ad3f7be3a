"""Peers make artefacts like every other; what each needs is named; sizes match; engines score as torch does."""

import importlib.util
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers  # noqa: F401 - before avalab, whose modules import torchao
from safetensors.torch import load_file

from avalab import (
    artifacts,
    corpora,
    engines,
    models,
    packing,
    peers,
    peers_autoround,
    peers_embedding,
    peers_known,
    peers_making,
    peers_runtimes,
    peers_scores,
    quality,
    quantize,
)
from avalab.engines.engine import EngineUnavailable
from avalab.experiment import Record, load_records
from avalab.rounding import Grid

has_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is missing")
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def run(run):
    """A run whose calibration text is read once, and is short."""
    tokenizer = models.load_tokenizer(models.base(run))
    few = corpora.windows(corpora.text("python_docs", tokenizer), tokenizer, count=2, tokens=64, offset=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "calibration_windows", lambda *arguments: few)
        patch.setattr(peers_making, "ITERATIONS", 1)
        yield run


@pytest.fixture(scope="module")
def against(run, base):
    tokenizer = models.load_tokenizer(base)
    windows = corpora.windows(corpora.text("python_docs", tokenizer), tokenizer, count=3, tokens=48)
    return quality.reference(base, windows, run.artifacts_dir / "cache")


@pytest.fixture(scope="module")
def rounded(run, base):
    return peers.write(base, "rtn-w4g64", run=run)


@pytest.fixture(scope="module")
def short(run, base):
    """The tiny model's first block as a base of its own."""
    model = models.load(base)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    about = {"base": {"name": "t", "sha256": "0"}, "recipe": [{"step": "cast"}], "format": "bf16", "licence": "t"}
    save = lambda folder: models.save_model(model, models.load_tokenizer(base), folder)  # noqa: E731 - one line
    return artifacts.write("short", run.artifacts_dir, save, **about)


@pytest.fixture(scope="module")
def tuned(run, short):
    return peers_making.autoround(4, 64)(short, run)


def divergence(artifact, against) -> float:
    return float(quality.score(models.load(artifact), against).kl.mean())


# What is refused


@pytest.mark.parametrize("peer", peers.NAMES)
def test_a_peer_without_its_library_names_it_and_how_to_get_it(peer, run, base, monkeypatch):
    row = peers.known(peer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineUnavailable, match=rf"{row.module}; install it: (pip install|make )"):
        peers.write(base, peer, run=run)


def test_an_unknown_peer_is_refused_with_the_known_ones(run, base):
    with pytest.raises(ValueError, match=r"unknown peer 'gptq'; choose one of rtn-w4g64, .*gguf-q2_k"):
        peers.write(base, "gptq", run=run)


def test_what_is_compressed_already_is_no_base(run, rounded):
    with pytest.raises(ValueError, match="in format 'compressed-tensors'; only bf16"):
        peers.write(rounded, "nf4", run=run)


def test_only_a_compressed_checkpoint_gets_an_int8_embedding(base, tmp_path):
    with pytest.raises(ValueError, match="is dense; needed is compressed-tensors"):
        peers_embedding.write(base.path, tmp_path)


# An int8 embedding


@pytest.fixture(scope="module")
def small(run, base, rounded):
    return peers.write(base, "rtn-w4g64-int8emb", run=run)


def test_an_int8_embedding_leaves_every_linear_layer_as_it_was(small, rounded):
    before, after = (load_file(artifact.path / "model.safetensors") for artifact in (rounded, small))
    same = [name for name in before if name != EMBEDDING]
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert set(after) - set(before) == {"model.embed_tokens.weight_scale", "lm_head.weight_scale"}


def test_an_int8_embedding_halves_its_bytes_and_loads_as_its_codes_say(small, rounded, base):
    table = load_file(base.path / "model.safetensors")[EMBEDDING]
    codes, scales = packing.int8_rows(table)
    assert rounded.bytes - small.bytes == pytest.approx(table.numel(), rel=0.05)
    assert torch.equal(models.load(small).get_input_embeddings().weight, (codes.bfloat16() * scales))


def test_its_seconds_are_those_of_both_steps(small, rounded):
    before = rounded.card["measured"]["compress_seconds"]
    assert small.card["measured"]["compress_seconds"] > before == small.card["measured"]["seconds_before"]


# AutoRound


def test_autoround_loads_back_with_the_weights_it_had_in_memory(tuned, short, run):
    card = tuned.card["recipe"][-1]
    assert card["step"] == "autoround"
    assert card["bits"] == 4
    assert card["iterations"] == 1
    assert tuned.bytes == pytest.approx(peers.write(short, "rtn-w4g64", run=run).bytes, rel=0.01)


def test_autorounds_integers_are_read_off_its_weights_exactly():
    """Two groups of two: scales 0.5 and 0.25, zero points 8 and 6."""
    layer = torch.nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[-0.5, 1.0, 0.25, -1.5]])
    layer.scale, layer.zp = torch.tensor([[0.5, 0.25]]), torch.tensor([[8.0, 6.0]])
    found = peers_autoround.rounded(layer, Grid(4, 2))
    assert found.codes.tolist() == [[-1, 2, -1, -8]]
    assert found.zero_points.tolist() == [[0, -2]]
    assert torch.equal(found.decode(torch.float32), layer.weight.data)


def test_weights_that_are_not_on_their_grid_are_refused():
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[0.7, 1.0]])
    layer.scale, layer.zp = torch.tensor([[0.5]]), torch.tensor([[8.0]])
    with pytest.raises(ValueError, match=r"0.40 steps off AutoRound's own grid of 4 bits"):
        peers_autoround.rounded(layer, Grid(4, 2))


# Caching and matching


def test_a_peer_that_was_made_is_not_made_again(run, short, tuned, monkeypatch):
    monkeypatch.setattr(peers_autoround, "compress", None)
    assert peers_making.autoround(4, 64)(short, run).sha256 == tuned.sha256


def test_other_code_makes_a_peer_anew(run, short, tuned, monkeypatch):
    monkeypatch.setattr(peers_making, "_code", lambda *modules: "another")
    monkeypatch.setattr(peers_autoround, "compress", None)
    with pytest.raises(TypeError):  # it was called
        peers_making.autoround(4, 64)(short, run)


def test_a_lab_artefact_within_one_percent_serves_again(base, run, monkeypatch):
    near = artifacts.Artifact(base.path, base.card)
    assert peers.match(base, round(base.bytes * 1.009), run=run, made=[near]) is near
    asked, other = [], artifacts.Artifact(base.path, base.card | {"name": "other"})

    def written(_base, method, *, run, **how):
        asked.append((method, how))
        return other

    monkeypatch.setattr(quantize, "write", written)
    size = round(base.bytes * 1.02)
    for form in peers.FORMS:
        assert peers.match(base, size, run=run, form=form, made=[near]) is other
    assert asked == [
        ("ava", {"bytes": size}),
        ("ava", {"bytes": size, "embedding": "packed"}),
        ("ava", {"bytes": size, "format": "gguf"}),
    ]
    with pytest.raises(ValueError, match="unknown form 'nf4' of the lab's artefact; choose one of ava, ava-packed"):
        peers.match(base, size, run=run, form="nf4")


# Scores


def test_the_tail_of_known_values_is_their_percentile():
    """0 to 99 in one window: the 99th percentile by linear interpolation is 98.01."""
    values = torch.arange(100.0).reshape(1, 100)
    assert peers_scores.tail(values, resamples=10, seed=0).value == pytest.approx(98.01)


def test_the_tail_has_an_interval_around_it_and_none_for_one_window():
    values = torch.from_numpy(np.random.default_rng(0).exponential(size=(12, 50))).float()
    found = peers_scores.tail(values, resamples=100, seed=0)
    assert found.low <= found.value <= found.high
    assert peers_scores.tail(values[:1], resamples=100, seed=0).low is None


def test_a_table_has_a_line_a_subject_a_dash_for_what_is_missing_and_its_note():
    rows = [Record("n", "a", "kl_divergence:t", 0.25, "nats"), Record("n", "b", "x", None, "1", note="no library")]
    lines = peers_scores.table(rows, ["artifact_bytes", "kl_divergence:t"]).splitlines()
    assert [line.split() for line in lines] == [
        ["subject", "bytes", "kl:t"],
        ["a", "-", "0.25"],
        ["b", "-", "-", "no", "library"],
    ]


def test_half_of_everything_is_a_ratio_of_one_half_without_doubt():
    values = torch.rand(8, 5) + 0.1
    found = peers_scores.ratio(values / 2, values, resamples=50, seed=0)
    assert [found.value, found.low, found.high] == pytest.approx([0.5] * 3, rel=1e-5)


def test_a_ratio_of_other_windows_or_of_nothing_is_refused():
    with pytest.raises(ValueError, match="cannot pair scores of shape"):
        peers_scores.ratio(torch.ones(2, 3), torch.ones(3, 3), resamples=5, seed=0)
    with pytest.raises(ValueError, match="has to be positive"):
        peers_scores.ratio(torch.ones(2, 3), torch.zeros(2, 3), resamples=5, seed=0)


def test_an_engine_scores_as_quality_does(rounded, against):
    ours, theirs = peers_scores.in_engine(rounded, against, "torch"), quality.score(models.load(rounded), against)
    assert torch.allclose(ours.kl.mean(), theirs.kl.mean(), rtol=0.1)  # the engine's logits are bf16
    assert torch.allclose(ours.nll.mean(), theirs.nll.mean(), rtol=0.01)


def test_engine_scores_are_kept_and_damaged_ones_made_again(rounded, against, tmp_path, monkeypatch):
    opened = []

    def measured(*arguments) -> quality.TokenScores:
        opened.append(arguments)
        return quality.TokenScores(*(torch.ones(2, 2) for _ in range(3)))

    monkeypatch.setattr(peers_scores, "in_engine", measured)
    for _ in range(2):
        peers_scores.scores(rounded, against, tmp_path, engine="openvino")
    assert len(opened) == 1
    next(tmp_path.iterdir()).write_bytes(b"?")
    peers_scores.scores(rounded, against, tmp_path, engine="openvino")
    assert len(opened) == 2


# Engines' own compressors


def test_onnx_runtimes_builder_is_asked_for_k_quant_and_its_failure_has_a_reason(base, run, monkeypatch):
    asked = []
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="first\nno such layer")
    monkeypatch.setattr(engine, "require", lambda *arguments: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: asked.append(command) or failed)
    with pytest.raises(RuntimeError, match="the ONNX model builder failed on tiny-llama: no such layer"):
        peers_runtimes.onnx_k_quant(base.path, run.artifacts_dir)
    assert asked[0][-2:] == ["algo_config=k_quant", "is_symmetric=false"]


def test_a_window_is_what_the_stateful_graph_reads():
    inputs = peers_runtimes._inputs(torch.tensor([5, 6, 7]))
    assert inputs["input_ids"].tolist() == [[5, 6, 7]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1]]
    assert inputs["beam_idx"].tolist() == [0]


@has_llama_cpp
def test_llama_cpp_writes_a_mixture_that_torch_reads(base, run, against):
    artifact = peers.write(base, "gguf-q4_k_m", run=run)
    assert artifact.card["measured"]["formats"]["q5_0"] > 0  # 256 does not divide the tiny model's rows
    assert divergence(artifact, against) < 0.2


# The command


def test_a_comparison_records_peer_rival_and_what_is_missing(run, base, rounded, monkeypatch, tmp_path):
    monkeypatch.setattr(type(run), "results_dir", property(lambda self: tmp_path))
    monkeypatch.setattr(peers, "match", lambda *arguments, **options: rounded)
    monkeypatch.setattr(
        peers_known,
        "PEERS",
        {"rtn-w4g64": peers.PEERS["rtn-w4g64"], "x": peers_known.Peer(peers_making.onnx, "no_such_module")},
    )
    peers.compare(run, ["rtn-w4g64", "x"])
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
    assert "rtn-w4g64" in peers._shown(run)


def test_a_form_that_does_not_fit_is_recorded_with_the_reason(run, base, rounded, monkeypatch, tmp_path):
    monkeypatch.setattr(type(run), "results_dir", property(lambda self: tmp_path))

    def refused(_base, size, **_how):
        raise ValueError(f"a budget of {size:,} bytes is below the smallest file")

    monkeypatch.setattr(peers, "match", refused)
    run.records.clear()
    peers.compare(run, ["rtn-w4g64"], forms=["ava-gguf"])
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


def test_a_logger_that_another_library_made_its_own_is_standard_again(monkeypatch):
    class Other(logging.Logger):
        pass

    monkeypatch.setattr(logging, "_loggerClass", Other)
    assert type(logging.getLogger("avalab-test-logger")) is Other
    peers_making.standard_logger("avalab-test-logger")
    assert type(logging.getLogger("avalab-test-logger")) is logging.Logger


def test_every_peer_is_scored_by_an_engine_that_exists():
    assert {peers.known(name).engine for name in peers.NAMES} <= set(engines.ENGINES)
    assert set(peers.SHORT) <= set(peers.NAMES)
