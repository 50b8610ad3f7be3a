"""Number formats: by pencil, by property, and against bitsandbytes, torchao and gguf."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from avalab.kernels import block_types, formats
from avalab.kernels.formats import (
    FORMATS,
    decode,
    encode,
    four_bit,
    integer,
    pack_nibbles,
    round_to_nearest,
    unpack_nibbles,
)

ALL = FORMATS | block_types.FORMATS
ENCODED = [name for name, row in ALL.items() if row.scale_rule]
SIMPLE = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
K_TYPES = ["iq4_xs", "iq3_s", "iq2_s", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


def normal(rows, cols, seed=0, dtype=torch.float32):
    return (0.02 * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))).to(dtype)


def eighths(count):
    """A row of multiples of 1/8 up to 1,000: no group's float16 scale leaves the normal range."""
    return st.lists(st.integers(-8000, 8000), min_size=count, max_size=count).map(lambda v: torch.tensor([v]) / 8)


def floats(count):
    one = st.floats(-(2.0**15), 2.0**15, width=32)
    return st.lists(one, min_size=count, max_size=count).map(lambda v: torch.tensor([v]))


# --- pencil --------------------------------------------------------------------------------------------------------


def test_nf4_of_minus_one_zero_one_is_its_first_middle_and_last_level():
    """Levels 7, 8 and 9 are 0, 0.0796 and 0.1609: 0.1 is nearest to level 8."""
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([-1.0, 0.0, 1.0, 0.1])
    encoded = encode(weight, FORMATS["nf4"])
    assert encoded.codes[0, :5].tolist() == [0, 7, 15, 8, 7]
    assert encoded.scales.tolist() == [1.0]
    assert decode(encoded)[0, :3].tolist() == [-1.0, 0.0, 1.0]


def test_nibbles_are_packed_high_half_first():
    codes = torch.tensor([[0, 7], [15, 8]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [0x07, 0xF8]


def test_symmetric_int4_of_a_small_vector():
    """The largest magnitude is 7, so a step is 1."""
    encoded = encode(torch.tensor([[-7.0, 3.4, 0.0, 1.6]]), integer(4, 4))
    assert (encoded.codes.tolist(), encoded.scales.tolist()) == ([[-7, 3, 0, 2]], [1.0])


def test_full_range_int4_has_a_finer_step_and_one_more_code():
    """The largest magnitude, 7.5, is 7.5 steps: -7.5 becomes -8 (ties to even), +7.5 is clipped to 7."""
    weight = torch.tensor([[-7.5, 7.5, 1.0, 0.0]])
    assert encode(weight, integer(4, 4, full=True)).codes.tolist() == [[-8, 7, 1, 0]]


def test_asymmetric_int4_of_minus_five_to_ten_has_step_one_and_zero_point_five():
    encoded = encode(torch.tensor([[-5.0, 0.0, 5.2, 10.0]]), integer(4, 4, symmetric=False))
    assert encoded.codes.tolist() == [[0, 5, 10, 15]]
    assert (encoded.scales.tolist(), encoded.offsets.tolist()) == ([1.0], [5])
    assert decode(encoded).tolist() == [[-5.0, 0.0, 5.0, 10.0]]


def test_int2_is_minus_one_zero_one():
    assert encode(torch.tensor([[-1.0, 0.4, 0.6, 1.0]]), integer(2, 4)).codes.tolist() == [[-1, 0, 1, 1]]


def test_q4_0_gives_the_largest_magnitude_the_code_minus_eight():
    """8 is the extreme, so the scale is -1 (float16 0xBC00); a byte holds codes 0 and 16, each plus 8."""
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16] = 8.0, -3.0
    encoded = encode(weight, ALL["q4_0"])
    assert (encoded.codes[0, 0].item(), encoded.codes[0, 16].item()) == (-8, 3)
    assert block_types.pack_blocks(encoded)[0, :4].tolist() == [0x00, 0xBC, 0xB0, 0x88]


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nf4", 4.5), ("nf4-dq", 4 + 8 / 64 + 32 / (64 * 256)), ("int4-g64", 4.25), ("int4-g64-asym", 4.25 + 4 / 64),
     ("q4_0", 4.5), ("q4_1", 5.0), ("q8_0", 8.5), ("q4_k", 4.5), ("q6_k", 6.5625)],
)  # fmt: skip
def test_bits_per_weight_count_the_scales(name, bits):
    assert ALL[name].bits_per_weight == bits


@pytest.mark.parametrize("name", ALL)
def test_a_format_is_called_by_its_own_name(name):
    assert ALL[name].name == name


