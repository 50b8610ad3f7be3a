"""Every method writes an artefact that loads back: what is in its file, what it scores, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from avalab.compress import libraries, quantize
from avalab.kernels import formats
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.run import Run
from avalab.models import checkpoint, predict, walk

FOUR_BITS = ("nf4", "fp4", "torchao-int4", "rtn", "gptq", "awq")
EIGHT_BIT_WEIGHTS = ("int8", "torchao-int8")
LIBRARIES = [*EIGHT_BIT_WEIGHTS, "torchao-int8-dynamic", *FOUR_BITS, "smoothquant"]
ALL = [*LIBRARIES, "ava"]  # `ava` compresses the embedding too; the peers' tests make what is left of METHODS
KEPT = ["model.layers.0.mlp.down_proj", "model.layers.3.mlp.down_proj"]


@pytest.fixture(scope="module")
def made(run, base, calibration) -> dict[str, Artifact]:
    """Every method's artefact with its default parameters."""
    return {method: quantize.compress_artifact(base, method, run=run) for method in ALL}


@pytest.fixture(scope="module")
def loaded(made) -> dict[str, PreTrainedModel]:
    return {method: checkpoint.load_model(artifact, packed=False) for method, artifact in made.items()}


@pytest.fixture(scope="module")
def divergence(loaded, against) -> dict[str, float]:
    return {method: float(predict.score_model(model, against).kl.mean()) for method, model in loaded.items()}


def tensors(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.path / "model.safetensors")


def kl(artifact: Artifact, against) -> float:
    return float(predict.score_model(checkpoint.load_model(artifact), against).kl.mean())


# Every method


@pytest.mark.parametrize("method", ALL)
def test_a_method_writes_a_smaller_artefact_that_loads_back_and_scores(method, made, divergence, base):
    artifact = artifacts.load_artifact(made[method].path)  # verifies every file
    assert 0 < divergence[method] < 0.3
    assert artifact.bytes < 0.65 * base.bytes
    assert artifact.card["base"] == {"name": base.name, "sha256": base.sha256}
    assert artifact.card["recipe"][-1]["step"] == method
    assert artifact.card["measured"]["compress_seconds"] > 0
    assert (artifact.card["measured"]["calibration_tokens"] > 0) == quantize.METHODS[method].calibrated


@pytest.mark.parametrize("method", LIBRARIES)
def test_a_library_changes_the_linear_layers_and_nothing_else(method, made, loaded, base):
    source, stored = tensors(base), tensors(made[method])
    linear = {f"{name}.weight" for name in walk.linear_layers(checkpoint.load_model(base))}
    untouched = source.keys() - linear
    if method in ("awq", "smoothquant"):  # both move scales from activations into the norms
        untouched = {name for name in untouched if "layernorm" not in name}
    assert all(torch.equal(stored[name], source[name]) for name in untouched)
    assert not any(name in stored and stored[name].dtype == torch.bfloat16 for name in linear)
    assert type(loaded[method].get_output_embeddings()) is nn.Linear  # so its logits are scored in float32


def test_eight_bits_diverge_less_than_four(divergence):
    worst = max(divergence[method] for method in EIGHT_BIT_WEIGHTS)
    assert worst < 0.1 * min(divergence[method] for method in FOUR_BITS)


def test_a_forward_pass_changes_neither_the_artefact_nor_the_next_load(made, against):
    """bitsandbytes packs 4-bit weights in place in the first call; a model saved after it would be ruined."""
    model = checkpoint.load_model(made["nf4"])
    first, second = (predict.score_model(model, against).kl for _ in range(2))
    artifacts.load_artifact(made["nf4"].path)
    assert torch.equal(first, second)
    assert torch.equal(predict.score_model(checkpoint.load_model(made["nf4"]), against).kl, first)


# What is in the file


