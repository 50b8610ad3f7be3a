"""GGUF files: row order by pencil, weights and tokens read back by every reader here, and what is refused."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from avalab import engines
from avalab.compress import quantize
from avalab.data import grammars
from avalab.engines import gguf as gguf_file
from avalab.engines import openvino as openvino_engine
from avalab.engines.engine import TINY
from avalab.kernels import block_types, formats
from avalab.kernels.block_types import Steps
from avalab.lab import artifacts, llamacpp_library, process
from avalab.lab.errors import InputError
from avalab.models import checkpoint, gguf_layout

TEXTS = ("def area(width, height):\n    return 12 * 345", "<|im_start|>user\nHéllo 2026!<|im_end|>\n")
READ_TEXTS = (
    "def area(width, height):",
    "<|im_start|>user\nHéllo 2026! it's we'll  two\t日本語<|im_end|>\n",
    "x=1234567;  y = 3.14159",
)
ADD = {"name": "add", "parameters": {"type": "dict", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}}
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "vocab_size": 1040, "max_position_embeddings": 128}

every_reader = pytest.mark.parametrize(
    "name",
    [
        pytest.param("openvino", marks=pytest.mark.needs("openvino_genai")),
        pytest.param("llamacpp", marks=pytest.mark.needs("xllamacpp")),
    ],
)


@pytest.fixture
def tiny_copy(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "mine", ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def logits(folder: Path) -> torch.Tensor:
    engine = engines.load("torch", folder, dtype=torch.float32)
    return engine.logits(checkpoint.load_tokenizer(TINY)(TEXTS[0]).input_ids)


def header(folder: Path) -> dict:
    fields = GGUFReader(engines.gguf_file(folder)).fields
    return {name: field.contents() for name, field in fields.items()}


# --- weights -----------------------------------------------------------------------------------------------------


def test_a_file_in_float32_computes_what_the_folder_computes(made):
    """Same weights in the same library; 1e-4 for the order of additions."""
    torch.testing.assert_close(logits(made("gguf-f32")), logits(TINY), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("make", "config"),
    [(Qwen2ForCausalLM, Qwen2Config(**SHAPE)), (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=128))],
    ids=["qwen2", "qwen3"],
)
def test_a_qwen_model_with_biases_padding_and_its_own_head_is_read_back(make, config, tmp_path):
    """Random weights, 16 more rows than tokens; in float32, logits within 1e-4."""
    model = make(config).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    source, target = tmp_path / "source", tmp_path / "target"
    checkpoint.save_model(model, checkpoint.load_tokenizer(TINY), source)
    target.mkdir()
    gguf_file.export(source, target / "q.gguf", "f32")
    torch.testing.assert_close(logits(target), logits(source), atol=1e-4, rtol=0)
    assert header(target)["tokenizer.ggml.tokens"][1024:] == [f"[PAD{row}]" for row in range(1024, 1040)]


@pytest.mark.parametrize("block", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_a_linear_weight_is_stored_as_its_block_type_rounds_it(block, made):
    reader = GGUFReader(engines.gguf_file(made(f"gguf-{block}")))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    original = checkpoint.load_model(TINY).get_parameter("model.layers.1.mlp.down_proj.weight").float()
    found = stored["blk.1.ffn_down.weight"]
    assert found.tensor_type.name == block.upper()
    decoded = torch.from_numpy(dequantize(found.data, found.tensor_type))
    torch.testing.assert_close(decoded, formats.round_to_nearest(original, block_types.FORMATS[block]))
    assert stored["token_embd.weight"].tensor_type.name == "Q8_0"
    assert stored["output_norm.weight"].tensor_type.name == "F32"


def test_a_tied_head_is_stored_once(made):
    names = {tensor.name for tensor in GGUFReader(engines.gguf_file(made("gguf-bf16"))).tensors}
    assert "token_embd.weight" in names
    assert "output.weight" not in names
    assert len(names) == 4 * 9 + 2


@pytest.mark.parametrize(("columns", "expected"), [(64, "q4_0"), (48, "f16")])
def test_rows_that_blocks_do_not_divide_stay_in_16_bits(columns, expected):
    assert gguf_file.block_of("blk.0.ffn_up.weight", torch.zeros(2, columns), "q4_0") == expected


@pytest.mark.parametrize("block", gguf_file.BLOCKS)
def test_the_block_type_of_a_file_is_read_from_its_tensors(block, tmp_path):
    gguf_file.export(TINY, tmp_path / "m.gguf", block)
    assert gguf_file.block_of_file(tmp_path / "m.gguf") == block


# --- packed grids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "greatest", "block"),
    [
        *[(-8, 7, "q4_0"), (-3, 12, "q4_1"), (-16, 15, "q5_0"), (-1, 30, "q5_1"), (-127, 127, "q8_0")],
        *[(-9, 6, "q5_0"), (-13, 18, "q8_0"), (-255, 0, "f16")],  # 11 bits do not hold 9 or 13 times 1.9921875
    ],
)
@pytest.mark.parametrize("group_size", [32, 64])
def test_steps_get_the_smallest_block_type_that_holds_their_values_exactly(least, greatest, block, group_size):
    """gguf decodes what was written as steps times scales, to the last bit of float32; in f16 as bf16 rounds them."""
    steps = torch.randint(least, greatest + 1, (3, 128), dtype=torch.int32)
    steps[:, ::32], steps[:, 1::32] = least, greatest
    scales = torch.tensor([[1.9921875, 0.25], [0.498046875, 2.0], [1.0, 0.5]]).bfloat16().repeat(1, 64 // group_size)
    kind, stored = gguf_file.encoded_steps(Steps(steps, scales))
    assert kind == block
    expected = steps * scales.float().repeat_interleave(group_size, dim=1)
    expected = expected.bfloat16().float() if kind == "f16" else expected
    assert torch.equal(torch.from_numpy(dequantize(stored, GGMLQuantizationType[kind.upper()])), expected)


def test_groups_that_blocks_of_32_do_not_divide_are_stored_as_the_values_that_transformers_decodes():
    steps, scales = torch.randint(-8, 8, (2, 96), dtype=torch.int32), torch.full((2, 2), 0.3).bfloat16()
    kind, stored = gguf_file.encoded_steps(Steps(steps, scales))
    assert kind == "f16"
    assert torch.equal(torch.from_numpy(stored).float(), (steps * scales.float()[0, 0]).bfloat16().float())


def test_scales_below_those_of_float16_leave_the_values_in_bf16():
    steps = torch.randint(-8, 8, (2, 64), dtype=torch.int32)
    kind, stored = gguf_file.encoded_steps(Steps(steps, torch.full((2, 2), 1e-6).bfloat16()))
    assert kind == "bf16"
    expected = (steps * torch.tensor(1e-6).bfloat16().float()).bfloat16().float()
    assert torch.equal(torch.from_numpy(dequantize(stored, GGMLQuantizationType.BF16)), expected)


def test_a_reader_that_makes_minimums_whole_gets_four_bits_where_float16_rounds_them():
    """OpenVINO GenAI: least step -9, which is scale times 9 in the file, rounded."""
    steps = torch.randint(-9, 7, (2, 64), dtype=torch.int32)
    steps[:, ::32], steps[:, 1::32] = -9, 6
    scales = torch.full((2, 2), 1.9921875).bfloat16()
    kind, stored = gguf_file.encoded_steps(Steps(steps, scales), openvino_engine.GGUF)
    assert kind == "q4_1"
    decoded = torch.from_numpy(dequantize(stored, GGMLQuantizationType.Q4_1))
    assert torch.equal((decoded / 1.9921875).round().int(), steps)


@pytest.mark.parametrize("method", ["rtn", "ava"])
def test_every_weight_of_a_packed_artefact_is_in_the_file_as_transformers_decodes_it(method, run, base):
    options = {"group_size": 32} if method == "rtn" else {"bits_per_weight": 5.0}
    artifact = quantize.compress_artifact(base, method, run=run, **options)
    exported = gguf_file.write(artifact, "kept")
    back = checkpoint.from_gguf(engines.gguf_file(exported.path))[0]
    decoded = checkpoint.load_dense(artifact.path)
    for name, weight in back.named_parameters():
        assert torch.equal(weight.bfloat16(), decoded.get_parameter(name)), name
    assert set(exported.card["measured"]["types"]) <= {"f32", "f16", "bf16", *(row[0] for row in gguf_file.RANGES)}


def test_a_mixed_grid_artefact_computes_in_gguf_what_it_computes_in_its_own_format(run, base):
    """Nothing is rounded again; transformers rounds decoded values to bf16: logits within 0.02."""
    artifact = quantize.compress_artifact(base, "ava", run=run)
    exported = gguf_file.write(artifact, "kept")
    torch.testing.assert_close(logits(exported.path), logits(artifact.path), atol=0.02, rtol=0)
    assert "quantization_config" not in json.loads((exported.path / "config.json").read_text())


def test_a_dense_model_has_no_grids_to_keep(tmp_path):
    with pytest.raises(ValueError, match="tiny-llama holds no packed integers to keep"):
        gguf_file.export(TINY, tmp_path / "x.gguf", "kept")


# --- header ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_in_the_file_cuts_text_like_the_one_beside_the_weights(text, made):
    file = engines.gguf_file(made("gguf-q8_0"))
    ours, theirs = checkpoint.load_tokenizer(TINY), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert theirs(text).input_ids == ours(text).input_ids
    assert theirs.chat_template == ours.chat_template


def test_the_header_names_the_end_of_a_turn_and_how_text_is_cut(made):
    found = header(made("gguf-q8_0"))
    assert found["tokenizer.ggml.eos_token_id"] == 2
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_a_file_without_configuration_beside_it_tells_context_vocabulary_and_end(made):
    found, known = engines.facts(made("gguf-q8_0")), engines.facts(TINY)
    assert (found.context, found.vocabulary, found.stops[0]) == (known.context, known.vocabulary, known.stops[0])
    assert set(found.stops) <= {*known.stops, 0}  # transformers reads GPT-2's <|endoftext|> into any such file


# --- artefacts ---------------------------------------------------------------------------------------------------


def test_an_exported_artefact_has_all_that_engines_and_ollama_need_and_is_made_once(tiny_artifact):
    base, made = tiny_artifact, gguf_file.write(tiny_artifact, "q4_0")
    assert made.path == base.path.parent / "tiny+gguf-q4_0"
    assert (made.format, made.card["base"]["sha256"]) == ("gguf-q4_0", base.sha256)
    modelfile = (made.path / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./tiny.q4_0.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert made.bytes == engines.gguf_file(made.path).stat().st_size < base.bytes / 2
    assert engines.load("torch", made).generate([5, 6, 7], 3)
    before = engines.gguf_file(made.path).stat().st_mtime_ns
    assert engines.gguf_file(gguf_file.write(base, "q4_0").path).stat().st_mtime_ns == before


def test_the_command_exports_a_gguf_artefact_and_says_what_loads_it(tiny_artifact, tmp_path, command):
    out = tmp_path / "there"
    code, said = command("export", tiny_artifact.path, "--to", "gguf", "--weights", "q4_0", "--out", out)
    assert not code
    assert said == f"{out}: 0.6 MB, gguf-q4_0\nload it with the engine openvino or torch or llamacpp\n"


def test_the_command_keeps_the_integers_of_a_packed_artefact_and_refuses_other_quantised_ones(
    quantised, tmp_path, command
):
    nf4, rtn = quantised
    code, said = command("export", rtn.path, "--to", "gguf", "--out", tmp_path / "kept")
    assert not code
    assert "MB, gguf-kept\nload it with the engine torch or llamacpp" in said
    code, said = command("export", nf4.path, "--to", "gguf", "--out", tmp_path / "nf4")
    assert code == 2
    assert "is quantised already (bitsandbytes); export the dense model that it was made from" in said
    assert len(said.splitlines()) == 1


def overwritten(file: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))


def without_its_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def without_most_of_its_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def with_an_unknown_type(file: Path) -> None:
    """The type follows the name, the number of dimensions and one dimension of 128."""
    about = b"output_norm.weight" + struct.pack("<IQ", 1, 128)
    overwritten(file, about + struct.pack("<I", 0), about + struct.pack("<I", 99))


def with_another_beginning(file: Path) -> None:
    overwritten(file, b"GGUF", b"FUGG")


def emptied(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (emptied, "it is empty"),
        (without_its_end, r"is truncated: it has \d+ bytes, tensor .* ends at byte \d+"),
        (without_most_of_its_header, r"its header breaks off at byte \d+"),
        (with_an_unknown_type, r"tensor output_norm\.weight at byte \d+ has the unknown type 99"),
        (with_another_beginning, r"does not begin with GGUF"),
    ],
)
def test_a_spoilt_file_is_refused_by_name_and_offset(spoil, says, made, tmp_path):
    file = Path(shutil.copy(engines.gguf_file(made("gguf-q8_0")), tmp_path / "spoilt.gguf"))
    spoil(file)
    with pytest.raises(ValueError, match=says) as caught:
        engines.load("torch", tmp_path)
    assert "spoilt.gguf" in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A file of a small header and few tensors."""
    writer = GGUFWriter(tmp_path_factory.mktemp("whole") / "w.gguf", "llama")
    writer.add_context_length(128)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.5, 1.5, 2.5])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return writer.path.read_bytes()


