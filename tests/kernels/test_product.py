"""The 4-bit weight and its product: pencil, properties, oracles (bitsandbytes, torch, torchao), refusals."""

import logging
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalab import kernels
from avalab.kernels import dispatch, product, weight
from avalab.kernels.formats import FORMATS, decode, encode
from avalab.kernels.product import KINDS, error_bound, sample_weight

FORMATS_4 = (
    "nf4",
    "nf4-dq",
    "fp4-dq",
    "int4",
    *(f"int4-g{size}{kind}" for size in (32, 64, 128) for kind in ("", "-asym")),
)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def saved_by_bitsandbytes(values, *, nested):
    """What bitsandbytes puts into a state dictionary for one weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes import functional
    codes, state = functional.quantize_4bit(values, quant_type="nf4", blocksize=64, compress_statistics=nested)
    saved = {"proj.weight": codes, **{f"proj.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    return saved, functional.dequantize_4bit(codes, state)


# --- the weight --------------------------------------------------------------------------------------------------


def test_a_byte_holds_two_codes_the_first_in_the_high_half():
    """0x21 with levels 0..15, zero point 1, scale 0.5: codes 2 and 1, weights 0.5 and 0."""
    w = kernels.Weight4(
        torch.tensor([[0x21]], dtype=torch.uint8), torch.arange(16.0), torch.tensor([[0.5]]), torch.tensor([[1.0]])
    )
    assert weight.decode(w).tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize("name", FORMATS_4)
def test_a_packed_weight_decodes_to_the_bits_of_its_format(name):
    encoded = encode(normal(6, 256), FORMATS[name])
    packed = kernels.from_encoded(encoded)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(weight.decode(packed, dtype), decode(encoded, dtype))
        assert torch.equal(weight.decode_by_pairs(packed, dtype), decode(encoded, dtype))


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_saved_by_bitsandbytes_loads_with_its_bytes_and_decodes_to_its_bits(nested):
    saved, expected = saved_by_bitsandbytes(normal(96, 192, dtype=torch.bfloat16), nested=nested)
    loaded = kernels.from_bitsandbytes(saved, "proj.weight")
    assert torch.equal(loaded.codes.flatten(), saved["proj.weight"].flatten())
    assert torch.equal(weight.decode(loaded, torch.bfloat16), expected)


def test_double_quantized_scales_stay_quantized_in_memory():
    loaded = kernels.from_encoded(encode(normal(256, 1024), FORMATS["nf4-dq"]))
    tables = 4 * (16 + 256)  # levels of the weights and of the scales
    assert loaded.bytes - tables == 256 * 1024 // 2 + 4096 + 4 * (16 + 1)


@given(rows=st.integers(1, 9), groups=st.integers(1, 5), kind=st.sampled_from(KINDS), data=st.data())
@settings(max_examples=40, deadline=None)
def test_part_of_a_weight_decodes_to_that_part_of_the_whole(rows, groups, kind, data):
    w = sample_weight("cpu", kind=kind, rows=rows, cols=64 * groups)
    first, last = sorted(data.draw(st.tuples(st.integers(0, rows - 1), st.integers(1, rows))))
    left, right = sorted(data.draw(st.tuples(st.integers(0, groups - 1), st.integers(1, groups))))
    part, cols = slice(first, max(last, first + 1)), slice(64 * left, 64 * max(right, left + 1))
    assert torch.equal(weight.decode_by_pairs(weight.take(w, part, cols), torch.float32), weight.decode(w)[part, cols])


# --- the product -------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64, 128]),
    batch=st.integers(0, 20),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
@settings(max_examples=80, deadline=None)
def test_every_form_stays_within_four_roundings_of_the_exact_product(rows, groups, group_size, batch, kind, dtype):
    w = product.prepare_small_batches(
        sample_weight("cpu", kind=kind, rows=rows, cols=group_size * groups, group_size=group_size)
    )
    x = normal(batch, group_size * groups, dtype=dtype)
    exact, bound = x.double() @ weight.decode(w, torch.float64).T, error_bound(x, w)
    forms = [form for form in product.PRODUCT if form.name != "triton" and form.serves(x, w)]
    for run in (kernels.multiply, *(form.run for form in forms)):
        y = run(x, w)
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= bound).all()


@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 12),
    group_size=st.sampled_from([32, 64, 128]),
    batch=st.integers(0, 5),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=40, deadline=None)
def test_the_transposed_product_equals_the_reference_in_float64(rows, groups, group_size, batch, kind):
    w = sample_weight("cpu", kind=kind, rows=rows, cols=group_size * groups, group_size=group_size)
    g = normal(batch, rows, dtype=torch.float64)
    torch.testing.assert_close(product.transposed_tiles(g, w), product.transposed_reference(g, w))


def test_tiles_of_any_size_give_the_same_product(monkeypatch):
    w, x, g = sample_weight("cpu", kind="int4_zero_point"), normal(7, 192).double(), normal(7, 96).double()
    for tile in (1, 1000, 5000, 2**20):
        monkeypatch.setitem(product.TILE_WEIGHTS, "cpu", tile)
        torch.testing.assert_close(product.product_tiles(x, w), product.product_reference(x, w))
        torch.testing.assert_close(product.transposed_tiles(g, w), product.transposed_reference(g, w))


@pytest.mark.parametrize("kind", KINDS)
def test_activations_may_be_strided_or_have_more_dimensions(kind):
    w = product.prepare_small_batches(sample_weight("cpu", kind=kind))
    wide = normal(2, 3, 384, dtype=torch.bfloat16)
    strided, turned = wide[..., ::2], normal(192, 3, dtype=torch.bfloat16).T
    for x in (strided, turned):
        assert torch.equal(kernels.multiply(x, w), kernels.multiply(x.contiguous(), w))
    assert kernels.multiply(strided, w).shape == (2, 3, 96)


@pytest.mark.parametrize("batch", [1, 5, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_held_nan_before_leaves_no_trace_and_the_result_repeats(kind, batch, monkeypatch):
    w, x = product.prepare_small_batches(sample_weight("cpu", kind=kind)), normal(batch, 192, dtype=torch.bfloat16)
    monkeypatch.setitem(product.TILE_WEIGHTS, "cpu", 4096)
    expected = kernels.multiply(x, w)
    poisoned_empty(monkeypatch)
    again = kernels.multiply(x, w)
    assert torch.equal(expected, again)
    assert again.isfinite().all()


def poisoned_empty(monkeypatch):
    """Every buffer that Python code allocates without filling it begins as NaN."""
    plain, plain_new = torch.empty, torch.Tensor.new_empty

    def filled(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *size, **options: filled(plain(*size, **options)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, **options: filled(plain_new(self, *size, **options))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_transposed_product_keeps_nan_in_its_row_takes_strides_and_ignores_what_memory_held(kind, monkeypatch):
    w, g = sample_weight("cpu", kind=kind), normal(4, 192, dtype=torch.bfloat16)[:, ::2]
    g[1, 7] = float("nan")
    expected = kernels.multiply_transposed(g.contiguous(), w)
    poisoned_empty(monkeypatch)
    found = kernels.multiply_transposed(g, w)
    assert found.isnan().any(1).tolist() == [False, True, False, False]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [3, 100])
def test_nan_in_one_row_of_activations_makes_that_row_nan_and_no_other(kind, batch):
    w, x = product.prepare_small_batches(sample_weight("cpu", kind=kind)), normal(batch, 192, dtype=torch.bfloat16)
    x[1, 7] = float("nan")
    bad = kernels.multiply(x, w).isnan()
    assert bad[1].all()
    assert not bad[[0, 2]].any()


def test_the_product_agrees_with_bitsandbytes_own():
    saved, dense = saved_by_bitsandbytes(normal(96, 192, dtype=torch.bfloat16), nested=True)
    w, x = kernels.from_bitsandbytes(saved, "proj.weight"), normal(70, 192, dtype=torch.bfloat16)
    assert torch.equal(product.product_tiles(x, w), torch.nn.functional.linear(x, dense))


def test_the_small_batch_kernel_serves_nf4_and_int4_where_the_machine_has_it():
    for kind in ("nf4", "int4", "int4_zero_point"):
        w, x = product.prepare_small_batches(sample_weight("cpu", kind=kind)), normal(1, 192, dtype=torch.bfloat16)
        if kind == "nf4" and product.native_code() != "avx512_bf16":
            assert w.small_batch is None
        else:
            assert dispatch.choose_form("product", product.PRODUCT, x.device, x, w).name == "library"


def test_int4_decodes_as_torchao_does():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.quant_primitives import dequantize_affine
    encoded = encode(normal(8, 128), FORMATS["int4-g32-asym"])
    scales, zero_points = encoded.scales.float().view(8, -1), encoded.offsets.int().view(8, -1)
    theirs = dequantize_affine(encoded.codes.int(), (1, 32), scales, zero_points, torch.int32, 0, 15)
    assert torch.equal(weight.decode(kernels.from_encoded(encoded)), theirs)


# --- the choice of a form ----------------------------------------------------------------------------------------


def test_the_switch_forces_the_reference_everywhere(monkeypatch):
    monkeypatch.setenv(dispatch.SWITCH, "reference")
    w, x = product.prepare_small_batches(sample_weight("cpu", kind="nf4")), normal(2, 192, dtype=torch.bfloat16)
    arguments = {"product": (x, w), "product_transposed": (x, w), "decode": (w, x.dtype), "lora": (x, w)}
    for name, forms in kernels.OPERATIONS.items():
        assert dispatch.choose_form(name, forms, x.device, *arguments.get(name, (x,))).name == "reference"


def test_a_form_that_fails_its_check_is_never_used_and_says_so_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_verdicts", {})

    def broken(x, w):
        return product.product_reference(x, w) + 1000

    forms = (dispatch.Form("tiles", broken, lambda *_: True, product.product_check(broken, 2)), product.PRODUCT[-1])
    w, x = sample_weight("cpu", kind="nf4"), normal(2, 192)
    with pytest.warns(UserWarning, match="'tiles' failed its check on cpu, not used: nf4 times 2 rows"):
        assert dispatch.choose_form("product", forms, x.device, x, w).name == "reference"
    assert dispatch.choose_form("product", forms, x.device, x, w).name == "reference"


def test_no_form_but_the_reference_is_without_a_check():
    for forms in kernels.OPERATIONS.values():
        assert [form.name for form in forms if form.check is None] == ["reference"]


def test_without_bitsandbytes_the_product_is_the_same():
    script = """
