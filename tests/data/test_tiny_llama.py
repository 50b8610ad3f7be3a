"""The committed model of the smoke profile, and the text it never saw."""

import importlib
import sys
from itertools import pairwise
from math import log
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from avalab.data import toolbox

FOLDER = Path(__file__).resolve().parents[2] / "data" / "tiny-llama"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def scripts():
    """The two scripts of the folder as modules: `train` and `held_out`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        patch.setattr(sys, "dont_write_bytecode", True)
        yield {name: importlib.import_module(name) for name in ("held_out", "train")}
        for name in ("held_out", "train"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def measured(model, tokenizer, scripts):
    texts = scripts["held_out"].evaluation_texts()
    return {domain: scripts["held_out"].measure(model, tokenizer, texts[domain], count=10) for domain in texts}


def test_the_folder_holds_two_megabytes_at_most_and_no_checkpoint():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 2_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".py", ".md"}


def test_it_is_a_bf16_llama_of_about_a_million_parameters(model):
    assert 700_000 <= model.num_parameters() <= 1_100_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_groups_of_32_64_and_128_divide_every_linear_layer(model):
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linears) == 4 * 7 + 1
    assert all(layer.in_features % 128 == 0 for layer in linears.values())


def test_loading_prints_nothing_and_generation_stops_at_the_end_of_a_turn(model, tokenizer, capfd):
    AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True)
    assert not [line for line in capfd.readouterr().err.splitlines() if "warn" in line.lower()]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"


@pytest.mark.parametrize("text", ["def f(x):\n    return x * 2\n", "naïve café, 東京 🙂", "  two  spaces\t\n", "1,024"])
def test_the_tokenizer_gives_back_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(("domain", "limit"), [("topics", 30.0), ("calls", 8.0)])
def test_held_out_text_is_predicted_far_better_than_by_token_frequencies(measured, scripts, tokenizer, domain, limit):
    held_out = scripts["held_out"]
    windows = held_out.evaluation_windows(held_out.stream(tokenizer, held_out.evaluation_texts()[domain]), 10)
    perplexity = measured[domain]["bf16"]["perplexity"]
    assert perplexity < limit
    assert perplexity < held_out.unigram_perplexity(windows[:, 1:].flatten()) / 4 < len(tokenizer)


@pytest.mark.parametrize("domain", ["topics", "calls"])
def test_fewer_bits_mean_a_larger_divergence(measured, domain):
    divergences = [measured[domain][name]["kl_nats"] for name in ("int8-g128", "int4-g32", "int3-g32", "int2-g32")]
    assert measured[domain]["bf16"]["kl_nats"] == 0
    assert all(more > 3 * less > 0 for less, more in pairwise(divergences))


def test_training_text_shares_no_passage_with_the_evaluation_topics(scripts):
    word_runs = scripts["held_out"].word_runs
    evaluation = set().union(*map(word_runs, scripts["held_out"].evaluation_texts()["topics"]))
    training = scripts["train"].training_texts(0)
    shared = set().union(*(word_runs(text) & evaluation for text in training["topics"] + training["docstrings"]))
    # What is left are runs across the seam where a shared paragraph was taken out.
    assert len(shared) < len(evaluation) / 1000


def test_a_perplexity_of_a_uniform_text_is_its_number_of_tokens(scripts):
    """Four tokens, each a quarter of the text: exp(-log(1/4)) = 4."""
    assert scripts["held_out"].unigram_perplexity(torch.tensor([0, 1, 2, 3] * 5)) == pytest.approx(4, rel=1e-6)


def test_rounding_to_two_bits_keeps_three_levels_a_group(model, scripts):
    weight = scripts["held_out"].round_linear_layers(model, 2, 32).model.layers[0].mlp.up_proj.weight
    assert all(len(group.unique()) <= 3 for group in weight.view(-1, 32)[:50])


def test_the_chat_template_marks_every_turn(tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nHi<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_the_chat_template_lists_tools_as_the_training_chats_do(tokenizer):
    for example in toolbox.function_calling_examples(20, seed=5):
        written_out = tokenizer.apply_chat_template(example["messages"], tokenize=False)
        assert written_out == tokenizer.apply_chat_template(
            example["messages"][1:], tools=example["tools"], tokenize=False
        )


def test_the_chat_template_renders_structured_calls_as_text(tokenizer):
    example = next(toolbox.function_calling_examples(1, seed=6))
    calls = [{"type": "function", "function": call} for call in example["calls"]]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    structured = tokenizer.apply_chat_template([*example["messages"][:2], answer], tokenize=False)
    assert structured == tokenizer.apply_chat_template(example["messages"], tokenize=False)


def test_a_system_message_stays_before_the_list_of_tools(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tools=toolbox.tools()[:1], tokenize=False)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n" + toolbox.TOOL_PROMPT[0])


def test_the_loss_of_a_uniform_guess_is_the_logarithm_of_the_vocabulary(tokenizer):
    """The scale on which the limits above are read: 1,024 tokens are 6.93 nats."""
    assert log(len(tokenizer)) == pytest.approx(6.931, abs=1e-3)