def refusal(file: Path) -> str:
    """What is said of a file, nothing where it is read."""
    try:
        gguf_layout.check(file)
    except InputError as error:
        return str(error)
    return ""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=2000)
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused_in_one_line(data, whole, tmp_path):
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 33))])  # the last bytes may be padding
    said = refusal(file)
    assert str(file) in said
    assert "\n" not in said


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=2000)
@given(data=st.data())
def test_a_file_with_any_altered_bytes_is_read_or_refused_in_one_line(data, whole, tmp_path):
    """Never another exception, nor memory without end: a number of parts is less than the file's bytes."""
    altered = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        altered[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "altered.gguf"
    file.write_bytes(bytes(altered))
    said = refusal(file)
    assert not said or (str(file) in said and "\n" not in said)


def changed(folder: Path, **values) -> Path:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised already \(gptq\)"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "of type 'dynamic'"),
        ({"model_type": "bloom", "n_layer": 2}, "is a bloom; GGUF is written for llama, mistral"),
    ],
)
def test_a_model_that_is_not_exported_is_refused_by_what_it_is(values, says, tiny_copy, tmp_path):
    with pytest.raises(ValueError, match=says):
        gguf_file.export(changed(tiny_copy, **values), tmp_path / "x.gguf", "f16")
    assert not (tmp_path / "x.gguf").exists()


