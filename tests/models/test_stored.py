"""A packed embedding: chosen, written, decoded, exported; refused where it cannot be read; damage is named."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from avalab import engines
from avalab.compress import ava, ava_targets, libraries, quantize, rounding
from avalab.compress.allocation import Allocation, Option
from avalab.data import corpora
from avalab.engines import gguf as gguf_file
from avalab.kernels.formats import Grid
from avalab.lab import artifacts
from avalab.models import checkpoint, packed, predict, sizes, stored

pytestmark = pytest.mark.usefixtures("few_docstrings")
BUDGET = 400_000  # 5.0 bits a parameter; with int8 rows the tiny model starts at 393,000
NAME = "model.embed_tokens"


@pytest.fixture(scope="module")
def windows(run, base):
    return corpora.calibration_windows(run, checkpoint.load_tokenizer(base))


@pytest.fixture(scope="module")
def small(run, base):
    return quantize.compress_artifact(base, "ava", run=run, bytes=BUDGET, embedding="packed")


@pytest.fixture(scope="module")
def against(run, base):
    tokenizer = checkpoint.load_tokenizer(base)
    texts = corpora.windows(corpora.evaluation_texts(run, tokenizer)[0], tokenizer, count=8, tokens=64)
    return predict.make_reference(base, texts, run.artifacts_dir / "cache")


def test_predicted_memory_counts_the_embedding_that_loading_unpacks(small):
    assert sizes.of_artifact(small)[0].embedding_copy_bits == 16


def test_it_fits_the_budget_and_its_card_says_who_can_read_it(small):
    assert 0.97 * BUDGET < small.bytes <= BUDGET
    assert small.bytes <= small.card["measured"]["predicted_bytes"]
    assert small.format == "compressed-tensors-packed-embedding"
    assert small.name.endswith("-packedemb")
    assert "transformers and vLLM need embedding='any'" in small.card["measured"]["note"]
    assert re.fullmatch(r"w[2-8]g\d+", small.card["measured"]["embedding"])
    assert stored.name_in(small.path) == NAME


def test_at_equal_bytes_it_is_closer_than_int8_rows(small, run, base, against):
    portable = quantize.compress_artifact(base, "ava", run=run, bytes=small.bytes)
    ours, theirs = (float(predict.score_model(checkpoint.load_model(a), against).kl.mean()) for a in (small, portable))
    assert ours < theirs


def test_what_is_loaded_is_what_was_rounded_in_memory_and_the_head_shares_it(base, windows, tmp_path):
    for grid in (Grid(2, 64), Grid(3, 128), Grid(5, 32), Grid(8, 64)):
        model = checkpoint.load_model(base)
        chosen = Allocation({NAME: Option(grid.name, 0, 0.0)})
        posed = {NAME: rounding.problem(torch.eye(128))}
        found, _ = ava.round_model(model, windows, chosen, target=ava_targets.TARGETS["transformers"], tables=posed)
        rounded = found[NAME]
        packed.pack_model(model, found, measured={}).save_pretrained(tmp_path)
        loaded = checkpoint.load_model(tmp_path)
        assert torch.equal(loaded.get_input_embeddings().weight, rounded.decode())
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_loading_draws_no_random_number(small):
    torch.manual_seed(5)
    checkpoint.load_model(small)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_equal_seeds_give_equal_bytes(small, base, windows, tmp_path):
    job = libraries.Job(base.path, "cpu", {**ava.DEFAULTS, "bytes": BUDGET, "embedding": "packed"}, [], windows)
    ava.compress_model(job).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (small.path / "model.safetensors").read_bytes()


def test_plain_transformers_refuses_the_folder_instead_of_guessing(small):
    with pytest.raises(AttributeError, match="weight"):
        AutoModelForCausalLM.from_pretrained(small.path)


def test_the_torch_engine_runs_it(small):
    opened = engines.load("torch", small)
    assert opened.logits([1, 2, 3]).isfinite().all()
    opened.close()


def test_exported_to_gguf_it_is_the_same_model(small):
    exported = gguf_file.write(small, "kept")
    tables = [checkpoint.load_model(a).get_input_embeddings().weight.float() for a in (small, exported)]
    assert (tables[0] - tables[1]).abs().max() <= tables[0].abs().max() / 128  # a bf16 step


def test_training_through_the_rounding_sees_the_layers_and_leaves_the_embedding(small, tmp_path):
    layers = packed.packed_layers(small)
    assert len(layers) == 28
    assert NAME not in layers
    packed.replace_layers(small, tmp_path, layers)
    assert (tmp_path / "model.safetensors").read_bytes() == (small.path / "model.safetensors").read_bytes()


def test_a_tensor_that_is_missing_besides_the_embedding_is_named(small, tmp_path):
    folder = copied(small, tmp_path, drop="model.norm.weight")
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight: nothing else than the embedding is packed"):
        checkpoint.load_model(folder)
    folder = copied(small, tmp_path, drop=f"{NAME}.weight_scale")
    with pytest.raises(ValueError, match=r"says that model\.embed_tokens is packed, and holds no such tensors"):
        checkpoint.load_model(folder)


def copied(small, folder, *, drop):
    tensors = load_file(small.path / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if k != drop}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((small.path / "config.json").read_text())
    return folder


def test_altered_codes_are_noticed(small, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(small.path, folder)
    assert artifacts.load_artifact(folder).sha256 == small.sha256
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors was altered"):
        artifacts.load_artifact(folder)


def test_a_budget_below_the_smallest_names_it_and_the_packed_one_is_smaller(base, windows):
    smallest = {}
    for embedding in ("any", "packed"):
        job = libraries.Job(base.path, "cpu", {**ava.DEFAULTS, "bytes": 1000, "embedding": embedding}, [], windows)
        with pytest.raises(ValueError, match=r"1,000 bytes is below the smallest file, [\d,]+ bytes") as refused:
            ava.compress_model(job)
        smallest[embedding] = int(re.search(r"file, ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))
    assert smallest["packed"] < 0.8 * smallest["any"]
    job = libraries.Job(
        base.path, "cpu", {**ava.DEFAULTS, "bytes": smallest["packed"], "embedding": "packed"}, [], windows
    )
    assert ava.compress_model(job).measured["predicted_bytes"] == smallest["packed"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"embedding": "nf4"}, "'nf4' is not one of any, bf16, packed"),
        ({"embedding": "packed", "format": "gguf"}, "of the own format; gguf rounds every embedding anyway"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(base, windows, parameters, message):
    with pytest.raises(ValueError, match=message):
        ava.compress_model(libraries.Job(base.path, "cpu", {**ava.DEFAULTS, **parameters}, [], windows))


def test_rows_no_group_divides_are_one_group():
    posed = rounding.problem(torch.eye(48))
    table = torch.randn(8, 48)
    (grid,) = {g for g in ava_targets.grids(48) if g.bits == 3}
    assert rounding.round_weight(table, posed, grid).scales.shape == (8, 1)
