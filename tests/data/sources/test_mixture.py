"""The calibration mix: kinds in turns, seeded, kept, and nothing of what is evaluated on."""

import pytest
import torch

from avalab.data import corpora
from avalab.data.sources import mixture
from avalab.models import checkpoint


@pytest.fixture(scope="module")
def windows(run, base, few_docstrings):
    return mixture.mixed_windows(run, base)


def test_windows_have_the_profiles_number_and_length_and_all_kinds_come_first(run, base, windows, few_docstrings):
    profile = run.profile
    assert windows.shape == (profile.calibration_samples, profile.calibration_tokens)
    docs = corpora.calibration_windows(run, checkpoint.load_tokenizer(base))
    assert torch.equal(windows[0], docs[0])
    assert torch.equal(windows[len(mixture.KINDS)], docs[1])


def test_own_text_begins_with_its_beginning_is_the_same_for_a_seed_and_written_once(run, base, monkeypatch):
    tokenizer = checkpoint.load_tokenizer(base)
    first = mixture.sampled_windows(run, base, "prose", ["The", "In"], 2)
    assert first[0].tolist()[: len(tokenizer("The").input_ids)] == tokenizer("The").input_ids
    monkeypatch.setattr(mixture, "sample", lambda *a, **k: pytest.fail("written again"))
    assert torch.equal(first, mixture.sampled_windows(run, base, "prose", ["The", "In"], 2))


def test_samples_differ_by_seed(base):
    model = checkpoint.load_model(base)
    one, same, other = (mixture.sample(model, [[5, 6], [7]], 12, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    assert sorted(map(len, one)) == [12, 12]


def test_calls_share_no_tool_with_the_evaluation_texts(run, base, windows):
    tokenizer = checkpoint.load_tokenizer(base)
    evaluated = corpora.evaluation_text("toolbox_calls", tokenizer).content
    names = {line.split('"')[3] for line in evaluated.splitlines() if line.startswith('{"name": "')}
    read = tokenizer.batch_decode(windows[3 :: len(mixture.KINDS)])
    assert not [name for name in names for text in read if f'"{name}"' in text]


def test_a_kind_without_enough_text_is_named(run, base, monkeypatch):
    short = {"docs": lambda *a: torch.zeros(1, 64, dtype=torch.long)}
    monkeypatch.setattr(mixture, "KINDS", short)
    with pytest.raises(ValueError, match="docs of the calibration mix has 1 windows, asked for 8"):
        mixture.mixed_windows(run, base)
