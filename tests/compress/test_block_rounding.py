"""Rounding onto GGUF's block types: what gguf-py decodes, what compensation gains, what is refused."""

import gguf
import pytest
import torch

from avalab.compress import block_rounding, rounding
from avalab.kernels import block_types, formats

TYPES = tuple(block_types.FORMATS)
SIMPLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def correlated(columns: int = 512, rows: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moment of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(1500, columns, generator=generator) @ (mixing + 0.5 * torch.eye(columns))
    inputs *= torch.linspace(0.2, 3, columns)
    return 0.05 * torch.randn(rows, columns, generator=generator), inputs.T @ inputs / 1500


@pytest.fixture(scope="module")
def made() -> dict[str, block_types.BlockRounded]:
    weight, moment = correlated()
    posed = rounding.rounding_problem(moment)
    return {name: block_rounding.round_weight(weight, posed, block_types.FORMATS[name]) for name in TYPES}


def error(decoded: torch.Tensor) -> float:
    weight, moment = correlated()
    difference = decoded - weight
    return float(((difference @ moment) * difference).sum())


@pytest.mark.parametrize("name", TYPES)
def test_the_bytes_decode_in_the_gguf_package_to_the_weights_that_were_chosen(name, made):
    stored = made[name].packed().numpy()
    found = gguf.dequantize(stored, gguf.GGMLQuantizationType[name.upper()])
    torch.testing.assert_close(torch.from_numpy(found), made[name].decode(torch.float32), atol=1e-7, rtol=1e-6)
    assert stored.nbytes == block_types.gguf_stored_bytes(24, 512, block_types.FORMATS[name])


@pytest.mark.parametrize("name", SIMPLE)
def test_compensation_onto_a_types_own_grid_beats_the_exporters_rounding(name, made):
    weight, _ = correlated()
    plain = formats.round_to_nearest(weight, block_types.FORMATS[name])
    assert error(made[name].decode(torch.float32)) < 0.5 * error(plain)


def test_more_bits_give_less_error_and_unequal_steps_beat_equal_ones(made):
    errors = {name: error(rounded.decode(torch.float32)) for name, rounded in made.items()}
    for ladder in (("q4_0", "q5_0", "q8_0"), ("q4_1", "q5_1"), ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")):
        assert [errors[name] for name in ladder] == sorted((errors[name] for name in ladder), reverse=True)
    assert errors["iq4_nl"] < errors["q4_0"]
    assert errors["iq4_xs"] < errors["q4_0"]  # at a quarter of a bit less
    assert errors["iq2_s"] < errors["q2_k"]  # at 2.56 bits, and 2.63
    assert errors["iq3_s"] < errors["q3_k"] * 1.2  # at 3.44 bits both


def test_a_weight_on_a_grid_is_kept_exactly_when_nothing_is_correlated():
    """Whole numbers from -8 to 7, one of them -8 in each block, times a scale that float16 holds."""
    codes = torch.randint(-8, 8, (4, 64), generator=torch.Generator().manual_seed(1))
    codes[:, ::32] = -8
    posed = rounding.rounding_problem(torch.eye(64))
    rounded = block_rounding.round_weight(codes * 0.125, posed, block_types.FORMATS["q4_0"])
    assert torch.equal(rounded.decode(torch.float32), codes * 0.125)


@pytest.mark.parametrize("name", TYPES)
def test_zeros_stay_finite(name):
    rounded = block_rounding.round_weight(
        torch.zeros(3, 256), rounding.rounding_problem(torch.eye(256)), block_types.FORMATS[name]
    )
    assert rounded.decode(torch.float32).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["q4_1", "q3_k"])
def test_layers_rounded_together_are_those_rounded_alone(name):
    weight, moment = correlated()
    posed, format = rounding.rounding_problem(moment), block_types.FORMATS[name]
    parts = block_rounding.round_weight(weight, posed, format).split([16, 8])
    for part, rows in zip(parts, weight.split([16, 8]), strict=True):
        alone = block_rounding.round_weight(rows, posed, format)
        torch.testing.assert_close(part.decode(torch.float32), alone.decode(torch.float32), atol=2e-3, rtol=0)
        assert part.packed().shape == alone.packed().shape


@pytest.mark.parametrize(("name", "columns", "block"), [("q4_0", 48, 32), ("q4_k", 576, 256)])
def test_columns_that_blocks_do_not_divide_are_refused(name, columns, block):
    with pytest.raises(ValueError, match=f"blocks of {block} do not divide {columns} columns"):
        block_rounding.round_weight(
            torch.zeros(2, columns), rounding.rounding_problem(torch.eye(columns)), block_types.FORMATS[name]
        )
