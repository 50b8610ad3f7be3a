"""Quality in the engine that runs it: the torch engine against `quality`, answers against `evaluate`, and failures."""

import pytest
import torch

from avalab import corpora, engine_quality, evaluate, models, process, quality
from avalab.call_cases import cases

CATEGORY, LIMIT = "toolbox_simple", 2


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Both halves of a call without the process; what the process would do is the same function."""
    monkeypatch.setattr(process, "_run", lambda arguments, limit: process.main(*arguments[:3]) or 0)


@pytest.fixture(scope="module")
def text(base):
    return corpora.text("toolbox_calls", models.load_tokenizer(base))


@pytest.fixture(scope="module")
def against(base, run, text):
    windows = corpora.windows(text, models.load_tokenizer(base), count=3, tokens=32)
    return quality.reference(base, windows, run.artifacts_dir / "cache")


def test_the_base_in_torch_differs_from_itself_by_what_bf16_logits_round_away(run, base, against, text):
    scores = engine_quality.record_text(run, "bf16 in torch", base, engine="torch", against=against, text=text)
    own = quality.score(models.load(base), against)
    assert scores.nll.shape == scores.kl.shape == (3, 31)
    torch.testing.assert_close(scores.nll, own.nll, atol=0.05, rtol=0)
    assert 0 <= scores.kl.mean() < 0.002
    found = {r.metric: r for r in run.records if r.subject == "bf16 in torch"}
    assert found["perplexity:toolbox_calls"].value == pytest.approx(float(scores.nll.double().mean().exp()))
    assert found["kl_divergence:toolbox_calls"].low <= found["kl_divergence:toolbox_calls"].value
    assert found["top1_agreement:toolbox_calls"].engine == "torch"


def test_scores_are_read_back_and_not_made_again(run, base, against, monkeypatch):
    cache = run.artifacts_dir / "cache"
    first = engine_quality.text_scores(base, "torch", against, cache)
    monkeypatch.setattr(process, "call", _refuse)
    torch.testing.assert_close(engine_quality.text_scores(base, "torch", against, cache).kl, first.kl)


def test_answers_of_the_torch_engine_are_those_of_evaluate_in_both_modes(run, base, respondent):
    right = engine_quality.record_calls(run, "bf16 in torch", base, engine="torch", category=CATEGORY, limit=LIMIT)
    texts = engine_quality.answer_calls(base, "torch", category=CATEGORY, limit=LIMIT, run=run)
    asked = cases(CATEGORY, LIMIT)
    for mode in engine_quality.MODES:
        assert texts[mode] == evaluate.answer_calls(respondent, asked, mode, run.artifacts_dir / "other")
        assert right[mode] == [verdict.correct for verdict in evaluate.judge(asked, texts[mode])]
    metrics = {r.metric for r in run.records}
    assert {f"call_accuracy:{CATEGORY}", f"call_accuracy_forced:{CATEGORY}"} <= metrics


def test_an_engine_that_generates_itself_answers_within_the_grammar(base, monkeypatch):
    """The torch engine's own `generate`, one after another, gives the batches' answers with a grammar."""
    request = {"folder": str(base.path), "engine": "torch", "device": "cpu", "threads": 1}
    request |= {"category": CATEGORY, "limit": LIMIT, "wanted": [LIMIT], "cache": ""}
    loaded, _ = engine_quality.cell.load_engine(request)
    monkeypatch.setattr(engine_quality.cell, "load_engine", lambda asked: (loaded, {}))
    (text,) = engine_quality.answered(request | {"engine": "another"})["texts"]
    assert text.startswith("<tool_call>")


def test_an_engine_that_cannot_read_the_artefact_is_a_record_that_says_so(run, base, against, text):
    assert engine_quality.record_text(run, "x", base, engine="onnx", against=against, text=text) is None
    assert engine_quality.record_calls(run, "x", base, engine="onnx", category=CATEGORY, limit=LIMIT) == {}
    notes = [r.note for r in run.records if r.subject == "x"]
    assert len(notes) == 3
    assert all(note.startswith("onnx cannot load tiny-llama") for note in notes)


def _refuse(*arguments, **options):
    raise AssertionError("it was made again")