# --- properties ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int8-asym", "int8-g32", "int4-g32", "int4-g32-asym", "int2-g32-asym"])
@given(weight=floats(32))
@settings(max_examples=40, deadline=None)
def test_the_error_of_integers_is_at_most_half_a_step(name, weight):
    encoded = encode(weight, FORMATS[name])
    half_step = encoded.scales.float().max().item() / 2
    # Beside it only the rounding of float32 itself, of the weight's own size.
    assert (decode(encoded) - weight).abs().max() <= half_step * (1 + 1e-4) + 1e-30


@pytest.mark.parametrize("name", ["int8", "int8-g32", "int4-g32", "int3-g64", "int2-g32", "nf4", "nf4-g32"])
@given(weight=eighths(64))
@settings(max_examples=40, deadline=None)
def test_encoding_what_was_decoded_gives_the_same_codes(name, weight):
    encoded = encode(weight, FORMATS[name])
    assert torch.equal(encode(decode(encoded), FORMATS[name]).codes, encoded.codes)


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "int8", "int8-asym", "int4-g32", "int4-g32-asym", *SIMPLE])
@given(weight=eighths(64), power=st.integers(-3, 3))
@settings(max_examples=20, deadline=None)
def test_a_power_of_two_passes_through(name, weight, power):
    scaled = round_to_nearest(weight * 2.0**power, ALL[name])
    assert torch.equal(scaled, round_to_nearest(weight, ALL[name]) * 2.0**power)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_unpacking_nibbles_undoes_packing(rows, pairs, seed):
    codes = torch.randint(0, 16, (rows, 2 * pairs), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), rows, 2 * pairs), codes)


@pytest.mark.parametrize("name", ENCODED)
def test_groups_of_zeros_stay_zero_beside_others(name):
    weight = normal(2, 256)
    weight[0] = 0
    assert torch.equal(round_to_nearest(torch.zeros(2, 256), ALL[name]), torch.zeros(2, 256))
    assert torch.equal(round_to_nearest(weight, ALL[name])[0], torch.zeros(256))
    assert round_to_nearest(weight, ALL[name]).isfinite().all()


@pytest.mark.parametrize("family", ["int{}", "int{}-asym", "int{}-g32", "int{}-g32-asym"])
def test_more_bits_never_lose_more(family):
    weight = normal(8, 256)
    errors = [(round_to_nearest(weight, FORMATS[family.format(b)]) - weight).norm().item() for b in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", ["nf4", "int4-g64-asym", "q4_1"])
def test_a_row_does_not_depend_on_the_rows_around_it(name):
    """More weights than are coded at a time."""
    weight = normal(2100, 512, dtype=torch.bfloat16)
    rounded = round_to_nearest(weight, ALL[name])
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded[2040:2060], round_to_nearest(weight[2040:2060], ALL[name]))


def test_a_parameter_is_encoded_without_a_gradient():
    weight = torch.nn.Parameter(normal(2, 64))
    assert not round_to_nearest(weight, FORMATS["int4-g64-asym"]).requires_grad


def test_codes_can_be_chosen_under_given_scales():
    groups = torch.tensor([[0.9, -2.2, 40.0, 0.0]])
    codes = formats.nearest_codes(groups, integer(4, 4), scales=torch.tensor([2.0]))
    assert codes.tolist() == [[0, -1, 7, 0]]


# --- oracles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nf4_and_fp4_are_those_of_bitsandbytes_bit_for_bit(kind, size, double, dtype):
    from bitsandbytes import functional

    weight = normal(203, 640, dtype=dtype)
    weight[3, :128] = 0
    packed, state = functional.quantize_4bit(weight, blocksize=size, compress_statistics=double, quant_type=kind)
    encoded = encode(weight, four_bit(kind, size, double_quantization=double))
    assert torch.equal(pack_nibbles(encoded.codes), packed.flatten())
    assert torch.equal(decode(encoded, dtype), functional.dequantize_4bit(packed, state))
    if not double:
        assert torch.equal(encoded.scales, state.absmax)
        return
    assert torch.equal(encoded.nested.codes.flatten()[: len(state.absmax)], state.absmax)
    assert torch.equal(encoded.nested.scales, state.state2.absmax)
    assert torch.equal(encoded.scale_mean, state.offset)
    assert torch.equal(torch.tensor(formats.DYNAMIC_8BIT.levels), state.state2.code)


