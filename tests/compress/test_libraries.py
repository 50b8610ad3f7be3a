"""Libraries' compressors: bitsandbytes' own bytes, AutoRound's own integers, engines' quantisers, what is refused."""

import logging
import subprocess
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from avalab import kernels
from avalab.compress import libraries, quantize
from avalab.compress.libraries import Job
from avalab.data import corpora
from avalab.engines import engine
from avalab.kernels import formats
from avalab.kernels.formats import Grid
from avalab.lab import llamacpp_library
from avalab.lab.run import Run
from avalab.measure import families
from avalab.models import checkpoint

has_quantiser = pytest.mark.skipif(
    not any(llamacpp_library.BUILDS[name]() for name in llamacpp_library.QUANTISERS),
    reason="no build of llama.cpp that quantises is here: python -m avalab.lab.assets llamacpp-linux-x64",
)

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
    job = Job(base.path, "cpu", PLAIN | {"double_quantization": double}, [], None, levels)
    ours = written(libraries.bitsandbytes_4bit(job), tmp_path / "ours")
    assert ours == written(by_transformers(base.path, levels, double), tmp_path / "theirs")


def test_skipped_layers_stay_in_bf16_and_the_file_says_so(base, tmp_path):
    name = "model.layers.0.mlp.down_proj"
    model = libraries.bitsandbytes_4bit(Job(base.path, "cpu", PLAIN, [name], None, "nf4"))
    written(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors")[f"{name}.weight"].dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_submodule(name).weight, checkpoint.load_model(base.path).get_submodule(name).weight)


def test_a_layer_keeps_its_bias_and_other_block_sizes_compute():
    plain = torch.nn.Linear(256, 8, dtype=torch.bfloat16)
    weight = kernels.encode(plain.weight.data, formats.four_bit("nf4", 128))
    layer = libraries.four_bit_layer(plain, weight, "nf4", torch.bfloat16)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x @ kernels.decode(weight, torch.bfloat16).T + plain.bias
    torch.testing.assert_close(layer(x.requires_grad_()), expected, rtol=2e-2, atol=2e-2)


def test_autorounds_integers_are_read_off_its_weights_exactly():
    """Two groups of two: scales 0.5 and 0.25, zero points 8 and 6."""
    layer = torch.nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[-0.5, 1.0, 0.25, -1.5]])
    layer.scale, layer.zp = torch.tensor([[0.5, 0.25]]), torch.tensor([[8.0, 6.0]])
    found = libraries.autoround_integers(layer, Grid(4, 2))
    assert found.codes.tolist() == [[-1, 2, -1, -8]]
    assert found.zero_points.tolist() == [[0, -2]]
    assert torch.equal(found.decode(torch.float32), layer.weight.data)


def test_weights_that_are_not_on_their_grid_are_refused():
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[0.7, 1.0]])
    layer.scale, layer.zp = torch.tensor([[0.5]]), torch.tensor([[8.0]])
    with pytest.raises(ValueError, match=r"0.40 steps off AutoRound's own grid of 4 bits"):
        libraries.autoround_integers(layer, Grid(4, 2))


def test_a_logger_that_another_library_made_its_own_is_standard_again(monkeypatch):
    class Other(logging.Logger):
        pass

    monkeypatch.setattr(logging, "_loggerClass", Other)
    assert type(logging.getLogger("avalab-test-logger")) is Other
    libraries._restore_logger_class("avalab-test-logger")
    assert type(logging.getLogger("avalab-test-logger")) is logging.Logger


def test_onnx_runtimes_builder_is_asked_for_k_quant_and_its_failure_has_a_reason(base, run, monkeypatch):
    asked = []
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="first\nno such layer")
    monkeypatch.setattr(engine, "require", lambda *_, **__: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: asked.append(command) or failed)
    with pytest.raises(RuntimeError, match="the ONNX model builder failed on tiny-llama: no such layer"):
        libraries.onnx_k_quant(Job(base.path, "cpu", {}, [], None, out=run.artifacts_dir))
    assert asked[0][-2:] == ["algo_config=k_quant", "is_symmetric=false"]


def test_a_window_is_what_the_stateful_graph_reads():
    inputs = libraries._inputs(torch.tensor([5, 6, 7]))
    assert inputs["input_ids"].tolist() == [[5, 6, 7]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1]]
    assert inputs["beam_idx"].tolist() == [0]


@has_quantiser
def test_llama_cpp_writes_a_mixture_that_torch_reads(base, run):
    artifact = quantize.compress_artifact(base, "gguf-q4_k_m", run=run)
    assert artifact.card["measured"]["formats"]["q5_0"] > 0  # 256 does not divide the tiny model's rows
    weights = [
        checkpoint.load_model(a, packed=False).get_submodule("model.layers.0.mlp.up_proj").weight
        for a in (base, artifact)
    ]
    assert (weights[1] - weights[0]).norm() < 0.15 * weights[0].norm()


def test_a_layer_cannot_be_kept_out_of_an_engines_own_quantiser(base, run):
    with pytest.raises(ValueError, match="'nncf-int4' keeps no single layer in bf16; leave out skip"):
        quantize.compress_artifact(base, "nncf-int4", run=run, skip=("*.down_proj",))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "granite"])
def test_smoothing_scales_the_norm_that_is_read(family, tmp_path, monkeypatch):
    """At 8 bits logits stay near those of plain transformers; with the wrong norm of Gemma's four, 70 % are off."""
    monkeypatch.setattr(Run, "artifacts_dir", property(lambda self: tmp_path / "artifacts"))
    run = Run("t", "smoke", 0, str(families.make_model(family, tmp_path / family)))
    base = checkpoint.base_artifact(run)
    monkeypatch.setattr(corpora, "calibration_windows", lambda *_: torch.arange(3, 195).reshape(4, 48) * 7 % 1000)
    made = quantize.compress_artifact(base, "smoothquant", run=run)
    tokens = torch.arange(3, 63).reshape(2, 30) * 13 % 1000
    eager = {"dtype": torch.float32, "attn_implementation": "eager"}
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base.path, **eager)(tokens).logits
        found = checkpoint.load_model(made, dtype=torch.float32)(tokens).logits
    assert float((found - expected).norm() / expected.norm()) < 0.3


def test_smoothing_of_a_family_with_other_norms_is_refused():
    with pytest.raises(ValueError, match=r"known are those of llama, .*, not olmo2"):
        libraries._smoothed("olmo2")
