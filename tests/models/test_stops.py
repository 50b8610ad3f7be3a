"""What ends an answer, wherever its publisher wrote it; the expected ends are those of the published templates."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from avalab.lab.run import ROOT
from avalab.models import checkpoint
from avalab.models.stops import padding_token, stop_tokens

TINY = ROOT / "data" / "tiny-llama"

# The turn of each published template, in short: what stands before and behind an assistant's answer.
TEMPLATES = {
    "<|im_end|>": "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "<|eot_id|>": "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>",
    "<end_of_turn>": "<start_of_turn>{{ 'model' if m.role != 'user' else 'user' }}\n{{ m.content }}<end_of_turn>\n",
    "<|end|>": "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n",
    "</s>": "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}",
    "<|end_of_text|>": "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n",
}
SPECIAL = ["<|endoftext|>", *TEMPLATES, "<|im_start|>", "<|eom_id|>"]


def tokenizer(template: str = "", eos: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes as tokens and, behind them, special tokens of all families."""
    letters = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    made = Tokenizer(BPE(letters, []))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos)
    if template:
        made.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
    return made


@pytest.mark.parametrize("end", TEMPLATES)
def test_the_token_that_closes_a_turn_of_a_published_template_ends_an_answer(end):
    found = tokenizer(TEMPLATES[end], eos="<|endoftext|>")
    assert found.convert_ids_to_tokens(list(stop_tokens(found))) == [end, "<|endoftext|>"]


def test_a_template_of_lists_of_parts_is_understood():
    parts = "<|{{ m.role }}|>{% for part in m.content %}{{ part['text'] }}{% endfor %}<|end|>"
    found = tokenizer(parts)
    assert found.convert_ids_to_tokens(list(stop_tokens(found))) == ["<|end|>"]


def test_a_template_that_refuses_and_one_that_is_missing_leave_known_names():
    refusing = tokenizer("{{ raise_exception('no') }}")
    for found in (refusing, tokenizer()):
        assert "<|im_end|>" in found.convert_ids_to_tokens(list(stop_tokens(found)))


def test_a_text_template_without_an_end_token_leaves_what_the_configuration_says(tmp_path):
    plain = tokenizer("{{ m.role }}: {{ m.content }}\n")
    assert stop_tokens(plain) == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": plain.convert_tokens_to_ids("</s>")}))
    assert plain.convert_ids_to_tokens(list(stop_tokens(tmp_path, plain))) == ["</s>"]
    assert padding_token((), plain) == 0


def folder_with(folder: Path, found: PreTrainedTokenizerFast, **files: dict) -> Path:
    found.save_pretrained(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_ends_of_all_files_are_united_and_include_those_of_transformers(tmp_path):
    made = tokenizer(TEMPLATES["<|eot_id|>"], eos="<|endoftext|>")
    ends = made.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    folder_with(tmp_path, made, config={"model_type": "llama", "eos_token_id": ends[0]})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    found = stop_tokens(tmp_path)
    theirs = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert set(found) == {*theirs, made.convert_tokens_to_ids("<|endoftext|>")}
    assert found[0] == made.convert_tokens_to_ids("<|eot_id|>")
    assert len(set(found)) == len(found)


def test_a_model_in_memory_and_its_folder_have_the_same_ends(tmp_path):
    made = tokenizer(TEMPLATES["<|im_end|>"])
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model.generation_config.eos_token_id = made.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    assert stop_tokens(model, made) == stop_tokens(tmp_path)
    assert set(made.convert_ids_to_tokens(list(stop_tokens(model, made)))) == {"</s>", "<|im_end|>"}


def test_a_saved_model_tells_other_programs_every_end(tmp_path):
    made = tokenizer(TEMPLATES["<|im_end|>"], eos="<|endoftext|>")
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    checkpoint.save_model(model, made, tmp_path)
    theirs = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert set(made.convert_ids_to_tokens(theirs)) == {"<|im_end|>", "<|endoftext|>"}


def test_an_id_of_ordinary_text_is_a_default_and_ends_nothing_where_an_end_is_known(tmp_path):
    made = tokenizer(TEMPLATES["<|im_end|>"])
    folder_with(tmp_path, made, config={"model_type": "llama", "eos_token_id": 2})
    assert made.convert_ids_to_tokens(list(stop_tokens(tmp_path))) == ["<|im_end|>"]


def test_damaged_ends_are_one_line_that_names_the_file(tmp_path):
    folder_with(tmp_path, tokenizer(), config={"eos_token_id": "two"})
    with pytest.raises(ValueError, match=r"config\.json has eos_token_id 'two'"):
        stop_tokens(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is damaged"):
        stop_tokens(tmp_path)


def test_the_tiny_model_ends_where_transformers_ends_it(tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.py")))
    assert list(stop_tokens(folder)) == [GenerationConfig.from_pretrained(folder).eos_token_id]
    assert stop_tokens(folder, AutoTokenizer.from_pretrained(folder)) == stop_tokens(folder)
