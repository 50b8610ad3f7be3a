"""Quality of an artefact in the engine that runs it: what is scored once, what is recorded, and how engines fail."""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel  # noqa: F401  before avalab reaches torchao: its warnings are its own

from avalab.compress import quantize
from avalab.data import corpora
from avalab.measure import quality
from avalab.models import checkpoint, predict


@pytest.fixture(scope="module")
def text(base):
    return corpora.evaluation_text("python_docs", checkpoint.load_tokenizer(base))


@pytest.fixture(scope="module")
def windows(base, text):
    return corpora.windows(text, checkpoint.load_tokenizer(base), count=4, tokens=40)


@pytest.fixture(scope="module")
def against(run, base, windows):
    return predict.make_reference(base, windows, run.artifacts_dir / "cache")


def test_the_base_scored_against_itself_has_no_divergence_and_agrees_everywhere(run, base, against, windows):
    scores = quality.score_artifact(base, against, run.artifacts_dir / "cache")
    assert scores.kl.shape == (len(windows), windows.shape[1] - 1)
    assert scores.kl.abs().max() == 0
    assert scores.agrees.min() == 1


def test_the_same_bytes_under_another_name_are_not_scored_twice(base, windows, tmp_path, monkeypatch):
    against = predict.make_reference(base, windows[:2], tmp_path / "cache")
    first = quality.score_artifact(base, against, tmp_path / "cache")
    copy = replace(base, path=tmp_path / "copy", card=base.card | {"name": "copy"})
    shutil.copytree(base.path, copy.path)
    monkeypatch.setattr(predict, "score_model", lambda *arguments, **options: pytest.fail("scored again"))
    again = quality.score_artifact(copy, against, tmp_path / "cache")
    assert all(torch.equal(getattr(again, name), getattr(first, name)) for name in vars(first))


def test_records_of_the_base_say_that_it_equals_itself(run, base, against, text):
    quality.record_quality(run, "bf16", base, against, text)
    found = {record.metric: record for record in run.records}
    assert {"kl_divergence:python_docs", "top1_agreement:python_docs", "perplexity:python_docs"} <= found.keys()
    assert found["kl_divergence:python_docs"].value == 0
    assert found["top1_agreement:python_docs"].value == 1
    assert found["perplexity:python_docs"].low < found["perplexity:python_docs"].value
    assert found["loss_rise:python_docs"].details["verdict"] == "not distinguishable"
    assert {record.artifact_sha256 for record in run.records} == {base.sha256}


def test_an_engine_that_rounds_its_logits_to_bf16_scores_as_torch_does_up_to_that(
    run, base, against, as_torch, tmp_path
):
    rounded = quantize.compress_artifact(base, "rtn", run=run)
    for artifact, share in ((base, 0), (rounded, 0.1)):
        ours = quality.score_artifact(artifact, against, tmp_path)
        theirs = quality.score_artifact(artifact, against, tmp_path, engine="openvino")
        torch.testing.assert_close(theirs.nll, ours.nll, atol=0.06, rtol=0)
        assert abs(float(theirs.kl.mean() - ours.kl.mean())) < 0.002 + share * float(ours.kl.mean())


def test_an_engines_scores_are_kept_and_damaged_ones_made_again(base, against, as_torch, tmp_path):
    first = quality.score_artifact(base, against, tmp_path, engine="openvino")
    again = quality.score_artifact(base, against, tmp_path, engine="openvino")
    assert torch.equal(first.kl, again.kl)
    assert as_torch == ["openvino"]
    (kept,) = tmp_path.glob("scores-*-openvino-*")
    kept.write_bytes(b"?")
    quality.score_artifact(base, against, tmp_path, engine="openvino")
    assert as_torch == ["openvino"] * 2


def test_an_engine_that_cannot_read_the_artefact_is_a_record_that_says_so(run, base, against, text, in_this_process):
    assert quality.record_quality(run, "x", base, against, text, engine="onnx") is None
    record = run.records[-1]
    assert (record.metric, record.value, record.engine) == ("kl_divergence:python_docs", None, "onnx")
    assert record.note.startswith("onnx cannot load tiny-llama")