def test_an_unknown_block_type_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no block type 'q3_x'.*q8_0, q5_1, q5_0, q4_1, q4_0, kept"):
        gguf_file.export(TINY, tmp_path / "x.gguf", "q3_x")


# --- readers -----------------------------------------------------------------------------------------------------


@every_reader
@pytest.mark.parametrize("block", ["f16", "q8_0"])
def test_a_gguf_file_gives_the_greedy_tokens_of_transformers(name, block, made, prompt, reference, opened):
    """16 tokens, all equal: at 8 bits and more no choice of the tiny model is close enough to flip."""
    folder = made(f"gguf-{block}")
    engine = opened(name, folder)
    assert engine.generate(prompt, 16, past_end=True) == reference(folder).generate(prompt, 16, past_end=True)


@every_reader
@pytest.mark.parametrize("block", ["f16", "q8_0", "q4_0"])
def test_a_gguf_file_gives_the_distributions_of_transformers(name, block, made, prompt, divergence, reference, opened):
    folder = made(f"gguf-{block}")
    ours, theirs = (e.logits(prompt) for e in (opened(name, folder), reference(folder)))
    assert ours.shape == theirs.shape == (len(prompt), 1024)
    assert divergence(ours, theirs) < 0.005


@every_reader
def test_a_grammar_makes_a_readable_call_in_every_engine(name, made, prompt, opened):
    tokenizer = checkpoint.load_tokenizer(TINY)
    grammar = grammars.call_grammar(grammars.grammar_compiler(tokenizer, 1024), [ADD], refusal=False, max_calls=1)
    engine = opened(name, made("gguf-q8_0"))
    text = tokenizer.decode(engine.generate(prompt, 120, grammar), skip_special_tokens=True)
    call = json.loads(text.removeprefix(grammars.BEGIN).removesuffix(grammars.END))
    assert (call[0]["name"], list(call[0]["arguments"])) == ("add", ["a"])


