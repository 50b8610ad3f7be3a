"""NF4 and FP4 files of our own encoding: the bytes that transformers and bitsandbytes would have written."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from avalab import four_bit, kernels, models, numerics
from avalab.compressors import Job

PLAIN = {"double_quantization": False, "block_size": 64, "compute_dtype": "bfloat16"}


def written(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text()


def by_transformers(folder, levels, double):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=levels,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=["lm_head"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_a_file_has_the_bytes_that_transformers_and_bitsandbytes_write(levels, double, base, tmp_path):
    job = Job(base.path, "cpu", PLAIN | {"double_quantization": double}, [], None)
    ours = written(four_bit.compressor(levels)(job), tmp_path / "ours")
    assert ours == written(by_transformers(base.path, levels, double), tmp_path / "theirs")


def test_skipped_layers_stay_in_bf16_and_the_file_says_so(base, tmp_path):
    name = "model.layers.0.mlp.down_proj"
    model = four_bit.compressor("nf4")(Job(base.path, "cpu", PLAIN, [name], None))
    written(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors")[f"{name}.weight"].dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_submodule(name).weight, models.load(base.path).get_submodule(name).weight)


def test_a_layer_keeps_its_bias_and_other_block_sizes_compute():
    plain = torch.nn.Linear(256, 8, dtype=torch.bfloat16)
    weight = kernels.encode(plain.weight.data, numerics.four_bit("nf4", 128))
    layer = four_bit.layer(plain, weight, "nf4", torch.bfloat16)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x @ kernels.decode(weight, torch.bfloat16).T + plain.bias
    torch.testing.assert_close(layer(x.requires_grad_()), expected, rtol=2e-2, atol=2e-2)
