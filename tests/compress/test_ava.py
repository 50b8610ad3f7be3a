"""The compressor on the tiny model, into a checkpoint and a .gguf file: bytes, engines, cards, what is refused."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from avalab import engines
from avalab.compress import ava, ava_targets, quantize, rounding, sensitivity
from avalab.compress.libraries import Job
from avalab.engines import gguf as gguf_file
from avalab.kernels.formats import Grid
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.measure import families
from avalab.models import checkpoint, packed, predict
from avalab.models.predict import Reference


@pytest.fixture(scope="module")
def plain(base) -> Artifact:
    return gguf_file.write(base, "q4_0")


@pytest.fixture(scope="module")
def made(run, base, plain, calibration) -> Artifact:
    """Our file with the bytes of the plain one."""
    return quantize.compress_artifact(base, "ava", run=run, bytes=plain.bytes, format="gguf")


def job_of(folder: Path, calibration: torch.Tensor, **parameters) -> Job:
    return Job(folder, "cpu", {**ava.DEFAULTS, **parameters}, [], calibration)


def kl(model: PreTrainedModel, against: Reference) -> float:
    return float(predict.score_model(model, against).kl.mean())


def test_the_file_keeps_its_budget_and_the_card_says_what_was_predicted_and_measured(made, plain):
    about = artifacts.load_artifact(made.path).card["measured"]
    assert 0.97 * plain.bytes < made.bytes <= about["predicted_bytes"] <= plain.bytes
    assert made.format == "gguf-mixed"
    assert about["predicted_kl_divergence"] > 0
    assert about["measured_kl_divergence"] > 0
    assert sum(about["formats"].values()) == len(about["types"]) == 4 * 7 + 1


def test_at_the_bytes_of_plain_rounding_the_divergence_is_less(made, plain, against):
    assert kl(checkpoint.load_model(made), against) < 0.85 * kl(checkpoint.load_model(plain), against)


def test_the_types_in_the_file_are_those_of_the_card(made):
    stored = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(engines.gguf_file(made.path)).tensors}
    types = made.card["measured"]["types"]
    assert stored["blk.2.ffn_down.weight"] == types["model.layers.2.mlp.down_proj"]
    assert stored["token_embd.weight"] == types["model.embed_tokens"]
    assert stored["output_norm.weight"] == "f32"


def test_the_torch_engine_reads_it_and_generates(made):
    assert engines.load("torch", made).generate([5, 6, 7], 3)


def test_one_pass_serves_every_budget_and_equal_seeds_give_equal_bytes(base, calibration, tmp_path, monkeypatch):
    monkeypatch.setenv("AVALAB_ARTIFACTS", str(tmp_path / "artifacts"))
    passes, measure = [], sensitivity.expected_increases
    monkeypatch.setattr(sensitivity, "expected_increases", lambda *a, **k: passes.append(1) or measure(*a, **k))
    files = []
    for name, size in (("a", 700_000), ("b", 700_000), ("c", 800_000)):
        folder = tmp_path / name
        folder.mkdir()
        ava.compress_model(job_of(base.path, calibration, bytes=size, format="gguf")).save_pretrained(folder)
        files.append(engines.gguf_file(folder).read_bytes())
    assert files[0] == files[1] != files[2]
    assert len(passes) == 1
    for other in (
        job_of(base.path, calibration[:6], format="gguf"),
        job_of(base.path, calibration, format="gguf", engine="openvino"),
    ):
        ava.sensitivities(other)
    assert len(passes) == 3


def test_what_was_kept_of_a_pass_gives_the_same_file_and_what_is_damaged_is_measured_again(
    base, calibration, tmp_path, monkeypatch
):
    monkeypatch.setenv("AVALAB_ARTIFACTS", str(tmp_path / "artifacts"))
    made, seconds = [], []
    for name in ("first", "kept", "damaged"):
        folder = tmp_path / name
        folder.mkdir()
        packed = ava.compress_model(job_of(base.path, calibration, bytes=600_000))
        packed.save_pretrained(folder)
        made.append((folder / "model.safetensors").read_bytes())
        seconds.append(packed.measured["reused_seconds"])
        if name == "kept":
            next((tmp_path / "artifacts" / "cache").glob("sensitivities-*.safetensors")).write_bytes(b"cut off")
    assert made[0] == made[1] == made[2]
    assert seconds[0] == seconds[2] == 0 < seconds[1]


def test_the_curve_runs_from_the_smallest_file_to_bf16_and_never_rises(base, calibration):
    job = job_of(base.path, calibration, format="gguf")
    found = ava.budget_curve(job, ava.sensitivities(job), steps=6)
    sizes, costs = [size for size, _ in found], [allocation.cost for _, allocation in found]
    assert sizes == sorted(sizes)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0


def test_an_engine_gets_only_types_that_it_reads_as_written(run, base, plain):
    found = quantize.compress_artifact(base, "ava", run=run, bytes=plain.bytes, format="gguf", engine="openvino")
    assert found.name.endswith("-gguf-openvino")
    assert set(found.card["measured"]["formats"]) <= {*ava_targets.GGUF_TYPES["openvino"], "bf16"}


@pytest.mark.parametrize("format", ["transformers", "gguf", "onnx"])
def test_a_budget_that_holds_the_model_as_it_is_is_refused_with_both_sizes(format, run, base):
    said = f"{base.bytes / 1e6:.1f} MB in bf16, within the budget of 4.0 MB: nothing to compress"
    with pytest.raises(ValueError, match=said):
        quantize.compress_artifact(base, "ava", run=run, bytes=4_000_000, format=format)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"bytes": 300_000, "format": "gguf"}, r"300,000 bytes is below the smallest GGUF file, [\d,]+ bytes"),
        ({"format": "rtf"}, "unknown format 'rtf'; choose one of transformers, gguf, onnx"),
        ({"format": "gguf", "engine": "steam"}, "engine 'steam'; choose one of any, llamacpp, torch, openvino"),
        ({"bytes": -1}, "a budget has to be positive, got -1"),
        ({"bytes": 700_000, "bits_per_weight": 5.0}, "two budgets for one file"),
        ({"engine": "openvino"}, "engine 'openvino' chooses among GGUF types; it needs format=gguf"),
        ({"format": "gguf", "group_size": 64}, "group_size 64 is not of format=gguf"),
        ({"format": "gguf", "embedding": "bf16"}, "embedding=bf16 is not of format=gguf"),
    ],
)
def test_a_budget_format_or_engine_that_cannot_be_is_refused(parameters, message, run, base):
    with pytest.raises(ValueError, match=message):
        quantize.compress_artifact(base, "ava", run=run, **parameters)


def test_a_family_without_names_in_gguf_is_told_which_exports_remain(tmp_path):
    folder = families.make_model("qwen3-moe", tmp_path)
    job = job_of(folder, torch.zeros(4, 8, dtype=torch.long), format="gguf")
    with pytest.raises(ValueError, match=r"qwen3_moe.*artefact for transformers.*onnx, onnx-genai and openvino"):
        ava.compress_model(job)


def test_columns_that_no_block_divides_stay_in_bf16_and_the_card_names_them(tmp_path, base, calibration):
    """The MLP's width cut to 40 channels more than a multiple of 32."""
    model = checkpoint.load_model(base)
    width = model.config.intermediate_size - 24
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data = layer.mlp.gate_proj.weight.data[:width].clone()
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data[:width].clone()
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, :width].clone()
    model.config.intermediate_size = width
    checkpoint.save_model(model, checkpoint.load_tokenizer(base), tmp_path / "cut")
    job = job_of(tmp_path / "cut", calibration, bytes=1_000_000, format="gguf")
    about = ava.compress_model(job).measured
    assert about["types"]["model.layers.0.mlp.down_proj"] == "bf16"
    assert "no block of 32 divides the columns of model.layers.0.mlp.down_proj" in about["note"]


