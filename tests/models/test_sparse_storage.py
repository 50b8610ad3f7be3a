"""The compressed layout: inverse to the bit, as large as predicted, and strict about what it takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avalab.compress.patterns import n_of_m
from avalab.models import stored


def weight_with_zeros(rows: int, columns: int, share: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < share, 0).bfloat16()


def two_of_four(rows: int, columns: int) -> torch.Tensor:
    weight = weight_with_zeros(rows, columns, 0.1)
    return weight.masked_fill(n_of_m(weight.abs().float(), 2, 4), 0)


@given(st.integers(1, 7), st.integers(1, 40), st.floats(0, 1))
def test_a_bitmask_and_its_values_give_the_weight_back(rows, columns, share):
    weight = weight_with_zeros(rows, columns, share)
    assert torch.equal(stored.from_bitmask(**stored.to_bitmask(weight)), weight)


@given(st.integers(1, 7), st.integers(1, 6))
def test_two_of_four_give_the_weight_back(rows, eights):
    weight = two_of_four(rows, 8 * eights)
    parts = stored.to_two_of_four(weight)
    assert torch.equal(stored.from_two_of_four(parts["places"], parts["values"]), weight)


def test_eight_columns_are_one_byte_the_first_in_the_lowest_bit():
    mask = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    assert stored.pack_bits(mask).tolist() == [[1 + 8, 1]]


def test_places_are_two_bits_each():
    """Places 0 and 3, then 1 and 2: 0 + 3 * 4 + 1 * 16 + 2 * 64 = 156."""
    weight = torch.tensor([[5.0, 0, 0, 6.0, 0, 7.0, 8.0, 0]]).bfloat16()
    parts = stored.to_two_of_four(weight)
    assert parts["places"].tolist() == [[156]]
    assert parts["values"].tolist() == [[5, 6, 7, 8]]


@pytest.mark.parametrize("layout", stored.LAYOUTS)
def test_a_file_gives_every_tensor_back_and_has_the_predicted_bytes(layout, tmp_path):
    tensors = {"norm.weight": torch.randn(16).bfloat16(), "layer.weight": two_of_four(64, 128)}
    size = stored.write_sparse(tensors, ["layer.weight"], tmp_path / stored.FILE, layout=layout)
    back = stored.read_sparse(tmp_path / stored.FILE)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    kept = int((tensors["layer.weight"] != 0).sum())
    predicted = stored.predicted_bytes(64, 128, kept, layout=layout) + 32
    assert 0 < size - predicted < 600  # the header


def test_half_the_weights_are_nine_sixteenths_of_the_bytes():
    """2 bytes of 16 weights' 32 for the mask, 16 for the eight values: 18 / 32."""
    assert stored.predicted_bytes(1024, 1024, 2**19) / (2 * 2**20) == pytest.approx(9 / 16, abs=1e-4)
    assert stored.predicted_bytes(1024, 1024, 2**19, layout="2:4") / (2 * 2**20) == pytest.approx(9 / 16, abs=1e-4)


def test_what_is_not_two_of_four_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"layer\.weight: four neighbours hold more than two non-zeros"):
        stored.write_sparse({"layer.weight": torch.ones(2, 8)}, ["layer.weight"], tmp_path / "f", layout="2:4")
    with pytest.raises(ValueError, match="columns in eights, got 12"):
        stored.write_sparse({"layer.weight": torch.zeros(2, 12)}, ["layer.weight"], tmp_path / "f", layout="2:4")


def test_an_unknown_layout_is_refused_with_those_that_exist(tmp_path):
    with pytest.raises(ValueError, match="unknown layout 'csr'; choose one of bitmask, 2:4"):
        stored.write_sparse({}, [], tmp_path / "f", layout="csr")