import sys; sys.modules["bitsandbytes"] = None
import torch
from avalab import kernels
from avalab.kernels.product import sample_weight
w = kernels.prepare(sample_weight("cpu", kind="nf4"))
y = kernels.multiply(torch.ones(2, 192, dtype=torch.bfloat16), w)
print(w.small_batch, y.double().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = product.product_tiles(torch.ones(2, 192, dtype=torch.bfloat16), sample_weight("cpu", kind="nf4"))
    assert done.stdout.split() == ["None", str(expected.double().sum().item())]


def test_a_processor_without_the_instructions_falls_back_to_tiles_and_says_so_once(monkeypatch, caplog):
    functional = pytest.importorskip("bitsandbytes").functional
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: False)
    product.native_code.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            weights = [product.prepare_small_batches(sample_weight("cpu", kind="nf4")) for _ in range(2)]
    finally:
        product.native_code.cache_clear()
    assert caplog.text.count("no small-batch NF4 kernel for this CPU") == 1
    assert [w.small_batch for w in weights] == [None, None]
    x = normal(1, 192, dtype=torch.bfloat16)
    assert torch.equal(kernels.multiply(x, weights[0]), product.product_tiles(x, weights[0]))


# --- refusals ----------------------------------------------------------------------------------------------------


def test_columns_that_differ_are_refused_by_both_numbers():
    with pytest.raises(ValueError, match="activations of 100 values do not match the 192 columns"):
        kernels.multiply(normal(2, 100), sample_weight("cpu", kind="nf4"))


