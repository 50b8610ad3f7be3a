"""HQQ's storage: decoded as the library decodes it, with a stand-in for the library where it is not installed."""

import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch
import transformers  # noqa: F401 - before avalab, whose modules import torchao
from safetensors.torch import load_file, save_file

from avalab.compress import quantize
from avalab.measure import peers
from avalab.models import checkpoint, packed, stored

has_hqq = pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="hqq is missing")
LAYER = "model.layers.0.mlp.up_proj"


class Quantizer:
    """As many bytes as weights, one zero point and scale a group: the interface of the library, without packing."""

    bit_to_packing = {4: "none"}  # noqa: RUF012  the library's own is a plain dict, too

    @staticmethod
    def dequantize(codes, about):
        return ((codes.half() - about["zero"]) * about["scale"]).reshape(about["shape"])


class Linear:
    def __init__(self, layer, how, **_options):
        rows = layer.weight.detach().float().reshape(-1, how["weight_quant_params"]["group_size"])
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scale = ((high - low) / 15).half()
        zero = -low / scale
        self.W_q = torch.nn.Parameter((rows / scale + zero).round().clamp(0, 15).byte(), requires_grad=False)
        self.meta = {"scale": scale, "zero": zero.half()}


@pytest.fixture
def library(monkeypatch):
    core = ModuleType("hqq.core.quantize")
    core.Quantizer, core.HQQLinear = Quantizer, Linear
    core.BaseQuantizeConfig = lambda nbits, group_size: {"weight_quant_params": {"group_size": group_size, "axis": 1}}
    for name, module in (("hqq", ModuleType("hqq")), ("hqq.core", ModuleType("hqq.core")), ("hqq.core.quantize", core)):
        monkeypatch.setitem(sys.modules, name, module)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "hqq" else real(name))


def test_a_checkpoint_is_decoded_into_a_dense_model_near_its_base(library, run, base):
    small, plain = (peers.make_peer(base, f"hqq-w4g64{end}", run=run) for end in ("-int8emb", ""))
    original, loaded = checkpoint.load_model(base), checkpoint.load_model(small)
    weights = [model.get_submodule(LAYER).weight.detach() for model in (original, loaded)]
    assert not torch.equal(*weights)
    assert (weights[1] - weights[0]).norm() < 0.15 * weights[0].norm()
    table = original.get_input_embeddings().weight.detach()
    codes, scales = packed.int8_rows(table)
    assert torch.equal(loaded.get_input_embeddings().weight, codes.bfloat16() * scales)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(checkpoint.load_model(plain).get_input_embeddings().weight, table)
    assert plain.bytes - small.bytes == pytest.approx(table.numel(), rel=0.05)
    assert small.format == "hqq"
    kept = quantize.compress_artifact(base, "hqq", run=run, skip=(LAYER,))
    assert torch.equal(checkpoint.load_model(kept).get_submodule(LAYER).weight, weights[0])


def test_bits_that_the_library_has_not_are_refused(library, run, base):
    with pytest.raises(ValueError, match="HQQ has no 5 bits; choose one of 2, 3, 4, 8"):
        quantize.compress_artifact(base, "hqq", run=run, bits=5)


def test_a_missing_tensor_is_named(library, run, base, tmp_path):
    made = peers.make_peer(base, "hqq-w4g64", run=run)
    tensors = load_file(made.path / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((made.path / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "hqq"
    with pytest.raises(ValueError, match=r"has no tensor for model\.norm\.weight"):
        checkpoint.load_model(tmp_path)


def test_only_its_own_folders_are_taken_for_such_checkpoints(base, tmp_path):
    assert not stored.is_one(base.path)
    assert not stored.is_one(tmp_path)


@has_hqq
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_library_itself_rounds_and_decodes(run, base, bits):
    made = quantize.compress_artifact(base, "hqq", run=run, bits=bits, group_size=32)
    weights = [checkpoint.load_model(a).get_submodule(LAYER).weight.detach() for a in (base, made)]
    assert (weights[1] - weights[0]).norm() < {2: 0.5, 3: 0.25, 4: 0.12}[bits] * weights[0].norm()
