"""The Triton kernels under Triton's interpreter on a CPU, or on the GPU where there is one, against the references.

Triton decides when it is imported whether it interprets, and other tests import it: so the checks below, named
`check_`, run in a process of their own, started by the one test.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from avalab.kernels import loss_chunks, weight
from avalab.kernels.product import KINDS, error_bound, sample_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter, numpy, warns about infinity less infinity even where `tl.where` then drops the result.
discarded = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernels_pass_their_checks():
    command = [sys.executable, "-m", "pytest", "-o", "python_functions=check_*", __file__]
    mode = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env={**os.environ, **mode}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from avalab.kernels import triton as ours

def ptx(kernel, constants, **types):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return compile(source, GPUTarget("cuda", 86, 32)).asm["ptx"]

kinds = {"NESTED": True, "ZERO_POINTS": True, "MINIMUMS": True, "GROUP": 64, "NESTED_SIZE": 256}
sizes = dict.fromkeys(("m_count", "rows", "cols", "byte_count", "stride", "teacher_stride", "vocab"), "i32")
codes = {"codes": "*u8", "scales": "*u8", "zero_points": "*u8", "out": "*bf16", "x": "*bf16"}
numbers = dict.fromkeys(("row_weight", "smoothing", "cooling", "temperature"), "fp32")
rows = {"logits": "*bf16", "teacher": "*bf16", "targets": "*i64"}
blocks = {"EXACT": False, "PART": 64, "BLOCK_M": 16, "BLOCK_N": 16}
assert "mma.sync" in ptx(ours._product, kinds | blocks, **sizes, **codes)
ptx(ours._decode, kinds | {"BLOCK": 1024}, **sizes, **codes)
ptx(ours._encode, dict(MIDDLES=15, HALF=32, BLOCK=32, LEAST=1e-38), weight="*bf16", codes="*u8", count="i32")
ptx(ours._cross_entropy, {"BLOCK": 1024}, **sizes, **numbers, **rows)
ptx(ours._kl, {"BLOCK": 1024, "REVERSE": True}, **sizes, **numbers, **rows)
print("compiled")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernels_compile_to_matrix_instructions_of_an_ampere_gpu(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["compiled"], done.stderr[-3000:]


@pytest.fixture
def ours():
    from avalab.kernels import triton as triton_kernels

    return triton_kernels


@pytest.mark.parametrize("group_size", [32, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def check_encoding_gives_the_bytes_of_the_reference(group_size, dtype):
    from avalab.kernels import encoding
    from avalab.kernels.formats import four_bit

    w = torch.randn(35, 512, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    w[0], w[1, ::3] = 0.0, 0.0
    for double in (False, True):
        format = four_bit("nf4", group_size, double_quantization=double)
        pairs = zip(*(f(w, format).tensors() for f in (encoding.encode_triton, encoding.encode_reference)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    w[3, 5] = float("nan")
    with pytest.raises(ValueError, match="1 of 17920 weights are NaN or infinite, first at row 3, column 5"):
        encoding.encode_triton(w, four_bit("nf4", group_size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "rows"), [(1, 33), (16, 16), (19, 5)])
def check_the_product_stays_within_four_roundings_of_the_exact_one(ours, kind, batch, rows):
    w = sample_weight(DEVICE, kind=kind, rows=rows, cols=128)
    # The interpreter has no bf16 product; float16 takes the same path.
    for dtype in (torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16):
        x = torch.randn(batch, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        exact = x.double() @ weight.decode(w, torch.float64).T
        assert ((ours.product(x, w).double() - exact).abs() <= error_bound(x, w)).all()


@pytest.mark.parametrize("group_size", [32, 96, 128])
def check_groups_of_any_multiple_of_32_are_taken(ours, group_size):
    w, x = (
        sample_weight(DEVICE, kind="int4_zero_point", rows=8, cols=384, group_size=group_size),
        torch.ones(2, 384, device=DEVICE),
    )
    torch.testing.assert_close(ours.product(x, w), x @ weight.decode(w).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def check_strides_nan_and_what_memory_held_before_change_no_other_row(ours, kind, monkeypatch):
    w = sample_weight(DEVICE, kind=kind, rows=33, cols=128)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE)[:, ::2]
    expected = ours.product(x.contiguous(), w)
    x[1, 7] = float("nan")
    plain = torch.empty
    monkeypatch.setattr(ours.torch, "empty", lambda *a, **k: plain(*a, **k).fill_(float("nan")))
    found = ours.product(x, w)
    rows = [0, 2, 3, 4]
    assert torch.equal(found[rows], expected[rows])
    assert found[1].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def check_decoding_gives_the_bits_of_the_reference(ours, kind):
    w = sample_weight(DEVICE, kind=kind, rows=35, cols=192)
    assert torch.equal(ours.decode(w, torch.float32), weight.decode(w))
    if DEVICE == "cuda":  # the interpreter cuts float32 to bf16 instead of rounding
        assert torch.equal(ours.decode(w, torch.bfloat16), weight.decode(w, torch.bfloat16))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "temperature": 0.6}])
@pytest.mark.parametrize("block", [16, 4096])
def check_cross_entropy_of_rows_and_its_gradient_agree_with_torch(ours, options, block, monkeypatch):
    monkeypatch.setattr(ours, "BLOCK", block)
    logits, targets = 3 * rows_of(0), torch.arange(7, device=DEVICE)
    compare(ours.cross_entropy_rows, loss_chunks.cross_entropy_rows, logits, targets, options)


@discarded
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("block", [16, 4096])
def check_kl_of_rows_and_its_gradient_agree_with_torch(ours, reverse, block, monkeypatch):
    monkeypatch.setattr(ours, "BLOCK", block)
    options = {"reverse": reverse, "temperature": 1.7}
    compare(ours.kl_rows, loss_chunks.kl_rows, 3 * rows_of(0), 3 * rows_of(1), options)


@discarded
def check_an_entry_the_teacher_excludes_adds_nothing(ours):
    teacher = rows_of(1)
    teacher[:, 20:] = float("-inf")
    compare(ours.kl_rows, loss_chunks.kl_rows, rows_of(0), teacher, {})


def check_nan_stays_in_its_row(ours):
    logits = rows_of(0)
    logits[2, 5] = float("nan")
    losses = ours.cross_entropy_rows(logits, torch.arange(7, device=DEVICE), 1.0)
    assert losses.isnan().tolist() == logits.isnan().any(1).tolist() == [i == 2 for i in range(7)]


def rows_of(seed):
    return torch.randn(7, 53, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def compare(run, reference, logits, other, options):
    ours, theirs = logits.clone(), logits.clone()
    losses = run(ours, other, 0.3, **options), reference(theirs, other, 0.3, **options)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
