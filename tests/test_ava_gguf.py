"""The compressor over GGUF's block types, on the tiny model: bytes, engines, what the card says, what is refused."""

import json
import shutil

import pytest
import torch
from gguf import GGUFReader
from transformers import GPT2Config, GPT2LMHeadModel

from avalab import additivity, artifacts, ava, ava_gguf, corpora, engines, models, quality, quantize
from avalab.artifacts import Artifact
from avalab.compressors import Job
from avalab.engines import gguf
from avalab.experiment import Run
from avalab.quality import Reference


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with folders of its own, whose calibration text is read once."""
    folder = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "artifacts_dir", property(lambda self: folder))
        run = Run("test_ava_gguf", "smoke")
        samples = corpora.calibration_windows(run, models.load_tokenizer(models.base(run)))
        patch.setattr(corpora, "calibration_windows", lambda *arguments: samples)
        yield run


@pytest.fixture(scope="module")
def base(run) -> Artifact:
    return models.base(run)


@pytest.fixture(scope="module")
def calibration(run) -> torch.Tensor:
    return corpora.calibration_windows(run, None)


@pytest.fixture(scope="module")
def against(run, base) -> Reference:
    tokenizer = models.load_tokenizer(base)
    windows = corpora.windows(corpora.text("python_docs", tokenizer), tokenizer, count=4, tokens=64)
    return quality.reference(base, windows, run.artifacts_dir / "cache")


@pytest.fixture(scope="module")
def plain(base) -> Artifact:
    return gguf.write(base, "q4_0")


@pytest.fixture(scope="module")
def made(run, base, plain) -> Artifact:
    """Our file with the bytes of the plain one."""
    return quantize.write(base, "ava", run=run, bytes=plain.bytes, format="gguf")


def kl(artifact: Artifact, against: Reference) -> float:
    return float(quality.score(models.load(artifact), against).kl.mean())


def test_the_file_keeps_its_budget_and_the_card_says_what_was_predicted_and_measured(made, plain):
    about = artifacts.load(made.path).card["measured"]
    assert 0.97 * plain.bytes < made.bytes <= about["predicted_bytes"] <= plain.bytes
    assert made.format == "gguf-mixed"
    assert about["predicted_kl_divergence"] > 0
    assert about["measured_kl_divergence"] > 0
    assert sum(about["formats"].values()) == len(about["types"]) == 4 * 7 + 1


def test_at_the_bytes_of_plain_rounding_the_divergence_is_less(made, plain, against):
    assert kl(made, against) < 0.85 * kl(plain, against)


def test_the_types_in_the_file_are_those_of_the_card(made):
    stored = {t.name: t.tensor_type.name.lower() for t in GGUFReader(engines.gguf_file(made.path)).tensors}
    types = made.card["measured"]["types"]
    assert stored["blk.2.ffn_down.weight"] == types["model.layers.2.mlp.down_proj"]
    assert stored["token_embd.weight"] == types["model.embed_tokens"]
    assert stored["output_norm.weight"] == "f32"


def test_the_torch_engine_reads_it_and_generates(made):
    assert engines.load("torch", made).generate([5, 6, 7], 3)


def test_one_pass_serves_every_budget_and_equal_seeds_give_equal_bytes(base, calibration, tmp_path):
    ava_gguf._sensitivities.cache_clear()
    files = []
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        job = Job(base.path, "cpu", {**ava.DEFAULTS, "bytes": 700_000, "format": "gguf"}, [], calibration)
        ava.compress(job).save_pretrained(folder)
        files.append(engines.gguf_file(folder).read_bytes())
    assert files[0] == files[1]
    assert ava_gguf._sensitivities.cache_info().misses == 1


def test_the_curve_runs_from_the_smallest_file_to_bf16_and_never_rises(base, calibration):
    found = ava_gguf.curve(base.path, ava_gguf.sensitivities(base.path, calibration[:6]), steps=6)
    sizes, costs = [size for size, _ in found], [allocation.cost for _, allocation in found]
    assert sizes == sorted(sizes)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0


def test_an_engine_gets_only_types_that_it_reads_as_written(run, base, plain):
    found = quantize.write(base, "ava", run=run, bytes=plain.bytes, format="gguf", engine="openvino")
    assert found.name.endswith("-gguf-openvino")
    assert set(found.card["measured"]["formats"]) <= {*ava_gguf.TYPES_OF["openvino"], "bf16"}


def test_a_budget_over_bf16_copies_and_says_so(run, base):
    for format in ("gguf", "transformers"):
        found = quantize.write(base, "ava", run=run, bytes=4_000_000, format=format)
        assert "holds the whole bf16 model: copied" in found.card["measured"]["note"]
        ours, theirs = (models.load(artifact).state_dict() for artifact in (found, base))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert found.format == "bf16"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"bytes": 300_000, "format": "gguf"}, r"300,000 bytes is below the smallest GGUF file, [\d,]+ bytes"),
        ({"format": "rtf"}, "unknown format 'rtf'; choose one of transformers, gguf, onnx"),
        ({"format": "gguf", "engine": "steam"}, "engine 'steam'; choose one of any, llamacpp, torch, openvino"),
        ({"bytes": -1}, "a budget has to be positive, got -1"),
    ],
)
def test_a_budget_format_or_engine_that_cannot_be_is_refused(parameters, message, run, base):
    with pytest.raises(ValueError, match=message):
        quantize.write(base, "ava", run=run, **parameters)


def test_a_family_without_names_in_gguf_is_told_which_exports_remain(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=64)).save_pretrained(tmp_path)
    job = Job(tmp_path, "cpu", {**ava.DEFAULTS, "format": "gguf"}, [], torch.zeros(4, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"gpt2.*artefact for transformers and vLLM.*onnx, onnx-genai and openvino"):
        ava.compress(job)


def test_columns_that_no_block_divides_stay_in_bf16_and_the_card_names_them(tmp_path, base, calibration):
    """The MLP's width cut to 40 channels more than a multiple of 32."""
    model = models.load(base)
    width = model.config.intermediate_size - 24
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data = layer.mlp.gate_proj.weight.data[:width].clone()
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data[:width].clone()
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, :width].clone()
    model.config.intermediate_size = width
    models.save_model(model, models.load_tokenizer(base), tmp_path / "cut")
    job = Job(tmp_path / "cut", "cpu", {**ava.DEFAULTS, "bytes": 1_000_000, "format": "gguf"}, [], calibration)
    about = ava.compress(job).measured
    assert about["types"]["model.layers.0.mlp.down_proj"] == "bf16"
    assert "no block of 32 divides the columns of model.layers.0.mlp.down_proj" in about["note"]


def test_expected_rises_rank_single_choices_as_measured_ones_do(base, calibration, against):
    options = ava_gguf.sensitivities(base.path, calibration[:6]).options
    choices = additivity.drawn(options, 12, seed=0)
    model = models.load(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = list(additivity.measured_alone(model, calibration, choices, against, ava_gguf.round_rows))
    assert additivity.rank_correlation([option.cost for _, option in choices], found) > 0.6
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
