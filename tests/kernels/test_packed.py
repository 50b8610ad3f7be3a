"""Packed weights of 2 to 8 bits: the layout against a pencil, every form against its reference."""

import logging

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

from avalab.kernels.formats import Grid, Rounded, encode, four_bit
from avalab.kernels.lora import linear
from avalab.kernels.packed import native, product, weight
from avalab.kernels.weight import decode, from_encoded
from avalab.lab.errors import InputError

BITS = range(2, 9)


def rounded(bits: int, rows: int = 40, cols: int = 128, group: int = 32, *, symmetric: bool = False) -> Rounded:
    generator = torch.Generator().manual_seed(bits)
    grid = Grid(bits, group, symmetric)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(grid.low, grid.high + 1, shape, generator=generator).to(torch.int8)

    zeros = codes(rows, cols // group)
    scales = torch.rand(rows, cols // group, generator=generator).bfloat16()
    return Rounded(grid, codes(rows, cols), scales, zeros * (not symmetric))


def test_two_bits_of_a_row_stand_in_one_word_as_a_pencil_puts_them():
    codes = torch.zeros(1, 32, dtype=torch.int32)
    codes[0, :3] = torch.tensor([3, 1, 2])
    words = weight.pack_words(codes, 2)
    assert words.shape == (1, 1, 2, 16)
    assert words[0, 0, 0, 0] == 0b10_01_11
    assert words.count_nonzero() == 1


@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back_and_take_as_many_bits_as_they_have(bits):
    codes = torch.randint(0, 2**bits, (48, 96), generator=torch.Generator().manual_seed(bits))
    words = weight.pack_words(codes, bits)
    assert torch.equal(weight.unpack_codes(words), codes.to(torch.uint8))
    assert words.numel() * 32 == codes.numel() * bits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_a_decoded_grid_is_what_compressed_tensors_decodes(bits, symmetric):
    made = rounded(bits, symmetric=symmetric)
    codes = unpack_from_int32(pack_to_int32(made.codes, bits), bits, made.codes.shape)
    expected = Rounded(made.grid, codes, made.scales, made.zero_points).decode(torch.float32)
    assert torch.equal(weight.decode(weight.from_rounded(made)), expected)


@pytest.mark.parametrize("double", [True, False])
def test_nf4_decodes_to_the_values_of_the_four_bit_kernels(double):
    four = from_encoded(encode(torch.randn(32, 128), four_bit("nf4", double_quantization=double)))
    assert torch.equal(weight.decode(weight.from_weight4(four)), decode(four))


def test_int8_rows_decode_to_codes_times_scales():
    codes, scales = torch.randint(-127, 128, (20, 64)).to(torch.int8), torch.rand(20, 1).bfloat16()
    assert torch.equal(weight.decode(weight.from_int8_rows(codes, scales)), codes.float() * scales.float())


def test_scales_that_bf16_does_not_hold_stay_in_float32():
    scales = torch.tensor([[1 / 3]])
    assert weight.narrowest(scales).dtype == torch.float32
    assert weight.narrowest(scales / scales).dtype == torch.bfloat16


def test_rows_are_looked_up_as_they_are_decoded():
    packed = weight.from_rounded(rounded(3))
    ids = torch.tensor([[0, 39], [17, 17]])
    assert torch.equal(weight.look_up(packed, ids, torch.float32), weight.decode(packed)[ids])
    with pytest.raises(IndexError, match="the table has 40 rows"):
        weight.look_up(packed, torch.tensor([40]), torch.float32)


@pytest.mark.parametrize(
    "form", [*product.PRODUCT[:-1], *product.TRANSPOSED[:-1], product.DECODE[0]], ids=lambda f: f.name
)
def test_every_form_passes_its_check(form):
    if form.name == "native" and native.library() is None:
        pytest.skip("no C++ compiler here")
    form.check("cpu")


@pytest.mark.parametrize("batch", [1, 3, 8, 20])
def test_ragged_rows_and_batches_give_the_reference_product(batch, monkeypatch):
    monkeypatch.setattr(product, "TILE_WEIGHTS", 1024)  # several tiles, the last one short
    for bits in BITS:
        packed = weight.from_rounded(rounded(bits, rows=41, cols=96))
        x, g = torch.randn(2, batch, 96), torch.randn(batch, 41)
        torch.testing.assert_close(
            product.multiply(x, packed), product.product_reference(x, packed), rtol=1e-4, atol=1e-2
        )
        found, expected = product.multiply_transposed(g, packed), product.transposed_reference(g, packed)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


def test_the_same_product_twice_has_the_same_bits():
    packed, x = weight.from_rounded(rounded(5)), torch.randn(1, 128)
    assert torch.equal(product.multiply(x, packed), product.multiply(x, packed))


def test_nan_in_an_activation_reaches_every_row_and_no_other_token():
    packed, x = weight.from_rounded(rounded(4)), torch.zeros(2, 128)
    x[1, 5] = torch.nan
    y = product.multiply(x, packed)
    assert y[1].isnan().all()
    assert not y[0].isnan().any()


def test_adapters_on_a_packed_weight_get_the_gradients_of_the_dense_one():
    packed = weight.from_rounded(rounded(4))
    parts = [torch.randn(s, requires_grad=True) for s in ((5, 128), (4, 128), (40, 4))]
    found = []
    for frozen in (packed, weight.decode(packed)):
        x, a, b = parts
        found.append(torch.autograd.grad(linear(x, frozen, a=a, b=b).square().sum(), parts))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-2)


def test_scales_that_are_not_finite_are_refused_by_row_and_group():
    made = rounded(4)
    made.scales[7, 2] = torch.nan
    with pytest.raises(InputError, match="scales hold NaN or infinity, first in row 7, group 2"):
        weight.from_rounded(made)


def test_columns_that_no_chunk_divides_are_refused():
    with pytest.raises(InputError, match="groups of 24 in 48 columns"):
        weight.from_rounded(rounded(4, cols=48, group=24))


def test_activations_of_another_width_are_refused():
    with pytest.raises(InputError, match="activations of 64 values do not match the 128 columns"):
        product.multiply(torch.zeros(1, 64), weight.from_rounded(rounded(4)))


def test_activations_that_want_a_gradient_are_sent_to_the_layer_that_gives_it():
    with pytest.raises(InputError, match=r"use avalab\.kernels\.linear"):
        product.multiply(torch.zeros(1, 128, requires_grad=True), weight.from_rounded(rounded(4)))


# --- the compiler ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("AVALAB_NATIVE", str(tmp_path / "native"))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def test_without_a_compiler_the_torch_form_gives_the_product(fresh, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "none")
    packed, x = weight.from_rounded(rounded(4)), torch.randn(1, 128)
    assert native.library() is None
    torch.testing.assert_close(product.multiply(x, packed), product.product_reference(x, packed))


def test_a_compiler_that_fails_is_quoted_once_by_its_last_line(fresh, monkeypatch, caplog):
    broken = fresh / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho first >&2\necho 'out of registers' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv(native.SWITCH, str(broken))
    packed = weight.from_rounded(rounded(4))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            product.multiply(torch.randn(1, 128), packed)
    assert [r.getMessage() for r in caplog.records] == ["packed products run in torch: out of registers"]