def test_a_group_that_does_not_divide_is_refused_by_both_numbers():
    with pytest.raises(ValueError, match="groups of 128 do not divide 576 columns"):
        weight.check_groups(576, 128)
    saved, _ = saved_by_bitsandbytes(normal(64, 96), nested=False)
    with pytest.raises(ValueError, match="groups of 64 do not divide 96 columns"):
        kernels.from_bitsandbytes(saved, "proj.weight")


def test_an_unknown_dtype_is_refused_with_those_that_are_allowed():
    with pytest.raises(ValueError, match=r"float8_e4m3fn; the product takes .*bfloat16"):
        kernels.multiply(normal(2, 192).to(torch.float8_e4m3fn), sample_weight("cpu", kind="nf4"))


def test_another_device_is_refused_by_name():
    with pytest.raises(ValueError, match="activations are on meta, the weight on cpu"):
        kernels.multiply(torch.empty(2, 192, device="meta"), sample_weight("cpu", kind="nf4"))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_scale_of_zero_or_nan_is_refused_by_row_and_group(bad):
    w = sample_weight("cpu", kind="nf4")
    w.scales[5, 2] = bad
    with pytest.raises(ValueError, match=r"1 of 288 scales .* in row 5, group 2 \(columns 128 on\)"):
        kernels.checked(w)
    if bad == 0:
        assert kernels.checked(w, zero_scales=True) is w


def test_activations_that_want_a_gradient_are_sent_to_the_differentiable_layer():
    with pytest.raises(ValueError, match=r"use avalab\.kernels\.linear"):
        kernels.multiply(normal(2, 192).requires_grad_(), sample_weight("cpu", kind="nf4"))


def test_a_state_without_a_4_bit_weight_is_refused():
    with pytest.raises(ValueError, match="not a 4-bit weight"):
        kernels.from_bitsandbytes({"weight": normal(2, 2)})


def test_a_format_of_other_bits_is_refused():
    with pytest.raises(ValueError, match="int8 has 8 bits a code"):
        kernels.from_encoded(encode(normal(4, 64), FORMATS["int8"]))


def test_a_switch_that_names_no_form_is_refused(monkeypatch):
    monkeypatch.setenv(dispatch.SWITCH, "fastest")
    with pytest.raises(
        ValueError, match="'fastest' names no form; choose one of library, native, reference, tiles, triton"
    ):
        kernels.multiply(normal(2, 192), sample_weight("cpu", kind="nf4"))
