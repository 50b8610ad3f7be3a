"""GGUF's block types as packed weights, against the gguf package's decoder."""

import gguf
import pytest
import torch

from avalab.compress import block_rounding, rounding
from avalab.kernels.block_types import FORMATS
from avalab.kernels.packed import blocks, product
from avalab.kernels.packed.lattices import LATTICES
from avalab.kernels.packed.weight import decode

TYPES = [name for name in FORMATS if name not in LATTICES]


@pytest.mark.parametrize("name", TYPES)
def test_a_files_bytes_are_the_weights_that_the_gguf_package_decodes(name):
    weight = torch.randn(20, 512, generator=torch.Generator().manual_seed(1))
    posed = rounding.rounding_problem(torch.eye(512))
    data = block_rounding.round_weight(weight, posed, FORMATS[name], repairs=0).packed()
    packed = blocks.from_block_bytes(data, name)
    expected = torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[name.upper()]))
    torch.testing.assert_close(decode(packed), expected, rtol=1e-6, atol=1e-7)
    x = torch.randn(1, 512)
    torch.testing.assert_close(product.multiply(x, packed), x @ expected.T, rtol=1e-4, atol=1e-3)
    assert packed.bytes <= 1.25 * data.numel() * 32 / 20  # rows filled up to 32; multipliers in whole bytes


def test_a_lattice_type_and_a_short_row_are_not_taken():
    assert not blocks.takes("iq2_s", 256)
    assert not blocks.takes("q4_0", 48)
    assert not blocks.takes("f16", 256)
