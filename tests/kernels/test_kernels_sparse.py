"""Losses from a few entries of the teacher: pencil, oracles (the dense losses), unbiased tails, memory, refusals."""

import subprocess
import sys
from math import log

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from avalab import kernels
from avalab.kernels import loss_chunks, loss_sparse
from avalab.lab.run import ROOT

EYE = torch.eye(3, dtype=torch.float64)
TOKENS, WIDTH, VOCAB = 2048, 576, 49_152
MEMORY = f"""
import gc, torch
from avalab import kernels
from avalab.lab import trackers
generator = torch.Generator().manual_seed(0)
def peak(tokens, arm):
    hidden = torch.randn(tokens, {WIDTH}, generator=generator).bfloat16().requires_grad_()
    head = torch.randn({VOCAB}, {WIDTH}, generator=generator).mul_(0.05).bfloat16()
    shares, ids = torch.rand(tokens, 24, generator=generator).softmax(-1).topk(24)
    gc.collect()
    trackers.reset_peak_memory("cpu")
    before = trackers.process_memory()["peak"]
    if arm == "sparse":
        loss = kernels.linear_sparse(hidden, head, ids, shares)
    elif arm == "online":
        loss = kernels.linear_kl(hidden, head, (hidden.detach() / 2, head))
    else:
        loss = -(shares * (hidden @ head.T).float().log_softmax(-1).gather(1, ids)).sum(1).mean()
    loss.backward()
    return trackers.process_memory()["peak"] - before
peak(32, "sparse"), peak(32, "online")
print(*(peak({TOKENS}, arm) for arm in ("sparse", "online", "dense")))
"""


def inputs(tokens=21, vocab=67, width=8, known=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, head = (torch.randn(n, width, generator=generator).double().requires_grad_() for n in (tokens, vocab))
    p = torch.randn(tokens, vocab, generator=generator).double().mul(2).softmax(-1)
    return hidden, head, p, *p.topk(min(known, vocab))[::-1]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setitem(loss_chunks.LOGIT_BYTES, "cpu", 1)
    monkeypatch.setattr(loss_chunks, "WIDE_VALUES", 2 * 67)


def test_one_known_entry_of_three_and_a_tail_make_a_coin():
    """q = 1/2, 1/4, 1/4; the teacher says 3/4 for the first: -(3/4 ln 1/2 + 1/4 ln 1/2) = ln 2."""
    hidden = torch.tensor([[log(2), 0.0, 0.0]], dtype=torch.float64)
    ids, weights = torch.tensor([[0]]), torch.tensor([[0.75]], dtype=torch.float64)
    assert kernels.linear_sparse(hidden, EYE, ids, weights, tail=True).item() == pytest.approx(log(2))
    assert kernels.linear_sparse(hidden, EYE, ids, weights).item() == pytest.approx(0.75 * log(2))


def test_a_label_with_weight_one_is_cross_entropy():
    hidden, head, *_ = inputs()
    labels = torch.arange(21)
    ours = kernels.linear_sparse(hidden, head, labels[:, None], torch.ones(21, 1, dtype=torch.float64))
    torch.testing.assert_close(ours, kernels.linear_cross_entropy(hidden, head, labels))


@given(tokens=st.integers(1, 40), vocab=st.integers(2, 70), tail=st.booleans(), known=st.integers(1, 9))
@example(tokens=17, vocab=2, tail=True, known=1)  # nothing is left for the tail
@settings(max_examples=25, deadline=None)
def test_chunks_and_both_gradients_agree_with_the_definition(tokens, vocab, tail, known):
    hidden, head, _, ids, weights = inputs(tokens, vocab, known=known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss_chunks.LOGIT_BYTES, "cpu", 1)
        ours = kernels.linear_sparse(hidden, head, ids, weights, tail=tail, temperature=0.7)
    theirs = loss_sparse.sparse_reference(hidden, head, (ids, weights), tail=tail, temperature=0.7)
    torch.testing.assert_close(ours, theirs)
    both = (hidden, head)
    torch.testing.assert_close(torch.autograd.grad(ours, both), torch.autograd.grad(theirs, both), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("tail", [False, True])
def test_gradients_agree_with_finite_differences(tail, small_chunks):
    hidden, head, _, ids, weights = inputs(18, 11, 2, known=3)
    assert torch.autograd.gradcheck(lambda h, w: kernels.linear_sparse(h, w, ids, weights, tail=tail), (hidden, head))


def test_all_entries_known_is_the_dense_divergence_plus_the_teachers_entropy():
    hidden, head, p, *_ = inputs()
    ids = torch.arange(67).expand(21, 67)
    entropy = -(p * p.log()).sum(-1).mean()
    dense = kernels.linear_kl(hidden, head, p.log())
    for tail in (False, True):
        sparse = kernels.linear_sparse(hidden, head, ids, p, tail=tail)
        torch.testing.assert_close(sparse, dense + entropy)


def test_the_gradient_of_a_tail_vanishes_where_the_student_is_right_about_the_known_entries():
    _, _, p, ids, weights = inputs()
    hidden = p.log().requires_grad_()
    loss = kernels.linear_sparse(hidden, torch.eye(67, dtype=torch.float64), ids, weights, tail=True)
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-12
    sum_only = kernels.linear_sparse(hidden, torch.eye(67, dtype=torch.float64), ids, weights)
    assert torch.autograd.grad(sum_only, hidden)[0].abs().max() > 1e-4


def test_unused_places_and_tokens_that_do_not_count_change_nothing():
    hidden, head, _, ids, weights = inputs()
    keep = torch.arange(21) % 3 > 0
    padded = torch.cat([ids, ids[:, :2]], 1), torch.cat([weights, torch.zeros(21, 2)], 1)
    for tail in (False, True):
        ours = kernels.linear_sparse(hidden, head, *padded, keep=keep, tail=tail)
        theirs = kernels.linear_sparse(hidden[keep], head, ids[keep], weights[keep], tail=tail)
        torch.testing.assert_close(ours, theirs)


def test_no_token_that_counts_is_a_loss_of_zero():
    hidden, head, _, ids, weights = inputs()
    assert kernels.linear_sparse(hidden, head, ids, weights, keep=torch.zeros(21, dtype=torch.bool)).item() == 0


def test_the_peak_of_memory_is_below_three_tenths_of_the_dense_loss_with_either_teacher():
    # In a process of its own: here, memory that earlier tests freed would be used again and nothing would grow.
    printed = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    sparse, online, dense = map(int, printed.stdout.split())
    assert dense >= 4 * TOKENS * VOCAB
    assert sparse <= 0.3 * dense
    assert online <= 0.3 * dense


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.full((21, 5), 67)}, "targets run from 67 to 67; the vocabulary has 67 entries"),
        ({"ids": torch.zeros(20, 5, dtype=torch.long)}, r"shapes \(20, 5\) and \(21, 5\) do not fit 21 hidden states"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be positive"),
    ],
)
def test_bad_input_is_refused_with_the_value_got(change, message):
    hidden, head, _, ids, weights = inputs()
    function = kernels.linear_sparse
    while hasattr(function, "__wrapped__"):  # below the checks of shapes that the tests install, as a user has it
        function = function.__wrapped__
    with pytest.raises(ValueError, match=message):
        function(**{"hidden": hidden, "weight": head, "ids": ids, "weights": weights, **change})
