"""Encoding and packing 4-bit weights: pencil, properties, the reference as oracle, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalab import kernels
from avalab.kernels import dispatch, encoding, formats, weight
from avalab.kernels.formats import FORMATS, LEVELS

ASCENDING = ("nf4", "nf4-dq", "nf4-g32", "nf4-g128-dq")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours.tensors(), theirs.tensors(), strict=True))


def test_a_pair_becomes_a_byte_the_first_in_the_high_half():
    """One group: 2 is the maximum, so its code is 15; -2 is code 0; 0 is code 7."""
    pair = torch.zeros(1, 64)
    pair[0, :4] = torch.tensor([2.0, -2.0, 0.0, 2.0])
    packed = kernels.encode(pair, FORMATS["nf4"])
    assert packed.codes[0, :3].tolist() == [0xF0, 0x7F, 0x77]
    assert packed.scales.tolist() == [[2.0]]


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.bits == 4])
def test_every_four_bit_format_is_encoded_as_formats_defines_it(name):
    w = normal(6, 256)
    assert torch.equal(weight.decode(kernels.encode(w, FORMATS[name])), formats.round_to_nearest(w, FORMATS[name]))


@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    name=st.sampled_from(ASCENDING),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_tiles_give_the_bytes_of_the_reference(rows, groups, name, dtype, size, seed):
    w = (normal(rows, 128 * groups, seed=seed) * size).to(dtype)
    assert same(encoding.encode_tiles(w, FORMATS[name]), encoding.encode_reference(w, FORMATS[name]))


def test_values_half_way_between_two_levels_get_the_lower_code():
    levels = torch.tensor(LEVELS["nf4"])
    w = torch.cat([(levels[:-1] + levels[1:]) / 2, torch.ones(1)]).repeat(4)[None]
    packed = encoding.encode_tiles(w, FORMATS["nf4"])
    assert same(packed, encoding.encode_reference(w, FORMATS["nf4"]))
    assert torch.stack((packed.codes >> 4, packed.codes & 15), -1).view(4, 16)[0].tolist() == [*range(15), 15]


def test_the_weight_that_is_encoded_stays_as_it_was():
    w = normal(8, 128)
    before = w.clone()
    encoding.encode_tiles(w, FORMATS["nf4"])
    assert torch.equal(w, before)


def test_a_transposed_weight_is_encoded_as_its_copy():
    w = normal(128, 64).T
    assert same(kernels.encode(w, FORMATS["nf4"]), kernels.encode(w.contiguous(), FORMATS["nf4"]))


def test_what_memory_held_before_changes_nothing(monkeypatch):
    w, plain = normal(33, 192), torch.empty
    expected = encoding.encode_tiles(w, FORMATS["nf4"])
    monkeypatch.setattr(encoding.torch, "empty", lambda *a, **k: plain(*a, **k).fill_(1))
    assert same(encoding.encode_tiles(w, FORMATS["nf4"]), expected)


def test_a_group_of_zeros_keeps_the_scale_zero_and_decodes_to_zeros():
    w = normal(4, 128)
    w[1, :64] = 0.0
    packed = kernels.encode(w, FORMATS["nf4"])
    assert packed.scales[1, 0] == 0
    assert not weight.decode(packed)[1, :64].any()


def test_the_switch_forces_the_reference(monkeypatch):
    monkeypatch.setenv(dispatch.SWITCH, "reference")
    form = dispatch.choose_form("encode", encoding.ENCODE, torch.device("cpu"), normal(2, 64), FORMATS["nf4"])
    assert form.name == "reference"


def test_a_form_that_changes_a_code_fails_its_check():
    def wrong(w, format):
        packed = encoding.encode_reference(w, format)
        packed.codes[5, 5] ^= 1
        return packed

    with pytest.raises(ArithmeticError, match="differ from the reference"):
        encoding.encode_check(wrong)("cpu")


@pytest.mark.parametrize(
    ("w", "name", "message"),
    [
        (torch.ones(2, 64), "int8", "int8 has 8 bits a code; this packs 4"),
        (torch.ones(2, 96), "nf4", "groups of 64 do not divide 96 columns"),
        (torch.ones(2, 63), "int4", "63 columns: two codes share a byte"),
        (torch.full((2, 64), torch.nan), "nf4", "128 of 128 weights are NaN or infinite, first at row 0, column 0"),
        (torch.full((2, 64), torch.inf), "nf4-dq", "128 of 128 weights are NaN or infinite"),
    ],
)
def test_what_cannot_be_encoded_is_refused(w, name, message):
    with pytest.raises(ValueError, match=message):
        kernels.encode(w, FORMATS[name])