@pytest.mark.parametrize(("method", "block_size"), [("nf4", 64), ("fp4", 64), ("nf4", 32), ("nf4", 128)])
def test_the_four_bit_file_holds_exactly_the_codes_and_scales_of_our_own_format(method, block_size, run, base):
    artifact = quantize.compress_artifact(base, method, run=run, block_size=block_size)
    source, stored = tensors(base), tensors(artifact)
    for name in walk.linear_layers(checkpoint.skeleton(base.path)):
        weight = source[f"{name}.weight"]
        ours = formats.encode(weight, formats.four_bit(method, block_size))
        codes = formats.unpack_nibbles(stored[f"{name}.weight"].flatten(), *weight.shape)
        assert torch.equal(codes, ours.codes), name
        assert torch.equal(stored[f"{name}.weight.absmax"], ours.scales), name


@pytest.mark.parametrize("double_quantization", [False, True])
def test_loaded_nf4_weights_decode_to_those_of_our_own_format(double_quantization, run, base):
    from bitsandbytes.functional import dequantize_4bit

    artifact = quantize.compress_artifact(base, "nf4", run=run, double_quantization=double_quantization)
    format = formats.four_bit("nf4", double_quantization=double_quantization)
    source, model = tensors(base), checkpoint.load_model(artifact)
    for name, layer in walk.linear_layers(model).items():
        theirs = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        ours = formats.round_to_nearest(source[f"{name}.weight"], format)
        assert torch.equal(theirs.view(ours.shape).to(ours.dtype), ours), name


def test_double_quantization_stores_a_quarter_of_the_scale_bytes_and_costs_little(run, base, made, divergence, against):
    smaller = quantize.compress_artifact(base, "nf4", run=run, double_quantization=True)
    plain, double = (
        sum(tensor.nbytes for name, tensor in tensors(artifact).items() if name.endswith("absmax"))
        for artifact in (made["nf4"], smaller)
    )
    assert plain / 4 < double < plain / 3.9
    assert kl(smaller, against) < 1.5 * divergence["nf4"]


def test_double_quantization_makes_the_file_smaller_once_layers_outweigh_its_table(run, tmp_path):
    """Each layer stores a 1 KiB table of 8-bit levels: saved only beyond some 22,000 weights a layer."""
    tiny = checkpoint.load_model(checkpoint.base_artifact(run))
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}
    wide = LlamaForCausalLM(LlamaConfig(**(tiny.config.to_dict() | shape)))
    checkpoint.save_model(wide, checkpoint.load_tokenizer(checkpoint.base_artifact(run)), tmp_path / "wide")
    wide_run = Run("t", "smoke", model=str(tmp_path / "wide"))
    plain, double = (
        quantize.compress_artifact(checkpoint.base_artifact(wide_run), "nf4", run=wide_run, double_quantization=choice)
        for choice in (False, True)
    )
    assert double.bytes < plain.bytes


def test_smaller_blocks_cost_more_bytes_and_diverge_less(run, base, against):
    artefacts = [quantize.compress_artifact(base, "rtn", run=run, group_size=size) for size in (32, 128)]
    assert artefacts[0].bytes > artefacts[1].bytes
    assert kl(artefacts[0], against) < kl(artefacts[1], against)


def test_rounding_by_the_row_rounds_as_our_own_integers_do(run, base):
    """llmcompressor keeps its scales in the weight's bf16; ours are in float32: a step of difference at most."""
    model = checkpoint.load_model(
        quantize.compress_artifact(base, "rtn", run=run, bits=8, group_size=0, symmetric=True),
        packed=False,
    )
    source = tensors(base)
    for name, layer in walk.linear_layers(model).items():
        weight = source[f"{name}.weight"].float()
        ours = formats.encode(weight, formats.integer(8, symmetric=True))
        assert ((layer.weight.float() - formats.decode(ours)).abs() <= 1.6 * ours.scales[:, None]).all(), name


