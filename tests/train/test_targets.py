"""Stored targets: an unbiased sample, few bytes, the right rows, and the same gradient as the whole distribution."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab import kernels
from avalab.data import packing
from avalab.data.packing import IGNORED
from avalab.models import checkpoint
from avalab.train import targets
from avalab.train.targets import TargetForm

DRAWS = 4000


@pytest.fixture(scope="module")
def rows(base):
    windows = torch.randint(3, 1000, (3, 24), generator=torch.Generator().manual_seed(0))
    found = packing.window_rows(windows)
    found[1]["labels"][:10] = IGNORED
    return found


def log_p(tokens=1, entries=30, seed=0):
    return torch.randn(tokens, entries, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)


def shares(log_p, count, seed):
    """What `count` draws say of p, dense."""
    ids, kept = targets.sampled(log_p, count, torch.Generator().manual_seed(seed))
    return torch.zeros(log_p.shape).scatter_add_(1, ids, kept.float() / count)


def test_two_entries_of_equal_probability_come_equally_often():
    ids, kept = targets.sampled(torch.tensor([[0.5, 0.5]]).log(), 10, torch.Generator().manual_seed(0))
    assert (ids.tolist(), kept.tolist()) == ([[0, 1]], [[5, 5]])


@given(tokens=st.integers(1, 4), entries=st.integers(1, 60), count=st.integers(1, 255), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_counts_add_up_and_are_the_expected_ones_rounded_up_or_down(tokens, entries, count, seed):
    known = log_p(tokens, entries, seed)
    ids, kept = targets.sampled(known, count, torch.Generator().manual_seed(seed))
    assert (kept.sum(1) == count).all()
    expected = count * known.double().exp()
    dense = torch.zeros(tokens, entries, dtype=torch.double).scatter_add_(1, ids, kept.double())
    assert ((dense - expected).abs() < 1 + 1e-3).all()


def test_the_sampled_form_is_unbiased_rare_entries_included():
    p = log_p().exp()
    mean = torch.cat([shares(p.log(), 20, seed) for seed in range(DRAWS)]).mean(0)
    # A share is at most one draw off; its mean over so many seeds is within four standard errors of that.
    assert ((mean - p[0]).abs() < 4 * 0.5 / 20 / DRAWS**0.5).all()
    assert p.min() < 1 / 20


def test_systematic_draws_vary_less_than_independent_ones():
    p, count = log_p().exp()[0], 20
    found = torch.cat([shares(p.log()[None], count, seed) for seed in range(1000)]).var(0).sum()
    independent = (p * (1 - p) / count).sum()
    assert found < 0.6 * independent


def test_the_gradient_from_sampled_targets_is_the_dense_one_on_average():
    generator, p = torch.Generator().manual_seed(1), log_p(2, 12).exp()
    head = torch.randn(12, 4, generator=generator)
    hidden = torch.randn(2, 4, generator=generator).requires_grad_()

    def gradient(ids, weights):
        return torch.autograd.grad(kernels.linear_sparse(hidden, head, ids, weights), hidden)[0]

    everything = torch.arange(12).expand(2, 12)
    drawn = [gradient(everything, shares(p.log(), 5, seed)) for seed in range(1000)]
    dense = torch.autograd.grad(kernels.linear_kl(hidden, head, p.log()), hidden)[0]
    error = torch.stack(drawn).std(0) / 1000**0.5
    assert ((torch.stack(drawn).mean(0) - dense).abs() < 4 * error + 1e-6).all()


def test_the_most_probable_entries_alone_would_give_another_gradient():
    generator, p = torch.Generator().manual_seed(1), log_p(2, 12).exp()
    head = torch.randn(12, 4, generator=generator)
    hidden = torch.randn(2, 4, generator=generator).requires_grad_()
    ids, kept = targets.topk(p.log(), 3)
    renormalised = kernels.linear_sparse(hidden, head, ids, kept / kept.sum(1, keepdim=True))
    dense = torch.autograd.grad(kernels.linear_kl(hidden, head, p.log()), hidden)[0]
    assert (torch.autograd.grad(renormalised, hidden)[0] - dense).abs().max() > 0.01


@pytest.mark.parametrize("form", [TargetForm(), TargetForm("topk", 24), TargetForm("sampled", 200, temperature=2.0)])
def test_what_is_read_back_is_what_the_teacher_says(run, base, rows, form):
    found, bytes_per_token = targets.attach_targets(run, rows, base, form)
    teacher = checkpoint.load_model(base)
    with torch.no_grad():
        for row, taught in zip(rows, found, strict=True):
            scored = row["labels"] != IGNORED
            logits = teacher(row["input_ids"][None]).logits[0, scored].float() / form.temperature
            p = logits.softmax(-1)
            dense = torch.zeros(p.shape).scatter_add_(
                1, taught["target_ids"][scored].long(), taught["target_weights"][scored]
            )
            entropy = -(p * p.log()).sum(-1)
            torch.testing.assert_close(taught["target_entropy"][scored], entropy, rtol=0.02, atol=0.02)
            if form.name == "sampled":
                assert ((dense - p).abs() < 1.1 / form.count + 0.02).all()
                torch.testing.assert_close(dense.sum(1), torch.ones(len(dense)))
            else:
                torch.testing.assert_close(dense[dense > 0], p[dense > 0], rtol=0.1, atol=0.01)
            assert not taught["target_weights"][~scored].any()
    if form.temperature == 1:
        assert bytes_per_token <= 120


def test_a_vocabulary_beyond_two_bytes_keeps_its_entries(rows):
    ids, kept = torch.tensor([[5, 70_000, 131_071]]), torch.tensor([[3, 4, 0]])
    packed = targets._packed([(ids, kept, torch.tensor([1.5]))], 131_072, TargetForm())
    row = {**rows[0], "labels": torch.tensor([IGNORED, 7])}
    (found,) = targets._unpacked([row], packed, {"count": 7, "name": "sampled"})
    assert found["target_ids"].tolist() == [[0, 0], [5, 70_000]]
    torch.testing.assert_close(found["target_weights"], torch.tensor([[0.0, 0.0], [3 / 7, 4 / 7]]))
    assert found["target_entropy"].tolist() == [0.0, 1.5]


def test_targets_are_computed_once(run, base, rows, monkeypatch):
    targets.attach_targets(run, rows, base, TargetForm())
    monkeypatch.setattr(targets, "write_targets", lambda *_: pytest.fail("computed again"))
    targets.attach_targets(run, rows, base, TargetForm())


def test_targets_of_other_rows_are_refused_by_hash(run, base, rows, tmp_path):
    path = tmp_path / "targets.safetensors"
    targets.write_targets(path, rows, checkpoint.load_model(base), targets.header(rows, base, TargetForm()))
    assert len(targets.load_targets(path, rows)) == 3
    with pytest.raises(ValueError, match=r"was made for rows [0-9a-f]{12}, these are [0-9a-f]{12}"):
        targets.load_targets(path, rows[:2])
    other = [{**rows[0], "labels": rows[0]["labels"].flip(0)}, *rows[1:]]
    with pytest.raises(ValueError, match="compute targets again"):
        targets.load_targets(path, other)


def test_a_damaged_file_of_targets_is_refused(run, base, rows, tmp_path):
    path = tmp_path / "targets.safetensors"
    targets.write_targets(path, rows, checkpoint.load_model(base), targets.header(rows, base, TargetForm()))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="is no file of targets, or damaged"):
        targets.load_targets(path, rows)


def test_the_file_names_rows_teacher_and_form(run, base, rows):
    about = targets.header(rows, base, TargetForm("topk", 9))
    assert about["rows"] == targets.rows_sha256(rows)
    assert (about["teacher"], about["name"], about["count"]) == (base.sha256, "topk", 9)
    json.dumps(about)


@pytest.mark.parametrize(("change", "got"), [({"name": "all"}, "'all'"), ({"count": 256}, "256"), ({"count": 0}, "0")])
def test_impossible_forms_are_refused(change, got):
    with pytest.raises(ValueError, match=f"{got}.*choose one of sampled, topk, 1 to 255 entries"):
        replace(TargetForm(), **change)
