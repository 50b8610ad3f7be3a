"""Files that transformers cannot read alone: packed embeddings, HQQ, pruned weights, a GGUF file's vocabulary."""

import importlib.util
import json
import re
import shutil
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from avalab import engines
from avalab.compress import ava, ava_targets, libraries, quantize, rounding
from avalab.compress.patterns import n_of_m
from avalab.data import corpora
from avalab.engines import gguf as gguf_file
from avalab.kernels.formats import Grid
from avalab.lab import artifacts
from avalab.measure import peers
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


def test_predicted_memory_counts_no_copy_of_what_stays_packed(small):
    assert sizes.storage_of_artifact(small)[0].copy_bits == 0


def test_it_fits_the_budget_and_its_card_says_who_can_read_it(small):
    assert 0.97 * BUDGET < small.bytes <= BUDGET
    assert small.bytes <= small.card["measured"]["predicted_bytes"]
    assert small.format == "compressed-tensors-packed-embedding"
    assert small.name.endswith("-packedemb")
    assert "transformers and vLLM need embedding='any'" in small.card["measured"]["note"]
    assert re.fullmatch(r"w[2-8]g\d+", small.card["measured"]["embedding"])
    assert stored.packed_embedding_name(small.path) == NAME


def test_at_equal_bytes_it_is_closer_than_int8_rows(small, run, base, against):
    portable = quantize.compress_artifact(base, "ava", run=run, bytes=small.bytes)
    ours, theirs = (float(predict.score_model(checkpoint.load_model(a), against).kl.mean()) for a in (small, portable))
    assert ours < theirs


def test_what_is_loaded_is_what_was_rounded_in_memory_and_the_head_shares_it(base, windows, tmp_path):
    for grid in (Grid(2, 64), Grid(3, 128), Grid(5, 32), Grid(8, 64)):
        model = checkpoint.load_model(base)
        posed = {NAME: rounding.rounding_problem(torch.eye(128))}
        round_to = ava_targets.TARGETS["transformers"].round
        found, _ = rounding.round_model(model, windows, {NAME: grid.name}, round_to, tables=posed)
        rounded = found[NAME]
        packed.pack_model(model, found, measured={}).save_pretrained(tmp_path)
        loaded = checkpoint.load_model(tmp_path, packed=False)
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
    tables = [checkpoint.load_model(a, packed=False).get_input_embeddings().weight.float() for a in (small, exported)]
    assert (tables[0] - tables[1]).abs().max() <= tables[0].abs().max() / 128  # a bf16 step


def test_training_through_the_rounding_sees_the_layers_and_leaves_the_embedding(small, tmp_path):
    layers = packed.packed_layers(small)
    assert len(layers) == 28
    assert NAME not in layers
    packed.replace_layers(small, tmp_path, layers)
    assert (tmp_path / "model.safetensors").read_bytes() == (small.path / "model.safetensors").read_bytes()


def test_a_tensor_that_is_missing_besides_the_embedding_is_named(small, tmp_path):
    folder = copied(small, tmp_path, drop="model.norm.weight")
    with pytest.raises(ValueError, match=r"lacks 1 tensor: model\.norm\.weight"):
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
    posed = rounding.rounding_problem(torch.eye(48))
    table = torch.randn(8, 48)
    (grid,) = {g for g in ava_targets.grids(48) if g.bits == 3}
    assert rounding.round_weight(table, posed, grid).scales.shape == (8, 1)


# --- HQQ -----------------------------------------------------------------------------------------------------------


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
    original, loaded = checkpoint.load_model(base), checkpoint.load_model(small, packed=False)
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
    assert torch.equal(checkpoint.load_model(kept, packed=False).get_submodule(LAYER).weight, weights[0])


def test_bits_that_the_library_has_not_are_refused(library, run, base):
    with pytest.raises(ValueError, match="hqq has no 5 bits; choose one of 2, 3, 4, 8"):
        quantize.compress_artifact(base, "hqq", run=run, bits=5)