@every_reader
def test_tokens_are_told_as_they_come_and_generations_do_not_hang_together(name, made, prompt, opened):
    engine, seen = opened(name, made("gguf-q8_0")), []
    first = engine.generate(prompt, 8, past_end=True, on_token=seen.append)
    assert seen == first
    engine.generate(prompt[:3], 4)
    engine.logits(prompt[:5])
    assert engine.generate(prompt, 8, past_end=True) == first


@every_reader
def test_a_closed_engine_of_another_library_says_so(name, made, prompt):
    engine = engines.load(name, made("gguf-q8_0"), threads=1)
    engine.close()
    with pytest.raises(ValueError, match=f"this {name} engine of gguf-q8_0 is closed"):
        engine.generate(prompt, 1)


def token_ids_of_llamacpp(request: dict) -> dict:
    """In a process of its own: what llama.cpp's tokenizer makes of a text."""
    library = llamacpp_library.opened(llamacpp_library.find())
    model = llamacpp_library.Model(library, Path(request["file"]), context=32, batch=32, threads=1)
    return {"ids": model.token_ids(request["text"])}


def token_ids_of_openvino(request: dict) -> dict:
    """In a process of its own: what GenAI's tokenizer makes of a text."""
    threads = {"INFERENCE_NUM_THREADS": request["threads"]} if request["threads"] else {}
    pipeline = openvino_engine.pipeline(Path(request["file"]), "CPU", ATTENTION_BACKEND="SDPA", **threads)
    encoded = pipeline.get_tokenizer().encode(request["text"], add_special_tokens=False)
    return {"ids": encoded.input_ids.data[0].tolist()}