def test_int8_by_row_is_that_of_llm_int8_but_for_ties():
    """It multiplies by 127 / absmax, we by the reciprocal of absmax / 127: at most one code in 10,000 is off, by 1."""
    from bitsandbytes import functional

    weight = normal(128, 576, dtype=torch.float16)
    codes, absmax, _ = functional.int8_vectorwise_quant(weight)
    encoded = encode(weight, FORMATS["int8"])
    off = (encoded.codes.int() - codes.int()).abs()
    assert off.max() <= 1
    assert off.float().mean() <= 1e-4
    assert torch.allclose(encoded.scales * 127, absmax, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [32, 64, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_those_of_torchao_code_for_code(bits, size, symmetric):
    """With float32 scales on both sides; torchao's symmetric range is the full one."""
    from torchao.quantization import quant_primitives as torchao

    weight = normal(64, 576)
    row = replace(integer(bits, size, symmetric=symmetric, full=symmetric), scale_dtype=torch.float32)
    kind = torchao.MappingType.SYMMETRIC if symmetric else torchao.MappingType.ASYMMETRIC
    block, ends = (1, size or 576), (row.low, row.high)
    scale, zero = torchao.choose_qparams_affine(weight, kind, block, torch.int32, *ends, zero_point_dtype=torch.int32)
    codes = torchao.quantize_affine(weight, block, scale, zero, torch.int32, *ends)
    encoded = encode(weight, row)
    assert torch.equal(encoded.codes.int(), codes)
    assert torch.equal(encoded.scales, scale.flatten())
    theirs = torchao.dequantize_affine(codes, block, scale, zero, torch.int32, *ends, output_dtype=torch.float32)
    assert torch.equal(decode(encoded), theirs)


@pytest.mark.parametrize("spread", [1.0, 0.02, 1e-4])
@pytest.mark.parametrize("name", SIMPLE)
def test_gguf_bytes_are_those_of_the_gguf_package(name, spread):
    weight = normal(64, 576) / 0.02 * spread
    weight[0] = 0
    weight[1] = spread
    weight[2] = (weight[2] * 8 / spread).round() * spread / 8 + 0.0  # many ties; no negative zeros
    theirs = quants.quantize(weight.numpy(), GGMLQuantizationType[name.upper()])
    encoded = encode(weight, ALL[name])
    assert np.array_equal(block_types.pack_blocks(encoded).numpy(), theirs)
    assert np.array_equal(decode(encoded).numpy(), quants.dequantize(theirs, GGMLQuantizationType[name.upper()]))


@pytest.mark.parametrize("name", SIMPLE + K_TYPES)
def test_gguf_bits_per_weight_are_those_of_its_block_sizes(name):
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    assert ALL[name].bits_per_weight == size * 8 / weights


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4-g128", "int4-g128"])
def test_a_group_size_that_does_not_divide_is_named_with_those_that_do(name):
    """For NF4 too: the CPU build of bitsandbytes decodes blocks that cross rows to wrong values."""
    with pytest.raises(ValueError, match=r"group size 128 .* 576 columns; these do: 16, 32, 64$"):
        encode(normal(2, 576), FORMATS[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ENCODED)
def test_a_weight_that_is_not_finite_is_located(name, bad):
    weight = normal(4, 256)
    weight[1, 7] = weight[3, 3] = bad
    with pytest.raises(ValueError, match="2 of 1024 weights are NaN or infinite, first at row 1, column 7"):
        encode(weight, ALL[name])


@pytest.mark.parametrize("name", ["int4-g64", "q8_0", "q4_1"])
def test_a_weight_too_large_for_a_float16_scale_is_refused(name):
    with pytest.raises(ValueError, match=r"1e\+09 is too large: scales of .* are torch.float16"):
        encode(torch.full((1, 64), 1e9), ALL[name])


@pytest.mark.parametrize("name", K_TYPES)
def test_a_format_that_is_only_decoded_says_so(name):
    with pytest.raises(ValueError, match=f"{name} is only decoded"):
        encode(normal(1, 256), ALL[name])
    with pytest.raises(ValueError, match=f"{name} is only decoded here; packed are q4_0, "):
        block_types.pack_blocks(replace(encode(normal(1, 256), ALL["q4_0"]), format=ALL[name]))


def test_a_shape_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"rows and columns, got the shape \(0, 64\)"):
        encode(torch.zeros(0, 64), FORMATS["nf4"])


def test_formats_that_cannot_be_made_are_refused_by_name():
    with pytest.raises(ValueError, match=r"2 to 8 bits .* got 9 and None"):
        integer(9)
    with pytest.raises(ValueError, match="nf4, fp4, got 'af4'"):
        four_bit("af4")
    with pytest.raises(ValueError, match="no GGUF block type is called 'nf4'; there are q4_0, "):
        block_types.pack_blocks(encode(normal(1, 64), FORMATS["nf4"]))


def test_nibbles_above_15_or_unpaired_are_refused():
    with pytest.raises(ValueError, match="got 2 up to 16"):
        pack_nibbles(torch.tensor([[3, 16]], dtype=torch.uint8))
    with pytest.raises(ValueError, match="got 3 up to 2"):
        pack_nibbles(torch.tensor([[0, 1, 2]], dtype=torch.uint8))
