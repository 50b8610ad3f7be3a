"""Losses by chunks: pencil, properties, oracles (torch.nn.functional), memory, refusals."""

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from avalab import kernels
from avalab.kernels import dispatch, loss, loss_chunks, loss_trained_head

EYE = torch.eye(2, dtype=torch.float64)


def inputs(tokens=21, vocab=67, width=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, head = (torch.randn(n, width, generator=generator).to(dtype).requires_grad_() for n in (tokens, vocab))
    return hidden, head, torch.randint(0, vocab, (tokens,), generator=generator)


@pytest.fixture
def small_chunks(monkeypatch):
    """16 tokens a chunk or 10 entries a panel, two rows widened at a time, four entries of the head's gradient."""
    monkeypatch.setitem(loss_chunks.LOGIT_BYTES, "cpu", 1)
    monkeypatch.setattr(loss_chunks, "WIDE_VALUES", 2 * 67)
    monkeypatch.setattr(loss_chunks, "PANEL_VALUES", 4 * 8)
    monkeypatch.setattr(loss_trained_head, "FEWEST_ENTRIES", 10)


def test_cross_entropy_of_two_entries_with_odds_of_three_to_one_is_log_four_thirds():
    """Logits (ln 3, 0): p = 3/4, 1/4; the loss of the first word is ln(4/3)."""
    hidden = torch.tensor([[log(3), 0.0]], dtype=torch.float64)
    assert kernels.linear_cross_entropy(hidden, EYE, torch.tensor([0])).item() == pytest.approx(log(4 / 3))


def test_kl_of_a_fair_coin_from_a_biased_one_is_half_log_four_thirds():
    """Teacher 1/2, 1/2, student 3/4, 1/4: 0.5 ln(2/3) + 0.5 ln 2 = 0.5 ln(4/3)."""
    hidden, fair = torch.tensor([[log(3), 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    assert kernels.linear_kl(hidden, EYE, fair).item() == pytest.approx(0.5 * log(4 / 3))
    reverse = 0.75 * log(1.5) + 0.25 * log(0.5)
    assert kernels.linear_kl(hidden, EYE, fair, reverse=True).item() == pytest.approx(reverse)


@given(
    tokens=st.integers(1, 40), vocab=st.integers(2, 70), smoothing=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_cross_entropy_and_both_gradients_agree_with_torch(tokens, vocab, smoothing, seed):
    hidden, head, targets = inputs(tokens, vocab, seed=seed)
    targets = torch.where(torch.arange(tokens) % 3 == 2, -100, targets)
    ours = kernels.linear_cross_entropy(hidden, head, targets, label_smoothing=smoothing, temperature=0.7)
    theirs = functional.cross_entropy(hidden @ head.T / 0.7, targets, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    both = (hidden, head)
    torch.testing.assert_close(torch.autograd.grad(ours, both), torch.autograd.grad(theirs, both))


@given(tokens=st.integers(1, 40), vocab=st.integers(2, 70), reverse=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_kl_and_both_gradients_agree_with_torch(tokens, vocab, reverse, seed):
    hidden, head, _ = inputs(tokens, vocab, seed=seed)
    other, other_head, _ = (t.detach() for t in inputs(tokens, vocab, seed=seed + 100))
    ours = kernels.linear_kl(hidden, head, (other, other_head), reverse=reverse, temperature=2.0)
    p, q = (z.div(2).log_softmax(-1) for z in (other @ other_head.T, hidden @ head.T))
    p, q = (q, p) if reverse else (p, q)
    theirs = 4 * functional.kl_div(q, p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, (hidden, head)), torch.autograd.grad(theirs, (hidden, head)))


@pytest.mark.parametrize("trained", [True, False])
def test_capped_logits_and_both_gradients_agree_with_torch(small_chunks, trained):
    """3 tanh(z / 3), as Gemma 2 has it with 30; the teacher's cap is its own."""
    hidden, head, targets = inputs()
    other, other_head, _ = (t.detach() for t in inputs(seed=1))
    head.requires_grad_(trained)
    both = (hidden, head) if trained else (hidden,)
    logits, theirs = 3 * torch.tanh(hidden @ head.T / 3), 2 * torch.tanh(other @ other_head.T / 2)
    q, p = logits.log_softmax(-1), theirs.log_softmax(-1)
    capped = {"softcap": 3.0}
    pairs = [
        (kernels.linear_cross_entropy(hidden, head, targets, **capped), functional.cross_entropy(logits, targets)),
        (
            kernels.linear_kl(hidden, head, (other, other_head), teacher_softcap=2.0, **capped),
            functional.kl_div(q, p, log_target=True, reduction="batchmean"),
        ),
        (
            kernels.linear_sparse(hidden, head, torch.arange(67).expand(21, 67), p.exp(), **capped),
            -(p.exp() * q).sum(-1).mean(),
        ),
    ]
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected)
        found, wanted = (torch.autograd.grad(loss, both, retain_graph=True) for loss in (ours, expected))
        torch.testing.assert_close(found, wanted)


def test_gradients_agree_with_finite_differences(small_chunks):
    hidden, head, targets = inputs(18, 11, 2)
    teacher = torch.randn(18, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda h, w: kernels.linear_cross_entropy(h, w, targets % 11), (hidden, head))
    for reverse in (False, True):
        assert torch.autograd.gradcheck(
            lambda h, w, r=reverse: kernels.linear_kl(h, w, teacher, reverse=r), (hidden, head)
        )


def test_chunks_of_any_size_give_the_same_loss_and_gradients(small_chunks):
    hidden, head, targets = inputs(50)
    ours = kernels.linear_cross_entropy(hidden, head, targets, label_smoothing=0.1)
    theirs = loss.cross_entropy_reference(hidden, head, targets, label_smoothing=0.1)
    both = (hidden, head)
    torch.testing.assert_close(torch.autograd.grad(ours, both), torch.autograd.grad(theirs, both))


@pytest.mark.parametrize("reverse", [False, True])
def test_stored_and_live_teacher_give_the_same_loss_and_gradients(reverse):
    hidden, head, _ = inputs()
    other, other_head, _ = inputs(seed=1)
    live = kernels.linear_kl(hidden, head, (other, other_head), reverse=reverse, temperature=1.5)
    stored = (other @ other_head.T).detach()
    kept = kernels.linear_kl(hidden, head, stored, reverse=reverse, temperature=1.5)
    torch.testing.assert_close(live, kept)
    torch.testing.assert_close(torch.autograd.grad(live, (hidden, head)), torch.autograd.grad(kept, (hidden, head)))


@pytest.mark.parametrize("reverse", [False, True])
def test_kl_of_some_tokens_is_the_mean_over_those(reverse):
    hidden, head, _ = inputs()
    teacher, keep = inputs(seed=1)[0].detach() @ head.detach().T, torch.arange(21) % 3 > 0
    some = kernels.linear_kl(hidden, head, teacher, reverse=reverse, keep=keep)
    torch.testing.assert_close(some, kernels.linear_kl(hidden[keep], head, teacher[keep], reverse=reverse))


def test_kl_of_a_model_from_itself_is_zero_and_so_is_its_gradient():
    hidden, head, _ = inputs()
    for reverse in (False, True):
        value = kernels.linear_kl(hidden, head, (hidden, head), reverse=reverse, temperature=3.0)
        assert abs(value.item()) < 1e-12
        assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(value, (hidden, head)))


def test_an_entry_that_the_teacher_excludes_adds_nothing_to_forward_kl():
    hidden, head, _ = inputs()
    teacher = torch.zeros(21, 67, dtype=torch.float64)
    teacher[:, 5:] = float("-inf")
    expected = (-log(5) - (hidden @ head.T).log_softmax(-1)[:, :5].mean(-1)).mean()
    torch.testing.assert_close(kernels.linear_kl(hidden, head, teacher), expected)


def test_tokens_that_do_not_count_get_no_gradient_even_when_they_are_nan():
    hidden, head, targets = inputs()
    with torch.no_grad():
        hidden[3] = float("nan")
    targets[3] = -100
    value = kernels.linear_cross_entropy(hidden, head, targets)
    dh, dw = torch.autograd.grad(value, (hidden, head))
    assert value.isfinite()
    assert dw.isfinite().all()
    assert (dh[3] == 0).all()


def test_nan_in_a_token_that_counts_is_not_hidden():
    hidden, head, targets = inputs()
    with torch.no_grad():
        hidden[3, 0] = float("nan")
    assert kernels.linear_cross_entropy(hidden, head, targets).isnan()
    assert kernels.linear_kl(hidden, head, torch.zeros(21, 67)).isnan()
    assert kernels.linear_kl(hidden, head, torch.zeros(21, 67), reverse=True).isnan()


def test_no_token_that_counts_is_a_loss_of_zero_with_zero_gradients():
    hidden, head, targets = inputs()
    for run in (kernels.linear_cross_entropy, None):
        nothing = torch.full_like(targets, -100)
        keep = torch.zeros(21, dtype=torch.bool)
        value = run(hidden, head, nothing) if run else kernels.linear_kl(hidden, head, torch.zeros(21, 67), keep=keep)
        assert value.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(value, (hidden, head)))


def test_the_incoming_gradient_scales_both_gradients():
    hidden, head, targets = inputs()
    value = kernels.linear_cross_entropy(hidden, head, targets)
    once = torch.autograd.grad(value, (hidden, head), retain_graph=True)
    thrice = torch.autograd.grad(3 * value, (hidden, head))
    torch.testing.assert_close([3 * g for g in once], list(thrice))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_loss_and_gradients_are_as_close_to_float64_as_the_dtype_allows(dtype, allowed, small_chunks):
    hidden, head, targets = inputs(64, dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in (hidden, head)]
    found = [kernels.linear_cross_entropy(hidden, head, targets)]
    exact = [loss.cross_entropy_reference(*wide, targets)]
    found += torch.autograd.grad(found[0], (hidden, head))
    exact += torch.autograd.grad(exact[0], wide)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs).norm() <= allowed * theirs.norm()


def test_a_poisoned_buffer_leaves_no_trace_and_the_result_repeats(monkeypatch, small_chunks):
    hidden, head, targets = inputs(dtype=torch.bfloat16)
    expected = kernels.linear_cross_entropy(hidden, head, targets)
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: plain(self, *a, **k).fill_(float("nan")))
    again = kernels.linear_cross_entropy(hidden, head, targets)
    assert torch.equal(expected, again)
    assert all(g.isfinite().all() for g in torch.autograd.grad(again, (hidden, head)))


def test_strided_and_batched_hidden_states_are_taken_as_they_come():
    hidden, head, targets = inputs(24, width=16)
    strided = hidden.view(2, 12, 16)[..., ::2].transpose(0, 1)
    ours = kernels.linear_cross_entropy(strided, head[:, ::2], targets.view(12, 2))
    theirs = functional.cross_entropy(strided.reshape(24, 8) @ head[:, ::2].T, targets)
    torch.testing.assert_close(ours, theirs)


def test_no_tensor_is_larger_than_a_quarter_of_the_logits(small_chunks):
    hidden, head, targets = inputs(512, 67, 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            out = function(*arguments, **(options or {}))
            largest = max(
                [largest, *(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t))]
            )
            return out

    kernels.linear_cross_entropy(hidden, head, targets)  # its check runs outside the watch
    with Watch():
        kernels.linear_cross_entropy(hidden, head, targets).backward()
    assert largest <= 512 * 67 / 4


@pytest.mark.parametrize("reverse", [False, True])
def test_panels_of_the_vocabulary_in_which_the_teacher_excludes_everything_add_nothing(reverse, small_chunks):
    hidden, head, _ = inputs(40)
    teacher = torch.randn(40, 67, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    if not reverse:
        teacher[:, 20:] = float("-inf")
    ours = kernels.linear_kl(hidden, head, teacher, reverse=reverse)
    theirs = loss.kl_reference(hidden, head, teacher, reverse=reverse)
    both = (hidden, head)
    torch.testing.assert_close(torch.autograd.grad(ours, both), torch.autograd.grad(theirs, both))
    torch.testing.assert_close(ours, theirs)


@given(tokens=st.integers(1, 40), vocab=st.integers(2, 70), reverse=st.booleans(), entries=st.integers(1, 80))
@settings(max_examples=25, deadline=None)
def test_panels_of_any_number_of_entries_agree_with_the_reference(tokens, vocab, reverse, entries):
    hidden, head, targets = inputs(tokens, vocab)
    teacher = torch.randn(tokens, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_trained_head, "FEWEST_ENTRIES", entries)
        patch.setitem(loss_chunks.LOGIT_BYTES, "cpu", 1)
        ours = [loss_trained_head.cross_entropy(hidden, head, targets, label_smoothing=0.1, temperature=0.7)]
        ours += [loss_trained_head.kl(hidden, head, teacher, reverse=reverse, temperature=0.7)]
    theirs = [loss.cross_entropy_reference(hidden, head, targets, label_smoothing=0.1, temperature=0.7)]
    theirs += [loss.kl_reference(hidden, head, teacher, reverse=reverse, temperature=0.7)]
    both = (hidden, head)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
        torch.testing.assert_close(torch.autograd.grad(mine, both), torch.autograd.grad(other, both))


def test_a_frozen_head_costs_no_gradient():
    hidden, head, targets = inputs()
    head.requires_grad_(False)
    kernels.linear_cross_entropy(hidden, head, targets).backward()
    assert head.grad is None
    assert hidden.grad is not None


def test_the_switch_runs_the_reference(monkeypatch):
    hidden, head, targets = inputs()
    monkeypatch.setenv(dispatch.SWITCH, "reference")
    assert kernels.linear_cross_entropy(hidden, head, targets).grad_fn.name() == "DivBackward0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(67, 9, dtype=torch.float64)}, "width 8 do not match a head of width 9"),
        ({"weight": torch.ones(67, 8)}, r"hidden states are torch.float64, the head torch.float32"),
        ({"targets": torch.full((21,), 67)}, "targets run from 67 to 67; the vocabulary has 67 entries"),
        ({"targets": torch.zeros(20, dtype=torch.long)}, "21 hidden states, but targets or a mask for 20"),
        ({"label_smoothing": 1.0}, r"label smoothing is 1.0; it must be in \[0, 1\)"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
    ],
)
def test_bad_input_is_refused_with_the_value_got(change, message):
    hidden, head, targets = (t.detach() for t in inputs())
    arguments = {"hidden": hidden, "weight": head, "targets": targets, **change}
    # Below the checks of shapes that the tests install, as a user has it.
    with pytest.raises(ValueError, match=message):
        unchecked(kernels.linear_cross_entropy)(**arguments)


def test_a_teacher_of_another_vocabulary_is_refused():
    hidden, head, _ = inputs()
    with pytest.raises(ValueError, match="the teacher has 21 rows of 60 vocabulary entries, the student 21 of 67"):
        unchecked(kernels.linear_kl)(hidden, head, torch.zeros(21, 60))


def unchecked(function):
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