@every_reader
@pytest.mark.parametrize("text", READ_TEXTS)
def test_readers_of_gguf_cut_text_as_the_tokenizer_beside_the_weights(name, text, made):
    file, expected = engines.gguf_file(made("gguf-q8_0")), checkpoint.load_tokenizer(TINY)(text).input_ids
    request = {"file": str(file), "text": text}
    if name == "openvino":
        request["threads"] = engines.usable_options("openvino", file.parent, threads=1)[0]["threads"]
    found = process.call(f"{__name__}:token_ids_of_{name}", request, limit_seconds=120)
    assert found["ids"] == expected


def test_the_file_that_a_base_was_made_from_is_kept_as_it_is_and_another_is_refused(base, tmp_path):
    written = next(gguf_file.write(base, "q8_0").path.glob("*.gguf"))
    with pytest.raises(ValueError, match=r"was not made from .* its card names another SHA-256"):
        gguf_file.keep_published(base, written)
    card = base.card | {"base": {"name": "x", "sha256": artifacts.sha256_of(written)}}
    kept = gguf_file.keep_published(artifacts.Artifact(base.path, card), written)
    assert (kept.path / written.name).read_bytes() == written.read_bytes()
    assert (kept.format, kept.card["engines"]) == ("gguf-published", ["torch", "llamacpp"])