@pytest.mark.parametrize("method", ["nf4", "int8", "torchao-int8", "rtn"])
def test_skipped_layers_and_no_others_stay_in_bf16(method, run, base):
    artifact = quantize.compress_artifact(base, method, run=run, skip=("*.0.mlp.down_proj", "model.layers.3.mlp.down*"))
    source, stored = tensors(base), tensors(artifact)
    names = walk.linear_layers(checkpoint.skeleton(base.path))
    kept = [n for n in names if f"{n}.weight" in stored and stored[f"{n}.weight"].dtype == torch.bfloat16]
    assert kept == KEPT
    layers = walk.linear_layers(checkpoint.load_model(artifact))
    for name in KEPT:
        assert torch.equal(stored[f"{name}.weight"], source[f"{name}.weight"])
        assert torch.equal(layers[name].weight.data, source[f"{name}.weight"])


# Recipes and names


def test_an_equal_recipe_is_reused_and_another_parameter_gets_another_name(run, base, made, monkeypatch):
    other = quantize.compress_artifact(base, "nf4", run=run, double_quantization=True)
    assert other.path != made["nf4"].path
    monkeypatch.setattr(artifacts, "write_artifact", lambda *arguments, **options: pytest.fail("made a second time"))
    assert quantize.compress_artifact(base, "nf4", run=run, block_size=64).sha256 == made["nf4"].sha256


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("nf4", {}, "nf4"),
        ("nf4", {"double_quantization": True, "block_size": 32}, "nf4-dq-b32"),
        ("fp4", {"compute_dtype": "float16"}, "fp4-float16"),
        ("gptq", {}, "gptq-w4g64-asym"),
        ("rtn", {"bits": 8, "group_size": 0, "symmetric": True}, "rtn-w8ch-sym"),
        ("torchao-int4", {"group_size": 32}, "torchao-int4-g32"),
        ("smoothquant", {}, "smoothquant-w8a8-static"),
        ("smoothquant", {"static": False, "smoothing_strength": 0.8}, "smoothquant-w8a8-dynamic-smoothing_strength0.8"),
        ("int8", {"threshold": 3.0}, "int8-threshold3"),
        ("awq", {"grid_points": 20}, "awq-w4g64-asym-grid_points20"),
        ("gptq", {"bits": 3, "embedding": "int8"}, "gptq-w3g64-asym-int8emb"),
        ("autoround", {"iterations": 200}, "autoround-w4g64-iterations200"),
        ("gguf-q4_k_m", {}, "gguf-q4_k_m"),
    ],
)
def test_a_label_is_the_method_and_what_its_parameters_change(method, parameters, expected):
    assert quantize.method_label(method, {**quantize.METHODS[method].defaults, **parameters}) == expected


def test_labels_of_as_many_but_other_layers_differ():
    one, other = (quantize.method_label("int8", {"threshold": 6.0}, [name]) for name in KEPT)
    assert one.startswith("int8-keep1.")
    assert one != other


def test_an_artefact_can_be_written_to_a_folder_of_choice_but_not_over_others_files(run, base, tmp_path):
    artifact = quantize.compress_artifact(base, "nf4", run=run, out=tmp_path / "mine")
    assert artifacts.load_artifact(tmp_path / "mine").sha256 == artifact.sha256
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="not an artefact"):
        quantize.compress_artifact(base, "nf4", run=run, out=tmp_path / "notes")


# Refusals


def refused(message: str):
    return pytest.raises(ValueError, match=message)


def test_an_unknown_method_is_refused_with_those_that_exist(run, base):
    with refused("unknown method 'int5'; choose one of nf4, fp4, int8, .*smoothquant"):
        quantize.compress_artifact(base, "int5", run=run)


def test_an_unknown_parameter_is_refused_with_those_that_exist(run, base):
    with refused("'nf4' has no parameter groups; it has: double_quantization, block_size, compute_dtype, skip"):
        quantize.compress_artifact(base, "nf4", run=run, groups=32)