def test_a_missing_tensor_is_named(library, run, base, tmp_path):
    made = peers.make_peer(base, "hqq-w4g64", run=run)
    tensors = load_file(made.path / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((made.path / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "hqq"
    with pytest.raises(ValueError, match=r"lacks 1 tensor: model\.norm\.weight"):
        checkpoint.load_model(tmp_path)


def test_only_its_own_folders_are_taken_for_such_checkpoints(base, tmp_path):
    assert stored.quantization_of(base.path) == {}
    assert stored.quantization_of(tmp_path) == {}


@has_hqq
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_library_itself_rounds_and_decodes(run, base, bits):
    made = quantize.compress_artifact(base, "hqq", run=run, bits=bits, group_size=32)
    weights = [checkpoint.load_model(a, packed=False).get_submodule(LAYER).weight.detach() for a in (base, made)]
    assert (weights[1] - weights[0]).norm() < {2: 0.5, 3: 0.25, 4: 0.12}[bits] * weights[0].norm()


# --- what zeros save -----------------------------------------------------------------------------------------------


def weight_with_zeros(rows: int, columns: int, share: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < share, 0).bfloat16()


def two_of_four(rows: int, columns: int) -> torch.Tensor:
    weight = weight_with_zeros(rows, columns, 0.1)
    return weight.masked_fill(n_of_m(weight.abs().float(), 2, 4), 0)


@given(st.integers(1, 7), st.integers(1, 40), st.floats(0, 1))
def test_a_bitmask_and_its_values_give_the_weight_back(rows, columns, share):
    weight = weight_with_zeros(rows, columns, share)
    assert torch.equal(stored.from_bitmask(**stored.to_bitmask(weight)), weight)


@given(st.integers(1, 7), st.integers(1, 6))
def test_two_of_four_give_the_weight_back(rows, eights):
    weight = two_of_four(rows, 8 * eights)
    parts = stored.to_two_of_four(weight)
    assert torch.equal(stored.from_two_of_four(parts["places"], parts["values"]), weight)


def test_eight_columns_are_one_byte_the_first_in_the_lowest_bit():
    mask = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    assert stored.pack_bits(mask).tolist() == [[1 + 8, 1]]


def test_places_are_two_bits_each():
    """Places 0 and 3, then 1 and 2: 0 + 3 * 4 + 1 * 16 + 2 * 64 = 156."""
    weight = torch.tensor([[5.0, 0, 0, 6.0, 0, 7.0, 8.0, 0]]).bfloat16()
    parts = stored.to_two_of_four(weight)
    assert parts["places"].tolist() == [[156]]
    assert parts["values"].tolist() == [[5, 6, 7, 8]]


@pytest.mark.parametrize("layout", stored.LAYOUTS)
def test_a_file_gives_every_tensor_back_and_has_the_predicted_bytes(layout, tmp_path):
    tensors = {"norm.weight": torch.randn(16).bfloat16(), "layer.weight": two_of_four(64, 128)}
    size = stored.write_sparse(tensors, ["layer.weight"], tmp_path / stored.SPARSE_FILE, layout=layout)
    back = stored.read_sparse(tmp_path / stored.SPARSE_FILE)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    kept = int((tensors["layer.weight"] != 0).sum())
    predicted = stored.predicted_sparse_bytes(64, 128, kept, layout=layout) + 32
    assert 0 < size - predicted < 600  # the header


def test_half_the_weights_are_nine_sixteenths_of_the_bytes():
    """2 bytes of 16 weights' 32 for the mask, 16 for the eight values: 18 / 32."""
    assert stored.predicted_sparse_bytes(1024, 1024, 2**19) / (2 * 2**20) == pytest.approx(9 / 16, abs=1e-4)
    assert stored.predicted_sparse_bytes(1024, 1024, 2**19, layout="2:4") / (2 * 2**20) == pytest.approx(
        9 / 16, abs=1e-4
    )


def test_what_is_not_two_of_four_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"layer\.weight: four neighbours hold more than two non-zeros"):
        stored.write_sparse({"layer.weight": torch.ones(2, 8)}, ["layer.weight"], tmp_path / "f", layout="2:4")
    with pytest.raises(ValueError, match="columns in eights, got 12"):
        stored.write_sparse({"layer.weight": torch.zeros(2, 12)}, ["layer.weight"], tmp_path / "f", layout="2:4")


def test_an_unknown_layout_is_refused_with_those_that_exist(tmp_path):
    with pytest.raises(ValueError, match="unknown layout 'csr'; choose one of bitmask, 2:4"):
        stored.write_sparse({}, [], tmp_path / "f", layout="csr")


# --- a GGUF file's vocabulary --------------------------------------------------------------------------------------


PIECES = ("▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab")
TOKENS = ["<bos>", "<unk>", "\n\n", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
SCORES = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0, -5.0]
TYPES = [3, 3, 4, *[6] * 256, *[1] * len(PIECES)]


@pytest.fixture(scope="module")
def encoder():
    return stored.sentencepiece_encoder(TOKENS, SCORES, TYPES, unknown="<unk>")


def test_the_pair_that_scores_highest_is_merged_first(encoder):
    """In `abc`, `bc` (-1) comes before `ab` (-2); `abc` (-3) then joins a and bc."""
    assert encoder.encode("abc").tokens == ["abc"]
    assert encoder.encode("abb").tokens == ["ab", "b"]
    assert encoder.encode("bcbc").tokens == ["bc", "bc"]


def test_spaces_newlines_and_unknown_characters_come_back(encoder):
    text = "ab abc\n\n é a"
    found = encoder.encode(text)
    assert "\n\n" in found.tokens
    assert "<0xC3>" in found.tokens
    assert encoder.decode(found.ids) == text


def test_windows_begin_with_the_start_token_where_the_tokenizer_puts_one(encoder):
    made = PreTrainedTokenizerFast(tokenizer_object=encoder, bos_token="<bos>", unk_token="<unk>")
    plain = corpora.windows(corpora.Text("t", "abc " * 8), made, count=2, tokens=4)
    made._tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    started = corpora.windows(corpora.Text("t", "abc " * 8), made, count=2, tokens=4)
    assert started[:, 0].tolist() == [0, 0]
    assert started.shape == plain.shape == (2, 4)
    assert started[:, 1:].flatten().tolist() == plain.flatten().tolist()[:6]


def test_a_base_model_without_a_chat_format_gets_plain_text_with_roles(encoder):
    made = PreTrainedTokenizerFast(tokenizer_object=encoder, unk_token="<unk>")
    chats = [[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]]
    assert corpora._chat(made, chats) == "user: ab\nassistant: c\n"
