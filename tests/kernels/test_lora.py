"""The 4-bit linear layer with a low-rank adapter: gradients, memory, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalab import kernels
from avalab.kernels import dispatch, lora, product
from avalab.kernels.product import KINDS, sample_weight


def parts(weight, rank=3, batch=(5,), dtype=torch.float64):
    rows, cols = weight.shape
    shapes = ((*batch, cols), (rank, cols), (rows, rank))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kind", ["nf4_nested", "int4_zero_point"])
def test_gradients_agree_with_finite_differences_in_float64(kind):
    w = sample_weight("cpu", kind=kind, rows=8, cols=64)
    x, a, b = parts(w, rank=2, batch=(2,))
    assert torch.autograd.gradcheck(lambda *t: kernels.linear(t[0], w, a=t[1], b=t[2], scaling=0.5), (x, a, b))
    assert torch.autograd.gradcheck(lambda t: kernels.linear(t, w), (x,))


@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64, 128]),
    rank=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=30, deadline=None)
def test_result_and_gradients_agree_with_the_reference(rows, groups, group_size, rank, kind):
    w = sample_weight("cpu", kind=kind, rows=rows, cols=group_size * groups, group_size=group_size)
    inputs = parts(w, rank, batch=(2, 3))
    found = []
    for run in (lora.lora_fused, lora.lora_reference):
        y = run(inputs[0], w, inputs[1], inputs[2], 2.0)
        found.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    torch.testing.assert_close(*found)


def result_and_gradients(w, inputs):
    y = kernels.linear(inputs[0], w, a=inputs[1], b=inputs[2])
    return [y.detach(), *torch.autograd.grad(y.sum(), inputs)]


@pytest.mark.parametrize("kind", KINDS)
def test_strided_input_and_memory_that_held_nan_leave_no_trace_and_the_result_repeats(kind, monkeypatch):
    w, inputs = (
        sample_weight("cpu", kind=kind),
        parts(sample_weight("cpu", kind=kind), batch=(2, 5), dtype=torch.bfloat16),
    )
    expected = result_and_gradients(w, inputs)
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    plain, plain_new = torch.empty, torch.Tensor.new_empty
    for owner, name, call in ((torch, "empty", plain), (torch.Tensor, "new_empty", plain_new)):
        monkeypatch.setattr(owner, name, lambda *a, call=call, **k: poisoned(call(*a, **k)))
    for ours, theirs in zip(result_and_gradients(w, inputs), expected, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(result_and_gradients(w, strided), expected, strict=True):
        assert ours.isfinite().all()
        assert (ours - theirs).norm() <= 0.01 * theirs.norm()  # other strides, another order of additions


def poisoned(tensor):
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def test_nan_in_a_token_reaches_its_result_and_the_adapters_gradients_and_no_other_token():
    w = sample_weight("cpu", kind="nf4")
    x, a, b = parts(w)
    with torch.no_grad():
        x[1, 7] = float("nan")
    y, dx, da, db = result_and_gradients(w, (x, a, b))
    assert y.isnan().any(1).tolist() == [False, True, False, False, False]
    assert dx.isfinite().all()  # of a sum: it does not depend on x
    assert da.isnan().any()
    assert db.isnan().any()


def test_an_adapter_whose_b_is_zero_leaves_the_product_as_it_is():
    w = sample_weight("cpu", kind="nf4")
    x, a, b = (part.detach() for part in parts(w, dtype=torch.bfloat16))
    assert torch.equal(kernels.linear(x, w, a=a, b=torch.zeros_like(b)), kernels.multiply(x, w))


def test_bf16_gradients_are_within_a_hundredth_of_float64():
    w = sample_weight("cpu", kind="nf4", rows=128, cols=256)
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        inputs = [t.detach().bfloat16().to(dtype).requires_grad_() for t in parts(w, 8, (64,))]
        gradients.append(torch.autograd.grad(kernels.linear(inputs[0], w, a=inputs[1], b=inputs[2]).mean(), inputs))
    for exact, rounded in zip(*gradients, strict=True):
        assert (rounded.double() - exact).norm() < 0.01 * exact.norm()


def test_float32_adapters_get_float32_gradients_from_bf16_activations():
    w = sample_weight("cpu", kind="nf4")
    x, a, b = parts(w, dtype=torch.bfloat16)
    masters = [t.detach().float().requires_grad_() for t in (a, b)]
    kernels.linear(x, w, a=masters[0], b=masters[1]).sum().backward()
    assert masters[0].grad.dtype == masters[1].grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16


def test_what_autograd_keeps_is_the_input_the_adapter_and_its_inner_product():
    w = sample_weight("cpu", kind="nf4", rows=128, cols=256)
    x, a, b = parts(w, rank=4, batch=(10,), dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        kernels.linear(x, w, a=a, b=b)
    assert sorted(kept) == sorted([(10, 256), (4, 256), (128, 4), (10, 4)])


def test_no_tensor_as_large_as_the_weight_is_made_in_either_direction(monkeypatch):
    monkeypatch.setitem(product.TILE_WEIGHTS, "cpu", 4096)
    monkeypatch.setattr(product, "PANEL_COLS", 64)
    w, largest = sample_weight("cpu", kind="nf4", rows=256, cols=512), 0
    x, a, b = parts(w, rank=4, batch=(10,), dtype=torch.bfloat16)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            out = function(*arguments, **(options or {}))
            floats = [t for t in out if torch.is_tensor(t)] if isinstance(out, tuple | list) else [out]
            sizes = [t.numel() for t in floats if torch.is_tensor(t) and t.is_floating_point()]
            largest = max([largest, *sizes])
            return out

    kernels.linear(x, w, a=a, b=b).sum().backward()  # the checks run outside the watch
    with Watch():
        kernels.linear(x, w, a=a, b=b).sum().backward()
    assert largest <= 256 * 64  # a panel of columns; the weight has 256 x 512


def test_without_an_adapter_not_even_the_input_is_kept():
    w, kept = sample_weight("cpu", kind="nf4"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.linear(torch.ones(3, 192, requires_grad=True), w).sum().backward()
    assert kept == []


def test_the_switch_runs_the_reference(monkeypatch):
    w = sample_weight("cpu", kind="nf4")
    x, a, b = parts(w)
    monkeypatch.setenv(dispatch.SWITCH, "reference")
    assert torch.equal(kernels.linear(x, w, a=a, b=b), lora.lora_reference(x, w, a, b, 1.0))


def test_half_an_adapter_is_refused():
    w = sample_weight("cpu", kind="nf4")
    with pytest.raises(ValueError, match="an adapter is A and B, got only A"):
        kernels.linear(torch.ones(1, 192), w, a=torch.ones(2, 192))


def test_an_adapter_of_another_shape_is_refused_by_all_three_shapes():
    w = sample_weight("cpu", kind="nf4")
    with pytest.raises(ValueError, match=r"A \(2, 100\) and B \(96, 2\) do not fit a weight of \(96, 192\)"):
        # As a user has it, without the checks of shapes that the tests install.
        kernels.linear.__wrapped__(torch.ones(1, 192), w, a=torch.ones(2, 100), b=torch.ones(96, 2))