def test_an_unknown_compute_dtype_is_refused_with_those_that_exist(run, base):
    with refused("compute_dtype 'int3' is not one of bfloat16, float16, float32"):
        quantize.compress_artifact(base, "nf4", run=run, compute_dtype="int3")


def test_an_embedding_that_a_library_cannot_have_is_refused(run, base):
    with refused("embedding 'packed' is not one of bf16, int8"):
        quantize.compress_artifact(base, "gptq", run=run, embedding="packed")


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("rtn", {"group_size": 48}, "group of 48 does not divide the 128 columns.*: 16, 32, 64, 128, or 0 for one"),
        ("torchao-int4", {"group_size": 256}, "group of 256 does not divide the 128 columns.*: 16, 32, 64, 128$"),
        ("nf4", {"block_size": 96}, "group of 96 does not divide the 128 columns of model.layers.0.*: 32, 64, 128$"),
        ("nf4", {"block_size": 16}, "no blocks of 16; sizes that fit every layer: 32, 64, 128$"),
        ("nf4", {"block_size": 0}, "block_size 0 of 'nf4' is below 1"),
        ("torchao-int4", {"group_size": 0}, "group_size 0 of 'torchao-int4' is below 1"),
        ("rtn", {"group_size": -1}, "group_size -1 of 'rtn' is below 0"),
        ("autoround", {"group_size": 0}, "group_size 0 of 'autoround' is below 1"),
        ("rtn", {"bits": 9}, "bits 9 is not one of 2 to 8"),
        ("gptq", {"bits": 0}, "bits 0 is not one of 2 to 8"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_those_that_do(method, parameters, message, run, base):
    with refused(message):
        quantize.compress_artifact(base, method, run=run, **parameters)


def test_a_glob_that_matches_no_layer_is_refused_with_names_that_exist(run, base):
    with refused(r"skip '\*\.lm_head' matches no linear layer; names look like model\.layers\.0\.self_attn\.q_proj"):
        quantize.compress_artifact(base, "nf4", run=run, skip=("*.lm_head",))


def test_an_artefact_is_not_compressed_a_second_time(run, made):
    with refused("format 'bitsandbytes'; only bf16"):
        quantize.compress_artifact(made["nf4"], "rtn", run=run)


def test_what_is_refused_leaves_no_folder_behind(run, base):
    before = sorted(run.artifacts_dir.iterdir())
    with refused("unknown method"):
        quantize.compress_artifact(base, "int5", run=run)
    assert sorted(run.artifacts_dir.iterdir()) == before


def test_equal_inputs_give_equal_files_whatever_the_global_generators_are_at(base, calibration, tmp_path):
    """llmcompressor draws the order of samples from them; the caller's are left as they were."""
    row, parameters = quantize.checked_method("gptq", {"group_size": 32})
    for seed, name in ((1, "a"), (2, "b")):
        (tmp_path / name).mkdir()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        job = libraries.Job(base.path, "cpu", parameters, [], calibration, "gptq", 0, tmp_path / name)
        quantize._fill(row, job)
        assert torch.equal(torch.get_rng_state(), before)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_an_unknown_calibration_text_and_one_that_no_method_reads_are_refused(run, base):
    with pytest.raises(ValueError, match="no calibration text 'novels'; choose one of docs, mix"):
        quantize.compress_artifact(base, "ava", run=run, calibration="novels")
    with pytest.raises(ValueError, match="nf4 reads no calibration text; leave out calibration 'mix'"):
        quantize.compress_artifact(base, "nf4", run=run, calibration="mix")


def test_an_artefact_that_was_calibrated_on_the_mix_is_another_one(run, base, few_docstrings):
    found = quantize.compress_artifact(base, "ava", run=run, bits_per_weight=6, calibration="mix")
    assert found.name.endswith("+ava-6bpw-mix")
    assert found.card["recipe"][-1]["calibration_text"] == "mix"
