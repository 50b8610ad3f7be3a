"""What a GGUF file says of a tokenizer: names by pencil, SentencePiece's scores read back, templates and ends."""

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from avalab.engines import gguf as gguf_file
from avalab.engines.engine import TINY
from avalab.models import checkpoint, gguf_tokenizer, stored

TEXT = "the theatre then there; one tone, another stone. It is 12 o'clock"


@pytest.fixture
def tiny_copy(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "mine", ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def header(file: Path) -> dict:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def split_by(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}}


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        ({"type": "ByteLevel"}, "gpt-2"),
        ({"pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]}, "smollm"),
        ({"pretokenizers": [split_by(r"x|\p{N}{1,3}|y"), {"type": "ByteLevel"}]}, "llama-bpe"),
        ({"pretokenizers": [split_by(r"x|\p{N}| ?y"), {"type": "ByteLevel"}]}, "qwen2"),
    ],
)
def test_a_way_of_cutting_text_has_the_name_that_readers_know(pre_tokenizer, name):
    assert gguf_tokenizer.split_name(pre_tokenizer) == name


def test_gpt_2s_cut_is_called_smollms_where_no_token_joins_digits():
    assert gguf_tokenizer.split_name({"type": "ByteLevel"}, digits_stand_alone=True) == "smollm"


def test_text_cut_in_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="text is cut by Metaspace"):
        gguf_tokenizer.split_name({"type": "Metaspace"})


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(ValueError, match="ids up to 1023, the embedding 1000 rows"):
        gguf_tokenizer.vocabulary(checkpoint.load_tokenizer(TINY), 1000)


def test_the_score_of_a_token_is_minus_the_rank_of_the_first_merge_that_makes_it():
    model = {"merges": [["t", "h"], ["th", "e"], ["t", "he"]]}
    assert gguf_tokenizer.scores(["t", "th", "the", "x"], model) == [0.0, -1.0, -2.0, 0.0]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "expected"),
    [
        ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]}, None, True),
        (None, {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}, True),
        (None, {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never"}, False),
        ({"type": "Replace", "content": "\u2581"}, None, False),
    ],
)
def test_a_space_before_the_text_is_read_from_either_place(normalizer, pre_tokenizer, expected):
    described = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    assert gguf_tokenizer.begins_with_space(described) is expected


def sentencepiece() -> PreTrainedTokenizerFast:
    """BPE with bytes to fall back to, as Llama 2's, Mistral's, Phi-3's and Gemma's tokenizer.json have it."""
    made = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=400, special_tokens=words, show_progress=False)
    made.train_from_iterator([TEXT] * 3, trainer)
    plain = json.loads(made.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if not token["content"].startswith("<0x")]
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)), **special)


def test_a_sentencepiece_vocabulary_is_read_back_from_its_scores(tiny_copy, tmp_path):
    """By the rule of llama.cpp, `stored.sentencepiece_encoder`: the joined token with the highest score first."""
    tokenizer = sentencepiece()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny_copy / name).unlink()
    tokenizer.save_pretrained(tiny_copy)
    gguf_file.export(tiny_copy, tmp_path / "m.gguf", "f16")
    found = header(tmp_path / "m.gguf")
    types = found["tokenizer.ggml.token_type"]
    assert found["tokenizer.ggml.model"] == "llama"
    assert [types[at] for at in (0, 2, 3, 4, 300)] == [3, 3, 2, 6, 1]  # control, control, unknown, byte, normal
    theirs = stored.sentencepiece_tokenizer(tmp_path / "m.gguf")
    for text in (TEXT, "the other stone é日", "  two  spaces"):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


def with_named_templates(folder: Path) -> None:
    """A list in the tokenizer's configuration, as older folders have it."""
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": template}, {"name": "tool_use", "template": "tools"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def with_template_files(folder: Path) -> None:
    """Files of their own, as transformers writes them now."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")


@pytest.mark.parametrize("give", [with_named_templates, with_template_files])
def test_chat_templates_with_names_are_written_by_name(give, tiny_copy, tmp_path):
    give(tiny_copy)
    gguf_file.export(tiny_copy, tmp_path / "m.gguf", "f16")
    found = header(tmp_path / "m.gguf")
    assert found["tokenizer.chat_template"] == checkpoint.load_tokenizer(TINY).chat_template
    assert found["tokenizer.chat_template.tool_use"] == "tools"
    assert "<|im_end|>" in (tmp_path / "Modelfile").read_text()


def test_a_tokenizer_without_end_and_padding_is_written(tiny_copy, tmp_path):
    """What bare research models have: the file says of no piece of text that it ends an answer."""
    tokenizer = (tiny_copy / "tokenizer.json").read_text().replace("<|im_end|>", "<|turn_end|>")
    (tiny_copy / "tokenizer.json").write_text(tokenizer)
    (tiny_copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        told = json.loads((tiny_copy / name).read_text())
        kept = {key: value for key, value in told.items() if not key.startswith(("eos", "pad"))}
        (tiny_copy / name).write_text(json.dumps(kept))
    gguf_file.export(tiny_copy, tmp_path / "m.gguf", "f16")
    found = header(tmp_path / "m.gguf")
    text = found["tokenizer.ggml.tokens"][found["tokenizer.ggml.eos_token_id"]]
    assert text in AutoTokenizer.from_pretrained(tiny_copy).get_added_vocab()