def test_a_head_that_is_not_tied_is_rounded_in_gguf_and_kept_in_a_checkpoint(tmp_path, base, calibration):
    model = checkpoint.load_model(base)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
    model.config.tie_word_embeddings = False
    checkpoint.save_model(model, checkpoint.load_tokenizer(base), tmp_path)
    about = ava.compress_model(job_of(tmp_path, calibration, bits_per_weight=6, format="gguf")).measured
    assert {"lm_head", "model.embed_tokens"} <= about["types"].keys()
    assert about["types"]["lm_head"] != "bf16"
    tensors = ava.compress_model(job_of(tmp_path, calibration, bits_per_weight=6)).tensors
    assert tensors["lm_head.weight"].dtype == torch.bfloat16


def test_expected_increases_rank_single_choices_as_measured_ones_do(base, calibration, against):
    options = ava.sensitivities(job_of(base.path, calibration, format="gguf")).options
    choices = sensitivity.draw_choices(options, 12, seed=0)
    model = checkpoint.load_model(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = list(
        sensitivity.measure_choices_alone(model, calibration, choices, against, ava_targets.TARGETS["gguf"].round)
    )
    assert sensitivity.rank_correlation([option.cost for _, option in choices], found) > 0.6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_command_prints_predicted_and_measured_divergence(run, base, tmp_path, monkeypatch, capsys):
    from avalab import cli

    arguments = ["quantize", "--method", "ava", "--bytes", "700KB", "--format", "gguf", "--profile", "smoke"]
    monkeypatch.setattr("sys.argv", ["avalab", *arguments, "--out", str(tmp_path / "small")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    printed = capsys.readouterr().out
    assert "predicted KL divergence 0.0" in printed
    assert "measured KL divergence 0.0" in printed
    assert json.loads((tmp_path / "small" / "card.json").read_text())["format"] == "gguf-mixed"
    shutil.rmtree(tmp_path / "small")


# --- a checkpoint for transformers


@pytest.fixture(scope="module")
def options(base, calibration):
    return ava.sensitivities(job_of(base.path, calibration)).options


def test_equal_seeds_give_equal_bytes_within_the_budget_and_load_as_they_were_rounded(
    base, calibration, against, tmp_path, monkeypatch
):
    budget = 600_000
    written = [tmp_path / "a", tmp_path / "b"]
    for folder in written:
        folder.mkdir()
        monkeypatch.setenv("AVALAB_ARTIFACTS", str(folder / "artifacts"))
        packed = ava.compress_model(job_of(base.path, calibration, bytes=budget))
        packed.save_pretrained(folder)
    files = [folder / "model.safetensors" for folder in written]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert 0.97 * budget < files[0].stat().st_size <= budget
    assert 0.97 * packed.measured["predicted_bytes"] < files[0].stat().st_size <= packed.measured["predicted_bytes"]
    loaded = checkpoint.load_model(written[0], packed=False)
    assert kl(loaded, against) < 0.1
    layer = loaded.get_submodule("model.layers.0.mlp.down_proj")
    assert layer.weight.dtype == torch.bfloat16
    assert "weight_packed" not in dict(layer.named_parameters())


def test_a_checkpoint_decodes_to_the_weights_that_were_scored_in_memory(base, tmp_path):
    model = checkpoint.load_model(base)
    name = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(name)
    for grid in (Grid(3, 64), Grid(4, 128, symmetric=True), Grid(8, 32)):
        rounded = rounding.round_weight(
            layer.weight.detach().float(), rounding.rounding_problem(torch.eye(layer.in_features)), grid
        )
        stored = packed.packed_tensors(rounded)
        size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
        assert size == packed.packed_layer_bytes(*layer.weight.shape, grid)
        packed.pack_model(model, {name: rounded}, measured={}).save_pretrained(tmp_path)
        assert torch.equal(checkpoint.load_model(tmp_path, packed=False).get_submodule(name).weight, rounded.decode())


def test_expected_increases_rank_formats_as_measured_ones_do(base, calibration, against, options):
    """Every layer of one block in two formats, alone: the rank correlation of expected and measured KL."""
    expected, measured = [], []
    for name, row in options.items():
        for option in row:
            if option.format in ("w2g128", "w3g64") and ".layers.1." in name:
                model = checkpoint.load_model(base)
                round_to = ava_targets.TARGETS["transformers"].round
                rounding.round_model(model, calibration, {name: option.format}, round_to, tables={})
                expected.append(option.cost)
                measured.append(kl(model, against))
    ranks = torch.tensor([expected, measured]).argsort(1).argsort(1).float()
    assert len(expected) >= 10
    assert torch.corrcoef(ranks)[0, 1] > 0.8


def test_more_bits_cost_more_bytes_and_less_divergence(options):
    for name, row in options.items():
        for size in ("g64", "g128"):
            of_size = [option for option in row if option.format.endswith(size)]
            assert [o.bytes for o in of_size] == sorted(o.bytes for o in of_size), name
            assert [o.cost for o in of_size] == sorted((o.cost for o in of_size), reverse=True), name


def test_a_group_that_does_not_divide_gives_way_to_the_next_larger_one():
    assert {grid.group_size for grid in ava_targets.grids(576)} == {32, 64}
    assert {grid.group_size for grid in ava_targets.grids(640, 32)} == {32}
    assert {grid.group_size for grid in ava_targets.grids(640, 48)} == {64}
    assert {grid.group_size for grid in ava_targets.grids(576, 128)} == {576}


def test_a_budget_below_the_smallest_is_refused_with_the_limit(base, calibration):
    with pytest.raises(ValueError, match=r"below the smallest file, [\d,]+ bytes"):
        ava.compress_model(job_of(base.path, calibration, bits_per_weight=1.0))
    with pytest.raises(ValueError, match="'nf4' is not one of any, bf16, packed"):
        ava.compress_model(job_of(base.path, calibration, embedding="nf4"))


def test_groups_that_do_not_divide_are_named_in_the_notes(base):
    model = checkpoint.load_model(base)
    assert ava_targets.ragged_groups(model, 0) == []
    notes = ava_targets.ragged_groups(model, 96)
    assert notes == ["groups of 128 instead of 96 for 128 columns in 24 layers", notes[1]]
    assert notes[1] == "groups of 128 instead of 96 for 384 columns in 4 layers"


def test_damped_moments_are_counted_in_the_notes(base, calibration, monkeypatch):
    monkeypatch.setattr(rounding, "round_model", lambda *arguments, **options: ({}, 2))
    note = ava.compress_model(job_of(base.path, calibration, bytes=600_000)).measured["note"]
    assert note == "2 second moments were singular and got more damping"


@pytest.mark.parametrize(
    "family", ["mistral-sliding", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite"]
)
def test_a_family_rounded_to_12_bits_gives_nearly_the_logits_of_plain_transformers(family, tmp_path):
    """Bits for every tensor after scales and a rotation: whatever the walk or a norm left out would show."""
    folder = families.make_model(family, tmp_path / family)
    windows = torch.arange(3, 195).reshape(4, 48) * 7 % 1000
    job = job_of(folder, windows, bits_per_weight=12.0, transform="scale+rotate")
    made = tmp_path / "made"
    made.mkdir()
    ava.compress_model(job).save_pretrained(made)
    tokens = torch.arange(3, 63).reshape(2, 30) * 13 % 1000
    eager = {"dtype": torch.float32, "attn_implementation": "eager"}
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, **eager)(tokens).logits
        found = checkpoint.load_model(made, dtype=torch.float32)(tokens).logits
    assert float((found - expected).norm() / expected.norm()) < 0.06
